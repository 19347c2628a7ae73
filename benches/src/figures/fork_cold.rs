//! When nothing of it is in memory: how soon does a fork's guest answer, against QEMU's own fastest way, a mapped-ram file?
//!
//! The same machine with the same memory on both sides, by turns. Before each measurement that side's files (packs and disk layers
//! here, the file and its layers there, and the image below both) are synced and forgotten, one by one, and `mincore` (`fincore`) says how
//! much of them is still there; more than half a percent is no measurement. Ours begins with no view mounted, so that it is mounted
//! anew. For that the daemon is started anew each time; what it does but once, asking QEMU for its version and its machines, it does for
//! another machine first: QEMU is not asked on the other side either. The kernel that QEMU is given, the executables and the catalog are
//! warm on both sides.
//!
//! From the start of `spinney fork`, which makes an overlay, or of QEMU, whose overlay is made beforehand, to the guest's first answer.

use std::path::PathBuf;
use std::time::Duration;

use super::goto::own_qemu;
use super::{fork, ms};
use crate::baseline::OwnQemu;
use crate::cold::{self, Residency};
use crate::error::{Error, Result};
use crate::forks;
use crate::machine::LARGE_MIB;
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::spinney::Spinney;
use crate::stats::Summary::Median;

const ROUNDS: u64 = 11;
/// The other machine.
const OTHER: &str = "other";

/// `fork.cold.first_answer.vs_mapped_ram`.
pub(super) fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let mut spinney = Spinney::start(bench, &bench.disk)?;
    fork::snapshot(&spinney, LARGE_MIB)?;
    let disk = base(bench).display().to_string();
    spinney.run(&["create", OTHER, "--memory", "64M", "--network", "none", "--disk", &disk])?;
    let mut qemu = own_qemu(bench)?;
    qemu.end();
    let mut runs = Vec::new();
    // One before the first, of which only the executables stay.
    for round in 0..=bench.count(ROUNDS, 2) {
        let before = if round % 2 == 0 { Some(ours(&mut spinney)?) } else { None };
        let theirs = theirs(&mut qemu)?;
        let ours = before.map_or_else(|| ours(&mut spinney), Ok)?;
        if round == 0 {
            continue;
        }
        runs.push(
            Run::new(ms(ours.answered) / ms(theirs.answered))
                .beside("ours_ms", ms(ours.answered))
                .beside("ours_running_ms", ours.running_ms)
                .beside("qemu_ms", ms(theirs.answered))
                .beside("ours_read_mb", read_mb(&ours))
                .beside("qemu_read_mb", read_mb(&theirs))
                .beside("ours_resident_before_mb", ours.before.resident as f64 / 1e6)
                .beside("qemu_resident_before_mb", theirs.before.resident as f64 / 1e6)
                .beside("ours_mb", ours.before.bytes as f64 / 1e6)
                .beside("qemu_mb", theirs.before.bytes as f64 / 1e6),
        );
    }
    Ok(vec![
        Figure::new("fork.cold.first_answer.vs_mapped_ram", "", Better::Lower, Median, runs)?.target(0.25),
    ])
}

struct Round {
    answered: Duration,
    running_ms: f64,
    /// What was in the page cache of its files before, and after.
    before: Residency,
    after: Residency,
}

/// Megabytes of its files that came into the page cache.
fn read_mb(round: &Round) -> f64 {
    round.after.resident.saturating_sub(round.before.resident) as f64 / 1e6
}

fn ours(spinney: &mut Spinney<'_>) -> Result<Round> {
    spinney.stop_daemon()?;
    let mut places = cold::stored(spinney.state())?;
    places.push(base(spinney.bench));
    // Once while nobody has anything of it mapped, and once more for what the daemon has read at its start.
    cold::forget(&places)?;
    spinney.start_daemon()?;
    spinney.run(&["start", OTHER])?;
    spinney.run(&["kill", OTHER])?;
    spinney.wait_for_background()?;
    let before = cold::forget(&places)?;
    if !spinney.views().is_empty() {
        return Err(Error::Lacks("end of a view"));
    }
    let watched = forks::watched(spinney, "vm@base", "fork")?;
    let after = cold::residency(&places)?;
    forks::remove(spinney, "fork")?;
    Ok(Round { answered: watched.answered, running_ms: ms(watched.running), before, after })
}

fn theirs(qemu: &mut OwnQemu<'_>) -> Result<Round> {
    let places = [qemu.folder().to_owned(), base(qemu.bench())];
    let before = cold::forget(&places)?;
    let answered = qemu.load(LARGE_MIB)?;
    let after = cold::residency(&places)?;
    qemu.end();
    Ok(Round { answered, running_ms: f64::NAN, before, after })
}

/// The image that both sides' disks lie over.
fn base(bench: &Bench) -> PathBuf {
    bench.guest.join("data.img")
}
