//! How long does a fork of a stored snapshot take to run, and how much of that is QEMU's own?
//!
//! From the start of `spinney fork` until QEMU says that the CPUs run; files are in the page cache, a fork of the same snapshot has been
//! there before. Beside it stand what the daemon says it took, the time to the end of the command (which asks the guest for an agent that
//! it has not), and the time to the guest's first answer.
//!
//! `vs_empty_qemu` is that time over the one of a QEMU with the same arguments and memory of its own, started with `-S` and told to `cont`:
//! by turns, from before its overlay is made, with the same syncs, as a fork makes its own. Two things are shown beside it: the ratio over
//! the time without the overlay, and over that of a QEMU that is not given a kernel either: a kernel is copied into memory at every start
//! but one that loads a state, so the fork does not pay for it.
//!
//! `fork.8g.vs_1g`: two machines with the same in their memories, one of which is eight times as large.

use super::ms;
use crate::disk;
use crate::empty::Empty;
use crate::error::{Error, Result};
use crate::forks;
use crate::machine::{FILLED_MIB, LARGE_MIB, Machine, mixed};
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::spinney::Spinney;
use crate::stats::Summary::Median;

const ROUNDS: u64 = 21;
/// How many times as large the larger machine is.
const TIMES: u64 = 8;

/// `fork.stored.ms`, `fork.stored.vs_empty_qemu`.
pub(super) fn stored(bench: &Bench) -> Result<Vec<Figure>> {
    let spinney = Spinney::start(bench, &bench.disk)?;
    snapshot(&spinney, LARGE_MIB)?;
    let first = forks::watched(&spinney, "vm@base", "first")?;
    let mut empty = Empty::like(bench, &first.run)?;
    let mut bare = Empty::like(bench, &first.run)?;
    bare.without_kernel();
    forks::remove(&spinney, "first")?;
    let (mut forked, mut over) = (Vec::new(), Vec::new());
    // One before the first: caches.
    for round in 0..=bench.count(ROUNDS, 3) {
        let fork = || fork(&spinney);
        let before = if round % 2 == 0 { Some(fork()?) } else { None };
        let start = |empty: &mut Empty| {
            disk::settle(&bench.disk)?;
            empty.run()
        };
        let (theirs, bare) = (start(&mut empty)?, start(&mut bare)?);
        let ours = before.map_or_else(fork, Ok)?;
        if round == 0 {
            continue;
        }
        let run = Run::new(ours.running).beside("took_ms", ours.took);
        forked.push(run.beside("command_ms", ours.command).beside("first_answer_ms", ours.answered));
        over.push(
            Run::new(ours.running / ms(theirs.with_overlays))
                .beside("ours_ms", ours.running)
                .beside("empty_ms", ms(theirs.with_overlays))
                .beside("empty_alone_ms", ms(theirs.alone))
                .beside("vs_empty_alone", ours.running / ms(theirs.alone))
                .beside("vs_empty_without_kernel", ours.running / ms(bare.with_overlays))
                .beside("vs_empty_alone_without_kernel", ours.running / ms(bare.alone)),
        );
    }
    Ok(vec![
        Figure::new("fork.stored.ms", "ms", Better::Lower, Median, forked)?.target(100.0),
        Figure::new("fork.stored.vs_empty_qemu", "", Better::Lower, Median, over)?.target(2.0),
    ])
}

/// `fork.8g.vs_1g`.
pub(super) fn large(bench: &Bench) -> Result<Vec<Figure>> {
    // It boots with memory of its own, of which it touches little.
    bench.needs_memory(TIMES * LARGE_MIB + LARGE_MIB)?;
    let (small, large) = (Spinney::start(bench, &bench.disk)?, Spinney::start(bench, &bench.disk)?);
    snapshot(&small, LARGE_MIB)?;
    snapshot(&large, TIMES * LARGE_MIB)?;
    let mut runs = Vec::new();
    for round in 0..=bench.count(ROUNDS, 3) {
        let before = if round % 2 == 0 { Some(fork(&small)?) } else { None };
        let eight = fork(&large)?;
        let one = before.map_or_else(|| fork(&small), Ok)?;
        if round == 0 {
            continue;
        }
        runs.push(
            Run::new(eight.running / one.running)
                .beside("large_ms", eight.running)
                .beside("small_ms", one.running)
                .beside("large_first_answer_ms", eight.answered)
                .beside("small_first_answer_ms", one.answered),
        );
    }
    Ok(vec![Figure::new("fork.8g.vs_1g", "", Better::Lower, Median, runs)?.target(1.2)])
}

/// A machine that is off, with a snapshot `base` from when it ran.
pub(super) fn snapshot(spinney: &Spinney<'_>, mib: u64) -> Result<()> {
    let mut machine = Machine::boot(spinney, mib)?;
    machine.fill(FILLED_MIB, mixed(1))?;
    machine.take_named("base")?;
    machine.kill()?;
    // Nothing is done in the background to what is forked.
    spinney.wait_for_background()
}

/// What a fork took, in milliseconds.
struct Forked {
    running: f64,
    took: f64,
    command: f64,
    answered: f64,
}

/// Forks `vm@base`, and removes the fork.
fn fork(spinney: &Spinney<'_>) -> Result<Forked> {
    disk::settle(spinney.state())?;
    let watched = forks::watched(spinney, "vm@base", "fork")?;
    let forked = Forked {
        running: ms(watched.running),
        took: watched.done.number("took_us")? / 1e3,
        command: ms(watched.done.wall),
        answered: ms(watched.answered),
    };
    forks::remove(spinney, "fork")?;
    if forked.took > forked.command {
        return Err(Error::Lacks("plausible time"));
    }
    Ok(forked)
}
