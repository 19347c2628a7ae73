//! Rows of operations: what was meant to be done, and how to take it back.

use jiff::Timestamp;
use rusqlite::{Row, Transaction, params};
use serde_json::Value;

use super::{json_column, now, one, optional_json, time_column, to_json};
use crate::error::{Code, Error, Result};
use crate::types::OpState;

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
    /// What undo needs; none if it cannot be undone.
    pub(crate) undo: Option<Value>,
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
            undo: optional_json(row, "undo")?,
            started: time_column(row, "started")?,
            ended: row
                .get::<_, Option<i64>>("ended")?
                .map(|ms| Timestamp::from_millisecond(ms).unwrap_or(Timestamp::UNIX_EPOCH)),
            error: row.get("error")?,
        })
    }

    /// Writes that an operation begins.
    pub(crate) fn begin(
        tx: &Transaction<'_>,
        id: &str,
        kind: &str,
        subject: &str,
        target: Option<&str>,
        plan: &Value,
    ) -> Result<()> {
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

    /// Writes that it is done, with what undo needs.
    pub(crate) fn finish(tx: &Transaction<'_>, id: &str, undo: Option<&Value>) -> Result<()> {
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

    /// Writes that it was taken back.
    pub(crate) fn set_undone(tx: &Transaction<'_>, id: &str) -> Result<()> {
        tx.execute(
            "UPDATE operations SET state = ?2, undo = NULL WHERE id = ?1",
            params![id, to_json(&OpState::Undone)?],
        )?;
        Ok(())
    }

    /// One operation.
    pub(crate) fn by_id(tx: &Transaction<'_>, id: &str) -> Result<Self> {
        one(tx.query_row("SELECT * FROM operations WHERE id = ?1", [id], Self::from_row))?.ok_or_else(|| {
            Error::new(Code::NotFound, format!("there is no operation {id:?}"))
                .hint("`spinney op log` lists the operations")
        })
    }

    /// The newest operations, newest first.
    pub(crate) fn newest(tx: &Transaction<'_>, limit: usize) -> Result<Vec<Self>> {
        let mut query = tx.prepare("SELECT * FROM operations ORDER BY seq DESC LIMIT ?1")?;
        let rows = query.query_map([limit as u64], Self::from_row)?.collect::<rusqlite::Result<_>>()?;
        Ok(rows)
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
