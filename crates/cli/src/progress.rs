//! How far long work is: a bar on a terminal after a quarter of a second, events with `--json`, else nothing.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use server::operations::OperationView;

use crate::output::{Output, bytes};

/// Silence at first: most work is over by then.
const SILENCE: Duration = Duration::from_millis(250);

/// Progress of one operation.
#[derive(Debug)]
pub(crate) struct Progress {
    out: Output,
    began: Instant,
    terminal: bool,
    bar: Option<ProgressBar>,
}

impl Progress {
    pub(crate) fn new(out: Output) -> Self {
        let terminal = std::io::stderr().is_terminal() && !out.quiet && !out.json;
        Self { out, began: Instant::now(), terminal, bar: None }
    }

    /// Shows an operation as it is now.
    pub(crate) fn show(&mut self, view: &OperationView) {
        if self.out.json {
            self.out.event("spinney.event/1", view);
            return;
        }
        if !self.terminal || self.began.elapsed() < SILENCE || view.ended.is_some() {
            return;
        }
        let bar = self.bar.get_or_insert_with(new_bar);
        let progress = &view.progress;
        bar.set_length(progress.total);
        bar.set_position(progress.done);
        let phase = if progress.phase.is_empty() { &view.kind } else { &progress.phase };
        match progress.total {
            0 => bar.set_message(phase.clone()),
            // Thousands of units are bytes; fewer are things.
            total if total >= 1 << 16 => {
                bar.set_message(format!("{phase}  {} of {}", bytes(progress.done), bytes(total)));
            }
            total => bar.set_message(format!("{phase}  {} of {total}", progress.done)),
        }
    }

    /// Takes the bar off the terminal.
    pub(crate) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn new_bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{spinner} [{wide_bar}] {msg}  {elapsed}");
    if let Ok(style) = style {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}
