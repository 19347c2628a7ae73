//! Snapshots that are all there but for the disk: the guest runs on, its memory is on the way.
//!
//! They are in no catalog: if we die now there is no such snapshot. Their target is locked until they are durable, so that whoever
//! wants to change it, or to go to them, waits; this table is for those who only look.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rusqlite::Transaction;

use crate::address;
use crate::catalog::TargetRow;
use crate::types::Snapshot;

/// The snapshots that are being saved, by target.
#[derive(Debug, Default)]
pub(crate) struct Saving {
    by_target: Mutex<HashMap<String, Snapshot>>,
}

/// An entry of the table, until dropped.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    table: &'a Saving,
    target: String,
}

impl Saving {
    /// Shows a snapshot of this target for as long as the entry lives.
    pub(crate) fn show(&self, target: &str, snapshot: Snapshot) -> Entry<'_> {
        self.lock().insert(target.to_owned(), snapshot);
        Entry { table: self, target: target.to_owned() }
    }

    /// The one of this target.
    pub(crate) fn of(&self, target: &str) -> Option<Snapshot> {
        self.lock().get(target).cloned()
    }

    /// The one that an address means: by its name, by its id, or as what here comes from.
    pub(crate) fn by_address(&self, tx: &Transaction<'_>, address: &str) -> Option<Snapshot> {
        let (target, Some(rest)) = address::split(address) else { return None };
        let saving = self.of(&TargetRow::by_name(tx, target).ok()?.id)?;
        let by_id = rest.strip_prefix("id:").is_some_and(|id| !id.is_empty() && saving.id.starts_with(id));
        (by_id || rest == saving.name || matches!(rest, "" | "~" | "~1")).then_some(saving)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Snapshot>> {
        self.by_target.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.table.lock().remove(&self.target);
    }
}
