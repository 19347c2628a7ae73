//! UNSAFETY: a file is mapped into memory, read-only. That is sound as long as nobody changes the file; see [`map`].
#![expect(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Seek};
use std::ops::Deref;

use crate::reader::is_ours_alone;

/// The bytes of a whole file.
pub(crate) enum Mapping {
    /// Mapped.
    Mapped(memmap2::Mmap),
    /// Read: one that others may change, and what a disk in a test has.
    Read(Vec<u8>),
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(bytes) => bytes,
            Self::Read(bytes) => bytes,
        }
    }
}

/// Files of this length at most are read ahead: 22 million names.
const READ_AHEAD: usize = 512 << 20;

/// Maps a file of the index. One that somebody else may change is read instead.
///
/// # Errors
/// The system refuses; an empty file.
pub(crate) fn map(file: &File) -> io::Result<Mapping> {
    if !is_ours_alone(file)? {
        let mut bytes = Vec::new();
        let mut file = file;
        file.rewind()?;
        file.read_to_end(&mut bytes)?;
        return Ok(Mapping::Read(bytes));
    }
    // SAFETY: memmap2 asks that nobody changes or cuts the file while it is mapped. A run of the index is written once, synced, and
    // never opened for writing again; its name is given to no other content. Nobody but this user and root may write to it, as was just
    // looked up: others, who may be let read it, cannot. What root or this user does to it all the same, or a disk that cannot be read,
    // ends this process by SIGBUS, as memmap2 says: bytes that were read are never anything but bytes. The next start then reads the
    // whole index before it maps it (`runs.rs`).
    let bytes = unsafe { memmap2::Mmap::map(file) }?;
    if bytes.len() <= READ_AHEAD {
        // A hint; without it every look-up of the first take after a start is a read of its own.
        let _ = bytes.advise(memmap2::Advice::WillNeed);
    }
    Ok(Mapping::Mapped(bytes))
}
