//! What the workload does with the disk besides the log: the known file, and writing without syncing.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use crate::page::{self, PER_MIB, ZERO, mix, randomise};
use crate::ticks::Steady;

/// Where the disk is mounted in the guest.
pub(crate) const DATA: &str = "/data";

/// The file of known content, whose blocks `fill` copies.
pub(crate) const KNOWN: &str = "/data/known";

/// How much of the disk the unsynced writer goes round in, in MiB.
const SCRATCH_MIB: usize = 64;

/// Writes the known file: `mib` MiB of incompressible blocks, each different, the same every time.
pub(crate) fn write_known(path: &Path, mib: usize) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    let mut block = ZERO;
    for index in 0..mib.saturating_mul(PER_MIB) {
        randomise(&mut block.0, mix(0xD15C, index as u64));
        file.write_all(&block.0)?;
    }
    file.flush()
}

/// Whether the disk is mounted.
pub(crate) fn mounted() -> bool {
    std::fs::read_to_string("/proc/mounts")
        .is_ok_and(|mounts| mounts.lines().any(|line| line.split(' ').nth(1) == Some(DATA)))
}

/// Begins to write `mib` MiB a second round and round a file, never syncing it.
pub(crate) fn start_writing(mib: u64) -> io::Result<Steady> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open("/data/scratch")?;
    let mut block = ZERO;
    let mut written = 0_usize;
    Ok(Steady::start(mib.saturating_mul(PER_MIB as u64), Duration::from_millis(5), move |blocks| {
        for _ in 0..blocks {
            randomise(&mut block.0, mix(0x5C4A, written as u64));
            let at = written % (SCRATCH_MIB * PER_MIB) * page::SIZE;
            if let Err(error) = file.write_all_at(&block.0, at as u64) {
                eprintln!("workload: writing to the disk stopped: {error}");
                return false;
            }
            written += 1;
        }
        true
    }))
}
