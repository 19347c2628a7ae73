//! Does the daemon stay small? The most memory that any daemon of this run had of its own.

use crate::error::Result;
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::stats::Summary::Largest;

/// `daemon.rss_mb.peak`: anonymous and shared memory, every 100 ms, one run for each daemon so far.
pub(super) fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let runs = bench.peaks.megabytes().into_iter().map(Run::new).collect();
    Ok(vec![Figure::new("daemon.rss_mb.peak", "MB", Better::Lower, Largest, runs)?.target(100.0)])
}
