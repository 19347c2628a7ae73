//! A command under way, so that something can happen in the middle of it.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStderr};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::harness::{Ended, Spinney};

/// A command that has begun, with the events that it writes.
#[derive(Debug)]
pub struct Underway {
    command: String,
    child: Child,
    events: BufReader<ChildStderr>,
    /// What was read of the events.
    said: String,
}

impl Spinney {
    /// Begins a command; words are split at spaces.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn under_way(&self, words: &str) -> Underway {
        let mut child = self.begin(&words.split(' ').collect::<Vec<_>>());
        let events = BufReader::new(child.stderr.take().expect("its stderr"));
        Underway { command: words.to_owned(), child, events, said: String::new() }
    }
}

impl Underway {
    /// Waits until something of this phase has been done. False if the command ended first.
    pub fn reaches(&mut self, phase: &str) -> bool {
        let mut line = String::new();
        while self.events.read_line(&mut line).is_ok_and(|read| read > 0) {
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            self.said.push_str(&line);
            line.clear();
            let progress = &event["progress"];
            if progress["phase"] == phase && progress["done"].as_u64() > Some(0) {
                return true;
            }
        }
        false
    }

    /// True if it has ended.
    ///
    /// # Panics
    /// It cannot be asked.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("the command's end").is_some()
    }

    /// Sends it what Ctrl-C sends.
    pub fn interrupt(&self) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // One that has ended meanwhile is still a process until it is waited for.
            kill_process(pid, Signal::INT).expect("the signal");
        }
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// It cannot be waited for.
    pub fn end(mut self) -> Ended {
        let mut rest = Vec::new();
        // What came until it broke is what there is.
        let _ = self.events.read_to_end(&mut rest);
        self.said.push_str(&String::from_utf8_lossy(&rest));
        let output = self.child.wait_with_output().expect("the command's end");
        let document = serde_json::from_slice(&output.stdout).unwrap_or_default();
        Ended { command: self.command, code: output.status.code(), document, stderr: self.said }
    }
}

/// Waits until the daemon has come to this step, at which it makes the marker.
///
/// # Panics
/// It does not come there.
pub fn reached(marker: &Path, step: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !marker.exists() {
        assert!(Instant::now() < deadline, "{step} was not reached");
        thread::sleep(Duration::from_millis(5));
    }
}
