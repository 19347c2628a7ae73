//! A log on the disk whose last entry memory knows too.
//!
//! Each entry is one line of 32 bytes: sixteen hex digits of its number (from 1, without gaps), a
//! space, fourteen hex digits of a checksum, a line feed. An entry is written, synced, and only then
//! counted in memory. So a guest whose memory and disk are of one instant finds on its disk exactly
//! the entries that it counted, or one more. A snapshot that paired memory with another disk, or
//! lost a synced write, shows.
//!
//! Reading the file tells nothing about the disk: the page cache answers, and it came back with
//! memory. The check therefore reads past it, with `O_DIRECT`.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::page::{self, ZERO, mix};
use crate::ticks::Steady;

/// Bytes of an entry.
const ENTRY: usize = 32;

/// `O_DIRECT` of Linux on x86.
const O_DIRECT: i32 = 0o40000;

/// The bytes of entry `number`.
fn entry(number: u64) -> String {
    format!("{number:016x} {:014x}\n", mix(0x10C, number) >> 8)
}

/// The number of the last entry, 0 for none, or the number of the first that is not valid.
fn last(bytes: &[u8]) -> Result<u64, u64> {
    let mut number = 0;
    for line in bytes.chunks(ENTRY) {
        number += 1;
        if line != entry(number).as_bytes() {
            return Err(number);
        }
    }
    Ok(number)
}

/// What a check of the log found.
#[derive(Debug)]
pub(crate) struct Checked {
    /// The last entry that memory counted.
    pub(crate) memory: u64,
    /// The last entry on the disk, or the first that is not valid.
    pub(crate) disk: Result<u64, u64>,
    /// The same by way of the page cache.
    pub(crate) cached: Result<u64, u64>,
}

impl Checked {
    /// Whether memory and disk are of one instant: the disk is at most one entry ahead.
    pub(crate) fn ok(&self) -> bool {
        self.disk.is_ok_and(|disk| disk == self.memory || Some(disk) == self.memory.checked_add(1))
            && self.cached == self.disk
    }
}

/// The file, and the number of the last entry synced.
struct Entries {
    path: PathBuf,
    file: Option<File>,
    last: u64,
    failed: Option<String>,
}

impl Entries {
    /// Opens the log and goes on behind its last valid entry. The first use since the guest's start
    /// takes that number from the disk; from then on memory alone counts.
    fn open(&mut self) -> io::Result<()> {
        if self.file.is_some() {
            return Ok(());
        }
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(&self.path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        self.last = last(&bytes).unwrap_or_else(|bad| bad - 1);
        file.set_len(self.last * ENTRY as u64)?;
        self.file = Some(file);
        Ok(())
    }

    fn step(&mut self, times: u64) -> io::Result<u64> {
        self.open()?;
        for _ in 0..times {
            let Some(file) = self.file.as_mut() else { break };
            file.write_all(entry(self.last + 1).as_bytes())?;
            file.sync_all()?;
            self.last += 1;
        }
        Ok(self.last)
    }

    fn check(&mut self) -> io::Result<Checked> {
        self.open()?;
        if let Some(failure) = &self.failed {
            return Err(io::Error::other(failure.clone()));
        }
        let disk = last(&read_direct(&self.path)?);
        let cached = last(&std::fs::read(&self.path)?);
        Ok(Checked { memory: self.last, disk, cached })
    }
}

/// Reads a file from the disk itself, past the page cache.
fn read_direct(path: &Path) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new().read(true).custom_flags(O_DIRECT).open(path)?;
    let mut bytes = Vec::new();
    let mut page = ZERO;
    loop {
        let got = file.read_at(&mut page.0, bytes.len() as u64)?;
        bytes.extend(page.0.iter().take(got));
        if got < page::SIZE {
            return Ok(bytes);
        }
    }
}

/// The log with the thread that appends to it.
pub(crate) struct Log {
    entries: Arc<Mutex<Entries>>,
    thread: Option<Steady>,
}

impl Log {
    /// A log in the file `path`, which is opened at its first use.
    pub(crate) fn new(path: impl Into<PathBuf>) -> Log {
        let entries = Entries { path: path.into(), file: None, last: 0, failed: None };
        Log { entries: Arc::new(Mutex::new(entries)), thread: None }
    }

    /// Begins to append `rate` entries a second, or as many as the disk takes.
    pub(crate) fn start(&mut self, rate: u64) -> io::Result<()> {
        self.thread = None;
        self.lock().open()?;
        let entries = Arc::clone(&self.entries);
        self.thread = Some(Steady::start(rate, Duration::from_millis(1), move |times| {
            for _ in 0..times {
                let mut entries = entries.lock().unwrap_or_else(PoisonError::into_inner);
                if let Err(error) = entries.step(1) {
                    entries.failed = Some(format!("appending failed: {error}"));
                    return false;
                }
            }
            true
        }));
        Ok(())
    }

    /// Appends `times` entries now; returns the number of the last.
    pub(crate) fn step(&mut self, times: u64) -> io::Result<u64> {
        self.lock().step(times)
    }

    /// Ends the appending and closes nothing.
    pub(crate) fn stop(&mut self) -> u64 {
        self.thread = None;
        self.lock().last
    }

    /// Compares memory with the disk, between two entries.
    pub(crate) fn check(&self) -> io::Result<Checked> {
        self.lock().check()
    }

    /// Closes the file, so that the disk can be unmounted.
    pub(crate) fn close(&mut self) {
        self.thread = None;
        self.lock().file = None;
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(count: u64) -> Vec<u8> {
        (1..=count).flat_map(|number| entry(number).into_bytes()).collect()
    }

    #[test]
    fn an_entry_is_one_line_of_fixed_length() {
        assert_eq!(entry(1).len(), ENTRY);
        assert_eq!(entry(u64::MAX).len(), ENTRY);
        assert_eq!(last(&bytes(300)), Ok(300));
        assert_eq!(last(b""), Ok(0));
    }

    #[test]
    fn damage_is_found_where_it_is() {
        let mut torn = bytes(10);
        torn.truncate(10 * ENTRY - 1);
        assert_eq!(last(&torn), Err(10));
        let mut flipped = bytes(10);
        flipped[4 * ENTRY + 20] ^= 1;
        assert_eq!(last(&flipped), Err(5));
        let mut hole = bytes(10);
        hole.drain(2 * ENTRY..3 * ENTRY);
        assert_eq!(last(&hole), Err(3));
    }

    #[test]
    fn memory_and_disk_of_two_instants_do_not_pass() {
        let checked = |memory, disk, cached| Checked { memory, disk, cached }.ok();
        assert!(checked(7, Ok(7), Ok(7)));
        assert!(checked(7, Ok(8), Ok(8)), "written, not yet counted");
        assert!(!checked(7, Ok(6), Ok(6)), "a synced entry is gone");
        assert!(!checked(7, Ok(9), Ok(9)), "the disk went on without memory");
        assert!(!checked(7, Ok(6), Ok(7)), "only the page cache has it");
        assert!(!checked(7, Err(7), Ok(7)));
    }

    #[test]
    fn appending_goes_on_behind_what_is_valid() {
        let path = std::env::temp_dir().join(format!("spinney-log-{}", std::process::id()));
        std::fs::write(&path, [bytes(3), b"torn".to_vec()].concat()).unwrap();
        let mut log = Log::new(&path);
        assert_eq!(log.step(2).unwrap(), 5);
        assert_eq!(last(&std::fs::read(&path).unwrap()), Ok(5));
        std::fs::remove_file(&path).unwrap();
    }
}
