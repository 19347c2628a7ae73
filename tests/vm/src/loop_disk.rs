//! A small disk of our own, so that the power can be cut: what was not synced is lost, truly.
//!
//! An ext4 file system on a loop device over a sparse file. `commit=300` keeps the kernel from committing its journal by time, so
//! that nothing is on the disk but what somebody synced (and what the kernel chose to write back meanwhile, as on any host). The cut
//! is ext4's own `EXT4_IOC_SHUTDOWN` without a flush of the log: from that instant on nothing reaches the device any more. Then the
//! file system is unmounted and mounted again, which replays the journal as the next boot of a host would.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::tool;

/// Size of the disk.
const BYTES: u64 = 4 << 30;
/// `EXT4_IOC_SHUTDOWN` with `EXT4_GOING_FLAGS_NOLOGFLUSH`. Perl is on every Debian; this crate has no unsafe code.
const SHUTDOWN: &str = "open(my $f, '<', $ARGV[0]) or die $!; my $how = pack('L', 2); \
     ioctl($f, 0x8004587D, $how) or die $!;";

/// A mounted disk; unmounted when dropped.
#[derive(Debug)]
pub struct LoopDisk {
    image: PathBuf,
    folder: PathBuf,
}

impl LoopDisk {
    /// Makes a disk with its image in `scratch` and mounts it at `folder`. The error says why that cannot be had here.
    pub fn mount(scratch: &Path, folder: &Path) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("only root can mount a disk".to_owned());
        }
        let disk = Self { image: scratch.join("disk.img"), folder: folder.to_owned() };
        let file = std::fs::File::create(&disk.image).map_err(|error| error.to_string())?;
        file.set_len(BYTES).map_err(|error| error.to_string())?;
        std::fs::create_dir_all(folder).map_err(|error| error.to_string())?;
        let image = disk.image.display().to_string();
        run("/sbin/mke2fs", &["-q", "-t", "ext4", "-E", "lazy_itable_init=1", &image])?;
        disk.attach()?;
        Ok(disk)
    }

    fn attach(&self) -> Result<(), String> {
        let (image, folder) = (self.image.display().to_string(), self.folder.display().to_string());
        run("mount", &["-o", "loop,commit=300", &image, &folder])
    }

    /// From here on nothing reaches the disk.
    ///
    /// # Panics
    /// The file system does not know how.
    pub fn cut(&self) {
        run("perl", &["-e", SHUTDOWN, &self.folder.display().to_string()]).expect("the cut");
    }

    /// The next boot: the disk with what was on it. Nobody may have a file of it open.
    ///
    /// # Panics
    /// It cannot be mounted.
    pub fn boot(&self) {
        self.detach();
        self.attach().expect("the disk after the cut");
    }

    fn detach(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while let Err(error) = run("umount", &[&self.folder.display().to_string()]) {
            // A process that was killed holds its files until it is gone to the last.
            assert!(Instant::now() < deadline, "{error}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        let _ = run("umount", &["-l", &self.folder.display().to_string()]);
    }
}

fn run(program: &str, words: &[&str]) -> Result<(), String> {
    let output = tool(program, words);
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{program}: {}", said.trim())) }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write;

    use super::*;

    #[test]
    fn what_was_not_synced_is_lost() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("disk");
        let disk = match LoopDisk::mount(scratch.path(), &folder) {
            Ok(disk) => disk,
            Err(why) => {
                eprintln!("SKIPPED, and nothing tested: {why}");
                return;
            }
        };
        let write = |name: &str| {
            let mut file = File::create(folder.join(name)).unwrap();
            file.write_all(&[7; 5000]).unwrap();
            file
        };
        write("synced").sync_all().unwrap();
        drop(write("lost"));
        disk.cut();
        assert!(File::create(folder.join("late")).is_err(), "nothing can be written after the cut");
        disk.boot();
        assert_eq!(fs::read(folder.join("synced")).unwrap(), [7; 5000]);
        assert!(fs::read(folder.join("lost")).map_or(true, |bytes| bytes.is_empty()));
        assert!(!folder.join("late").exists());
    }
}
