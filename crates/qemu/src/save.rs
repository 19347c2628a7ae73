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

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, bounded};
use serde_json::{Value, json};

use crate::migration::{self, Finished, SHUT_FAILED, SHUT_OK, Sink, read_stream, shut};
use crate::qmp::{Qmp, QmpError};

/// A reader that gets nothing for so long gives up: QEMU always has something to send, or is done.
const STALL_LIMIT: Duration = Duration::from_secs(30);
/// How long QEMU may take to come back from a migration that ended.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);
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

/// What becomes of the guest after its state was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It goes on as before.
    GoOn,
    /// It stands still, its disks flushed and closed for writing, until [`settle`]: for a machine that is about to be replaced, and
    /// must not do anything that the state does not have.
    StandStill,
}

/// What a save brought.
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

/// Why a machine's state could not be had. The guest goes on as before in every case.
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

/// Reads the machine's state into `sink`. `at_end` is called once the last byte has arrived, with the guest stopped and its
/// disks idle; if it fails, so does the save. `cancel` is looked at several times a second, up to `at_end`.
pub fn save(
    qmp: &Qmp,
    (mode, ending): (CopyMode, Ending),
    sink: &mut (dyn Sink + Send),
    cancel: &AtomicBool,
    at_end: &mut dyn FnMut() -> Result<(), CallbackError>,
) -> Result<SavedState, SaveError> {
    let run_state = check_state(qmp)?;
    let downtime = match mode {
        CopyMode::StopCopy => DOWNTIME_MAX_MS,
        CopyMode::PreCopy => DOWNTIME_MS,
    };
    set_capabilities(qmp, &["events", "return-path"])?;
    qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": 0, "downtime-limit": downtime }))?;

    let socket = hand_over(qmp, "spinney-save")?;
    socket.set_read_timeout(Some(STALL_LIMIT)).map_err(system("set a time-out"))?;
    let mark = qmp.last_event();
    qmp.execute("migrate", json!({ "uri": "fd:spinney-save" }))?;

    let read = read_while_watching(qmp, mode, &socket, sink, cancel);
    let outcome = match read {
        Ok(finished) => match at_end() {
            Ok(()) => {
                let verdict = if ending == Ending::GoOn { SHUT_FAILED } else { SHUT_OK };
                (&socket).write_all(&shut(verdict)).map(|()| finished).map_err(system("answer QEMU"))
            }
            Err(error) => Err(SaveError::AtEnd(error)),
        },
        Err(error) => Err(error),
    };
    if outcome.is_err() {
        let _ = socket.shutdown(Shutdown::Both);
    }
    if let (Ok(finished), Ending::StandStill) = (&outcome, ending) {
        wait_for_standstill(qmp)?;
        let finished = finished.clone();
        return Ok(SavedState { finished, pause_us: None, run_state });
    }
    let settled = settle(qmp, &run_state);
    match outcome {
        // The state is whole: it counts even if QEMU then had trouble, which the next command will meet.
        Ok(finished) => Ok(SavedState { finished, pause_us: pause_after(qmp, mark), run_state }),
        Err(SaveError::Stream { source, .. }) => {
            settled?;
            Err(SaveError::Stream { source, qemu: migration_error(qmp) })
        }
        Err(error) => {
            settled?;
            Err(error)
        }
    }
}

/// Makes a socket pair and gives QEMU one end under a name.
pub(crate) fn hand_over(qmp: &Qmp, name: &str) -> Result<UnixStream, SaveError> {
    let (ours, theirs) = UnixStream::pair().map_err(system("make a socket pair"))?;
    qmp.send_fd(name, &theirs)?;
    Ok(ours)
}

fn system(act: &'static str) -> impl FnOnce(io::Error) -> SaveError {
    move |source| SaveError::System { act, source }
}

fn check_state(qmp: &Qmp) -> Result<String, SaveError> {
    let state = run_state(qmp)?;
    if !matches!(state.as_str(), "running" | "paused" | "prelaunch" | "suspended") {
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
    Ok(state)
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
    qmp: &Qmp,
    mode: CopyMode,
    socket: &UnixStream,
    sink: &mut (dyn Sink + Send),
    cancel: &AtomicBool,
) -> Result<Finished, SaveError> {
    let (done, result) = bounded(1);
    thread::scope(|scope| {
        let spawned = thread::Builder::new().name("stream".into()).spawn_scoped(scope, move || {
            let _ = done.send(read_stream(socket, sink));
        });
        spawned.map_err(system("start a thread"))?;
        let began = Instant::now();
        let mut last_round = mode == CopyMode::StopCopy;
        loop {
            match result.recv_timeout(Duration::from_millis(20)) {
                Ok(Ok(finished)) => return Ok(finished),
                Ok(Err(_)) if cancel.load(Ordering::Relaxed) => return Err(SaveError::Cancelled),
                Ok(Err(source)) => return Err(SaveError::Stream { source, qemu: None }),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(system("read the stream")(io::Error::other("the reading thread ended")));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if cancel.load(Ordering::Relaxed) {
                // The reader fails at once, and QEMU with it.
                let _ = socket.shutdown(Shutdown::Both);
            } else if !last_round && (began.elapsed() > ROUNDS_LIMIT || rounds(qmp) >= ROUNDS_MAX) {
                let limit = json!({ "downtime-limit": DOWNTIME_MAX_MS });
                last_round = qmp.execute("migrate-set-parameters", limit).is_ok();
            }
        }
    })
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
    loop {
        let answer = qmp.execute("query-migrate", json!({}))?;
        let status = answer.get("status").and_then(Value::as_str).unwrap_or("none").to_owned();
        let state = run_state(qmp)?;
        let between = matches!(state.as_str(), "finish-migrate" | "postmigrate");
        if is_over(&status) && state != "finish-migrate" {
            match (before, state.as_str()) {
                ("running", "running") | ("running", "shutdown" | "guest-panicked") => return Ok(()),
                (_, state) if before != "running" && !between && state != "running" => return Ok(()),
                ("running", _) => drop(qmp.execute("cont", json!({}))),
                // QEMU 7.2 and 8.0 leave a machine that was paused in a state that only `cont` leads out of.
                (_, "postmigrate") => drop(qmp.execute("cont", json!({}))),
                (_, _) => drop(qmp.execute("stop", json!({}))),
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
fn pause_after(qmp: &Qmp, mark: u64) -> Option<u64> {
    let events = qmp.events_after(mark);
    let stop = events.iter().find(|e| e.name == "STOP")?;
    let resume = events.iter().find(|e| e.name == "RESUME" && e.seq > stop.seq)?;
    Some(resume.micros.saturating_sub(stop.micros))
}
