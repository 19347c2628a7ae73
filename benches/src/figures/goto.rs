//! How long is a machine away when it goes to a snapshot?
//!
//! Without an undo point against QEMU's fastest own way, a mapped-ram file loaded into a fresh process; both from the kill
//! of the old process to the guest's first answer, by turns, from the page cache. Spinney loads the new process before
//! it kills the old one, so the time of the whole command is shown beside it.

use super::ms;
use crate::baseline::OwnQemu;
use crate::error::{Error, Result};
use crate::machine::{FILLED_MIB, LARGE_MIB, Machine, mixed};
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::spinney::Spinney;
use crate::stats::Summary::Median;

const ROUNDS: u64 = 5;
/// Pages that the guest changes before each goto that keeps an undo point.
const REWRITTEN: u64 = 1_000;

/// `goto.discard.vs_mapped_ram`, `goto.discard.wall_ms`, `goto.wall_ms`.
pub(super) fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let spinney = Spinney::start(bench, &bench.disk)?;
    let mut machine = Machine::boot(&spinney, LARGE_MIB)?;
    machine.fill(FILLED_MIB, mixed(1))?;
    machine.take_named("base")?;
    let mut qemu = match own_qemu(bench) {
        Ok(qemu) => Some(qemu),
        Err(Error::Unavailable(reason)) => {
            println!("goto.discard.vs_mapped_ram is left out: {reason}");
            None
        }
        Err(error) => return Err(error),
    };
    let (mut ratios, mut walls, mut kept) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=bench.count(ROUNDS, 2) {
        let (done, answered) = machine.goto_watched("base")?;
        let (away, wall) = (done.number("took_us")? / 1e3 + ms(answered), ms(done.wall));
        walls.push(Run::new(wall));
        if let Some(qemu) = &mut qemu {
            let theirs = ms(qemu.load(LARGE_MIB)?);
            let run = Run::new(away / theirs).beside("ours_ms", away).beside("ours_wall_ms", wall);
            ratios.push(run.beside("qemu_ms", theirs));
        }
        machine.guest.mutate(round, REWRITTEN)?;
        let done = machine.goto("base", false)?;
        kept.push(Run::new(ms(done.wall)).beside("took_ms", done.number("took_us")? / 1e3));
    }
    let mut figures = Vec::new();
    if !ratios.is_empty() {
        let figure = Figure::new("goto.discard.vs_mapped_ram", "", Better::Lower, Median, ratios)?;
        figures.push(figure.target(1.2));
    }
    figures.push(Figure::new("goto.discard.wall_ms", "ms", Better::Lower, Median, walls)?);
    figures.push(Figure::new("goto.wall_ms", "ms", Better::Lower, Median, kept)?);
    Ok(figures)
}

/// A machine of the same shape with the same memory, saved as mapped-ram.
pub(super) fn own_qemu(bench: &Bench) -> Result<OwnQemu<'_>> {
    let mut qemu = OwnQemu::boot(bench, LARGE_MIB, &bench.disk)?;
    qemu.guest.set_timeout(crate::machine::SOON);
    qemu.guest.fill(FILLED_MIB, mixed(1))?;
    qemu.save()?;
    Ok(qemu)
}
