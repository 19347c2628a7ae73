//! The file of a frozen layer, opened to be read.
//!
//! Of a group that belongs to somebody else, he may have put another file in an image's place, or other words into a layer's header. So
//! what is read is read as he: we open the file with his rights, and `qemu-img` runs as he. What he may not read gets nowhere near
//! his group's store.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use pages::{HostUser, PAGE_SIZE, open_as};
use qemu::image::QemuImg;

use crate::catalog::{BaseStamp, LayerRow};
use crate::disks::stamp_of;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::groups::{OpenGroup, host_user};

/// An open layer, with what it looked like when it was opened.
#[derive(Debug)]
pub(crate) struct FrozenFile {
    file: File,
    path: PathBuf,
    reader: Option<HostUser>,
    is_users: bool,
    before: Look,
}

/// Which file it is, and its stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Look {
    device: u64,
    inode: u64,
    stamp: BaseStamp,
}

impl Engine {
    /// `qemu-img`, run as whoever the machines of a group run as: for images whose headers he may have written.
    pub(crate) fn img_of(&self, group: &OpenGroup) -> Result<QemuImg> {
        Ok(self.img()?.run_as(group.runs_as().map(|owner| (owner.uid, owner.gid))))
    }

    /// Opens a layer to read it for a group.
    ///
    /// # Errors
    /// It cannot be read by whoever the group's machines run as; it is no file; a user's image is not what it was.
    pub(crate) fn open_frozen(&self, group: &OpenGroup, layer: &LayerRow) -> Result<FrozenFile> {
        let path = self.layer_file(layer);
        let reader = host_user(group.row.owner);
        let opened = open_as(&path, reader, layer.is_users()).and_then(|file| Ok((Look::at(&file)?, file)));
        let (before, file) = opened.map_err(|error| cannot_be_read(&path, error))?;
        if layer.stamp.is_some_and(|known| known != before.stamp) {
            return Err(Error::new(Code::Damaged, format!("{} was changed behind our back", path.display())));
        }
        Ok(FrozenFile { file, path, reader, is_users: layer.is_users(), before })
    }
}

impl FrozenFile {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// What it looked like when it was opened.
    pub(crate) fn stamp(&self) -> BaseStamp {
        self.before.stamp
    }

    /// Bytes of it; zeros fill up the last page of the file.
    ///
    /// # Errors
    /// It ends before.
    pub(crate) fn read(&self, offset: u64, bytes: u64) -> Result<Vec<u8>> {
        read(&self.file, offset, bytes).map_err(|error| cannot_be_read(&self.path, error))
    }

    /// Fails unless what was read is what the name leads to, and nobody has written to it since it was opened.
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        let named = open_as(&self.path, self.reader, self.is_users).and_then(|file| Look::at(&file));
        let looks = Look::at(&self.file).and_then(|now| Ok([now, named?]));
        match looks.map_err(|error| cannot_be_read(&self.path, error))? {
            looks if looks == [self.before; 2] => Ok(()),
            _ => Err(Error::new(Code::Failed, format!("{} changes while it is read", self.path.display()))),
        }
    }
}

impl Look {
    fn at(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        Ok(Self { device: meta.dev(), inode: meta.ino(), stamp: stamp_of(&meta) })
    }
}

/// Bytes of a file. One that ends before is an error, but zeros fill up its last page: a disk's need not be whole.
pub(crate) fn read(file: &File, offset: u64, bytes: u64) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; bytes as usize];
    let mut done = 0;
    while done < buffer.len() {
        let at = offset + done as u64;
        match file.read_at(&mut buffer[done..], at) {
            Ok(0) if done > 0 && offset + bytes <= at.next_multiple_of(PAGE_SIZE as u64) => break,
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(buffer)
}

fn cannot_be_read(path: &Path, error: io::Error) -> Error {
    Error::new(Code::Failed, format!("the layer {} cannot be read", path.display())).because(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_page_may_be_cut() {
        let file = tempfile::tempfile().unwrap();
        let page = PAGE_SIZE as u64;
        file.write_all_at(&[7; 3 * PAGE_SIZE], 0).unwrap();
        file.set_len(2 * page + 512).unwrap();
        let zeros = |bytes: Vec<u8>| bytes.iter().filter(|byte| **byte == 0).count();
        assert_eq!(zeros(read(&file, 0, 3 * page).unwrap()), PAGE_SIZE - 512);
        assert_eq!(zeros(read(&file, page, page + 512).unwrap()), 0);
        for (offset, bytes) in [
            (0, 3 * page + 1),
            (3 * page, page),
            (2 * page + 512, page),
            (0, 4 * page),
            (2 * page + 1024, 512),
        ] {
            assert!(read(&file, offset, bytes).is_err(), "{bytes} at {offset}");
        }
    }
}
