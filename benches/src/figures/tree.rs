//! Does a tree of a thousand snapshots cost anything? Take no. 1,001 against take no. 2, and the same for goto.
//!
//! Two machines of the same shape: one has a tree of one snapshot, the other of a thousand, wide (disks have a limit of
//! depth: every hundred takes it goes back to the first). Then, by turns, each goes to its first snapshot, changes the
//! same number of pages and takes another one. By turns, because the disk's speed changes within minutes.

use super::ms;
use crate::error::Result;
use crate::machine::Machine;
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::spinney::Spinney;
use crate::stats::Summary::Median;

/// The mode that is quickest to durable: of a live take most is QEMU's own time, whatever the tree.
const MODE: Option<&str> = Some("stop-copy");
const SNAPSHOTS: u64 = 1_000;
const IN_A_ROW: u64 = 100;
const ROUNDS: u64 = 9;
const GUEST_MIB: u64 = 128;
const FILLED_MIB: u64 = 16;
/// Pages changed before each take that is timed, and before the others.
const REWRITTEN: u64 = 256;
const REWRITTEN_BETWEEN: u64 = 16;

/// `tree.1000.take.vs_second`, `tree.1000.goto.vs_second`.
pub(super) fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let (small, large) = (Spinney::start(bench, &bench.disk)?, Spinney::start(bench, &bench.disk)?);
    let mut large = first(&large)?;
    for number in 2..=bench.count(SNAPSHOTS, 100) {
        if number % IN_A_ROW == 0 {
            large.goto("base", true)?;
        }
        large.guest.mutate(number, REWRITTEN_BETWEEN)?;
        large.take(MODE)?;
    }
    let mut small = first(&small)?;
    let (mut takes, mut gotos) = (Vec::new(), Vec::new());
    for round in 1..=bench.count(ROUNDS, 3) {
        let seed = 1_000_000 + round;
        // Who comes first changes as well: the other's writes may still occupy the disk.
        let small_first = if round % 2 == 1 { Some(goto_and_take(&mut small, seed)?) } else { None };
        let (large_goto, large_take) = goto_and_take(&mut large, seed)?;
        let (small_goto, small_take) = small_first.map_or_else(|| goto_and_take(&mut small, seed), Ok)?;
        gotos.push((small_goto, large_goto));
        takes.push((small_take, large_take));
    }
    Ok(vec![
        compared("tree.1000.take.vs_second", &takes)?.target(1.15),
        compared("tree.1000.goto.vs_second", &gotos)?.target(1.15),
    ])
}

/// A machine with its first snapshot.
fn first<'a>(spinney: &'a Spinney<'a>) -> Result<Machine<'a>> {
    let mut machine = Machine::boot(spinney, GUEST_MIB)?;
    machine.fill(FILLED_MIB, crate::machine::mixed(1))?;
    machine.take_named("base")?;
    Ok(machine)
}

/// Milliseconds of a goto and of a take, as the caller of the commands sees them.
fn goto_and_take(machine: &mut Machine<'_>, seed: u64) -> Result<(f64, f64)> {
    crate::disk::settle(machine.spinney.state())?;
    let goto = machine.goto("base", true)?;
    machine.guest.mutate(seed, REWRITTEN)?;
    crate::disk::settle(machine.spinney.state())?;
    let take = machine.take(MODE)?;
    Ok((ms(goto.wall), ms(take.wall)))
}

/// The ratio of the medians, on every run: a round's own ratio compares two single commands.
fn compared(id: &str, rounds: &[(f64, f64)]) -> Result<Figure> {
    let (small, large): (Vec<f64>, Vec<f64>) = rounds.iter().copied().unzip();
    let median = |values: &[f64]| Median.of(values).unwrap_or(f64::NAN);
    let ratio = median(&large) / median(&small);
    let runs = rounds.iter().map(|(small, large)| {
        Run::new(large / small).beside("second_ms", *small).beside("thousandth_ms", *large)
    });
    Figure::with_value(id, ratio, "", Better::Lower, runs.collect())
}
