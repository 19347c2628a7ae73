//! One writer's work, from `begin` to `commit`.
//!
//! `put` hashes without any lock, asks the index in one batch, claims slots for what is new under the session's lock and
//! writes it without, straight from the caller's memory. So several threads put at once, and a page that two of them bring
//! is stored once. Map nodes wait in memory until their pack is closed.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::fault::step;
use crate::hold::Hold;
use crate::index::{ATTEMPTS, Table};
use crate::map;
use crate::pack::{At, Building, Entry, Layout, NewBody, Pack, Place, Slots};
use crate::store::{Cause, Inner, Relying};
use crate::sync::{AtomicBool, Mutex, Ordering, lock};
use crate::threads::side_by_side;
use crate::{LEAF_PAGES, MapRoot, PAGE_SIZE, PageHash, Purpose, Saved, Session};

/// Names looked up at once.
const BATCH: usize = 4096;

const ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// The store's [`Session`].
pub(crate) struct Writer {
    store: Arc<Inner>,
    relying: Relying,
    /// Keeps every pack with a hit from the collector.
    _hold: Hold,
    own: Mutex<Own>,
    /// A write failed: the session cannot be committed.
    failed: AtomicBool,
}

/// What the session adds. Places count the session's own packs.
#[derive(Default)]
struct Own {
    /// Pages and nodes.
    table: Table,
    page_count: usize,
    /// Leaves whose pages were looked after.
    leaves: HashSet<PageHash>,
    packs: Vec<Building>,
    lanes: Vec<Lane>,
    saved: Saved,
}

/// A pack that takes pages. A file system lets one thread at a time write to a file, so threads that put at once get a lane each, once
/// there is enough to be worth another file.
struct Lane {
    pack: u32,
    /// Threads that are writing to it.
    writers: u32,
}

/// Most packs that are written to at once.
const LANES: usize = 4;
/// Pages of a session before it has a second lane: 32 MiB.
const SPREAD_PAGES: usize = 8192;

/// Slots, and the numbers in the batch of the pages that they are for.
type Claim = (Slots, Vec<usize>);

impl Writer {
    pub(crate) fn new(store: Arc<Inner>, purpose: &Purpose) -> Self {
        let (relying, hold) = (Relying::new(purpose), store.clock.hold());
        store.watch_images(&purpose.images);
        Self { store, relying, _hold: hold, own: Mutex::default(), failed: AtomicBool::new(false) }
    }

    /// Runs a step that may write; its failure is the session's.
    fn step<T>(&self, act: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.failed.load(Ordering::Relaxed) {
            return Err(Error::SessionFailed);
        }
        act().inspect_err(|_| self.failed.store(true, Ordering::Relaxed))
    }

    /// Counts the pages and claims slots for the new ones, all in one lane, which has one more writer then.
    fn claim(&self, names: &[PageHash], known: &[Option<Cause>]) -> Result<(Option<usize>, Vec<Claim>)> {
        let (mut saved, mut unknown) = (Saved::default(), Vec::new());
        for (i, (name, known)) in names.iter().zip(known).enumerate() {
            match known {
                _ if *name == PageHash::ZERO => saved.zero += 1,
                Some(Cause::Earlier) => saved.earlier += 1,
                Some(Cause::Other) => saved.other += 1,
                Some(Cause::Disk) => saved.disk += 1,
                None => unknown.push((i, name.fingerprint())),
            }
        }
        let mut own = lock(&self.own);
        own.saved.zero += saved.zero;
        own.saved.earlier += saved.earlier;
        own.saved.other += saved.other;
        own.saved.disk += saved.disk;
        if unknown.is_empty() {
            return Ok((None, Vec::new()));
        }
        let lane = own.choose_lane();
        let mut claims = Vec::new();
        let mut todo = Vec::with_capacity(unknown.len());
        let mut pack = 0;
        for (i, name) in unknown {
            if own.table.get(name).is_some() {
                own.saved.same += 1;
                continue;
            }
            own.saved.new += 1;
            own.page_count += 1;
            pack = self.current(&mut own, lane)?;
            let Own { table, packs, .. } = &mut *own;
            let Some(building) = packs.get_mut(pack as usize) else { continue };
            table.set(name, Place { pack, at: At::page(building.pages() + todo.len() as u32) });
            todo.push(i);
            if building.pages() + todo.len() as u32 == self.store.limits.pack_pages {
                claims.push((building.claim(todo.len() as u32), std::mem::take(&mut todo)));
            }
        }
        if let (false, Some(building)) = (todo.is_empty(), own.packs.get_mut(pack as usize)) {
            claims.push((building.claim(todo.len() as u32), todo));
        }
        if claims.is_empty() {
            return Ok((None, claims));
        }
        own.lanes.get_mut(lane).into_iter().for_each(|lane| lane.writers += 1);
        Ok((Some(lane), claims))
    }

    /// Number of the pack that takes the next page or node in a lane; a new one if there is none or it is full.
    fn current(&self, own: &mut Own, lane: usize) -> Result<u32> {
        let limits = self.store.limits;
        let current = own.lanes.get(lane).map(|lane| lane.pack);
        if let Some((number, pack)) =
            current.and_then(|n| own.packs.get_mut(n as usize).map(|pack| (n, pack)))
        {
            if pack.pages() < limits.pack_pages && pack.node_bytes() < limits.node_bytes {
                return Ok(number);
            }
            pack.close()?;
        }
        let (disk, folder) = (&*self.store.disk, &self.store.folder);
        let (group, origin) = (self.store.names.fingerprint, self.relying.origin);
        own.packs.push(Building::create(disk, folder, group, origin, NewBody::Raw)?);
        let pack = (own.packs.len() - 1) as u32;
        match own.lanes.get_mut(lane) {
            Some(lane) => lane.pack = pack,
            None => own.lanes.push(Lane { pack, writers: 0 }),
        }
        Ok(pack)
    }

    /// Checks that every page of a map is in the store or this session, and relies on it.
    fn check_pages(&self, pages: &[PageHash]) -> Result<()> {
        for batch in pages.chunks(BATCH) {
            let mut known = vec![None; batch.len()];
            self.store.rely_on(&self.relying, batch, &mut known);
            let mut todo: Vec<PageHash> = batch
                .iter()
                .zip(&known)
                .filter(|(_, known)| known.is_none())
                .map(|(name, _)| *name)
                .collect();
            for _ in 0..ATTEMPTS {
                {
                    let own = lock(&self.own);
                    todo.retain(|name| {
                        *name != PageHash::ZERO && own.table.get(name.fingerprint()).is_none()
                    });
                }
                if todo.is_empty() {
                    break;
                }
                // The collector may have moved it just then.
                let mut known = vec![None; todo.len()];
                self.store.rely_on(&self.relying, &todo, &mut known);
                let mut known = known.into_iter();
                todo.retain(|_| known.next().flatten().is_none());
            }
            if let Some(name) = todo.first() {
                return Err(self.store.missing(Kind::Page, *name));
            }
        }
        Ok(())
    }

    /// Keeps leaves over pages that were looked after.
    fn keep_leaves(&self, pages: &[PageHash], leaves: &mut [PageHash]) -> Result<()> {
        let names = self.step(|| map::level(0, pages, |level| self.keep_nodes(level)))?;
        leaves.copy_from_slice(&names);
        lock(&self.own).leaves.extend(names);
        Ok(())
    }

    /// Checks that leaves were put in this session: the store may hold a leaf and not its pages.
    fn check_leaves<'a>(&self, mut leaves: impl Iterator<Item = &'a PageHash>) -> Result<()> {
        let own = lock(&self.own);
        match leaves.find(|leaf| **leaf != PageHash::ZERO && !own.leaves.contains(leaf)) {
            Some(leaf) => Err(self.store.missing(Kind::Node, *leaf)),
            None => Ok(()),
        }
    }

    /// Names the nodes of one level and keeps those that are new.
    fn keep_nodes(&self, level: map::Level) -> Result<Vec<PageHash>> {
        let names = self.store.names.nodes(&level);
        let mut known = vec![None; names.len()];
        self.store.rely_on(&self.relying, &names, &mut known);
        let mut own = lock(&self.own);
        for ((name, node), known) in names.iter().zip(&level).zip(known) {
            let new = known.is_none() && own.table.get(name.fingerprint()).is_none();
            let Some(node) = node.as_ref().filter(|_| new) else {
                continue;
            };
            let pack = self.current(&mut own, 0)?;
            let Own { table, packs, .. } = &mut *own;
            if let Some(building) = packs.get_mut(pack as usize) {
                table.set(name.fingerprint(), Place { pack, at: building.add_node(node) });
            }
        }
        Ok(names)
    }
}

impl Session for Writer {
    fn put(&self, bytes: &[u8], names: &mut [PageHash]) -> Result<()> {
        let (pages, rest) = bytes.as_chunks::<PAGE_SIZE>();
        if !rest.is_empty() || pages.len() != names.len() {
            return Err(Error::Misuse("put needs whole pages and as many names"));
        }
        let (mut others, mut places) = (Vec::with_capacity(pages.len()), Vec::with_capacity(pages.len()));
        for (page, name) in pages.iter().zip(names.iter_mut()) {
            if *page == ZERO_PAGE {
                *name = PageHash::ZERO;
            } else {
                others.push(page);
                places.push(name);
            }
        }
        self.store.names.pages(others, |number, name| {
            if let Some(place) = places.get_mut(number) {
                **place = name;
            }
        });
        let mut known = vec![None; names.len()];
        self.store.rely_on(&self.relying, names, &mut known);
        self.step(|| {
            let (lane, claims) = self.claim(names, &known)?;
            let written = claims.iter().try_for_each(|(slots, numbers)| slots.write(&runs(bytes, numbers)));
            if let Some(lane) = lane {
                lock(&self.own).lanes.get_mut(lane).into_iter().for_each(|lane| lane.writers -= 1);
            }
            written
        })
    }

    fn put_leaves(&self, pages: &[PageHash], leaves: &mut [PageHash]) -> Result<()> {
        if leaves.len() != pages.len().div_ceil(LEAF_PAGES) {
            return Err(Error::Misuse("put_leaves needs a leaf for 64 pages"));
        }
        self.check_pages(pages)?;
        self.keep_leaves(pages, leaves)
    }

    fn put_run(
        &self,
        bytes: &[u8],
        there: &[bool],
        names: &mut [PageHash],
        leaves: &mut [PageHash],
    ) -> Result<()> {
        let count = there.iter().filter(|there| **there).count();
        if names.len() != there.len() || leaves.len() != names.len().div_ceil(LEAF_PAGES) {
            return Err(Error::Misuse("put_run needs a name for each page and a leaf for 64"));
        }
        if count == there.len() {
            self.put(bytes, names)?;
        } else {
            let mut own = vec![PageHash::ZERO; count];
            self.put(bytes, &mut own)?;
            let mut own = own.into_iter();
            for (name, there) in names.iter_mut().zip(there) {
                *name = if *there { own.next().unwrap_or(PageHash::ZERO) } else { PageHash::ZERO };
            }
        }
        // All of them were looked up just now, in this session.
        self.keep_leaves(names, leaves)
    }

    fn put_map_over(&self, leaves: &[PageHash], pages: u64) -> Result<MapRoot> {
        if leaves.len() as u64 != pages.div_ceil(LEAF_PAGES as u64) {
            return Err(Error::Misuse("put_map_over needs a leaf for 64 pages"));
        }
        self.check_leaves(leaves.iter())?;
        let node = self.step(|| map::levels(leaves, pages, |level| self.keep_nodes(level)))?;
        Ok(MapRoot { node, pages })
    }

    fn put_map_changed(&self, base: &MapRoot, leaves: &[map::NumberedLeaf]) -> Result<MapRoot> {
        let count = base.pages.div_ceil(LEAF_PAGES as u64);
        let ascend = leaves.windows(2).all(|pair| matches!(pair, [a, b] if a.0 < b.0));
        if !ascend || leaves.last().is_some_and(|(number, _)| *number >= count) {
            return Err(Error::Misuse("put_map_changed needs leaves of the map in ascending order"));
        }
        self.check_leaves(leaves.iter().map(|(_, leaf)| leaf))?;
        let mut keep = |level| self.keep_nodes(level);
        let node = self.step(|| map::change(&self.store, base, leaves, &mut keep))?;
        Ok(MapRoot { node, pages: base.pages })
    }

    fn commit(self: Box<Self>) -> Result<Saved> {
        if self.failed.load(Ordering::Relaxed) {
            return Err(Error::SessionFailed);
        }
        let mut own = lock(&self.own);
        let mut saved = own.saved;
        let mut entries = own.entries();
        // Of a large machine these are tens of megabytes, and the entries say the same.
        own.table = Table::default();
        own.leaves = HashSet::new();
        // 1. Content of every pack, behind names that an open removes. The disk may begin with all of them.
        own.packs.iter_mut().for_each(Building::write_back);
        let packs = own.packs.iter_mut().zip(&mut entries);
        let sealed = side_by_side(packs, |(pack, entries)| pack.seal(entries));
        let sealed = sealed.into_iter().collect::<Result<Vec<Layout>>>()?;
        step("pack.sealed");
        // 2. Their names, then the folder that holds the names.
        let disk = &*self.store.disk;
        let paths = own.packs.iter().map(|pack| pack.rename(disk)).collect::<Result<Vec<_>>>()?;
        step("pack.named");
        if !paths.is_empty() {
            disk.sync_folder(&self.store.folder).map_err(Error::io("sync", &self.store.folder))?;
        }
        // 3. Everything is durable: let others find it.
        own.packs.clear();
        saved.bytes_written = sealed.iter().map(|layout| layout.len).sum();
        let packs = paths.into_iter().zip(sealed).zip(entries);
        side_by_side(packs, |((path, layout), entries)| drop(self.store.publish(path, layout, &entries)));
        Ok(saved)
    }
}

impl Own {
    /// A lane that nobody writes to; one more than there are if all are busy and there is reason for another. The first one is begun with
    /// the first page.
    fn choose_lane(&self) -> usize {
        match self.lanes.iter().position(|lane| lane.writers == 0) {
            Some(free) => free,
            None if self.lanes.len() < LANES && self.page_count >= SPREAD_PAGES => self.lanes.len(),
            None => 0,
        }
    }

    /// Footer entries of each pack.
    fn entries(&self) -> Vec<Vec<Entry>> {
        let mut entries: Vec<Vec<Entry>> = self.packs.iter().map(|_| Vec::new()).collect();
        for (name, place) in self.table.iter() {
            let number = place.pack as usize;
            if let (Some(pack), Some(entries)) = (self.packs.get(number), entries.get_mut(number)) {
                entries.push(Entry { name: *name, at: place.at, len: pack.len_at(place.at) });
            }
        }
        entries
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Empty after a commit.
        let own = lock(&self.own);
        own.packs.iter().for_each(|pack| pack.discard(&*self.store.disk));
    }
}

impl Inner {
    /// Makes one pack durable: its content, then its name, then the folder that holds the name.
    pub(crate) fn make_durable(
        &self,
        building: &mut Building,
        entries: &mut [Entry],
    ) -> Result<(Layout, PathBuf)> {
        let layout = building.seal(entries)?;
        let path = building.rename(&*self.disk)?;
        self.disk.sync_folder(&self.folder).map_err(Error::io("sync", &self.folder))?;
        Ok((layout, path))
    }

    /// Adds a durable pack to table and index. Its names win over older places: it is newer than any plan.
    pub(crate) fn publish(&self, path: PathBuf, layout: Layout, entries: &[Entry]) -> Arc<Pack> {
        let pack = self.packs.add(&self.home, path, layout, self.clock.now());
        self.enter(&pack, entries);
        pack
    }
}

/// The bytes of the numbered pages, neighbours joined.
fn runs<'a>(bytes: &'a [u8], numbers: &[usize]) -> Vec<&'a [u8]> {
    numbers
        .chunk_by(|a, b| a + 1 == *b)
        .filter_map(|run| {
            let (first, last) = (run.first()?, run.last()?);
            bytes.get(first * PAGE_SIZE..(last + 1) * PAGE_SIZE)
        })
        .collect()
}
