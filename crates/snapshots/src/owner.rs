//! Who owns what: groups belong to users. As root, QEMU runs as the owner of its machine's group, and finds what it needs.
//!
//! Folders that we write to stay ours, whoever's group it is: in a folder of his own a user could put a link in a file's place, and
//! root would follow it. He is let through, no more (0711), to the files that are his (0600), and to those of the page store, which he
//! may read.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, lchown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use pages::HostUser;
use rustix::fs::{Mode, OFlags};
use rustix::process::geteuid;

use crate::config::{DiskSource, MachineConfig};
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::groups::OpenGroup;

/// The group of users that belong to none.
const NO_GROUP: u32 = 65_534;

/// A user of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Name, if the host knows one.
    pub(crate) name: Option<String>,
}

impl User {
    /// By name or number.
    pub(crate) fn find(text: &str) -> Result<Self> {
        let number = text.parse::<u32>().ok().filter(|uid| *uid != u32::MAX);
        match (known(text), number) {
            (Some(user), _) => Ok(user),
            (None, Some(uid)) => Ok(Self { uid, gid: NO_GROUP, name: None }),
            (None, None) => Err(Error::new(Code::NotFound, format!("there is no user called {text:?}"))
                .hint("write the name of a user of this host, or a user id")),
        }
    }

    /// Whoever has this id.
    pub(crate) fn by_id(uid: u32) -> Self {
        known(&uid.to_string()).unwrap_or(Self { uid, gid: NO_GROUP, name: None })
    }

    /// The owner of a group, if we can and have to act as somebody else for him.
    pub(crate) fn other_than_us(uid: u32) -> Option<Self> {
        let us = geteuid();
        (us.is_root() && us.as_raw() != uid).then(|| Self::by_id(uid))
    }

    /// The name, or the number.
    pub(crate) fn label(&self) -> String {
        self.name.clone().unwrap_or_else(|| format!("user {}", self.uid))
    }

    /// His numbers, as the page store and the views take them.
    pub(crate) fn ids_alone(&self) -> HostUser {
        HostUser { uid: self.uid, gid: self.gid }
    }

    /// Gives him a file for himself alone.
    pub(crate) fn owns_alone(&self, file: &Path) -> Result<()> {
        set_mode(file, 0o600)?;
        self.owns(file)
    }

    /// Gives him a file or folder. A link is not followed.
    pub(crate) fn owns(&self, path: &Path) -> Result<()> {
        lchown(path, Some(self.uid), Some(self.gid)).map_err(|error| {
            Error::new(Code::NotPermitted, format!("{} cannot be given to {}", path.display(), self.label()))
                .because(error)
        })
    }

    /// Lets him read a file of the page store, which stays ours.
    pub(crate) fn reads(&self, file: &Path) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::open(file, flags, Mode::empty()).map_err(std::io::Error::from);
        opened.and_then(|opened| pages::let_read(&fs::File::from(opened), self.ids_alone())).map_err(
            |error| {
                let (file, who) = (file.display(), self.label());
                Error::new(Code::NotPermitted, format!("{who} cannot be let read {file}")).because(error)
            },
        )
    }

    /// Lets him, as everybody, through a folder to files whose names he knows.
    pub(crate) fn gets_through(&self, folder: &Path) -> Result<()> {
        set_mode(folder, 0o711)
    }

    /// The ids that a QEMU of his gets, with no other group beside. Where it needs a device that a group may use, it is in that one.
    ///
    /// # Errors
    /// He may not use the device.
    pub(crate) fn ids(&self, device: Option<&Path>) -> Result<(u32, u32)> {
        let Some(device) = device else { return Ok((self.uid, self.gid)) };
        let owner = fs::metadata(device).ok().filter(|meta| meta.mode() & 0o066 == 0o060);
        let gid = owner.map_or(self.gid, |meta| meta.gid());
        if (Self { gid, ..self.clone() }).may(May::Read, device) {
            return Ok((self.uid, gid));
        }
        let (who, device) = (self.label(), device.display());
        Err(Error::new(Code::Precondition, format!("{who} may not use {device}")).hint(format!(
            "let them (chmod 666 {device}, or a group that may), or set SPINNEY_ACCEL=tcg, which is slower"
        )))
    }

    /// True if he may: the system is asked, as he, with no groups but his own.
    pub(crate) fn may(&self, what: May, path: &Path) -> bool {
        let flag = match what {
            May::Read => "-r",
            May::Pass => "-x",
        };
        let mut command = Command::new("test");
        command.arg(flag).arg(path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // With a user id std gives up all other groups.
        command.current_dir("/").gid(self.gid).uid(self.uid);
        command.status().is_ok_and(|status| status.success())
    }
}

impl Engine {
    /// Sees to it that whoever QEMU will run as in this group can read the files of a machine that are the user's own.
    pub(crate) fn check_readable_by_owner(&self, group: &OpenGroup, config: &MachineConfig) -> Result<()> {
        let Some(owner) = group.runs_as() else { return Ok(()) };
        let disks = config.disks.iter().filter_map(|disk| match &disk.source {
            DiskSource::File(path) => Some(("disk", path)),
            DiskSource::Size(_) => None,
        });
        let others = [
            ("disc", config.cdrom.as_ref().and_then(|drive| drive.image.as_ref())),
            ("kernel", config.kernel.as_ref()),
            ("initrd", config.initrd.as_ref()),
        ];
        let others = others.into_iter().filter_map(|(what, path)| Some((what, path?)));
        for (what, path) in disks.chain(others) {
            // One that is not there is another error, and somebody else's.
            if path.exists() && !owner.may(May::Read, path) {
                let who = owner.label();
                return Err(Error::new(Code::NotPermitted, format!("{who} cannot read the {what} {}", path.display()))
                    .because(format!("machines of the group {} run as {who}", group.row.name))
                    .hint(format!(
                        "let {who} read it (chmod o+r, and o+x for the folders above), or move it to where {who} can"
                    )));
            }
        }
        Ok(())
    }
}

/// What a user may do with a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum May {
    /// Read a file.
    Read,
    /// Pass through a folder.
    Pass,
}

/// The host's entry of a user, by name or number.
fn known(key: &str) -> Option<User> {
    let file = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let found = file.lines().filter_map(entry).find(|user| is_named(user, key));
    // Users that a directory service knows.
    found.or_else(|| {
        if key.starts_with('-') {
            return None;
        }
        let output = Command::new("getent").args(["passwd", key]).stdin(Stdio::null()).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        text.lines().next().and_then(entry).filter(|user| is_named(user, key))
    })
}

fn is_named(user: &User, key: &str) -> bool {
    user.name.as_deref() == Some(key) || user.uid.to_string() == key
}

/// A line of `passwd`.
fn entry(line: &str) -> Option<User> {
    let mut fields = line.split(':');
    let name = fields.next()?;
    let mut number = |skip| fields.nth(skip)?.parse().ok();
    let (uid, gid) = (number(1)?, number(0)?);
    Some(User { uid, gid, name: Some(name.to_owned()) })
}

/// What a file holds that a QEMU may have written, as whoever it runs as: nothing if it is not there, or is a link.
pub(crate) fn read_of_others(path: &Path) -> Vec<u8> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut bytes = Vec::new();
    let opened = rustix::fs::open(path, flags, Mode::empty()).map_err(std::io::Error::from);
    let _ = opened.and_then(|file| fs::File::from(file).read_to_end(&mut bytes));
    bytes
}

/// Makes a folder that others must not look into.
pub(crate) fn make_folder(path: &Path) -> Result<()> {
    let failed = |error: std::io::Error| {
        Error::new(Code::NotPermitted, format!("the folder {} cannot be made", path.display()))
            .because(error)
            .hint("choose another state folder with --state or SPINNEY_STATE")
    };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
    // It may have been there with wider rights: the key and the machines' memory lie in it. To pass through shows nothing, and a
    // QEMU that runs as somebody else may need it.
    let mode = fs::metadata(path).map_err(failed)?.permissions().mode();
    if mode & 0o066 != 0 {
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(failed)?;
    }
    Ok(())
}

/// Lets owners of groups through the state folder to what is theirs. What lies in it by a name that everybody knows is closed first.
pub(crate) fn let_owners_through(state: &Path) -> Result<()> {
    let entries = fs::read_dir(state).map_err(|error| {
        Error::new(Code::Failed, format!("{} cannot be read", state.display())).because(error)
    })?;
    let passages = [state.to_owned(), state.join("run"), state.join("groups"), state.join("views")];
    for entry in entries.flatten().filter(|entry| !passages.contains(&entry.path())) {
        match entry.file_type() {
            Ok(kind) if kind.is_symlink() => {}
            Ok(kind) if kind.is_dir() => set_mode(&entry.path(), 0o700)?,
            _ => set_mode(&entry.path(), 0o600)?,
        }
    }
    passages.iter().try_for_each(|folder| set_mode(folder, 0o711))
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|error| {
        Error::new(Code::NotPermitted, format!("the rights of {} cannot be set", path.display()))
            .because(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_known_by_name_and_number() {
        let root = User { uid: 0, gid: 0, name: Some("root".into()) };
        assert_eq!(User::find("root").unwrap(), root);
        assert_eq!(User::find("0").unwrap(), root);
        let other = User::find("3999999999").unwrap();
        assert_eq!(
            (other.uid, other.gid, other.label().as_str()),
            (3_999_999_999, NO_GROUP, "user 3999999999")
        );
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        fs::write(&file, "words").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert_eq!((read_of_others(&file), read_of_others(&link)), (b"words".to_vec(), Vec::new()));
        for nobody in ["no-such-user-here", "", "-r", "4294967295", "99999999999"] {
            assert_eq!(User::find(nobody).unwrap_err().code(), Code::NotFound, "{nobody}");
        }
        assert_eq!(entry("a:x:1:2::/:/bin/sh"), Some(User { uid: 1, gid: 2, name: Some("a".into()) }));
        assert_eq!(root.ids(None).unwrap(), (0, 0));
        assert!(entry("a:x:one:2").is_none() && entry("").is_none());
    }
}
