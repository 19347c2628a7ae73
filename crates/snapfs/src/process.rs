//! The processes of a view: one serves, one stands by with the same descriptors and takes over when the first one dies. Whoever serves
//! sees to it that somebody stands by.
//!
//! ```text
//!   daemon ── start ──▶ serving ── socket pair, as its standard input ──▶ standing by
//!                          │                                                   │
//!                          ╳ dies: the socket ends                             ▼
//!                                                                     serving ──▶ standing by ...
//! ```
//! Only if both die at once is the connection lost, and with it whatever has a file of it mapped.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pages::{GroupKey, OpenFolders, Visitor};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::fs::SnapFs;
use crate::handover::{Descriptors, Inherited, Known, Start, send_over, send_start};
use crate::held::Held;
use crate::list::ListReader;
use crate::serve::{Servers, serve};

/// Whoever lived for so long did not die of what it was left.
const LONG: Duration = Duration::from_secs(10);
/// How many may die soon one after the other before the next one waits ...
const PATIENCE: u32 = 8;
/// ... this long, more each time ...
const BETWEEN: Duration = Duration::from_millis(50);
/// ... up to this.
const PAUSE: Duration = Duration::from_secs(2);

/// Serves, or stands by, as the standard input says, to the end. `executable` with the subcommand `view` is what this is.
///
/// # Errors
/// Standard input is not from one of us; the store cannot be read.
pub fn run(executable: &Path) -> io::Result<()> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    // Fails only for the leader of a process group, who has nothing to leave.
    let _ = rustix::process::setsid();
    let (mut inherited, began) = (Inherited::receive(socket)?, Instant::now());
    let resend = !inherited.start.serve;
    if resend {
        if !inherited.wait() {
            return Ok(());
        }
        tracing::warn!(deaths = inherited.start.deaths, "whoever served is gone: taking over");
    }
    let Inherited { start, descriptors, .. } = inherited;
    // Whoever lived for long did not die of what it was left.
    let deaths = if began.elapsed() > LONG { start.deaths.min(1) } else { start.deaths };
    if is_over(&descriptors.fuse) {
        return Ok(());
    }
    let next = Start { serve: false, deaths: deaths + 1, ..start.clone() };
    // First of all: until somebody stands by, our death is the end.
    let heir = Heir::begin(executable, next, descriptors.try_clone()?)?;
    thread::sleep(PAUSE.min(BETWEEN * deaths.saturating_sub(PATIENCE)));
    let Descriptors { fuse, packs, index, list, report, known } = descriptors;
    let key = GroupKey::load(&start.store.join("key")).map_err(io::Error::other)?;
    let folders = OpenFolders { packs, index };
    let store = Visitor::open(&start.store, &key, folders, deaths > 1).map_err(io::Error::other)?;
    let servers: Arc<Servers> = Arc::default();
    let (list, held) = (ListReader::new(list.into()), Held::new(report.into()));
    let fs = SnapFs::new(store, list, held, Arc::clone(&servers), Known::read(known.into())?);
    serve(fuse, fs, &servers, resend)?;
    heir.over();
    Ok(())
}

/// True if the file system is unmounted, and nobody has anything of it any more.
fn is_over(fuse: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fuse, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok() && fds.iter().any(|fd| fd.revents().contains(PollFlags::ERR))
}

/// Whoever stands by.
#[derive(Debug)]
struct Heir {
    state: Mutex<State>,
    executable: PathBuf,
    /// What it is told first.
    start: Start,
    descriptors: Descriptors,
}

#[derive(Debug, Default)]
struct State {
    /// The line to him; none while there is nobody.
    line: Option<UnixStream>,
    over: bool,
}

impl Heir {
    /// Starts one, and the next whenever that one dies.
    fn begin(executable: &Path, start: Start, descriptors: Descriptors) -> io::Result<Arc<Self>> {
        let heir = Self { state: Mutex::default(), executable: executable.to_owned(), start, descriptors };
        let heir = Arc::new(heir);
        let (own, mut child) = (Arc::clone(&heir), Some(heir.spawn()?));
        thread::Builder::new().name("heir".into()).spawn(move || {
            loop {
                if let Some(mut child) = child.take() {
                    let _ = child.wait();
                }
                let mut state = own.lock();
                state.line = None;
                if state.over {
                    return;
                }
                drop(state);
                tracing::warn!("nobody stands by: the next one is started");
                thread::sleep(BETWEEN);
                child = own.spawn().inspect_err(|error| tracing::error!(%error, "nobody can")).ok();
            }
        })?;
        Ok(heir)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(&self) -> io::Result<Child> {
        let (ours, theirs) = UnixStream::pair()?;
        // Before he is born: from that moment on the descriptors are his, whatever becomes of us.
        send_start(&ours, &self.start, &self.descriptors)?;
        let child = Command::new(&self.executable)
            .arg0("spinney")
            .arg("view")
            .arg(&self.start.folder)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .current_dir("/")
            .spawn()?;
        self.lock().line = Some(ours);
        Ok(child)
    }

    /// Nobody has to take over.
    fn over(&self) {
        let mut state = self.lock();
        state.over = true;
        if let Some(line) = state.line.take()
            && let Err(error) = send_over(&line)
        {
            tracing::warn!(%error, "whoever stands by does not hear that it is over");
        }
    }
}
