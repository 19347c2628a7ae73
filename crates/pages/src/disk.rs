//! The file operations that a store needs, and no others, so that a test can put a disk that crashes in their place.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Advice, StatVfs};

use crate::fault::syncs;
use crate::index::Mapping;
use crate::reader::{HostUser, let_read, open_as};

/// Operations on names. None is durable before [`Disk::sync_folder`].
pub(crate) trait Disk: Send + Sync {
    /// Creates a file that must not exist.
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>>;
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>>;
    /// The same for a file of a user's that is not known yet: what he may not read is not opened.
    fn open_users(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.open(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Names of the files in a folder, in no order.
    fn list(&self, folder: &Path) -> io::Result<Vec<OsString>>;
    fn sync_folder(&self, folder: &Path) -> io::Result<()>;
}

/// Listings of a folder until two of them are the same, at most.
const LISTINGS: usize = 8;

/// Lists what another process changes meanwhile: until two listings say the same. One alone may miss what came to where it had been, and
/// with it what that replaces, which went from where it had yet to come. If no two agree, all that was in any: what is gone shows when it
/// is opened.
pub(crate) fn list_surely<T: Ord, E>(list: impl Fn() -> Result<BTreeSet<T>, E>) -> Result<BTreeSet<T>, E> {
    let (mut last, mut all) = (list()?, BTreeSet::new());
    for _ in 1..LISTINGS {
        let next = list()?;
        if next == last {
            return Ok(next);
        }
        all.append(&mut last);
        last = next;
    }
    all.append(&mut last);
    Ok(all)
}

/// An open file; positions are absolute, so threads need not agree on one.
pub(crate) trait DiskFile: Send + Sync {
    /// Fills the whole buffer; a file that ends earlier is `UnexpectedEof`.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all parts one behind the other.
    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()>;
    /// Has the system begin to write back what was just written there, without waiting for its end: what is left for
    /// [`DiskFile::sync`] is less then. A hint, not for every page: it costs the processors a moment each time.
    fn write_back(&self, offset: u64, len: u64);
    /// Has the next read come from the disk, of what has been written back.
    fn forget_cached(&self);
    /// Makes content and length durable.
    fn sync(&self) -> io::Result<()>;
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Bytes that the file takes on the disk.
    fn allocated(&self) -> io::Result<u64>;
    /// When the content was last changed, in nanoseconds since 1970.
    fn modified(&self) -> io::Result<i128>;
    /// The whole content, which nobody changes.
    fn map(&self) -> io::Result<Mapping>;
}

/// The host's file system.
#[derive(Debug, Default)]
pub(crate) struct HostDisk {
    /// Someone else than us who may read the files that are made. Users' files are his.
    pub(crate) reader: Option<HostUser>,
}

impl Disk for HostDisk {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        if let Some(reader) = self.reader {
            let_read(&file, reader)?;
        }
        Ok(Arc::new(file))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        // Without a wait: a user may have put a pipe in an image's place.
        Ok(Arc::new(open_as(path, None, true)?))
    }

    fn open_users(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(open_as(path, self.reader, true)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<OsString>> {
        fs::read_dir(folder)?.map(|entry| entry.map(|e| e.file_name())).collect()
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        if syncs() { File::open(folder)?.sync_all() } else { Ok(()) }
    }
}

/// Pages never take the last of a disk, a 64th of it and 64 MiB at most: guests have their disks there too, and one that finds no room
/// stands still.
const ROOM_PART: u64 = 64;
const ROOM_MAX: u64 = 64 << 20;

/// Bytes of the disk of `folder` that no pages are written to.
///
/// # Errors
/// The system says nothing about that disk.
pub fn left_to_others(folder: &Path) -> io::Result<u64> {
    rustix::fs::statvfs(folder).map(|fs| room(&fs)).map_err(Into::into)
}

fn room(fs: &StatVfs) -> u64 {
    (fs.f_blocks.saturating_mul(fs.f_frsize) / ROOM_PART).min(ROOM_MAX)
}

/// Fails as a full disk would if it were one after so many bytes more.
fn leave_room(file: &File, bytes: u64) -> io::Result<()> {
    let fs = rustix::fs::fstatvfs(file)?;
    let free = fs.f_bavail.saturating_mul(fs.f_frsize);
    if free < bytes.saturating_add(room(&fs)) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
}

/// The system takes at most 1,024 parts in one call.
const PARTS_PER_CALL: usize = 1024;

impl DiskFile for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }

    fn write_at(&self, parts: &[&[u8]], mut offset: u64) -> io::Result<()> {
        leave_room(self, parts.iter().map(|part| part.len() as u64).sum())?;
        for group in parts.chunks(PARTS_PER_CALL) {
            let mut slices: Vec<IoSlice<'_>> = group.iter().map(|part| IoSlice::new(part)).collect();
            let mut left = slices.as_mut_slice();
            IoSlice::advance_slices(&mut left, 0); // drops empty parts, which would look like a full disk
            while !left.is_empty() {
                match rustix::io::pwritev(self, left, offset) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(n) => {
                        offset += n as u64;
                        IoSlice::advance_slices(&mut left, n);
                    }
                    Err(rustix::io::Errno::INTR) => {}
                    Err(e) => return Err(e.into()),
                }
            }
        }
        Ok(())
    }

    fn write_back(&self, offset: u64, len: u64) {
        // Linux begins to write such a range before it drops what is clean of it, and this is all dirty (mm/fadvise.c).
        let _ = rustix::fs::fadvise(self, offset, NonZeroU64::new(len), Advice::DontNeed);
    }

    fn forget_cached(&self) {
        let _ = rustix::fs::fadvise(self, 0, None, Advice::DontNeed);
    }

    fn sync(&self) -> io::Result<()> {
        if syncs() { self.sync_all() } else { Ok(()) }
    }

    fn len(&self) -> io::Result<u64> {
        self.metadata().map(|m| m.len())
    }

    fn allocated(&self) -> io::Result<u64> {
        self.metadata().map(|m| m.blocks() * 512)
    }

    fn modified(&self) -> io::Result<i128> {
        self.metadata().map(|m| i128::from(m.mtime()) * 1_000_000_000 + i128::from(m.mtime_nsec()))
    }

    fn map(&self) -> io::Result<Mapping> {
        crate::index::map(self)
    }
}
