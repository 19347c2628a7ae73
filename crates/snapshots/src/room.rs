//! Free space: how much there is, and what has to be there before anything begins.

use std::io;
use std::path::Path;

use crate::engine::Engine;
use crate::error::{Code, Error, MAKE_ROOM, Result};

/// What an overlay file takes at least, and then some: header, tables, refcounts.
const OVERLAY: u64 = 512 << 10;
/// What everything else of the smallest take or goto takes: a pack with a device state, the files of a QEMU, the catalog.
const SMALLEST: u64 = 1 << 20;

/// Bytes that may still be written to the file system of this folder.
pub(crate) fn free(folder: &Path) -> io::Result<u64> {
    let fs = rustix::fs::statvfs(folder)?;
    // What is set aside for root stays so, for root too: it is there to get a full disk in order.
    Ok(fs.f_bavail.saturating_mul(fs.f_frsize))
}

impl Engine {
    /// Refuses what cannot have room for so many overlays, before anything is made. What memory will take nobody knows before it
    /// has been read: of most guests the store has most pages already. So only the impossible is refused, and the rest rolled back.
    pub(crate) fn check_room(&self, overlays: usize) -> Result<()> {
        self.check_free(SMALLEST + OVERLAY * overlays as u64)
    }

    /// The same for what stores pages, which leave the last of a disk to others.
    pub(crate) fn check_room_for_pages(&self, overlays: usize) -> Result<()> {
        let left = pages::left_to_others(self.state()).unwrap_or(0);
        self.check_free(SMALLEST + OVERLAY * overlays as u64 + left)
    }

    /// Bytes that copies may take there: guests have their disks there too, and one that finds no room stands still.
    pub(crate) fn room_for_copies(&self, folder: &Path) -> u64 {
        let left = pages::left_to_others(folder).unwrap_or(0) + self.catalog.reserve_lacks();
        free(folder).unwrap_or(u64::MAX).saturating_sub(left)
    }

    /// Refuses copies for which there is no room; `what` they are for is said ("copying web").
    pub(crate) fn check_room_for_copy(&self, folder: &Path, what: &str, need: u64) -> Result<()> {
        let room = self.room_for_copies(folder);
        if room >= need {
            return Ok(());
        }
        Err(Error::new(
            Code::NoSpace,
            format!(
                "{what} takes up to {} MiB, and the disk of {} has {} MiB left for it",
                need.div_ceil(1 << 20),
                folder.display(),
                room >> 20
            ),
        )
        .hint(MAKE_ROOM))
    }

    /// Refuses nothing as long as anything has room: what has failed then has failed for another reason.
    pub(crate) fn check_not_out_of_room(&self) -> Result<()> {
        self.check_least(SMALLEST)
    }

    fn check_free(&self, least: u64) -> Result<()> {
        // What the catalog needs to get out of a full disk is not for what fills it.
        self.check_least(least + self.catalog.reserve_lacks())
    }

    fn check_least(&self, least: u64) -> Result<()> {
        match free(self.state()) {
            Ok(free) if free < least => Err(Error::new(
                Code::NoSpace,
                format!(
                    "the disk of {} is full: {} KiB are left, and nothing is begun with less than {}",
                    self.state().display(),
                    free >> 10,
                    least >> 10
                ),
            )
            .hint(MAKE_ROOM)),
            _ => Ok(()),
        }
    }
}
