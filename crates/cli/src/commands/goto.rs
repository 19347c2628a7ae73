//! `goto`: a machine becomes what a snapshot holds.

use clap_complete::ArgValueCompleter;
use server::Problem;
use server::api::{DiscardPlan, GotoRequest};
use server::client::{Client, Method, path, with_query};
use server::snapshots::{GotoPower, GotoReport};

use crate::draw::power;
use crate::output::span;
use crate::session::Session;
use crate::{address, complete};

/// Go to a snapshot
///
/// Memory, devices, settings, disks and power state become the snapshot's. What would be lost is kept as an undo point
/// first. Newer snapshots and other branches stay; the next take starts a branch.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  spinney goto web@before-upgrade
  spinney goto web@~2 --paused
  spinney goto web@{2h} --off             the newest older than two hours, not started
  spinney goto web@base --discard --yes   keeps no undo point")]
pub(crate) struct Args {
    /// Snapshot
    #[arg(add = ArgValueCompleter::new(complete::addresses))]
    snapshot: String,
    /// Disks and settings only, machine off
    #[arg(long, group = "power")]
    off: bool,
    /// Paused afterwards, whatever was recorded
    #[arg(long, group = "power")]
    paused: bool,
    /// Running afterwards, whatever was recorded
    #[arg(long, group = "power")]
    running: bool,
    /// Keep no undo point: what is not in a snapshot is lost
    #[arg(long)]
    discard: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let (target, to) = address::snapshot(&args.snapshot)?;
    let place = path(&["targets", target, "goto"])?;
    let power = match args {
        Args { off: true, .. } => GotoPower::Off,
        Args { paused: true, .. } => GotoPower::Paused,
        Args { running: true, .. } => GotoPower::Running,
        _ => GotoPower::Recorded,
    };
    let body = GotoRequest { to: to.to_owned(), power, discard: args.discard };
    let client = session.client()?;
    if args.discard {
        confirm(session, &client, &place, &body, args)?;
    }
    let started = client.ask(Method::POST, &place, Some(&body))?;
    print(session, &session.follow(&client, started)?);
    Ok(())
}

/// Says what would be lost, and asks.
fn confirm(
    session: &Session,
    client: &Client,
    place: &str,
    body: &GotoRequest,
    args: &Args,
) -> Result<(), Problem> {
    let plan: DiscardPlan =
        client.ask(Method::POST, &with_query(place, &[("dry_run", "true")]), Some(body))?;
    match plan.discards {
        None => Ok(()),
        Some(loss) => {
            session.out.note(loss);
            session.confirm("Throw it away?", args.yes)
        }
    }
}

/// Prints where a machine stands now; shared with `back`.
pub(super) fn print(session: &Session, report: &GotoReport) {
    if session.out.json {
        session.out.document("spinney.goto/1", report);
        return;
    }
    let snapshot = &report.snapshot;
    session.out.line(format_args!(
        "{} is at {}, {}, in {}",
        snapshot.target,
        snapshot.name,
        power(report.power),
        span(report.took_us)
    ));
    if let Some(undo) = &report.undo_point {
        session.out.note(format_args!(
            "what was left is kept as {}@{}; `spinney undo` goes back to it",
            undo.target, undo.name
        ));
    }
}
