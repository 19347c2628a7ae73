//! `gc`: what nothing needs any more goes. First the catalog's tombstones that undo no longer pins, then layers that no chain
//! reaches, then pages that no map reaches.
//!
//! Undo pins what was removed for seven days, as long as that is not more than a tenth of the store: beyond it the oldest goes
//! first. A small store may keep a gibibyte, so that the only snapshot of a new machine is not gone ten minutes after its `rm`.
//!
//! It runs beside everything else. A target that is being worked on keeps its tombstones this time: a goto on its way to one
//! (undo goes to an undo point that may have been removed) has overlays over its layers that the catalog does not know yet.
//! Pages of a take under way are the page store's own care, and a hold covers the time until the catalog refers to them.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use jiff::Timestamp;
use rusqlite::Transaction;
use serde_json::json;

use crate::catalog::{Act, LayerRow, OpRow, SnapshotRow, TargetRow, last_jump, now};
use crate::context::Context;
use crate::disks::{allocated, remove_file};
use crate::du::Ledger;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::step;
use crate::types::GcReport;

/// How long undo keeps what was removed.
const UNDO_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// The part of the store, one in so many bytes, that undo may pin ...
const UNDO_PART: u64 = 10;
/// ... and what it may pin in any case.
const UNDO_FLOOR: u64 = 1 << 30;

/// What goes from the catalog.
#[derive(Debug, Default)]
struct CatalogPlan {
    snapshots: Vec<String>,
    targets: Vec<String>,
    layers: Vec<LayerRow>,
    /// What can be undone now and cannot be afterwards.
    ends_undo_of: Vec<OpRow>,
    /// Maps that stay needed.
    roots: Vec<pages::MapRoot>,
}

impl Engine {
    /// Frees what nothing needs. `now` also gives up what only the undo log holds; `dry_run` only says what would happen.
    pub fn gc(&self, cx: &Context, now: bool, dry_run: bool) -> Result<GcReport> {
        if dry_run {
            let before = self.undo_border(now)?;
            let plan = self.catalog.read(|tx| plan_catalog(tx, before, &|_| false))?;
            let pages = self.store.plan_gc(&plan.roots)?;
            return Ok(self.report(&plan, true, pages.delete.len() + pages.rewrite.len(), pages.freed_bytes));
        }
        self.journaled(cx, "gc", if now { "now" } else { "" }, None, &json!({}), || {
            let _alone = self.housekeep(cx)?;
            cx.phase("looking for what nothing needs", 0);
            let before = self.undo_border(now)?;
            // Names of layers go in one transaction with the decision that nothing reaches them; files follow. A crash
            // between the two leaves files that the next start removes.
            let ids = self.catalog.read(|tx| Ok(TargetRow::all(tx, true)?.into_iter().map(|t| t.id)))?;
            let (mut idle, mut busy) = (Vec::new(), HashSet::new());
            for id in ids {
                match self.locks.try_acquire(&id, "gc") {
                    Some(guard) => idle.push(guard),
                    None => drop(busy.insert(id)),
                }
            }
            let (plan, mut report) = self.catalog.write(|tx| {
                let plan = plan_catalog(tx, before, &|target| busy.contains(target))?;
                let report = self.report(&plan, false, 0, 0);
                purge(tx, &plan)?;
                Ok((plan, report))
            })?;
            step("gc.purged");
            drop(idle);
            for layer in plan.layers.iter().filter(|l| l.stamp.is_none()) {
                remove_file(&self.layer_file(layer));
                step("gc.layer");
            }
            let pages = self.store.plan_gc_with(|| {
                Ok::<_, Error>(pages::GcRequest { roots: self.live_roots()?, ..pages::GcRequest::default() })
            })?;
            step("gc.planned");
            let done = self.store.run_gc(&pages, &|done, total| {
                if done == 0 {
                    cx.phase("freeing pages", total);
                }
                cx.progress.done.store(done, std::sync::atomic::Ordering::Relaxed);
                cx.check().is_ok()
            })?;
            step("gc.freed");
            cx.check()?;
            report.packs = done.deleted + done.rewritten;
            report.bytes += done.freed_bytes;
            if done.no_room > 0 && report.bytes == 0 {
                return Err(Error::new(
                    Code::NoSpace,
                    "nothing could be freed: what could go shares its packs with what stays, and there is no room to write that anew",
                )
                .hint("make room on that disk by other means, or remove more snapshots and run `spinney gc --now` again"));
            }
            self.catalog.write(|tx| OpRow::finish(tx, &cx.id, None))?;
            step("gc.written");
            Ok(report)
        })
    }

    /// Maps that the catalog refers to at this moment.
    pub(crate) fn live_roots(&self) -> Result<Vec<pages::MapRoot>, Error> {
        self.catalog.read(|tx| Ok(roots_of(&SnapshotRow::all(tx)?, &TargetRow::all(tx, true)?)))
    }

    fn report(&self, plan: &CatalogPlan, dry_run: bool, packs: usize, page_bytes: u64) -> GcReport {
        let ours = || plan.layers.iter().filter(|l| l.stamp.is_none());
        GcReport {
            dry_run,
            packs: packs as u64,
            layers: ours().count() as u64,
            bytes: page_bytes + ours().map(|l| allocated(&self.layer_file(l))).sum::<u64>(),
            ends_undo_of: plan.ends_undo_of.iter().filter(|op| is_loss(op)).map(OpRow::title).collect(),
        }
    }

    /// What was removed up to here, undo gives up.
    fn undo_border(&self, all: bool) -> Result<Timestamp> {
        if all {
            return Ok(Timestamp::MAX);
        }
        let mut by_age = now().checked_sub(UNDO_AGE).unwrap_or(Timestamp::MIN);
        // Seven days of a clock that was set in between are no seven days: they begin anew.
        if self.catalog.write(last_jump)?.is_some_and(|jump| jump > by_age) {
            by_age = Timestamp::MIN;
        }
        let ledger = Ledger::read(self)?;
        let most =
            (self.store.allocated_bytes()? + ledger.layers_total()).div_euclid(UNDO_PART).max(UNDO_FLOOR);
        // The later the border, the less is pinned: the first that is good enough is searched for.
        let mut times: Vec<i64> = ledger.removals();
        times.retain(|at| *at > by_age.as_millisecond());
        let (mut low, mut high) = (0, times.len());
        while low < high {
            let middle = low.midpoint(high);
            let border = middle.checked_sub(1).and_then(|before| times.get(before)).copied();
            let border = border.unwrap_or(by_age.as_millisecond());
            if ledger.pinned_by_undo(self, border)? <= most {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        let by_size = low.checked_sub(1).and_then(|last| times.get(last)).copied();
        Ok(by_size.and_then(|at| Timestamp::from_millisecond(at).ok()).unwrap_or(by_age))
    }
}

/// True if undoing it would have brought something back; to undo the take of what is gone would not.
fn is_loss(op: &OpRow) -> bool {
    matches!(op.undo.as_ref().map(|inverse| &inverse.act), Some(Act::Restore(_) | Act::Goto(_)))
}

fn roots_of(snapshots: &[SnapshotRow], targets: &[TargetRow]) -> Vec<pages::MapRoot> {
    let of_snapshots = snapshots.iter().filter_map(|s| s.memory.as_ref()).flat_map(|m| m.roots());
    of_snapshots.chain(targets.iter().flat_map(TargetRow::roots)).collect()
}

fn plan_catalog(tx: &Transaction<'_>, before: Timestamp, busy: &dyn Fn(&str) -> bool) -> Result<CatalogPlan> {
    let border = before.as_millisecond();
    let mut plan = CatalogPlan::default();
    let snapshots = SnapshotRow::all(tx)?;
    let targets = TargetRow::all(tx, true)?;
    let old = |removed: Option<i64>| removed.is_some_and(|at| at <= border);
    let mut kept = Vec::new();
    for snapshot in snapshots {
        if old(snapshot.removed) && !busy(&snapshot.target) {
            plan.snapshots.push(snapshot.id);
        } else {
            kept.push(snapshot);
        }
    }
    let layers = LayerRow::all(tx)?;
    let below: HashMap<&str, Option<&str>> =
        layers.iter().map(|l| (l.id.as_str(), l.below.as_deref())).collect();
    let mut reached: HashSet<&str> = HashSet::new();
    let mut reach = |disks: Vec<(String, String)>| {
        for (_, top) in disks {
            let mut at = below.get_key_value(top.as_str());
            // What lies below a layer that was reached was reached with it.
            while let Some((_, next)) = at.filter(|(id, _)| reached.insert(id)) {
                at = next.and_then(|next| below.get_key_value(next));
            }
        }
    };
    for snapshot in &kept {
        reach(SnapshotRow::disks(tx, &snapshot.id)?);
    }
    // A machine goes only after its snapshots, so that no snapshot is ever without its machine.
    let goes = |target: &TargetRow| {
        old(target.removed) && !busy(&target.id) && !kept.iter().any(|s| s.target == target.id)
    };
    let (gone, staying): (Vec<TargetRow>, Vec<TargetRow>) = targets.into_iter().partition(goes);
    for target in &staying {
        reach(TargetRow::disks(tx, &target.id)?);
    }
    plan.targets = gone.into_iter().map(|target| target.id).collect();
    plan.roots = roots_of(&kept, &staying);
    plan.layers = layers.iter().filter(|row| !reached.contains(row.id.as_str())).cloned().collect();
    plan.ends_undo_of = OpRow::undoable(tx)?;
    plan.ends_undo_of.retain(|op| {
        let act = op.undo.as_ref().map(|inverse| &inverse.act);
        act.is_some_and(|act| plan.snapshots.iter().chain(&plan.targets).any(|id| act.needs(id)))
    });
    Ok(plan)
}

fn purge(tx: &Transaction<'_>, plan: &CatalogPlan) -> Result<()> {
    plan.snapshots.iter().try_for_each(|id| SnapshotRow::purge(tx, id))?;
    plan.targets.iter().try_for_each(|id| TargetRow::purge(tx, id))?;
    // From the top down: a layer is referred to by those over it.
    plan.layers.iter().rev().try_for_each(|row| LayerRow::purge(tx, &row.id))?;
    plan.ends_undo_of.iter().try_for_each(|op| OpRow::forget_undo(tx, &op.id))
}
