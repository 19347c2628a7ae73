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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use pages::{GroupKey, OpenFolders, Visitor};

use crate::fs::SnapFs;
use crate::handover::{Descriptors, Inherited, Known, Start, send_over, send_start};
use crate::held::Held;
use crate::list::ListReader;
use crate::log::{Saying, is_new};
use crate::serve::{Others, Servers, is_over, serve};

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
/// Standard input is not from one of us. The store cannot be read, or the kernel's requests, and somebody stands by to try it. As long as
/// nobody does it is tried here.
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
    let descriptors = Arc::new(descriptors);
    // First of all: until somebody stands by, our death is the end.
    let heir = Heir::begin(executable, next, Arc::clone(&descriptors));
    thread::sleep(pause(deaths));
    let servers: Arc<Servers> = Arc::default();
    let fs = loop {
        match open(&start, &descriptors, &servers, deaths > 1) {
            Ok(fs) => break fs,
            Err(_) if is_over(&descriptors.fuse) => {
                heir.over();
                return Ok(());
            }
            // He may have more luck, and waits if many had none.
            Err(error) if heir.stand_by() => return Err(error),
            Err(error) => {
                if is_new(Saying::Requests, (1, 0)) {
                    tracing::error!(%error, "the store cannot be opened, and nobody else can try");
                }
                heir.see_to();
                thread::sleep(BETWEEN * 4);
            }
        }
    };
    serve(Arc::clone(&descriptors.fuse), fs, &servers, Arc::<Heir>::clone(&heir), resend)?;
    heir.over();
    Ok(())
}

/// The file system as it was left to us.
fn open(start: &Start, left: &Descriptors, servers: &Arc<Servers>, doubt: bool) -> io::Result<SnapFs> {
    let key = GroupKey::load(&start.store.join("key")).map_err(io::Error::other)?;
    let folders = OpenFolders { packs: left.packs.try_clone()?, index: left.index.try_clone()? };
    let store = Visitor::open(&start.store, &key, folders, doubt).map_err(io::Error::other)?;
    let list = ListReader::new(left.list.try_clone()?.into());
    let held = Held::new(left.report.try_clone()?.into());
    let known = Known::read(left.known.try_clone()?.into())?;
    Ok(SnapFs::new(store, list, held, Arc::clone(servers), known))
}

/// What whoever comes next waits if so many died soon.
fn pause(deaths: u32) -> Duration {
    PAUSE.min(BETWEEN * deaths.saturating_sub(PATIENCE))
}

/// Whoever stands by.
#[derive(Debug)]
struct Heir {
    state: Mutex<State>,
    executable: PathBuf,
    /// What it is told first.
    start: Start,
    descriptors: Arc<Descriptors>,
    own: Weak<Self>,
}

#[derive(Debug, Default)]
struct State {
    /// The line to him; none while there is nobody.
    line: Option<UnixStream>,
    /// He himself, if nobody waits for his end.
    child: Option<Child>,
    born: Option<Instant>,
    /// How many ended soon, or could not be started, one after the other.
    failed: u32,
    /// Nobody is started before.
    wait: Option<Instant>,
    /// A thread waits for his end, and starts the next one.
    watched: bool,
    over: bool,
}

impl Heir {
    /// Starts one, and the next whenever that one dies. If none can be started now, it is tried again.
    fn begin(executable: &Path, start: Start, descriptors: Arc<Descriptors>) -> Arc<Self> {
        let heir = Arc::new_cyclic(|own| Self {
            state: Mutex::default(),
            executable: executable.to_owned(),
            start,
            descriptors,
            own: own.clone(),
        });
        heir.next(&mut heir.lock());
        heir.see_to();
        heir
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for ends, and starts the next one each time.
    fn watch(&self) {
        loop {
            let mut state = self.lock();
            if let Some(mut child) = state.child.take() {
                drop(state);
                let _ = child.wait();
                state = self.lock();
                state.ended();
            }
            if state.over {
                return;
            }
            let wait = state.wait.map(|wait| wait.saturating_duration_since(Instant::now()));
            drop(state);
            thread::sleep(wait.unwrap_or_default());
            let mut state = self.lock();
            if !state.over {
                self.next(&mut state);
            }
        }
    }

    /// Starts the next one, if that can be done.
    fn next(&self, state: &mut State) {
        match self.spawn() {
            Ok((line, child)) => {
                (state.line, state.child, state.born) = (Some(line), Some(child), Some(Instant::now()));
            }
            Err(error) => {
                state.failed();
                if is_new(Saying::Heir, (0, 0)) {
                    tracing::error!(%error, "nobody can stand by just now");
                }
            }
        }
    }

    fn spawn(&self) -> io::Result<(UnixStream, Child)> {
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
        Ok((ours, child))
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

impl Others for Heir {
    /// With a thread that does it; as long as there can be none, by looking now and then.
    fn see_to(&self) -> bool {
        let mut state = self.lock();
        if state.watched || state.over {
            return false;
        }
        if let Some(own) = self.own.upgrade() {
            let spawned = thread::Builder::new().name("heir".into()).spawn(move || own.watch());
            state.watched = spawned.is_ok();
        }
        if state.watched {
            return false;
        }
        if let Some(child) = &mut state.child {
            if let Ok(None) = child.try_wait() {
                return true;
            }
            state.child = None;
            state.ended();
        }
        if state.wait.is_none_or(|wait| wait <= Instant::now()) {
            self.next(&mut state);
        }
        true
    }

    fn stand_by(&self) -> bool {
        self.lock().line.is_some()
    }
}

impl State {
    /// He is not any more.
    fn ended(&mut self) {
        self.line = None;
        if self.born.is_some_and(|born| born.elapsed() > LONG) {
            self.failed = 0;
        }
        self.failed();
        if !self.over && is_new(Saying::Heir, (1, self.failed.min(PATIENCE).into())) {
            tracing::warn!("nobody stands by: the next one is started");
        }
    }

    fn failed(&mut self) {
        self.failed = self.failed.saturating_add(1);
        self.wait = Some(Instant::now() + BETWEEN.max(pause(self.failed)));
    }
}
