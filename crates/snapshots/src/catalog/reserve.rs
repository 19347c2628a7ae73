//! Room that the catalog has on a full disk.
//!
//! Whatever makes room (`rm`, `gc`) has to write to the catalog first, and so has whatever ends in order on a full disk. A file of
//! a few MiB lies beside the catalog for that: it is removed when SQLite finds no room, and made again when there is some.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::fault::{Fault, planted};

/// Twice what SQLite lets its write-ahead log grow to: room for a hundred operations at least.
const BYTES: u64 = 8 << 20;
/// The reserve is made only where so many times its size are free: it must not be what fills the disk.
const PLENTY: u64 = 4;

/// The file, there or not.
#[derive(Debug)]
pub(super) struct Reserve {
    path: PathBuf,
}

impl Reserve {
    /// The reserve of the catalog at `path`.
    pub(super) fn beside(path: &Path) -> Self {
        Self { path: path.with_file_name("reserve") }
    }

    /// Bytes that it lacks.
    pub(super) fn lacks(&self) -> u64 {
        if planted(Fault::NoReserve) || self.path.exists() { 0 } else { BYTES }
    }

    /// Removes it; false if there is none to remove.
    pub(super) fn give_up(&self) -> bool {
        let given = fs::remove_file(&self.path).is_ok();
        if given {
            tracing::warn!("the disk is full: the reserve is given up");
        }
        given
    }

    /// Makes it if it is not there and the disk has plenty. That it cannot be made is no reason for anything to fail.
    pub(super) fn keep(&self) {
        if planted(Fault::NoReserve) || fs::metadata(&self.path).is_ok_and(|meta| meta.len() == BYTES) {
            return;
        }
        if let Err(error) = self.make() {
            tracing::debug!(%error, "no reserve for the catalog");
            let _ = fs::remove_file(&self.path);
        }
    }

    fn make(&self) -> io::Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        if crate::room::free(folder)? < PLENTY * BYTES {
            return Ok(());
        }
        let file = File::create(&self.path)?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, BYTES)?;
        Ok(())
    }
}
