//! The daemon's side: it starts the warden, arms deadlines and hears whether they were kept.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use crate::protocol::{Answer, Request, Watch};

/// How long the warden may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// A deadline has passed: the warden has let the guest go on, and what was being done to the machine is void.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest stood still for too long, and was let go on")]
pub struct TooLate;

/// Keeps the warden alive and talks to it.
#[derive(Debug)]
pub struct Keeper {
    how: Option<How>,
    line: Arc<Mutex<Line>>,
}

/// How a warden is started.
#[derive(Clone, Debug)]
struct How {
    executable: PathBuf,
    state: PathBuf,
    log: PathBuf,
}

#[derive(Debug, Default)]
struct Line {
    connection: Option<Connection>,
    last: u64,
    /// Wardens that were started so far.
    wardens: u64,
    /// What is armed, for a warden that takes over.
    armed: HashMap<u64, Standing>,
    /// The line itself, for whoever waits for the end of a warden.
    own: Weak<Mutex<Line>>,
}

/// A deadline that a warden has been told of.
#[derive(Clone, Debug)]
struct Standing {
    watch: Watch,
    within: Duration,
    /// It is about the daemon by now.
    held: bool,
}

#[derive(Debug)]
struct Connection {
    /// The warden's number.
    warden: u64,
    socket: UnixStream,
    answers: BufReader<UnixStream>,
}

/// A deadline that is armed. Dropped, it is disarmed.
#[derive(Debug)]
pub struct Armed<'a> {
    keeper: &'a Keeper,
    /// 0 once it is released, or without a warden.
    id: AtomicU64,
}

impl Keeper {
    /// A keeper whose warden is `executable --state STATE warden`, started at the first need. It logs to the file `log`.
    pub fn new(executable: &Path, state: &Path, log: &Path) -> Self {
        let how = How { executable: executable.into(), state: state.into(), log: log.into() };
        Self::with(Some(how))
    }

    /// A keeper without a warden: deadlines are not kept.
    pub fn none() -> Self {
        Self::with(None)
    }

    fn with(how: Option<How>) -> Self {
        let line = Arc::new_cyclic(|own| Mutex::new(Line { own: own.clone(), ..Line::default() }));
        Self { how, line }
    }

    /// Arms a deadline for the machine behind this second monitor: unless it is renewed or disarmed `within` that time, or when we
    /// die, the guest is let go on; `running` says what that is.
    ///
    /// # Errors
    /// No warden can be had: then nothing should be begun that needs one.
    pub fn arm(&self, monitor: &Path, running: bool, within: Duration) -> io::Result<Armed<'_>> {
        let Some(how) = &self.how else { return Ok(Armed { keeper: self, id: AtomicU64::new(0) }) };
        let watch = Watch { monitor: monitor.to_owned(), running };
        let mut line = self.line();
        line.last += 1;
        let id = line.last;
        let request = Request::Arm { id, watch: watch.clone(), within: millis(within) };
        match line.ask(how, id, &request) {
            Ok(answer) if answer.in_time => {
                // Not before: a warden that is started for it would be told twice, and a monitor serves one client.
                line.armed.insert(id, Standing { watch, within, held: false });
                Ok(Armed { keeper: self, id: AtomicU64::new(id) })
            }
            refused => {
                let _ = line.ask(how, id, &Request::Disarm { id });
                Err(refused
                    .err()
                    .unwrap_or_else(|| io::Error::other("the guest's second monitor does not answer")))
            }
        }
    }

    /// Ends the warden: the daemon ends in order.
    pub fn close(&self) {
        let mut line = self.line();
        if let Some(connection) = &mut line.connection {
            let _ = connection.say(&Request::Bye);
        }
        line.connection = None;
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Armed<'_> {
    /// It goes on: the deadline is so far from now.
    pub fn renew(&self, within: Duration) {
        let (Some(id), Some(how)) = (self.id(), &self.keeper.how) else { return };
        let mut line = self.keeper.line();
        // One that died is replaced, so that the deadline is kept from now on.
        let _ = line.tell(how, &Request::Renew { id, within: millis(within) });
    }

    /// Renews for as long as `work` takes, which cannot say how it gets on: what is watched is that we are alive.
    pub fn during<T>(&self, within: Duration, work: impl FnOnce() -> T) -> T {
        let (working, over) = channel::<()>();
        thread::scope(|scope| {
            scope.spawn(move || {
                while over.recv_timeout(within / 4) == Err(RecvTimeoutError::Timeout) {
                    self.renew(within);
                }
            });
            let done = work();
            drop(working);
            done
        })
    }

    /// From here on the deadline is about us: whoever gets to decide what becomes of the machine is the daemon or, if it does
    /// not get to its end within that time, the next one.
    ///
    /// # Errors
    /// The deadline has passed.
    pub fn hold(&self, within: Duration) -> Result<(), TooLate> {
        self.ask(|id| Request::Hold { id, within: millis(within) })?;
        let id = self.id().unwrap_or_default();
        if let Some(standing) = self.keeper.line().armed.get_mut(&id) {
            standing.held = true;
        }
        Ok(())
    }

    /// The guest goes on; asked again, nothing is left to be done.
    ///
    /// # Errors
    /// The deadline had passed.
    pub fn release(&self) -> Result<(), TooLate> {
        let done = self.ask(|id| Request::Disarm { id });
        self.forget();
        done
    }

    /// Has the warden let the guest go on, because we cannot: QEMU does not hear us. What was being done to the machine is void.
    pub fn rescue(&self) {
        let _ = self.ask(|id| Request::Rescue { id });
        self.forget();
    }

    fn ask(&self, request: impl FnOnce(u64) -> Request) -> Result<(), TooLate> {
        let (Some(id), Some(how)) = (self.id(), &self.keeper.how) else { return Ok(()) };
        match self.keeper.line().ask(how, id, &request(id)) {
            Ok(answer) if !answer.in_time => Err(TooLate),
            // Without a warden nobody has let the guest go.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    fn forget(&self) {
        let id = self.id.swap(0, Ordering::Relaxed);
        self.keeper.line().armed.remove(&id);
    }

    fn id(&self) -> Option<u64> {
        Some(self.id.load(Ordering::Relaxed)).filter(|id| *id != 0)
    }
}

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        let _ = self.release();
    }
}

impl Line {
    /// Says something and waits for the answer. A warden that is gone is replaced once.
    fn ask(&mut self, how: &How, id: u64, request: &Request) -> io::Result<Answer> {
        for _ in 0..2 {
            let fresh = self.connection.is_none();
            let asked = self.connect(how).and_then(|connection| {
                connection.say(request)?;
                connection.hear(id)
            });
            match asked {
                Ok(answer) => return Ok(answer),
                Err(error) if fresh => return Err(error),
                Err(error) => tracing::warn!(%error, "the warden is gone"),
            }
            self.connection = None;
        }
        Err(io::Error::other("the warden does not stay"))
    }

    /// Says something that has no answer.
    fn tell(&mut self, how: &How, request: &Request) -> io::Result<()> {
        let said = self.connect(how).and_then(|connection| connection.say(request));
        if said.is_err() {
            self.connection = None;
            return self.connect(how).map(drop);
        }
        said
    }

    /// The warden, started if there is none; a new one hears what is armed.
    fn connect(&mut self, how: &How) -> io::Result<&mut Connection> {
        if self.connection.is_none() {
            self.wardens += 1;
            let mut connection = how.start(self.wardens, self.own.clone())?;
            for (id, Standing { watch, within, held }) in &self.armed {
                let (id, within) = (*id, millis(*within));
                connection.say(&Request::Arm { id, watch: watch.clone(), within })?;
                connection.hear(id)?;
                if *held {
                    connection.say(&Request::Hold { id, within })?;
                    connection.hear(id)?;
                }
            }
            self.connection = Some(connection);
        }
        self.connection.as_mut().ok_or_else(|| io::Error::other("there is no warden"))
    }
}

impl How {
    /// Starts a warden. When it ends and guests depend on it, the next one is started at once.
    fn start(&self, number: u64, line: Weak<Mutex<Line>>) -> io::Result<Connection> {
        let (ours, theirs) = UnixStream::pair()?;
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut child = Command::new(&self.executable)
            .arg0("spinney")
            .arg("--state")
            .arg(&self.state)
            .arg("warden")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(log)
            .current_dir("/")
            .spawn()?;
        let how = self.clone();
        thread::Builder::new().name("wait-warden".into()).spawn(move || {
            let _ = child.wait();
            let Some(line) = line.upgrade() else { return };
            let mut line = line.lock().unwrap_or_else(PoisonError::into_inner);
            // Unless somebody has noticed before us.
            if line.connection.as_ref().is_none_or(|connection| connection.warden != number) {
                return;
            }
            line.connection = None;
            if !line.armed.is_empty()
                && let Err(error) = line.connect(&how)
            {
                tracing::error!(%error, "the warden is gone and no other can be started");
            }
        })?;
        ours.set_read_timeout(Some(ANSWER_LIMIT))?;
        ours.set_write_timeout(Some(ANSWER_LIMIT))?;
        Ok(Connection { warden: number, answers: BufReader::new(ours.try_clone()?), socket: ours })
    }
}

impl Connection {
    fn say(&mut self, request: &Request) -> io::Result<()> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.socket.write_all(&line)
    }

    /// Reads answers until the one to `id`; those before it are to questions that nobody waits for any more.
    fn hear(&mut self, id: u64) -> io::Result<Answer> {
        loop {
            let mut line = String::new();
            if self.answers.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let answer: Answer = serde_json::from_str(&line)?;
            if answer.id == id {
                return Ok(answer);
            }
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
