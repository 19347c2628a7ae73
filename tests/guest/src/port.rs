//! The line to the host: finding it, and living through a host that comes and goes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The name that the host gave the port.
const NAME: &str = "spinney.test";

/// A line longer than this is no request.
const LONGEST: usize = 64 << 10;

/// The half that reads.
pub(crate) struct Requests {
    file: File,
    line: Vec<u8>,
    buffer: Vec<u8>,
}

/// The half that writes, shared by whoever has something to say.
#[derive(Clone)]
pub(crate) struct Replies(Arc<Mutex<File>>);

/// Opens the port, waiting for it to appear; after two seconds without it, the second serial line.
pub(crate) fn open() -> (Requests, Replies) {
    let begun = Instant::now();
    loop {
        let mut path = find();
        if path.is_none() && begun.elapsed() > Duration::from_secs(2) {
            let serial = PathBuf::from("/dev/ttyS1");
            let raw = Command::new("stty").arg("-F").arg(&serial).args(["raw", "-echo"]).output();
            path = raw.is_ok_and(|raw| raw.status.success()).then_some(serial);
        }
        let opened = path.and_then(|path| OpenOptions::new().read(true).write(true).open(path).ok());
        if let Some((file, writing)) =
            opened.and_then(|file| file.try_clone().map(|clone| (file, clone)).ok())
        {
            let requests = Requests { file, line: Vec::new(), buffer: vec![0; 4096] };
            return (requests, Replies(Arc::new(Mutex::new(writing))));
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn find() -> Option<PathBuf> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?.flatten();
    let mut named =
        ports.filter(|port| fs::read_to_string(port.path().join("name")).is_ok_and(|n| n.trim() == NAME));
    Some(PathBuf::from("/dev").join(named.next()?.file_name()))
}

impl Requests {
    /// Waits for whole lines and gives each to `handle`, for ever.
    ///
    /// With no host at the other end, reading gives nothing or an error; neither is the end.
    pub(crate) fn each(mut self, mut handle: impl FnMut(&str)) -> ! {
        loop {
            let got = match self.file.read(&mut self.buffer) {
                Ok(0) => {
                    self.line.clear();
                    thread::sleep(Duration::from_millis(2));
                    continue;
                }
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => {
                    thread::sleep(Duration::from_millis(20));
                    continue;
                }
            };
            for &byte in self.buffer.iter().take(got) {
                if byte == b'\n' {
                    if let Ok(line) = std::str::from_utf8(&self.line) {
                        handle(line.trim());
                    }
                    self.line.clear();
                } else if self.line.len() < LONGEST {
                    self.line.push(byte);
                }
            }
        }
    }
}

impl Replies {
    /// Sends one line. While no host is there this waits for one; what cannot be sent is lost, and
    /// the host asks again.
    pub(crate) fn send(&self, line: &str) {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The line feed in front ends whatever was under way when the host last went.
        let _ = file.write_all(format!("\n{line}\n").as_bytes());
    }
}
