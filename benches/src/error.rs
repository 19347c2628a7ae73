//! Why a figure could not be measured.

use std::io;
use std::path::{Path, PathBuf};

use qemu::qmp::QmpError;
use vm_tests::guest::GuestError;

/// Why a figure is missing from the results.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// `spinney` failed.
    #[error("`spinney {command}` failed: {words}")]
    Spinney {
        /// Its arguments.
        command: String,
        /// The last it said.
        words: String,
    },
    /// The guest did not do as it was told.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// A monitor of QEMU's failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// A page store of our own failed.
    #[error(transparent)]
    Pages(#[from] pages::Error),
    /// A tool that Spinney is compared with failed.
    #[error("`{command}` failed: {words}")]
    Tool {
        /// Its name and arguments.
        command: String,
        /// The last it said.
        words: String,
    },
    /// QEMU or qemu-img is missing.
    #[error(transparent)]
    Binary(#[from] qemu::binary::BinaryError),
    /// An image could not be made.
    #[error(transparent)]
    Image(#[from] qemu::image::ImageError),
    /// QEMU's own save or load failed.
    #[error("QEMU's own migration failed: {0}")]
    Migration(String),
    /// An answer lacks what is needed of it.
    #[error("the answer has no {0}")]
    Lacks(&'static str),
    /// Files that should not be in the page cache are.
    #[error("{resident} of {bytes} bytes that should be cold are in the page cache")]
    Warm {
        /// Bytes of them that are there.
        resident: u64,
        /// Bytes that they take.
        bytes: u64,
    },
    /// A file, a folder, a process.
    #[error("cannot {act} {}", path.display())]
    System {
        /// What was being done.
        act: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// This host cannot do what the figure needs.
    #[error("{0}")]
    Unavailable(String),
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

/// Result of measuring.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Names the file that a system call failed on.
pub(crate) fn system(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::System { act, path, source }
}
