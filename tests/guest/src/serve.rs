//! Requests and what is done about them. `main.rs` lists them.

use std::collections::VecDeque;
use std::fmt::Display;
use std::path::Path;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::memory::{Memory, Mix};
use crate::port::{self, Replies};
use crate::scratch::Writer;
use crate::ticks::{Counter, Steady};
use crate::{disk, log, machine, text};

/// The most pages or random bytes in one reply.
const MOST: usize = 4096;

/// The most bytes of a command's output in one reply.
const MOST_OUTPUT: usize = 64 << 10;

/// Everything the workload keeps in memory.
struct State {
    nonce: String,
    counter: Counter,
    memory: Memory,
    writer: Writer,
    log: log::Log,
    disk_writer: Option<Steady>,
    stamps: Option<Steady>,
    replies: Replies,
}

/// The words of a request behind its id.
type Words<'a> = VecDeque<&'a str>;

/// What is said behind `ok`, or behind `error`.
type Reply = Result<String, String>;

/// Answers requests until the machine goes off.
pub(crate) fn run() -> ExitCode {
    let nonce = match machine::random(16) {
        Ok(nonce) => nonce,
        Err(error) => {
            eprintln!("workload: no nonce: {error}");
            return ExitCode::FAILURE;
        }
    };
    let counter = Counter::start();
    // A machine may have no port for us, and be switched off all the same.
    let serving: Arc<OnceLock<Arc<Mutex<State>>>> = Arc::default();
    let pressed = Arc::clone(&serving);
    machine::watch_power_button(move || match pressed.get() {
        Some(state) => state.lock().unwrap_or_else(PoisonError::into_inner).power_off(),
        None => machine::power_off(),
    });
    let (requests, replies) = port::open();
    let state = Arc::new(Mutex::new(State {
        nonce,
        counter,
        memory: Memory::default(),
        writer: Writer::default(),
        log: log::Log::new("/data/log"),
        disk_writer: None,
        stamps: None,
        replies: replies.clone(),
    }));
    serving.get_or_init(|| Arc::clone(&state));
    println!("workload: ready");
    requests.each(|line| {
        let mut words: Words<'_> = line.split_ascii_whitespace().collect();
        // Without its full stop a request is the rest of one that was cut off.
        if words.pop_back() != Some(".") {
            return;
        }
        let Some(id) = words.pop_front() else { return };
        let last = words.front() == Some(&"poweroff");
        let answer = state.lock().unwrap_or_else(PoisonError::into_inner).answer(words);
        replies.send(&match answer {
            Ok(values) => format!("{id} ok {values}"),
            Err(error) => format!("{id} error {}", error.replace(['\n', '\r'], " ")),
        });
        if last {
            state.lock().unwrap_or_else(PoisonError::into_inner).power_off();
        }
    })
}

impl State {
    fn answer(&mut self, mut words: Words<'_>) -> Reply {
        match word(&mut words, "a verb")? {
            "hello" => Ok(format!(
                "nonce={} release={} memory_kib={} data={}",
                self.nonce,
                text::encode(machine::release().as_bytes()),
                machine::memory_kib(),
                u8::from(disk::mounted()),
            )),
            "nonce" => Ok(format!("nonce={}", self.nonce)),
            "counter" => Ok(format!(
                "counter={} uptime_ms={}",
                self.counter.value(),
                self.counter.elapsed().as_millis()
            )),
            "fill" => self.fill(words),
            "hash" => {
                let begun = Instant::now();
                let hash = self.memory.hash();
                Ok(format!(
                    "hash={hash:016x} pages={} ms={}",
                    self.memory.count(),
                    begun.elapsed().as_millis()
                ))
            }
            "pages" => {
                let (first, count) = (number(&mut words, "FIRST")?, number(&mut words, "N")?);
                let hashes = self.memory.hashes(first, MOST.min(count)).map(|hash| format!("{hash:016x}"));
                Ok(format!("hashes={}", hashes.collect::<Vec<_>>().join(",")))
            }
            "mutate" => {
                let (seed, count) = (number(&mut words, "SEED")?, number(&mut words, "N")?);
                Ok(format!("pages={}", self.memory.mutate(seed, count)))
            }
            "walk" => {
                let (seed, steps) = (number(&mut words, "SEED")?, number(&mut words, "STEPS")?);
                let write = match words.pop_front() {
                    None => false,
                    Some("write") => true,
                    Some(other) => return Err(format!("walk cannot {other}")),
                };
                if self.memory.count() == 0 {
                    return Err("no memory is filled".to_owned());
                }
                let begun = Instant::now();
                let end = self.memory.walk(seed, steps, write);
                Ok(format!("end={end:016x} us={}", begun.elapsed().as_micros()))
            }
            "writer" => self.writer(words),
            "log" => self.log(words),
            "diskwrite" => {
                self.disk_writer = None;
                self.disk_writer = rate(&mut words)?.map(disk::start_writing).transpose().map_err(said)?;
                Ok(String::new())
            }
            "stamp" => {
                self.stamps = None;
                self.stamps = rate(&mut words)?.map(|period| self.stamp(period));
                Ok(String::new())
            }
            "random" => {
                let bytes = machine::random(MOST.min(number(&mut words, "N")?)).map_err(said)?;
                Ok(format!("bytes={bytes}"))
            }
            "genid" => Ok(format!("genid={}", machine::genid())),
            "time" => Ok(format!("unix_ns={}", machine::unix_nanoseconds())),
            "macs" => Ok(format!("macs={}", machine::macs())),
            "uuid" => Ok(format!("uuid={}", machine::uuid().map_err(said)?)),
            "hostname" => {
                let name = machine::hostname().map_err(said)?;
                Ok(format!("hostname={}", text::encode(name.as_bytes())))
            }
            "cmd" => {
                let command =
                    text::decode(word(&mut words, "TEXT")?).and_then(|bytes| String::from_utf8(bytes).ok());
                let (status, mut output) =
                    machine::run(&command.ok_or("TEXT is not encoded well")?).map_err(said)?;
                output.truncate(MOST_OUTPUT);
                Ok(format!("status={status} output={}", text::encode(&output)))
            }
            "sync" => machine::run("sync").map(|_| String::new()).map_err(said),
            // What it asks for is done behind the reply.
            "poweroff" => Ok(String::new()),
            other => Err(format!("no such verb: {other}")),
        }
    }

    fn fill(&mut self, mut words: Words<'_>) -> Reply {
        let mib = number(&mut words, "MIB")?;
        let mut mix = Mix::default();
        for word in words {
            let (key, value) = word.split_once('=').ok_or_else(|| format!("no KEY=VALUE: {word}"))?;
            match key {
                "unique" => mix.unique = parse(value, key)?,
                "dup" => mix.dup = parse(value, key)?,
                "disk" => mix.disk = parse(value, key)?,
                "zero" => mix.zero = parse(value, key)?,
                "seed" => mix.seed = parse(value, key)?,
                _ => return Err(format!("no such part of a mix: {key}")),
            }
        }
        let begun = Instant::now();
        let pages = self.memory.fill(mib, mix, Path::new(disk::KNOWN)).map_err(said)?;
        Ok(format!("pages={pages} ms={}", begun.elapsed().as_millis()))
    }

    fn writer(&mut self, mut words: Words<'_>) -> Reply {
        match word(&mut words, "start, stop or check")? {
            "start" => {
                let rate = number(&mut words, "RATE")?;
                let pages = match words.pop_front() {
                    None => 1024,
                    Some(word) => parse(word.strip_prefix("pages=").unwrap_or(word), "pages")?,
                };
                self.writer.start(rate, pages);
                Ok(String::new())
            }
            "stop" => {
                self.writer.stop();
                Ok(String::new())
            }
            "check" => {
                let found = self.writer.check();
                let first = found.first_bad.map_or("-".to_owned(), |index| index.to_string());
                Ok(format!("steps={} bad={} first_bad={first}", found.steps, found.bad))
            }
            other => Err(format!("writer cannot {other}")),
        }
    }

    fn log(&mut self, mut words: Words<'_>) -> Reply {
        if !disk::mounted() {
            return Err("no disk at /data".to_owned());
        }
        match word(&mut words, "start, step, stop or check")? {
            "start" => self.log.start(number(&mut words, "RATE")?).map(|()| String::new()).map_err(said),
            "step" => self.log.step(number(&mut words, "N")?).map(|last| format!("mem={last}")).map_err(said),
            "stop" => Ok(format!("mem={}", self.log.stop())),
            "check" => {
                let checked = self.log.check().map_err(said)?;
                let (Ok(disk) | Err(disk)) = checked.disk;
                let (Ok(cached) | Err(cached)) = checked.cached;
                let valid = checked.disk.is_ok() && checked.cached.is_ok();
                Ok(format!(
                    "mem={} disk={disk} cached={cached} valid={} ok={}",
                    checked.memory,
                    u8::from(valid),
                    u8::from(checked.ok()),
                ))
            }
            other => Err(format!("log cannot {other}")),
        }
    }

    /// Sends a stamp every `period` milliseconds, from a thread of its own.
    fn stamp(&self, period: u64) -> Steady {
        let replies = self.replies.clone();
        let counter = self.counter.shared();
        let begun = Instant::now();
        let mut sequence = 0_u64;
        let pause = Duration::from_millis(period.max(1));
        // One is due at every turn: a rate far above what the pauses allow, and the number ignored.
        Steady::start(1_000_000, pause, move |_| {
            sequence += 1;
            let counter = counter.load(Ordering::Relaxed);
            replies.send(&format!("T {sequence} {counter} {}", begun.elapsed().as_micros()));
            true
        })
    }

    fn power_off(&mut self) {
        self.disk_writer = None;
        self.log.close();
        // The thread of the stamps may wait for a host, so it is not waited for.
        if let Some(stamps) = self.stamps.take() {
            thread::spawn(move || drop(stamps));
        }
        machine::power_off();
    }
}

/// The next word of a request.
fn word<'a>(words: &mut Words<'a>, what: &str) -> Result<&'a str, String> {
    words.pop_front().ok_or_else(|| format!("{what} is missing"))
}

/// The next word, as a number.
fn number<T: FromStr>(words: &mut Words<'_>, what: &str) -> Result<T, String> {
    parse(word(words, what)?, what)
}

fn parse<T: FromStr>(word: &str, what: &str) -> Result<T, String> {
    word.parse().map_err(|_| format!("{what} is no number: {word}"))
}

/// A number, or nothing for the word `stop`; a word `start` in front or behind changes nothing.
fn rate(words: &mut Words<'_>) -> Result<Option<u64>, String> {
    words.retain(|word| *word != "start");
    match word(words, "a rate, or stop")? {
        "stop" => Ok(None),
        rate => parse(rate, "the rate").map(Some),
    }
}

fn said(error: impl Display) -> String {
    error.to_string()
}
