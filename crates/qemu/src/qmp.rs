//! A QMP monitor: commands with time-outs, events with QEMU's own time stamps.
//!
//! One thread reads the socket; callers wait on a condition variable. No call waits for ever: a QEMU whose main loop is
//! stuck answers nothing, and whoever asks it must get an error, not hang with it. The wire format is QEMU's
//! `docs/interop/qmp-spec.rst`: one JSON object a line.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};
use serde_json::{Value, json};

/// How long an ordinary command may take. Those that do work name their own limit.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(10);
/// How long handing a command to the kernel may take.
const WRITE_LIMIT: Duration = Duration::from_secs(2);
/// The longest answer accepted. `query-named-block-nodes` of a chain 200 deep is about 1 MiB.
const LINE_LIMIT: u64 = 64 << 20;
/// Events kept for those who look back. A migration of many rounds sends a few hundred.
const EVENTS_KEPT: usize = 4096;

/// Why a monitor gave no answer, or a bad one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// The socket cannot be reached.
    #[error("cannot reach the QEMU monitor {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// QEMU closed the connection, or ended.
    #[error("QEMU closed its monitor while `{command}` was waiting: {reason}")]
    Closed {
        /// What was being asked.
        command: String,
        /// What the reader saw.
        reason: String,
    },
    /// No answer in time.
    #[error("QEMU did not answer `{command}` within {milliseconds} ms")]
    TimedOut {
        /// What was being asked.
        command: String,
        /// The limit.
        milliseconds: u128,
    },
    /// QEMU answered with an error.
    #[error("QEMU refused `{command}`: {description}")]
    Refused {
        /// What was being asked.
        command: String,
        /// QEMU's words.
        description: String,
    },
    /// QEMU answered with something that the caller cannot use.
    #[error("QEMU answered `{command}` without {missing}")]
    Answer {
        /// What was being asked.
        command: String,
        /// What the answer lacks.
        missing: &'static str,
    },
    /// The command could not be sent.
    #[error("cannot send `{command}` to QEMU")]
    Send {
        /// What was being asked.
        command: String,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// An event, with the time QEMU gave it.
#[derive(Clone, Debug)]
pub struct Event {
    /// Position in this monitor's sequence of events, from 1.
    pub seq: u64,
    /// Name: "STOP", "RESUME", "MIGRATION".
    pub name: String,
    /// Data, `Null` if none.
    pub data: Value,
    /// Microseconds since 1970 by QEMU's clock.
    pub micros: u64,
}

/// A connected monitor. Dropping it closes the connection.
#[derive(Debug)]
pub struct Qmp {
    socket: UnixStream,
    sending: Mutex<u64>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    inbox: Mutex<Inbox>,
    news: Condvar,
}

#[derive(Debug, Default)]
struct Inbox {
    waiting: HashSet<u64>,
    answers: HashMap<u64, Value>,
    events: VecDeque<Event>,
    last_event: u64,
    closed: Option<String>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Qmp {
    /// Connects, waits for the greeting and leaves negotiation mode; `oob` asks for out-of-band execution as well. The
    /// socket may appear during `limit`: QEMU makes it while it starts.
    pub fn connect(path: &Path, oob: bool, limit: Duration) -> Result<Self, QmpError> {
        let deadline = Instant::now() + limit;
        let socket = loop {
            match connect_at_once(path) {
                Ok(socket) => break socket,
                Err(source) if Instant::now() >= deadline => {
                    return Err(QmpError::Connect { path: path.to_owned(), source });
                }
                Err(_) => thread::sleep(Duration::from_millis(2)),
            }
        };
        let connect = |source| QmpError::Connect { path: path.to_owned(), source };
        // A stuck QEMU leaves what it is sent in the socket, until that is full.
        socket.set_write_timeout(Some(WRITE_LIMIT)).map_err(connect)?;
        let reader = socket.try_clone().map_err(connect)?;
        let shared = Arc::new(Shared::default());
        let qmp = Self { socket, sending: Mutex::new(0), shared: Arc::clone(&shared) };
        thread::Builder::new()
            .name("qmp".into())
            .spawn(move || read_loop(reader, &shared))
            .map_err(connect)?;
        let arguments = if oob { json!({ "enable": ["oob"] }) } else { json!({}) };
        // The greeting needs no waiting for: QEMU reads the command after it has sent it.
        qmp.execute_within("qmp_capabilities", arguments, limit.max(Duration::from_secs(2)))?;
        Ok(qmp)
    }

    /// Runs a command within [`COMMAND_LIMIT`].
    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, COMMAND_LIMIT)
    }

    /// Runs a command within `limit`.
    pub fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        self.send("execute", command, arguments, None, limit)
    }

    /// Runs a command out of band: QEMU answers from its monitor thread even when its main loop is stuck.
    pub fn execute_oob(&self, command: &str, arguments: Value, limit: Duration) -> Result<Value, QmpError> {
        self.send("exec-oob", command, arguments, None, limit)
    }

    /// Hands QEMU a descriptor under `name` (`getfd`), for `fd:NAME` addresses.
    pub fn send_fd(&self, name: &str, fd: impl AsFd) -> Result<(), QmpError> {
        self.send("execute", "getfd", json!({ "fdname": name }), Some(fd.as_fd()), COMMAND_LIMIT).map(drop)
    }

    /// Position of the newest event: what comes later has a higher `seq`.
    pub fn last_event(&self) -> u64 {
        self.shared.lock().last_event
    }

    /// Events after position `after`, oldest first, as far as they are kept.
    pub fn events_after(&self, after: u64) -> Vec<Event> {
        self.shared.lock().events.iter().filter(|e| e.seq > after).cloned().collect()
    }

    /// Waits for an event after position `after` that `wanted` accepts.
    pub fn wait_event(
        &self,
        after: u64,
        limit: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event, QmpError> {
        let deadline = Instant::now() + limit;
        let mut inbox = self.shared.lock();
        loop {
            if let Some(event) = inbox.events.iter().find(|e| e.seq > after && wanted(e)) {
                return Ok(event.clone());
            }
            inbox = self.wait(inbox, "an event", deadline, limit)?;
        }
    }

    /// True once QEMU has closed the connection.
    pub fn is_closed(&self) -> bool {
        self.shared.lock().closed.is_some()
    }

    /// Closes the connection: every command from now on fails.
    pub fn close(&self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn send(
        &self,
        verb: &str,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let deadline = Instant::now() + limit;
        let id = {
            let mut last = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
            *last += 1;
            let id = *last;
            self.shared.lock().waiting.insert(id);
            let mut line = json!({ verb: command, "arguments": arguments, "id": id }).to_string();
            line.push('\n');
            let sent = write_with_fd(&self.socket, line.as_bytes(), fd);
            sent.map_err(|source| {
                let mut inbox = self.shared.lock();
                inbox.waiting.remove(&id);
                // Half a command may have gone: nothing sensible can follow it.
                let _ = self.socket.shutdown(Shutdown::Both);
                match inbox.closed.clone() {
                    Some(reason) => QmpError::Closed { command: command.to_owned(), reason },
                    // The reader has not seen it yet.
                    None if is_gone(&source) => {
                        QmpError::Closed { command: command.to_owned(), reason: source.to_string() }
                    }
                    None => QmpError::Send { command: command.to_owned(), source },
                }
            })?;
            id
        };
        let mut inbox = self.shared.lock();
        let answer = loop {
            if let Some(answer) = inbox.answers.remove(&id) {
                break answer;
            }
            match self.wait(inbox, command, deadline, limit) {
                Ok(guard) => inbox = guard,
                Err(error) => {
                    self.shared.lock().waiting.remove(&id);
                    return Err(error);
                }
            }
        };
        drop(inbox);
        match answer.get("error") {
            None => Ok(answer.get("return").cloned().unwrap_or(Value::Null)),
            Some(error) => Err(QmpError::Refused {
                command: command.to_owned(),
                description: error
                    .get("desc")
                    .and_then(Value::as_str)
                    .unwrap_or("no reason given")
                    .to_owned(),
            }),
        }
    }

    fn wait<'a>(
        &self,
        inbox: MutexGuard<'a, Inbox>,
        command: &str,
        deadline: Instant,
        limit: Duration,
    ) -> Result<MutexGuard<'a, Inbox>, QmpError> {
        if let Some(reason) = &inbox.closed {
            return Err(QmpError::Closed { command: command.to_owned(), reason: reason.clone() });
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(QmpError::TimedOut { command: command.to_owned(), milliseconds: limit.as_millis() });
        }
        let waited = self.shared.news.wait_timeout(inbox, left);
        Ok(waited.unwrap_or_else(PoisonError::into_inner).0)
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.close();
    }
}

/// Nobody is at the other end any more.
fn is_gone(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset)
}

/// Connects, or fails: a QEMU that is stopped accepts nobody, and once its queue is full the system would have us wait without end.
fn connect_at_once(path: &Path) -> std::io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &address)?;
    let socket = UnixStream::from(socket);
    socket.set_nonblocking(false)?;
    Ok(socket)
}

fn write_with_fd(mut socket: &UnixStream, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> std::io::Result<()> {
    let Some(fd) = fd else { return socket.write_all(bytes) };
    let fds = [fd];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(std::io::Error::other("no room for a descriptor"));
    }
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    socket.write_all(bytes.get(sent..).unwrap_or_default())
}

fn read_loop(socket: UnixStream, shared: &Shared) {
    let mut reader = BufReader::new(socket);
    let mut line = Vec::new();
    let reason = loop {
        line.clear();
        match reader.by_ref().take(LINE_LIMIT).read_until(b'\n', &mut line) {
            Ok(0) => break "end of file".to_owned(),
            Ok(_) if line.last() != Some(&b'\n') => break "a line that does not end".to_owned(),
            Ok(_) => {}
            Err(error) => break error.to_string(),
        }
        match serde_json::from_slice::<Value>(&line) {
            Ok(message) => accept(shared, message),
            Err(error) => break format!("a line that is not JSON: {error}"),
        }
    };
    shared.lock().closed = Some(reason);
    shared.news.notify_all();
}

fn accept(shared: &Shared, message: Value) {
    let mut inbox = shared.lock();
    if let Some(name) = message.get("event").and_then(Value::as_str) {
        let stamp =
            |key| message.get("timestamp").and_then(|t| t.get(key)).and_then(Value::as_u64).unwrap_or(0);
        inbox.last_event += 1;
        let event = Event {
            seq: inbox.last_event,
            name: name.to_owned(),
            data: message.get("data").cloned().unwrap_or(Value::Null),
            micros: stamp("seconds").saturating_mul(1_000_000).saturating_add(stamp("microseconds")),
        };
        if inbox.events.len() >= EVENTS_KEPT {
            inbox.events.pop_front();
        }
        inbox.events.push_back(event);
    } else if let Some(id) = message.get("id").and_then(Value::as_u64)
        && inbox.waiting.remove(&id)
    {
        inbox.answers.insert(id, message);
    }
    // Anything else is the greeting, or the answer to a question that timed out.
    drop(inbox);
    shared.news.notify_all();
}

#[cfg(test)]
mod tests;
