//! `peek`: a look at what was, beside what is.

use clap_complete::ArgValueCompleter;
use server::Problem;
use server::client::Method;
use server::snapshots::{ForkOptions, Forked, Identity};

use super::fork;
use crate::session::Session;
use crate::{address, complete};

/// Run a throw-away copy of a snapshot beside its machine
///
/// It is gone when it stops: when its guest powers itself off, or by `spinney stop` or `kill`. The machine is not touched.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  spinney peek web@last-week       web-peek-1 runs
  spinney console web-peek-1
  spinney kill web-peek-1          and is gone")]
pub(crate) struct Args {
    /// Snapshot
    #[arg(value_name = "TARGET@SNAP", add = ArgValueCompleter::new(complete::addresses))]
    address: String,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    address::snapshot(&args.address)?;
    let options = ForkOptions { name: None, count: 1, identity: Identity::Isolate, throw_away: true };
    let forked: Forked = session.change(Method::POST, &address::verb(&args.address, "fork")?, &options)?;
    if session.out.json {
        session.document("spinney.fork/1", &forked);
        return Ok(());
    }
    fork::print(session, &forked);
    if let Some(fork) = forked.forks.first() {
        let name = &fork.machine.name;
        session
            .out
            .note(format_args!("it is gone when it stops: `spinney console {name}`, `spinney kill {name}`"));
    }
    Ok(())
}
