//! Creating and opening a store.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::disk::{Disk, HostDisk};
use crate::error::{Error, Problem, Result};
use crate::group::{GroupKey, Names};
use crate::hold::{Clock, Hold};
use crate::index::{Index, Runs};
use crate::map::{NodeCache, differences};
use crate::pack::{Entry, Pack, PackId, Packs, Place, Refused, read_footer, read_layout};
use crate::planted::{Mistake, is_made};
use crate::reader::HostUser;
use crate::session::Writer;
use crate::sync::{Mutex, Ordering, RwLock};
use crate::visit::Visit;
use crate::{Fingerprint, MapRoot, PageHash, PageStore, Purpose, Session};

/// A group's page store, in a folder that this process has for itself. Clones are the same store.
#[derive(Clone)]
pub struct Store {
    pub(crate) inner: Arc<Inner>,
}

/// Sizes that tests make small.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// Pages in a pack at most.
    pub(crate) pack_pages: u32,
    /// Bytes of nodes after which a pack is closed.
    pub(crate) node_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        // 1 GiB of pages; nodes wait in memory for the end of their pack.
        Self { pack_pages: 262_144, node_bytes: 8 << 20 }
    }
}

/// Everything that sessions share with the store.
pub(crate) struct Inner {
    pub(crate) disk: Arc<dyn Disk>,
    /// The store's folder.
    pub(crate) home: PathBuf,
    /// Folder of the packs.
    pub(crate) folder: PathBuf,
    pub(crate) names: Names,
    pub(crate) limits: Limits,
    pub(crate) index: Index,
    pub(crate) packs: Arc<Packs>,
    /// Packs that could not be used at open, by file name, and why.
    pub(crate) set_aside: RwLock<Vec<(String, Problem)>>,
    pub(crate) node_cache: NodeCache,
    pub(crate) clock: Arc<Clock>,
    /// Shared: look-ups that a session relies on. Alone: the collector decides that a pack goes.
    pub(crate) gate: RwLock<()>,
    /// One collection at a time.
    pub(crate) collector: Mutex<()>,
    /// Tells this opening of the store from others.
    pub(crate) instance: u64,
    /// Another process has the store.
    pub(crate) visit: Option<Visit>,
    /// Keeps other processes out.
    _lock: Option<Lock>,
}

/// A file's lock, which ends with this. A child that a thread of ours has forked has the descriptor too until it runs its program, and
/// would keep the lock that long if it were not given up by name.
pub(crate) struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = self.0.unlock();
    }
}

/// Bytes that the files of a store take on the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allocated {
    /// Packs.
    pub packs: u64,
    /// Packs that a repair set aside.
    pub set_aside: u64,
    /// The index.
    pub index: u64,
}

impl Allocated {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.packs + self.set_aside + self.index
    }
}

impl Store {
    /// Makes the folder and puts the key into its file `key`. Fails with [`Error::Exists`] if a store with another key is
    /// there.
    pub fn create(dir: impl AsRef<Path>, key: GroupKey) -> Result<Self> {
        Self::create_for(dir, key, None)
    }

    /// The same, for somebody else to read: [`Store::open_for`].
    pub fn create_for(dir: impl AsRef<Path>, key: GroupKey, reader: Option<HostUser>) -> Result<Self> {
        let dir = dir.as_ref();
        let packs = dir.join("packs");
        DirBuilder::new().recursive(true).mode(0o700).create(&packs).map_err(Error::io("create", &packs))?;
        let path = dir.join("key");
        match fs::exists(&path) {
            Ok(false) => key.write_file(&path)?,
            _ if GroupKey::load(&path)? == key => {}
            _ => return Err(Error::Exists { path: dir.to_owned() }),
        }
        for folder in [Some(dir), dir.parent()].into_iter().flatten().filter(|f| !f.as_os_str().is_empty()) {
            HostDisk::default().sync_folder(folder).map_err(Error::io("sync", folder))?;
        }
        Self::open_for(dir, key, reader)
    }

    /// Opens an existing store: removes what unfinished sessions left and reads the packs' footers. A damaged pack is set
    /// aside: not used, not touched, reported by [`Store::fsck`]. Fails if another process has the store, if a pack is of
    /// a later format, or if all packs belong to another group.
    pub fn open(dir: impl AsRef<Path>, key: GroupKey) -> Result<Self> {
        Self::open_for(dir, key, None)
    }

    /// The same. `reader` may read the files that are made, so that a [`crate::Visitor`] of his can: [`crate::let_read`]. He must be let
    /// through the folders, which he cannot list.
    pub fn open_for(dir: impl AsRef<Path>, key: GroupKey, reader: Option<HostUser>) -> Result<Self> {
        let path = dir.as_ref().join("lock");
        let mut options = OpenOptions::new();
        let lock = options.create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(Error::io("open", &path))?;
        lock.try_lock().map_err(|e| match e {
            fs::TryLockError::WouldBlock => Error::Locked { path: dir.as_ref().to_owned() },
            fs::TryLockError::Error(source) => Error::io("lock", &path)(source),
        })?;
        let index = dir.as_ref().join("index");
        DirBuilder::new().recursive(true).mode(0o700).create(&index).map_err(Error::io("create", &index))?;
        Self::open_on(
            Arc::new(HostDisk { reader }),
            dir.as_ref().to_owned(),
            &key,
            Limits::default(),
            Some(Lock(lock)),
        )
    }

    /// Opens a store's folder on any disk.
    pub(crate) fn open_on(
        disk: Arc<dyn Disk>,
        home: PathBuf,
        key: &GroupKey,
        limits: Limits,
        lock: Option<Lock>,
    ) -> Result<Self> {
        let inner = Inner::new(disk, home, key, limits, lock, None);
        inner.load()?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Keeps what is committed from now on from the collector until the hold is dropped.
    pub fn hold(&self) -> Hold {
        self.inner.clock.hold()
    }

    /// Calls `each` with the stretches of pages, in ascending order, in which two maps of the same length differ, until it returns false.
    /// Costs what differs.
    ///
    /// # Errors
    /// The maps are of different lengths; a part of one is missing or damaged.
    pub fn differences(
        &self,
        one: &MapRoot,
        other: &MapRoot,
        each: &mut dyn FnMut(Range<u64>) -> bool,
    ) -> Result<()> {
        if one.pages != other.pages {
            return Err(Error::Misuse("differences needs maps of the same length"));
        }
        differences(&self.inner, one, other, each).map(drop)
    }

    /// What the files take on the disk.
    pub fn allocated(&self) -> Result<Allocated> {
        let (inner, mut sum) = (&self.inner, Allocated::default());
        for folder in [&inner.folder, &inner.home.join("index")] {
            for name in inner.disk.list(folder).map_err(Error::io("list", folder))? {
                let path = folder.join(&name);
                let part = match path.extension().and_then(|end| end.to_str()) {
                    Some("pack") => &mut sum.packs,
                    Some("bad") => &mut sum.set_aside,
                    Some("run") => &mut sum.index,
                    _ => continue,
                };
                match inner.disk.open(&path).and_then(|file| file.allocated()) {
                    Ok(bytes) => *part += bytes,
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => {} // collected in between
                    Err(e) => return Err(Error::io("measure", &path)(e)),
                }
            }
        }
        Ok(sum)
    }

    /// Number of packs, those set aside included.
    pub fn pack_count(&self) -> usize {
        self.inner.packs.all().len() + self.inner.set_aside_names().len()
    }

    /// Number of pages that lie in packs; one that lies in two counts twice.
    pub fn page_count(&self) -> u64 {
        let own = |pack: &Arc<Pack>| pack.layout.image().is_none();
        self.inner.packs.view().iter().filter(|pack| own(pack)).map(|pack| u64::from(pack.layout.pages)).sum()
    }

    /// Bytes of memory that the index takes; what is mapped of it does not count.
    pub fn index_memory(&self) -> usize {
        self.inner.index.memory_bytes()
    }

    /// Whether [`Store::fold`] has something to do.
    pub fn wants_folding(&self) -> bool {
        self.inner.index.wants_folding()
    }

    /// Moves what the index has in memory to a file, beside everything else. Without it the index is none the worse, but for the memory
    /// that it takes and the time that the next open does.
    pub fn fold(&self) -> Result<()> {
        self.inner.index.fold()
    }

    /// File names of packs that were found damaged at open and are not used.
    pub fn set_aside(&self) -> Vec<String> {
        self.inner.set_aside_names()
    }
}

static NEXT_INSTANCE: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);

impl PageStore for Store {
    fn begin_for(&self, purpose: &Purpose) -> Result<Box<dyn Session>> {
        Ok(Box::new(Writer::new(self.inner.clone(), purpose)))
    }

    fn map_range(&self, root: &MapRoot, first: u64, out: &mut [PageHash]) -> Result<()> {
        self.inner.map_range(root, first, out)
    }

    fn read(&self, hashes: &[PageHash], out: &mut [u8]) -> Result<()> {
        self.inner.read_pages(hashes, out)
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("folder", &self.inner.folder).finish_non_exhaustive()
    }
}

impl Inner {
    /// A store of which nothing is known yet.
    pub(crate) fn new(
        disk: Arc<dyn Disk>,
        home: PathBuf,
        key: &GroupKey,
        limits: Limits,
        lock: Option<Lock>,
        visit: Option<Visit>,
    ) -> Self {
        let (names, packs) = (Names::new(key), Arc::new(Packs::new(disk.clone())));
        let runs = Runs::new(disk.clone(), home.join("index"), names.fingerprint);
        Self {
            index: Index::new(packs.clone(), runs),
            packs,
            disk,
            folder: home.join("packs"),
            home,
            names,
            limits,
            set_aside: RwLock::default(),
            node_cache: NodeCache::default(),
            clock: Arc::default(),
            gate: RwLock::default(),
            collector: Mutex::default(),
            instance: NEXT_INSTANCE.fetch_add(1, Ordering::Relaxed),
            visit,
            _lock: lock,
        }
    }

    /// The packs in the folder, in the order of their ids; `half` gets what a session has not finished.
    pub(crate) fn pack_ids(&self, half: impl Fn(&Path) -> Result<()>) -> Result<Vec<PackId>> {
        let mut ids = Vec::new();
        for name in self.disk.list(&self.folder).map_err(Error::io("list", &self.folder))? {
            let Some(name) = name.to_str() else { continue };
            if name.ends_with(".tmp") {
                half(&self.folder.join(name))?;
            } else if let Some(stem) = name.strip_suffix(".pack")
                && let Ok(id) = u64::from_str_radix(stem, 16)
                && PackId(id).file_name() == name
            {
                ids.push(PackId(id));
            }
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// Fills table and index from the packs in the folder.
    fn load(&self) -> Result<()> {
        let ids = self.pack_ids(|path| self.disk.remove(path).map_err(Error::io("remove", path)))?;
        let mut aside = Vec::new();
        let mut set_aside = |id: PackId, problem: Problem| {
            tracing::warn!(pack = id.file_name(), %problem, "pack set aside");
            aside.push((id.file_name(), problem));
        };
        for id in &ids {
            if let Err(problem) = self.load_pack(*id)? {
                set_aside(*id, problem);
            }
        }
        let known = self.index.runs().open(&self.packs)?;
        for pack in self.packs.all() {
            if known.contains(&pack.layout.id) {
                pack.publish();
                continue;
            }
            let file = self.packs.file(&pack)?;
            match read_footer(&*file, &pack.layout) {
                Ok(entries) => self.enter(&pack, &entries),
                Err(problem) => {
                    self.packs.forget(pack.number);
                    set_aside(pack.layout.id, problem);
                }
            }
        }
        let foreign = aside.iter().filter(|(_, problem)| *problem == Problem::OtherGroup).count();
        if foreign > 0 && foreign == ids.len() {
            return Err(Error::WrongKey { path: self.folder.clone() });
        }
        *crate::sync::write(&self.set_aside) = aside;
        Ok(())
    }

    /// Adds one pack, without its names; the inner error is the reason to set it aside.
    pub(crate) fn load_pack(&self, id: PackId) -> Result<Result<(), Problem>> {
        let path = self.folder.join(id.file_name());
        let file = match self.disk.open(&path) {
            Ok(file) => file,
            Err(e) => return Ok(Err(Problem::Unreadable(e.kind()))),
        };
        match read_layout(&*file, id, &self.names.fingerprint) {
            Ok(layout) => {
                let pack = self.packs.add(&self.home, path, layout, 0);
                self.watch_image(&pack);
                Ok(Ok(()))
            }
            Err(Refused::Damaged(problem)) => Ok(Err(problem)),
            Err(Refused::Newer(version)) => Err(Error::NewerFormat { pack: id.file_name(), version }),
        }
    }

    /// Puts the names of a pack into the index.
    pub(crate) fn enter(&self, pack: &Pack, entries: &[Entry]) {
        for piece in entries.chunks(PIECE) {
            let places = piece.iter().map(|entry| (entry.name, Place { pack: pack.number, at: entry.at }));
            let places: Vec<(Fingerprint, Place)> = places.collect();
            match pack.layout.image() {
                None => self.index.set(&places),
                Some(_) => self.index.set_on_image(&places),
            }
        }
        pack.publish();
    }

    /// A session relies on the pack, or has since a collection with this start was planned.
    pub(crate) fn is_relied_on(&self, pack: &Pack, since: u64) -> bool {
        pack.touched() >= since && !is_made(Mistake::IgnoreTouches)
    }

    pub(crate) fn set_aside_names(&self) -> Vec<String> {
        crate::sync::read(&self.set_aside).iter().map(|(name, _)| name.clone()).collect()
    }

    /// Looks names up for a session that will rely on the answer: packs with a hit are safe from any collection that was
    /// planned before or is planned while the session lives. A name in a pack that is about to go counts as unknown.
    pub(crate) fn rely_on(&self, who: &Relying, names: &[PageHash], known: &mut [Option<Cause>]) {
        let _gate = (!is_made(Mistake::NoGate)).then(|| crate::sync::read(&self.gate));
        let now = self.clock.now();
        let mut last: Option<(u32, Option<Cause>)> = None; // hits mostly come from one pack after the other
        let mut elsewhere = Vec::new();
        self.index.lookup(names, |i, place, pack| {
            let cause = match last {
                Some((number, cause)) if number == place.pack => cause,
                _ => {
                    let cause = who.cause(pack);
                    if cause.is_some() {
                        pack.touch(now);
                    }
                    last = Some((place.pack, cause));
                    cause
                }
            };
            if cause.is_none() && pack.layout.image().is_some() {
                elsewhere.push(i);
            }
            if let Some(known) = known.get_mut(i) {
                *known = cause;
            }
        });
        // The index has one place of a name. An image with the same in it, as a copy of the file has, may be the session's own.
        for i in elsewhere {
            let Some(name) = names.get(i).map(PageHash::fingerprint) else { continue };
            let mut own = who.own_images(self).iter();
            let has = own.find(|(pack, names)| pack.is_usable() && names.binary_search(&name).is_ok());
            if let (Some((pack, _)), Some(known)) = (has, known.get_mut(i)) {
                pack.touch(now);
                *known = Some(Cause::Disk);
            }
        }
    }
}

/// Why a page need not be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The same origin brought it.
    Earlier,
    /// Another one did.
    Other,
    /// It is a block of an image.
    Disk,
}

/// What a session may rely on.
pub(crate) struct Relying {
    pub(crate) origin: crate::Origin,
    images: HashSet<String>,
    /// What its images have, pack by pack, each in order; read when it is first asked for.
    own: OnceLock<Vec<(Arc<Pack>, Vec<Fingerprint>)>>,
}

impl Relying {
    pub(crate) fn new(purpose: &Purpose) -> Self {
        let images = purpose.images.iter().cloned().collect();
        Self { origin: purpose.origin, images, own: OnceLock::new() }
    }

    fn own_images(&self, store: &Inner) -> &[(Arc<Pack>, Vec<Fingerprint>)] {
        self.own.get_or_init(|| {
            let parts = self.images.iter().flat_map(|label| store.parts(label));
            let names = |pack: Arc<Pack>| {
                let file = store.packs.file(&pack).ok()?;
                let footer = read_footer(&*file, &pack.layout).ok()?;
                Some((pack, footer.into_iter().map(|entry| entry.name).collect()))
            };
            parts.filter_map(|(pack, _)| names(pack)).collect()
        })
    }

    /// None if it may not rely on that pack.
    fn cause(&self, pack: &Pack) -> Option<Cause> {
        if !pack.is_usable() {
            return None;
        }
        match pack.layout.image() {
            None if pack.layout.origin == self.origin => Some(Cause::Earlier),
            None => Some(Cause::Other),
            Some(image) => (!image.private || self.images.contains(&image.label)).then_some(Cause::Disk),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.index.runs().close();
    }
}

/// Names put into the index at once.
const PIECE: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_ends_with_its_store_though_a_forked_child_has_the_descriptor_yet() {
        let dir = tempfile::tempdir().unwrap();
        let open = || File::create(dir.path().join("lock")).unwrap();
        let file = open();
        let of_the_child = file.try_clone().unwrap();
        file.try_lock().unwrap();
        let lock = Lock(file);
        assert!(open().try_lock().is_err());
        drop(lock);
        open().try_lock().unwrap();
        drop(of_the_child);
    }
}
