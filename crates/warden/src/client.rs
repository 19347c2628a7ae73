//! The daemon's side: it starts the warden, arms deadlines and hears whether they were kept.
//!
//! Many machines share one warden. So nobody holds the line while waiting for an answer: a thread reads the answers, and who asked
//! finds his own. A warden that ends, or does not answer, is replaced at once by one that is told what is armed.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::protocol::{Answer, Request, Watch};
use crate::rescue::ARMING_LIMIT;

/// How long the warden may take to answer: it has nothing else to do.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// The same for arming, for which it waits for QEMU twice: until that lets it in, and until it is greeted.
const ARM_LIMIT: Duration = ARMING_LIMIT.saturating_mul(2).saturating_add(ANSWER_LIMIT);
/// How long the warden may take to take our words: longer than it ever sleeps with them unread.
const WRITE_LIMIT: Duration = Duration::from_secs(1);

/// A deadline has passed: the warden has let the guest go on, and what was being done to the machine is void.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest stood still for too long, and was let go on")]
pub struct TooLate;

/// A guest must not stand still now.
#[derive(Debug, thiserror::Error)]
pub enum Unkept {
    /// The deadline has passed.
    #[error(transparent)]
    TooLate(TooLate),
    /// Nobody keeps it.
    #[error("no warden can be had")]
    NoWarden(#[source] io::Error),
}

/// Keeps the warden alive and talks to it.
#[derive(Debug)]
pub struct Keeper {
    line: Option<Arc<Line>>,
}

/// The line to the warden, whichever it is by now.
#[derive(Debug)]
struct Line {
    how: How,
    state: Mutex<State>,
    /// Answers have come, or another warden.
    news: Condvar,
}

/// How a warden is started.
#[derive(Clone, Debug)]
struct How {
    executable: PathBuf,
    state: PathBuf,
    log: PathBuf,
}

#[derive(Debug, Default)]
struct State {
    warden: Option<Warden>,
    /// Wardens that were started so far.
    wardens: u64,
    /// Deadlines and questions are numbered from 1.
    last: u64,
    /// What is armed, for a warden that takes over.
    armed: HashMap<u64, Standing>,
    /// Answers that nobody has picked up yet.
    answers: HashMap<u64, bool>,
}

/// A deadline that a warden has been told of.
#[derive(Clone, Debug)]
struct Standing {
    watch: Watch,
    within: Duration,
    /// It is about the daemon by now.
    held: bool,
}

/// A warden that runs.
#[derive(Debug)]
struct Warden {
    number: u64,
    socket: UnixStream,
    pidfd: OwnedFd,
}

/// A deadline that is armed. Dropped, it is disarmed.
#[derive(Debug)]
pub struct Armed<'a> {
    line: Option<&'a Arc<Line>>,
    /// 0 once it is released.
    id: AtomicU64,
}

impl Keeper {
    /// A keeper whose warden is `executable --state STATE warden`, started at the first need. It logs to the file `log`.
    pub fn new(executable: &Path, state: &Path, log: &Path) -> Self {
        let how = How { executable: executable.into(), state: state.into(), log: log.into() };
        Self { line: Some(Arc::new(Line { how, state: Mutex::default(), news: Condvar::new() })) }
    }

    /// A keeper without a warden: deadlines are not kept.
    pub fn none() -> Self {
        Self { line: None }
    }

    /// Arms a deadline for the machine behind this second monitor: unless it is renewed or disarmed `within` that time, or when we
    /// die, the guest is let go on; `running` says what that is.
    ///
    /// # Errors
    /// No warden can be had: then nothing should be begun that needs one.
    pub fn arm(&self, monitor: &Path, running: bool, within: Duration) -> io::Result<Armed<'_>> {
        let Some(line) = &self.line else { return Ok(Armed { line: None, id: AtomicU64::new(0) }) };
        let watch = Watch { monitor: monitor.to_owned(), running };
        for _ in 0..2 {
            let id = line.lock().next();
            let armed = Armed { line: Some(line), id: AtomicU64::new(id) };
            let arm = |question| Request::Arm { question, id, watch: watch.clone(), within: millis(within) };
            let (in_time, warden) = line.ask(ARM_LIMIT, &arm)?;
            if !in_time {
                return Err(io::Error::other("the guest's second monitor does not answer"));
            }
            let mut state = line.lock();
            // The one that has answered may be gone by now; whoever took over was told of what stood here then.
            if state.warden.as_ref().is_some_and(|now| now.number == warden) {
                // Not before: a warden that is started for it would be told twice, and a monitor serves one client.
                state.armed.insert(id, Standing { watch, within, held: false });
                drop(state);
                return Ok(armed);
            }
        }
        Err(io::Error::other("the warden does not stay"))
    }

    /// Ends the warden: the daemon ends in order.
    pub fn close(&self) {
        if let Some(line) = &self.line {
            // Says goodbye when dropped.
            line.lock().warden = None;
        }
    }
}

impl Armed<'_> {
    /// It goes on: the deadline is so far from now.
    pub fn renew(&self, within: Duration) {
        if let Some((line, id)) = self.standing() {
            line.tell(&Request::Renew { id, within: millis(within) });
        }
    }

    /// The same for a moment that must not begin without a deadline: the guest is about to stand still.
    ///
    /// # Errors
    /// The deadline has passed, or nobody keeps it any more.
    pub fn confirm(&self, within: Duration) -> Result<(), Unkept> {
        let Some((line, id)) = self.standing() else { return Ok(()) };
        let confirm = |question| Request::Confirm { question, id, within: millis(within) };
        match line.ask(ANSWER_LIMIT, &confirm) {
            Ok((true, _)) => Ok(()),
            Ok((false, _)) => Err(Unkept::TooLate(TooLate)),
            Err(error) => Err(Unkept::NoWarden(error)),
        }
    }

    /// Renews at once and for as long as `work` takes, which cannot say how it gets on: what is watched is that we are alive.
    pub fn during<T>(&self, within: Duration, work: impl FnOnce() -> T) -> T {
        let (working, over) = channel::<()>();
        thread::scope(|scope| {
            scope.spawn(move || {
                loop {
                    self.renew(within);
                    if over.recv_timeout(within / 4) != Err(RecvTimeoutError::Timeout) {
                        return;
                    }
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
        if let Some((line, id)) = self.standing()
            && let Some(standing) = line.lock().armed.get_mut(&id)
        {
            // Before it is asked for: a warden that takes over must not let the wrong guest go on.
            standing.held = true;
        }
        self.ask(|id, question| Request::Hold { question, id, within: millis(within) })
    }

    /// The guest goes on; asked again, nothing is left to be done.
    ///
    /// # Errors
    /// The deadline had passed.
    pub fn release(&self) -> Result<(), TooLate> {
        let done = self.ask(|id, question| Request::Disarm { question, id });
        self.forget();
        done
    }

    /// Has the warden let the guest go on, because we cannot: QEMU does not hear us. What was being done to the machine is void.
    pub fn rescue(&self) {
        if let Some((line, id)) = self.standing() {
            line.tell(&Request::Rescue { id });
        }
        self.forget();
    }

    fn ask(&self, request: impl Fn(u64, u64) -> Request) -> Result<(), TooLate> {
        let Some((line, id)) = self.standing() else { return Ok(()) };
        match line.ask(ANSWER_LIMIT, &|question| request(id, question)) {
            Ok((false, _)) => Err(TooLate),
            // Without a warden nobody has let the guest go.
            Ok((true, _)) | Err(_) => Ok(()),
        }
    }

    fn forget(&self) {
        let id = self.id.swap(0, Ordering::Relaxed);
        if let Some(line) = self.line {
            line.lock().armed.remove(&id);
        }
    }

    fn standing(&self) -> Option<(&Arc<Line>, u64)> {
        let id = self.id.load(Ordering::Relaxed);
        self.line.filter(|_| id != 0).map(|line| (line, id))
    }
}

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        // Whoever panics has left the guest as it was at that moment.
        if thread::panicking() {
            self.rescue();
        } else {
            let _ = self.release();
        }
    }
}

impl Line {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says something and waits for the answer, which comes with the warden's number. Of a warden that is gone its successor is asked; one
    /// that does not answer is ended, and so is gone.
    fn ask(self: &Arc<Self>, limit: Duration, request: &dyn Fn(u64) -> Request) -> io::Result<(bool, u64)> {
        let mut state = self.lock();
        for _ in 0..2 {
            let question = state.next();
            let number = self.say(&mut state, &request(question))?;
            let deadline = Instant::now() + limit;
            loop {
                if let Some(in_time) = state.answers.remove(&question) {
                    return Ok((in_time, number));
                }
                if state.warden.as_ref().is_none_or(|warden| warden.number != number) {
                    break;
                }
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    tracing::warn!("the warden does not answer, and is ended");
                    state.end_warden();
                    break;
                }
                let waited = self.news.wait_timeout(state, left);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        Err(io::Error::other("the warden does not stay"))
    }

    /// Says something that has no answer.
    fn tell(self: &Arc<Self>, request: &Request) {
        let mut state = self.lock();
        if let Err(error) = self.say(&mut state, request) {
            tracing::error!(%error, "the warden cannot be told");
        }
    }

    /// Says something to the warden, started if there is none; returns its number. One that does not take it is replaced once.
    fn say(self: &Arc<Self>, state: &mut State, request: &Request) -> io::Result<u64> {
        let mut failed = None;
        for _ in 0..2 {
            if state.warden.is_none() {
                self.start(state)?;
            }
            let Some(warden) = &state.warden else { continue };
            match say(&warden.socket, request) {
                Ok(()) => return Ok(warden.number),
                Err(error) => failed = Some(error),
            }
            state.end_warden();
            self.news.notify_all();
        }
        Err(failed.unwrap_or_else(|| io::Error::other("there is no warden")))
    }

    /// Starts a warden and tells it what is armed. What it answers to that nobody waits for: should it not get at a guest, there is no
    /// better one.
    fn start(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        let (ours, theirs) = UnixStream::pair()?;
        let How { executable, state: folder, log } = &self.how;
        let log = File::options().create(true).append(true).open(log)?;
        let mut child = Command::new(executable)
            .arg0("spinney")
            .arg("--state")
            .arg(folder)
            .arg("warden")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(log)
            .current_dir("/")
            .spawn()?;
        ours.set_write_timeout(Some(WRITE_LIMIT))?;
        state.wardens += 1;
        let number = state.wardens;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pidfd = pidfd_open(pid.ok_or_else(|| io::Error::other("no process id"))?, PidfdFlags::empty())?;
        for (id, Standing { watch, within, held }) in &state.armed {
            let (question, id, within) = (0, *id, millis(*within));
            say(&ours, &Request::Arm { question, id, watch: watch.clone(), within })?;
            if *held {
                say(&ours, &Request::Hold { question, id, within })?;
            }
        }
        let (line, answers) = (Arc::clone(self), BufReader::new(ours.try_clone()?));
        thread::Builder::new().name("warden".into()).spawn(move || {
            line.listen(number, answers);
            let _ = child.wait();
        })?;
        state.warden = Some(Warden { number, socket: ours, pidfd });
        Ok(())
    }

    /// Hears a warden's answers until it ends. If guests depend on it then, the next one is started at once.
    fn listen(self: &Arc<Self>, number: u64, mut answers: BufReader<UnixStream>) {
        let mut words = String::new();
        while answers.read_line(&mut words).is_ok_and(|read| read > 0) {
            match serde_json::from_str::<Answer>(&words) {
                Ok(answer) => drop(self.lock().answers.insert(answer.question, answer.in_time)),
                Err(error) => tracing::error!(%error, "not the warden's words"),
            }
            self.news.notify_all();
            words.clear();
        }
        let mut state = self.lock();
        // Unless somebody has noticed before us.
        if state.warden.as_ref().is_some_and(|warden| warden.number == number) {
            tracing::warn!("the warden is gone");
            state.warden = None;
            if !state.armed.is_empty()
                && let Err(error) = self.start(&mut state)
            {
                tracing::error!(%error, "no other warden can be started");
            }
        }
        drop(state);
        self.news.notify_all();
    }
}

impl State {
    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// Ends a warden that does not do its work.
    fn end_warden(&mut self) {
        if let Some(warden) = self.warden.take() {
            let _ = pidfd_send_signal(warden.pidfd.as_fd(), Signal::KILL);
        }
    }
}

impl Drop for Warden {
    /// The end of the line without a word would be our death.
    fn drop(&mut self) {
        let _ = say(&self.socket, &Request::Bye);
    }
}

fn say(mut socket: &UnixStream, request: &Request) -> io::Result<()> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    socket.write_all(&line)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
