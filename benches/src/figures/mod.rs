//! The figures, a file for each question.

mod clone;
mod daemon;
mod debian_guest;
mod depth;
mod fork;
mod fork_cold;
mod fork_many;
mod fork_running;
mod fork_steady;
mod goto;
mod index;
mod large;
mod live;
mod pauses;
mod second_take;
mod size;
mod stop_copy;
mod store;
mod tree;

use crate::error::Result;
use crate::report::Figure;
use crate::settings::Bench;

/// Measures the figures of one question.
type Measure = fn(&Bench) -> Result<Vec<Figure>>;

/// All questions in the order in which they are asked. What the daemon needs is known last.
pub(crate) const ALL: [(&str, Measure); 30] = [
    ("stop-copy of a mix against QEMU's own", stop_copy::mix),
    ("stop-copy of unique memory against QEMU's own", stop_copy::unique),
    ("what a second take adds", second_take::measure),
    ("pauses", pauses::measure),
    ("live takes of an idle guest", live::idle),
    ("live takes of a busy guest", live::busy),
    ("live takes after goto", live::after_goto),
    ("going to a snapshot", goto::measure),
    ("a machine of 4 GiB", large::measure),
    ("a tree of a thousand", tree::measure),
    ("clones", clone::measure),
    ("forks of a snapshot", fork::stored),
    ("forks of a machine of 8 GiB", fork::large),
    ("a cold fork against QEMU's own", fork_cold::measure),
    ("forks of a running machine", fork_running::measure),
    ("memory of thirty forks", fork_many::measure),
    ("a warm fork at work", fork_steady::measure),
    ("restoring from the depth of a tree", depth::measure),
    ("first take of a Debian guest", debian_guest::measure),
    ("equal pages that are stored twice", size::duplicates),
    ("stored size against restic and borg", size::rivals),
    ("known pages into a store", store::known),
    ("new pages into a store on tmpfs", store::new_tmpfs),
    ("new pages into a store on huge tmpfs", store::new_huge_tmpfs),
    ("two sources at once", store::two_sources),
    ("memory of the index", index::memory),
    ("an index of fifty million pages", index::fifty_millions),
    ("checking a store", index::fsck),
    ("usage of a thousand maps", index::du),
    ("the daemon's memory", daemon::measure),
];

/// Milliseconds.
fn ms(duration: std::time::Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
