//! `kill`: end its process at once.

use clap_complete::ArgValueCompleter;
use serde_json::json;
use server::Problem;
use server::client::Method;
use server::snapshots::{Machine, Power};

use crate::session::Session;
use crate::{address, complete};

/// End a machine's process at once
///
/// What the guest has not written to its disks is lost, as if the power had gone. What follows, `spinney set --on-poweroff` says. Of a
/// suspended machine the memory that is kept goes, after a question, and nothing follows.
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
    let place = address::target(&args.target)?;
    let client = session.client()?;
    let machine: Machine = client.get(&place)?;
    if machine.power == Power::Suspended {
        let plan = [format!("goes: the memory of {}, which `spinney start` would go on with", machine.name)];
        session.confirm(&plan, "Give it up?", args.yes)?;
    }
    let off = session.operate(&client, Method::POST, &format!("{place}/kill"), Some(&json!({})))?;
    super::power_off::tell(session, &client, &place, off)
}
