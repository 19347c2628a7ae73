//! Carrying out a plan.

use std::sync::Arc;

use super::plan::{GcPlan, Live, PackPlan};
use crate::disk::DiskFile;
use crate::error::{Error, Kind, Problem, Result};
use crate::fault::step;
use crate::index::Place;
use crate::pack::{Building, Entry, Layout, Pack, page_at, read_footer, slot};
use crate::read::damaged;
use crate::store::{Inner, Store};
use crate::sync::{lock, write};
use crate::{PAGE_SIZE, PageHash};

/// What a collection did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcDone {
    /// Packs deleted.
    pub deleted: u64,
    /// Packs rewritten.
    pub rewritten: u64,
    /// Packs left alone: a session has relied on them since the plan, or they are damaged, or gone already.
    pub skipped: u64,
    /// Packs that could not be rewritten because the disk has no room for their copies; counted as skipped, too.
    pub no_room: u64,
    /// Bytes by which the packs' files shrank.
    pub freed_bytes: u64,
    /// The caller stopped it before the plan's end; what was done is done.
    pub stopped: bool,
}

/// Packs that leave the index together, since one sweep over it serves all of them.
const GROUP: usize = 64;

/// Pages copied at once.
const RUN: usize = 256;

impl Store {
    /// Carries out a plan. `progress` gets the bytes looked after so far and in all, and stops the work by returning
    /// false. A plan may be old: what sessions have relied on since is left alone.
    pub fn run_gc(&self, plan: &GcPlan, progress: &dyn Fn(u64, u64) -> bool) -> Result<GcDone> {
        let store = &*self.inner;
        if plan.instance != store.instance {
            return Err(Error::StalePlan);
        }
        let _one = lock(&store.collector);
        let size = |pack: &PackPlan| pack.live_bytes + pack.dead_bytes;
        let total = plan.delete.iter().chain(&plan.rewrite).map(size).sum();
        let (mut done, mut at) = (GcDone::default(), 0);
        for group in plan.delete.chunks(GROUP) {
            if !progress(at, total) {
                done.stopped = true;
                break;
            }
            store.delete(group, plan.since, &mut done)?;
            at += group.iter().map(size).sum::<u64>();
        }
        for pack in &plan.rewrite {
            if done.stopped || !progress(at, total) {
                done.stopped = true;
                break;
            }
            store.rewrite(pack, plan.since, &mut done)?;
            at += size(pack);
        }
        if done.deleted + done.rewritten > 0 {
            store.disk.sync_folder(&store.folder).map_err(Error::io("sync", &store.folder))?;
        }
        if !done.stopped {
            progress(total, total);
        }
        Ok(done)
    }
}

impl Inner {
    fn delete(&self, group: &[PackPlan], since: u64, done: &mut GcDone) -> Result<()> {
        let packs: Vec<Arc<Pack>> = group.iter().filter_map(|plan| self.packs.get(plan.number)).collect();
        let gone: Vec<Arc<Pack>> = {
            let _gate = write(&self.gate);
            packs
                .into_iter()
                .filter(|pack| !self.is_relied_on(pack, since))
                .inspect(|pack| pack.retire())
                .collect()
        };
        done.skipped += (group.len() - gone.len()) as u64;
        let stays = |place: Place| gone.iter().all(|pack| pack.number != place.pack);
        self.pages.retain(stays);
        self.nodes.retain(stays);
        for pack in gone {
            self.remove(&pack)?;
            done.deleted += 1;
            done.freed_bytes += pack.layout.len;
        }
        Ok(())
    }

    /// New pack durable, then the index switches, then the old file goes.
    fn rewrite(&self, plan: &PackPlan, since: u64, done: &mut GcDone) -> Result<()> {
        done.skipped += 1; // until it is done
        let Some((pack, file)) = self.open_pack(plan.number)? else { return Ok(()) };
        if self.is_relied_on(&pack, since) {
            return Ok(());
        }
        let mut building = match Building::create(&*self.disk, &self.folder, self.names.fingerprint) {
            Ok(building) => building,
            Err(e) => return not_rewritten(&pack, e, done),
        };
        let copied = self.copy_live(&pack, &*file, &plan.live, &mut building);
        let copy = match copied.and_then(|copy| self.make_durable(&mut building, copy)) {
            Ok(copy) => copy,
            Err(e) => {
                building.discard(&*self.disk);
                return not_rewritten(&pack, e, done);
            }
        };
        step("gc.copied");
        let new = self.packs.add(copy.path, copy.layout, self.clock.now());
        {
            let _gate = write(&self.gate);
            if self.is_relied_on(&pack, since) {
                self.packs.forget(new.number);
                building.discard(&*self.disk);
                return Ok(());
            }
            for (kind, old) in [(Kind::Page, &copy.old_pages), (Kind::Node, &copy.old_nodes)] {
                let moved = copy.entries.iter().filter(|entry| entry.kind == kind);
                let place = |at| Place { pack: new.number, at };
                let moved: Vec<_> = moved.map(|entry| (entry.name, place(entry.at))).collect();
                self.index(kind).switch(pack.number, &moved);
                self.index(kind).remove(pack.number, old);
            }
            pack.retire();
        }
        self.remove(&pack)?;
        done.skipped -= 1;
        done.rewritten += 1;
        done.freed_bytes += pack.layout.len.saturating_sub(new.layout.len);
        Ok(())
    }

    fn make_durable(&self, building: &mut Building, mut copy: Copy) -> Result<Copied> {
        let layout = building.seal(&mut copy.entries)?;
        let path = building.rename(&*self.disk)?;
        self.disk.sync_folder(&self.folder).map_err(Error::io("sync", &self.folder))?;
        let Copy { entries, old_pages, old_nodes } = copy;
        Ok(Copied { path, layout, entries, old_pages, old_nodes })
    }

    /// Copies what lives, checking all of it, in the order in which it lies.
    fn copy_live(&self, pack: &Pack, file: &dyn DiskFile, live: &Live, to: &mut Building) -> Result<Copy> {
        let bad = |problem: Problem| Error::DamagedPack { pack: pack.name(), problem };
        let mut old = read_footer(file, &pack.layout).map_err(bad)?;
        old.sort_unstable_by_key(|entry| entry.at);
        let (mut pages, mut nodes) = (Vec::new(), Vec::new());
        let mut copy = Copy::default();
        for entry in &old {
            let lives = match entry.kind {
                Kind::Page => slot(entry.at).and_then(|slot| live.pages.get(slot)).copied().unwrap_or(false),
                Kind::Node => live.nodes.contains(&entry.at),
            };
            match entry.kind {
                Kind::Page => copy.old_pages.push(entry.name),
                Kind::Node => copy.old_nodes.push(entry.name),
            }
            if lives {
                if entry.kind == Kind::Page { pages.push(*entry) } else { nodes.push(*entry) }
            }
        }
        for run in pages.chunks(RUN) {
            let mut bytes = vec![[0; PAGE_SIZE]; run.len()];
            for (page, entry) in bytes.iter_mut().zip(run) {
                file.read_at(page, u64::from(entry.at) * 8).map_err(Error::io("read", &pack.path))?;
                if self.names.page(page) != entry.name {
                    return Err(damaged(Kind::Page, entry.name, pack, Problem::Content));
                }
            }
            let first = to.pages();
            to.claim(run.len() as u32).write(&[bytes.as_flattened()])?;
            copy.entries
                .extend((first..).zip(run).map(|(slot, entry)| Entry { at: page_at(slot), ..*entry }));
        }
        for entry in nodes {
            let (_, _) = self.read_node_at(pack, file, u64::from(entry.at) * 8, &entry.name)?;
            let mut bytes = vec![0; usize::from(entry.len)];
            file.read_at(&mut bytes, u64::from(entry.at) * 8).map_err(Error::io("read", &pack.path))?;
            let at = to.nodes_at() + to.add_node(&bytes);
            copy.entries.push(Entry { at, ..entry });
        }
        Ok(copy)
    }

    /// Takes a retired pack out of the table and deletes its file.
    fn remove(&self, pack: &Pack) -> Result<()> {
        self.packs.forget(pack.number);
        self.disk.remove(&pack.path).map_err(Error::io("remove", &pack.path))?;
        step("gc.removed");
        Ok(())
    }
}

/// A damaged pack is left for a check to name. One whose copy has no room is left for a day with more: others may be smaller.
fn not_rewritten(pack: &Pack, error: Error, done: &mut GcDone) -> Result<()> {
    tracing::warn!(pack = pack.name(), %error, "pack not rewritten");
    done.no_room += u64::from(error.is_no_space());
    if error.is_damage() || error.is_no_space() { Ok(()) } else { Err(error) }
}

/// What was copied out of a pack, and all that was in it.
#[derive(Default)]
struct Copy {
    entries: Vec<Entry>,
    old_pages: Vec<PageHash>,
    old_nodes: Vec<PageHash>,
}

/// The same, durable.
struct Copied {
    path: std::path::PathBuf,
    layout: Layout,
    entries: Vec<Entry>,
    old_pages: Vec<PageHash>,
    old_nodes: Vec<PageHash>,
}
