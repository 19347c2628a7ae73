//! How long does a guest stand still in a live take, and how long does it seem so to the guest?
//!
//! A machine that was gone back to has its memory mapped, and QEMU takes none of that live: there it is the default take that is measured,
//! whatever that is, and each run says which mode it was.
//!
//! The pause is QEMU's own, from STOP to RESUME. The gap is the longest between two stamps that the guest sends every millisecond,
//! timed on the host from the command to durable: it finds a guest that QEMU calls running and that waits. Beside it stands the same
//! gap while nothing is taken.

use std::thread;
use std::time::Duration;

use super::ms;
use super::pauses::make_busy;
use crate::error::{Error, Result};
use crate::machine::{FILLED_MIB, LARGE_MIB, Machine, mixed};
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::spinney::{Done, Spinney};
use crate::stats::Summary::{Largest, P95};

/// Guests, each freshly booted, and takes of each.
const GUESTS: u64 = 3;
const TAKES: u64 = 40;
/// Gotos, and takes after each.
const GOTOS: u64 = 10;
const TAKES_AFTER_GOTO: u64 = 2;
/// Longest pause, milliseconds; the largest of all may be twice as long, and so may the guest's gaps.
const TARGET: f64 = 70.0;
/// For so long the guest is looked at while nothing is taken.
pub(super) const QUIET: Duration = Duration::from_secs(3);
/// Stamps are collected in portions of this.
const PORTION: Duration = Duration::from_millis(50);

/// `take.live.idle.*`.
pub(super) fn idle(bench: &Bench) -> Result<Vec<Figure>> {
    figures("take.live.idle", &fresh_guests(bench, |_| Ok(()))?)
}

/// `take.live.busy.*`.
pub(super) fn busy(bench: &Bench) -> Result<Vec<Figure>> {
    figures("take.live.busy", &fresh_guests(bench, make_busy)?)
}

/// `take.live.after_goto.*`: the memory of a machine that was gone back to is made of something else than that of one that booted.
pub(super) fn after_goto(bench: &Bench) -> Result<Vec<Figure>> {
    let spinney = Spinney::start(bench, &bench.disk)?;
    let mut machine = Machine::boot(&spinney, LARGE_MIB)?;
    machine.fill(FILLED_MIB, mixed(1))?;
    machine.take_named("base")?;
    let mut runs = Vec::new();
    for _ in 0..bench.count(GOTOS, 2) {
        machine.goto("base", true)?;
        runs.extend(takes(&mut machine, &["take", "vm"], TAKES_AFTER_GOTO)?);
    }
    figures("take.live.after_goto", &runs)
}

fn fresh_guests(bench: &Bench, prepare: impl Fn(&mut Machine<'_>) -> Result<()>) -> Result<Vec<Take>> {
    let mut runs = Vec::new();
    for seed in 1..=bench.count(GUESTS, 1) {
        let spinney = Spinney::start(bench, &bench.disk)?;
        let mut machine = Machine::boot(&spinney, LARGE_MIB)?;
        machine.fill(FILLED_MIB, mixed(seed))?;
        prepare(&mut machine)?;
        runs.extend(takes(&mut machine, &["take", "vm", "--mode", "live"], bench.count(TAKES, 4))?);
    }
    Ok(runs)
}

/// One take, in milliseconds.
struct Take {
    pause: f64,
    took: f64,
    gap: f64,
    quiet_gap: f64,
    mode: String,
}

fn takes(machine: &mut Machine<'_>, command: &[&str], count: u64) -> Result<Vec<Take>> {
    machine.guest.stamp(Duration::from_millis(1))?;
    let quiet = machine.guest.stamps(QUIET)?;
    let quiet_gap = longest_gap(quiet.iter().map(|stamp| stamp.received))?;
    let take = |_| {
        let (done, gap) = watched(machine, command)?;
        let number = |key| done.number(key).map(|us| us / 1e3);
        let mode = done.word("mode")?.to_owned();
        Ok(Take { pause: number("pause_us")?, took: number("took_us")?, gap, quiet_gap, mode })
    };
    let runs = (0..count).map(take).collect();
    machine.guest.stamp(Duration::ZERO)?;
    runs
}

/// Runs a command, and says what the longest gap between the guest's stamps was meanwhile.
pub(super) fn watched(machine: &mut Machine<'_>, command: &[&str]) -> Result<(Done, f64)> {
    let Machine { guest, spinney, .. } = machine;
    let mut received = Vec::new();
    let done = thread::scope(|scope| {
        let running = scope.spawn(|| spinney.run(command));
        while !running.is_finished() {
            received.extend(guest.stamps(PORTION)?.iter().map(|stamp| stamp.received));
        }
        running.join().map_err(|_| Error::Lacks("end of a command"))?
    })?;
    Ok((done, longest_gap(received.into_iter())?))
}

/// The longest time between two stamps, in milliseconds.
pub(super) fn longest_gap(received: impl Iterator<Item = std::time::Instant>) -> Result<f64> {
    let received: Vec<_> = received.collect();
    let gaps = received.iter().zip(received.iter().skip(1)).map(|(a, b)| b.duration_since(*a));
    gaps.max().map(ms).ok_or(Error::Lacks("stamps of the guest"))
}

fn figures(id: &str, takes: &[Take]) -> Result<Vec<Figure>> {
    let pauses = || {
        let run = |take: &Take| Run::new(take.pause).beside("took_ms", take.took).noted("mode", &take.mode);
        takes.iter().map(run).collect()
    };
    let gaps =
        takes.iter().map(|take| Run::new(take.gap).beside("while_nothing_is_taken_ms", take.quiet_gap));
    let id = |name: &str| format!("{id}.{name}");
    Ok(vec![
        Figure::new(id("pause_ms.p95"), "ms", Better::Lower, P95, pauses())?.target(TARGET),
        Figure::new(id("pause_ms.max"), "ms", Better::Lower, Largest, pauses())?.target(2.0 * TARGET),
        Figure::new(id("guest_gap_ms.p95"), "ms", Better::Lower, P95, gaps.collect())?.target(2.0 * TARGET),
    ])
}
