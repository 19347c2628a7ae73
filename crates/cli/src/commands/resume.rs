//! `resume`: its CPUs go on.

use clap_complete::ArgValueCompleter;
use server::Problem;
use server::snapshots::Machine;

use crate::session::Session;
use crate::{address, complete};

/// Let a paused machine run on
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  spinney resume web")]
pub(crate) struct Args {
    /// Machine
    #[arg(add = ArgValueCompleter::new(complete::targets))]
    target: String,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let path = format!("{}/resume", address::target(&args.target)?);
    let machine: Machine = session.post(&path)?;
    if session.out.json {
        session.document("spinney.machine/1", &machine);
    } else {
        session.out.line(format_args!("{} runs", machine.name));
    }
    Ok(())
}
