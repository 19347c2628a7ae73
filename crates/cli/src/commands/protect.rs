//! `protect`: make a machine or a snapshot refuse `rm`.

use clap_complete::ArgValueCompleter;
use serde_json::{Value, json};
use server::Problem;

use crate::session::Session;
use crate::{address, complete};

/// Make a machine or a snapshot refuse rm
///
/// A machine that is protected is a template: `start` starts a throw-away fork of it, which is gone when it stops.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  spinney protect web\n  spinney protect web@base")]
pub(crate) struct Args {
    /// Machine or snapshot
    #[arg(value_name = "TARGET[@SNAP]", add = ArgValueCompleter::new(complete::addresses))]
    address: String,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let _: Value = session.post(&address::verb(&args.address, "protect")?)?;
    if session.out.json {
        session.document("spinney.protection/1", &json!({ "address": args.address, "protected": true }));
    } else {
        let start = if address::is_snapshot(&args.address) {
            ""
        } else {
            ", and `start` starts a throw-away fork of it"
        };
        session.out.line(format_args!("{} is protected: rm refuses{start}", args.address));
    }
    Ok(())
}
