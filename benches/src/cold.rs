//! Files that the page cache has nothing of: synced, forgotten, and looked at afterwards. Nobody else's files are touched.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::error::{Error, Result, system};
use crate::warm::{each_file, forget_files};

/// More than so much of them in the page cache, one byte in so many, is not cold.
const LIMIT: u64 = 200;
/// Files that `fincore` is given at a time.
const AT_ONCE: usize = 256;
/// How often forgetting is tried: what is being written back, or read, stays.
const TRIES: u32 = 5;
const BETWEEN: Duration = Duration::from_millis(200);

/// What is in the page cache of files.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Residency {
    /// Bytes that are there.
    pub(crate) resident: u64,
    /// Bytes that the files take.
    pub(crate) bytes: u64,
}

impl Residency {
    fn is_cold(self) -> bool {
        self.resident <= self.bytes / LIMIT
    }
}

/// Has the page cache forget these files, and those below these folders, and sees that it has.
///
/// # Errors
/// Much of them stays there, or nobody can tell ([`Error::Unavailable`]).
pub(crate) fn forget(places: &[PathBuf]) -> Result<Residency> {
    let mut left = Residency::default();
    for _ in 0..TRIES {
        places.iter().try_for_each(|place| forget_files(place))?;
        left = residency(places)?;
        if left.is_cold() {
            return Ok(left);
        }
        thread::sleep(BETWEEN);
    }
    let Residency { resident, bytes } = left;
    Err(Error::Warm { resident, bytes })
}

/// How much of files is in the page cache, as `mincore` has it.
pub(crate) fn residency(places: &[PathBuf]) -> Result<Residency> {
    let mut files = Vec::new();
    for place in places {
        each_file(place, &mut |path| {
            files.push(path.to_owned());
            Ok(())
        })?;
    }
    let mut found = Residency::default();
    for files in files.chunks(AT_ONCE) {
        found.resident += resident(files)?;
        found.bytes += files.iter().map(|file| crate::disk::allocated(file)).sum::<u64>();
    }
    Ok(found)
}

fn resident(files: &[PathBuf]) -> Result<u64> {
    let mut command = Command::new("fincore");
    command.args(["--bytes", "--noheadings", "--raw", "--output", "RES", "--"]).args(files);
    let output = command.output().map_err(|error| Error::Unavailable(format!("no `fincore`: {error}")))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Error::Tool { command: "fincore".into(), words });
    }
    let numbers = String::from_utf8_lossy(&output.stdout);
    let numbers = numbers.lines().map(|line| line.trim().parse::<u64>());
    numbers.sum::<std::result::Result<u64, _>>().map_err(|_| Error::Lacks("resident bytes"))
}

/// What of a state folder is to be cold: packs and disk layers. The index is mapped by the daemon, whose it stays: what is mapped is not
/// forgotten.
pub(crate) fn stored(state: &Path) -> Result<Vec<PathBuf>> {
    let groups = state.join("groups");
    let entries = std::fs::read_dir(&groups).map_err(system("list", &groups))?;
    let folders = entries.flatten().flat_map(|group| {
        ["pages/packs", "layers"]
            .map(|folder| group.path().join(folder))
            .into_iter()
            .filter(|path| path.is_dir())
    });
    Ok(folders.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_just_written_is_there_and_what_was_forgotten_is_not() {
        // Memory is all that a file in a tmpfs has.
        let Ok(folder) = tempfile::tempdir_in("/var/tmp") else { return };
        std::fs::create_dir(folder.path().join("a")).unwrap();
        let file = folder.path().join("a/b");
        std::fs::write(&file, vec![1; 8 << 20]).unwrap();
        let places = [folder.path().to_owned()];
        let before = residency(&places).unwrap();
        assert!(before.resident >= 8 << 20 && !before.is_cold(), "{before:?}");
        let after = forget(&places).unwrap();
        assert!(after.bytes >= 8 << 20 && after.is_cold(), "{after:?}");
    }
}
