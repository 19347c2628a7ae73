//! The fingerprint index: from a name to its place.
//!
//! ```text
//!   memory     what came lately: sixteen shards by the first bits of the name
//!   runs       everything else: sorted files, mapped, a new one whenever memory has gathered enough; small ones are merged
//! ```
//! It is asked in batches and answers by value, so a shard's owner may one day be elsewhere. It keeps the first 16 bytes of a name,
//! and says nothing that the packs' footers do not say: losing it costs time, never data (`docs/formats/pages.md`, "Index").
//!
//! A name may lie in several packs. What counts is the newest place in a pack of our own; only a name that no such pack has counts
//! where an image has it, the oldest first. So nothing comes to depend on an image that did not before. A place in a pack that is gone
//! counts as none: nothing has to be taken out of a run.

mod mapping;
mod merge;
mod run;
mod runs;
mod table;

pub(crate) mod synthetic;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

pub(crate) use mapping::Mapping;
pub(crate) use run::Run;
pub(crate) use runs::Runs;
pub(crate) use table::Table;

use crate::pack::{At, Entry, Pack, Packs, Place, View};
use crate::planted::{Mistake, is_made};
use crate::sync::{RwLock, read, write};
use crate::{Fingerprint, PAGE_SIZE, PageHash};

pub(crate) use mapping::map;

const SHARDS: usize = 16;

/// Look-ups of one name before it counts as missing. The collector moves a page at most once while we look.
pub(crate) const ATTEMPTS: usize = 3;

/// All names that a store holds, of pages and nodes.
pub(crate) struct Index {
    shards: [RwLock<Table>; SHARDS],
    packs: Arc<Packs>,
    runs: Runs,
}

/// The shard that owns a name.
fn shard(name: Fingerprint) -> usize {
    let [first, ..] = name.0;
    usize::from(first >> 4)
}

/// What a place is worth. A private image comes last, so that nothing comes to lie on it that was not there before.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Gone,
    Private,
    Shared,
    Own,
}

fn rank(view: &View, place: Place) -> Rank {
    view.get(place.pack).map_or(Rank::Gone, |pack| rank_of(pack))
}

fn rank_of(pack: &Pack) -> Rank {
    match pack.layout.image() {
        None => Rank::Own,
        Some(image) if image.private => Rank::Private,
        Some(_) => Rank::Shared,
    }
}

/// The same, where it matters whether an image is what it was.
fn worth(pack: &Pack) -> (bool, Rank) {
    (!pack.is_suspect(), rank_of(pack))
}

impl Index {
    pub(crate) fn new(packs: Arc<Packs>, runs: Runs) -> Self {
        Self { shards: Default::default(), packs, runs }
    }

    pub(crate) fn runs(&self) -> &Runs {
        &self.runs
    }

    /// Calls `found` with the position, place and pack of each name that is known, in no order. The zero page never is.
    ///
    /// A name that moves just now may not be found; see [`Index::lookup_surely`].
    pub(crate) fn lookup(&self, names: &[PageHash], mut found: impl FnMut(usize, Place, &Arc<Pack>)) {
        let mut on_images: Vec<(usize, Place, Arc<Pack>)> = Vec::new();
        let mut todo: Vec<(usize, Fingerprint)> = Vec::with_capacity(names.len());
        let too_early = is_made(Mistake::RunsFirst).then(|| self.runs.all());
        let view = {
            let shards = self.shards.each_ref().map(read);
            // As long as the shards are locked no name moves: this view has all packs that they speak of.
            let view = self.packs.view();
            let empty = shards.iter().all(|shard| shard.len() == 0);
            for (i, name) in names.iter().enumerate().filter(|(_, name)| **name != PageHash::ZERO) {
                let name = name.fingerprint();
                let place =
                    if empty { None } else { shards.get(shard(name)).and_then(|shard| shard.get(name)) };
                match place.and_then(|place| Some((place, view.get(place.pack)?))) {
                    Some((place, pack)) if rank_of(pack) == Rank::Own => found(i, place, pack),
                    Some((place, pack)) => {
                        on_images.push((i, place, pack.clone()));
                        todo.push((i, name));
                    }
                    None => todo.push((i, name)),
                }
            }
            view
        };
        // After memory: what leaves it is in a run already, and may be in a pack that is younger than the view.
        let (runs, later) = (too_early.unwrap_or_else(|| self.runs.all()), self.packs.view());
        for run in runs.iter() {
            if todo.is_empty() {
                break;
            }
            todo.retain(|(i, name)| {
                let Some(place) = run.get(*name) else { return true };
                let Some(pack) = view.get(place.pack).or_else(|| later.get(place.pack)) else { return true };
                if rank_of(pack) == Rank::Own {
                    found(*i, place, pack);
                    return false;
                }
                on_images.push((*i, place, pack.clone()));
                true
            });
        }
        if !on_images.is_empty() {
            // What was found in a pack of our own after all is not to be done any more. Of the rest the last one is the oldest; one that
            // is not what it was is the last choice.
            let open: HashSet<usize> = todo.iter().map(|(i, _)| *i).collect();
            let mut best: HashMap<usize, (Place, Arc<Pack>)> = HashMap::new();
            for (i, place, pack) in on_images.into_iter().filter(|(i, ..)| open.contains(i)) {
                if best.get(&i).is_none_or(|(_, other)| worth(&pack) >= worth(other)) {
                    best.insert(i, (place, pack));
                }
            }
            best.into_iter().for_each(|(i, (place, pack))| found(i, place, &pack));
        }
    }

    /// As [`Index::lookup`]; what is not found is looked for again, so that it is not missed while the collector moves it.
    pub(crate) fn lookup_surely(&self, names: &[PageHash], mut found: impl FnMut(usize, Place, &Arc<Pack>)) {
        let mut known = vec![false; names.len()];
        for _ in 0..ATTEMPTS {
            let todo: Vec<usize> = (0..names.len())
                .filter(|i| known.get(*i) == Some(&false) && names.get(*i) != Some(&PageHash::ZERO))
                .collect();
            if todo.is_empty() {
                return;
            }
            let asked: Vec<PageHash> = todo.iter().filter_map(|i| names.get(*i)).copied().collect();
            self.lookup(&asked, |number, place, pack| {
                let Some(i) = todo.get(number) else { return };
                if let Some(known) = known.get_mut(*i) {
                    *known = true;
                }
                found(*i, place, pack);
            });
        }
    }

    /// Place of one name, surely.
    pub(crate) fn get(&self, name: &PageHash) -> Option<(Place, Arc<Pack>)> {
        let mut place = None;
        self.lookup_surely(std::slice::from_ref(name), |_, found, pack| place = Some((found, pack.clone())));
        place
    }

    /// Sets the places of names that a pack of our own has; best in the order of names.
    pub(crate) fn set(&self, batch: &[(Fingerprint, Place)]) {
        each_shard(&self.shards, batch, |(name, _)| *name, |table, (name, place)| table.set(*name, *place));
    }

    /// Sets the places of names that an image has; what memory has of a name stays, if it is worth as much.
    pub(crate) fn set_on_image(&self, batch: &[(Fingerprint, Place)]) {
        let view = self.packs.view();
        each_shard(
            &self.shards,
            batch,
            |(name, _)| *name,
            |table, (name, place)| {
                let worth = |place: Place| view.get(place.pack).map(|pack| worth(pack));
                if table.get(*name).is_none_or(|old| worth(old) < worth(*place)) {
                    table.set(*name, *place);
                }
            },
        );
    }

    /// Of these names those that lie in `pack`. It may take a while: files are looked into.
    pub(crate) fn those_in(&self, pack: u32, batch: &[(Fingerprint, Place)]) -> Vec<(Fingerprint, Place)> {
        let names: Vec<PageHash> = batch.iter().map(|(name, _)| name.padded()).collect();
        let mut own = Vec::with_capacity(batch.len());
        self.lookup_surely(&names, |i, place, _| {
            if place.pack == pack {
                own.extend(batch.get(i).copied());
            }
        });
        own
    }

    /// Forgets names in memory whose place fails the test. What runs have in packs that are gone counts for nothing anyway.
    pub(crate) fn retain(&self, keep: impl Fn(Place) -> bool) {
        self.shards.iter().for_each(|shard| write(shard).retain(&keep));
    }

    /// All names whose place is in a pack, as entries of its footer; a node's length is not known. Slow: every run is gone through.
    pub(crate) fn in_pack(&self, pack: u32) -> Vec<Entry> {
        let own = |(name, place): &(Fingerprint, Place)| (place.pack == pack).then_some((*name, place.at));
        let mut found: HashMap<Fingerprint, At> = HashMap::new();
        for run in self.runs.all().iter() {
            found.extend(run.iter().filter_map(|entry| own(&entry)));
        }
        for shard in &self.shards {
            found.extend(read(shard).iter().filter_map(own));
        }
        // A newer place may hide what a run says.
        let (names, places): (Vec<_>, Vec<_>) = found.into_iter().unzip();
        let padded: Vec<PageHash> = names.iter().map(|name: &Fingerprint| name.padded()).collect();
        let mut entries = Vec::new();
        self.lookup_surely(&padded, |i, place, _| {
            if place.pack == pack
                && let (Some(name), Some(at)) = (names.get(i), places.get(i))
            {
                let len = if at.slot().is_some() { PAGE_SIZE } else { 0 };
                entries.push(Entry { name: *name, at: *at, len: len as u16 });
            }
        });
        entries
    }

    /// Names that memory has.
    pub(crate) fn in_memory(&self) -> usize {
        self.shards.iter().map(|shard| read(shard).len()).sum()
    }

    /// Bytes that the names in memory take, and what is kept for each run.
    pub(crate) fn memory_bytes(&self) -> usize {
        let memory: usize = self.shards.iter().map(|shard| read(shard).memory_bytes()).sum();
        memory + self.runs.all().iter().map(|run| run.memory_bytes()).sum::<usize>()
    }

    /// Copies what memory has, sorted.
    fn copy_memory(&self) -> Vec<(Fingerprint, Place)> {
        let mut all = Vec::new();
        // The shards are in the order of names.
        for shard in &self.shards {
            let from = all.len();
            all.extend(read(shard).iter().copied());
            if let Some(own) = all.get_mut(from..) {
                own.sort_unstable();
            }
        }
        all
    }

    /// Takes out of memory what a run says as well.
    fn forget_copied(&self, copied: &[(Fingerprint, Place)]) {
        each_shard(
            &self.shards,
            copied,
            |(name, _)| *name,
            |table, (name, place)| {
                if table.get(*name) == Some(*place) || is_made(Mistake::ForgetChanged) {
                    table.remove(*name);
                }
            },
        );
        self.shards.iter().for_each(|shard| write(shard).shrink());
    }
}

fn each_shard<T>(
    shards: &[RwLock<Table>; SHARDS],
    batch: &[T],
    name: impl Fn(&T) -> Fingerprint,
    mut act: impl FnMut(&mut Table, &T),
) {
    // Mostly they come in the order of names, as footers have them: then each shard is locked once.
    for own in batch.chunk_by(|a, b| shard(name(a)) == shard(name(b))) {
        let table = own.first().and_then(|first| shards.get(shard(name(first))));
        if let Some(table) = table {
            let mut table = write(table);
            own.iter().for_each(|item| act(&mut table, item));
        }
    }
}
