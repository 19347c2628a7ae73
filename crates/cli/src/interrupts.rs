//! Signals while an operation is followed: it is rolled back, rather than left to the daemon with nobody looking.

use std::fs;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use server::client::Client;
use server::operations::OperationView;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

/// What a stop does once it has pressed the button.
const PRESSED: &str = "waiting for the guest to power off";

/// The signal that a run was ended by, if any.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ended(Arc<AtomicI32>);

impl Ended {
    /// Exit code by the shells' rule: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    pub(crate) fn exit_code(&self) -> Option<u8> {
        let signal = self.0.load(Ordering::SeqCst);
        (signal != 0).then(|| u8::try_from(128 + signal).unwrap_or(130))
    }
}

/// Watches for signals from before an operation is asked for until it has ended.
pub(crate) struct Interrupts {
    watched: Arc<Mutex<Watched>>,
    client: Client,
    thread: Option<(Handle, JoinHandle<()>)>,
}

#[derive(Default)]
struct Watched {
    operation: Option<OperationView>,
    signalled: bool,
}

impl Interrupts {
    /// `say` prints a note; `ended` learns of the first signal.
    pub(crate) fn watch(client: Client, ended: Ended, say: impl Fn(&str) + Send + Sync + 'static) -> Self {
        let say = Arc::new(say);
        let watched = Arc::<Mutex<Watched>>::default();
        let heeded = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| !ignored(*signal));
        // Without handlers a signal ends this program, and the operation goes on: worse, but sound.
        let Ok(mut signals) = Signals::new(heeded) else { return Self { watched, client, thread: None } };
        let handle = signals.handle();
        let (shared, asks) = (Arc::clone(&watched), client.clone());
        let thread = std::thread::spawn(move || {
            for signal in signals.forever() {
                let mut watched = lock(&shared);
                if watched.signalled {
                    let id = watched.operation.as_ref().map(|view| view.id.as_str()).unwrap_or_default();
                    say(&format!("left to itself; `spinney op log` shows how it ends ({id})"));
                    std::process::exit(128 + signal);
                }
                watched.signalled = true;
                ended.0.store(signal, Ordering::SeqCst);
                if let Some(view) = &watched.operation {
                    say(&format!("\n{}", promise(view, signal)));
                    // On a thread of its own: a daemon that does not answer must not keep the next signal from being heard.
                    let (asks, say, id) = (asks.clone(), Arc::clone(&say), view.id.clone());
                    std::thread::spawn(move || {
                        if let Err(problem) = asks.cancel(&id) {
                            say(&format!("cannot cancel: {}", problem.detail));
                        }
                    });
                }
            }
        });
        Self { watched, client, thread: Some((handle, thread)) }
    }

    /// The operation is done, and signals are not heeded from here on. What to say to somebody who had wanted it rolled back.
    pub(crate) fn end(&mut self) -> Option<String> {
        self.stop();
        let watched = lock(&self.watched);
        let view = watched.operation.as_ref().filter(|_| watched.signalled)?;
        Some(done_before(view))
    }

    /// The operation that was asked for. A signal may have come before its id did.
    pub(crate) fn follow(&self, view: &OperationView) {
        let mut watched = lock(&self.watched);
        watched.operation = Some(view.clone());
        if watched.signalled {
            // That it cannot be cancelled shows when it ends.
            let _ = self.client.cancel(&view.id);
        }
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Interrupts {
    /// Every signal that came is dealt with, and none is waited for any more.
    fn stop(&mut self) {
        if let Some((handle, thread)) = self.thread.take() {
            handle.close();
            let _ = thread.join();
        }
    }
}

fn lock(watched: &Mutex<Watched>) -> MutexGuard<'_, Watched> {
    watched.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a cancellation is about to do.
fn promise(view: &OperationView, signal: i32) -> String {
    let again = if signal == SIGINT { " (Ctrl-C again leaves it to itself)" } else { "" };
    // Whether there still is something to roll back shows when it ends.
    format!("cancelling {}{again}", named(&view.kind, &view.subject))
}

/// What became of an operation that was done before it could be cancelled.
fn done_before(view: &OperationView) -> String {
    let what = named(&view.kind, &view.subject);
    let back = match view.kind.as_str() {
        kind if can_be_undone(kind) => format!("; `spinney undo {}` takes it back", view.id),
        "undo" => format!("; `spinney undo {}` does it again", view.id),
        _ => String::new(),
    };
    format!("{what} was done before it could be cancelled{back}")
}

/// True if `undo` takes back what is called so.
pub(crate) fn can_be_undone(kind: &str) -> bool {
    matches!(kind, "take" | "goto" | "back" | "rm" | "edit" | "clone")
}

/// What a cancelled operation came to, which was last seen at `phase`.
pub(crate) fn outcome(kind: &str, subject: &str, phase: &str) -> String {
    match kind {
        // The button has been pressed, and nobody can take that back.
        "stop" if phase == PRESSED => {
            format!(
                "stop {subject} was cancelled; a guest that has been asked already may still turn itself off"
            )
        }
        "gc" | "fsck" => format!("{kind} was cancelled"),
        _ => format!("{} was cancelled and rolled back", named(kind, subject)),
    }
}

/// `take web@before`; not every operation is about something.
pub(crate) fn named(kind: &str, subject: &str) -> String {
    format!("{kind} {subject}").trim_end().to_owned()
}

/// True for a signal that whoever started us has had ignored: nohup, a job in a script's background.
fn ignored(signal: i32) -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|status| is_in_mask(&status, signal))
}

fn is_in_mask(status: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nohup_has_ignored_stays_ignored() {
        let status = "SigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\nSigCgt:\t0000000180004000\n";
        assert!(is_in_mask(status, SIGHUP));
        assert!(!is_in_mask(status, SIGINT) && !is_in_mask(status, SIGTERM));
        assert!(!is_in_mask("", SIGHUP));
    }

    #[test]
    fn a_cancelled_stop_promises_nothing() {
        assert!(outcome("stop", "web", PRESSED).contains("may still turn itself off"));
        assert_eq!(outcome("undo", "", ""), "undo was cancelled and rolled back");
        assert_eq!(
            outcome("stop", "web", "waiting for take web@a"),
            "stop web was cancelled and rolled back"
        );
        assert_eq!(outcome("take", "web@a", "saving memory"), "take web@a was cancelled and rolled back");
    }

    #[test]
    fn what_came_too_late_promises_nothing_and_says_the_way_back() {
        let view = |kind: &str| {
            let view = serde_json::json!({ "id": "3f2a", "kind": kind, "subject": "web", "state": "running",
                "started": jiff::Timestamp::UNIX_EPOCH, "ended": null, "result": null, "problem": null,
                "progress": { "done": 0, "total": 0, "phase": "" } });
            serde_json::from_value::<OperationView>(view).unwrap()
        };
        let take = view("take");
        assert_eq!(promise(&take, SIGINT), "cancelling take web (Ctrl-C again leaves it to itself)");
        assert_eq!(
            done_before(&take),
            "take web was done before it could be cancelled; `spinney undo 3f2a` takes it back"
        );
        assert_eq!(done_before(&view("start")), "start web was done before it could be cancelled");
    }

    #[test]
    fn exit_codes_follow_the_shells_rule() {
        let ended = Ended::default();
        assert_eq!(ended.exit_code(), None);
        for (signal, code) in [(SIGINT, 130), (SIGTERM, 143), (SIGHUP, 129)] {
            ended.0.store(signal, Ordering::SeqCst);
            assert_eq!(ended.exit_code(), Some(code));
        }
    }
}
