//! `fsck`: everything that is stored, looked at, and what is wrong with it by name.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;

use pages::Store;
use rusqlite::Transaction;

use crate::catalog::{LayerRow, Memory, SnapshotRow, TargetRow};
use crate::context::Context;
use crate::disks::stamp;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::step;
use crate::groups::OpenGroup;
use crate::memory::read_state;
use crate::types::{Damage, FsckReport, GroupFsck};

impl Engine {
    /// Reads every pack, map, device state and layer, and compares them with their names and with the catalog. With `repair`, what
    /// can be mended is mended first, and snapshots that cannot are marked. Without, nothing is changed, but for the marks of snapshots that
    /// turn out to be whole again: they are taken away.
    pub fn fsck(&self, cx: &Context, repair: bool) -> Result<FsckReport> {
        let _alone = self.housekeep(cx)?;
        let mended = if repair { self.mend_pages(cx)? } else { Vec::new() };
        let report = FsckReport { mended, ..self.check_all(cx)? };
        self.mark_damaged(&report, repair)?;
        Ok(report)
    }

    /// Has the page stores mend their packs; says what they did.
    fn mend_pages(&self, cx: &Context) -> Result<Vec<String>> {
        let groups = self.groups.all();
        let mut said = Vec::new();
        for group in &groups {
            // What cannot be opened is not touched: `check_all` says so.
            let Ok(store) = group.store() else { continue };
            let of = if groups.len() > 1 { format!("group {}: ", group.row.name) } else { String::new() };
            // What was done is told even where the rest fails.
            let told = |_: &Error| said.iter().for_each(|words: &String| cx.warn(words.clone()));
            let mended = self.mend_group(cx, &group.row.id, store).inspect_err(told)?;
            said.extend(mended.into_iter().map(|words| format!("{of}{words}")));
        }
        Ok(said)
    }

    fn mend_group(&self, cx: &Context, group: &str, store: &Store) -> Result<Vec<String>> {
        cx.phase("mending packs", 0);
        let roots = self.live_roots(group)?;
        let done = store.repair(&roots, &|| cx.check().is_ok()).map_err(|error| match error {
            pages::Error::NoAnswer { .. } => Error::new(
                Code::Failed,
                "the disk of the page store cannot be read: nothing that is on it was given up",
            )
            .because(error)
            .hint(
                "see to that disk (the kernel's log says more): all may be there when it can be read again",
            ),
            error => error.into(),
        })?;
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
            // The layers' files are still there, and say what their maps said.
            self.catalog.write(|tx| LayerRow::unsettle(tx, group))?;
        }
        Ok(said)
    }

    /// Writes down which snapshots cannot be relied on; without `more` only of those that were marked before.
    fn mark_damaged(&self, report: &FsckReport, more: bool) -> Result<()> {
        let groups = self.groups.all();
        let unusable = groups.iter().filter(|group| group.problem().is_some());
        let unseen: HashSet<String> = unusable.map(|group| group.row.id.clone()).collect();
        let marked = |tx: &Transaction<'_>| {
            let rows = SnapshotRow::all(tx)?;
            let known =
                rows.iter().map(|row| SnapshotRow::damage(tx, &row.id)).collect::<Result<Vec<_>>>()?;
            Ok(known.iter().any(Option::is_some))
        };
        if !more && !self.catalog.read(marked)? {
            return Ok(());
        }
        self.catalog.write(|tx| {
            let mut damaged = Vec::new();
            for snapshot in SnapshotRow::all(tx)? {
                if !more && SnapshotRow::damage(tx, &snapshot.id)?.is_none() {
                    continue;
                }
                let group = TargetRow::by_id(tx, &snapshot.target)?.group;
                if unseen.contains(&group) {
                    // What is known of it stays known.
                    let known = SnapshotRow::damage(tx, &snapshot.id)?;
                    damaged.extend(known.map(|problem| (snapshot.id, problem)));
                    continue;
                }
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
        let mut report = FsckReport::default();
        for problem in self.catalog.check()? {
            report.damage.push(Damage {
                group: None,
                what: "the catalog".into(),
                problem,
                ..Damage::default()
            });
        }
        for group in self.groups.all() {
            let mut part = FsckReport::default();
            self.check_group(cx, &group, &mut part)?;
            report.groups.push(GroupFsck {
                group: group.row.name.clone(),
                packs: part.packs,
                pages: part.pages,
                layers: part.layers,
                snapshots: part.snapshots,
                damage: part.damage.len() as u64,
            });
            report.packs += part.packs;
            report.pages += part.pages;
            report.layers += part.layers;
            report.snapshots += part.snapshots;
            report.mendable |= part.mendable;
            report.damage.append(&mut part.damage);
        }
        Ok(report)
    }

    fn check_group(&self, cx: &Context, group: &OpenGroup, report: &mut FsckReport) -> Result<()> {
        let id = &group.row.id;
        let (snapshots, targets, layers, users, written, other_maps) = self.catalog.read(|tx| {
            let snapshots = SnapshotRow::of_group(tx, id)?;
            let layers = LayerRow::of_group(tx, id)?;
            let mut users: HashMap<String, Vec<String>> = HashMap::new();
            let mut other_maps = Vec::new();
            let mut note = |disks: Vec<(String, String)>, name: &str| {
                for (_, top) in disks {
                    let chain = LayerRow::chain(tx, &top).unwrap_or_default();
                    let map = chain.iter().rev().find_map(|layer| layer.settled);
                    other_maps.extend(map.map(|map| (map, name.to_owned())));
                    for layer in chain {
                        users.entry(layer.id).or_default().push(name.to_owned());
                    }
                }
            };
            for snapshot in &snapshots {
                note(SnapshotRow::disks(tx, &snapshot.id)?, &label(snapshot));
            }
            let mut written = HashSet::new();
            let targets = TargetRow::of_group(tx, id)?;
            for target in &targets {
                if target.process.is_some() {
                    written.extend(TargetRow::disks(tx, &target.id)?.into_iter().map(|(_, layer)| layer));
                }
                note(TargetRow::disks(tx, &target.id)?, &here(target));
            }
            let mapped = |target: &TargetRow| Some((target.process.as_ref()?.ram?, here(target)));
            other_maps.extend(targets.iter().filter_map(mapped));
            Ok((snapshots, targets, layers, users, written, other_maps))
        })?;
        let of_snapshots = snapshots.iter().filter_map(|s| Some((label(s), s.memory.as_ref()?)));
        let of_targets = targets.iter().filter_map(|t| Some((here(t), &t.suspended.as_ref()?.memory)));
        let memories: Vec<_> = of_snapshots.chain(of_targets).collect();
        report.snapshots = snapshots.len() as u64;
        self.check_pages(cx, group, &memories, other_maps, report)?;
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
                    None => report.damage.push(Damage {
                        group: Some(group.row.name.clone()),
                        users_file: layer.is_users(),
                        what,
                        problem,
                        snapshots: needed_by.clone(),
                    }),
                }
            }
            cx.advance(1);
        }
        name_once(report);
        Ok(())
    }

    /// Looks at memories and at other maps (of settled disks, of memory that a process has mapped), each with the name of whom it belongs to.
    fn check_pages(
        &self,
        cx: &Context,
        group: &OpenGroup,
        memories: &[(String, &Memory)],
        other_maps: Vec<(pages::MapRoot, String)>,
        report: &mut FsckReport,
    ) -> Result<()> {
        let name = || Some(group.row.name.clone());
        if let Some(why) = group.problem() {
            report.damage.push(Damage {
                group: name(),
                what: format!("the page store of the group {}", group.row.name),
                problem: format!("it cannot be used, so nothing in it was looked at: {why}"),
                ..Damage::default()
            });
            return Ok(());
        }
        let store = group.store()?;
        let of_memory = |(name, memory): &(String, &Memory)| {
            memory.roots().map(|root| (root, name.clone())).collect::<Vec<_>>()
        };
        let roots: Vec<_> = memories.iter().flat_map(of_memory).chain(other_maps).collect();
        cx.phase("reading pages", 0);
        let pages = store.fsck(&roots, &|done, total| {
            cx.progress.total.store(total, Ordering::Relaxed);
            cx.progress.done.store(done, Ordering::Relaxed);
            cx.check().is_ok()
        })?;
        cx.check()?;
        report.packs = pages.packs;
        report.mendable = pages.damaged_packs > 0;
        report.pages = pages.pages;
        let found = pages.damage.into_iter();
        report.damage.extend(found.map(|d| Damage {
            group: name(),
            what: d.what,
            problem: d.problem,
            snapshots: d.labels,
            users_file: false,
        }));
        for (owner, memory) in memories {
            if let Err(error) = read_state(store.as_ref(), memory) {
                let causes = error.causes();
                report.damage.push(Damage {
                    group: name(),
                    what: format!("the device state of {owner}"),
                    problem: causes.last().cloned().unwrap_or_else(|| error.to_string()),
                    snapshots: vec![owner.clone()],
                    users_file: false,
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
    let removed = if target.removed.is_some() { ", removed" } else { "" };
    format!("{} (here{removed})", target.name)
}

/// What people call a snapshot. One that was removed may share its name with one that is there.
fn label(snapshot: &SnapshotRow) -> String {
    let name = snapshot.full_name();
    if snapshot.removed.is_some() { format!("{name} (removed)") } else { name }
}

/// A file that is wrong as a disk layer and as an image of the page store is one thing that is wrong.
fn name_once(report: &mut FsckReport) {
    let (images, mut others): (Vec<Damage>, Vec<Damage>) =
        std::mem::take(&mut report.damage).into_iter().partition(|damage| damage.what.starts_with(IMAGE));
    for image in images {
        let file = image.what.strip_prefix(IMAGE).unwrap_or_default();
        match others.iter_mut().find(|damage| damage.what == file) {
            Some(layer) => {
                layer.snapshots.extend(image.snapshots);
                layer.snapshots.sort_unstable();
                layer.snapshots.dedup();
            }
            None => others.push(image),
        }
    }
    report.damage = others;
}

/// What the page store calls a file whose blocks are pages.
const IMAGE: &str = "the image ";
