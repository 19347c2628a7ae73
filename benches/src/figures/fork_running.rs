//! How long does a machine stand still while it is forked, and how long does it seem so to its guest?
//!
//! What Spinney says of the pause, and the longest gap between two stamps of the guest's from the start of the command to its end, as for
//! takes (`live.rs`). Each fork goes before the next one comes. Idle, and writing to 40 MB of memory and to the disk.

use super::live::{QUIET, longest_gap, watched};
use super::pauses::make_busy;
use crate::disk;
use crate::error::Result;
use crate::forks;
use crate::machine::{FILLED_MIB, LARGE_MIB, Machine, mixed};
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::spinney::Spinney;
use crate::stats::Summary::{Median, P95};
use std::time::Duration;

const ROUNDS: u64 = 20;
/// Longest pause, milliseconds.
const TARGET: f64 = 70.0;

/// `fork.running.source_pause_ms` and what is beside it, of an idle guest and of a busy one.
pub(super) fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let spinney = Spinney::start(bench, &bench.disk)?;
    let mut machine = Machine::boot(&spinney, LARGE_MIB)?;
    machine.fill(FILLED_MIB, mixed(1))?;
    // Most of its memory is known then, as it is of a machine that is worked with.
    machine.take_named("base")?;
    spinney.wait_for_background()?;
    let idle = forked(&mut machine)?;
    make_busy(&mut machine)?;
    let busy = forked(&mut machine)?;
    let mut figures = figures("fork.running", &idle)?;
    figures.extend(self::figures("fork.running.busy", &busy)?);
    Ok(figures)
}

/// One fork, in milliseconds.
struct Forked {
    pause: f64,
    took: f64,
    gap: f64,
    quiet_gap: f64,
}

fn forked(machine: &mut Machine<'_>) -> Result<Vec<Forked>> {
    machine.guest.stamp(Duration::from_millis(1))?;
    let quiet = machine.guest.stamps(QUIET)?;
    let quiet_gap = longest_gap(quiet.iter().map(|stamp| stamp.received))?;
    let spinney = machine.spinney;
    let fork = |_| {
        disk::settle(spinney.state())?;
        let (done, gap) = watched(machine, &["fork", "vm", "fork"])?;
        forks::remove(spinney, "fork")?;
        let number = |key| done.number(key).map(|us| us / 1e3);
        Ok(Forked { pause: number("source_pause_us")?, took: number("took_us")?, gap, quiet_gap })
    };
    let runs = (0..spinney.bench.count(ROUNDS, 3)).map(fork).collect();
    machine.guest.stamp(Duration::ZERO)?;
    runs
}

fn figures(id: &str, forked: &[Forked]) -> Result<Vec<Figure>> {
    let pauses = || forked.iter().map(|fork| Run::new(fork.pause).beside("took_ms", fork.took)).collect();
    let gaps = || {
        let run = |fork: &Forked| Run::new(fork.gap).beside("while_nothing_is_done_ms", fork.quiet_gap);
        forked.iter().map(run).collect()
    };
    let id = |name: &str| format!("{id}.{name}");
    Ok(vec![
        Figure::new(id("source_pause_ms"), "ms", Better::Lower, Median, pauses())?.target(TARGET),
        Figure::new(id("source_pause_ms.p95"), "ms", Better::Lower, P95, pauses())?,
        Figure::new(id("source_gap_ms"), "ms", Better::Lower, Median, gaps())?,
        Figure::new(id("source_gap_ms.p95"), "ms", Better::Lower, P95, gaps())?,
    ])
}
