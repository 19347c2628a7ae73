//! What a larger machine costs: 4 GiB, with the same part of it in use as of the machine of 1 GiB elsewhere. Shown, without targets.

use super::ms;
use crate::error::Result;
use crate::machine::{FILLED_MIB, LARGE_MIB, Machine, mixed};
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::spinney::Spinney;
use crate::stats::Summary::Median;

/// How many times as large.
const TIMES: u64 = 4;
/// Takes of each kind: each in a store that knows the machine's memory, but for the first.
const TAKES: u64 = 5;

/// `take.4g.first.ms`, `take.4g.stop_copy.ms`, `take.4g.live.ms`, each with its pauses, and `goto.4g.wall_ms`.
pub(super) fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let spinney = Spinney::start(bench, &bench.disk)?;
    let mut machine = Machine::boot(&spinney, TIMES * LARGE_MIB)?;
    machine.fill(TIMES * FILLED_MIB, mixed(1))?;
    // Milliseconds as the caller sees them, and the pause.
    let take = |machine: &Machine<'_>, mode: &str| -> Result<(f64, f64)> {
        let done = machine.take(Some(mode))?;
        Ok((ms(done.wall), done.number("pause_us")? / 1e3))
    };
    let (first, pause) = take(&machine, "stop-copy")?;
    let first = vec![Run::new(first).beside("pause_ms", pause)];
    machine.take_named("base")?;
    let mut figures = vec![Figure::new("take.4g.first.ms", "ms", Better::Lower, Median, first)?];
    for (mode, id) in [("stop-copy", "take.4g.stop_copy"), ("live", "take.4g.live")] {
        let takes: Vec<_> =
            (0..bench.count(TAKES, 2)).map(|_| take(&machine, mode)).collect::<Result<_>>()?;
        let (walls, pauses): (Vec<_>, Vec<_>) =
            takes.into_iter().map(|(wall, pause)| (Run::new(wall), Run::new(pause))).unzip();
        figures.push(Figure::new(format!("{id}.ms"), "ms", Better::Lower, Median, walls)?);
        figures.push(Figure::new(format!("{id}.pause_ms"), "ms", Better::Lower, Median, pauses)?);
    }
    let mut gotos = Vec::new();
    for _ in 0..bench.count(TAKES, 2) {
        gotos.push(Run::new(ms(machine.goto("base", true)?.wall)));
    }
    figures.push(Figure::new("goto.4g.wall_ms", "ms", Better::Lower, Median, gotos)?);
    Ok(figures)
}
