//! `undo`: one more operation that takes an earlier one back. And the log.

use serde_json::{Value, json};

use crate::catalog::{OpRow, SnapshotRow, TargetRow};
use crate::context::Context;
use crate::create::name_taken;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::goto::Purpose;
use crate::take::snapshot_name_taken;
use crate::types::{GotoPower, OpState, Operation};

/// How far back `undo` without an id looks.
const LOOK_BACK: usize = 1000;

impl Engine {
    /// The newest operations, newest first.
    pub fn operations(&self, limit: usize) -> Result<Vec<Operation>> {
        let rows = self.catalog.read(|tx| OpRow::newest(tx, limit))?;
        Ok(rows.into_iter().map(operation).collect())
    }

    /// One operation of the log.
    pub fn operation(&self, id: &str) -> Result<Operation> {
        self.catalog.read(|tx| OpRow::by_id(tx, id)).map(operation)
    }

    /// Takes back operation `id`, or the last one that can be. Returns a sentence on what was done.
    pub fn undo(&self, cx: &Context, id: Option<&str>) -> Result<String> {
        let op = self.catalog.read(|tx| match id {
            Some(id) => OpRow::by_id(tx, id),
            None => OpRow::newest(tx, LOOK_BACK)?.into_iter().find(is_undoable).ok_or_else(|| {
                Error::new(Code::NotFound, "there is nothing to undo")
                    .hint("`spinney op log` shows what was done")
            }),
        })?;
        let name = format!("{} {}", op.kind, op.subject);
        let Some(undo) = op.undo.clone().filter(|_| is_undoable(&op)) else {
            let why = match op.state {
                OpState::Undone => "it was undone already",
                OpState::Done => "nothing is kept to take it back with",
                OpState::Running => "it is still under way",
                OpState::Failed | OpState::Cancelled => "it was rolled back",
            };
            return Err(Error::new(Code::Refused, format!("{name} cannot be undone: {why}")));
        };
        match op.kind.as_str() {
            "goto" => self.undo_goto(cx, &op, &undo)?,
            "take" => self.undo_in_catalog(cx, &op, |tx| undo_take(tx, &undo))?,
            "rm" => self.undo_in_catalog(cx, &op, |tx| undo_rm(tx, &undo))?,
            "edit" => self.undo_in_catalog(cx, &op, |tx| undo_edit(tx, &undo))?,
            other => return Err(Error::new(Code::Refused, format!("{other} cannot be undone"))),
        }
        Ok(format!("undid: {name}"))
    }

    fn undo_in_catalog(
        &self,
        cx: &Context,
        op: &OpRow,
        body: impl FnOnce(&rusqlite::Transaction<'_>) -> Result<()>,
    ) -> Result<()> {
        let _guard = op.target.as_ref().map(|id| self.locks.acquire(id, "undo", cx)).transpose()?;
        self.catalog.read(|tx| still_undoable(tx, op))?;
        let subject = format!("{} {}", op.kind, op.subject);
        self.journaled(cx, "undo", &subject, op.target.as_deref(), &json!({}), || {
            self.catalog.write(|tx| {
                body(tx)?;
                OpRow::set_undone(tx, &op.id)?;
                OpRow::finish(tx, &cx.id, None)
            })
        })
    }

    /// Goes to the undo point that the goto kept.
    fn undo_goto(&self, cx: &Context, op: &OpRow, undo: &Value) -> Result<()> {
        let target = op.target.as_deref().unwrap_or_default();
        let _guard = self.locks.acquire(target, "undo", cx)?;
        self.catalog.read(|tx| still_undoable(tx, op))?;
        let point = text(undo, "undo_point")?;
        let (row, snapshot) = self.catalog.read(|tx| {
            let row = TargetRow::by_id(tx, target)?;
            Ok((row, SnapshotRow::by_id(tx, point)?))
        })?;
        if row.removed.is_some() {
            return Err(Error::new(Code::Refused, format!("{} has been removed", row.name))
                .hint("undo its removal first; `spinney op log` has its id"));
        }
        let row = self.find_again(row, false)?;
        let purpose = Purpose { kind: "undo", subject: format!("goto {}", op.subject), undoes: Some(&op.id) };
        self.goto_locked(cx, &purpose, &row, &snapshot, GotoPower::Recorded, false)?;
        Ok(())
    }
}

/// Under the lock: another undo may have been quicker.
fn still_undoable(tx: &rusqlite::Transaction<'_>, op: &OpRow) -> Result<()> {
    if is_undoable(&OpRow::by_id(tx, &op.id)?) {
        return Ok(());
    }
    Err(Error::new(Code::Refused, format!("{} {} has been undone meanwhile", op.kind, op.subject)))
}

fn is_undoable(op: &OpRow) -> bool {
    op.state == OpState::Done && op.undo.is_some()
}

fn operation(row: OpRow) -> Operation {
    Operation {
        undoable: is_undoable(&row),
        id: row.id,
        kind: row.kind,
        subject: row.subject,
        state: row.state,
        started: row.started,
        ended: row.ended,
        error: row.error,
    }
}

fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value
        .get(key)
        .and_then(Value::as_str)
        .ok_or_else(|| Error::new(Code::Damaged, format!("the journal's entry for undo has no {key:?}")))
}

/// The snapshot goes; here is again a child of what it was a child of.
fn undo_take(tx: &rusqlite::Transaction<'_>, undo: &Value) -> Result<()> {
    let snapshot = SnapshotRow::by_id(tx, text(undo, "snapshot")?)?;
    if snapshot.protected {
        return Err(Error::new(Code::Refused, format!("{} is protected", snapshot.full_name()))
            .hint(format!("`spinney unprotect {}` first", snapshot.full_name())));
    }
    SnapshotRow::set_removed(tx, &snapshot.id, true)?;
    let target = TargetRow::by_id(tx, &snapshot.target)?;
    if target.parent.as_ref() == Some(&snapshot.id) {
        TargetRow::set_parent(tx, &target.id, snapshot.parent.as_deref())?;
    }
    Ok(())
}

/// Names come back, if nobody else has taken them.
fn undo_rm(tx: &rusqlite::Transaction<'_>, undo: &Value) -> Result<()> {
    if let Some(id) = undo.get("target").and_then(Value::as_str) {
        let target = TargetRow::by_id(tx, id)?;
        if TargetRow::name_taken(tx, &target.name)? {
            return Err(name_taken(&target.name));
        }
        TargetRow::set_removed(tx, id, false)?;
    }
    let ids = undo.get("snapshots").and_then(Value::as_array);
    for id in ids.into_iter().flatten().filter_map(Value::as_str) {
        let snapshot = SnapshotRow::by_id(tx, id)?;
        if SnapshotRow::name_taken(tx, &snapshot.target, &snapshot.name)? {
            return Err(snapshot_name_taken(&snapshot.target_name, &snapshot.name));
        }
        SnapshotRow::set_removed(tx, id, false)?;
    }
    Ok(())
}

fn undo_edit(tx: &rusqlite::Transaction<'_>, undo: &Value) -> Result<()> {
    let name = text(undo, "name")?;
    if let Some(id) = undo.get("target").and_then(Value::as_str) {
        let target = TargetRow::by_id(tx, id)?;
        if target.name != name && TargetRow::name_taken(tx, name)? {
            return Err(name_taken(name));
        }
        return TargetRow::set_name(tx, id, name);
    }
    let snapshot = SnapshotRow::by_id(tx, text(undo, "snapshot")?)?;
    if snapshot.name != name && SnapshotRow::name_taken(tx, &snapshot.target, name)? {
        return Err(snapshot_name_taken(&snapshot.target_name, name));
    }
    let keep = undo.get("keep").and_then(Value::as_bool).unwrap_or(snapshot.keep);
    SnapshotRow::set_text(tx, &snapshot.id, name, text(undo, "note")?, keep)
}
