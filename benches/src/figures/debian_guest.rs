//! How much of a guest that has its system on a disk has to be stored at all?
//!
//! A Debian 12 with a Redis, all of /usr read once: most of its memory is on its disk already. Each round is a new state folder, so
//! that nothing of an earlier round is known. What could be found is counted beside it, from the same machine's memory and
//! its image, without anything of Spinney's.

use serde_json::Value;

use crate::debian::DebianMachine;
use crate::error::{Error, Result};
use crate::page_count::Pages;
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::spinney::{Done, Spinney};
use crate::stats::Summary::Median;

const ROUNDS: u64 = 2;

/// `size.debian_guest.first_take.new_vs_nonzero`, `size.debian_guest.on_its_disk`.
pub(super) fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let rounds = (0..bench.count(ROUNDS, 1)).map(|_| round(bench)).collect::<Result<Vec<_>>>()?;
    let (taken, counted): (Vec<_>, Vec<_>) = rounds.into_iter().unzip();
    let taken = Figure::new("size.debian_guest.first_take.new_vs_nonzero", "", Better::Lower, Median, taken)?;
    let counted = Figure::new("size.debian_guest.on_its_disk", "", Better::Higher, Median, counted)?;
    Ok(vec![taken.target(0.25), counted])
}

/// What a take stored, and what was there.
fn round(bench: &Bench) -> Result<(Run, Run)> {
    let spinney = Spinney::start(bench, &bench.disk)?;
    let machine = DebianMachine::boot(&spinney)?;
    spinney.wait_for_background()?;
    let done = machine.take()?;
    let taken = taken(&done)?.beside("boot_s", machine.boot.as_secs_f64());
    let memory = spinney.state().join("memory");
    machine.memory_to(&memory)?;
    let mut pages = Pages::default();
    pages.add(&memory)?;
    let (all, different) = (pages.all() as f64, pages.different() as f64);
    pages.remove_blocks_of(&machine.image)?;
    let (off_disk, off_disk_different) = (pages.all() as f64, pages.different() as f64);
    let counted = Run::new(1.0 - off_disk / all)
        .beside("nonzero_pages", all)
        .beside("different_pages", different)
        .beside("not_on_disk_pages", off_disk)
        .beside("not_on_disk_different_pages", off_disk_different);
    Ok((taken, counted))
}

/// Pages written over pages that are not zero.
fn taken(done: &Done) -> Result<Run> {
    let saved =
        |key: &str| done.document.get("saved").and_then(|saved| saved.get(key)).and_then(Value::as_f64);
    let needed = |key: &'static str| saved(key).ok_or(Error::Lacks(key));
    let (new, same, earlier) = (needed("new")?, needed("same")?, needed("earlier")?);
    // Found on the disk; versions that do not look there have no such number.
    let disk = saved("disk").unwrap_or(0.0);
    let all = new + same + earlier + disk;
    Ok(Run::new(new / all)
        .beside("nonzero_pages", all)
        .beside("new_pages", new)
        .beside("same_pages", same)
        .beside("earlier_pages", earlier)
        .beside("disk_pages", disk)
        .beside("bytes_written", needed("bytes_written")?)
        .beside("take_ms", super::ms(done.wall)))
}
