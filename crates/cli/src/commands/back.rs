//! `back`: go to the parent of here.

use clap_complete::ArgValueCompleter;
use serde_json::json;
use server::Problem;

use crate::session::Session;
use crate::{address, complete};

/// Go to the parent of here
///
/// The same as `spinney goto TARGET@`: what happened since is kept as an undo point.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  spinney back web")]
pub(crate) struct Args {
    /// Machine
    #[arg(add = ArgValueCompleter::new(complete::targets))]
    target: String,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let place = format!("{}/back", address::target(&args.target)?);
    super::goto::go(session, &session.client()?, &args.target, &place, &json!({}))
}
