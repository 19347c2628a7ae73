//! The verbs, one file each, and the options that all of them have.

mod back;
mod clone;
mod completion;
mod config;
mod console;
mod create;
mod demo;
mod doctor;
mod du;
mod edit;
mod fork;
mod fsck;
mod gc;
mod goto;
mod group;
mod kill;
mod ls;
mod man;
mod mount;
mod op;
mod pause;
mod peek;
mod power_off;
mod protect;
mod resume;
mod rm;
mod serve;
mod set;
mod show;
mod start;
mod stop;
mod suspend;
mod take;
#[cfg(test)]
mod tests;
mod tree;
mod undo;
mod unprotect;
mod view;
mod warden;

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use server::Problem;

use crate::session::Session;

pub(crate) use view::run as view;

/// Snapshots of QEMU machines: take, go back, branch, remove, undo
///
/// A machine stands somewhere ("here") in a tree of snapshots. `take` adds one, `goto` goes to any of them, and what
/// would be lost is kept as an undo point. A snapshot is written TARGET@NAME; TARGET@ is the parent of here, TARGET@~2
/// two above, TARGET@{2h} the newest older than two hours, TARGET@id:3f2a one by the beginning of its id.
#[derive(Debug, Parser)]
#[command(
    name = "spinney",
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  spinney create web --memory 1G --disk debian.qcow2    a machine over a disk that is never written
  spinney start web
  spinney take web before-upgrade -m \"all is well\"
  spinney tree web
  spinney goto web@before-upgrade                       keeps what would be lost as an undo point
  spinney undo

Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 refused, 5 something needed is missing,
  6 stored data damaged, 7 no space, 8 not permitted, 9 timed out, 130 called off or interrupted
  (143 by SIGTERM, 129 by SIGHUP)"
)]
pub(crate) struct Cli {
    /// State folder [default: $SPINNEY_STATE, the configuration, or ~/.local/state/spinney]
    #[arg(long, global = true, help_heading = "Options of every command", value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pub(crate) state: Option<PathBuf>,
    /// Print one JSON document on stdout, events and errors as JSON on stderr
    #[arg(long, global = true, help_heading = "Options of every command")]
    pub(crate) json: bool,
    /// Print no notes and no progress
    #[arg(short, long, global = true, help_heading = "Options of every command")]
    pub(crate) quiet: bool,
    /// Print more notes
    #[arg(short, long, global = true, help_heading = "Options of every command")]
    pub(crate) verbose: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The verbs in the order of the help.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Create(create::Args),
    Start(start::Args),
    Stop(stop::Args),
    Kill(kill::Args),
    Pause(pause::Args),
    Resume(resume::Args),
    Suspend(suspend::Args),
    Set(set::Args),
    Ls(ls::Args),
    Show(show::Args),
    Console(console::Args),
    #[command(alias = "snapshot")]
    Take(take::Args),
    #[command(alias = "log")]
    Tree(tree::Args),
    #[command(aliases = ["revert", "restore", "rollback"])]
    Goto(goto::Args),
    Back(back::Args),
    Fork(fork::Args),
    Peek(peek::Args),
    Clone(clone::Args),
    Edit(edit::Args),
    Protect(protect::Args),
    Unprotect(unprotect::Args),
    #[command(alias = "delete")]
    Rm(rm::Args),
    Undo(undo::Args),
    Op(op::Args),
    Mount(mount::Args),
    Du(du::Args),
    Gc(gc::Args),
    Fsck(fsck::Args),
    Group(group::Args),
    Doctor(doctor::Args),
    Config(config::Args),
    Serve(serve::Args),
    /// Keep deadlines for the daemon, which starts this
    #[command(hide = true)]
    Warden,
    /// Serve a group's view for the daemon, which starts this
    #[command(hide = true)]
    View {
        /// The view's folder, so that people see whose process it is
        folder: PathBuf,
    },
    Completion(completion::Args),
    Demo(demo::Args),
    #[command(hide = true)]
    Man(man::Args),
}

/// Runs a verb.
pub(crate) fn run(command: Command, session: &Session) -> Result<(), Problem> {
    match command {
        Command::Create(args) => create::run(session, args),
        Command::Start(args) => start::run(session, &args),
        Command::Stop(args) => stop::run(session, &args),
        Command::Kill(args) => kill::run(session, &args),
        Command::Pause(args) => pause::run(session, &args),
        Command::Resume(args) => resume::run(session, &args),
        Command::Suspend(args) => suspend::run(session, &args),
        Command::Set(args) => set::run(session, args),
        Command::Ls(args) => ls::run(session, &args),
        Command::Show(args) => show::run(session, &args),
        Command::Console(args) => console::run(session, &args),
        Command::Take(args) => take::run(session, args),
        Command::Tree(args) => tree::run(session, &args),
        Command::Goto(args) => goto::run(session, &args),
        Command::Back(args) => back::run(session, &args),
        Command::Fork(args) => fork::run(session, args),
        Command::Peek(args) => peek::run(session, &args),
        Command::Clone(args) => clone::run(session, args),
        Command::Edit(args) => edit::run(session, args),
        Command::Protect(args) => protect::run(session, &args),
        Command::Unprotect(args) => unprotect::run(session, &args),
        Command::Rm(args) => rm::run(session, &args),
        Command::Undo(args) => undo::run(session, args),
        Command::Op(args) => op::run(session, args),
        Command::Mount(args) => mount::run(session, args),
        Command::Du(args) => du::run(session, &args),
        Command::Gc(args) => gc::run(session, &args),
        Command::Fsck(args) => fsck::run(session, &args),
        Command::Group(args) => group::run(session, args),
        Command::Doctor(args) => doctor::run(session, &args),
        Command::Config(args) => config::run(session, &args),
        Command::Serve(args) => serve::run(session, args),
        Command::Warden => warden::run(session),
        Command::View { .. } => view(),
        Command::Completion(args) => completion::run(session, &args),
        Command::Demo(args) => demo::run(session, &args),
        Command::Man(args) => man::run(session, &args),
    }
}
