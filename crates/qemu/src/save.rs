//! Getting a machine's state out of QEMU: we are the destination of a migration that never completes.
//!
//! ```text
//!   ours                                QEMU
//!   capabilities, parameters, fd   ->
//!   migrate                        ->   copies memory; stops the guest for the last round
//!   read ... read                  <-   memory, devices, end of stream; waits for a verdict
//!   `at_end`: switch the disks     ->   (the guest stands still, its disks are idle and flushed)
//!   SHUT(1): refused               ->   brings disks and guest back by itself
//! ```
//! The refusal is the point: completed, QEMU would wait for a command to go on, and if we die meanwhile the guest would
//! stand still for ever. Refused, or with the socket closed because we are dead, it goes on by itself. For the same
//! reason there is no `stop` here: `stop` outlives its sender. Stop-copy raises the downtime limit instead, and QEMU
//! stops the guest at its first look at the clock, 100 ms into the migration.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, bounded};
use serde_json::{Value, json};

use crate::migration::{self, Finished, SHUT_FAILED, SHUT_OK, Sink, read_stream, shut};
use crate::qmp::{Qmp, QmpError};

/// A reader that gets nothing for so long gives up: QEMU always has something to send, or is done.
const STALL_LIMIT: Duration = Duration::from_secs(30);
/// A guest that has stood still for so long is let go, and the save with it: whoever takes the pages is too slow.
pub(crate) const PAUSE_LIMIT: Duration = Duration::from_secs(60);
/// How long QEMU may take to come back from a migration that ended.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);
/// How long QEMU may take to forget a migration that is over.
const CLEANUP_LIMIT: Duration = Duration::from_secs(5);
/// Bytes that QEMU may be ahead of the reader.
const SOCKET_BUFFER: usize = 2 << 20;
/// Pre-copy aims at a last round that takes so long.
const DOWNTIME_MS: u64 = 20;
/// QEMU's largest downtime limit: whatever is left is sent with the guest stopped.
const DOWNTIME_MAX_MS: u64 = 2_000_000;
/// Pre-copy ends after so many rounds, or so long, even if the guest writes faster than we read.
const ROUNDS_MAX: u64 = 8;
const ROUNDS_LIMIT: Duration = Duration::from_secs(20);

/// How the guest is treated while its memory is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyMode {
    /// Stopped for (nearly) all of it.
    StopCopy,
    /// Runs until little is left, then stopped.
    PreCopy,
}

/// A state that was saved.
#[derive(Debug)]
pub struct SavedState {
    /// Everything but the pages, which the sink got.
    pub finished: Finished,
    /// Microseconds between QEMU's STOP and RESUME; none if the guest was not running.
    pub pause_us: Option<u64>,
    /// The run state before: "running" or "paused".
    pub run_state: String,
}

/// An error of whoever was called back.
pub type CallbackError = Box<dyn std::error::Error + Send + Sync>;

/// Why a machine's state could not be had. The guest goes on as before, unless QEMU is [stuck](SaveError::Stuck) or does not answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The monitor failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// QEMU cannot migrate this machine.
    #[error("this machine cannot be saved: {reasons}")]
    Blocked {
        /// QEMU's reasons.
        reasons: String,
    },
    /// The machine is in a state out of which nothing can be saved.
    #[error("the machine is in the state {state:?}")]
    State {
        /// QEMU's word.
        state: String,
    },
    /// The stream was not understood, or the sink refused it.
    #[error("the migration stream failed{}", .qemu.as_ref().map(|q| format!(" (QEMU: {q})")).unwrap_or_default())]
    Stream {
        /// Why.
        source: migration::Error,
        /// What QEMU says about it.
        qemu: Option<String>,
    },
    /// What had to be done while the guest stood still failed.
    #[error("the disks could not be switched")]
    AtEnd(#[source] CallbackError),
    /// A socket pair, a thread.
    #[error("cannot {act}")]
    System {
        /// What was being done.
        act: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The guest stood still for too long, because its pages were not taken fast enough.
    #[error("the guest stood still for {} s, and was let go on", PAUSE_LIMIT.as_secs())]
    PausedTooLong,
    /// The guest stood still for longer than the caller allows, or would have.
    #[error("the guest would stand still for longer than {} ms", .limit.as_millis())]
    PauseBudget {
        /// What was allowed.
        limit: Duration,
    },
    /// QEMU cannot save this machine while it runs on.
    #[error("QEMU cannot save this machine while it runs on: {reason}")]
    NotLive {
        /// Its words.
        reason: String,
    },
    /// The machine's memory cannot be read from outside.
    #[error("this machine's memory cannot be read from outside: {reason}")]
    NotOutside {
        /// Why.
        reason: String,
    },
    /// The caller asked for it.
    #[error("cancelled")]
    Cancelled,
    /// QEMU let the guest go on though it should have stood still.
    #[error("QEMU did not keep the guest standing still: {reason}")]
    NotStill {
        /// Its words.
        reason: String,
    },
    /// QEMU did not come back from the migration.
    #[error("QEMU is still in the migration state {status:?} {} s after its end", SETTLE_LIMIT.as_secs())]
    Stuck {
        /// Its migration state.
        status: String,
    },
}

impl SaveError {
    pub(crate) fn stream(source: migration::Error) -> Self {
        Self::Stream { source, qemu: None }
    }

    /// With what QEMU says about it.
    pub(crate) fn explained(self, qmp: &Qmp) -> Self {
        match self {
            Self::Stream { source, qemu: None } => Self::Stream { source, qemu: migration_error(qmp) },
            other => other,
        }
    }
}

/// A machine's state, read to its end, with QEMU waiting for our verdict: the guest stands still, its disks are idle and flushed.
/// Dropped, or with this process gone, it lets the guest go on as before.
#[derive(Debug)]
pub struct Held<'a> {
    qmp: &'a Qmp,
    socket: UnixStream,
    finished: Option<Finished>,
    run_state: String,
    mark: u64,
}

/// Reads the machine's state into `sink`. `cancel` is looked at several times a second; `progress` is called as often while more
/// comes. A guest that has stood still for `max_pause` is let go on, and the save with it.
pub fn read<'a>(
    qmp: &'a Qmp,
    mode: CopyMode,
    max_pause: Option<Duration>,
    sink: &mut (dyn Sink + Send),
    cancel: &AtomicBool,
    progress: &dyn Fn(),
) -> Result<Held<'a>, SaveError> {
    let run_state = check_state(qmp)?;
    let downtime = match (mode, max_pause) {
        (CopyMode::StopCopy, _) => DOWNTIME_MAX_MS,
        (CopyMode::PreCopy, None) => DOWNTIME_MS,
        // Half for the pages, half for all else.
        (CopyMode::PreCopy, Some(limit)) => DOWNTIME_MS.min(limit.as_millis() as u64 / 2).max(1),
    };
    set_capabilities(qmp, &["events", "return-path"])?;
    qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": 0, "downtime-limit": downtime }))?;

    let socket = hand_over(qmp, "spinney-save")?;
    socket.set_read_timeout(Some(STALL_LIMIT)).map_err(system("set a time-out"))?;
    let mut held = Held { qmp, socket, finished: None, run_state, mark: qmp.last_event() };
    qmp.execute("migrate", json!({ "uri": "fd:spinney-save" }))?;
    match read_while_watching(&held, mode, max_pause, sink, cancel, progress) {
        Ok(finished) => {
            held.finished = Some(finished);
            Ok(held)
        }
        Err(error) => {
            held.let_go()?;
            Err(error.explained(qmp))
        }
    }
}

impl Held<'_> {
    /// Everything but the pages.
    pub fn state(&self) -> Option<&Finished> {
        self.finished.as_ref()
    }

    /// Lets the guest go on, after `at_end` has done what has to be done while it stands still. If that fails, so does the save.
    pub fn go_on(
        mut self,
        at_end: &mut dyn FnMut() -> Result<(), CallbackError>,
    ) -> Result<SavedState, SaveError> {
        at_end().map_err(SaveError::AtEnd)?;
        (&self.socket).write_all(&shut(SHUT_FAILED)).map_err(system("answer QEMU"))?;
        // The state is whole: it counts even if QEMU then had trouble, which the next command will meet.
        if let Err(error) = settle(self.qmp, &self.run_state) {
            tracing::error!(%error, "a machine did not come back from a save as it was");
        }
        let pause_us = pause_after(self.qmp, self.mark);
        self.saved(pause_us)
    }

    /// Keeps the guest standing still, until [`settle`]: for a machine that is about to be replaced, and must do nothing that the
    /// state does not have.
    pub fn stand_still(mut self) -> Result<SavedState, SaveError> {
        (&self.socket).write_all(&shut(SHUT_OK)).map_err(system("answer QEMU"))?;
        wait_for_standstill(self.qmp)?;
        self.saved(None)
    }

    fn saved(&mut self, pause_us: Option<u64>) -> Result<SavedState, SaveError> {
        let finished = self.finished.take();
        let missing = || system("read the stream")(io::Error::other("it has no end"));
        Ok(SavedState {
            finished: finished.ok_or_else(missing)?,
            pause_us,
            run_state: self.run_state.clone(),
        })
    }

    /// Gives up: QEMU sees the socket close, and brings disks and guest back.
    fn let_go(&mut self) -> Result<(), SaveError> {
        let _ = self.socket.shutdown(Shutdown::Both);
        self.finished = None;
        settle(self.qmp, &self.run_state)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.finished.is_some()
            && let Err(error) = self.let_go()
        {
            tracing::error!(%error, "a machine did not come back from a save that was given up");
        }
    }
}

/// Makes a socket pair and gives QEMU one end under a name.
pub(crate) fn hand_over(qmp: &Qmp, name: &str) -> Result<UnixStream, SaveError> {
    let (ours, theirs) = UnixStream::pair().map_err(system("make a socket pair"))?;
    // Whoever waits less often is woken less often. The system may give less.
    let _ = rustix::net::sockopt::set_socket_send_buffer_size(&theirs, SOCKET_BUFFER);
    qmp.send_fd(name, &theirs)?;
    Ok(ours)
}

pub(crate) fn system(act: &'static str) -> impl FnOnce(io::Error) -> SaveError {
    move |source| SaveError::System { act, source }
}

pub(crate) fn check_state(qmp: &Qmp) -> Result<String, SaveError> {
    let state = run_state(qmp)?;
    if matches!(
        state.as_str(),
        "inmigrate" | "postmigrate" | "finish-migrate" | "restore-vm" | "save-vm" | "colo"
    ) {
        return Err(SaveError::State { state });
    }
    let migrate = qmp.execute("query-migrate", json!({}))?;
    let status = migrate.get("status").and_then(Value::as_str).unwrap_or("none");
    if !is_over(status) {
        return Err(SaveError::State { state: format!("migration {status}") });
    }
    if let Some(reasons) = migrate.get("blocked-reasons").and_then(Value::as_array)
        && !reasons.is_empty()
    {
        let words: Vec<&str> = reasons.iter().filter_map(Value::as_str).collect();
        return Err(SaveError::Blocked { reasons: words.join("; ") });
    }
    wait_for_cleanup(qmp)?;
    Ok(state)
}

/// A migration that is over is cleaned up a moment later, and until then QEMU refuses the next one ("duplicate yank instance"): with
/// the guest stopped it would be too late to wait.
fn wait_for_cleanup(qmp: &Qmp) -> Result<(), SaveError> {
    let deadline = Instant::now() + CLEANUP_LIMIT;
    loop {
        let instances = qmp.execute("query-yank", json!({}))?;
        let migration = |instance: &Value| instance.get("type").and_then(Value::as_str) == Some("migration");
        if !instances.as_array().into_iter().flatten().any(migration) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(SaveError::State { state: "migration not cleaned up".into() });
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// QEMU's run state: "running", "paused", ...
pub fn run_state(qmp: &Qmp) -> Result<String, QmpError> {
    let answer = qmp.execute("query-status", json!({}))?;
    let state = answer.get("status").and_then(Value::as_str);
    let missing = || QmpError::Answer { command: "query-status".into(), missing: "a status" };
    Ok(state.ok_or_else(missing)?.to_owned())
}

/// Switches the named capabilities on and every other one off: they persist, and their defaults can be changed from
/// outside.
pub(crate) fn set_capabilities(qmp: &Qmp, wanted: &[&str]) -> Result<(), QmpError> {
    let known = qmp.execute("query-migrate-capabilities", json!({}))?;
    let list: Vec<Value> = known
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let name = entry.get("capability")?.as_str()?;
            let state = wanted.contains(&name);
            // Setting one that is right already can be refused for reasons of its own.
            (entry.get("state")?.as_bool()? != state).then(|| json!({ "capability": name, "state": state }))
        })
        .collect();
    if list.is_empty() {
        return Ok(());
    }
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": list })).map(drop)
}

/// The reader runs in a thread of its own and never waits for the monitor: QEMU's main loop may be waiting for it.
fn read_while_watching(
    held: &Held<'_>,
    mode: CopyMode,
    max_pause: Option<Duration>,
    sink: &mut (dyn Sink + Send),
    cancel: &AtomicBool,
    progress: &dyn Fn(),
) -> Result<Finished, SaveError> {
    let (qmp, socket) = (held.qmp, &held.socket);
    let (done, result) = bounded(1);
    let (bytes, mut seen) = (&AtomicU64::new(0), 0);
    thread::scope(|scope| {
        let spawned = thread::Builder::new().name("stream".into()).spawn_scoped(scope, move || {
            let _ = done.send(read_stream(Counting { socket, bytes }, sink));
        });
        spawned.map_err(system("start a thread"))?;
        let began = Instant::now();
        let mut last_round = mode == CopyMode::StopCopy;
        let mut stopped = None;
        let mut too_long = false;
        loop {
            match result.recv_timeout(Duration::from_millis(20)) {
                Ok(Ok(finished)) => return Ok(finished),
                Ok(Err(_)) if cancel.load(Ordering::Relaxed) => return Err(SaveError::Cancelled),
                Ok(Err(_)) if too_long => return Err(max_pause.map_or(SaveError::PausedTooLong, budget)),
                Ok(Err(source)) => return Err(SaveError::stream(source)),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(system("read the stream")(io::Error::other("the reading thread ended")));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            let now = bytes.load(Ordering::Relaxed);
            if now != std::mem::replace(&mut seen, now) {
                progress();
            }
            if stopped.is_none() && qmp.events_after(held.mark).iter().any(|e| e.name == "STOP") {
                stopped = Some(Instant::now());
            }
            too_long = stopped.is_some_and(|since| since.elapsed() > max_pause.unwrap_or(PAUSE_LIMIT));
            // The guest writes faster than we read: its last round would take too long.
            too_long |= !last_round && max_pause.is_some() && began.elapsed() > ROUNDS_LIMIT;
            if too_long || cancel.load(Ordering::Relaxed) {
                // The reader fails at once, and QEMU with it.
                let _ = socket.shutdown(Shutdown::Both);
            } else if !last_round
                && max_pause.is_none()
                && (began.elapsed() > ROUNDS_LIMIT || rounds(qmp) >= ROUNDS_MAX)
            {
                let limit = json!({ "downtime-limit": DOWNTIME_MAX_MS });
                last_round = qmp.execute("migrate-set-parameters", limit).is_ok();
            }
        }
    })
}

fn budget(limit: Duration) -> SaveError {
    SaveError::PauseBudget { limit }
}

/// Counts what is read.
pub(crate) struct Counting<'a> {
    pub(crate) socket: &'a UnixStream,
    pub(crate) bytes: &'a AtomicU64,
}

impl Read for Counting<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.socket.read(buffer)?;
        self.bytes.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

fn rounds(qmp: &Qmp) -> u64 {
    let answer = qmp.execute("query-migrate", json!({})).ok();
    answer.and_then(|a| a.get("ram")?.get("dirty-sync-count")?.as_u64()).unwrap_or(0)
}

/// True if QEMU can start another migration.
fn is_over(status: &str) -> bool {
    matches!(status, "none" | "completed" | "failed" | "cancelled")
}

/// Waits until QEMU is out of the migration, and sees to it that the guest is as it was.
pub fn settle(qmp: &Qmp, before: &str) -> Result<(), SaveError> {
    let deadline = Instant::now() + SETTLE_LIMIT;
    let mut cancelled = false;
    let mut asked: Option<Instant> = None;
    loop {
        let answer = qmp.execute("query-migrate", json!({}))?;
        let status = answer.get("status").and_then(Value::as_str).unwrap_or("none").to_owned();
        let state = run_state(qmp)?;
        if is_over(&status) && state != "finish-migrate" {
            let command = match (before, state.as_str()) {
                // QEMU 7.2 and 8.0 leave a machine that was paused in `postmigrate`, which only `cont` leads out of.
                (_, "postmigrate") | ("running", "paused" | "prelaunch") => "cont",
                // Running; or stopped by something of its own, which is not ours to mend.
                ("running", _) => return Ok(()),
                (_, "running") => "stop",
                (_, _) => return Ok(()),
            };
            if asked.is_none_or(|at| at.elapsed() > Duration::from_millis(100)) {
                asked = Some(Instant::now());
                // Refused while QEMU has not quite finished; asked again then.
                let _ = qmp.execute(command, json!({}));
            }
        } else if !cancelled && Instant::now() + SETTLE_LIMIT / 2 >= deadline {
            cancelled = qmp.execute("migrate_cancel", json!({})).is_ok();
        }
        if Instant::now() >= deadline {
            return Err(SaveError::Stuck { status });
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// After the verdict "good": QEMU stays in `postmigrate`.
fn wait_for_standstill(qmp: &Qmp) -> Result<(), SaveError> {
    let deadline = Instant::now() + SETTLE_LIMIT;
    loop {
        let answer = qmp.execute("query-migrate", json!({}))?;
        let status = answer.get("status").and_then(Value::as_str).unwrap_or("none").to_owned();
        if status == "completed" && run_state(qmp)? == "postmigrate" {
            return Ok(());
        }
        // Failed after all: the guest runs on, and the state is no longer its last one.
        if matches!(status.as_str(), "failed" | "cancelled") {
            return Err(SaveError::NotStill { reason: migration_error(qmp).unwrap_or(status) });
        }
        if Instant::now() >= deadline {
            return Err(SaveError::Stuck { status });
        }
        thread::sleep(Duration::from_millis(1));
    }
}

fn migration_error(qmp: &Qmp) -> Option<String> {
    let answer = qmp.execute("query-migrate", json!({})).ok()?;
    Some(answer.get("error-desc")?.as_str()?.to_owned())
}

/// From the first STOP after `mark` to the RESUME that follows it.
pub(crate) fn pause_after(qmp: &Qmp, mark: u64) -> Option<u64> {
    let events = qmp.events_after(mark);
    let stop = events.iter().find(|e| e.name == "STOP")?;
    let resume = events.iter().find(|e| e.name == "RESUME" && e.seq > stop.seq)?;
    Some(resume.micros.saturating_sub(stop.micros))
}
