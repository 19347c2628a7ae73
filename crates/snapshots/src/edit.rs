//! Names, notes, `keep`, expiry and protection: what of a snapshot or machine can be changed.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::json;

use crate::address;
use crate::catalog::{Act, Expiry, LayerRow, OpRow, SnapshotRow, TargetRow};
use crate::context::Context;
use crate::create::name_taken;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::expire::{check_expiry, kept_does_not_expire};
use crate::fault::step;
use crate::name::{check_name, check_note, check_snapshot_name};
use crate::take::snapshot_name_taken;
use crate::types::{Edit, Edited};

/// What is asked for of an expiry.
enum Expire {
    Never,
    After(Duration),
}

impl Expire {
    fn read(seconds: u64) -> Result<Self> {
        if seconds == 0 { Ok(Self::Never) } else { check_expiry(seconds).map(Self::After) }
    }
}

fn is_kept(name: &str) -> Error {
    Error::new(Code::Refused, format!("{name} is kept: it does not expire"))
        .hint(format!("`spinney edit {name} --keep=false` with --expire has it expire"))
}

fn is_undo_point(name: &str) -> Error {
    Error::new(Code::Refused, format!("{name} is an undo point: those go by themselves"))
        .hint("with a name of its own (--name) it is a snapshot like any other, and can expire")
}

impl Engine {
    /// Renames or annotates a machine or a snapshot, or copies a machine to another group. A name, note or the like that is so already leaves
    /// nothing in the log.
    pub fn edit(&self, cx: &Context, address: &str, edit: Edit) -> Result<Edited> {
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
                let Edit { name, note, keep, expire_seconds, accept_disks, group: _ } = &edit;
                let text = name.is_some() || note.is_some();
                if text || keep.is_some() || expire_seconds.is_some() || *accept_disks {
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

    fn edit_snapshot(&self, cx: &Context, address: &str, edit: Edit) -> Result<Edited> {
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
        let expire = edit.expire_seconds.map(Expire::read).transpose()?;
        if edit.keep == Some(true) && matches!(expire, Some(Expire::After(_))) {
            return Err(kept_does_not_expire());
        }
        let (row, _guard) = self.lock_target(cx, address::split(address).0, "edit")?;
        // Nobody else changes it while we have the machine.
        let (old, had) = self.catalog.read(|tx| {
            let (_, old) = address::resolve(tx, address)?;
            let had = SnapshotRow::expiry(tx, &old.id)?;
            Ok((old, had))
        })?;
        let same = edit.name.as_ref().is_none_or(|name| *name == old.name)
            && edit.note.as_ref().is_none_or(|note| *note == old.note)
            && edit.keep.is_none_or(|keep| keep == old.keep)
            && match expire {
                None => true,
                Some(Expire::Never) => had.is_none(),
                Some(Expire::After(_)) => false,
            };
        if same {
            return Ok(Edited { address: old.full_name(), changed: false });
        }
        self.journaled(cx, "edit", &old.full_name(), Some(&row.id), &json!({}), || {
            self.catalog.write(|tx| {
                let keep = edit.keep.unwrap_or(old.keep);
                let ends = had.is_some() && keep;
                let name = edit.name.clone().unwrap_or_else(|| old.name.clone());
                let note = edit.note.clone().unwrap_or_else(|| old.note.clone());
                // Of what is given and is so already, nothing is taken back.
                let undo = Act::WriteSnapshot {
                    id: old.id.clone(),
                    name: (name != old.name).then(|| old.name.clone()),
                    note: (note != old.note).then(|| old.note.clone()),
                    keep: (keep != old.keep).then_some(old.keep),
                    expiry: (expire.is_some() || ends).then_some(had.into()),
                };
                if name != old.name && SnapshotRow::name_taken(tx, &old.target, &name)? {
                    return Err(snapshot_name_taken(&old.target_name, &name).hint(format!(
                        "choose another name; `spinney tree {}` shows those that are taken",
                        old.target_name
                    )));
                }
                if name != old.name {
                    // Who gives it a name wants to keep it: no later goto takes it away.
                    SnapshotRow::promote(tx, &old.id)?;
                }
                SnapshotRow::set_text(tx, &old.id, &name, &note, keep)?;
                let full_name = format!("{}@{name}", old.target_name);
                match &expire {
                    Some(Expire::After(_)) if keep => return Err(is_kept(&full_name)),
                    Some(Expire::After(_)) if old.undo_point && name == old.name => {
                        return Err(is_undo_point(&full_name));
                    }
                    Some(Expire::After(time)) => {
                        SnapshotRow::set_expiry(tx, &old.id, Some(&Expiry::begin(tx, *time)?))?;
                    }
                    None if !ends => {}
                    None | Some(Expire::Never) => SnapshotRow::set_expiry(tx, &old.id, None)?,
                }
                OpRow::finish(tx, &cx.id, Some(undo))?;
                Ok((
                    full_name,
                    ends && expire.is_none(),
                    old.protected && matches!(expire, Some(Expire::After(_))),
                ))
            })
        })
        .map(|(name, ends, stays)| {
            if ends {
                cx.warn(format!("{name} is kept from now on, and does not expire any more"));
            }
            if stays {
                cx.warn(format!("{name} is protected: it expires only after `spinney unprotect {name}`"));
            }
            Edited { address: name, changed: true }
        })
        .inspect(|_| step("edit.written"))
    }

    fn edit_machine(&self, cx: &Context, target: &str, edit: Edit) -> Result<Edited> {
        if edit.note.is_some() || edit.keep.is_some() || edit.expire_seconds.is_some() {
            return Err(Error::new(
                Code::Usage,
                format!("{target} is a machine: notes, --keep and --expire are for snapshots"),
            )
            .hint(format!("name the snapshot: {target}@NAME; `spinney tree {target}` shows them")));
        }
        if let Some(name) = &edit.name {
            check_name("machine", name)?;
        }
        let (row, _guard) = self.lock_target(cx, target, "edit")?;
        let accepted = edit.accept_disks && self.accept_disks(cx, &row)?;
        let Some(name) = edit.name.filter(|name| *name != row.name) else {
            return Ok(Edited { address: row.name, changed: accepted });
        };
        self.journaled(cx, "edit", target, Some(&row.id), &json!({}), || {
            self.catalog.write(|tx| {
                let old = TargetRow::by_name(tx, target)?;
                if name != old.name && TargetRow::name_taken(tx, &name)? {
                    return Err(name_taken(&name)
                        .hint("choose another name; `spinney ls` lists those that are taken"));
                }
                TargetRow::set_name(tx, &old.id, &name)?;
                let undo = Act::NameTarget { id: old.id, name: old.name };
                OpRow::finish(tx, &cx.id, Some(undo))
            })
        })?;
        step("edit.written");
        Ok(Edited { address: name, changed: true })
    }

    /// The images of the user's that the machine's disks and snapshots lie over are right as they are now. False if none was changed.
    fn accept_disks(&self, cx: &Context, row: &TargetRow) -> Result<bool> {
        let bases = self.catalog.read(|tx| {
            let mut disks = TargetRow::disks(tx, &row.id)?;
            for snapshot in SnapshotRow::of_target(tx, &row.id)? {
                disks.extend(SnapshotRow::disks(tx, &snapshot.id)?);
            }
            Self::bases(tx, &disks)
        })?;
        let mut changed = Vec::new();
        for base in bases {
            cx.check()?;
            if let Some(stamp) = self.changed_base(&base)? {
                changed.push((base, stamp));
            }
        }
        if changed.is_empty() {
            return Ok(false);
        }
        // An entry of its own: this half of an edit cannot be undone.
        let entry = Context::new();
        self.journaled(&entry, "accept", &row.name, Some(&row.id), &json!({}), || {
            cx.check()?;
            self.catalog.write(|tx| {
                changed.iter().try_for_each(|(layer, stamp)| LayerRow::set_stamp(tx, &layer.id, stamp))?;
                OpRow::finish(tx, &entry.id, None)
            })
        })?;
        let images: BTreeSet<&str> = changed.iter().map(|(layer, _)| layer.file.as_str()).collect();
        for image in images {
            cx.warn(format!("{image} is taken as it is now; undo does not bring back how it was"));
        }
        Ok(true)
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
