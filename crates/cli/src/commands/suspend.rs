//! `suspend`: memory kept on the disk, the process ended.

use clap_complete::ArgValueCompleter;
use server::Problem;
use server::snapshots::Machine;

use crate::session::Session;
use crate::{address, complete};

/// Keep a machine's memory on the disk and end its process
///
/// It uses no memory and no CPU of the host's until `start`, which goes on from exactly there, also after a restart of the host.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  spinney suspend web\n  spinney start web")]
pub(crate) struct Args {
    /// Machine
    #[arg(add = ArgValueCompleter::new(complete::targets))]
    target: String,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let path = format!("{}/suspend", address::target(&args.target)?);
    let machine: Machine = session.post(&path)?;
    if session.out.json {
        session.document("spinney.machine/1", &machine);
    } else {
        session.out.line(format_args!("{} is suspended", machine.name));
    }
    Ok(())
}
