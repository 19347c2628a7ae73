//! `gc`: what nothing needs any more goes, group by group: what one stores says nothing about another. First the catalog's tombstones that undo no longer pins, then layers that no chain
//! reaches, then pages that no map reaches.
//!
//! Undo pins what was removed for seven days, as long as that is not more than a tenth of the group's store: beyond it the oldest goes
//! first. A small store may keep a gibibyte, so that the only snapshot of a new machine is not gone ten minutes after its `rm`.
//!
//! It runs beside everything else. A target that is being worked on keeps its tombstones this time: a goto on its way to one
//! (undo goes to an undo point that may have been removed) has overlays over its layers that the catalog does not know yet.
//! Pages of a take under way are the page store's own care, and a hold covers the time until the catalog refers to them.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use jiff::Timestamp;
use pages::Store;
use rusqlite::Transaction;
use serde_json::json;

use crate::catalog::{Act, LayerRow, OpRow, SnapshotRow, TargetRow, last_jump, now};
use crate::context::Context;
use crate::disks::{allocated, remove_file};
use crate::du::Ledger;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::step;
use crate::groups::OpenGroup;
use crate::pins::PinnedLayers;
use crate::settle::settled_roots;
use crate::types::{GcReport, GroupGc};

/// Packs that are left alone for so long are compressed ...
pub(crate) const COLD: Duration = Duration::from_secs(600);
/// ... at this level of zstd (`docs/decisions/0017-compression.md`).
pub(crate) const LEVEL: i32 = 3;

/// How long undo keeps what was removed.
const UNDO_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// The part of the store, one in so many bytes, that undo may pin ...
const UNDO_PART: u64 = 10;
/// ... and what it may pin in any case.
const UNDO_FLOOR: u64 = 1 << 30;

/// What one group comes to.
struct Part {
    group: GroupGc,
    ends_undo_of: Vec<String>,
}

impl GcReport {
    fn add(&mut self, part: Part) {
        self.packs += part.group.packs;
        self.layers += part.group.layers;
        self.bytes += part.group.bytes;
        self.ends_undo_of.extend(part.ends_undo_of);
        self.groups.push(part.group);
    }
}

fn left_alone(group: &OpenGroup, error: &Error) -> Part {
    let problem = error.causes().into_iter().next().unwrap_or_else(|| error.to_string());
    let group = GroupGc { group: group.row.name.clone(), problem: Some(problem), ..GroupGc::default() };
    Part { group, ends_undo_of: Vec::new() }
}

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
    /// Layers whose retired maps nobody reads any more.
    unused: Vec<String>,
}

impl Engine {
    /// Frees what nothing needs, group by group. `now` also gives up what only the undo log holds; `dry_run` only says what would
    /// happen.
    pub fn gc(&self, cx: &Context, now: bool, dry_run: bool) -> Result<GcReport> {
        let mut report = GcReport { dry_run, ..GcReport::default() };
        if dry_run {
            for group in self.groups.all() {
                let planned = group.store().and_then(|store| self.plan_group(now, &group, store));
                report.add(planned.unwrap_or_else(|error| left_alone(&group, &error)));
            }
            return Ok(report);
        }
        self.journaled(cx, "gc", if now { "now" } else { "" }, None, &json!({}), || {
            let _alone = self.housekeep(cx)?;
            let (mut no_room, mut failed) = (0, None);
            for group in self.groups.all() {
                let store = match group.store() {
                    Ok(store) => store,
                    Err(error) => {
                        report.add(left_alone(&group, &error));
                        continue;
                    }
                };
                match self.gc_group(cx, now, &group, store, &mut no_room) {
                    Ok(part) => report.add(part),
                    Err(error) if error.code() == Code::Interrupted => return Err(error),
                    // Others are not to wait for what this group lacks.
                    Err(error) => {
                        report.add(left_alone(&group, &error));
                        failed.get_or_insert(error);
                    }
                }
            }
            if let Some(error) = failed {
                return Err(error);
            }
            if no_room > 0 && report.bytes == 0 {
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

    /// What would happen in one group.
    fn plan_group(&self, now: bool, group: &OpenGroup, store: &Store) -> Result<Part> {
        let before = self.undo_border(group, now)?;
        let plan = self.catalog.read(|tx| plan_catalog(tx, &group.row.id, before, &self.pins, &|_| false))?;
        let request = self.request(&plan, &group.row.id, store, now, plan.roots.clone())?;
        let pages = store.estimate_gc(&request)?;
        let mut part = self.report(group, &plan, pages.delete.len() + pages.rewrite.len(), pages.freed_bytes);
        // What is needed of layers that go has to be written anew.
        part.group.bytes = part.group.bytes.saturating_sub(pages.moved_bytes);
        part.group.compressed = pages.compress.len() as u64;
        Ok(part)
    }

    /// What the page store is asked for.
    fn request(
        &self,
        plan: &CatalogPlan,
        group: &str,
        store: &Store,
        now: bool,
        roots: Vec<pages::MapRoot>,
    ) -> Result<pages::GcRequest> {
        // Images of layers that go; and those that no row speaks of any more, as after a user's image was accepted in another state.
        let going: HashSet<&str> = plan.layers.iter().map(|layer| layer.id.as_str()).collect();
        let mut staying = self.catalog.read(|tx| LayerRow::of_group(tx, group))?;
        staying.retain(|layer| !going.contains(layer.id.as_str()));
        let staying: HashSet<String> = staying.iter().map(LayerRow::image_label).collect();
        let mut leaving: Vec<String> = store.images().into_iter().map(|image| image.label).collect();
        leaving.retain(|label| !staying.contains(label));
        let compress = now.then_some(pages::Cold { age: Duration::ZERO, level: LEVEL });
        Ok(pages::GcRequest { roots, leaving, thorough: now, compress })
    }

    /// What happens in one group.
    fn gc_group(
        &self,
        cx: &Context,
        now: bool,
        group: &OpenGroup,
        store: &Store,
        no_room: &mut usize,
    ) -> Result<Part> {
        let id = &group.row.id;
        cx.phase("looking for what nothing needs", 0);
        let before = self.undo_border(group, now)?;
        let ids = self.catalog.read(|tx| Ok(TargetRow::of_group(tx, id)?.into_iter().map(|t| t.id)))?;
        let (mut idle, mut busy) = (Vec::new(), HashSet::new());
        for id in ids {
            match self.locks.try_acquire(&id, "gc") {
                Some(guard) => idle.push(guard),
                None => drop(busy.insert(id)),
            }
        }
        let (plan, mut part) = self.catalog.write(|tx| {
            let plan = plan_catalog(tx, id, before, &self.pins, &|target| busy.contains(target))?;
            let part = self.report(group, &plan, 0, 0);
            purge(tx, &plan)?;
            Ok((plan, part))
        })?;
        step("gc.purged");
        drop(idle);
        let request = self.request(&plan, id, store, now, Vec::new())?;
        let pages = store
            .plan_gc_with(|| Ok::<_, Error>(pages::GcRequest { roots: self.live_roots(id)?, ..request }))?;
        step("gc.planned");
        let done = store.run_gc(&pages, &|done, total| {
            if done == 0 {
                cx.phase("freeing pages", total);
            }
            cx.progress.done.store(done, std::sync::atomic::Ordering::Relaxed);
            cx.check().is_ok()
        })?;
        step("gc.freed");
        cx.check()?;
        let layers = self.drop_layers(store, &plan.layers)?;
        let ours = |layer: &&LayerRow| !layer.is_users();
        part.group.layers = layers.iter().map(|(layer, _)| layer).filter(ours).count() as u64;
        let stays = (plan.layers.iter().filter(ours).count() as u64).saturating_sub(part.group.layers);
        if stays > 0 {
            cx.warn(format!(
                "{stays} disk layers of the group {} stay: pages that are needed lie on them and could not be moved. They may be damaged \
                 (`spinney fsck` says so), or a take that is under way relies on them",
                group.row.name
            ));
        }
        part.group.bytes = layers.iter().map(|(_, bytes)| bytes).sum::<u64>() + done.freed_bytes;
        part.group.packs = done.deleted + done.rewritten;
        part.group.compressed = done.compressed;
        part.group.compressed_away = done.compressed_away;
        *no_room += usize::try_from(done.no_room).unwrap_or(usize::MAX);
        Ok(part)
    }

    /// Layers that nothing lies over and no page is left on go: their rows in one transaction, then the files. A crash between the two
    /// leaves files that the next start removes. Returns those that went, with the bytes that they took.
    fn drop_layers(&self, store: &Store, layers: &[LayerRow]) -> Result<Vec<(LayerRow, u64)>> {
        let images: HashSet<String> = store.images().into_iter().map(|image| image.label).collect();
        // From the top down: a layer is referred to by those over it, and stays with them.
        let mut stays: HashSet<&str> = HashSet::new();
        let mut going = Vec::new();
        for layer in layers.iter().rev() {
            // A user's image is his: nothing of ours goes with its row.
            if !layer.is_users() && images.contains(&layer.id) || stays.contains(layer.id.as_str()) {
                stays.extend(layer.below.as_deref());
            } else {
                going.push(layer);
            }
        }
        self.catalog.write(|tx| going.iter().try_for_each(|layer| LayerRow::purge(tx, &layer.id)))?;
        let mut gone = Vec::new();
        for layer in going {
            let mut bytes = 0;
            if !layer.is_users() {
                let file = self.layer_file(layer);
                bytes = allocated(&file);
                remove_file(&file);
                step("gc.layer");
            }
            gone.push((layer.clone(), bytes));
        }
        Ok(gone)
    }

    /// Maps of a group that the catalog refers to at this moment.
    pub(crate) fn live_roots(&self, group: &str) -> Result<Vec<pages::MapRoot>, Error> {
        self.catalog.read(|tx| {
            let mut roots = roots_of(&SnapshotRow::of_group(tx, group)?, &TargetRow::of_group(tx, group)?);
            roots.extend(settled_roots(tx, group)?);
            Ok(roots)
        })
    }

    fn report(&self, group: &OpenGroup, plan: &CatalogPlan, packs: usize, page_bytes: u64) -> Part {
        let ours = || plan.layers.iter().filter(|l| l.stamp.is_none());
        let group = GroupGc {
            group: group.row.name.clone(),
            packs: packs as u64,
            layers: ours().count() as u64,
            bytes: page_bytes + ours().map(|l| allocated(&self.layer_file(l))).sum::<u64>(),
            ..GroupGc::default()
        };
        let ends_undo_of = plan.ends_undo_of.iter().filter(|op| is_loss(op)).map(OpRow::title).collect();
        Part { group, ends_undo_of }
    }

    /// What a group had removed up to here, undo gives up.
    fn undo_border(&self, group: &OpenGroup, all: bool) -> Result<Timestamp> {
        if all {
            return Ok(Timestamp::MAX);
        }
        let mut by_age = now().checked_sub(UNDO_AGE).unwrap_or(Timestamp::MIN);
        // Seven days of a clock that was set in between are no seven days: they begin anew.
        if self.catalog.write(last_jump)?.is_some_and(|jump| jump > by_age) {
            by_age = Timestamp::MIN;
        }
        let ledger = Ledger::read(self, group)?;
        let stored = group.store()?.allocated()?.total() + ledger.layers_total();
        let most = stored.div_euclid(UNDO_PART).max(UNDO_FLOOR);
        // The later the border, the less is pinned: the first that is good enough is searched for.
        let mut times: Vec<i64> = ledger.removals();
        times.retain(|at| *at > by_age.as_millisecond());
        let (mut low, mut high) = (0, times.len());
        while low < high {
            let middle = low.midpoint(high);
            let border = middle.checked_sub(1).and_then(|before| times.get(before)).copied();
            let border = border.unwrap_or(by_age.as_millisecond());
            if ledger.pinned_by_undo(border)? <= most {
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

/// Adds the layers of these disks to those that were reached. `below` says what a layer lies over.
fn reach<'a>(
    below: &HashMap<&'a str, Option<&'a str>>,
    reached: &mut HashSet<&'a str>,
    disks: Vec<(String, String)>,
) {
    for (_, top) in disks {
        let mut at = below.get_key_value(top.as_str());
        // What lies below a layer that was reached was reached with it.
        while let Some((_, next)) = at.filter(|(id, _)| reached.insert(id)) {
            at = next.and_then(|next| below.get_key_value(next));
        }
    }
}

fn plan_catalog(
    tx: &Transaction<'_>,
    group: &str,
    before: Timestamp,
    pins: &PinnedLayers,
    busy: &dyn Fn(&str) -> bool,
) -> Result<CatalogPlan> {
    let border = before.as_millisecond();
    let mut plan = CatalogPlan::default();
    let snapshots = SnapshotRow::of_group(tx, group)?;
    let targets = TargetRow::of_group(tx, group)?;
    let old = |removed: Option<i64>| removed.is_some_and(|at| at <= border);
    let mut kept = Vec::new();
    for snapshot in snapshots {
        if old(snapshot.removed) && !busy(&snapshot.target) {
            plan.snapshots.push(snapshot.id);
        } else {
            kept.push(snapshot);
        }
    }
    let layers = LayerRow::of_group(tx, group)?;
    let below: HashMap<&str, Option<&str>> =
        layers.iter().map(|l| (l.id.as_str(), l.below.as_deref())).collect();
    // What a process may have open.
    let mut in_use: HashSet<&str> = HashSet::new();
    reach(&below, &mut in_use, pins.all().into_iter().map(|layer| (String::new(), layer)).collect());
    for target in targets.iter().filter(|target| target.process.is_some() || busy(&target.id)) {
        reach(&below, &mut in_use, TargetRow::disks(tx, &target.id)?);
    }
    let mut reached = in_use.clone();
    for snapshot in &kept {
        reach(&below, &mut reached, SnapshotRow::disks(tx, &snapshot.id)?);
    }
    // A machine goes only after its snapshots, so that no snapshot is ever without its machine.
    let goes = |target: &TargetRow| {
        old(target.removed) && !busy(&target.id) && !kept.iter().any(|s| s.target == target.id)
    };
    let (gone, staying): (Vec<TargetRow>, Vec<TargetRow>) = targets.into_iter().partition(goes);
    for target in &staying {
        reach(&below, &mut reached, TargetRow::disks(tx, &target.id)?);
    }
    plan.targets = gone.into_iter().map(|target| target.id).collect();
    plan.roots = roots_of(&kept, &staying);
    plan.roots
        .extend(layers.iter().filter(|row| reached.contains(row.id.as_str())).filter_map(|row| row.settled));
    let (retired, unused): (Vec<&LayerRow>, _) =
        layers.iter().filter(|row| !row.retired.is_empty()).partition(|row| in_use.contains(row.id.as_str()));
    plan.roots.extend(retired.iter().flat_map(|row| &row.retired));
    plan.unused = unused.into_iter().map(|row| row.id.clone()).collect();
    plan.layers = layers.iter().filter(|row| !reached.contains(row.id.as_str())).cloned().collect();
    plan.ends_undo_of = OpRow::needing(tx, plan.snapshots.iter().chain(&plan.targets))?;
    Ok(plan)
}

fn purge(tx: &Transaction<'_>, plan: &CatalogPlan) -> Result<()> {
    plan.snapshots.iter().try_for_each(|id| SnapshotRow::purge(tx, id))?;
    plan.targets.iter().try_for_each(|id| TargetRow::purge(tx, id))?;
    // Their rows stay until their files go: the pages of their maps are not to stay with them.
    plan.unused.iter().try_for_each(|layer| LayerRow::forget_retired(tx, layer))?;
    plan.layers.iter().try_for_each(|layer| LayerRow::set_unsettled(tx, &layer.id))?;
    plan.ends_undo_of.iter().try_for_each(|op| OpRow::forget_undo(tx, &op.id))
}

#[cfg(test)]
mod tests {
    use pages::{MapRoot, PageHash};

    use super::*;
    use crate::catalog::{Catalog, DEFAULT_GROUP, ProcessRow};
    use crate::config::MachineConfig;
    use crate::new_disks::new_layer;
    use crate::types::Power;

    #[test]
    fn what_a_process_may_have_open_stays_though_its_layer_settles_anew() {
        let folder = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&folder.path().join("catalog.db")).unwrap();
        let group = catalog.groups("0", 0).unwrap().remove(0).id;
        let machine =
            TargetRow::new("m".into(), "m", (&group, DEFAULT_GROUP), "pc", MachineConfig::bare(64 << 20));
        let lower = new_layer(&group, 1 << 20);
        let upper = LayerRow { below: Some(lower.id.clone()), depth: 2, ..new_layer(&group, 1 << 20) };
        let map = |number| MapRoot { node: PageHash([number; 32]), pages: 256 };
        let process = ProcessRow {
            id: qemu::process::ProcessId { pid: 1, start_ticks: 1 },
            run: "run".into(),
            accel: "tcg".into(),
            version: "10".into(),
            boot: "boot".into(),
            ram: None,
        };
        catalog
            .write(|tx| {
                machine.insert(tx)?;
                lower.insert(tx)?;
                upper.insert(tx)?;
                TargetRow::set_disk(tx, "m", "disk0", &upper.id)?;
                TargetRow::set_process(tx, "m", Power::Running, Some(&process))?;
                for number in [1, 2] {
                    LayerRow::set_settled(tx, &lower.id, &map(number))?;
                    LayerRow::unsettle(tx, &group)?;
                }
                LayerRow::set_settled(tx, &lower.id, &map(3))
            })
            .unwrap();
        let collected = || {
            let pins = PinnedLayers::default();
            catalog
                .write(|tx| {
                    let plan = plan_catalog(tx, &group, Timestamp::now(), &pins, &|_| false)?;
                    purge(tx, &plan)?;
                    Ok((plan.roots, settled_roots(tx, &group)?))
                })
                .unwrap()
        };
        let (planned, live) = collected();
        assert!([1, 2, 3].iter().all(|number| planned.contains(&map(*number))), "{planned:?}");
        assert_eq!(live, [map(1), map(2), map(3)]);
        catalog.write(|tx| TargetRow::set_process(tx, "m", Power::Off, None)).unwrap();
        assert_eq!(collected(), (vec![map(3)], vec![map(3)]));
    }

    #[test]
    fn with_a_pinned_layer_stays_what_it_lies_over() {
        let folder = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(&folder.path().join("catalog.db")).unwrap();
        let group = catalog.groups("0", 0).unwrap().remove(0).id;
        let lower = new_layer(&group, 1 << 20);
        let upper = LayerRow { below: Some(lower.id.clone()), depth: 2, ..new_layer(&group, 1 << 20) };
        catalog.write(|tx| lower.insert(tx).and_then(|()| upper.insert(tx))).unwrap();
        let pins = PinnedLayers::default();
        let going = || {
            let plan = catalog.read(|tx| plan_catalog(tx, &group, Timestamp::now(), &pins, &|_| false));
            plan.unwrap().layers.len()
        };
        let pinned = pins.pin_disks(&[("disk0".into(), upper.id.clone())]);
        assert_eq!(going(), 0);
        drop(pinned);
        assert_eq!(going(), 2);
    }
}
