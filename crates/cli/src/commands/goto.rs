//! `goto`: a machine becomes what a snapshot holds.

use std::time::Instant;

use clap_complete::ArgValueCompleter;
use serde::Serialize;
use server::Problem;
use server::api::{DiscardPlan, GotoRequest};
use server::client::{Client, Method, path, with_query};
use server::snapshots::{GotoPower, GotoReport, Machine, Mode, Power};

use crate::draw::power;
use crate::output::{micros, span};
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
    #[arg(value_name = "TARGET@SNAP", add = ArgValueCompleter::new(complete::snapshots))]
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
    go(session, &client, target, &place, &body)
}

/// Goes there, and says how long it took; shared with `back`.
pub(super) fn go(
    session: &Session,
    client: &Client,
    target: &str,
    place: &str,
    body: &impl Serialize,
) -> Result<(), Problem> {
    let before: Machine = client.get(&path(&["targets", target])?)?;
    let began = Instant::now();
    let report: GotoReport = session.operate(client, Method::POST, place, Some(body))?;
    let took_us = micros(began);
    print(session, &report, took_us, before.pid.is_some());
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
        Some(loss) => session.confirm(&[format!("goes: {loss}")], "Throw it away?", args.yes),
    }
}

/// Prints where a machine stands now.
fn print(session: &Session, report: &GotoReport, took_us: u64, was_on: bool) {
    if session.out.json {
        session.document("spinney.goto/1", report);
        return;
    }
    session.out.line(line(report, took_us, was_on));
    if let Some(why) = &report.in_place {
        session.out.note(format_args!("ended first, because it cannot be there twice: {why}"));
    }
    if let Some(undo) = &report.undo_point {
        session.out.note(format_args!(
            "what was left is kept as {}@{}; `spinney undo` goes back to it",
            undo.target, undo.name
        ));
    }
}

/// The whole time is the one that people wait; for how much of it there was no guest is another matter: while the undo point
/// was taken of it, and between the two.
fn line(report: &GotoReport, took_us: u64, was_on: bool) -> String {
    let undo_point = report.undo_point.as_ref();
    let captured = undo_point.map_or(0, |point| point.took_us);
    // It may have ended while the goto waited its turn.
    let was_on = was_on && undo_point.is_none_or(|point| point.mode != Mode::Off);
    let away = match report.power {
        Power::Running if was_on => format!(" (guest away for {})", span(report.took_us + captured)),
        _ => String::new(),
    };
    let (snapshot, power) = (&report.snapshot, power(report.power));
    format!("{} is at {}, {power}, in {}{away}", snapshot.target, snapshot.name, span(took_us))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_times_are_told_where_they_differ() {
        let at = |power: Power, was_on| {
            let config = json!({ "memory": 1, "cpus": 1, "disks": [], "kernel": null, "initrd": null, "append": null,
                "networks": [], "memory_snapshots": true, "qemu_args": [] });
            let snapshot = |took_us: u64| {
                json!({ "id": "0", "target": "web", "name": "base", "state": "ready", "note": "", "parent": null,
                    "created": jiff::Timestamp::UNIX_EPOCH, "undo_point": false, "power": "running",
                    "mode": "stop-copy", "pause_us": null, "took_us": took_us, "memory_bytes": 0, "stored_bytes": 0, "disk_bytes": 0,
                    "saved": { "zero": 0, "same": 0, "earlier": 0, "new": 0, "bytes_written": 0 }, "keep": false,
                    "protected": false, "depth": 1, "config": config })
            };
            let report = json!({ "power": power, "snapshot": snapshot(7_000_000), "undo_point": snapshot(370_000),
                "took_us": 30_000 });
            line(&serde_json::from_value(report).unwrap(), 1_600_000, was_on)
        };
        assert_eq!(at(Power::Running, true), "web is at base, running, in 1.6 s (guest away for 400 ms)");
        assert_eq!(at(Power::Running, false), "web is at base, running, in 1.6 s");
        assert_eq!(at(Power::Off, true), "web is at base, off, in 1.6 s");
    }
}
