//! Asking inside a guest: the QEMU guest agent, over the virtio-serial port that it listens to.
//!
//! The protocol is QEMU's `docs/interop/qemu-ga-ref`: JSON, a line each. Nobody may be there, or be in the middle of an answer to somebody
//! else; so each connection begins with `guest-sync-delimited`, whose answer is found by its number. What comes back is a guest's word, and
//! is believed no further than that.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Longest answer accepted.
const LIMIT: usize = 1 << 20;
/// Between looks whether a program in the guest has ended.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Comes before an answer to `guest-sync-delimited`, and nowhere in JSON.
const SENTINEL: u8 = 0xff;

/// A connection to a guest's agent.
#[derive(Debug)]
pub struct GuestAgent {
    socket: UnixStream,
    limit: Duration,
}

impl GuestAgent {
    /// Connects, and waits until the agent answers, at most for `limit`; each question later has as long. `number` tells this connection
    /// from others.
    ///
    /// # Errors
    /// Nobody answers: there is no agent, it is busy, or the guest stands still.
    pub fn connect(socket: &Path, number: u32, limit: Duration) -> io::Result<Self> {
        let mut agent = Self { socket: UnixStream::connect(socket)?, limit };
        let sync = json!({ "execute": "guest-sync-delimited", "arguments": { "id": number } });
        let mut words = vec![SENTINEL];
        words.extend(sync.to_string().into_bytes());
        words.push(b'\n');
        agent.socket.set_write_timeout(Some(limit))?;
        agent.socket.write_all(&words)?;
        let deadline = Instant::now() + limit;
        loop {
            let answer = agent.line(deadline)?;
            // What an earlier client has asked comes first.
            let own = answer.rsplit(|byte| *byte == SENTINEL).next().unwrap_or_default();
            let own: Value = serde_json::from_slice(own).unwrap_or_default();
            if own.get("return").and_then(Value::as_u64) == Some(number.into()) {
                return Ok(agent);
            }
        }
    }

    /// Asks for something.
    ///
    /// # Errors
    /// No answer comes in time; the guest refuses.
    pub fn execute(&mut self, command: &str, arguments: Value) -> io::Result<Value> {
        let mut words = json!({ "execute": command, "arguments": arguments }).to_string().into_bytes();
        words.push(b'\n');
        self.socket.write_all(&words)?;
        let answer = self.line(Instant::now() + self.limit)?;
        let answer: Value = serde_json::from_slice(&answer)?;
        match answer.get("return") {
            Some(value) => Ok(value.clone()),
            None => {
                let why = answer.pointer("/error/desc").and_then(Value::as_str).unwrap_or("no answer");
                Err(io::Error::other(format!("{command}: {why}")))
            }
        }
    }

    /// Sets the guest's clock.
    ///
    /// # Errors
    /// As [`GuestAgent::execute`].
    pub fn set_time(&mut self, since_1970: Duration) -> io::Result<()> {
        let nanoseconds = i64::try_from(since_1970.as_nanos()).unwrap_or(i64::MAX);
        self.execute("guest-set-time", json!({ "time": nanoseconds })).map(drop)
    }

    /// Runs words of the guest's shell; its exit code.
    ///
    /// # Errors
    /// As [`GuestAgent::execute`]; it takes longer than a question may.
    pub fn shell(&mut self, words: &str) -> io::Result<i64> {
        let run = json!({ "path": "/bin/sh", "arg": ["-c", words] });
        let started = self.execute("guest-exec", run)?;
        let pid = started.get("pid").cloned().unwrap_or_default();
        let deadline = Instant::now() + self.limit;
        loop {
            let status = self.execute("guest-exec-status", json!({ "pid": pid }))?;
            if status.get("exited") == Some(&Value::Bool(true)) {
                let code = status.get("exitcode").and_then(Value::as_i64);
                return code.ok_or_else(|| io::Error::other("the guest's shell was ended by a signal"));
            }
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    /// Reads up to the end of a line.
    fn line(&mut self, deadline: Instant) -> io::Result<Vec<u8>> {
        let mut line = Vec::new();
        let mut byte = [0];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.socket.set_read_timeout(Some(left))?;
            match self.socket.read(&mut byte) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) if byte == [b'\n'] => return Ok(line),
                Ok(_) if line.len() >= LIMIT => return Err(io::Error::other("an answer without end")),
                Ok(_) => line.extend(byte),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    /// An agent that has these answers, one for each line; what it was asked.
    fn agent(path: &Path, answers: &'static [&'static [u8]]) -> thread::JoinHandle<Vec<String>> {
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(socket.try_clone().unwrap());
            let mut asked = Vec::new();
            for answer in answers {
                let mut line = Vec::new();
                lines.read_until(b'\n', &mut line).unwrap();
                asked.push(String::from_utf8_lossy(&line).into_owned());
                socket.write_all(answer).unwrap();
            }
            asked
        })
    }

    #[test]
    fn an_answer_to_somebody_else_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let there = agent(
            &path,
            &[
                b"{\"return\": {}}\n{\"return\": 1, \xff{\"return\": 77}\n",
                b"{\"return\": {}}\n",
                b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"not here\"}}\n",
                b"{\"return\": {\"pid\": 5}}\n",
                b"{\"return\": {\"exited\": false}}\n",
                b"{\"return\": {\"exited\": true, \"exitcode\": 3}}\n",
            ],
        );
        let mut asked = GuestAgent::connect(&path, 77, Duration::from_secs(5)).unwrap();
        asked.set_time(Duration::from_secs(2)).unwrap();
        assert!(asked.execute("guest-x", json!({})).unwrap_err().to_string().contains("not here"));
        assert_eq!(asked.shell("true").unwrap(), 3);
        let said = there.join().unwrap();
        assert!(said[1].contains("2000000000") && said[3].contains("/bin/sh"), "{said:?}");
    }

    #[test]
    fn nobody_is_waited_for_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let _listener = UnixListener::bind(&path).unwrap();
        let began = Instant::now();
        let error = GuestAgent::connect(&path, 1, Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() < Duration::from_secs(5));
    }
}
