//! `undo`: one more operation that takes an earlier one back. And the log.
//!
//! Every operation that can be undone leaves an [`Act`] in the journal. Carrying it out gives the act that would take that back
//! in turn: so an undo can be undone, by its id, and what it had taken back is done again (a redo, which can be undone like what it
//! did). `undo` without an id passes undos over: asked again it goes further back.

use std::collections::HashSet;

use rusqlite::Transaction;
use serde_json::json;

use crate::catalog::{Act, OpRow, SnapshotRow, TargetRow, Things, Until};
use crate::context::Context;
use crate::create::name_taken;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::step;
use crate::goto;
use crate::power_off;
use crate::regroup::Purpose;
use crate::remove::{protected, remove};
use crate::take::snapshot_name_taken;
use crate::types::{GotoPower, OpState, Operation, Undone};

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

    /// Takes an operation back: the one with this id; the last of the machine with this name; or, without either, the last of the
    /// machine that was worked on last.
    pub fn undo(&self, cx: &Context, what: Option<&str>) -> Result<Undone> {
        let (op, by_id) = self.catalog.read(|tx| match what {
            None => Ok((last_undoable(tx, None)?, false)),
            Some(what) => match machine(tx, what)? {
                Some(id) => Ok((last_undoable(tx, Some(id))?, false)),
                None => OpRow::by_id(tx, what).map(|op| (op, true)).map_err(|error| match error.code() {
                    Code::NotFound => {
                        Error::new(Code::NotFound, format!("there is no operation or machine {what:?}"))
                            .hint("`spinney op log` lists the operations, `spinney ls` the machines")
                    }
                    _ => error,
                }),
            },
        })?;
        undoable(&op)?;
        let _guard = op.target.as_ref().map(|id| self.locks.acquire(id, "undo", cx)).transpose()?;
        // Under the lock: another undo may have been quicker, or what was under way is the last one now.
        let (op, first) = self.catalog.read(|tx| {
            let op = if by_id { OpRow::by_id(tx, &op.id)? } else { last_undoable(tx, op.target.clone())? };
            let first = op.undid().map(|first| OpRow::by_id(tx, first)).transpose()?;
            Ok((op, first))
        })?;
        match undoable(&op)? {
            Act::Goto(point) => self.undo_goto(cx, &op, point)?,
            Act::Regroup { target, group } => self.undo_regroup(cx, &op, target, group)?,
            act => self.undo_in_catalog(cx, &op, act)?,
        }
        let redone = first.is_some();
        let operation = first.as_ref().map_or_else(|| op.title(), again);
        Ok(Undone { operation, redone, again: (!redone).then(|| cx.id.clone()) })
    }

    fn undo_in_catalog(&self, cx: &Context, op: &OpRow, act: &Act) -> Result<()> {
        if let Act::Remove(things) = act {
            let mut running = Vec::new();
            for id in things.targets() {
                let row = self.find_again(self.catalog.read(|tx| TargetRow::by_id(tx, id))?, false)?;
                if self.look(&row)?.1.is_some() {
                    running.push(row);
                }
            }
            match running.as_slice() {
                [] => {}
                [row] => self.needs_no_process(row)?,
                rows => {
                    let names = rows.iter().map(|row| row.name.as_str()).collect::<Vec<_>>().join(" ");
                    return Err(Error::new(
                        Code::Refused,
                        format!("{} of the machines that it made are running", rows.len()),
                    )
                    .hint(format!("first, `for machine in {names}; do spinney kill $machine; done`")));
                }
            }
        }
        let (kind, subject) = self.entry_of(op)?;
        self.journaled(cx, kind, &subject, op.target.as_deref(), &json!({}), || {
            let stay = self.catalog.write(|tx| {
                let mut stay = Vec::new();
                let back = carry_out(tx, act, &mut stay)?;
                op.taken_back(tx, &cx.id, Some(back))?;
                Ok(stay)
            })?;
            step("undo.written");
            for name in stay {
                cx.warn(format!(
                    "{name} does not expire any more: its time was over; `spinney edit {name} --expire 7d` gives it another"
                ));
            }
            Ok(())
        })
    }

    /// Kind and subject of the journal's entry for taking an operation back: an undo that is taken back is a redo.
    fn entry_of(&self, op: &OpRow) -> Result<(&'static str, String)> {
        let Some(first) = op.undid() else { return Ok(("undo", op.title())) };
        Ok(("redo", again(&self.catalog.read(|tx| OpRow::by_id(tx, first))?)))
    }

    /// Copies a machine back into the group that it came from.
    fn undo_regroup(&self, cx: &Context, op: &OpRow, target: &str, group: &str) -> Result<()> {
        let row = self.catalog.read(|tx| TargetRow::by_id(tx, target))?;
        if row.removed.is_some() {
            return Err(has_been_removed(&row));
        }
        let row = self.find_again(row, false)?;
        let group = self.groups.by_id(group).map_err(|_| {
            Error::new(Code::NotFound, format!("the group that {} came from has been removed", row.name))
        })?;
        let (kind, subject) = self.entry_of(op)?;
        self.regroup(cx, &Purpose { kind, subject, undoes: Some(op) }, &row, &group)
    }

    /// Goes to the undo point that the goto kept.
    fn undo_goto(&self, cx: &Context, op: &OpRow, point: &str) -> Result<()> {
        let target = op.target.as_deref().unwrap_or_default();
        let (row, snapshot) = self.catalog.read(|tx| {
            let row = TargetRow::by_id(tx, target)?;
            Ok((row, SnapshotRow::by_id(tx, point)?))
        })?;
        if row.removed.is_some() {
            return Err(has_been_removed(&row));
        }
        let row = self.find_again(row, false)?;
        let (kind, subject) = self.entry_of(op)?;
        let purpose = goto::Purpose { kind, subject, undoes: Some(op), asked: true };
        let wanted = goto::wanted_power(&snapshot, GotoPower::Recorded);
        self.goto_locked(cx, &purpose, &row, &snapshot, wanted, false)?;
        Ok(())
    }
}

fn has_been_removed(row: &TargetRow) -> Error {
    Error::new(Code::Refused, format!("{} has been removed", row.name))
        .hint("undo its removal first; `spinney op log` has its id")
}

/// The machine of this name; else the one that had it when it was removed, the last if there were several.
fn machine(tx: &Transaction<'_>, name: &str) -> Result<Option<String>> {
    let mut named = TargetRow::all(tx, true)?;
    named.retain(|row| row.name == name);
    let there = named.iter().find(|row| row.removed.is_none());
    Ok(there.or_else(|| named.iter().max_by_key(|row| row.removed)).map(|row| row.id.clone()))
}

/// What `undo` without an id takes back. Undos themselves are passed over, and what was rolled back; but what cannot be taken back
/// is not: whoever wants to undo that would get something older.
fn last_undoable(tx: &Transaction<'_>, target: Option<String>) -> Result<OpRow> {
    let asked_for = |op: &OpRow| {
        matches!(op.kind.as_str(), "take" | "goto" | "rm" | "edit" | "clone" | "fork" | "undo" | "redo")
            || power_off::is_asked_for(op)
    };
    let newest = OpRow::newest(tx, LOOK_BACK)?;
    // What expires by itself, or follows from a guest's own power-off, is work on a machine, but nobody's who would want to undo it
    // before anything else.
    // The machine of a clone that was not made, or was taken back, or that was thrown away, is none.
    let clones = newest.iter().filter(|op| match op.kind.as_str() {
        "clone" | "fork" => op.state != OpState::Done,
        kind => kind == power_off::THROW_AWAY,
    });
    let is_gone = |id: &&str| TargetRow::by_id(tx, id).map_or(true, |row| row.removed.is_some());
    let none: HashSet<&str> = clones.filter_map(|op| op.target.as_deref()).filter(is_gone).collect();
    let there = |op: &&OpRow| op.target.as_deref().is_some_and(|target| !none.contains(target));
    let worked_on = || newest.iter().filter(|op| asked_for(op)).find(there).and_then(|op| op.target.clone());
    let target = target.or_else(worked_on);
    let mut older = newest.into_iter();
    while let Some(op) = older.next() {
        let by_itself = op.kind == "expire" || power_off::KINDS.contains(&op.kind.as_str());
        if !asked_for(&op) && !by_itself || op.target.is_none() || op.target != target {
            continue;
        }
        if op.state == OpState::Done && op.kind != "undo" {
            return match &op.undo {
                Some(_) => Ok(op),
                None => Err(stuck(
                    &op,
                    older.find(|older| older.kind != "undo" && older.target == target && is_undoable(older)),
                )),
            };
        }
    }
    Err(Error::new(Code::NotFound, "there is nothing to undo").hint("`spinney op log` shows what was done"))
}

/// The last operation of a machine cannot be taken back; there may be one before it that can.
fn stuck(op: &OpRow, before: Option<OpRow>) -> Error {
    let error = Error::new(Code::Refused, format!("nothing is kept to take {} back with", op.title()));
    match before {
        Some(before) => error.hint(format!(
            "what can be taken back before it is {}: `spinney undo {}`",
            before.title(),
            before.id
        )),
        None => {
            error.hint("nothing before it can be taken back either; `spinney op log` shows what was done")
        }
    }
}

/// An operation that is done again, in words: "take web@before", however often that was.
fn again(first: &OpRow) -> String {
    if first.kind == "redo" { first.subject.clone() } else { first.title() }
}

fn is_undoable(op: &OpRow) -> bool {
    op.state == OpState::Done && op.undo.is_some()
}

/// The act that takes an operation back, if it can be.
fn undoable(op: &OpRow) -> Result<&Act> {
    let why = match (op.state, &op.undo) {
        (OpState::Done, Some(inverse)) => return Ok(&inverse.act),
        (OpState::Done, None) => "nothing is kept to take it back with",
        (OpState::Undone, _) => "it was undone already",
        (OpState::Running, _) => "it is still under way",
        (OpState::Failed | OpState::Cancelled, _) => "it was rolled back",
    };
    let error = Error::new(Code::Refused, format!("{} cannot be undone: {why}", op.title()));
    Err(match (op.kind.as_str(), op.state) {
        ("create", OpState::Done) => error.hint(format!("`spinney rm {}` removes it", op.subject)),
        _ => error,
    })
}

/// Carries an act out; returns the act that takes it back. `stay` gets the names of the snapshots that would have gone by themselves at
/// once, and stay.
fn carry_out(tx: &Transaction<'_>, act: &Act, stay: &mut Vec<String>) -> Result<Act> {
    Ok(match act {
        Act::Remove(things) => Act::Restore(remove_again(tx, things)?),
        Act::Restore(things) => {
            restore(tx, things, stay)?;
            Act::Remove(things.clone())
        }
        Act::NameTarget { id, name } => {
            let now = TargetRow::by_id(tx, id)?;
            if now.name != *name && TargetRow::name_taken(tx, name)? {
                return Err(name_given_away(name_taken(name), name));
            }
            TargetRow::set_name(tx, id, name)?;
            Act::NameTarget { id: id.clone(), name: now.name }
        }
        Act::WriteSnapshot { id, name, note, keep, expiry } => {
            let now = SnapshotRow::by_id(tx, id)?;
            let had = SnapshotRow::expiry(tx, id)?;
            let to = name.as_ref().unwrap_or(&now.name);
            if now.name != *to && SnapshotRow::name_taken(tx, &now.target, to)? {
                let given = format!("{}@{to}", now.target_name);
                return Err(name_given_away(snapshot_name_taken(&now.target_name, to), &given));
            }
            SnapshotRow::set_text(tx, id, to, note.as_ref().unwrap_or(&now.note), keep.unwrap_or(now.keep))?;
            if let Some(until) = expiry {
                let expiry = match until {
                    // What was kept meanwhile does not expire.
                    Until::Expired(expiry) if !keep.unwrap_or(now.keep) => Some(expiry),
                    Until::Expired(_) | Until::Removed => None,
                };
                SnapshotRow::set_expiry(tx, id, expiry)?;
                if SnapshotRow::end_expiry(tx, id)? {
                    stay.push(format!("{}@{to}", now.target_name));
                }
            }
            Act::WriteSnapshot {
                id: id.clone(),
                name: name.is_some().then_some(now.name),
                note: note.is_some().then_some(now.note),
                keep: keep.is_some().then_some(now.keep),
                expiry: expiry.is_some().then_some(had.into()),
            }
        }
        Act::Goto(_) | Act::Regroup { .. } => {
            return Err(Error::new(Code::Failed, "this is not undone in the catalog alone"));
        }
    })
}

/// Takes names away, of what still has one. Returns what that was.
fn remove_again(tx: &Transaction<'_>, things: &Things) -> Result<Things> {
    let mut gone = Things::default();
    let mut snapshots = Vec::new();
    for id in &things.snapshots {
        snapshots.push(SnapshotRow::by_id(tx, id)?);
    }
    for (number, id) in things.targets().enumerate() {
        // A machine goes with what it has now, as with `rm`.
        if number == 0 {
            snapshots.clear();
        }
        snapshots.extend(SnapshotRow::of_target(tx, id)?);
    }
    for snapshot in snapshots {
        if snapshot.protected && snapshot.removed.is_none() {
            return Err(protected(&snapshot.full_name()));
        }
        if snapshot.removed.is_none() {
            gone.snapshots.push(snapshot.id);
        }
    }
    let mut machines = Vec::new();
    for id in things.targets() {
        let target = TargetRow::by_id(tx, id)?;
        if target.protected {
            return Err(protected(&target.name));
        }
        if target.removed.is_none() {
            machines.push(target.id);
        }
    }
    let gone = Things { snapshots: gone.snapshots, ..Things::machines(machines) };
    if gone == Things::default() {
        return Err(Error::new(Code::Refused, "what it made has been removed already")
            .hint("`spinney op log` shows by what"));
    }
    remove(tx, &gone)?;
    Ok(gone)
}

/// What is to come back under a name that something else has by now.
fn name_given_away(taken: Error, address: &str) -> Error {
    taken
        .hint(format!("`spinney edit {address} --name OTHER` gives that another name; then it can be undone"))
}

/// Names come back, if nobody else has taken them; an expiry that is over does not.
fn restore(tx: &Transaction<'_>, things: &Things, stay: &mut Vec<String>) -> Result<()> {
    for id in things.targets() {
        let target = TargetRow::by_id(tx, id)?;
        if TargetRow::name_taken(tx, &target.name)? {
            return Err(name_given_away(name_taken(&target.name), &target.name));
        }
        TargetRow::set_removed(tx, id, None)?;
    }
    for id in &things.snapshots {
        let snapshot = SnapshotRow::by_id(tx, id)?;
        if snapshot.removed.is_none() {
            continue;
        }
        if SnapshotRow::name_taken(tx, &snapshot.target, &snapshot.name)? {
            let taken = snapshot_name_taken(&snapshot.target_name, &snapshot.name);
            return Err(name_given_away(taken, &snapshot.full_name()));
        }
        SnapshotRow::set_removed(tx, id, None)?;
        if SnapshotRow::end_expiry(tx, id)? {
            stay.push(snapshot.full_name());
        }
    }
    Ok(())
}

fn operation(row: OpRow) -> Operation {
    Operation {
        undoable: is_undoable(&row),
        changed: row.changed().into_iter().map(str::to_owned).collect(),
        id: row.id,
        kind: row.kind,
        subject: row.subject,
        state: row.state,
        started: row.started,
        ended: row.ended,
        error: row.error,
    }
}
