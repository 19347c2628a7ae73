//! A disk in memory that keeps two images: what a reader sees now, and what a power cut would leave for certain. What was
//! written and not synced may or may not survive, in any combination.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::disk::{Disk, DiskFile};
use crate::index::Mapping;

/// A lock of the system's whatever the feature `schedules` says: to threads a disk does one thing after the other.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Syncs that are reported as done and not done, to see the checks fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Fault {
    #[default]
    None,
    SkipFileSync,
    SkipFolderSync,
}

/// Which of the writes that were not synced survive a crash.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Survive {
    Nothing,
    Everything,
    /// Each 4 KiB of a write, and each change of a name, by the toss of a seeded coin.
    Some(u64),
}

#[derive(Clone, Default)]
pub(crate) struct CrashDisk(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    fault: Fault,
    /// Changing operations so far.
    operations: u64,
    /// Every operation behind this one fails.
    last: Option<u64>,
    /// So many bytes may still be written.
    room: Option<u64>,
    /// Nothing may be changed.
    read_only: bool,
    /// A stretch of a file that cannot be read.
    bad_sectors: Option<(PathBuf, Range<usize>)>,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    pending_names: Vec<NameChange>,
    files: HashMap<u64, Content>,
}

#[derive(Clone)]
enum NameChange {
    Link(PathBuf, u64),
    Unlink(PathBuf),
    Rename(PathBuf, PathBuf, u64),
}

#[derive(Clone, Default)]
struct Content {
    live: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<(usize, Vec<u8>)>,
    changes: i128,
}

impl CrashDisk {
    pub(crate) fn new(fault: Fault) -> Self {
        let disk = Self::default();
        lock(&disk.0).fault = fault;
        disk
    }

    pub(crate) fn set_fault(&self, fault: Fault) {
        lock(&self.0).fault = fault;
    }

    /// Lets the power fail behind operation number `last`.
    pub(crate) fn crash_after(&self, last: u64) {
        lock(&self.0).last = Some(last);
    }

    pub(crate) fn operations(&self) -> u64 {
        lock(&self.0).operations
    }

    /// Leaves room for so many bytes more.
    pub(crate) fn fill(&self, room: Option<u64>) {
        lock(&self.0).room = room;
    }

    pub(crate) fn set_read_only(&self, read_only: bool) {
        lock(&self.0).read_only = read_only;
    }

    /// Makes a stretch of a file unreadable; without a name, of every file.
    pub(crate) fn rot(&self, bad: Option<(PathBuf, Range<usize>)>) {
        lock(&self.0).bad_sectors = bad;
    }

    /// The disk as it is found after a crash now.
    pub(crate) fn after_crash(&self, survive: Survive) -> Self {
        let old = lock(&self.0);
        let mut random = match survive {
            Survive::Some(seed) => seed | 1,
            _ => 1,
        };
        let mut survives = || match survive {
            Survive::Nothing => false,
            Survive::Everything => true,
            Survive::Some(_) => {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random & 0x100 != 0
            }
        };
        let mut names = old.durable_names.clone();
        for change in old.pending_names.iter().filter(|_| survives()) {
            change.apply(&mut names);
        }
        let mut numbers: Vec<_> = old.files.keys().copied().collect();
        numbers.sort_unstable();
        let mut files = HashMap::new();
        for number in numbers {
            let content = &old.files[&number];
            let mut durable = content.durable.clone();
            for (offset, bytes) in &content.pending {
                for (i, part) in bytes.chunks(4096).enumerate().filter(|_| survives()) {
                    put(&mut durable, offset + i * 4096, part);
                }
            }
            files.insert(
                number,
                Content { live: durable.clone(), durable, pending: Vec::new(), changes: content.changes },
            );
        }
        let state = State { names: names.clone(), durable_names: names, files, ..State::default() };
        Self(Arc::new(Mutex::new(state)))
    }

    /// Paths of all files but those of the index.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        lock(&self.0).names.keys().filter(|path| !path.starts_with("/index")).cloned().collect()
    }

    /// Paths of all packs in the order in which they were begun; their names are random.
    pub(crate) fn packs(&self) -> Vec<PathBuf> {
        let state = lock(&self.0);
        let packs = state.names.iter().filter(|(path, _)| path.extension().is_some_and(|end| end == "pack"));
        let mut packs: Vec<(u64, PathBuf)> = packs.map(|(path, number)| (*number, path.clone())).collect();
        packs.sort_unstable();
        packs.into_iter().map(|(_, path)| path).collect()
    }

    /// Paths of the files of the index.
    pub(crate) fn index_paths(&self) -> Vec<PathBuf> {
        let runs = |path: &&PathBuf| path.extension().is_some_and(|end| end == "run");
        lock(&self.0).names.keys().filter(runs).cloned().collect()
    }

    /// Makes a file with this content, durably.
    pub(crate) fn write(&self, path: &Path, bytes: &[u8]) {
        let mut state = lock(&self.0);
        let number = state.files.keys().max().map_or(0, |last| last + 1);
        state.files.insert(
            number,
            Content { live: bytes.to_vec(), durable: bytes.to_vec(), pending: Vec::new(), changes: 1 },
        );
        state.names.insert(path.to_owned(), number);
        state.durable_names.insert(path.to_owned(), number);
    }

    pub(crate) fn exists(&self, path: &Path) -> bool {
        lock(&self.0).names.contains_key(path)
    }

    pub(crate) fn bytes(&self, path: &Path) -> Vec<u8> {
        let state = lock(&self.0);
        state.files[&state.names[path]].live.clone()
    }

    /// Puts other bytes into a file behind everybody's back.
    pub(crate) fn replace(&self, path: &Path, bytes: &[u8]) {
        let mut state = lock(&self.0);
        let number = state.names[path];
        state.files.insert(
            number,
            Content { live: bytes.to_vec(), durable: bytes.to_vec(), pending: Vec::new(), changes: -1 },
        );
    }
}

impl State {
    /// Counts an operation. `Err` once the power has failed; the first one to fail may still reach the disk.
    fn change(&mut self, act: impl FnOnce(&mut Self)) -> io::Result<()> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        self.operations += 1;
        let behind = self.last.map_or(0, |last| self.operations.saturating_sub(last));
        if behind <= 1 {
            act(self);
        }
        if behind == 0 { Ok(()) } else { Err(io::Error::other("power failed")) }
    }

    /// A sync that fails has done nothing.
    fn sync(&mut self, act: impl FnOnce(&mut Self)) -> io::Result<()> {
        let before_cut = self.last.is_none_or(|last| self.operations < last);
        self.change(|state| {
            if before_cut {
                act(state)
            }
        })
    }

    fn rename_op(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.pending_names.push(change);
    }
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<PathBuf, u64>) {
        match self {
            Self::Link(path, number) => drop(names.insert(path.clone(), *number)),
            Self::Unlink(path) => drop(names.remove(path)),
            Self::Rename(from, to, number) => {
                names.remove(from);
                names.insert(to.clone(), *number);
            }
        }
    }
}

fn put(bytes: &mut Vec<u8>, offset: usize, part: &[u8]) {
    if bytes.len() < offset + part.len() {
        bytes.resize(offset + part.len(), 0);
    }
    bytes[offset..offset + part.len()].copy_from_slice(part);
}

impl Disk for CrashDisk {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = lock(&self.0);
        if state.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let number = state.files.keys().max().map_or(0, |last| last + 1);
        state.change(|state| {
            state.files.insert(number, Content::default());
            state.rename_op(NameChange::Link(path.to_owned(), number));
        })?;
        Ok(Arc::new(CrashFile { disk: self.clone(), number }))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let number = *lock(&self.0).names.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(CrashFile { disk: self.clone(), number }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = lock(&self.0);
        let number = *state.names.get(from).ok_or(io::ErrorKind::NotFound)?;
        state.change(|state| state.rename_op(NameChange::Rename(from.to_owned(), to.to_owned(), number)))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = lock(&self.0);
        if !state.names.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.change(|state| state.rename_op(NameChange::Unlink(path.to_owned())))
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<OsString>> {
        let state = lock(&self.0);
        let own = state.names.keys().filter(|path| path.parent() == Some(folder));
        Ok(own.filter_map(|path| path.file_name()).map(Into::into).collect())
    }

    fn sync_folder(&self, _: &Path) -> io::Result<()> {
        lock(&self.0).sync(|state| {
            if state.fault != Fault::SkipFolderSync {
                state.durable_names = state.names.clone();
                state.pending_names.clear();
            }
        })
    }
}

struct CrashFile {
    disk: CrashDisk,
    number: u64,
}

impl DiskFile for CrashFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let state = lock(&self.disk.0);
        let range = offset as usize..offset as usize + buffer.len();
        if let Some((path, bad)) = &state.bad_sectors
            && (path.as_os_str().is_empty() || state.names.get(path) == Some(&self.number))
            && bad.start < range.end
            && range.start < bad.end
        {
            return Err(rustix::io::Errno::IO.into());
        }
        let bytes = state.files[&self.number].live.get(range).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }

    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        let mut state = lock(&self.disk.0);
        let wanted = parts.iter().map(|part| part.len() as u64).sum();
        if let Some(room) = &mut state.room {
            *room = room.checked_sub(wanted).ok_or(io::ErrorKind::StorageFull)?;
        }
        state.change(|state| {
            let bytes = parts.concat();
            let content = state.files.get_mut(&self.number).unwrap();
            put(&mut content.live, offset as usize, &bytes);
            content.changes += 1;
            content.pending.push((offset as usize, bytes));
        })
    }

    /// What is written back early may survive, and what is not may as well.
    fn write_back(&self, _: u64, _: u64) {}

    fn forget_cached(&self) {}

    fn sync(&self) -> io::Result<()> {
        lock(&self.disk.0).sync(|state| {
            if state.fault != Fault::SkipFileSync {
                let content = state.files.get_mut(&self.number).unwrap();
                content.durable = content.live.clone();
                content.pending.clear();
            }
        })
    }

    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.disk.0).files[&self.number].live.len() as u64)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.len()
    }

    fn modified(&self) -> io::Result<i128> {
        Ok(lock(&self.disk.0).files[&self.number].changes)
    }

    fn map(&self) -> io::Result<Mapping> {
        Ok(Mapping::Read(lock(&self.disk.0).files[&self.number].live.clone()))
    }
}
