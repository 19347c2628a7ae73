//! The disk that everything ends on: how fast it is right now, and what files take on it.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Result, system};

/// Bytes written to see how fast the disk is.
const PROBE_BYTES: usize = 256 << 20;
const CHUNK: usize = 1 << 20;

/// Megabytes (10^6 bytes) a second of a sequential write with fsync into a new file in `folder`.
pub(crate) fn write_speed(folder: &Path) -> Result<f64> {
    let path = folder.join("disk-speed");
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let words = (0..CHUNK / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    let chunk: Vec<u8> = words.collect();
    let mut file = File::create_new(&path).map_err(system("make", &path))?;
    let began = Instant::now();
    for _ in 0..PROBE_BYTES / CHUNK {
        file.write_all(&chunk).map_err(system("write", &path))?;
    }
    file.sync_all().map_err(system("sync", &path))?;
    let took = began.elapsed();
    fs::remove_file(&path).map_err(system("remove", &path))?;
    settle(folder)?;
    Ok(PROBE_BYTES as f64 / 1e6 / took.as_secs_f64())
}

/// Has everything written back that earlier work left in the page cache, so that nobody's time includes it.
pub(crate) fn settle(folder: &Path) -> Result<()> {
    let open = File::open(folder).map_err(system("open", folder))?;
    rustix::fs::syncfs(&open).map_err(|errno| system("sync", folder)(errno.into()))?;
    std::thread::sleep(Duration::from_millis(200));
    Ok(())
}

/// Bytes that the files below `path` take, or the file `path` itself; 0 if it is not there.
pub(crate) fn allocated(path: &Path) -> u64 {
    let Ok(meta) = fs::symlink_metadata(path) else { return 0 };
    let below = match fs::read_dir(path) {
        Ok(entries) if meta.is_dir() => entries.flatten().map(|entry| allocated(&entry.path())).sum(),
        _ => 0,
    };
    meta.blocks() * 512 + below
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocated_bytes_are_summed_through_folders() {
        let folder = tempfile::tempdir().unwrap();
        let before = allocated(folder.path());
        fs::create_dir(folder.path().join("a")).unwrap();
        fs::write(folder.path().join("a/b"), vec![1; 100_000]).unwrap();
        settle(folder.path()).unwrap();
        assert!(allocated(folder.path()) >= before + 100_000);
        assert_eq!(allocated(&folder.path().join("missing")), 0);
    }
}
