//! `unprotect`: let it be removed again.

use clap_complete::ArgValueCompleter;
use serde_json::{Value, json};
use server::Problem;

use crate::session::Session;
use crate::{address, complete};

/// Let a machine or a snapshot be removed again
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  spinney unprotect web\n  spinney unprotect web@base")]
pub(crate) struct Args {
    /// Machine or snapshot
    #[arg(value_name = "TARGET[@SNAP]", add = ArgValueCompleter::new(complete::addresses))]
    address: String,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let _: Value = session.post(&address::verb(&args.address, "unprotect")?)?;
    if session.out.json {
        session.document("spinney.protection/1", &json!({ "address": args.address, "protected": false }));
    } else {
        session.out.line(format_args!("{} is not protected", args.address));
    }
    Ok(())
}
