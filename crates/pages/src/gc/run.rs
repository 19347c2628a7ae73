//! Carrying out a plan.

use std::sync::Arc;

use super::plan::{GcPlan, Live, PackPlan};
use crate::disk::DiskFile;
use crate::error::{Error, Kind, Problem, Result};
use crate::fault::step;
use crate::pack::{At, Body, Building, Entry, NewBody, Pack, Place, read_footer};
use crate::read::{damaged, read_span};
use crate::store::{Inner, Store};
use crate::sync::{lock, write};
use crate::{Fingerprint, PAGE_SIZE};

/// What a collection did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GcDone {
    /// Packs deleted.
    pub deleted: u64,
    /// Packs rewritten.
    pub rewritten: u64,
    /// Packs compressed.
    pub compressed: u64,
    /// Bytes by which what lives in these shrank; part of `freed_bytes`.
    pub compressed_away: u64,
    /// Labels of the images on which nothing is left: their files may go.
    pub left: Vec<String>,
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

/// Level of zstd for what was compressed before.
const LEVEL: i32 = 3;

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
        let total = plan.delete.iter().chain(&plan.rewrite).chain(&plan.compress).map(size).sum();
        let (mut done, mut at) = (GcDone::default(), 0);
        for group in plan.delete.chunks(GROUP) {
            if !progress(at, total) {
                done.stopped = true;
                break;
            }
            store.delete(group, plan.since, &mut done)?;
            at += group.iter().map(size).sum::<u64>();
        }
        let rewrites = plan.rewrite.iter().map(|pack| (pack, None));
        for (pack, level) in rewrites.chain(plan.compress.iter().map(|pack| (pack, Some(plan.level)))) {
            if done.stopped || !progress(at, total) {
                done.stopped = true;
                break;
            }
            let mut go_on = |copied| progress(at + copied, total);
            store.rewrite(pack, level, plan.since, &mut go_on, &mut done)?;
            at += size(pack);
        }
        // An image that came back after its file is gone would be believed, so its end is as durable as a pack's.
        if done.deleted + done.rewritten + done.compressed > 0 || !done.left.is_empty() {
            store.disk.sync_folder(&store.folder).map_err(Error::io("sync", &store.folder))?;
        }
        done.left.sort_unstable();
        done.left.dedup();
        done.left.retain(|label| store.parts(label).is_empty());
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
        self.index.retain(|place: Place| gone.iter().all(|pack| pack.number != place.pack));
        for pack in gone {
            self.remove(&pack)?;
            done.freed_bytes += pack.layout.len;
            match pack.layout.image() {
                Some(image) => done.left.push(image.label.clone()),
                None => done.deleted += 1,
            }
        }
        Ok(())
    }

    /// New pack durable, then the index switches, then the old file goes.
    fn rewrite(
        &self,
        plan: &PackPlan,
        level: Option<i32>,
        since: u64,
        go_on: &mut dyn FnMut(u64) -> bool,
        done: &mut GcDone,
    ) -> Result<()> {
        done.skipped += 1; // until it is done
        let Some((pack, file)) = self.open_pack(plan.number)? else { return Ok(()) };
        if self.is_relied_on(&pack, since) {
            return Ok(());
        }
        let body = match (level, &pack.layout.body) {
            (Some(level), _) => NewBody::Frames(level),
            (None, Body::Frames(_)) => NewBody::Frames(LEVEL),
            (None, Body::Raw | Body::Image(_)) => NewBody::Raw,
        };
        let (group, origin) = (self.names.fingerprint, pack.layout.origin);
        let mut building = match Building::create(&*self.disk, &self.folder, group, origin, body) {
            Ok(building) => building,
            Err(e) => return not_rewritten(&pack, e, done),
        };
        let copied = self.copy_live(&pack, &*file, &plan.live, &mut building, go_on);
        let durable = copied.and_then(|entries| {
            let Some(mut entries) = entries else { return Ok(None) };
            let (layout, path) = self.make_durable(&mut building, &mut entries)?;
            Ok(Some((layout, path, entries)))
        });
        let (layout, path, entries) = match durable {
            Ok(Some(durable)) => durable,
            Ok(None) => {
                building.discard(&*self.disk);
                done.stopped = true;
                return Ok(());
            }
            Err(e) => {
                building.discard(&*self.disk);
                return not_rewritten(&pack, e, done);
            }
        };
        step("gc.copied");
        let new = self.packs.add(&self.home, path, layout, self.clock.now());
        let place = |at: At| Place { pack: new.number, at };
        let moved: Vec<(Fingerprint, Place)> =
            entries.iter().map(|entry| (entry.name, place(entry.at))).collect();
        // Before the gate: nobody is to wait for the files of the index. What a commit sets meanwhile is as good as what is set here.
        let moved = self.index.those_in(pack.number, &moved);
        {
            let _gate = write(&self.gate);
            if self.is_relied_on(&pack, since) {
                self.packs.forget(new.number);
                building.discard(&*self.disk);
                return Ok(());
            }
            self.index.set(&moved);
            pack.retire();
        }
        self.index.retain(|place| place.pack != pack.number);
        new.publish();
        self.remove(&pack)?;
        done.skipped -= 1;
        let freed = pack.layout.len.saturating_sub(new.layout.len);
        done.freed_bytes += freed;
        match (pack.layout.image(), level) {
            (Some(image), _) => done.left.push(image.label.clone()),
            (None, Some(_)) => {
                done.compressed += 1;
                // What was dead would have gone anyway.
                done.compressed_away += freed.saturating_sub(plan.dead_bytes);
            }
            (None, None) => done.rewritten += 1,
        }
        Ok(())
    }

    /// Copies what lives, checking all of it, in the order in which it lies. None if the caller wants no more of it.
    fn copy_live(
        &self,
        pack: &Pack,
        file: &dyn DiskFile,
        live: &Live,
        to: &mut Building,
        go_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Vec<Entry>>> {
        let bad = |problem: Problem| Error::DamagedPack { pack: pack.name(), problem };
        let mut old = read_footer(file, &pack.layout).map_err(bad)?;
        old.sort_unstable_by_key(|entry| entry.at);
        old.retain(|entry| match entry.at.slot() {
            Some(slot) => live.pages.get(slot as usize).copied().unwrap_or(false),
            None => live.nodes.contains(&entry.at),
        });
        let mut copied = Vec::with_capacity(old.len());
        let body = self.packs.body(pack)?;
        let pages = old.iter().take_while(|entry| entry.kind() == Kind::Page).count();
        let (pages, nodes) = old.split_at(pages);
        let mut bytes = vec![[0; PAGE_SIZE]; RUN];
        for run in pages.chunk_by(Entry::is_before).flat_map(|run| run.chunks(RUN)) {
            let Some(first) = run.first().and_then(|entry| entry.at.slot()) else { continue };
            if !go_on((copied.len() * PAGE_SIZE) as u64) {
                return Ok(None);
            }
            let bytes = bytes.get_mut(..run.len()).unwrap_or_default();
            read_span(pack, &*body, first, bytes).map_err(Error::io("read", pack.body_path()))?;
            let mut wrong = None;
            self.names.pages(bytes.iter(), |i, name| {
                wrong = wrong.or(run.get(i).filter(|entry| !entry.name.is_of(&name)));
            });
            if let Some(entry) = wrong {
                let problem = if pack.layout.image().is_some() { Problem::Changed } else { Problem::Content };
                return Err(damaged(Kind::Page, entry.name.padded(), pack, problem));
            }
            let first = to.pages();
            to.append(bytes.as_flattened())?;
            copied.extend((first..).zip(run).map(|(slot, entry)| Entry::page(entry.name, slot)));
        }
        for entry in nodes {
            let bytes = self.node_bytes(pack, file, entry)?;
            copied.push(Entry { at: to.add_node(&bytes), ..*entry });
        }
        Ok(Some(copied))
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
