//! Everything that can go wrong in a store, each variant naming the thing.

use std::io;
use std::path::{Path, PathBuf};

use crate::PageHash;

/// Why the store could not do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{act} {path}")]
    Io {
        /// What was being done, as a verb: "read", "sync".
        act: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Nothing can be read from the disk that the packs are on.
    #[error("the disk does not answer: {path}")]
    NoAnswer {
        /// A file that was asked for.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The caller's arguments do not fit together; a mistake in the program.
    #[error("page store called wrongly: {0}")]
    Misuse(&'static str),
    /// Pages past the end of a map were asked for.
    #[error("pages {first}..{end} asked of a map of {pages} pages")]
    PastEnd {
        /// First page asked for.
        first: u64,
        /// First page behind those asked for.
        end: u64,
        /// Length of the map in pages.
        pages: u64,
    },
    /// No readable pack holds this page or map node.
    #[error("{kind} {name:?} is in no readable pack{}", aside(.set_aside))]
    Missing {
        /// What it is.
        kind: Kind,
        /// Its name.
        name: PageHash,
        /// Packs that were set aside at open, one of which may hold it.
        set_aside: Vec<String>,
    },
    /// A page or map node was read and is not what its name says.
    #[error("{kind} {name:?} in {file} is damaged: {problem}")]
    Damaged {
        /// What it is.
        kind: Kind,
        /// Its name.
        name: PageHash,
        /// The pack or the image, in words.
        file: String,
        /// What is wrong with it.
        problem: Problem,
    },
    /// A pack's own structure is damaged.
    #[error("pack {pack} is damaged: {problem}")]
    DamagedPack {
        /// File name of the pack.
        pack: String,
        /// What is wrong with it.
        problem: Problem,
    },
    /// A pack was written by a later release.
    #[error("pack {pack} has format version {version}; this program reads up to {}", crate::pack::VERSION)]
    NewerFormat {
        /// File name of the pack.
        pack: String,
        /// Its version.
        version: u32,
    },
    /// All packs of the folder belong to another group.
    #[error("the packs in {path} belong to another group than the key")]
    WrongKey {
        /// The store's folder.
        path: PathBuf,
    },
    /// The key file does not hold a key.
    #[error("{path} does not hold a group key: 64 hex digits expected")]
    BadKey {
        /// The key file.
        path: PathBuf,
    },
    /// The folder has a store with another key already.
    #[error("{path} has a page store already")]
    Exists {
        /// The store's folder.
        path: PathBuf,
    },
    /// Another process has the store open.
    #[error("the page store {path} is in use by another process")]
    Locked {
        /// The store's folder.
        path: PathBuf,
    },
    /// An image has changed while its blocks were read.
    #[error("{path} changes while it is read")]
    ImageChanges {
        /// The file.
        path: PathBuf,
    },
    /// An earlier write of this session failed, so it cannot be committed.
    #[error("a write of this session has failed before")]
    SessionFailed,
    /// A repair has given up damaged pages that this session may have met before.
    #[error("damaged pages were given up by a repair meanwhile")]
    Forgotten,
    /// The plan was made by a store that has been closed since, so it does not know what happened in between.
    #[error("the collection was planned before the store was last opened; plan it again")]
    StalePlan,
}

/// Result of a store call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Stored data is damaged or gone, as opposed to a call that cannot be carried out just now.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Missing { .. } | Self::Damaged { .. } | Self::DamagedPack { .. } => true,
            // A sector that cannot be read; a file that is cut or gone under a store that is open.
            Self::Io { act: "read" | "open", source, .. } => {
                let bad_sector = source.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error());
                use io::ErrorKind::{InvalidData, NotFound, UnexpectedEof};
                bad_sector || matches!(source.kind(), NotFound | UnexpectedEof | InvalidData)
            }
            _ => false,
        }
    }

    /// The disk, or the user's share of it, is full.
    pub fn is_no_space(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(self, Self::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded))
    }

    pub(crate) fn io(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { act, path: path.to_owned(), source }
    }

    /// The same for something else that it befell; none but of what the system refused.
    pub(crate) fn again(&self) -> Option<Self> {
        let Self::Io { act, path, source } = self else { return None };
        let again = source.raw_os_error().map(io::Error::from_raw_os_error);
        let source = again.unwrap_or_else(|| source.kind().into());
        Some(Self::Io { act, path: path.clone(), source })
    }

    /// A file that is gone: the collector may have moved its content.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A page of guest memory or disk.
    Page,
    /// A node of a page map.
    Node,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Page => "page",
            Self::Node => "map node",
        })
    }
}

/// How bytes on disk differ from what the format asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Problem {
    /// Shorter than its structure.
    #[error("too short")]
    TooShort,
    /// Does not start with the format's magic bytes.
    #[error("no {0} magic")]
    Magic(&'static str),
    /// A checksum does not fit.
    #[error("wrong checksum of the {0}")]
    Checksum(&'static str),
    /// Fields contradict each other or the file's length.
    #[error("impossible {0}")]
    Field(&'static str),
    /// Content that does not have the hash by which it is named.
    #[error("content does not fit its name")]
    Content,
    /// A block of an image that is not what it was.
    #[error("the file has changed since its blocks were stored")]
    Changed,
    /// Intact, but written for another group.
    #[error("belongs to another group")]
    OtherGroup,
    /// The system cannot read it.
    #[error("cannot be read ({0})")]
    Unreadable(io::ErrorKind),
}

fn aside(packs: &[String]) -> String {
    if packs.is_empty() { String::new() } else { format!(" (set aside as damaged: {})", packs.join(", ")) }
}
