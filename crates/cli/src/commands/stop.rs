//! `stop`: ask the guest to turn itself off.

use std::time::Duration;

use clap_complete::ArgValueCompleter;
use server::Problem;
use server::api::StopRequest;
use server::client::Method;

use crate::session::Session;
use crate::size::parse_duration;
use crate::{address, complete};

/// Ask the guest to turn itself off
///
/// The guest gets the signal of the power button (ACPI). One that ignores it goes on running, and this exits with 9. What follows when it
/// is off, `spinney set --on-poweroff` says.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  spinney stop web
  spinney stop web --timeout 10s --kill    end it after ten seconds whatever it does")]
pub(crate) struct Args {
    /// Machine
    #[arg(add = ArgValueCompleter::new(complete::targets))]
    target: String,
    /// Time that the guest has
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    timeout: Duration,
    /// End its process when the time is over
    #[arg(long)]
    kill: bool,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let place = address::target(&args.target)?;
    let client = session.client()?;
    // The API counts seconds; a part of one is one.
    let timeout_seconds = args.timeout.as_secs() + u64::from(args.timeout.subsec_nanos() > 0);
    let body = StopRequest { timeout_seconds, kill: args.kill };
    let off = session.operate(&client, Method::POST, &format!("{place}/stop"), Some(&body))?;
    super::power_off::tell(session, &client, &place, off)
}
