//! Letting a guest go on that stands still for a take: the deadline that sees to it, and what it means when it fails.

use std::time::{Duration, Instant};

use qemu::qmp::{Qmp, QmpError};
use qemu::save::{SaveError, run_state, settle};
use warden::{Armed, TooLate, Unkept};

use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::ingest::StoreTooSlow;
use crate::running::Running;
/// How long a guest stands still for us without anything getting on, or any sign of life.
pub(crate) const STILL_LIMIT: Duration = Duration::from_secs(2);

impl Engine {
    /// Has the warden see to it that the guest does not stand still for longer than we get on.
    pub(crate) fn arm(&self, running: &Running, was_running: bool) -> Result<Armed<'_>> {
        let armed = self.keeper.arm(&running.run.second_monitor(), was_running, STILL_LIMIT);
        armed.map_err(|error| {
            let gone = !running.process.is_alive();
            let sentence = if gone { "QEMU ended" } else { "nobody could let the guest go on if we died" };
            Error::new(Code::Failed, sentence).because(error)
        })
    }
}

/// QEMU has nothing left to send, or failed: whatever the store still has to do, no guest waits for it. If the guest was let go on
/// before the disks were switched, they are ahead of its memory; and that is why it failed, if it did. A guest of which we do not know
/// whether it runs is left to the warden.
pub(crate) fn over<T>(armed: &Armed<'_>, running: &Running, saved: Result<T, SaveError>) -> Result<T> {
    match saved {
        Err(error @ (SaveError::Stuck { .. } | SaveError::Qmp(_))) => {
            let failed = save_failed(running, error);
            if running.process.is_alive() {
                armed.rescue();
                wait_until_free(running);
            }
            Err(failed)
        }
        saved => {
            armed.release().map_err(too_late)?;
            saved.map_err(save_error)
        }
    }
}

/// The warden needs a moment for that; what comes next would only break into it.
fn wait_until_free(running: &Running) {
    let deadline = Instant::now() + STILL_LIMIT;
    let moment = Duration::from_millis(100);
    while Instant::now() < deadline && running.process.is_alive() {
        let state = Qmp::connect(&running.run.monitor(), false, moment).and_then(|qmp| run_state(&qmp));
        if state.is_ok_and(|state| state == "running") {
            return;
        }
        std::thread::sleep(moment);
    }
}

/// As [`save_error`], for an error after which QEMU may not be there any more.
pub(crate) fn save_failed(running: &Running, error: SaveError) -> Error {
    let closed = matches!(error, SaveError::Qmp(QmpError::Closed { .. } | QmpError::Send { .. }));
    // Its end may be a moment behind that of its monitor.
    if closed && !running.process.wait(Duration::from_millis(500)) {
        return Error::new(
            Code::Failed,
            "QEMU closed its monitor in the middle of a save; the machine goes on as before",
        )
        .because(error)
        .hint("try again: Spinney connects anew");
    }
    save_error(error)
}

/// How long a guest that is stopped for a live take may stand still before the warden lets it go on: with some room above what is
/// allowed, in which the take itself can give up.
pub(crate) fn still_limit(max_pause: Option<Duration>) -> Duration {
    max_pause.map_or(STILL_LIMIT, |limit| (limit * 3 / 2).clamp(Duration::from_millis(100), STILL_LIMIT))
}

pub(crate) fn save_error(error: SaveError) -> Error {
    if has_cause::<StoreTooSlow>(&error) {
        return Error::new(Code::TimedOut, "the disk is too slow for a live take; the machine goes on as before")
            .because(error)
            .hint("`--mode pre-copy` lets the guest wait a moment at the end; or have the state folder on a faster disk");
    }
    let code = match &error {
        SaveError::Cancelled => {
            return Error::new(Code::Interrupted, "cancelled; the machine goes on as before");
        }
        SaveError::Qmp(QmpError::Closed { .. }) => {
            return Error::new(Code::Failed, "QEMU ended while the machine's state was being saved")
                .because(error);
        }
        SaveError::Stuck { .. } => {
            return Error::new(Code::TimedOut, "QEMU did not come back from saving the machine's state")
                .because(error)
                .hint("the guest may stand still: `spinney resume` lets it go on");
        }
        SaveError::PausedTooLong => Code::TimedOut,
        SaveError::PauseBudget { limit } => {
            let sentence = format!(
                "the guest would have stood still for longer than {} ms; it goes on as before",
                limit.as_millis()
            );
            return Error::new(Code::TimedOut, sentence)
                .hint("allow more with --max-pause, or try again when the host is less busy");
        }
        SaveError::NotLive { .. } => {
            return Error::new(Code::Precondition, "this machine cannot be saved while it runs on")
                .because(error)
                .hint("`--mode pre-copy` stops it for a moment at the end; `spinney doctor` says what live takes need");
        }
        SaveError::Blocked { .. } => Code::Precondition,
        SaveError::State { .. } => Code::Refused,
        _ => Code::Failed,
    };
    Error::new(code, "the machine's state could not be saved; it goes on as before").because(error)
}

/// True if one of its causes is of this kind.
fn has_cause<T: std::error::Error + 'static>(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |error| error.source()).any(|error| error.is::<T>())
}

pub(crate) fn unkept(error: Unkept) -> Error {
    if let Unkept::TooLate(error) = error {
        return too_late(error);
    }
    Error::new(Code::Failed, "nobody would have let the guest go on if we had died").because(error)
}

pub(crate) fn too_late(error: TooLate) -> Error {
    Error::new(Code::TimedOut, "Spinney was held up for too long").because(error)
}

/// Lets a guest go on that was left standing in a migration of ours.
pub(crate) fn free_guest(running: &Running, was_running: bool) -> Result<()> {
    let state = run_state(&running.qmp)?;
    if was_running && state != "running" || matches!(state.as_str(), "finish-migrate" | "postmigrate") {
        settle(&running.qmp, if was_running { "running" } else { "paused" }).map_err(save_error)?;
    }
    Ok(())
}
