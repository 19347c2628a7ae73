//! A client of the workload in the test guest (`tests/guest`, whose `main.rs` has the protocol).
//!
//! [`Guest`] talks over the Unix socket of a virtio-serial port that QEMU listens on
//! ([`guest_port_args`]). After a restore another QEMU listens at the same path: connect again. What
//! the last connection left half said, on either side, is skipped.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use thiserror::Error;

/// How long a request may take, unless [`Guest::set_timeout`] says otherwise. An emulated guest on a
/// busy machine is slow.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Why the guest gave no usable answer.
#[derive(Debug, Error)]
pub enum GuestError {
    /// Nobody listens at the socket, or the connection broke. QEMU may have ended.
    #[error("no connection to the guest at {}", path.display())]
    Connection {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The guest did not answer in time: it hangs, is paused, or has not booted.
    #[error("the guest did not answer `{request}` in {seconds} s")]
    Timeout {
        /// The request without its id.
        request: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// The guest understood and refused or failed.
    #[error("the guest answered `{request}` with: {text}")]
    Refused {
        /// The request without its id.
        request: String,
        /// The guest's words.
        text: String,
    },
    /// The reply lacks something.
    #[error("the guest's reply to `{request}` has no usable `{key}`")]
    Reply {
        /// The request without its id.
        request: String,
        /// What was looked for.
        key: String,
    },
}

/// Arguments that give a QEMU the port that the workload listens to, with its socket at `socket`.
pub fn guest_port_args(socket: &Path) -> Vec<String> {
    // A comma in a value is written twice.
    let socket = socket.display().to_string().replace(',', ",,");
    [
        "-device",
        "virtio-serial-pci,id=testserial",
        "-chardev",
        &format!("socket,id=testport,path={socket},server=on,wait=off"),
        "-device",
        "virtserialport,bus=testserial.0,chardev=testport,name=spinney.test",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// What part of the filled memory is of which kind, in percent; together 100.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    /// Pages that are incompressible and different from every other.
    pub unique: u8,
    /// Incompressible pages, each there eight times.
    pub dup: u8,
    /// Copies of blocks of the file `known` on the guest's disk.
    pub disk: u8,
    /// Pages of zeros.
    pub zero: u8,
    /// What the random content is derived from; the same seed gives the same content.
    pub seed: u64,
}

impl Default for Mix {
    fn default() -> Mix {
        Mix { unique: 40, dup: 20, disk: 20, zero: 20, seed: 1 }
    }
}

/// Who the guest says it is.
#[derive(Clone, Debug)]
pub struct Hello {
    /// Drawn at the workload's start and kept in memory only: the same in a restored guest, another
    /// one after a reboot.
    pub nonce: String,
    /// The kernel's release.
    pub release: String,
    /// Memory that the guest's kernel manages, in KiB.
    pub memory_kib: u64,
    /// Whether a disk is mounted at `/data`.
    pub data: bool,
}

/// What a check of the area that `writer` dirties found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriterCheck {
    /// Pages written since the writer's start.
    pub steps: u64,
    /// Pages that are not what that number of steps leaves. Anything but 0 means that the memory is
    /// of more than one instant.
    pub bad: u64,
    /// The first of them.
    pub first_bad: Option<u64>,
}

/// What a check of the log found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogCheck {
    /// The last entry that memory knows to be synced.
    pub mem: u64,
    /// The last entry on the disk itself, or the first bad one there.
    pub disk: u64,
    /// The same as the guest's page cache has it.
    pub cached: u64,
    /// Whether every entry is as it was written.
    pub valid: bool,
    /// Whether memory and disk are of one instant: all valid, the disk at most one entry ahead.
    pub ok: bool,
}

/// A sign of life, sent every so many milliseconds. A gap in `micros` is a stall that the guest saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// From 1, without gaps.
    pub seq: u64,
    /// The guest's counter.
    pub counter: u64,
    /// Microseconds by the guest's monotonic clock, which stands still while the guest is paused.
    pub micros: u64,
    /// When it got here.
    pub received: Instant,
}

/// A connection to the workload.
pub struct Guest {
    path: PathBuf,
    stream: UnixStream,
    received: Vec<u8>,
    stamps: VecDeque<Stamp>,
    timeout: Duration,
}

impl Guest {
    /// Connects and waits until the workload answers, at most `timeout` in all. Later requests have a
    /// time-out of their own, see [`Guest::set_timeout`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<Guest, GuestError> {
        let deadline = Instant::now() + timeout;
        loop {
            match Guest::open(path) {
                Ok(mut guest) => {
                    guest.timeout = deadline.saturating_duration_since(Instant::now());
                    guest.nonce()?;
                    guest.timeout = TIMEOUT;
                    return Ok(guest);
                }
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Connects at the same path again, after a restore for example.
    pub fn reconnect(&mut self, timeout: Duration) -> Result<(), GuestError> {
        *self = Guest { timeout: self.timeout, ..Guest::connect(&self.path, timeout)? };
        Ok(())
    }

    /// Sets how long each request may take.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    fn open(path: &Path) -> Result<Guest, GuestError> {
        let failed = |source| GuestError::Connection { path: path.to_owned(), source };
        let mut stream = UnixStream::connect(path).map_err(failed)?;
        // Ends whatever was half said before.
        stream.write_all(b"\n").map_err(failed)?;
        let (received, stamps) = (Vec::new(), VecDeque::new());
        Ok(Guest { path: path.to_owned(), stream, received, stamps, timeout: TIMEOUT })
    }

    /// Identity and surroundings.
    pub fn hello(&mut self) -> Result<Hello, GuestError> {
        let reply = self.ask("hello")?;
        Ok(Hello {
            nonce: reply.text("nonce")?.to_owned(),
            release: reply.decoded("release")?,
            memory_kib: reply.number("memory_kib")?,
            data: reply.flag("data")?,
        })
    }

    /// The number drawn at the workload's start.
    pub fn nonce(&mut self) -> Result<String, GuestError> {
        Ok(self.ask("nonce")?.text("nonce")?.to_owned())
    }

    /// The counter, which goes up by one about every millisecond that the guest runs.
    pub fn counter(&mut self) -> Result<u64, GuestError> {
        self.ask("counter")?.number("counter")
    }

    /// Fills `mib` MiB of memory, in place of what was filled before; 0 frees it. Returns the pages.
    pub fn fill(&mut self, mib: u64, mix: Mix) -> Result<u64, GuestError> {
        let Mix { unique, dup, disk, zero, seed } = mix;
        self.ask(&format!("fill {mib} unique={unique} dup={dup} disk={disk} zero={zero} seed={seed}"))?
            .number("pages")
    }

    /// A hash over all filled memory, which the guest reads for it.
    pub fn hash(&mut self) -> Result<u64, GuestError> {
        self.ask("hash")?.hex("hash")
    }

    /// The hashes of `count` filled pages of 4 KiB from `first` on; fewer where the memory ends.
    pub fn page_hashes(&mut self, first: u64, count: u64) -> Result<Vec<u64>, GuestError> {
        let mut hashes = Vec::new();
        while (hashes.len() as u64) < count {
            let (from, left) = (first + hashes.len() as u64, count - hashes.len() as u64);
            let reply = self.ask(&format!("pages {from} {}", left.min(4096)))?;
            let words = reply.text("hashes")?.split(',').filter(|word| !word.is_empty());
            let before = hashes.len();
            for word in words {
                hashes.push(u64::from_str_radix(word, 16).map_err(|_| reply.lacks("hashes"))?);
            }
            if hashes.len() == before {
                break;
            }
        }
        Ok(hashes)
    }

    /// Rewrites `count` filled pages; `seed` decides which and with what.
    pub fn mutate(&mut self, seed: u64, count: u64) -> Result<(), GuestError> {
        self.ask(&format!("mutate {seed} {count}")).map(drop)
    }

    /// Looks at `steps` words anywhere in filled memory, each of which says where the next one is, and changes them if it is to `write`.
    /// How long it took by the guest's own clock.
    pub fn walk(&mut self, seed: u64, steps: u64, write: bool) -> Result<Duration, GuestError> {
        let reply = self.ask(&format!("walk {seed} {steps}{}", if write { " write" } else { "" }))?;
        Ok(Duration::from_micros(reply.number("us")?))
    }

    /// Begins to rewrite `rate` pages a second in an area of `pages` pages of its own.
    pub fn writer_start(&mut self, rate: u64, pages: u64) -> Result<(), GuestError> {
        self.ask(&format!("writer start {rate} pages={pages}")).map(drop)
    }

    /// Ends that; the area stays.
    pub fn writer_stop(&mut self) -> Result<(), GuestError> {
        self.ask("writer stop").map(drop)
    }

    /// Checks that area, while it is written too.
    pub fn writer_check(&mut self) -> Result<WriterCheck, GuestError> {
        let reply = self.ask("writer check")?;
        let first_bad = if reply.text("first_bad")? == "-" { None } else { Some(reply.number("first_bad")?) };
        Ok(WriterCheck { steps: reply.number("steps")?, bad: reply.number("bad")?, first_bad })
    }

    /// Begins to append `rate` synced entries a second to the log on the disk.
    pub fn log_start(&mut self, rate: u64) -> Result<(), GuestError> {
        self.ask(&format!("log start {rate}")).map(drop)
    }

    /// Appends `count` entries now; returns the number of the last.
    pub fn log_step(&mut self, count: u64) -> Result<u64, GuestError> {
        self.ask(&format!("log step {count}"))?.number("mem")
    }

    /// Ends the appending; returns the number of the last entry.
    pub fn log_stop(&mut self) -> Result<u64, GuestError> {
        self.ask("log stop")?.number("mem")
    }

    /// Compares the log on the disk with what memory knows of it.
    pub fn log_check(&mut self) -> Result<LogCheck, GuestError> {
        let reply = self.ask("log check")?;
        Ok(LogCheck {
            mem: reply.number("mem")?,
            disk: reply.number("disk")?,
            cached: reply.number("cached")?,
            valid: reply.flag("valid")?,
            ok: reply.flag("ok")?,
        })
    }

    /// Begins to write `mib` MiB a second to the disk without syncing; 0 ends it.
    pub fn disk_write(&mut self, mib: u64) -> Result<(), GuestError> {
        self.ask(&if mib == 0 { "diskwrite stop".to_owned() } else { format!("diskwrite {mib}") }).map(drop)
    }

    /// Has a stamp sent every `period` (whole milliseconds); zero ends it.
    pub fn stamp(&mut self, period: Duration) -> Result<(), GuestError> {
        let ms = period.as_millis();
        self.ask(&if ms == 0 { "stamp stop".to_owned() } else { format!("stamp {ms}") }).map(drop)
    }

    /// Collects stamps for the time `during`; those that came between replies are among them.
    pub fn stamps(&mut self, during: Duration) -> Result<Vec<Stamp>, GuestError> {
        let deadline = Instant::now() + during;
        while self.line(deadline)?.is_some() {}
        Ok(self.stamps.drain(..).collect())
    }

    /// `count` bytes (at most 4096) from the guest kernel's random generator.
    pub fn random(&mut self, count: u64) -> Result<String, GuestError> {
        Ok(self.ask(&format!("random {count}"))?.text("bytes")?.to_owned())
    }

    /// Whether the guest's kernel has a driver for the VM generation id: `bound`, `unbound` (the
    /// machine has one, the kernel does not care) or `absent`.
    pub fn genid(&mut self) -> Result<String, GuestError> {
        Ok(self.ask("genid")?.text("genid")?.to_owned())
    }

    /// The guest's wall clock.
    pub fn time(&mut self) -> Result<SystemTime, GuestError> {
        let nanoseconds = self.ask("time")?.number("unix_ns")?;
        Ok(SystemTime::UNIX_EPOCH + Duration::from_nanos(nanoseconds))
    }

    /// The hardware addresses of the network cards, by the names of their interfaces.
    pub fn macs(&mut self) -> Result<BTreeMap<String, String>, GuestError> {
        let reply = self.ask("macs")?;
        let cards = reply.text("macs")?.split(',').filter(|card| !card.is_empty());
        let pairs = cards.map(|card| card.split_once('/').ok_or_else(|| reply.lacks("macs")));
        pairs.map(|pair| pair.map(|(name, mac)| (name.to_owned(), mac.to_owned()))).collect()
    }

    /// The machine's UUID.
    pub fn uuid(&mut self) -> Result<String, GuestError> {
        Ok(self.ask("uuid")?.text("uuid")?.to_owned())
    }

    /// The host name.
    pub fn hostname(&mut self) -> Result<String, GuestError> {
        self.ask("hostname")?.decoded("hostname")
    }

    /// Runs a shell command; its exit status and what it wrote to both outputs (at most 64 KiB).
    pub fn cmd(&mut self, command: &str) -> Result<(i32, String), GuestError> {
        let mut request = "cmd ".to_owned();
        for byte in command.bytes() {
            // Writing to a string does not fail.
            let _ = write!(request, "%{byte:02X}");
        }
        let reply = self.ask(&request)?;
        Ok((reply.number("status")? as i32, reply.decoded("output")?))
    }

    /// Has the guest write everything back to its disk.
    pub fn sync(&mut self) -> Result<(), GuestError> {
        self.ask("sync").map(drop)
    }

    /// Has the guest switch itself off; returns when it begins to.
    pub fn power_off(&mut self) -> Result<(), GuestError> {
        self.ask("poweroff").map(drop)
    }

    /// Sends a request in the protocol's own words and waits for the reply.
    pub fn ask(&mut self, request: &str) -> Result<Reply, GuestError> {
        let id = next_id();
        let failed = |source| GuestError::Connection { path: self.path.clone(), source };
        self.stream.write_all(format!("{id} {request} .\n").as_bytes()).map_err(failed)?;
        let deadline = Instant::now() + self.timeout;
        while let Some(line) = self.line(deadline)? {
            let Some(rest) = line.strip_prefix(&id) else { continue };
            if let Some(values) = rest.strip_prefix(" ok") {
                return Ok(Reply::new(request, values));
            }
            if let Some(text) = rest.strip_prefix(" error ") {
                return Err(GuestError::Refused { request: request.to_owned(), text: text.to_owned() });
            }
        }
        Err(GuestError::Timeout { request: request.to_owned(), seconds: self.timeout.as_secs() })
    }

    /// The next line that is not a stamp, or nothing when it is not there in time.
    fn line(&mut self, deadline: Instant) -> Result<Option<String>, GuestError> {
        let failed = |source| GuestError::Connection { path: self.path.clone(), source };
        let mut buffer = [0; 4096];
        loop {
            while let Some(end) = self.received.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                match stamp(&line) {
                    Some(stamp) => self.stamps.push_back(stamp),
                    None => return Ok(Some(line)),
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left)).map_err(failed)?;
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
                Ok(got) => self.received.extend(buffer.iter().take(got)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                }
                Err(error) => return Err(failed(error)),
            }
        }
    }
}

/// The values of a reply.
#[derive(Debug)]
pub struct Reply {
    request: String,
    values: HashMap<String, String>,
}

impl Reply {
    fn new(request: &str, values: &str) -> Reply {
        let pairs = values.split_ascii_whitespace().filter_map(|word| word.split_once('='));
        let values = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        Reply { request: request.to_owned(), values }
    }

    /// A value as it came.
    pub fn text(&self, key: &str) -> Result<&str, GuestError> {
        self.values.get(key).map(String::as_str).ok_or_else(|| self.lacks(key))
    }

    /// A value as a decimal number.
    pub fn number(&self, key: &str) -> Result<u64, GuestError> {
        self.text(key)?.parse().map_err(|_| self.lacks(key))
    }

    fn hex(&self, key: &str) -> Result<u64, GuestError> {
        u64::from_str_radix(self.text(key)?, 16).map_err(|_| self.lacks(key))
    }

    fn flag(&self, key: &str) -> Result<bool, GuestError> {
        Ok(self.number(key)? != 0)
    }

    /// A value that is percent-encoded text.
    fn decoded(&self, key: &str) -> Result<String, GuestError> {
        let mut bytes = Vec::new();
        let mut rest = self.text(key)?.bytes();
        while let Some(byte) = rest.next() {
            let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
            bytes.push(match byte {
                b'%' => digit()
                    .zip(digit())
                    .map(|(high, low)| (high << 4 | low) as u8)
                    .ok_or_else(|| self.lacks(key))?,
                byte => byte,
            });
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn lacks(&self, key: &str) -> GuestError {
        GuestError::Reply { request: self.request.clone(), key: key.to_owned() }
    }
}

/// An id that no other request to any guest has; all are of one length, so that the rest of a reply
/// that was cut off is never taken for another.
fn next_id() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now =
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{now:016x}{:08x}{:08x}", std::process::id(), count as u32)
}

fn stamp(line: &str) -> Option<Stamp> {
    let mut words = line.strip_prefix("T ")?.split(' ').map(str::parse);
    let mut number = || words.next()?.ok();
    Some(Stamp { seq: number()?, counter: number()?, micros: number()?, received: Instant::now() })
}
