//! Which snapshots go by themselves, and when.

use std::time::Duration;

use jiff::Timestamp;
use rusqlite::{Row, Transaction, params};
use serde::{Deserialize, Serialize};

use super::clock::{known_jump, last_jump};
use super::{SnapshotRow, now, one};
use crate::error::Result;

/// How long a snapshot stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Expiry {
    /// So many milliseconds ...
    after: i64,
    /// ... from this time on; or from a jump of the clock on, if that came later.
    since: i64,
    /// When the clock had last jumped, as far as was known at `since`.
    jumped: Option<i64>,
    /// It has gone by this already. Brought back, it has no expiry.
    spent: bool,
}

/// A snapshot that goes by itself, unless something stands against it.
#[derive(Clone, Debug)]
pub(crate) struct Expiring {
    pub(crate) snapshot: String,
    pub(crate) target: String,
    /// By the jumps that are known.
    pub(crate) due: Timestamp,
}

impl Expiry {
    /// One whose time begins now.
    pub(crate) fn begin(tx: &Transaction<'_>, after: Duration) -> Result<Self> {
        Ok(Self {
            after: i64::try_from(after.as_millis()).unwrap_or(i64::MAX),
            jumped: last_jump(tx)?.map(Timestamp::as_millisecond),
            since: now().as_millisecond(),
            spent: false,
        })
    }

    /// When it is over. Days of a clock that was set in between are no days: they begin anew with the jump, by its new time.
    fn due(&self, jumped: Option<i64>) -> Timestamp {
        let since = jumped.filter(|_| jumped != self.jumped).unwrap_or(self.since);
        Timestamp::from_millisecond(since.saturating_add(self.after)).unwrap_or(Timestamp::MAX)
    }

    /// A snapshot that comes back with it would go again at once, or has gone by it before.
    pub(crate) fn is_over(&self, tx: &Transaction<'_>) -> Result<bool> {
        let jumped = last_jump(tx)?.map(Timestamp::as_millisecond);
        Ok(self.spent || self.due(jumped) <= now())
    }

    fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            after: row.get("after")?,
            since: row.get("since")?,
            jumped: row.get("jumped")?,
            spent: row.get("spent")?,
        })
    }
}

impl Expiring {
    /// Those whose time may come: not what is kept, protected, an undo point, or gone.
    pub(crate) fn all(tx: &Transaction<'_>) -> Result<Vec<Self>> {
        let jumped = known_jump(tx)?;
        let mut query = tx.prepare(
            "SELECT e.*, s.target FROM expiry e JOIN snapshots s ON s.id = e.snapshot
              WHERE s.removed IS NULL AND s.keep = 0 AND s.protected = 0 AND s.undo_point = 0 AND e.spent = 0
              ORDER BY s.rowid",
        )?;
        let rows = query.query_map([], |row| {
            let due = Expiry::from_row(row)?.due(jumped);
            Ok(Self { snapshot: row.get("snapshot")?, target: row.get("target")?, due })
        })?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// Those of a target whose time has come, after a look at the clocks.
    pub(crate) fn over(tx: &Transaction<'_>, target: &str) -> Result<Vec<Self>> {
        last_jump(tx)?;
        let (mut all, now) = (Self::all(tx)?, now());
        all.retain(|one| one.target == target && one.due <= now);
        Ok(all)
    }
}

impl SnapshotRow {
    /// How long it stays; none if it does not go by itself.
    pub(crate) fn expiry(tx: &Transaction<'_>, id: &str) -> Result<Option<Expiry>> {
        one(tx.query_row("SELECT * FROM expiry WHERE snapshot = ?1", [id], Expiry::from_row))
    }

    /// When it goes by itself, as far as is known.
    pub(crate) fn expires(tx: &Transaction<'_>, id: &str) -> Result<Option<Timestamp>> {
        let Some(expiry) = Self::expiry(tx, id)?.filter(|expiry| !expiry.spent) else { return Ok(None) };
        Ok(Some(expiry.due(known_jump(tx)?)))
    }

    /// Writes how long it stays.
    pub(crate) fn set_expiry(tx: &Transaction<'_>, id: &str, expiry: Option<&Expiry>) -> Result<()> {
        tx.execute("DELETE FROM expiry WHERE snapshot = ?1", [id])?;
        if let Some(Expiry { after, since, jumped, spent }) = expiry {
            tx.execute(
                "INSERT INTO expiry (snapshot, after, since, jumped, spent) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![id, after, since, jumped, spent],
            )?;
        }
        Ok(())
    }

    /// It goes by its expiry now: should it be brought back, it stays.
    pub(crate) fn spend_expiry(tx: &Transaction<'_>, id: &str) -> Result<()> {
        tx.execute("UPDATE expiry SET spent = 1 WHERE snapshot = ?1", [id])?;
        Ok(())
    }

    /// Of a snapshot that comes back: true if its expiry had to be taken away, or it would have gone again at once.
    pub(crate) fn end_expiry(tx: &Transaction<'_>, id: &str) -> Result<bool> {
        let over = match Self::expiry(tx, id)? {
            Some(expiry) => expiry.is_over(tx)?,
            None => false,
        };
        if over {
            Self::set_expiry(tx, id, None)?;
        }
        Ok(over)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = 3_600_000;

    fn due(expiry: Expiry, jumped: Option<i64>) -> i64 {
        expiry.due(jumped).as_millisecond()
    }

    #[test]
    fn time_counts_anew_from_a_jump_that_came_later_whichever_way_it_went() {
        let expiry = Expiry { after: 2 * HOUR, since: 10 * HOUR, jumped: None, spent: false };
        assert_eq!(due(expiry, None), 12 * HOUR);
        assert_eq!(due(expiry, Some(500 * HOUR)), 502 * HOUR, "ahead: it does not go at once");
        assert_eq!(
            due(expiry, Some(HOUR)),
            3 * HOUR,
            "back: it does not stay until the old time comes again"
        );
    }

    #[test]
    fn a_jump_that_was_known_before_does_not_count() {
        let expiry = Expiry { after: 2 * HOUR, since: 10 * HOUR, jumped: Some(9 * HOUR), spent: false };
        assert_eq!(due(expiry, Some(9 * HOUR)), 12 * HOUR);
        assert_eq!(due(expiry, Some(11 * HOUR)), 13 * HOUR);
        // The record of the clock is gone.
        assert_eq!(due(expiry, None), 12 * HOUR);
    }

    #[test]
    fn times_without_an_end_have_none() {
        let expiry = Expiry { after: i64::MAX, since: 10 * HOUR, jumped: None, spent: false };
        assert_eq!(expiry.due(None), Timestamp::MAX);
    }
}
