//! Getting a machine's state out of QEMU while the guest runs on: `background-snapshot`.
//!
//! ```text
//!   ours                                QEMU
//!   touch what was never touched        (the guest runs)
//!   capabilities, fd               ->
//!   stop                           ->   the guest stands still, its disks are idle and flushed
//!   `at_stop`: switch the disks    ->
//!   migrate                        ->   keeps the device state, write-protects memory, sends the first page
//!   first page seen: cont          ->   the guest runs; a write to a page that was not sent waits until it is
//!   read ... read                  <-   memory as it was, each page once, then the device state
//! ```
//! The state is that of the stop. `stop` outlives its sender, and a reader that reads no more makes the guest wait: whoever calls
//! needs a deadline that somebody else keeps, from before the call until its end. The thread that reads the stream waits for nothing
//! but the sink; `cont` comes from another one, because QEMU may answer it only when more pages were read.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use serde_json::json;

use crate::migration::{self, Finished, PAGE_SIZE, RamBlock, Sink, SinkError, read_stream};
use crate::populate::populate;
use crate::process::ProcessId;
use crate::qmp::{Qmp, QmpError};
use crate::save::{
    CallbackError, Counting, SaveError, SavedState, check_state, hand_over, pause_after, set_capabilities,
    settle, system,
};

/// How long a guest stands still at most, if the caller does not say less.
const PAUSE_LIMIT: Duration = Duration::from_secs(2);
/// How often whoever watches the reading thread looks around.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What a live save needs of its caller.
pub struct Live<'a> {
    /// The machine's monitor.
    pub qmp: &'a Qmp,
    /// Its process.
    pub process: ProcessId,
    /// How long the guest may stand still; a save that would need longer fails.
    pub max_pause: Option<Duration>,
    /// Looked at several times a second.
    pub cancel: &'a AtomicBool,
    /// Called several times a second while something gets on.
    pub progress: &'a dyn Fn(),
    /// Called right before the guest is stopped, and again before its memory is saved; if it fails, that is not done.
    pub confirm: &'a dyn Fn() -> Result<(), CallbackError>,
    /// Called while the guest stands still, before anything is saved. Fails with it.
    pub at_stop: &'a mut dyn FnMut() -> Result<(), CallbackError>,
    /// Called when the guest runs on, with its pause in microseconds.
    pub runs_on: &'a mut dyn FnMut(u64),
}

/// True if QEMU can save this running machine live: its version, the host's kernel and rights, and what its RAM is made of.
///
/// # Errors
/// [`SaveError::NotLive`] with QEMU's reason; another if the monitor failed.
pub fn check(qmp: &Qmp) -> Result<(), SaveError> {
    set_capabilities(qmp, &["events", "background-snapshot"]).map_err(|error| match error {
        QmpError::Refused { description, .. } => SaveError::NotLive { reason: description },
        other => other.into(),
    })
}

enum News {
    /// Memory is protected: a page of it was sent.
    FirstPage,
    End(Box<Result<Finished, migration::Error>>),
}

impl Live<'_> {
    /// Saves the machine's state into `sink`. On an error the guest runs on, and the state is worthless; `at_stop` may have been
    /// called.
    pub fn save(mut self, sink: &mut (dyn Sink + Send)) -> Result<SavedState, SaveError> {
        let run_state = check_state(self.qmp)?;
        if run_state != "running" {
            return Err(SaveError::State { state: run_state });
        }
        check(self.qmp)?;
        let goes_on = || {
            (self.progress)();
            !self.cancel.load(Ordering::Relaxed)
        };
        match populate(self.qmp, self.process, &goes_on) {
            Ok(pages) => tracing::debug!(pages, "touched memory that was never used"),
            Err(error) => tracing::info!(%error, "a guest's memory cannot be touched from outside"),
        }
        self.check_cancel()?;
        let socket = hand_over(self.qmp, "spinney-live")?;
        let (news, heard) = bounded(2);
        let (bytes, reading) = (&AtomicU64::new(0), &socket);
        thread::scope(|scope| {
            let spawned = thread::Builder::new().name("stream".into()).spawn_scoped(scope, move || {
                let mut sink = Announcing { sink, first: Some(news.clone()) };
                let end = read_stream(Counting { socket: reading, bytes }, &mut sink);
                let _ = news.send(News::End(Box::new(end)));
            });
            spawned.map_err(system("start a thread"))?;
            let mark = self.qmp.last_event();
            let saved = self.cut(&heard, mark).and_then(|pause_us| {
                (self.runs_on)(pause_us);
                let finished = self.rest(&heard, &socket, bytes)?;
                Ok(SavedState { finished, pause_us: Some(pause_us), run_state: run_state.clone() })
            });
            if saved.is_err() {
                self.give_up(&socket);
            }
            // A state that is whole counts, even if QEMU then has trouble: the next command will meet that.
            match (saved, settle(self.qmp, &run_state)) {
                (Ok(saved), settled) => {
                    if let Err(error) = settled {
                        tracing::error!(%error, "a machine did not come back from a save as it was");
                    }
                    Ok(saved)
                }
                (Err(error), Ok(())) => Err(error.explained(self.qmp)),
                (Err(_), Err(stuck)) => Err(stuck),
            }
        })
    }

    /// From `stop` to `cont`; returns the pause.
    fn cut(&mut self, heard: &Receiver<News>, mark: u64) -> Result<u64, SaveError> {
        (self.confirm)().map_err(SaveError::AtEnd)?;
        let began = Instant::now();
        let limit = self.max_pause.unwrap_or(PAUSE_LIMIT);
        self.qmp.execute("stop", json!({}))?;
        // `stop` flushes the disks, which may have taken all the time there is: better no switch than one for nothing.
        self.within(began.elapsed(), limit)?;
        (self.at_stop)().map_err(SaveError::AtEnd)?;
        // A guest that was let go on meanwhile is not of that instant any more; and a QEMU whose migration is broken off as soon as it
        // began, with the guest running, was seen to stay in it for good (10.0).
        self.within(began.elapsed(), limit)?;
        (self.confirm)().map_err(SaveError::AtEnd)?;
        self.check_cancel()?;
        self.qmp.execute("migrate", json!({ "uri": "fd:spinney-live" }))?;
        loop {
            match heard.recv_timeout(LOOK_EVERY.min(limit.saturating_sub(began.elapsed()))) {
                Ok(News::FirstPage) => break,
                // QEMU sends every page of the blocks' list, so no good end can come before the first one.
                Ok(News::End(end)) => {
                    return Err(end.err().map_or_else(unexpected_end, SaveError::stream));
                }
                Err(RecvTimeoutError::Disconnected) => return Err(unexpected_end()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.check_cancel()?;
            self.within(began.elapsed(), limit)?;
        }
        self.within(began.elapsed(), limit)?;
        // QEMU before 9.0 has let it run by itself; then this changes nothing.
        self.qmp.execute("cont", json!({}))?;
        let pause_us = pause_after(self.qmp, mark).unwrap_or_else(|| micros(began.elapsed()));
        if let Some(limit) = self.max_pause {
            self.within(Duration::from_micros(pause_us), limit)?;
        }
        Ok(pause_us)
    }

    /// The guest runs: everything that is still to come.
    fn rest(
        &self,
        heard: &Receiver<News>,
        socket: &UnixStream,
        bytes: &AtomicU64,
    ) -> Result<Finished, SaveError> {
        let mut seen = 0;
        loop {
            match heard.recv_timeout(LOOK_EVERY) {
                Ok(News::End(end)) => {
                    let cancelled = self.cancel.load(Ordering::Relaxed);
                    return end
                        .map_err(|e| if cancelled { SaveError::Cancelled } else { SaveError::stream(e) });
                }
                Err(RecvTimeoutError::Disconnected) => return Err(unexpected_end()),
                Ok(News::FirstPage) | Err(RecvTimeoutError::Timeout) => {}
            }
            let now = bytes.load(Ordering::Relaxed);
            if now != std::mem::replace(&mut seen, now) {
                (self.progress)();
            }
            if self.cancel.load(Ordering::Relaxed) {
                // The reader fails at once, and QEMU with it.
                let _ = socket.shutdown(Shutdown::Both);
            }
        }
    }

    /// The guest goes on at once, whatever becomes of QEMU's migration.
    fn give_up(&self, socket: &UnixStream) {
        let _ = socket.shutdown(Shutdown::Both);
        if let Err(error) = self.qmp.execute("cont", json!({})) {
            // Asked again while the migration settles.
            tracing::debug!(%error, "cont after a save that failed");
        }
    }

    fn check_cancel(&self) -> Result<(), SaveError> {
        if self.cancel.load(Ordering::Relaxed) { Err(SaveError::Cancelled) } else { Ok(()) }
    }

    fn within(&self, took: Duration, limit: Duration) -> Result<(), SaveError> {
        if took < limit { Ok(()) } else { Err(SaveError::PauseBudget { limit }) }
    }
}

/// Tells of the first page that comes.
struct Announcing<'a> {
    sink: &'a mut (dyn Sink + Send),
    first: Option<Sender<News>>,
}

impl Announcing<'_> {
    fn seen(&mut self) {
        if let Some(first) = self.first.take() {
            let _ = first.send(News::FirstPage);
        }
    }
}

impl Sink for Announcing<'_> {
    fn blocks(&mut self, blocks: &[RamBlock]) -> Result<(), SinkError> {
        self.sink.blocks(blocks)
    }

    fn page(&mut self, block: usize, offset: u64, bytes: &[u8; PAGE_SIZE]) -> Result<(), SinkError> {
        self.seen();
        self.sink.page(block, offset, bytes)
    }

    fn zero(&mut self, block: usize, offset: u64) -> Result<(), SinkError> {
        self.seen();
        self.sink.zero(block, offset)
    }

    fn ram_end(&mut self) -> Result<(), SinkError> {
        self.sink.ram_end()
    }
}

fn unexpected_end() -> SaveError {
    system("read the stream")(std::io::Error::other("it has no end"))
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
