//! Is a stop-copy take faster than QEMU's own `migrate` to a file?
//!
//! Each round is a new state folder and a freshly booted machine, so every take is its group's first: what earlier
//! rounds stored cannot help. Ours and QEMU's save the same guest with the same memory one after the other, by turns
//! first; both are timed from the command (for ours the whole CLI process) to durable.

use std::path::Path;

use vm_tests::guest::Mix;

use super::ms;
use crate::baseline::migrate_to_file;
use crate::disk;
use crate::error::Result;
use crate::machine::{FILLED_MIB, LARGE_MIB, Machine, mixed, unique as all_unique};
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::spinney::Spinney;
use crate::stats::Summary::Median;

/// Even, so that each side is first as often: a disk that gives bursts gives them to whoever comes first.
const ROUNDS: u64 = 6;
/// On tmpfs, where there is no target to decide on.
const ROUNDS_TMPFS: u64 = 4;
const PAGE: f64 = 4096.0;

/// `take.stop_copy.mix.vs_migrate_file`, the same on tmpfs, and `store.take.mb_s`.
pub(super) fn mix(bench: &Bench) -> Result<Vec<Figure>> {
    let rounds = rounds(bench, &bench.disk, ROUNDS, mixed)?;
    let mut figures =
        vec![ratio("take.stop_copy.mix.vs_migrate_file", &rounds)?.target(0.6), throughput(&rounds)?];
    if let Some(tmpfs) = &bench.tmpfs {
        figures.push(ratio(
            "take.stop_copy.mix.tmpfs.vs_migrate_file",
            &self::rounds(bench, tmpfs, ROUNDS_TMPFS, mixed)?,
        )?);
    }
    Ok(figures)
}

/// `take.stop_copy.unique.vs_migrate_file`: nothing but the guest's own system can be shared.
pub(super) fn unique(bench: &Bench) -> Result<Vec<Figure>> {
    let rounds = rounds(bench, &bench.disk, ROUNDS, all_unique)?;
    Ok(vec![ratio("take.stop_copy.unique.vs_migrate_file", &rounds)?.target(1.1)])
}

/// What one round brought, in milliseconds.
struct Round {
    ours: f64,
    took: f64,
    pause: f64,
    qemu: f64,
    disk_mb_s: f64,
    /// Pages that are not zero, and how many of them were written.
    pages: f64,
    new: f64,
}

fn rounds(bench: &Bench, place: &Path, count: u64, mix: fn(u64) -> Mix) -> Result<Vec<Round>> {
    (1..=bench.count(count, 2)).map(|seed| round(bench, place, mix(seed), seed % 2 == 1)).collect()
}

fn round(bench: &Bench, place: &Path, mix: Mix, ours_first: bool) -> Result<Round> {
    let spinney = Spinney::start(bench, place)?;
    let mut machine = Machine::boot(&spinney, LARGE_MIB)?;
    machine.fill(FILLED_MIB, mix)?;
    let theirs = || {
        disk::settle(place)?;
        // Not for longer than needed: it serves one client, and the warden is another.
        let monitor = machine.second_monitor()?;
        migrate_to_file(&monitor, bench.qemu.version, spinney.state())
    };
    let disk_mb_s = disk::write_speed(spinney.state())?;
    let before = if ours_first { None } else { Some(theirs()?) };
    disk::settle(place)?;
    let done = machine.take(Some("stop-copy"))?;
    let qemu = before.map_or_else(theirs, Ok)?;
    let saved = |key| done.document.pointer(key).and_then(serde_json::Value::as_f64).unwrap_or(f64::NAN);
    let new = saved("/saved/new");
    Ok(Round {
        ours: ms(done.wall),
        took: done.number("took_us")? / 1e3,
        pause: done.number("pause_us")? / 1e3,
        qemu: ms(qemu),
        disk_mb_s,
        pages: new + saved("/saved/same") + saved("/saved/earlier"),
        new,
    })
}

fn ratio(id: &str, rounds: &[Round]) -> Result<Figure> {
    let run = |round: &Round| {
        Run::new(round.ours / round.qemu)
            .beside("ours_ms", round.ours)
            .beside("took_ms", round.took)
            .beside("pause_ms", round.pause)
            .beside("qemu_ms", round.qemu)
            .beside("disk_mb_s", round.disk_mb_s)
            .beside("pages", round.pages)
            .beside("pages_written", round.new)
    };
    Figure::new(id, "", Better::Lower, Median, rounds.iter().map(run).collect())
}

/// Guest memory that is not zero over the time to durable; beside it where the time goes.
fn throughput(rounds: &[Round]) -> Result<Figure> {
    let run = |round: &Round| {
        Run::new(round.pages * PAGE / 1e3 / round.took)
            .beside("paused_ms", round.pause)
            .beside("around_the_pause_ms", round.took - round.pause)
            .beside("cli_ms", round.ours - round.took)
    };
    Figure::new("store.take.mb_s", "MB/s", Better::Higher, Median, rounds.iter().map(run).collect())
}
