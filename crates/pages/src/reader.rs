//! Letting another user of the host read a store's files, and do nothing else with them.
//!
//! The files stay ours: the index is mapped into the memory of whoever has the store, and a file that somebody else may cut or change
//! must not be (`index/mapping.rs`). An access list names the one user who may read, as `setfacl` would set it; Linux gives them their
//! form as an extended attribute (`posix_acl_xattr.h`).

use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, fchown};

use rustix::fs::{XattrFlags, fsetxattr};
use rustix::io::Errno;
use rustix::process::geteuid;

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
