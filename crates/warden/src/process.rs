//! The warden's process: reads the daemon's words from its standard input until that ends.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use qemu::qmp::Qmp;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, getppid, pidfd_open, pidfd_send_signal};

use crate::deadlines::{Deadlines, Due};
use crate::protocol::{Answer, LINE_LIMIT, Request, Watch};
use crate::rescue::{ARMING_LIMIT, CONNECT_LIMIT, connect, rescue};

/// How long the warden sleeps at most.
const SLEEP: Duration = Duration::from_secs(3600);

/// What the warden hears of.
enum News {
    /// The daemon's words.
    Said(Request),
    /// The monitor of a guest that is to be watched, none if it cannot be had.
    Connected { arming: Arming, monitor: Option<Qmp> },
    /// The daemon's words have ended.
    Gone,
}

/// A deadline that waits for its guest's monitor.
struct Arming {
    /// The daemon waits for an answer before it touches the guest: the time runs from then on. Without a question it is a guest that may
    /// stand still by now, of a warden that is gone, and the time runs already.
    question: u64,
    id: u64,
    watch: Watch,
    within: Duration,
}

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
    let (tell, news) = channel();
    let (reader, said) = (BufReader::new(socket.try_clone()?), tell.clone());
    thread::Builder::new().name("daemon".into()).spawn(move || listen(reader, &said))?;

    let mut deadlines = Deadlines::default();
    let mut rescues = Rescues::default();
    // A daemon that is gone does not hear an answer; the end of its words comes next.
    let answer = |question, in_time| drop(answer_to(&socket, Answer { question, in_time }));
    let needed = loop {
        let wait = deadlines.next(Instant::now()).unwrap_or(SLEEP);
        let heard = news.recv_timeout(wait);
        // Before it is obeyed: what is late is late.
        rescues.begin(deadlines.due(Instant::now()), &daemon);
        match heard {
            Ok(News::Said(Request::Bye)) => break false,
            Ok(News::Said(Request::Arm { question, id, watch, within })) => {
                let arming = Arming { question, id, watch, within: Duration::from_millis(within) };
                if question == 0 {
                    deadlines.arm(Instant::now(), id, arming.watch.clone(), arming.within);
                }
                connect_beside(arming, &tell)?;
            }
            Ok(News::Connected { arming: Arming { question, id, watch, within }, monitor }) => {
                if question != 0 && monitor.is_some() {
                    deadlines.arm(Instant::now(), id, watch, within);
                }
                answer(question, monitor.is_some());
                if deadlines.has(id) {
                    rescues.monitors.extend(monitor.map(|monitor| (id, monitor)));
                }
            }
            Ok(News::Said(Request::Renew { id, within })) => {
                deadlines.renew(Instant::now(), id, Duration::from_millis(within));
            }
            Ok(News::Said(Request::Confirm { question, id, within })) => {
                deadlines.renew(Instant::now(), id, Duration::from_millis(within));
                answer(question, deadlines.has(id));
            }
            Ok(News::Said(Request::Hold { question, id, within })) => {
                answer(question, deadlines.hold(Instant::now(), id, Duration::from_millis(within)));
            }
            Ok(News::Said(Request::Rescue { id })) => {
                if let Some(watch) = deadlines.take(id) {
                    rescues.see_to(id, watch);
                }
            }
            Ok(News::Said(Request::Disarm { question, id })) => {
                rescues.monitors.remove(&id);
                answer(question, deadlines.disarm(id));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Ok(News::Gone) | Err(RecvTimeoutError::Disconnected) => {
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
fn listen(mut reader: impl BufRead, said: &Sender<News>) {
    let mut line = Vec::new();
    while let Ok(1..) = reader.by_ref().take(LINE_LIMIT).read_until(b'\n', &mut line) {
        match serde_json::from_slice(&line) {
            Ok(request) => {
                if said.send(News::Said(request)).is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::error!(%error, "not the daemon's words");
                break;
            }
        }
        line.clear();
    }
    let _ = said.send(News::Gone);
}

/// Connects to a guest's monitor in a thread of its own: other deadlines do not wait for it. The connection is needed before the
/// guest stands still, because a QEMU whose main loop waits for us greets nobody.
fn connect_beside(arming: Arming, tell: &Sender<News>) -> io::Result<()> {
    let tell = tell.clone();
    let connecting = move || {
        let limit = if arming.question == 0 { CONNECT_LIMIT } else { ARMING_LIMIT };
        let monitor = connect(&arming.watch, limit).inspect_err(|error| {
            tracing::warn!(%error, monitor = %arming.watch.monitor.display(), "a guest cannot be watched");
        });
        let _ = tell.send(News::Connected { arming, monitor: monitor.ok() });
    };
    thread::Builder::new().name("connect".into()).spawn(connecting).map(drop)
}

fn answer_to(mut socket: &UnixStream, answer: Answer) -> io::Result<()> {
    if answer.question == 0 {
        return Ok(());
    }
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
    /// Connections to the guests that are watched.
    monitors: HashMap<u64, Qmp>,
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
                Due::Release { id, watch } => self.see_to(id, watch),
            }
        }
    }

    /// Lets a guest go on, in a thread of its own.
    fn see_to(&mut self, id: u64, watch: Watch) {
        tracing::warn!(monitor = %watch.monitor.display(), "a guest is let go on");
        let monitor = self.monitors.remove(&id);
        self.threads.push(thread::spawn(move || {
            if let Err(error) = rescue(&watch, monitor) {
                tracing::error!(%error, monitor = %watch.monitor.display(), "it could not be");
            }
        }));
    }

    fn finish(mut self) {
        // Those of guests that are left to the next daemon, which needs them.
        self.monitors.clear();
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
