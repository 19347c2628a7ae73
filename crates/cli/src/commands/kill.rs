//! `kill`: end its process at once.

use clap_complete::ArgValueCompleter;
use server::Problem;
use server::snapshots::{Machine, Power};

use crate::session::Session;
use crate::{address, complete};

/// End a machine's process at once
///
/// What the guest has not written to its disks is lost, as if the power had gone. Of a suspended machine the memory that is kept
/// goes, after a question.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  spinney kill web")]
pub(crate) struct Args {
    /// Machine
    #[arg(add = ArgValueCompleter::new(complete::targets))]
    target: String,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let machine: Machine = session.get(&address::target(&args.target)?)?;
    if machine.power == Power::Suspended {
        let plan = [format!("goes: the memory of {}, which `spinney start` would go on with", machine.name)];
        session.confirm(&plan, "Give it up?", args.yes)?;
    }
    let path = format!("{}/kill", address::target(&args.target)?);
    let machine: Machine = session.post(&path)?;
    if session.out.json {
        session.document("spinney.machine/1", &machine);
    } else {
        session.out.line(format_args!("{} is off", machine.name));
    }
    Ok(())
}
