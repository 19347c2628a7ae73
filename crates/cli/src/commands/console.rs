//! `console`: the serial console, raw on a terminal, a pipe elsewhere.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap_complete::ArgValueCompleter;
use rustix::fs::{FlockOperation, flock};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use server::Problem;
use server::snapshots::{Code, Machine, Power};

use crate::draw::power;
use crate::session::Session;
use crate::{address, complete};

/// Ctrl-].
const LEAVE: u8 = 0x1d;
/// How long a QEMU that closed its console may take to end.
const ENDING: Duration = Duration::from_secs(3);

/// Talk to a machine's serial console; Ctrl-] leaves
///
/// Off a terminal it is a pipe: stdin goes in, what the machine says comes out until its process ends. A console is one person's
/// at a time.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  spinney console web\n  spinney console web < /dev/null > boot.log")]
pub(crate) struct Args {
    /// Machine
    #[arg(add = ArgValueCompleter::new(complete::targets))]
    target: String,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let machine: Machine = session.get(&address::target(&args.target)?)?;
    let name = &machine.name;
    let Some(path) = &machine.console else {
        return Err(Problem::new(
            Code::Refused,
            format!("{name} is {}: it has no console", power(machine.power)),
        )
        .hint(format!("`spinney start {name}` starts it")));
    };
    let lost =
        |error: io::Error| Problem::new(Code::Failed, format!("lost the console of {name}")).because(&error);
    let _alone = alone(name, path)?;
    let stream = UnixStream::connect(path).map_err(lost)?;

    let raw = Raw::enter();
    if raw.is_some() {
        session.out.note(format_args!("console of {name}; Ctrl-] leaves\r"));
    }
    let writer = stream.try_clone().map_err(lost)?;
    let leavable = raw.is_some();
    let left = Arc::new(AtomicBool::new(false));
    let leaves = Arc::clone(&left);
    // Waits in a read of stdin when the machine ends first; the end of the program ends it.
    std::thread::spawn(move || {
        if send(io::stdin().lock(), &writer, leavable).is_ok_and(|left| left) {
            leaves.store(true, Ordering::SeqCst);
            let _ = writer.shutdown(Shutdown::Both);
        }
    });
    let received = receive(&stream, io::stdout().lock());
    if raw.is_some() {
        // The guest's last line has no end.
        session.out.note("\r");
    }
    drop(raw);
    received.map_err(lost)?;
    if !left.load(Ordering::SeqCst) {
        session.out.note(ending(session, &machine));
    }
    Ok(())
}

/// The right to a console. QEMU serves one at a time and keeps others waiting without a word; what these type it would hear later.
/// The lock is gone with whoever holds it, however that ends.
fn alone(name: &str, console: &Path) -> Result<File, Problem> {
    let cannot = |error: io::Error| {
        Problem::new(Code::Failed, format!("cannot open the console of {name}")).because(&error)
    };
    let path = console.with_extension("lock");
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).read(true).write(true).mode(0o600);
    let mut lock = options.open(path).map_err(cannot)?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(io::Error::from) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(taken(name, lock)),
        Err(error) => return Err(cannot(error)),
    }
    let written = lock.set_len(0).and_then(|()| write!(lock, "{}", std::process::id()));
    written.map_err(cannot)?;
    Ok(lock)
}

/// Who has the console, as far as that has been written down.
fn taken(name: &str, lock: File) -> Problem {
    let mut text = String::new();
    let _ = lock.take(20).read_to_string(&mut text);
    let (who, end) = match text.trim().parse::<u32>() {
        Ok(pid) => (format!("process {pid}"), format!("; `kill {pid}` ends a forgotten one")),
        Err(_) => ("another process".to_owned(), String::new()),
    };
    Problem::new(Code::Refused, format!("the console of {name} is open already, in {who}"))
        .hint(format!("Ctrl-] leaves it there{end}"))
}

/// Why the console closed without anybody having left it.
fn ending(session: &Session, before: &Machine) -> String {
    let name = &before.name;
    let until = Instant::now() + ENDING;
    loop {
        // The machine may be gone by now, and the daemon too.
        let Ok(now) = address::target(name).and_then(|path| session.get::<Machine>(&path)) else {
            return format!("the console of {name} closed");
        };
        match now.power {
            Power::Off => return format!("{name} has powered off"),
            Power::Suspended => return format!("{name} has been suspended"),
            Power::LostPower => return format!("{name} has lost power: its QEMU ended"),
            // Another process by now: a goto.
            _ if now.pid != before.pid => {
                return format!(
                    "the console closed: {name} went elsewhere; `spinney console {name}` opens it anew"
                );
            }
            // QEMU closes the console before it ends.
            _ if Instant::now() < until => std::thread::sleep(Duration::from_millis(50)),
            _ => return format!("the console of {name} closed; `spinney console {name}` opens it anew"),
        }
    }
}

/// Sends what is typed. True if the person wants to leave, false at the end of the input.
fn send(mut from: impl Read, mut to: impl Write, leavable: bool) -> io::Result<bool> {
    let mut buffer = [0; 4096];
    loop {
        let typed = match from.read(&mut buffer)? {
            0 => return Ok(false),
            n => buffer.get(..n).unwrap_or_default(),
        };
        match typed.iter().position(|byte| leavable && *byte == LEAVE) {
            Some(end) => {
                to.write_all(typed.get(..end).unwrap_or_default())?;
                return Ok(true);
            }
            None => to.write_all(typed)?,
        }
    }
}

/// Prints what the machine says until it ends or the person leaves.
fn receive(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut buffer = [0; 16 * 1024];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                to.write_all(buffer.get(..n).unwrap_or_default())?;
                to.flush()?;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// The terminal, raw until this is dropped.
struct Raw {
    before: Termios,
}

impl Raw {
    /// None off a terminal.
    fn enter() -> Option<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() || !io::stdout().is_terminal() {
            return None;
        }
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Flush, &raw).ok()?;
        Some(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Flush, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_is_one_persons_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let console = folder.path().join("console");
        let first = alone("web", &console).unwrap();
        let problem = alone("web", &console).unwrap_err();
        assert_eq!(problem.code, Code::Refused);
        assert!(problem.detail.ends_with(&format!("in process {}", std::process::id())), "{problem:?}");
        drop(first);
        // A longer number that stood there before leaves nothing behind.
        std::fs::write(folder.path().join("console.lock"), "99999999999").unwrap();
        let _second = alone("web", &console).unwrap();
        let problem = alone("web", &console).unwrap_err();
        assert!(problem.detail.ends_with(&format!("in process {}", std::process::id())), "{problem:?}");
    }

    #[test]
    fn ctrl_bracket_leaves_only_on_a_terminal() {
        let mut sent = Vec::new();
        assert!(send(&b"ls\r\x1dnever"[..], &mut sent, true).unwrap());
        assert_eq!(sent, b"ls\r");
        let mut sent = Vec::new();
        assert!(!send(&b"a\x1db"[..], &mut sent, false).unwrap());
        assert_eq!(sent, b"a\x1db");
    }
}
