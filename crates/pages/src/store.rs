//! Creating and opening a store.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use crate::disk::{Disk, HostDisk};
use crate::error::{Error, Kind, Problem, Result};
use crate::group::{GroupKey, Names};
use crate::hold::{Clock, Hold};
use crate::index::{Index, Place};
use crate::map::NodeCache;
use crate::pack::{Pack, PackId, Packs, Refused, read_footer, read_layout};
use crate::session::Writer;
use crate::{MapRoot, PageHash, PageStore, Session};

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
    /// Planted fault: the collector does not care what sessions rely on.
    #[cfg(test)]
    pub(crate) ignore_sessions: bool,
}

impl Default for Limits {
    fn default() -> Self {
        // 1 GiB of pages; nodes wait in memory for the end of their pack.
        Self {
            pack_pages: 262_144,
            node_bytes: 8 << 20,
            #[cfg(test)]
            ignore_sessions: false,
        }
    }
}

/// Everything that sessions share with the store.
pub(crate) struct Inner {
    pub(crate) disk: Arc<dyn Disk>,
    /// Folder of the packs.
    pub(crate) folder: PathBuf,
    pub(crate) names: Names,
    pub(crate) limits: Limits,
    pub(crate) pages: Index,
    pub(crate) nodes: Index,
    pub(crate) packs: Packs,
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
    /// Keeps other processes out.
    _lock: Option<File>,
}

impl Store {
    /// Makes the folder and puts the key into its file `key`. Fails with [`Error::Exists`] if a store with another key is
    /// there.
    pub fn create(dir: impl AsRef<Path>, key: GroupKey) -> Result<Self> {
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
            HostDisk.sync_folder(folder).map_err(Error::io("sync", folder))?;
        }
        Self::open(dir, key)
    }

    /// Opens an existing store: removes what unfinished sessions left and reads the packs' footers. A damaged pack is set
    /// aside: not used, not touched, reported by [`Store::fsck`]. Fails if another process has the store, if a pack is of
    /// a later format, or if all packs belong to another group.
    pub fn open(dir: impl AsRef<Path>, key: GroupKey) -> Result<Self> {
        let path = dir.as_ref().join("lock");
        let mut options = OpenOptions::new();
        let lock = options.create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(Error::io("open", &path))?;
        lock.try_lock().map_err(|e| match e {
            fs::TryLockError::WouldBlock => Error::Locked { path: dir.as_ref().to_owned() },
            fs::TryLockError::Error(source) => Error::io("lock", &path)(source),
        })?;
        let folder = dir.as_ref().join("packs");
        Self::open_on(Arc::new(HostDisk), folder, &key, Limits::default(), Some(lock))
    }

    /// Opens a folder of packs on any disk.
    pub(crate) fn open_on(
        disk: Arc<dyn Disk>,
        folder: PathBuf,
        key: &GroupKey,
        limits: Limits,
        lock: Option<File>,
    ) -> Result<Self> {
        let inner = Inner {
            packs: Packs::new(disk.clone()),
            disk,
            folder,
            names: Names::new(key),
            limits,
            pages: Index::default(),
            nodes: Index::default(),
            set_aside: RwLock::default(),
            node_cache: NodeCache::default(),
            clock: Arc::default(),
            gate: RwLock::default(),
            collector: Mutex::default(),
            instance: NEXT_INSTANCE.fetch_add(1, Ordering::Relaxed),
            _lock: lock,
        };
        inner.load()?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Keeps what is committed from now on from the collector until the hold is dropped.
    pub fn hold(&self) -> Hold {
        self.inner.clock.hold()
    }

    /// Bytes that the packs take on the disk, those set aside included, at open or by a repair.
    pub fn allocated_bytes(&self) -> Result<u64> {
        let inner = &self.inner;
        let names = inner.disk.list(&inner.folder).map_err(Error::io("list", &inner.folder))?;
        let is_pack = |name: &OsString| {
            let end = Path::new(name).extension();
            end.is_some_and(|end| end == "pack" || end == "bad")
        };
        let mut sum = 0;
        for path in names.into_iter().filter(is_pack).map(|name| inner.folder.join(name)) {
            match inner.disk.open(&path).and_then(|file| file.allocated()) {
                Ok(bytes) => sum += bytes,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {} // collected in between
                Err(e) => return Err(Error::io("measure", &path)(e)),
            }
        }
        Ok(sum)
    }

    /// Number of packs, those set aside included.
    pub fn pack_count(&self) -> usize {
        self.inner.packs.all().len() + self.inner.set_aside_names().len()
    }

    /// Number of different pages held.
    pub fn page_count(&self) -> usize {
        self.inner.pages.len()
    }

    /// File names of packs that were found damaged at open and are not used.
    pub fn set_aside(&self) -> Vec<String> {
        self.inner.set_aside_names()
    }
}

static NEXT_INSTANCE: AtomicU64 = AtomicU64::new(1);

impl PageStore for Store {
    fn begin(&self) -> Result<Box<dyn Session>> {
        Ok(Box::new(Writer::new(self.inner.clone())))
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
    /// Fills table and index from the packs in the folder.
    fn load(&self) -> Result<()> {
        let mut ids = Vec::new();
        for name in self.disk.list(&self.folder).map_err(Error::io("list", &self.folder))? {
            let Some(name) = name.to_str() else { continue };
            if name.ends_with(".tmp") {
                let path = self.folder.join(name);
                self.disk.remove(&path).map_err(Error::io("remove", &path))?;
            } else if let Some(stem) = name.strip_suffix(".pack")
                && let Ok(id) = u64::from_str_radix(stem, 16)
                && PackId(id).file_name() == name
            {
                ids.push(PackId(id));
            }
        }
        ids.sort_unstable();
        let mut aside = Vec::new();
        for id in &ids {
            match self.load_pack(*id)? {
                Ok(()) => {}
                Err(problem) => {
                    tracing::warn!(pack = id.file_name(), %problem, "pack set aside");
                    aside.push((id.file_name(), problem));
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

    /// Adds one pack; the inner error is the reason to set it aside.
    fn load_pack(&self, id: PackId) -> Result<Result<(), Problem>> {
        let path = self.folder.join(id.file_name());
        let file = match self.disk.open(&path) {
            Ok(file) => file,
            Err(e) => return Ok(Err(Problem::Unreadable(e.kind()))),
        };
        let layout = match read_layout(&*file, id, &self.names.fingerprint) {
            Ok(layout) => layout,
            Err(Refused::Damaged(problem)) => return Ok(Err(problem)),
            Err(Refused::Newer(version)) => {
                return Err(Error::NewerFormat { pack: id.file_name(), version });
            }
        };
        let entries = match read_footer(&*file, &layout) {
            Ok(entries) => entries,
            Err(problem) => return Ok(Err(problem)),
        };
        let pack = self.packs.add(path, layout, 0).number;
        for (kind, index) in [(Kind::Page, &self.pages), (Kind::Node, &self.nodes)] {
            let own = entries.iter().filter(|entry| entry.kind == kind);
            let own: Vec<_> = own.map(|entry| (entry.name, Place { pack, at: entry.at })).collect();
            index.set(&own);
        }
        Ok(Ok(()))
    }

    /// A session relies on the pack, or has since a collection with this start was planned.
    pub(crate) fn is_relied_on(&self, pack: &Pack, since: u64) -> bool {
        #[cfg(test)]
        if self.limits.ignore_sessions {
            return false;
        }
        pack.touched() >= since
    }

    pub(crate) fn set_aside_names(&self) -> Vec<String> {
        crate::sync::read(&self.set_aside).iter().map(|(name, _)| name.clone()).collect()
    }

    /// Looks names up for a session that will rely on the answer: packs with a hit are safe from any collection that was
    /// planned before or is planned while the session lives. A name in a pack that is about to go counts as unknown.
    pub(crate) fn rely_on(&self, index: &Index, names: &[PageHash], known: &mut [bool]) {
        let _gate = crate::sync::read(&self.gate);
        let now = self.clock.now();
        let mut last: Option<(u32, bool)> = None; // hits mostly come from one pack after the other
        index.lookup(names, |i, place| {
            let usable = match last {
                Some((pack, usable)) if pack == place.pack => usable,
                _ => {
                    let pack = self.packs.get(place.pack).filter(|pack| !pack.is_retired());
                    pack.as_ref().inspect(|pack| pack.touch(now));
                    last = Some((place.pack, pack.is_some()));
                    pack.is_some()
                }
            };
            if let Some(known) = known.get_mut(i) {
                *known = usable;
            }
        });
    }
}
