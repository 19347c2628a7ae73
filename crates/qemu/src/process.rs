//! A QEMU process: started so that it outlives us, found again after we were gone, ended for certain.
//!
//! A process is named by its id *and* its start time, so that a recycled id is never taken for it; what is done to it is
//! done through a pidfd.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// What is written down of a process so that it can be found again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot (field 22 of `/proc/PID/stat`).
    pub start_ticks: u64,
}

/// A running QEMU, ours or our predecessor's.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    pidfd: OwnedFd,
}

impl Process {
    /// Starts `program` with its output in the file `log`, in a process group of its own, so that a Ctrl-C at our
    /// terminal does not reach it. A thread collects its exit status.
    pub fn spawn(program: &Path, args: &[String], log: &Path) -> io::Result<Self> {
        Self::spawn_as(None, program, args, log)
    }

    /// The same as another user, which only root can: by user and group id, without any other group.
    pub fn spawn_as(
        user: Option<(u32, u32)>,
        program: &Path,
        args: &[String],
        log: &Path,
    ) -> io::Result<Self> {
        let log: File = OpenOptions::new().create(true).append(true).open(log)?;
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        if let Some((uid, gid)) = user {
            // With a user id std gives up all other groups, if we are root.
            command.gid(gid).uid(uid);
        }
        let mut child = command.spawn()?;
        let pid = child.id();
        let opened = Self::open(pid);
        if opened.is_err() {
            let _ = child.kill();
        }
        thread::Builder::new().name(format!("wait-{pid}")).spawn(move || child.wait())?;
        opened
    }

    /// Finds a process that was started earlier; `None` if it is gone or its id now belongs to another.
    pub fn find(id: ProcessId) -> Option<Self> {
        let process = Self::open(id.pid).ok()?;
        (process.id == id && process.is_alive()).then_some(process)
    }

    /// Whatever process has this id now.
    pub fn open(pid: u32) -> io::Result<Self> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pidfd = pidfd_open(raw.ok_or(io::ErrorKind::InvalidInput)?, PidfdFlags::empty())?;
        Ok(Self { id: ProcessId { pid, start_ticks: start_ticks(pid)? }, pidfd })
    }

    pub(crate) fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// Its id and start time.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// True until it has ended.
    pub fn is_alive(&self) -> bool {
        !self.wait(Duration::ZERO)
    }

    /// Waits for its end, at most for `limit`; true if it has ended.
    pub fn wait(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let timeout = timespec(deadline.saturating_duration_since(Instant::now()));
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(ready) => return ready > 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    /// Ends it at once, as a power cut would, and waits until it is gone.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(self.pidfd.as_fd(), Signal::KILL);
        self.wait(Duration::from_secs(30));
    }

    /// Bytes of memory that it has for itself: nothing of files that it has mapped and not written to.
    pub fn own_memory(&self) -> Option<u64> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.id.pid)).ok()?;
        let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
    }

    /// Bytes of memory that only it uses, and its share of what it has in common with others (PSS).
    pub fn memory(&self) -> Option<u64> {
        let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.id.pid)).ok()?;
        let line = text.lines().find_map(|l| l.strip_prefix("Pss:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
    }
}

/// A span of time as the kernel takes it.
pub(crate) fn timespec(span: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(span.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(span.subsec_nanos()),
    }
}

fn start_ticks(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The command name, in parentheses, may hold anything: count from its end. Field 22 is the 20th after it.
    let after = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after
        .split_ascii_whitespace()
        .nth(19)
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_again_and_ended() {
        let dir = tempfile::tempdir().unwrap();
        let process =
            Process::spawn(Path::new("sleep"), &["60".to_owned()], &dir.path().join("log")).unwrap();
        assert!(process.is_alive());
        let again = Process::find(process.id()).expect("it runs");
        again.kill();
        assert!(!process.is_alive());
        assert!(Process::find(process.id()).is_none());
    }

    #[test]
    fn another_process_with_the_same_id_is_not_ours() {
        let own = Process::open(std::process::id()).unwrap().id();
        assert!(Process::find(own).is_some());
        assert!(Process::find(ProcessId { start_ticks: own.start_ticks + 1, ..own }).is_none());
    }
}
