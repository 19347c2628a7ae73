//! The warden's process: reads the daemon's words from its standard input until that ends.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, getppid, pidfd_open, pidfd_send_signal};

use crate::deadlines::{Deadlines, Due};
use crate::protocol::{Answer, LINE_LIMIT, Request};
use crate::rescue::rescue;

/// How long the warden sleeps at most.
const SLEEP: Duration = Duration::from_secs(3600);

/// Keeps deadlines until the daemon ends. If guests depended on it then, the next daemon is started: `executable --state STATE
/// serve --detached`.
///
/// # Errors
/// Standard input is not a socket; there is no daemon to keep deadlines for.
pub fn run(executable: &Path, state: &Path) -> io::Result<()> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    // Fails only for the leader of a process group, who has nothing to leave.
    let _ = rustix::process::setsid();
    let daemon = getppid().ok_or_else(|| io::Error::other("the daemon is gone"))?;
    let daemon = Daemon { pidfd: pidfd_open(daemon, PidfdFlags::empty())?, id: daemon };
    let (said, words) = channel();
    let reader = BufReader::new(socket.try_clone()?);
    thread::Builder::new().name("daemon".into()).spawn(move || listen(reader, &said))?;

    let mut deadlines = Deadlines::default();
    let mut rescues = Rescues::default();
    let needed = loop {
        let wait = deadlines.next(Instant::now()).unwrap_or(SLEEP);
        match words.recv_timeout(wait) {
            Ok(Request::Bye) => break false,
            Ok(request) => {
                // Before it is heard: what is late is late.
                rescues.begin(deadlines.due(Instant::now()), &daemon);
                if let Some(answer) = obey(&mut deadlines, request) {
                    // A daemon that is gone does not hear it; the end of its words comes next.
                    let _ = answer_to(&socket, answer);
                }
            }
            Err(RecvTimeoutError::Timeout) => rescues.begin(deadlines.due(Instant::now()), &daemon),
            Err(RecvTimeoutError::Disconnected) => {
                tracing::warn!(daemon = daemon.id.as_raw_nonzero(), "the daemon is gone");
                let left = deadlines.all();
                let needed = rescues.ended_daemon || !left.is_empty();
                rescues.begin(left, &daemon);
                break needed;
            }
        }
    };
    if needed {
        // While it starts, the guests are seen to.
        daemon.wait();
        start_daemon(executable, state)?;
    }
    rescues.finish();
    Ok(())
}

/// Passes on what the daemon says until it ends, or says something that nobody understands.
fn listen(mut reader: impl BufRead, said: &Sender<Request>) {
    let mut line = Vec::new();
    loop {
        line.clear();
        match reader.by_ref().take(LINE_LIMIT).read_until(b'\n', &mut line) {
            Ok(1..) => {}
            Ok(0) | Err(_) => return,
        }
        match serde_json::from_slice(&line) {
            Ok(request) => {
                if said.send(request).is_err() {
                    return;
                }
            }
            Err(error) => return tracing::error!(%error, "not the daemon's words"),
        }
    }
}

fn obey(deadlines: &mut Deadlines, request: Request) -> Option<Answer> {
    let now = Instant::now();
    let (id, in_time) = match request {
        Request::Arm { id, watch, within } => {
            deadlines.arm(now, id, watch, Duration::from_millis(within));
            (id, true)
        }
        Request::Renew { id, within } => {
            deadlines.renew(now, id, Duration::from_millis(within));
            return None;
        }
        Request::Hold { id, within } => (id, deadlines.hold(now, id, Duration::from_millis(within))),
        Request::Disarm { id } => (id, deadlines.disarm(id)),
        Request::Bye => return None,
    };
    Some(Answer { id, in_time })
}

fn answer_to(mut socket: &UnixStream, answer: Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    socket.write_all(&line)
}

/// The process that the deadlines are the daemon's of.
struct Daemon {
    pidfd: std::os::fd::OwnedFd,
    id: Pid,
}

impl Daemon {
    /// Until it is gone for good: its successor needs its lock.
    fn wait(&self) {
        let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
        let _ = poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&limit));
    }
}

/// What has been begun.
#[derive(Default)]
struct Rescues {
    /// One for each guest.
    threads: Vec<JoinHandle<()>>,
    /// The daemon had to be ended.
    ended_daemon: bool,
}

impl Rescues {
    fn begin(&mut self, due: Vec<Due>, daemon: &Daemon) {
        for due in due {
            match due {
                Due::EndDaemon => {
                    tracing::error!(daemon = daemon.id.as_raw_nonzero(), "the daemon is stuck, and is ended");
                    let _ = pidfd_send_signal(daemon.pidfd.as_fd(), Signal::KILL);
                    self.ended_daemon = true;
                }
                Due::Release(watch) => {
                    tracing::warn!(monitor = %watch.monitor.display(), "a guest is let go on");
                    self.threads.push(thread::spawn(move || {
                        if let Err(error) = rescue(&watch) {
                            tracing::error!(%error, monitor = %watch.monitor.display(), "it could not be");
                        }
                    }));
                }
            }
        }
    }

    fn finish(self) {
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

/// Starts the next daemon, which finds machines and files as they are and puts them in order.
fn start_daemon(executable: &Path, state: &Path) -> io::Result<()> {
    tracing::info!("the next daemon is started");
    Command::new(executable)
        .arg0("spinney")
        .arg("--state")
        .arg(state)
        .args(["serve", "--detached"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .map(drop)
}
