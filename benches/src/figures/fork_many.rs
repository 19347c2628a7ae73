//! What does each of thirty forks take of memory, over a QEMU that has nothing to do?
//!
//! Thirty forks of one snapshot of a guest of 256 MiB, made by one command; all answer, go on for some seconds, and answer again. Then
//! the proportional share (PSS, `smaps_rollup`) of each, less that of a QEMU with the same arguments and memory of its own, which waits
//! for a state: standing still, nothing loaded. Looked at while all are there, so that what is shared is shared by as many on both
//! sides. What the processes take that serve the memory is shown beside it, per fork.

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use qemu::process::Process;
use serde_json::Value;
use vm_tests::guest::Guest;

use super::ms;
use crate::empty::{Empty, process_of};
use crate::error::{Error, Result};
use crate::machine::{Machine, SOON, mixed};
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::spinney::Spinney;
use crate::stats::Summary::Median;

const FORKS: u64 = 30;
const GUEST_MIB: u64 = 256;
/// Filled memory, which the forks have in common and do not touch.
const FILLED_MIB: u64 = 96;
const ROUNDS: u64 = 3;
/// So long they go on by themselves.
const SETTLE: Duration = Duration::from_secs(5);
/// Memory that a fork is given room for, as Spinney reckons.
const ROOM_MIB: u64 = 160;

/// `fork.30.extra_pss_mb`, `fork.30.ms`.
pub(super) fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let count = bench.count(FORKS, 6);
    bench.needs_memory(count * ROOM_MIB + GUEST_MIB)?;
    let spinney = Spinney::start(bench, &bench.disk)?;
    let mut machine = Machine::boot(&spinney, GUEST_MIB)?;
    machine.fill(FILLED_MIB, mixed(1))?;
    machine.take_named("base")?;
    machine.kill()?;
    spinney.wait_for_background()?;
    let (mut extra, mut times) = (Vec::new(), Vec::new());
    for _ in 0..bench.count(ROUNDS, 1) {
        let done = spinney.run(&["fork", "vm@base", "fork", "-n", &count.to_string()])?;
        times.push(Run::new(done.number("took_us")? / 1e3).beside("command_ms", ms(done.wall)));
        let forks = done.document.get("forks").and_then(Value::as_array).ok_or(Error::Lacks("forks"))?;
        let runs = forks.iter().map(run_folder).collect::<Result<Vec<_>>>()?;
        if runs.len() as u64 != count {
            return Err(Error::Lacks("some forks"));
        }
        extra.push(look(&spinney, &runs)?);
        let names: Vec<String> = (1..=count).map(|number| format!("fork-{number}")).collect();
        names.iter().try_for_each(|name| crate::forks::remove(&spinney, name))?;
    }
    Ok(vec![
        Figure::new("fork.30.extra_pss_mb", "MB", Better::Lower, Median, extra)?.target(30.0),
        Figure::new("fork.30.ms", "ms", Better::Lower, Median, times)?,
    ])
}

/// The folder of a fork's sockets.
fn run_folder(fork: &Value) -> Result<PathBuf> {
    let console = fork.pointer("/machine/console").and_then(Value::as_str).ok_or(Error::Lacks("console"))?;
    PathBuf::from(console).parent().map(ToOwned::to_owned).ok_or(Error::Lacks("run folder"))
}

/// Megabytes of each over an empty one, on average.
fn look(spinney: &Spinney<'_>, runs: &[PathBuf]) -> Result<Run> {
    let first = runs.first().ok_or(Error::Lacks("forks"))?;
    let empty = Empty::like(spinney.bench, first)?.stand(spinney.bench)?;
    let all_answer = || -> Result<()> {
        for run in runs {
            Guest::connect(&run.join("port"), SOON)?.counter()?;
        }
        Ok(())
    };
    all_answer()?;
    thread::sleep(SETTLE);
    all_answer()?;
    let forks = runs.iter().map(|run| pss(&process_of(run)?)).collect::<Result<Vec<f64>>>()?;
    let (count, empty) = (forks.len() as f64, pss(&empty.process)?);
    let sum: f64 = forks.iter().sum();
    let largest = forks.iter().copied().fold(0.0, f64::max);
    let servers: f64 = spinney.servers().iter().filter_map(|pid| pss(&Process::open(*pid).ok()?).ok()).sum();
    Ok(Run::new(sum / count - empty)
        .beside("forks", count)
        .beside("fork_mb", sum / count)
        .beside("largest_fork_mb", largest)
        .beside("empty_mb", empty)
        .beside("view_and_daemon_mb_per_fork", servers / count))
}

fn pss(process: &Process) -> Result<f64> {
    process.memory().map(|bytes| bytes as f64 / 1e6).ok_or(Error::Lacks("smaps_rollup"))
}
