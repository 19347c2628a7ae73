//! One operation at a time for each target; others wait their turn.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::context::Context;
use crate::error::Result;

/// Which targets are being worked on, and with what.
#[derive(Debug, Default)]
pub(crate) struct TargetLocks {
    busy: Mutex<HashMap<String, Work>>,
    freed: Condvar,
}

/// What is being done to a target.
#[derive(Clone, Debug)]
struct Work {
    kind: &'static str,
    /// The same with what it is about ("take web@x"), once that is known.
    title: Option<String>,
}

/// The right to change a target, until dropped.
#[derive(Debug)]
pub(crate) struct TargetGuard<'a> {
    locks: &'a TargetLocks,
    target: String,
}

impl TargetLocks {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Work>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nothing else works on `target`, or until the caller cancels.
    pub(crate) fn acquire(&self, target: &str, kind: &'static str, cx: &Context) -> Result<TargetGuard<'_>> {
        let mut busy = self.lock();
        while let Some(other) = busy.get(target) {
            cx.phase(&format!("waiting for {}", other.title.as_deref().unwrap_or(other.kind)), 0);
            busy = self
                .freed
                .wait_timeout(busy, Duration::from_millis(50))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            cx.check()?;
        }
        busy.insert(target.to_owned(), Work { kind, title: None });
        Ok(TargetGuard { locks: self, target: target.to_owned() })
    }

    /// As [`Self::acquire`], but never waits.
    pub(crate) fn try_acquire(&self, target: &str, kind: &'static str) -> Option<TargetGuard<'_>> {
        let mut busy = self.lock();
        if busy.contains_key(target) {
            return None;
        }
        busy.insert(target.to_owned(), Work { kind, title: None });
        Some(TargetGuard { locks: self, target: target.to_owned() })
    }

    /// Something is being done to some target.
    pub(crate) fn any(&self) -> bool {
        !self.lock().is_empty()
    }

    /// What is being done to a target, if anything.
    pub(crate) fn busy_with(&self, target: &str) -> Option<&'static str> {
        self.lock().get(target).map(|work| work.kind)
    }
}

impl TargetGuard<'_> {
    /// Says what it is about, to whoever waits.
    pub(crate) fn about(&self, subject: &str) {
        if let Some(work) = self.locks.lock().get_mut(&self.target) {
            work.title = Some(format!("{} {subject}", work.kind));
        }
    }
}

impl Drop for TargetGuard<'_> {
    fn drop(&mut self) {
        self.locks.lock().remove(&self.target);
        self.locks.freed.notify_all();
    }
}
