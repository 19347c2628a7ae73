//! Files in a folder that is not ours, until what they are made for is done.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// A file that goes unless the operation that makes it gets to its end. It is told by more than its name, which somebody may have given
/// to another file by then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HalfMade {
    path: PathBuf,
    /// None before it is there.
    is: Option<Identity>,
}

/// What tells a file from all others that a file system has or had: inodes are given away again. (Device numbers may be others after the
/// host was started anew.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    inode: u64,
    /// When it was made, in nanoseconds since 1970; none where the file system does not say.
    born: Option<u64>,
}

impl Identity {
    fn of(meta: &Metadata) -> Self {
        let since = meta.created().ok().and_then(|born| born.duration_since(SystemTime::UNIX_EPOCH).ok());
        Self { inode: meta.ino(), born: since.and_then(|since| u64::try_from(since.as_nanos()).ok()) }
    }
}

impl HalfMade {
    /// One that is about to be made.
    pub(crate) fn at(path: &Path) -> Self {
        Self { path: path.to_owned(), is: None }
    }

    /// Makes it, empty and for its owner alone. Fails if there is anything of that name.
    pub(crate) fn make(&mut self) -> io::Result<()> {
        let file = fs::File::options().write(true).create_new(true).mode(0o600).open(&self.path)?;
        self.is = Some(Identity::of(&file.metadata()?));
        Ok(())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes it, if it was made and is that file still.
    pub(crate) fn remove(&self) {
        let found = self.path.symlink_metadata().ok().map(|meta| Identity::of(&meta));
        if self.is.is_some() && found == self.is {
            crate::disks::remove_file(&self.path);
        }
    }

    /// The same for one of an earlier process. If it may be there all the same, what people should know of it.
    pub(crate) fn remove_after_crash(&self) -> Option<String> {
        let there = self.path.symlink_metadata().ok().map(|meta| Identity::of(&meta));
        let certain = self.is.is_some_and(|is| is.born.is_some());
        if certain && there == self.is {
            self.remove();
        }
        let gone = match self.path.symlink_metadata() {
            Ok(meta) => certain && self.is != Some(Identity::of(&meta)),
            // Its file system may not be mounted yet.
            Err(_) => self.path.parent().is_some_and(Path::exists),
        };
        (!gone).then(|| {
            format!("{} may be left of a clone that was not finished; it can be removed", self.path.display())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_file_of_the_same_name_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let mut half = HalfMade::at(&path);
        half.make().unwrap();
        assert!(half.make().is_err());
        fs::write(&path, "half").unwrap();
        half.remove();
        assert!(!path.exists());
        half.make().unwrap();
        fs::remove_file(&path).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        fs::write(&path, "somebody's").unwrap();
        half.remove();
        assert_eq!(half.remove_after_crash(), None, "it may have the inode, and was made later");
        // Of one that was never made nothing is known but the name.
        HalfMade::at(&path).remove();
        assert!(HalfMade::at(&path).remove_after_crash().is_some_and(|words| words.contains("may be left")));
        assert!(path.exists());
    }

    #[test]
    fn what_was_begun_before_a_crash_goes_or_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let mut half = HalfMade::at(&path);
        half.make().unwrap();
        let read: HalfMade = serde_json::from_str(&serde_json::to_string(&half).unwrap()).unwrap();
        assert_eq!(read.remove_after_crash(), None);
        assert!(!path.exists());
        assert_eq!(read.remove_after_crash(), None, "it is gone already");
        let elsewhere = HalfMade { path: folder.path().join("not-mounted/a"), ..read };
        assert!(elsewhere.remove_after_crash().is_some());
    }
}
