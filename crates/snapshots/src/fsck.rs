//! `fsck`: everything that is stored, looked at, and what is wrong with it by name.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;

use crate::catalog::{LayerRow, Memory, SnapshotRow, TargetRow};
use crate::context::Context;
use crate::disks::stamp;
use crate::engine::Engine;
use crate::error::Result;
use crate::fault::step;
use crate::memory::read_state;
use crate::types::{Damage, FsckReport};

impl Engine {
    /// Reads every pack, map, device state and layer, and compares them with their names and with the catalog. With `repair`, what
    /// can be mended is mended first, and snapshots that cannot are marked. Without, nothing is changed.
    pub fn fsck(&self, cx: &Context, repair: bool) -> Result<FsckReport> {
        let _alone = self.housekeep(cx)?;
        let mended = if repair { self.mend_pages(cx)? } else { Vec::new() };
        let report = FsckReport { mended, ..self.check_all(cx)? };
        if repair {
            self.mark_damaged(&report)?;
        }
        Ok(report)
    }

    /// Has the page store mend its packs; says what it did.
    fn mend_pages(&self, cx: &Context) -> Result<Vec<String>> {
        cx.phase("mending packs", 0);
        let roots = self.live_roots()?;
        let done = self.store.repair(&roots, &|| cx.check().is_ok())?;
        step("fsck.mended");
        cx.check()?;
        let mut said: Vec<String> = done
            .aside
            .iter()
            .map(|(pack, saved)| {
                let aside = pack.replace(".pack", ".bad");
                format!(
                    "pack {pack}: {} pages and {} map nodes saved, put aside as {aside}",
                    saved.pages, saved.nodes
                )
            })
            .collect();
        if done.elsewhere > 0 {
            said.push(format!("{} pages or map nodes found whole in another pack", done.elsewhere));
        }
        if done.lost > 0 {
            said.push(format!(
                "{} damaged pages or map nodes forgotten: a take that meets them again stores them again",
                done.lost
            ));
        }
        Ok(said)
    }

    /// Writes down which snapshots cannot be relied on.
    fn mark_damaged(&self, report: &FsckReport) -> Result<()> {
        self.catalog.write(|tx| {
            let mut damaged = Vec::new();
            for snapshot in SnapshotRow::all(tx)? {
                let label = label(&snapshot);
                let found = report.damage.iter().find(|damage| damage.snapshots.contains(&label));
                damaged.extend(
                    found.map(|damage| (snapshot.id, format!("{}: {}", damage.what, damage.problem))),
                );
            }
            SnapshotRow::set_damaged(tx, &damaged)
        })
    }

    fn check_all(&self, cx: &Context) -> Result<FsckReport> {
        let (snapshots, targets, layers, users, written) = self.catalog.read(|tx| {
            let snapshots = SnapshotRow::all(tx)?;
            let layers = LayerRow::all(tx)?;
            let mut users: HashMap<String, Vec<String>> = HashMap::new();
            let mut note = |disks: Vec<(String, String)>, name: &str| {
                for (_, top) in disks {
                    for layer in LayerRow::chain(tx, &top).unwrap_or_default() {
                        users.entry(layer.id).or_default().push(name.to_owned());
                    }
                }
            };
            for snapshot in &snapshots {
                note(SnapshotRow::disks(tx, &snapshot.id)?, &label(snapshot));
            }
            let mut written = HashSet::new();
            let targets = TargetRow::all(tx, true)?;
            for target in &targets {
                if target.process.is_some() {
                    written.extend(TargetRow::disks(tx, &target.id)?.into_iter().map(|(_, layer)| layer));
                }
                note(TargetRow::disks(tx, &target.id)?, &here(target));
            }
            Ok((snapshots, targets, layers, users, written))
        })?;
        let mut report = FsckReport::default();
        for problem in self.catalog.check()? {
            report.damage.push(Damage { what: "the catalog".into(), problem, snapshots: Vec::new() });
        }
        let of_snapshots = snapshots.iter().filter_map(|s| Some((label(s), s.memory.as_ref()?)));
        let of_targets = targets.iter().filter_map(|t| Some((here(t), &t.suspended.as_ref()?.memory)));
        let memories: Vec<_> = of_snapshots.chain(of_targets).collect();
        report.snapshots = snapshots.len() as u64;
        self.check_pages(cx, &memories, &mut report)?;
        cx.phase("checking disk layers", users.len() as u64);
        // From below: what lies over a layer that is damaged cannot be right, and has said so if it cannot be read.
        let (mut bad, mut by_depth) = (HashSet::new(), Vec::from_iter(&layers));
        by_depth.sort_by_key(|layer| layer.depth);
        for layer in by_depth {
            // A layer that nothing needs is the collector's business.
            let Some(needed_by) = users.get(&layer.id) else { continue };
            if layer.below.as_ref().is_some_and(|below| bad.contains(below)) {
                bad.insert(layer.id.clone());
                continue;
            }
            // One that a guest writes to at this moment is never seen whole.
            if written.contains(&layer.id) {
                continue;
            }
            cx.check()?;
            report.layers += 1;
            if let Some(problem) = self.layer_problem(layer)? {
                bad.insert(layer.id.clone());
                let what = self.layer_file(layer).display().to_string();
                // An image may lie under several machines.
                match report.damage.iter_mut().find(|known| known.what == what && known.problem == problem) {
                    Some(known) => known.snapshots.extend(needed_by.iter().cloned()),
                    None => report.damage.push(Damage { what, problem, snapshots: needed_by.clone() }),
                }
            }
            cx.advance(1);
        }
        Ok(report)
    }

    /// Looks at memories, each with the name of whom it belongs to.
    fn check_pages(
        &self,
        cx: &Context,
        memories: &[(String, &Memory)],
        report: &mut FsckReport,
    ) -> Result<()> {
        let of_memory = |(name, memory): &(String, &Memory)| {
            memory.roots().map(|root| (root, name.clone())).collect::<Vec<_>>()
        };
        let roots: Vec<_> = memories.iter().flat_map(of_memory).collect();
        cx.phase("reading pages", 0);
        let pages = self.store.fsck(&roots, &|done, total| {
            cx.progress.total.store(total, Ordering::Relaxed);
            cx.progress.done.store(done, Ordering::Relaxed);
            cx.check().is_ok()
        })?;
        cx.check()?;
        report.packs = pages.packs;
        report.mendable = pages.damaged_packs > 0;
        report.pages = pages.pages;
        let found = pages.damage.into_iter();
        report.damage.extend(found.map(|d| Damage { what: d.what, problem: d.problem, snapshots: d.labels }));
        for (name, memory) in memories {
            if let Err(error) = read_state(self.store.as_ref(), memory) {
                let causes = error.causes();
                report.damage.push(Damage {
                    what: format!("the device state of {name}"),
                    problem: causes.last().cloned().unwrap_or_else(|| error.to_string()),
                    snapshots: vec![name.clone()],
                });
            }
        }
        Ok(())
    }

    fn layer_problem(&self, layer: &LayerRow) -> Result<Option<String>> {
        let path = self.layer_file(layer);
        let found = match stamp(&path) {
            Ok(found) => found,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Some("it is gone: put it back where it was".into()));
            }
            Err(error) => return Ok(Some(error.to_string())),
        };
        if let Some(known) = layer.stamp {
            let changed = known != found;
            return Ok(changed.then(|| "the image was changed since a machine was made over it: put it back as it was, or `spinney edit MACHINE --accept-disks` if its \
                 content is the same"
                    .into()));
        }
        if let Ok(Some(lacks)) = qemu::qcow2::is_cut(&path) {
            return Ok(Some(format!("it is cut off: it lacks {lacks}")));
        }
        Ok(self.img()?.check(&path)?)
    }
}

/// What of a target is no snapshot, by name.
fn here(target: &TargetRow) -> String {
    format!("{} (here)", target.name)
}

/// What people call a snapshot. One that was removed may share its name with one that is there.
fn label(snapshot: &SnapshotRow) -> String {
    let name = snapshot.full_name();
    if snapshot.removed.is_some() { format!("{name} (removed)") } else { name }
}
