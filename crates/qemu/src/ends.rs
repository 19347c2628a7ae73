//! Waiting for the end of any of several processes, without looking at each of them now and then.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::process::{Process, timespec};

/// A process whose end is waited for. It holds on to nothing else of it.
#[derive(Debug)]
pub struct Awaited(OwnedFd);

impl Process {
    /// This one, to be waited for together with others.
    pub fn awaited(&self) -> io::Result<Awaited> {
        self.pidfd().try_clone().map(Awaited)
    }
}

/// Where one waits for processes, and others ring: there may be another one to wait for.
#[derive(Debug)]
pub struct Ends(OwnedFd);

impl Ends {
    /// One that nobody has rung.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Wakes whoever waits, or will wait next.
    pub fn ring(&self) {
        // It fails only where it has been rung so often that once more makes no difference.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Waits until one of these has ended or somebody rings, at most for `limit`.
    pub fn wait(&self, processes: &[Awaited], limit: Duration) {
        let all = processes.iter().map(|Awaited(pidfd)| pidfd).chain([&self.0]);
        let mut fds: Vec<PollFd<'_>> = all.map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        // Whoever waits looks again after an interruption too.
        let _ = poll(&mut fds, Some(&timespec(limit)));
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Instant;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn sleeper(folder: &Path, seconds: &str) -> Process {
        Process::spawn(Path::new("sleep"), &[seconds.to_owned()], &folder.join("log")).unwrap()
    }

    #[test]
    fn the_first_that_ends_wakes_and_so_does_a_ring_from_before() {
        let folder = tempfile::tempdir().unwrap();
        let (long, short) = (sleeper(folder.path(), "60"), sleeper(folder.path(), "0.2"));
        let awaited = [long.awaited().unwrap(), short.awaited().unwrap()];
        let ends = Ends::new().unwrap();
        let began = Instant::now();
        ends.wait(&awaited, LONG);
        assert!(long.is_alive() && !short.is_alive() && began.elapsed() < LONG / 2);
        // It has ended: no wait for it takes any time.
        ends.wait(&awaited, LONG);
        let awaited = [long.awaited().unwrap()];
        ends.ring();
        ends.ring();
        ends.wait(&awaited, LONG);
        assert!(began.elapsed() < LONG / 2, "it was rung");
        let again = Instant::now();
        ends.wait(&awaited, Duration::from_millis(50));
        assert!(again.elapsed() >= Duration::from_millis(50), "two rings wake once");
        long.kill();
    }
}
