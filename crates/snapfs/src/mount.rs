//! Mounting and unmounting, as root or through `fusermount3`; and whether that can be had.

use std::ffi::CString;
use std::fs;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::serve::MAX_READ;

const DEVICE: &str = "/dev/fuse";
const HELPER: &str = "fusermount3";
/// The first kernel that sends again what a dead server had not answered.
const KERNEL: (u32, u32) = (6, 9);
/// How long the helper may take.
const HELPER_LIMIT: Duration = Duration::from_secs(10);

/// Why there can be no view.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Lacks {
    /// The kernel is too old.
    #[error(
        "the kernel is {release}; 6.9 or later is needed, so that guests survive the death of whoever serves their memory"
    )]
    Kernel {
        /// Its release.
        release: String,
    },
    /// There is no FUSE.
    #[error("/dev/fuse cannot be opened: {why}")]
    Device {
        /// The system's reason.
        why: String,
    },
    /// Not root, and no helper.
    #[error("fusermount3 is not there, which mounts for users other than root (Debian: apt install fuse3)")]
    Helper,
    /// Switched off by whoever runs us.
    #[error("it is switched off by SPINNEY_VIEW=off")]
    Off,
}

/// Whether a view can be had on this host.
///
/// # Errors
/// What is lacking.
pub fn supported() -> Result<(), Lacks> {
    if std::env::var_os("SPINNEY_VIEW").is_some_and(|value| value == "off") {
        return Err(Lacks::Off);
    }
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    if version(&release) < KERNEL {
        return Err(Lacks::Kernel { release });
    }
    device().map_err(|error| Lacks::Device { why: error.to_string() })?;
    if is_root() || on_path(HELPER) { Ok(()) } else { Err(Lacks::Helper) }
}

/// The first two numbers of a kernel's release.
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

fn device() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

/// Mounts a file system at the folder `at`, for a user and a group of his (root, who may look into everything, may do so here too).
/// What is asked of it comes from the descriptor.
///
/// # Errors
/// The system or the helper refuses.
pub fn mount(at: &Path, uid: u32, gid: u32) -> io::Result<OwnedFd> {
    let options = format!("default_permissions,max_read={MAX_READ}");
    if !is_root() {
        return mount_by_helper(at, &options);
    }
    let fuse = device()?;
    let options =
        format!("fd={},rootmode=40000,user_id={uid},group_id={gid},allow_other,{options}", fuse.as_raw_fd());
    let flags = MountFlags::RDONLY
        | MountFlags::NOSUID
        | MountFlags::NODEV
        | MountFlags::NOEXEC
        | MountFlags::NOATIME;
    let options = CString::new(options)?;
    rustix::mount::mount("spinney", at, "fuse.spinney", flags, options.as_c_str())?;
    Ok(fuse)
}

fn mount_by_helper(at: &Path, options: &str) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(HELPER_LIMIT))?;
    let options = format!("ro,nosuid,nodev,noexec,noatime,fsname=spinney,subtype=spinney,{options}");
    // It sends the descriptor to the socket whose number it is told: its standard input.
    let child = Command::new(HELPER)
        .args(["-o", &options, "--"])
        .arg(at)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let (mut byte, flags) = ([0; 1], RecvFlags::CMSG_CLOEXEC);
    let received = rustix::net::recvmsg(&ours, &mut [IoSliceMut::new(&mut byte)], &mut control, flags);
    let fuse = received.ok().and_then(|_| {
        control.drain().find_map(|part| match part {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
    });
    let output = child.wait_with_output()?;
    let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    fuse.filter(|_| output.status.success())
        .ok_or_else(|| io::Error::other(if words.is_empty() { format!("{HELPER} failed") } else { words }))
}

/// Unmounts it. Whoever has something of it open or mapped keeps it until he lets go.
///
/// # Errors
/// It is not mounted; the system or the helper refuses.
pub fn unmount(at: &Path) -> io::Result<()> {
    if is_root() {
        return Ok(rustix::mount::unmount(at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?);
    }
    let output = Command::new(HELPER).args(["-u", "-z", "--"]).arg(at).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// True if a FUSE file system is mounted at this folder. Nobody who serves it is asked.
pub fn is_mounted(at: &Path) -> bool {
    let Some(at) = real_path(at) else { return false };
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    table.split(|byte| *byte == b'\n').any(|line| is_line_of(&String::from_utf8_lossy(line), &at))
}

/// The path without links, but for its last part, which is not looked at.
fn real_path(at: &Path) -> Option<PathBuf> {
    Some(at.parent()?.canonicalize().ok()?.join(at.file_name()?))
}

/// `36 35 98:0 /root /mnt rw - fuse.spinney spinney rw,user_id=0`, see `proc_pid_mountinfo(5)`.
fn is_line_of(line: &str, at: &Path) -> bool {
    let Some((place, kind)) = line.split_once(" - ") else { return false };
    let point = place.split(' ').nth(4).map(unescape);
    point.as_deref() == at.to_str() && kind.starts_with("fuse")
}

/// Spaces and the like are octal numbers there.
fn unescape(text: &str) -> String {
    let (mut out, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((first, behind)) = rest.split_first() {
        let octal = behind.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(|_| *first == b'\\') {
            Some(byte) => {
                out.push(byte);
                rest = behind.get(3..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = behind;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_apart() {
        let old = ["6.8.12", "5.15.0-113-generic", "", "x"];
        assert!(old.iter().all(|release| version(release) < KERNEL));
        assert!(["6.9", "6.18.44-fc", "7.0.1"].iter().all(|release| version(release) >= KERNEL));
    }

    #[test]
    fn a_mount_is_found_in_the_systems_table() {
        let line = r"36 35 0:98 / /var/a\040b/mnt ro,nosuid - fuse.spinney spinney ro,user_id=0";
        assert!(is_line_of(line, Path::new("/var/a b/mnt")));
        assert!(!is_line_of(line, Path::new("/var/a b")));
        assert!(!is_line_of(&line.replace("fuse.", "ext4."), Path::new("/var/a b/mnt")));
        assert!(!is_line_of("", Path::new("/")) && !is_line_of(r"\", Path::new("/")));
        assert!(!is_mounted(Path::new("/nowhere/at/all")));
    }
}
