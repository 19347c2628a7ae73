//! Rows of operations: what was meant to be done, and how to take it back.

use jiff::Timestamp;
use rusqlite::{Row, Transaction, params};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Expiry, json_column, now, optional_json, time_column, to_json};
use crate::error::{Code, Error, Result};
use crate::types::OpState;

/// Digits of an id that are enough to name an operation, if no other begins so.
const ID_PREFIX: usize = 4;

/// The act that takes an operation back. Ids, not names: these may have changed since.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Act {
    /// Take names away, as `rm` does.
    Remove(Things),
    /// Give names back.
    Restore(Things),
    /// Go to the undo point that holds what was left.
    Goto(String),
    /// Write the name of a machine.
    NameTarget { id: String, name: String },
    /// Copy a machine into this group, by its id.
    Regroup { target: String, group: String },
    /// Write the text of a snapshot, as far as it is given.
    WriteSnapshot {
        id: String,
        name: Option<String>,
        note: Option<String>,
        keep: Option<bool>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        expiry: Option<Until>,
    },
}

/// How long [`Act::WriteSnapshot`] lets a snapshot stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Until {
    /// Until somebody removes it.
    Removed,
    /// Until it expires.
    Expired(Expiry),
}

impl From<Option<Expiry>> for Until {
    fn from(expiry: Option<Expiry>) -> Self {
        expiry.map_or(Self::Removed, Self::Expired)
    }
}

impl Act {
    /// True if it is about this snapshot or target.
    pub(crate) fn needs(&self, id: &str) -> bool {
        match self {
            Self::Remove(things) | Self::Restore(things) => {
                things.targets().chain(&things.snapshots).any(|own| own == id)
            }
            Self::Goto(about)
            | Self::Regroup { target: about, .. }
            | Self::NameTarget { id: about, .. }
            | Self::WriteSnapshot { id: about, .. } => about == id,
        }
    }
}

/// What [`Act::Remove`] and [`Act::Restore`] are about.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Things {
    pub(crate) snapshots: Vec<String>,
    pub(crate) target: Option<String>,
    /// More machines, if there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) others: Vec<String>,
}

impl Things {
    /// Machines, with all that they have.
    pub(crate) fn machines(ids: impl IntoIterator<Item = String>) -> Self {
        let mut ids = ids.into_iter();
        Self { snapshots: Vec::new(), target: ids.next(), others: ids.collect() }
    }

    /// All machines of them.
    pub(crate) fn targets(&self) -> impl Iterator<Item = &String> {
        self.target.iter().chain(&self.others)
    }
}

/// What an operation leaves for whoever takes it back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Inverse {
    pub(crate) act: Act,
    /// In an undo: the operation that it took back, which is done again by taking this one back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) undid: Option<String>,
}

/// One operation.
#[derive(Clone, Debug)]
pub(crate) struct OpRow {
    pub(crate) id: String,
    pub(crate) kind: String,
    /// What it is about, in words.
    pub(crate) subject: String,
    /// Target's id, if there is one.
    pub(crate) target: Option<String>,
    pub(crate) state: OpState,
    /// What recovery needs.
    pub(crate) plan: Value,
    /// What undo needs; none if it cannot be undone. Kept when it has been: it may be done again.
    pub(crate) undo: Option<Inverse>,
    pub(crate) started: Timestamp,
    pub(crate) ended: Option<Timestamp>,
    pub(crate) error: Option<String>,
}

impl OpRow {
    fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get("id")?,
            kind: row.get("kind")?,
            subject: row.get("subject")?,
            target: row.get("target")?,
            state: json_column(row, "state")?,
            plan: json_column(row, "plan")?,
            // An entry that cannot be read is one that cannot be undone.
            undo: optional_json(row, "undo").unwrap_or_default(),
            started: time_column(row, "started")?,
            ended: row
                .get::<_, Option<i64>>("ended")?
                .map(|ms| Timestamp::from_millisecond(ms).unwrap_or(Timestamp::UNIX_EPOCH)),
            error: row.get("error")?,
        })
    }

    /// What it was, in words: "take web@before", "edit web@before (name, note)".
    pub(crate) fn title(&self) -> String {
        let title = format!("{} {}", self.kind, self.subject);
        match self.changed() {
            changed if changed.is_empty() => title,
            changed => format!("{title} ({})", changed.join(", ")),
        }
    }

    /// What an edit changed.
    pub(crate) fn changed(&self) -> Vec<&'static str> {
        match self.undo.as_ref().map(|inverse| &inverse.act) {
            _ if self.kind != "edit" => Vec::new(),
            Some(Act::NameTarget { .. }) => vec!["name"],
            Some(Act::Regroup { .. }) => vec!["group"],
            Some(Act::WriteSnapshot { name, note, keep, expiry, .. }) => {
                let parts = [
                    (name.is_some(), "name"),
                    (note.is_some(), "note"),
                    (keep.is_some(), "keep"),
                    (expiry.is_some(), "expiry"),
                ];
                parts.into_iter().filter_map(|(is, part)| is.then_some(part)).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The operation that this one, an undo, took back.
    pub(crate) fn undid(&self) -> Option<&str> {
        self.undo.as_ref()?.undid.as_deref()
    }

    /// Writes that an operation begins. Whoever calls has the target to himself: an entry of the same target that is still open
    /// is one whose end could not be written down.
    pub(crate) fn begin(
        tx: &Transaction<'_>,
        id: &str,
        kind: &str,
        subject: &str,
        target: Option<&str>,
        plan: &Value,
    ) -> Result<()> {
        if target.is_some() {
            tx.execute(
                "UPDATE operations SET state = ?2, ended = ?3, error = 'its end could not be written down'
                  WHERE target = ?1 AND state = ?4",
                params![
                    target,
                    to_json(&OpState::Failed)?,
                    now().as_millisecond(),
                    to_json(&OpState::Running)?
                ],
            )?;
        }
        tx.execute(
            "INSERT INTO operations (id, kind, subject, target, state, plan, started)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            params![
                id,
                kind,
                subject,
                target,
                to_json(&OpState::Running)?,
                to_json(plan)?,
                now().as_millisecond()
            ],
        )?;
        Ok(())
    }

    /// Replaces the plan: the next step is about to be done.
    pub(crate) fn set_plan(tx: &Transaction<'_>, id: &str, plan: &Value) -> Result<()> {
        tx.execute("UPDATE operations SET plan = ?2 WHERE id = ?1", params![id, to_json(plan)?])?;
        Ok(())
    }

    /// Writes that it is done, with the act that takes it back.
    pub(crate) fn finish(tx: &Transaction<'_>, id: &str, undo: Option<Act>) -> Result<()> {
        Self::done(tx, id, undo.map(|act| Inverse { act, undid: None }).as_ref())
    }

    fn done(tx: &Transaction<'_>, id: &str, undo: Option<&Inverse>) -> Result<()> {
        tx.execute(
            "UPDATE operations SET state = ?2, undo = ?3, ended = ?4 WHERE id = ?1",
            params![id, to_json(&OpState::Done)?, undo.map(to_json).transpose()?, now().as_millisecond()],
        )?;
        Ok(())
    }

    /// Writes that it was rolled back. One that is done stays done.
    pub(crate) fn close(tx: &Transaction<'_>, id: &str, state: OpState, error: Option<&str>) -> Result<()> {
        tx.execute(
            "UPDATE operations SET state = ?2, error = ?3, ended = ?4 WHERE id = ?1 AND state = ?5",
            params![id, to_json(&state)?, error, now().as_millisecond(), to_json(&OpState::Running)?],
        )?;
        Ok(())
    }

    /// Writes that operation `by` is done and took this one back; `back` would take `by` back in turn. If this one was an undo
    /// itself, `by` does again what it had taken back, and can be undone like that.
    pub(crate) fn taken_back(&self, tx: &Transaction<'_>, by: &str, back: Option<Act>) -> Result<()> {
        tx.execute(
            "UPDATE operations SET state = ?2 WHERE id = ?1",
            params![self.id, to_json(&OpState::Undone)?],
        )?;
        // What is done again just now is the first to be undone next, like any other operation.
        let undid = self.undid().is_none().then(|| self.id.clone());
        Self::done(tx, by, back.map(|act| Inverse { act, undid }).as_ref())
    }

    /// One operation.
    pub(crate) fn by_id(tx: &Transaction<'_>, id: &str) -> Result<Self> {
        // The digits of an id are below `g`, and so is everything that begins with some of them.
        let mut query = tx.prepare("SELECT * FROM operations WHERE id >= ?1 AND id < ?1 || 'g' LIMIT 2")?;
        let mut found = query.query_map([id], Self::from_row)?.collect::<rusqlite::Result<Vec<_>>>()?;
        let unlike = || {
            Error::new(Code::NotFound, format!("there is no operation {id:?}"))
                .hint("`spinney op log` lists the operations")
        };
        match (found.len(), found.pop()) {
            (1, Some(op)) if op.id == id || id.len() >= ID_PREFIX => Ok(op),
            (2, _) if id.len() >= ID_PREFIX => {
                Err(Error::new(Code::Usage, format!("more than one operation begins with {id:?}"))
                    .hint("write more of the id; `spinney op log` lists the operations"))
            }
            _ => Err(unlike()),
        }
    }

    /// The newest operations, newest first.
    pub(crate) fn newest(tx: &Transaction<'_>, limit: usize) -> Result<Vec<Self>> {
        let mut query = tx.prepare("SELECT * FROM operations ORDER BY seq DESC LIMIT ?1")?;
        let rows = query.query_map([limit as u64], Self::from_row)?.collect::<rusqlite::Result<_>>()?;
        Ok(rows)
    }

    /// How many operations of these kinds a target has seen.
    pub(crate) fn count(tx: &Transaction<'_>, target: &str, kinds: &[&str]) -> Result<u64> {
        let mut sum = 0;
        for kind in kinds {
            let sql = "SELECT count(*) FROM operations WHERE target = ?1 AND kind = ?2";
            sum += tx.query_row(sql, [target, kind], |row| row.get::<_, u64>(0))?;
        }
        Ok(sum)
    }

    /// All operations that can be undone, newest first.
    pub(crate) fn undoable(tx: &Transaction<'_>) -> Result<Vec<Self>> {
        let mut query =
            tx.prepare("SELECT * FROM operations WHERE undo IS NOT NULL AND state = ?1 ORDER BY seq DESC")?;
        let rows = query.query_map([to_json(&OpState::Done)?], Self::from_row)?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// Of those that can be undone, the ones whose undo needs one of these machines or snapshots.
    pub(crate) fn needing<'a>(
        tx: &Transaction<'_>,
        ids: impl Iterator<Item = &'a String> + Clone,
    ) -> Result<Vec<Self>> {
        let needs =
            |op: &Self| op.undo.as_ref().is_some_and(|inverse| ids.clone().any(|id| inverse.act.needs(id)));
        Ok(Self::undoable(tx)?.into_iter().filter(needs).collect())
    }

    /// Operations that were under way when the daemon ended, oldest first.
    pub(crate) fn unfinished(tx: &Transaction<'_>) -> Result<Vec<Self>> {
        let mut query = tx.prepare("SELECT * FROM operations WHERE state = ?1 ORDER BY seq")?;
        let rows = query.query_map([to_json(&OpState::Running)?], Self::from_row)?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// It can no longer be undone.
    pub(crate) fn forget_undo(tx: &Transaction<'_>, id: &str) -> Result<()> {
        tx.execute("UPDATE operations SET undo = NULL WHERE id = ?1", [id])?;
        Ok(())
    }
}
