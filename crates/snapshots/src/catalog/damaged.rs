//! Which snapshots the last repair could not mend.

use rusqlite::{Transaction, params};

use super::{SnapshotRow, one};
use crate::error::Result;

impl SnapshotRow {
    /// What is wrong with a snapshot, if the last repair found something.
    pub(crate) fn damage(tx: &Transaction<'_>, id: &str) -> Result<Option<String>> {
        one(tx.query_row("SELECT problem FROM damaged WHERE snapshot = ?1", [id], |row| row.get(0)))
    }

    /// Writes down which snapshots are damaged, in place of what was known.
    pub(crate) fn set_damaged(tx: &Transaction<'_>, damaged: &[(String, String)]) -> Result<()> {
        tx.execute("DELETE FROM damaged", [])?;
        for (id, problem) in damaged {
            tx.execute(
                "INSERT INTO damaged (snapshot, problem) VALUES (?1, ?2) ON CONFLICT DO NOTHING",
                params![id, problem],
            )?;
        }
        Ok(())
    }
}
