//! A small ext4 of its own, to be filled and emptied.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};
use tempfile::TempDir;

use crate::harness::tool;

/// A file system in a file, mounted until dropped.
#[derive(Debug)]
pub struct SmallDisk {
    /// The image, and the folder that it is mounted at.
    folder: TempDir,
}

impl SmallDisk {
    /// Makes and mounts one of so many MiB. None where that is not allowed: it takes root and a loop device.
    ///
    /// # Panics
    /// It cannot be made though it should.
    pub fn new(mib: u64) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("not root: nothing is mounted, and nothing tested");
            return None;
        }
        let folder = tempfile::Builder::new().prefix("fs-").tempdir().expect("a temporary folder");
        let (image, place) = (folder.path().join("image"), folder.path().join("d"));
        File::create(&image).and_then(|file| file.set_len(mib << 20)).expect("an image");
        fs::create_dir(&place).expect("a folder");
        // Without a part that is set aside for root: tests run as root.
        let words = ["-q", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=0"].map(Path::new);
        let made = tool("mkfs.ext4", words.into_iter().chain([image.as_path()]));
        assert!(made.status.success(), "{made:?}");
        let mounted = tool("mount", [Path::new("-o"), Path::new("loop"), &image, &place]);
        assert!(mounted.status.success(), "{mounted:?}");
        Some(Self { folder })
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("d")
    }

    fn ballast(&self) -> PathBuf {
        self.path().join("ballast")
    }

    /// Bytes that may still be written.
    ///
    /// # Panics
    /// It cannot be asked.
    pub fn free(&self) -> u64 {
        let fs = rustix::fs::statvfs(self.path()).expect("the file system");
        fs.f_bavail * fs.f_frsize
    }

    /// Fills it to the last block.
    ///
    /// # Panics
    /// It cannot be filled.
    pub fn fill(&self) {
        self.fill_but(0);
        // What is too little for a block of `fallocate` with its bookkeeping is filled by writing.
        let mut file =
            File::options().append(true).create(true).open(self.path().join("rest")).expect("a file");
        while file.write_all(&[1; 4096]).is_ok() {}
    }

    /// Fills it so that so many bytes are left, about.
    ///
    /// # Panics
    /// It cannot be filled.
    pub fn fill_but(&self, leave: u64) {
        let file =
            File::options().write(true).create(true).truncate(false).open(self.ballast()).expect("a file");
        let mut step = 256 << 20;
        while step >= 4096 {
            let at = file.metadata().expect("its length").len();
            let room = self.free().saturating_sub(leave);
            if step > room || fallocate(file.as_fd(), FallocateFlags::empty(), at, step).is_err() {
                step /= 2;
            }
        }
    }

    /// Gives back what was filled.
    pub fn empty(&self) {
        let _ = (fs::remove_file(self.ballast()), fs::remove_file(self.path().join("rest")));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process that is only just gone may still hold it.
        let unmounted = tool("umount", [Path::new("-l"), &self.path()]);
        if !unmounted.status.success() {
            eprintln!("{} stays mounted: {unmounted:?}", self.path().display());
        }
    }
}
