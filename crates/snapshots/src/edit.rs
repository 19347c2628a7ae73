//! Names, notes, `keep` and protection: what of a snapshot or machine can be changed.

use serde_json::json;

use crate::address;
use crate::catalog::{Act, OpRow, SnapshotRow, TargetRow};
use crate::context::Context;
use crate::create::name_taken;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::step;
use crate::name::{check_name, check_note, check_snapshot_name};
use crate::take::snapshot_name_taken;
use crate::types::Edit;

impl Engine {
    /// Renames or annotates a machine or a snapshot. Returns its full name afterwards.
    pub fn edit(&self, cx: &Context, address: &str, edit: Edit) -> Result<String> {
        if let Some(note) = &edit.note {
            check_note(note)?;
        }
        match (address::split(address), &edit.group) {
            ((target, Some(_)), Some(group)) => Err(Error::new(
                Code::Usage,
                format!("{address} is a snapshot: it belongs to the group of its machine"),
            )
            .hint(format!(
                "`spinney edit {target} --group {group}` copies the machine with all its snapshots"
            ))),
            ((target, None), Some(group)) => {
                let Edit { name, note, keep, accept_disks, group: _ } = &edit;
                if name.is_some() || note.is_some() || keep.is_some() || *accept_disks {
                    return Err(Error::new(
                        Code::Usage,
                        "a group is changed by itself: it is a copy, and takes its time",
                    ));
                }
                self.edit_group(cx, target, group)
            }
            ((_, Some(_)), None) => self.edit_snapshot(cx, address, edit),
            ((target, None), None) => self.edit_machine(cx, target, edit),
        }
    }

    fn edit_snapshot(&self, cx: &Context, address: &str, edit: Edit) -> Result<String> {
        if edit.accept_disks {
            return Err(Error::new(
                Code::Usage,
                format!("{address} is a snapshot: --accept-disks is for a machine"),
            )
            .hint(format!("write `spinney edit {} --accept-disks`", address::split(address).0)));
        }
        if let Some(name) = &edit.name {
            check_snapshot_name(name)?;
        }
        let (row, _guard) = self.lock_target(cx, address::split(address).0, "edit")?;
        self.journaled(cx, "edit", address, Some(&row.id), &json!({}), || {
            self.catalog.write(|tx| {
                let (target, old) = address::resolve(tx, address)?;
                let undo = Act::WriteSnapshot {
                    id: old.id.clone(),
                    name: edit.name.is_some().then(|| old.name.clone()),
                    note: edit.note.is_some().then(|| old.note.clone()),
                    keep: edit.keep.is_some().then_some(old.keep),
                };
                let name = edit.name.clone().unwrap_or_else(|| old.name.clone());
                if name != old.name && SnapshotRow::name_taken(tx, &target.id, &name)? {
                    return Err(snapshot_name_taken(&target.name, &name));
                }
                let note = edit.note.clone().unwrap_or_else(|| old.note.clone());
                if name != old.name {
                    // Who gives it a name wants to keep it: no later goto takes it away.
                    SnapshotRow::promote(tx, &old.id)?;
                }
                SnapshotRow::set_text(tx, &old.id, &name, &note, edit.keep.unwrap_or(old.keep))?;
                OpRow::finish(tx, &cx.id, Some(undo))?;
                Ok(format!("{}@{name}", target.name))
            })
        })
        .inspect(|_| step("edit.written"))
    }

    fn edit_machine(&self, cx: &Context, target: &str, edit: Edit) -> Result<String> {
        if edit.note.is_some() || edit.keep.is_some() {
            return Err(Error::new(
                Code::Usage,
                format!("{target} is a machine: only its name can be edited"),
            )
            .hint(format!("notes and --keep belong to snapshots: {target}@NAME")));
        }
        if let Some(name) = &edit.name {
            check_name("machine", name)?;
        }
        let (row, _guard) = self.lock_target(cx, target, "edit")?;
        if edit.accept_disks {
            self.accept_disks(cx, &row)?;
        }
        let Some(name) = edit.name else {
            return Ok(row.name);
        };
        self.journaled(cx, "edit", target, Some(&row.id), &json!({}), || {
            self.catalog.write(|tx| {
                let old = TargetRow::by_name(tx, target)?;
                if name != old.name && TargetRow::name_taken(tx, &name)? {
                    return Err(name_taken(&name));
                }
                TargetRow::set_name(tx, &old.id, &name)?;
                let undo = Act::NameTarget { id: old.id, name: old.name };
                OpRow::finish(tx, &cx.id, Some(undo))
            })
        })?;
        step("edit.written");
        Ok(name)
    }

    /// The images of the user's that the machine's disks and snapshots lie over are right as they are now.
    fn accept_disks(&self, cx: &Context, row: &TargetRow) -> Result<()> {
        // An entry of its own: this half of an edit cannot be undone.
        let entry = Context::new();
        self.journaled(&entry, "accept", &row.name, Some(&row.id), &json!({}), || {
            cx.check()?;
            self.catalog.write(|tx| {
                self.accept_bases(tx, &TargetRow::disks(tx, &row.id)?)?;
                for snapshot in SnapshotRow::of_target(tx, &row.id)? {
                    self.accept_bases(tx, &SnapshotRow::disks(tx, &snapshot.id)?)?;
                }
                OpRow::finish(tx, &entry.id, None)
            })
        })
    }

    /// Makes `rm` refuse a snapshot or a machine, or no longer.
    pub fn protect(&self, cx: &Context, address: &str, protected: bool) -> Result<()> {
        let kind = if protected { "protect" } else { "unprotect" };
        let (row, _guard) = self.lock_target(cx, address::split(address).0, kind)?;
        self.journaled(cx, kind, address, Some(&row.id), &json!({}), || {
            self.catalog.write(|tx| {
                match address::split(address) {
                    (_, Some(_)) => {
                        let (_, snapshot) = address::resolve(tx, address)?;
                        SnapshotRow::set_protected(tx, &snapshot.id, protected)?;
                    }
                    (target, None) => {
                        let target = TargetRow::by_name(tx, target)?;
                        TargetRow::set_protected(tx, &target.id, protected)?;
                    }
                }
                OpRow::finish(tx, &cx.id, None)
            })
        })
    }
}
