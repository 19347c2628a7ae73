//! The caller's side of one operation.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use serde_json::Value;

use crate::error::{Code, Error, Result};
use crate::id::new_id;

/// How far an operation is; read by others while it runs.
#[derive(Debug, Default)]
pub struct Progress {
    /// Units done.
    pub done: AtomicU64,
    /// Units in all; 0 if unknown.
    pub total: AtomicU64,
    /// What is being done ("saving memory").
    pub phase: Mutex<String>,
    /// What it comes to, said before it is all done: a take's snapshot that is `saving`. Whoever does not want to wait may go.
    pub so_far: Mutex<Option<Value>>,
    /// What people should know though it is done.
    pub warnings: Mutex<Vec<String>>,
}

/// One operation's id in the journal, its progress, its cancel flag.
#[derive(Clone, Debug)]
pub struct Context {
    /// Id under which it is journalled, 16 hex digits.
    pub id: String,
    /// Progress.
    pub progress: Arc<Progress>,
    /// Set by whoever wants it rolled back.
    pub cancel: Arc<AtomicBool>,
}

impl Context {
    /// A context with a fresh random id.
    #[expect(clippy::new_without_default, reason = "two contexts are never equal")]
    pub fn new() -> Self {
        Self { id: new_id(), progress: Arc::default(), cancel: Arc::default() }
    }

    /// The same operation, from here on deaf to the caller's wish to cancel.
    pub(crate) fn uncancelled(&self) -> Self {
        Self { cancel: Arc::default(), ..self.clone() }
    }

    /// Another operation of the same caller, who sees how far it is and may cancel it too.
    pub(crate) fn another(&self) -> Self {
        Self { id: new_id(), ..self.clone() }
    }

    /// Says what is being done now, and how many units that has.
    pub(crate) fn phase(&self, phase: &str, total: u64) {
        phase.clone_into(&mut self.progress.phase.lock().unwrap_or_else(PoisonError::into_inner));
        self.progress.done.store(0, Ordering::Relaxed);
        self.progress.total.store(total, Ordering::Relaxed);
    }

    /// Says what it comes to, before it is all done.
    pub(crate) fn so_far(&self, result: &impl Serialize) {
        let value = serde_json::to_value(result).ok();
        *self.progress.so_far.lock().unwrap_or_else(PoisonError::into_inner) = value;
    }

    /// Says what people should know, though it is done.
    pub(crate) fn warn(&self, words: String) {
        self.progress.warnings.lock().unwrap_or_else(PoisonError::into_inner).push(words);
    }

    /// What was said so far.
    pub(crate) fn warnings(&self) -> Vec<String> {
        self.progress.warnings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Adds units done.
    pub(crate) fn advance(&self, units: u64) {
        self.progress.done.fetch_add(units, Ordering::Relaxed);
    }

    /// Fails if the caller wants the operation rolled back.
    pub(crate) fn check(&self) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(Error::new(Code::Interrupted, "cancelled"));
        }
        Ok(())
    }
}
