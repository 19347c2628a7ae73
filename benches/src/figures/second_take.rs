//! Does a take cost what changed? Growth of page store and catalog over the bytes of the pages that the guest changed.
//!
//! Only pages that the workload rewrote count as changed, and their content is compared. What the guest's own system
//! changed meanwhile and the device state are in the growth but not in the count, so the ratio is on the high side.

use crate::error::Result;
use crate::machine::{LARGE_MIB, Machine, mixed};
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::spinney::Spinney;
use crate::stats::Summary::Median;

const ROUNDS: u64 = 5;
/// Filled memory, whose pages are compared. Comparing more of it takes an emulated guest too long.
const FILLED_MIB: u64 = 128;
const FILLED_PAGES: u64 = FILLED_MIB * 256;
/// Pages rewritten between two takes; some are drawn twice.
const REWRITTEN: u64 = 1_200;
const PAGE: f64 = 4096.0;

/// `take.second.idle.new_bytes_vs_changed`.
pub(super) fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let spinney = Spinney::start(bench, &bench.disk)?;
    let mut machine = Machine::boot(&spinney, LARGE_MIB)?;
    machine.fill(FILLED_MIB, mixed(1))?;
    let rounds = (1..=bench.count(ROUNDS, 2)).map(|seed| round(&mut machine, seed));
    let runs = rounds.collect::<Result<Vec<_>>>()?;
    let figure = Figure::new("take.second.idle.new_bytes_vs_changed", "", Better::Lower, Median, runs)?;
    Ok(vec![figure.target(2.0)])
}

fn round(machine: &mut Machine<'_>, seed: u64) -> Result<Run> {
    // The pages are read outside of what is measured: reading them has the guest write elsewhere.
    let before = machine.guest.page_hashes(0, FILLED_PAGES)?;
    machine.take(None)?;
    let stored = machine.spinney.stored()?;
    machine.guest.mutate(seed, REWRITTEN)?;
    machine.take(None)?;
    let growth = machine.spinney.stored()?.saturating_sub(stored) as f64;
    let after = machine.guest.page_hashes(0, FILLED_PAGES)?;
    let changed = before.iter().zip(&after).filter(|(before, after)| before != after).count() as f64;
    Ok(Run::new(growth / (changed * PAGE)).beside("changed_pages", changed).beside("growth_bytes", growth))
}
