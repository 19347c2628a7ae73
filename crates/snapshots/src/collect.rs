//! `gc`: what nothing needs any more goes. First the catalog's tombstones that undo no longer pins, then layers that no chain
//! reaches, then pages that no map reaches.
//!
//! It runs beside everything else. A target that is being worked on keeps its tombstones this time: a goto on its way to one
//! (undo goes to an undo point that may have been removed) has overlays over its layers that the catalog does not know yet.
//! Pages of a take under way are the page store's own care, and a hold covers the time until the catalog refers to them.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use jiff::Timestamp;
use rusqlite::Transaction;
use serde_json::json;

use crate::catalog::{LayerRow, OpRow, SnapshotRow, TargetRow, now};
use crate::context::Context;
use crate::disks::{allocated, remove_file};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::types::GcReport;

/// How long undo keeps what was removed.
const UNDO_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// What goes from the catalog.
#[derive(Debug, Default)]
struct CatalogPlan {
    snapshots: Vec<String>,
    targets: Vec<String>,
    layers: Vec<LayerRow>,
    ends_undo_of: Vec<String>,
    /// Maps that stay needed.
    roots: Vec<pages::MapRoot>,
}

impl Engine {
    /// Frees what nothing needs. `now` also gives up what only the undo log holds; `dry_run` only says what would happen.
    pub fn gc(&self, cx: &Context, now: bool, dry_run: bool) -> Result<GcReport> {
        let before = undo_border(now);
        if dry_run {
            let plan = self.catalog.read(|tx| plan_catalog(tx, before, &|_| false))?;
            let pages = self.store.plan_gc(&plan.roots)?;
            return Ok(self.report(&plan, true, pages.delete.len() + pages.rewrite.len(), pages.freed_bytes));
        }
        self.journaled(cx, "gc", if now { "now" } else { "" }, None, &json!({}), || {
            let _alone = self.housekeep(cx)?;
            cx.phase("looking for what nothing needs", 0);
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
                purge(tx, &plan, before)?;
                Ok((plan, report))
            })?;
            drop(idle);
            for layer in plan.layers.iter().filter(|l| l.stamp.is_none()) {
                remove_file(&self.layer_file(layer));
            }
            let pages = self.store.plan_gc_with(|| self.live_roots())?;
            let done = self.store.run_gc(&pages, &|done, total| {
                if done == 0 {
                    cx.phase("freeing pages", total);
                }
                cx.progress.done.store(done, std::sync::atomic::Ordering::Relaxed);
                cx.check().is_ok()
            })?;
            cx.check()?;
            report.packs = done.deleted + done.rewritten;
            report.bytes += done.freed_bytes;
            self.catalog.write(|tx| OpRow::finish(tx, &cx.id, None))?;
            Ok(report)
        })
    }

    /// Maps that the catalog refers to at this moment.
    fn live_roots(&self) -> Result<Vec<pages::MapRoot>, Error> {
        self.catalog.read(|tx| Ok(roots_of(&SnapshotRow::all(tx)?)))
    }

    fn report(&self, plan: &CatalogPlan, dry_run: bool, packs: usize, page_bytes: u64) -> GcReport {
        let ours = || plan.layers.iter().filter(|l| l.stamp.is_none());
        GcReport {
            dry_run,
            packs: packs as u64,
            layers: ours().count() as u64,
            bytes: page_bytes + ours().map(|l| allocated(&self.layer_file(l))).sum::<u64>(),
            ends_undo_of: plan.ends_undo_of.clone(),
        }
    }
}

fn undo_border(all: bool) -> Timestamp {
    if all {
        return Timestamp::MAX;
    }
    now().checked_sub(UNDO_AGE).unwrap_or(Timestamp::MIN)
}

fn roots_of(snapshots: &[SnapshotRow]) -> Vec<pages::MapRoot> {
    snapshots.iter().filter_map(|s| s.memory.as_ref()).flat_map(|m| m.roots()).collect()
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
    plan.roots = roots_of(&kept);
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
    for target in targets {
        // A machine goes only after its snapshots, so that no snapshot is ever without its machine.
        if old(target.removed) && !busy(&target.id) && !kept.iter().any(|s| s.target == target.id) {
            plan.targets.push(target.id);
        } else {
            reach(TargetRow::disks(tx, &target.id)?);
        }
    }
    plan.layers = layers.iter().filter(|row| !reached.contains(row.id.as_str())).cloned().collect();
    if !plan.snapshots.is_empty() || !plan.targets.is_empty() {
        for op in OpRow::newest(tx, 1000)? {
            let named = |key: &str| op.undo.as_ref().and_then(|u| u.get(key)).map(ToString::to_string);
            let text = format!("{:?}{:?}{:?}", named("snapshots"), named("undo_point"), named("target"));
            if plan.snapshots.iter().chain(&plan.targets).any(|id| text.contains(id.as_str())) {
                plan.ends_undo_of.push(format!("{} {}", op.kind, op.subject));
            }
        }
    }
    Ok(plan)
}

fn purge(tx: &Transaction<'_>, plan: &CatalogPlan, before: Timestamp) -> Result<()> {
    plan.snapshots.iter().try_for_each(|id| SnapshotRow::purge(tx, id))?;
    plan.targets.iter().try_for_each(|id| TargetRow::purge(tx, id))?;
    // From the top down: a layer is referred to by those over it.
    plan.layers.iter().rev().try_for_each(|row| LayerRow::purge(tx, &row.id))?;
    for op in OpRow::newest(tx, 10_000)? {
        if op.ended.is_some_and(|at| at <= before) && op.undo.is_some() {
            let gone = op.undo.as_ref().map(ToString::to_string).unwrap_or_default();
            if plan.snapshots.iter().chain(&plan.targets).any(|id| gone.contains(id.as_str())) {
                OpRow::forget_undo(tx, &op.id)?;
            }
        }
    }
    Ok(())
}
