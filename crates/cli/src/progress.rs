//! How far long work is: a bar on a terminal after a quarter of a second, events with `--json`, else nothing.

use std::io::IsTerminal;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use server::operations::OperationView;

use crate::interrupts::named;
use crate::output::{Output, bytes};

/// Silence at first: most work is over by then.
const SILENCE: Duration = Duration::from_millis(250);
/// How often the bar moves, so that one sees that it lives.
const TICK: Duration = Duration::from_millis(100);

/// Progress of one operation.
#[derive(Debug)]
pub(crate) struct Progress {
    out: Output,
    /// None off a terminal.
    bar: Option<ProgressBar>,
    /// Shows the bar when the silence is over, whether there is news then or not.
    unveil: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    pub(crate) fn new(out: Output) -> Self {
        if !std::io::stderr().is_terminal() || out.quiet || out.json {
            return Self { out, bar: None, unveil: None };
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        let (over, waits) = mpsc::channel();
        let shown = bar.clone();
        let thread = std::thread::spawn(move || {
            if waits.recv_timeout(SILENCE) == Err(RecvTimeoutError::Timeout) {
                shown.set_draw_target(ProgressDrawTarget::stderr());
                shown.enable_steady_tick(TICK);
            }
        });
        Self { out, bar: Some(bar), unveil: Some((over, thread)) }
    }

    /// Shows an operation as it is now.
    pub(crate) fn show(&self, view: &OperationView) {
        if self.out.json {
            self.out.event("spinney.event/1", view);
        }
        let Some(bar) = self.bar.as_ref().filter(|_| view.ended.is_none()) else { return };
        let template = match view.progress.total {
            0 => "{spinner} {msg}  {elapsed}",
            _ => "{spinner} {msg}  [{wide_bar}]  {elapsed}",
        };
        bar.set_length(view.progress.total);
        bar.set_position(view.progress.done);
        bar.set_message(words(view));
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
    }

    /// Says something while the bar may stand there.
    pub(crate) fn voice(&self) -> impl Fn(&str) + Send + 'static {
        let (out, bar) = (self.out, self.bar.clone());
        move |text| match &bar {
            Some(bar) => bar.suspend(|| out.note(text)),
            None => out.note(text),
        }
    }

    /// Takes the bar off the terminal.
    pub(crate) fn clear(mut self) {
        if let Some((over, thread)) = self.unveil.take() {
            drop(over);
            let _ = thread.join();
        }
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// `saving memory  12 MiB of 40 MiB`, `rm web@old: waiting for take`.
fn words(view: &OperationView) -> String {
    let progress = &view.progress;
    let what = named(&view.kind, &view.subject);
    match (progress.phase.as_str(), progress.total) {
        ("", _) => what,
        (phase, 0) => format!("{what}: {phase}"),
        // What is copied again is counted again. Thousands of units are bytes; fewer are things.
        (phase, total) if total >= 1 << 16 => {
            format!("{phase}  {} of {}", bytes(progress.done.min(total)), bytes(total))
        }
        (phase, total) => format!("{phase}  {} of {total}", progress.done.min(total)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_waited_for_is_said_with_who_waits() {
        let shown = |phase: &str, done: u64, total: u64| {
            words(
                &serde_json::from_value(
                    json!({ "id": "0", "kind": "take", "subject": "web@a", "state": "running",
                    "started": jiff::Timestamp::UNIX_EPOCH, "ended": null, "result": null, "problem": null,
                    "progress": { "done": done, "total": total, "phase": phase } }),
                )
                .unwrap(),
            )
        };
        assert_eq!(shown("", 0, 0), "take web@a");
        assert_eq!(shown("waiting for goto", 0, 0), "take web@a: waiting for goto");
        assert_eq!(shown("saving memory", 12 << 20, 40 << 20), "saving memory  12 MiB of 40 MiB");
        assert_eq!(shown("looking at layers", 2, 7), "looking at layers  2 of 7");
    }
}
