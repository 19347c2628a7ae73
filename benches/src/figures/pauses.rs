//! How long does a guest stand still? QEMU's own time stamps of STOP and RESUME, over twenty takes each.

use crate::error::Result;
use crate::machine::{FILLED_MIB, LARGE_MIB, Machine, mixed};
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::spinney::Spinney;
use crate::stats::Summary::{self, Median, P95};

const TAKES: u64 = 20;
/// The busy guest: 20 MB of memory a second, round and round in 40 MB.
const PAGES_A_SECOND: u64 = 5_000;
const PAGES_WRITTEN: u64 = 10_000;
/// And so much to its disk, never synced.
const DISK_MIB_A_SECOND: u64 = 10;

/// `take.stop_copy.idle.pause_ms.median`, `take.pre_copy.idle.pause_ms.p95`, `take.pre_copy.busy.pause_ms.p95`.
pub(super) fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let spinney = Spinney::start(bench, &bench.disk)?;
    let mut machine = Machine::boot(&spinney, LARGE_MIB)?;
    machine.fill(FILLED_MIB, mixed(1))?;
    machine.take_named("base")?;
    let stop_copy = takes(&machine, "stop-copy", "take.stop_copy.idle.pause_ms.median", Median)?;
    // Each series begins with disks of the same depth.
    machine.goto("base", true)?;
    let idle = takes(&machine, "pre-copy", "take.pre_copy.idle.pause_ms.p95", P95)?;
    machine.goto("base", true)?;
    make_busy(&mut machine)?;
    let busy = takes(&machine, "pre-copy", "take.pre_copy.busy.pause_ms.p95", P95)?;
    Ok(vec![stop_copy, idle, busy])
}

/// Writes to the guest's memory and disk until further notice.
pub(super) fn make_busy(machine: &mut Machine<'_>) -> Result<()> {
    machine.guest.writer_start(PAGES_A_SECOND, PAGES_WRITTEN)?;
    Ok(machine.guest.disk_write(DISK_MIB_A_SECOND)?)
}

fn takes(machine: &Machine<'_>, mode: &str, id: &str, summary: Summary) -> Result<Figure> {
    let take = |_| {
        let done = machine.take(Some(mode))?;
        Ok(Run::new(done.number("pause_us")? / 1e3).beside("took_ms", done.number("took_us")? / 1e3))
    };
    let runs = (0..machine.spinney.bench.count(TAKES, 4)).map(take).collect::<Result<Vec<_>>>()?;
    Figure::new(id, "ms", Better::Lower, summary, runs)
}
