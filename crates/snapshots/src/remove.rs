//! Removing a snapshot, a subtree, a machine: names go, at once; data stays for as long as anything needs it.
//!
//! Nothing is merged and no layer is touched. Whatever nothing needs any more comes back through `gc`, once undo does not
//! pin it.

use rusqlite::Transaction;
use serde_json::json;

use crate::address;
use crate::catalog::{Act, AtPowerOff, OpRow, SnapshotRow, TargetRow, Things, now};
use crate::context::Context;
use crate::du::{Holder, Ledger};
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::step;
use crate::types::RemovePlan;

/// What goes, by ids.
struct Doomed {
    target: TargetRow,
    machine: bool,
    snapshots: Vec<SnapshotRow>,
}

impl Engine {
    /// What [`Engine::rm`] would take away.
    pub fn rm_plan(&self, address: &str, whole_tree: bool) -> Result<RemovePlan> {
        // Whoever asks does not wait for it, and `~1` will be another one when it is there.
        if let Some(saving) = self.catalog.read(|tx| Ok(self.saving.by_address(tx, address)))? {
            let name = format!("{}@{}", saving.target, saving.name);
            return Err(Error::new(Code::Refused, format!("{name} is still being saved")).hint(
                "wait until it is there; or give it up: `spinney op log` has the id for `spinney op cancel`",
            ));
        }
        self.show_plan(&self.doomed(address, whole_tree)?)
    }

    /// Removes a snapshot (with `whole_tree`, all below it too) or a machine with all its snapshots. Can be undone.
    pub fn rm(&self, cx: &Context, address: &str, whole_tree: bool) -> Result<RemovePlan> {
        let (name, _) = address::split(address);
        let (row, _guard) = self.lock_target(cx, name, "rm")?;
        if address::split(address).1.is_some() {
            self.settle_power_off(cx, row.clone())?;
        }
        let doomed = self.doomed(address, whole_tree)?;
        let plan = self.show_plan(&doomed)?;
        if doomed.machine {
            self.needs_no_process(&row)?;
        }
        self.journaled(cx, "rm", address, Some(&row.id), &json!({}), || {
            self.catalog.write(|tx| {
                let gone = Things {
                    snapshots: doomed.snapshots.iter().map(|s| s.id.clone()).collect(),
                    target: doomed.machine.then(|| row.id.clone()),
                    others: Vec::new(),
                };
                remove(tx, &gone)?;
                OpRow::finish(tx, &cx.id, Some(Act::Restore(gone)))
            })
        })?;
        step("rm.written");
        Ok(plan)
    }

    /// A machine is removed only when it is off.
    pub(crate) fn needs_no_process(&self, row: &TargetRow) -> Result<()> {
        let (_, running) = self.look(row)?;
        if running.is_none() {
            return Ok(());
        }
        Err(Error::new(Code::Refused, format!("{} is running", row.name))
            .hint(format!("`spinney stop {0}` or `spinney kill {0}` first", row.name)))
    }

    fn doomed(&self, address: &str, whole_tree: bool) -> Result<Doomed> {
        let (name, rest) = address::split(address);
        // `web@$NAME` and `web@~$N` with an empty variable must not mean the parent of here.
        if matches!(rest, Some("" | "~")) {
            return Err(Error::new(
                Code::Usage,
                format!("rm does not take {address:?} with nothing behind the @"),
            )
            .hint(format!("name the snapshot, or write {name}@~1 for the parent of here")));
        }
        self.catalog.read(|tx| {
            let target = TargetRow::by_name(tx, name)?;
            let all = SnapshotRow::of_target(tx, &target.id)?;
            let visible = all.iter().filter(|s| s.removed.is_none());
            let snapshots: Vec<SnapshotRow> = match rest {
                None => visible.cloned().collect(),
                Some(_) => {
                    let (_, top) = address::resolve(tx, address)?;
                    if whole_tree { subtree(&all, &top) } else { vec![top] }
                }
            };
            let machine = rest.is_none();
            if machine && target.protected {
                return Err(protected(&target.name));
            }
            if let Some(kept) = snapshots.iter().find(|s| s.protected) {
                return Err(protected(&kept.full_name()));
            }
            Ok(Doomed { target, machine, snapshots })
        })
    }

    fn show_plan(&self, doomed: &Doomed) -> Result<RemovePlan> {
        let ledger = Ledger::read(self, &*self.group_of(&doomed.target)?)?;
        let goes = |holder: &Holder| match holder {
            Holder::Snapshot(id) => doomed.snapshots.iter().any(|s| s.id == *id),
            Holder::Here(target) => doomed.machine && *target == doomed.target.id,
        };
        let (reclaimable_bytes, kept_bytes, kept_by) = ledger.without(&goes)?;
        Ok(RemovePlan {
            snapshots: doomed.snapshots.iter().map(SnapshotRow::full_name).collect(),
            machine: doomed.machine.then(|| doomed.target.name.clone()),
            reclaimable_bytes,
            kept_bytes,
            kept_by,
            needs_confirmation: doomed.machine || doomed.snapshots.len() > 1,
        })
    }
}

/// Takes names away. What is left of the things is a tombstone.
pub(crate) fn remove(tx: &Transaction<'_>, things: &Things) -> Result<()> {
    // One time for all: undo keeps or gives up all of it.
    let at = Some(now());
    things.snapshots.iter().try_for_each(|id| SnapshotRow::set_removed(tx, id, at))?;
    things.targets().try_for_each(|id| {
        AtPowerOff::end(tx, id)?;
        TargetRow::set_removed(tx, id, at)
    })
}

/// A snapshot and everything below it that has not been removed.
fn subtree(all: &[SnapshotRow], top: &SnapshotRow) -> Vec<SnapshotRow> {
    let mut ids = vec![top.id.as_str()];
    let mut next = 0;
    while let Some(id) = ids.get(next).copied() {
        ids.extend(all.iter().filter(|s| s.parent.as_deref() == Some(id)).map(|s| s.id.as_str()));
        next += 1;
        if next > all.len() {
            break;
        }
    }
    all.iter().filter(|s| s.removed.is_none() && ids.contains(&s.id.as_str())).cloned().collect()
}

pub(crate) fn protected(name: &str) -> Error {
    Error::new(Code::Refused, format!("{name} is protected"))
        .hint(format!("`spinney unprotect {name}` lets it be removed"))
}
