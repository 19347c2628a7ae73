//! Reading a store that another process has open, beside its takes, its collector and its compressor.
//!
//! A visitor has no part in the store's bookkeeping: it locks nothing, writes nothing, and relies on what is true of a store's files at
//! every moment. A pack has its name only when it is whole; what a rewritten pack had is in its successor before it goes; every page is
//! compared with its name. So what a visitor knows may be old, and never wrong: when something is not where it should be, it looks at the
//! folder again, and only then is it missing. Whoever has the store must not let go of what visitors may ask for
//! ([`crate::GcRequest::roots`]).

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Dir, FileType};

use crate::disk::{Disk, DiskFile, HostDisk};
use crate::error::{Error, Result};
use crate::group::GroupKey;
use crate::pack::{PackId, read_footer};
use crate::store::{Inner, Limits};
use crate::sync::{Mutex, lock};
use crate::{MapRoot, PageHash};

/// Names that memory may gather before the store's own index is opened anew: 20 MiB or so.
const ENOUGH: usize = 512 << 10;

/// A store that another process has, to be read.
pub struct Visitor {
    inner: Arc<Inner>,
}

/// The folders of a store, opened by somebody who may list them: a visitor may be another user, who is let through to files whose names
/// he knows.
#[derive(Debug)]
pub struct OpenFolders {
    /// Folder of the packs.
    pub packs: OwnedFd,
    /// Folder of the index.
    pub index: OwnedFd,
}

impl OpenFolders {
    /// Opens those of the store in `dir`.
    ///
    /// # Errors
    /// There is no store, or we may not list it.
    pub fn of(dir: &Path) -> Result<Self> {
        let open = |name: &str| {
            let path = dir.join(name);
            let file = std::fs::File::open(&path).map_err(Error::io("open", &path))?;
            Ok::<_, Error>(OwnedFd::from(file))
        };
        Ok(Self { packs: open("packs")?, index: open("index")? })
    }
}

impl Visitor {
    /// Opens the store in `dir`. `doubt` has its index read whole before it is mapped: for a visitor whose predecessor was ended by a
    /// sector that cannot be read.
    ///
    /// # Errors
    /// A folder cannot be listed.
    pub fn open(dir: &Path, key: &GroupKey, folders: OpenFolders, doubt: bool) -> Result<Self> {
        let folder = |name: &str, fd: OwnedFd| {
            let path = dir.join(name);
            let opened = Dir::new(fd).map_err(|error| Error::io("list", &path)(error.into()))?;
            Ok::<_, Error>((path, Mutex::new(opened)))
        };
        let folders = [folder("packs", folders.packs)?, folder("index", folders.index)?];
        Self::open_on(Arc::new(Listed { host: HostDisk::default(), folders }), dir.to_owned(), key, doubt)
    }

    /// Opens a store's folder on any disk.
    pub(crate) fn open_on(disk: Arc<dyn Disk>, home: PathBuf, key: &GroupKey, doubt: bool) -> Result<Self> {
        let visit = Some(Mutex::new(()));
        let inner = Inner::new(disk, home, key, Limits::default(), None, visit);
        inner.find_packs(true)?;
        inner.read_index(doubt)?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Names of pages `first .. first + out.len()` of a map.
    ///
    /// # Errors
    /// They lie behind its end; a part of the map is missing or damaged.
    pub fn map_range(&self, root: &MapRoot, first: u64, out: &mut [PageHash]) -> Result<()> {
        self.inner.map_range(root, first, out)
    }

    /// Reads pages, each compared with its name; `out` is as long as they are.
    ///
    /// # Errors
    /// One is missing or damaged, and there is no other copy of it.
    pub fn read(&self, names: &[PageHash], out: &mut [u8]) -> Result<()> {
        self.inner.read_pages(names, out)
    }
}

impl std::fmt::Debug for Visitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Visitor").field("folder", &self.inner.folder).finish_non_exhaustive()
    }
}

impl Inner {
    /// Of a store that another process has: looks what it has done since. False if this one has the store, and knows.
    pub(crate) fn look_again(&self) -> Result<bool> {
        let Some(visit) = &self.visit else { return Ok(false) };
        let _one = lock(visit);
        self.find_packs(false)?;
        if self.index.in_memory() > ENOUGH {
            self.read_index(false)?;
        }
        Ok(true)
    }

    /// Adds packs that are new and takes out those that are gone. The names of new ones are read, unless the index comes next.
    fn find_packs(&self, without_names: bool) -> Result<()> {
        let ids: HashSet<PackId> = self.pack_ids(|_| Ok(()))?.into_iter().collect();
        let known = self.packs.all();
        let gone: Vec<u32> =
            known.iter().filter(|pack| !ids.contains(&pack.layout.id)).map(|pack| pack.number).collect();
        let known: HashSet<PackId> = known.iter().map(|pack| pack.layout.id).collect();
        let mut new: Vec<PackId> = ids.into_iter().filter(|id| !known.contains(id)).collect();
        new.sort_unstable();
        let first = self.packs.count();
        for id in new {
            // Gone again, or damaged: what is in it is looked for elsewhere, and the store's own process tells of it.
            if let Err(problem) = self.load_pack(id)? {
                tracing::debug!(pack = id.file_name(), %problem, "a pack cannot be used");
            }
        }
        if !without_names {
            self.read_names(first, &HashSet::new())?;
        }
        // Only now: what they had is known elsewhere.
        gone.iter().for_each(|number| self.packs.forget(*number));
        if !gone.is_empty() {
            let view = self.packs.view();
            self.index.retain(|place| view.get(place.pack).is_some());
        }
        Ok(())
    }

    /// Reads the names of packs from number `first` on, but for those that the index has.
    fn read_names(&self, first: u32, indexed: &HashSet<PackId>) -> Result<()> {
        for pack in self.packs.all().into_iter().filter(|pack| pack.number >= first) {
            if indexed.contains(&pack.layout.id) {
                continue;
            }
            let names = self.packs.file(&pack).map(|file| read_footer(&*file, &pack.layout));
            match names {
                Ok(Ok(entries)) => self.enter(&pack, &entries),
                _ => self.packs.forget(pack.number),
            }
        }
        Ok(())
    }

    /// Opens the store's own index, and reads only the names that it does not have.
    fn read_index(&self, doubt: bool) -> Result<()> {
        let indexed = self.index.runs().visit(&self.packs, doubt)?;
        let view = self.packs.view();
        let is_indexed = |number: u32| view.get(number).is_some_and(|pack| indexed.contains(&pack.layout.id));
        self.index.retain(|place| !is_indexed(place.pack));
        let unread = |number: u32| view.get(number).is_some_and(|pack| !pack.is_published());
        let first = view.iter().map(|pack| pack.number).find(|number| unread(*number));
        view.iter().filter(|pack| indexed.contains(&pack.layout.id)).for_each(|pack| pack.publish());
        first.map_or(Ok(()), |first| self.read_names(first, &indexed))
    }
}

/// The host's file system, with folders that can only be listed through what was opened before.
struct Listed {
    host: HostDisk,
    folders: [(PathBuf, Mutex<Dir>); 2],
}

impl Disk for Listed {
    fn create(&self, _: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.host.open(path)
    }

    fn rename(&self, _: &Path, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn remove(&self, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<OsString>> {
        let (_, opened) =
            self.folders.iter().find(|(path, _)| path == folder).ok_or(io::ErrorKind::NotFound)?;
        let mut opened = lock(opened);
        opened.rewind();
        let mut names = Vec::new();
        while let Some(entry) = opened.read() {
            let entry = entry?;
            if entry.file_type() != FileType::Directory {
                names.push(OsString::from_vec(entry.file_name().to_bytes().to_vec()));
            }
        }
        Ok(names)
    }

    fn sync_folder(&self, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}
