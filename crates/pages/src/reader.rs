//! Letting another user of the host read a store's files, and do nothing else with them; and reading his files as he.
//!
//! The files stay ours: the index is mapped into the memory of whoever has the store, and a file that somebody else may cut or change
//! must not be (`index/mapping.rs`). An access list names the one user who may read, as `setfacl` would set it; Linux gives them their
//! form as an extended attribute (`posix_acl_xattr.h`).

use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::Path;
use std::thread;

use rustix::fs::{Mode, OFlags, XattrFlags, fsetxattr};
use rustix::io::Errno;
use rustix::process::{Gid, Uid, geteuid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

/// A user of the host, by the numbers of user and group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostUser {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

const ACL_VERSION: u32 = 2;
const NO_ID: u32 = u32::MAX;
const READ: u16 = 4;
const WRITE: u16 = 2;

/// The access list of a file that its owner reads and writes, `reader` reads, and nobody else gets at.
fn access_list(reader: u32) -> Vec<u8> {
    // Tags: owner, a user, the owner's group, what the two before may have at most, everybody else.
    let entries = [
        (0x01, READ | WRITE, NO_ID),
        (0x02, READ, reader),
        (0x04, 0, NO_ID),
        (0x10, READ, NO_ID),
        (0x20, 0, NO_ID),
    ];
    let mut list = ACL_VERSION.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        list.extend_from_slice(&u16::to_le_bytes(tag));
        list.extend_from_slice(&u16::to_le_bytes(rights));
        list.extend_from_slice(&u32::to_le_bytes(id));
    }
    list
}

/// Lets `reader` read a file, which becomes or stays ours. On a file system without access lists it becomes his; the store then never
/// maps it.
///
/// # Errors
/// The system refuses.
pub fn let_read(file: &File, reader: HostUser) -> io::Result<()> {
    let us = geteuid();
    if file.metadata()?.uid() != us.as_raw() {
        fchown(file, Some(us.as_raw()), None)?;
    }
    match fsetxattr(file, "system.posix_acl_access", &access_list(reader.uid), XattrFlags::empty()) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP) => fchown(file, Some(reader.uid), Some(reader.gid)),
        Err(error) => Err(error.into()),
    }
}

/// Opens a file to be read. With a user it is opened as he, with no group but his own: the system asks of every folder and link on the way
/// whether he may, so a link that leads to what he may not read leads nowhere. What is no file is opened without a wait, and is for the
/// caller to refuse. A link in the path's last place is followed if `follow`.
///
/// # Errors
/// It is not there, or may not be read; we cannot act as that user.
pub fn open_as(path: &Path, user: Option<HostUser>, follow: bool) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let flags = if follow { flags } else { flags | OFlags::NOFOLLOW };
    let open = || Ok(File::from(rustix::fs::open(path, flags, Mode::empty())?));
    let Some(user) = user else { return open() };
    // Ids belong to a thread in Linux; this one ends with them. Only the effective ones are his, which files are opened by: with a real or
    // saved one of his he could signal us.
    let become_him = || {
        set_thread_groups(&[])?;
        set_thread_res_gid(None, Gid::from_raw(user.gid), None)?;
        set_thread_res_uid(None, Uid::from_raw(user.uid), None)
    };
    thread::scope(|scope| {
        let opened = thread::Builder::new()
            .spawn_scoped(scope, || become_him().map_err(io::Error::from).and_then(|()| open()))?;
        opened.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
    })
}

/// True if nobody but us and root may change a file.
pub(crate) fn is_ours_alone(file: &File) -> io::Result<bool> {
    let meta = file.metadata()?;
    let owner = meta.uid();
    // With an access list the group's bits of the mode are the most that anybody in it has.
    Ok((owner == 0 || owner == geteuid().as_raw()) && meta.mode() & 0o022 == 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_somebody_may_not_read_is_not_opened_as_he() {
        let folder = tempfile::tempdir().unwrap();
        let set = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        let (own, closed) = (folder.path().join("own"), folder.path().join("closed"));
        let (link, behind) = (folder.path().join("link"), closed.join("behind"));
        std::fs::create_dir(&closed).unwrap();
        for file in [&own, &behind] {
            std::fs::write(file, "words").unwrap();
            set(file, 0o644);
        }
        std::os::unix::fs::symlink(&own, &link).unwrap();
        set(folder.path(), 0o711);
        set(&closed, 0o700);
        assert!(open_as(&own, None, false).is_ok() && open_as(&link, None, true).is_ok());
        assert!(open_as(&link, None, false).is_err(), "a link");
        // Whoever opens a pipe waits for somebody to write.
        let pipe = folder.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, Mode::RUSR).unwrap();
        assert!(open_as(&pipe, None, true).is_ok());
        if !geteuid().is_root() {
            eprintln!("SKIPPED: only root can open files as somebody else");
            return;
        }
        let him = Some(HostUser { uid: 12_345, gid: 12_346 });
        assert!(open_as(&own, him, false).is_ok() && open_as(&link, him, true).is_ok());
        assert!(open_as(&behind, him, true).is_err(), "everybody may read the file, but not pass the folder");
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(&behind, &link).unwrap();
        assert!(open_as(&link, him, true).is_err());
        set(&own, 0o600);
        assert!(open_as(&own, him, true).is_err());
        // No group of ours is his, wherever we are called.
        set(&own, 0o640);
        fchown(File::open(&own).unwrap(), None, Some(12_347)).unwrap();
        let in_group = || {
            set_thread_groups(&[Gid::from_raw(12_347)]).unwrap();
            open_as(&own, him, true).is_err()
        };
        assert!(thread::scope(|scope| scope.spawn(in_group).join()).unwrap());
        fchown(File::open(&own).unwrap(), None, Some(12_346)).unwrap();
        assert!(open_as(&own, him, true).is_ok());
        // We are who we were.
        assert!(geteuid().is_root() && File::open(&behind).is_ok());
    }

    #[test]
    fn a_file_that_somebody_reads_stays_ours() {
        let file = tempfile::tempfile().unwrap();
        file.set_permissions(std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(is_ours_alone(&file).unwrap());
        let us = geteuid();
        let reader = HostUser { uid: us.as_raw() + 12_345, gid: 12_346 };
        let_read(&file, reader).unwrap();
        let meta = file.metadata().unwrap();
        // 0640 with the list; a file system without lists has given the file away.
        assert_eq!(is_ours_alone(&file).unwrap(), meta.uid() == us.as_raw());
        assert_eq!(meta.mode() & 0o137, 0, "{:o}", meta.mode());
        if us.is_root() {
            // One that an earlier version had given away is taken back.
            fchown(&file, Some(reader.uid), Some(reader.gid)).unwrap();
            assert!(!is_ours_alone(&file).unwrap());
            let_read(&file, reader).unwrap();
            assert_eq!(is_ours_alone(&file).unwrap(), file.metadata().unwrap().uid() == 0);
        }
        file.set_permissions(std::fs::Permissions::from_mode(0o620)).unwrap();
        assert!(!is_ours_alone(&file).unwrap());
    }
}
