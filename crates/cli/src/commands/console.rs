//! `console`: the serial console, raw on a terminal, a pipe elsewhere.

use std::io::{self, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap_complete::ArgValueCompleter;
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
/// Off a terminal it is a pipe: stdin goes in, what the machine says comes out until its process ends.
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
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
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
    fn ctrl_bracket_leaves_only_on_a_terminal() {
        let mut sent = Vec::new();
        assert!(send(&b"ls\r\x1dnever"[..], &mut sent, true).unwrap());
        assert_eq!(sent, b"ls\r");
        let mut sent = Vec::new();
        assert!(!send(&b"a\x1db"[..], &mut sent, false).unwrap());
        assert_eq!(sent, b"a\x1db");
    }
}
