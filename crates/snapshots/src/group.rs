//! Making, showing and removing groups.
//!
//! Order of `create`: folder, key and store, durable; then the catalog. Of `rm`: the catalog; then the folder. A folder that the
//! catalog does not know is removed at the next start.

use std::fs;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rusqlite::Transaction;
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::catalog::{Act, GroupRow, OpRow, TargetRow, now};
use crate::context::Context;
use crate::disks::allocated;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::step;
use crate::groups::OpenGroup;
use crate::id::new_id;
use crate::name::check_name;
use crate::owner::{May, User, let_owners_through};

/// Targets that a refusal names; of more it is enough to say that there are.
const NAMES_SHOWN: usize = 5;

/// A group as callers get it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Group {
    /// Stable id, 16 hex digits.
    pub id: String,
    /// Name.
    pub name: String,
    /// Its owner's user id.
    pub owner: u32,
    /// Its owner's name, if the host knows one.
    pub owner_name: Option<String>,
    /// When it was created.
    pub created: Timestamp,
    /// Names of the machines that belong to it.
    pub targets: Vec<String>,
    /// Number of machines that were removed and that undo still keeps.
    pub removed: u64,
    /// Folder of its pages and layers.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub folder: PathBuf,
    /// Bytes that its folder takes on the disk.
    pub bytes: u64,
    /// Why its page store cannot be used, if it cannot.
    pub problem: Option<String>,
}

/// What [`Engine::rm_group`] takes away.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct GroupRemovePlan {
    /// Name of the group that goes.
    pub group: String,
    /// Bytes of pages and layers that go with it, at once.
    pub bytes: u64,
    /// Operations that can no longer be undone afterwards ("edit web").
    pub ends_undo_of: Vec<String>,
    /// True if a terminal should be asked first.
    pub needs_confirmation: bool,
}

impl Engine {
    /// All groups, the default one first.
    pub fn groups(&self) -> Result<Vec<Group>> {
        self.groups.all().iter().map(|group| self.view(group)).collect()
    }

    /// One group.
    pub fn group(&self, name: &str) -> Result<Group> {
        self.view(&*self.groups.by_name(name)?)
    }

    fn view(&self, group: &OpenGroup) -> Result<Group> {
        let all = self.catalog.read(|tx| TargetRow::of_group(tx, &group.row.id))?;
        let (there, removed): (Vec<_>, Vec<_>) = all.into_iter().partition(|row| row.removed.is_none());
        Ok(Group {
            id: group.row.id.clone(),
            name: group.row.name.clone(),
            owner: group.row.owner,
            owner_name: User::by_id(group.row.owner).name,
            created: group.row.created,
            targets: there.into_iter().map(|row| row.name).collect(),
            removed: removed.len() as u64,
            folder: group.folder.clone(),
            bytes: allocated_below(&group.folder),
            problem: group.problem().map(str::to_owned),
        })
    }

    /// Makes a group, owned by the user of this name or number, or by whoever runs us.
    pub fn create_group(&self, cx: &Context, name: &str, owner: Option<&str>) -> Result<Group> {
        check_name("group", name)?;
        let owner = owner.map_or_else(|| Ok(User::by_id(geteuid().as_raw())), User::find)?;
        self.check_owner(&owner)?;
        if self.groups.by_name(name).is_ok() {
            return Err(name_taken(name));
        }
        self.check_room(1)?;
        let row = GroupRow { id: new_id(), name: name.to_owned(), owner: owner.uid, created: now() };
        self.journaled(cx, "group create", name, None, &json!({}), || {
            let group = OpenGroup::make(&self.state().join("groups"), row.clone())?;
            step("group.made");
            let written = cx.check().and_then(|()| {
                self.catalog.write(|tx| {
                    row.insert(tx)?;
                    OpRow::finish(tx, &cx.id, None)
                })
            });
            if let Err(error) = written {
                let _ = fs::remove_dir_all(&group.folder);
                return Err(error);
            }
            step("group.written");
            self.groups.add(group);
            Ok(())
        })?;
        self.group(name)
    }

    /// Only root can act for somebody else, who has to get to what is his.
    fn check_owner(&self, owner: &User) -> Result<()> {
        let us = geteuid();
        if !us.is_root() && us.as_raw() != owner.uid {
            return Err(Error::new(
                Code::NotPermitted,
                format!("only root can make a group that belongs to {}", owner.label()),
            )
            .hint("leave --owner out: the group is yours; or ask root, whose machines run as the owner of their group"));
        }
        let Some(owner) = User::other_than_us(owner.uid) else { return Ok(()) };
        let_owners_through(self.state())?;
        let folder = self.state().join("groups");
        if owner.may(May::Pass, &folder) {
            return Ok(());
        }
        let state = self.state().display();
        Err(Error::new(Code::Precondition, format!("{} cannot get to {}", owner.label(), folder.display()))
            .because("QEMU runs as the owner of its machine's group, and its disks are there")
            .hint(format!(
                "let others through the folders above {state} (chmod o+x), or choose another state folder"
            )))
    }

    /// What [`Engine::rm_group`] would take away; fails if it would be refused.
    pub fn rm_group_plan(&self, name: &str) -> Result<GroupRemovePlan> {
        let group = self.groups.by_name(name)?;
        let id = &group.row.id;
        let (targets, ended) =
            self.catalog.read(|tx| Ok((TargetRow::of_group(tx, id)?, ended_by(tx, id)?)))?;
        check_unused(&group.row, &targets)?;
        let bytes = stored_bytes(&group);
        Ok(GroupRemovePlan {
            group: group.row.name.clone(),
            bytes,
            ends_undo_of: ended.iter().map(OpRow::title).collect(),
            needs_confirmation: bytes > 0,
        })
    }

    /// Removes a group to which nothing belongs any more, with all that is stored in it. Cannot be undone.
    pub fn rm_group(&self, cx: &Context, name: &str) -> Result<GroupRemovePlan> {
        self.rm_group_plan(name)?;
        self.journaled(cx, "group rm", name, None, &json!({}), || {
            // Nobody else goes through what is stored there.
            let _alone = self.housekeep(cx)?;
            let plan = self.rm_group_plan(name)?;
            let group = self.groups.by_name(name)?;
            cx.check()?;
            self.catalog.write(|tx| {
                check_unused(&group.row, &TargetRow::of_group(tx, &group.row.id)?)?;
                ended_by(tx, &group.row.id)?.iter().try_for_each(|op| OpRow::forget_undo(tx, &op.id))?;
                GroupRow::purge(tx, &group.row.id)?;
                OpRow::finish(tx, &cx.id, None)
            })?;
            step("group.removed");
            self.groups.remove(&group.row.id);
            self.remove_view(&group.row.id);
            if let Err(error) = fs::remove_dir_all(&group.folder) {
                tracing::warn!(%error, folder = %group.folder.display(), "the folder of a group is left to the next start");
            }
            step("group.cleared");
            Ok(plan)
        })
    }
}

fn name_taken(name: &str) -> Error {
    Error::new(Code::Refused, format!("there already is a group called {name}"))
        .hint("choose another name; `spinney group ls` lists the groups")
}

/// Operations that are undone by a copy back into this group.
fn ended_by(tx: &Transaction<'_>, group: &str) -> Result<Vec<OpRow>> {
    let mut ops = OpRow::undoable(tx)?;
    ops.retain(|op| {
        let act = op.undo.as_ref().map(|inverse| &inverse.act);
        matches!(act, Some(Act::Regroup { group: back, .. }) if back == group)
    });
    Ok(ops)
}

/// Refuses to remove what somebody needs.
fn check_unused(group: &GroupRow, targets: &[TargetRow]) -> Result<()> {
    let name = &group.name;
    if group.is_default() {
        return Err(Error::new(Code::Refused, format!("the group {name} cannot be removed"))
            .hint("it is for machines that are made without --group"));
    }
    let there: Vec<&str> =
        targets.iter().filter(|row| row.removed.is_none()).map(|row| row.name.as_str()).collect();
    if let Some(first) = there.first() {
        let more = if there.len() > NAMES_SHOWN { ", ..." } else { "" };
        let names = there.iter().take(NAMES_SHOWN).copied().collect::<Vec<_>>().join(", ");
        let belong = if there.len() == 1 { "belongs" } else { "belong" };
        return Err(Error::new(
            Code::Refused,
            format!("the group {name} is in use: {names}{more} {belong} to it"),
        )
        .hint(format!(
            "`spinney edit {first} --group OTHER` copies it to another group, `spinney rm {first}` removes it"
        )));
    }
    if let Some(first) = targets.first() {
        return Err(Error::new(Code::Refused, format!("the group {name} is in use: undo still keeps {} there", first.name))
            .hint("`spinney undo` takes its removal back; `spinney gc --now` gives it up, and all else that undo keeps"));
    }
    Ok(())
}

/// Bytes of a group's packs and layers.
fn stored_bytes(group: &OpenGroup) -> u64 {
    allocated_in(&group.folder.join("pages/packs")) + allocated_in(&group.layers_folder())
}

fn allocated_below(folder: &Path) -> u64 {
    ["pages", "pages/packs", "layers"].iter().map(|below| allocated_in(&folder.join(below))).sum()
}

/// Bytes that the files in a folder take on the disk.
fn allocated_in(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
        .map(|entry| allocated(&entry.path()))
        .sum()
}
