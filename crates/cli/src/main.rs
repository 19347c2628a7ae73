//! The `spinney` executable: what people type, and what they get to see.
//!
//! One file per verb in `commands/`: an `Args` struct whose comment is the help text, and a function that is read from
//! top to bottom. Everything that happens to machines happens in the daemon; here are words, tables and exit codes.
//!
//! **Must not know:** the engine's insides. It asks the daemon, through `server::client`.

#![forbid(unsafe_code)]

mod address;
mod commands;
mod complete;
mod config;
mod draw;
mod errors;
mod interrupts;
mod output;
mod progress;
mod session;
mod size;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::commands::{Cli, Command};
use crate::config::Config;
use crate::output::Output;
use crate::session::Session;

fn main() -> ExitCode {
    clap_complete::CompleteEnv::with_factory(Cli::command).bin("spinney").complete();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return errors::usage(&error),
    };
    let out = Output::new(cli.json, cli.quiet, cli.verbose);
    if matches!(cli.command, Command::View { .. }) {
        // As a group's owner, who has no business with the configuration of whoever runs the daemon.
        return commands::view()
            .map_or_else(|problem| errors::print(&problem, out.json, None), |()| ExitCode::SUCCESS);
    }
    let session = match Config::load(cli.state.as_deref()) {
        Ok(config) => Session::new(config, out),
        Err(problem) => return errors::print(&problem, out.json, None),
    };
    match commands::run(cli.command, &session) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => errors::print(&problem, out.json, session.ended.exit_code()),
    }
}
