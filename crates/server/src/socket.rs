//! The Unix socket: where it is, and who may open it.

use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use snapshots::Code;

use crate::Problem;

/// Longest path of a Unix socket in bytes; one more is the closing zero of `sun_path`.
const LONGEST: usize = 107;

/// Path of the daemon's socket.
///
/// # Errors
/// The path is longer than a Unix socket's can be.
pub fn path(state: &Path) -> Result<PathBuf, Problem> {
    let path = state.join("spinney.sock");
    let length = path.as_os_str().len();
    if length > LONGEST {
        return Err(Problem::new(
            Code::Usage,
            format!("{} is too long for a Unix socket: {length} bytes of {LONGEST}", path.display()),
        )
        .hint("choose a shorter state folder with --state or SPINNEY_STATE"));
    }
    Ok(path)
}

/// Makes the state folder, for its owner alone. One that exists must not be writable by others: they could put another
/// socket in our socket's place.
///
/// # Errors
/// It cannot be made, is no folder, or others can write to it.
pub fn make_folder(state: &Path) -> Result<(), Problem> {
    let cannot = |error: &io::Error| {
        Problem::new(class(error), format!("cannot make the state folder {}", state.display())).because(error)
    };
    DirBuilder::new().recursive(true).mode(0o700).create(state).map_err(|error| cannot(&error))?;
    let metadata = state.metadata().map_err(|error| cannot(&error))?;
    // Root, too: what it would put there its owner could not use any more.
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(Problem::new(
            Code::NotPermitted,
            format!("the state folder {} belongs to another user (uid {})", state.display(), metadata.uid()),
        )
        .hint("work as that user, or choose another folder with --state or SPINNEY_STATE"));
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(Problem::new(
            Code::NotPermitted,
            format!("others can write to the state folder {}", state.display()),
        )
        .hint(format!("chmod 700 {}", state.display())));
    }
    Ok(())
}

/// The class that the system's reason stands for.
pub(crate) fn class(error: &io::Error) -> Code {
    use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    match error.kind() {
        PermissionDenied | ReadOnlyFilesystem => Code::NotPermitted,
        StorageFull | QuotaExceeded => Code::NoSpace,
        _ => Code::Failed,
    }
}

/// Binds the socket, for its owner alone. The caller holds the lock of the state folder, so a socket that is there
/// belongs to a daemon that is gone.
pub(crate) fn bind(path: &Path) -> Result<tokio::net::UnixListener, Problem> {
    let cannot = |error: io::Error| {
        Problem::new(Code::Failed, format!("cannot listen on {}", path.display())).because(&error)
    };
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(cannot(error)),
    }
    // The folder keeps others out between these two lines.
    let listener = tokio::net::UnixListener::bind(path).map_err(cannot)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(cannot)?;
    Ok(listener)
}

/// The file of a socket that we have bound, to tell it from a successor's under the same path.
#[derive(Debug)]
pub(crate) struct Bound {
    path: PathBuf,
    file: Option<(u64, u64)>,
}

impl Bound {
    pub(crate) fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), file: file_of(path) }
    }

    /// True as long as clients find us under the path.
    pub(crate) fn is_there(&self) -> bool {
        self.file.is_some() && file_of(&self.path) == self.file
    }

    /// Takes the path away, if it is still ours.
    pub(crate) fn remove(&self) {
        if self.is_there() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn file_of(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_path_is_refused_with_a_hint() {
        let state = PathBuf::from("/").join("x".repeat(LONGEST - "/spinney.sock".len() - 1));
        assert!(path(&state).is_ok());
        let problem = path(&state.join("y")).unwrap_err();
        assert_eq!(problem.code, Code::Usage);
        assert!(problem.hint.expect("a hint").contains("--state"));
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("a/b");
        make_folder(&state).unwrap();
        assert_eq!(state.metadata().unwrap().mode() & 0o777, 0o700);
        std::fs::set_permissions(&state, Permissions::from_mode(0o770)).unwrap();
        assert_eq!(make_folder(&state).unwrap_err().code, Code::NotPermitted);
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_ours_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = path(folder.path()).unwrap();
        drop(bind(&path).unwrap());
        assert!(path.exists());
        let _listener = bind(&path).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
    }

    #[tokio::test]
    async fn a_socket_in_place_of_ours_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = path(folder.path()).unwrap();
        let _ours = bind(&path).unwrap();
        let bound = Bound::new(&path);
        assert!(bound.is_there());
        // Moved and not removed, so that its number is not given to the next.
        std::fs::rename(&path, folder.path().join("old")).unwrap();
        assert!(!bound.is_there());
        let _theirs = bind(&path).unwrap();
        bound.remove();
        assert!(path.exists());
    }
}
