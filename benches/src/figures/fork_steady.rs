//! Once it is warm, does a guest whose memory is mapped from a snapshot work as fast as one that booted?
//!
//! A guest that booted and a fork of it, with the same 300 MB of filled memory, by turns: one stands still while the other works. What it
//! does is bound by memory: a walk over words anywhere in the filled memory, each of which says where the next one is, so that every step
//! is a miss of all caches and, on a host that maps 4 KiB pages, of its address translation. A booted guest's memory is in huge pages, a
//! private mapping of a file is not. (A live take would have split those of the booted one: the snapshot is taken another way.)
//!
//! - reading: the figure with the target; a fork's pages are the page cache's
//! - writing: each word is changed; a fork's pages are copies of its own by then
//! - in order: a hash over all of it, which the processor can fetch ahead
//!
//! By the guest's clock, after passes that touch all of it in the same way; beside it the same by processor time of QEMU's threads, which
//! others on the machine change less.

use std::path::PathBuf;
use std::time::Duration;

use vm_tests::guest::Guest;

use super::ms;
use crate::empty::process_of;
use crate::error::{Error, Result, system};
use crate::forks;
use crate::machine::{LARGE_MIB, Machine, mixed};
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::spinney::{Spinney, processor_time};
use crate::stats::Summary::Median;

/// 300 MB.
const FILLED_MIB: u64 = 286;
const ROUNDS: u64 = 15;
/// Passes before the first that counts.
const WARM_UP: u64 = 2;
/// Steps of a walk: about a second of an emulated guest.
const STEPS: u64 = 4_000_000;
/// Hashes that are one measurement.
const HASHES: u64 = 3;

/// What the guests do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Read,
    Write,
    InOrder,
}

/// `fork.steady.slowdown_pct` and the other kinds of work.
pub(super) fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let spinney = Spinney::start(bench, &bench.disk)?;
    let mut booted = Machine::boot(&spinney, LARGE_MIB)?;
    booted.fill(FILLED_MIB, mixed(1))?;
    spinney.run(&["take", "vm", "base", "--mode", "stop-copy"])?;
    let mut fork = forks::watched(&spinney, "vm@base", "fork")?;
    spinney.wait_for_background()?;
    spinney.run(&["pause", "vm"])?;
    spinney.run(&["pause", "fork"])?;
    let mut sides = [
        Side { name: "fork", pid: process_of(&fork.run)?.id().pid, guest: &mut fork.guest },
        Side { name: "vm", pid: process_of(&booted.run_folder()?)?.id().pid, guest: &mut booted.guest },
    ];
    let mut figures = Vec::new();
    for work in [Work::Read, Work::InOrder, Work::Write] {
        let (mut runs, rounds) = (Vec::new(), bench.count(ROUNDS, 3));
        for round in 0..WARM_UP + rounds {
            let [fork, booted] = &mut sides;
            let mut ours = || fork.work(&spinney, work, round);
            let before = if round % 2 == 0 { Some(ours()?) } else { None };
            let theirs = booted.work(&spinney, work, round)?;
            let ours = before.map_or_else(ours, Ok)?;
            if round < WARM_UP {
                continue;
            }
            let slower =
                |ours: Duration, theirs: Duration| (ours.as_secs_f64() / theirs.as_secs_f64() - 1.0) * 100.0;
            runs.push(
                Run::new(slower(ours.wall, theirs.wall))
                    .beside("processor_pct", slower(ours.processor, theirs.processor))
                    .beside("restored_ms", ms(ours.wall))
                    .beside("booted_ms", ms(theirs.wall))
                    .beside("restored_processor_ms", ms(ours.processor))
                    .beside("booted_processor_ms", ms(theirs.processor))
                    .beside("restored_huge_pages_mb", huge_pages_mb(fork.pid)?)
                    .beside("booted_huge_pages_mb", huge_pages_mb(booted.pid)?),
            );
        }
        let id = match work {
            Work::Read => "fork.steady.slowdown_pct",
            Work::Write => "fork.steady.writing.slowdown_pct",
            Work::InOrder => "fork.steady.in_order.slowdown_pct",
        };
        let figure = Figure::new(id, "%", Better::Lower, Median, runs)?;
        figures.push(if work == Work::Read { figure.target(5.0) } else { figure });
    }
    Ok(figures)
}

/// A guest that stands still unless it works.
struct Side<'a> {
    name: &'static str,
    pid: u32,
    guest: &'a mut Guest,
}

/// What work took: by the guest's clock, and of its process's threads' time.
struct Took {
    wall: Duration,
    processor: Duration,
}

impl Side<'_> {
    fn work(&mut self, spinney: &Spinney<'_>, work: Work, round: u64) -> Result<Took> {
        spinney.run(&["resume", self.name])?;
        // Timers that were due meanwhile.
        std::thread::sleep(Duration::from_millis(300));
        let before = processor_time(self.pid)?;
        let wall = match work {
            Work::Read => self.guest.walk(round, STEPS, false)?,
            Work::Write => self.guest.walk(round, STEPS, true)?,
            Work::InOrder => {
                let mut took = Duration::ZERO;
                for _ in 0..HASHES {
                    took += Duration::from_millis(self.guest.ask("hash")?.number("ms")?);
                }
                took
            }
        };
        let processor = processor_time(self.pid)?.had.saturating_sub(before.had);
        spinney.run(&["pause", self.name])?;
        Ok(Took { wall, processor })
    }
}

/// Megabytes of a process's own memory that are in huge pages.
fn huge_pages_mb(pid: u32) -> Result<f64> {
    let path = PathBuf::from(format!("/proc/{pid}/smaps_rollup"));
    let text = std::fs::read_to_string(&path).map_err(system("read", &path))?;
    let line = text.lines().find_map(|line| line.strip_prefix("AnonHugePages:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    kib.map(|kib| kib * 1024.0 / 1e6).ok_or(Error::Lacks("huge pages"))
}
