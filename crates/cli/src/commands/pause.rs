//! `pause`: its CPUs stand still.

use clap_complete::ArgValueCompleter;
use server::Problem;
use server::snapshots::Machine;

use crate::session::Session;
use crate::{address, complete};

/// Let a machine's CPUs stand still
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  spinney pause web")]
pub(crate) struct Args {
    /// Machine
    #[arg(add = ArgValueCompleter::new(complete::targets))]
    target: String,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let path = format!("{}/pause", address::target(&args.target)?);
    let machine: Machine = session.post(&path)?;
    if session.out.json {
        session.document("spinney.machine/1", &machine);
    } else {
        session.out.line(format_args!("{} is paused", machine.name));
    }
    Ok(())
}
