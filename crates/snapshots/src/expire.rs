//! Snapshots that go by themselves when their time has come.
//!
//! One goes as by `rm`: its name, at once, with a tombstone that undo clears; children, here, and whatever needs its data stay as they
//! are. What is kept or protected stays, and undo points have rules of their own. A target that is worked on is left alone until that
//! is done. Each has an entry of its own in the journal, so that each can be brought back by itself.

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use serde_json::json;

use crate::catalog::{Act, Expiring, OpRow, SnapshotRow, TargetRow, Things, now};
use crate::context::Context;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::step;
use crate::remove::remove;

/// It is looked at least so often: the host's clock may be set, or the host may have slept.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// When a target that was worked on is looked at again.
const BUSY: Duration = Duration::from_secs(1);
/// The longest time that a snapshot can be given, in seconds: a hundred years.
const MOST: u64 = 100 * 365 * 24 * 3600;

/// Wakes whoever waits for the next snapshot to expire: which that is may have changed.
#[derive(Debug, Default)]
pub struct Alarm {
    rung: Mutex<bool>,
    bell: Condvar,
}

impl Alarm {
    pub(crate) fn ring(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.bell.notify_all();
    }

    fn silence(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }

    /// Waits until it rings or the time is over.
    pub fn wait(&self, limit: Duration) {
        let rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.bell.wait_timeout_while(rung, limit, |rung| !*rung);
        *waited.unwrap_or_else(PoisonError::into_inner).0 = false;
    }
}

impl Engine {
    /// Rings when it may be time to call [`Engine::expire`] earlier than it said.
    pub fn expiry_alarm(&self) -> Arc<Alarm> {
        Arc::clone(&self.alarm)
    }

    /// Removes what has expired. Returns how long there is nothing more to do.
    pub fn expire(&self) -> Duration {
        let mut next = LOOK_EVERY;
        let expiring = match self.catalog.read(Expiring::all) {
            Ok(expiring) => expiring,
            Err(error) => {
                tracing::warn!(%error, causes = ?error.causes(), "it cannot be seen what has expired");
                return next;
            }
        };
        let mut targets = BTreeSet::new();
        for Expiring { target, due, .. } in expiring {
            match u64::try_from(due.as_millisecond().saturating_sub(now().as_millisecond())) {
                Ok(left @ 1..) => next = next.min(Duration::from_millis(left)),
                _ => drop(targets.insert(target)),
            }
        }
        for target in targets {
            match self.expire_in(&target) {
                Ok(true) => {}
                Ok(false) => next = next.min(BUSY),
                Err(error) => {
                    tracing::warn!(%error, causes = ?error.causes(), target, "what has expired stays for now");
                    // What failed just now, and rang, fails again at once.
                    self.alarm.silence();
                }
            }
        }
        next
    }

    /// Removes what has expired of a target; false if that is being worked on.
    fn expire_in(&self, target: &str) -> Result<bool> {
        let Some(guard) = self.locks.try_acquire(target, "expire") else { return Ok(false) };
        // What was under way on a machine whose process did not answer comes first.
        self.find_again(self.catalog.read(|tx| TargetRow::by_id(tx, target))?, false)?;
        // Nobody else changes what keeps it, as long as we have the target.
        for over in self.catalog.write(|tx| Expiring::over(tx, target))? {
            let row = self.catalog.read(|tx| SnapshotRow::by_id(tx, &over.snapshot))?;
            let (cx, subject) = (Context::new(), row.full_name());
            guard.about(&subject);
            self.journaled(&cx, "expire", &subject, Some(target), &json!({}), || {
                self.catalog.write(|tx| {
                    let gone = Things { snapshots: vec![row.id.clone()], ..Things::default() };
                    SnapshotRow::spend_expiry(tx, &row.id)?;
                    remove(tx, &gone)?;
                    OpRow::finish(tx, &cx.id, Some(Act::Restore(gone)))
                })
            })?;
            step("expire.written");
            tracing::info!(operation = cx.id, "{subject} has expired");
        }
        Ok(true)
    }
}

/// The time that a snapshot is to stay, if it can be given that.
pub(crate) fn check_expiry(seconds: u64) -> Result<Duration> {
    match seconds {
        0 => Err(Error::new(Code::Usage, "a snapshot stays for a second at least")),
        1..=MOST => Ok(Duration::from_secs(seconds)),
        _ => Err(Error::new(Code::Usage, "a snapshot expires within a hundred years, or never")),
    }
}

pub(crate) fn kept_does_not_expire() -> Error {
    Error::new(Code::Usage, "what is kept does not expire: --keep and --expire exclude each other")
}
