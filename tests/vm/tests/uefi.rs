//! UEFI's variable store is a disk like the others: what is set after a snapshot is gone after a goto. The firmware's own shell sets
//! variables and says which there are, on the serial console.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vm_tests::harness::Spinney;

/// A booting firmware on an emulated CPU of a busy host.
const PATIENCE: Duration = Duration::from_secs(180);
const GUID: &str = "5914e700-0000-4000-8000-00000000000a";

/// The firmware's shell.
struct Shell(UnixStream);

impl Shell {
    /// Waits for its prompt.
    fn wait(spinney: &Spinney) -> Self {
        let machine = spinney.ok("show m").unwrap();
        let socket = UnixStream::connect(machine["console"].as_str().expect("a console")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let mut shell = Self(socket);
        shell.until("Shell>");
        shell
    }

    /// What comes until `words` have come. The shell is asked for its prompt now and then: it may be there already.
    fn until(&mut self, words: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let (mut text, mut buffer) = (String::new(), [0; 4096]);
        while !text.contains(words) {
            assert!(Instant::now() < deadline, "no {words:?} in {text:?}");
            match self.0.read(&mut buffer) {
                Ok(0) => panic!("the console closed: {text:?}"),
                Ok(length) => text += &String::from_utf8_lossy(&buffer[..length]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    self.0.write_all(b"\r").unwrap();
                }
                Err(error) => panic!("the console: {error}"),
            }
        }
        text
    }

    /// Runs a command; what it said. A word at its end tells where that is.
    fn run(&mut self, command: &str) -> String {
        for byte in format!("{command}\recho d\"\"one\r").bytes() {
            self.0.write_all(&[byte]).unwrap();
            // Its serial port has a short memory.
            std::thread::sleep(Duration::from_millis(5));
        }
        self.until("done")
    }

    fn set(&mut self, name: &str) {
        self.run(&format!("setvar {name} -guid {GUID} -bs -rt -nv =0x4a"));
        assert!(self.has(name), "{name} could not be set");
    }

    fn has(&mut self, name: &str) -> bool {
        let said = self.run(&format!("setvar {name} -guid {GUID}"));
        let (there, gone) = (said.contains("4A"), said.contains("Unable to get"));
        assert!(there != gone, "{name}: {said:?}");
        there
    }
}

/// Sets a variable before a snapshot and one after it; whether the second is gone when the machine boots from the snapshot's disks.
fn later_variable_is_gone(spinney: &Spinney, mode: &str) -> bool {
    spinney.ok("create m --firmware uefi --memory 128M --network none").unwrap();
    spinney.ok("start m").unwrap();
    let mut shell = Shell::wait(spinney);
    shell.set("before");
    drop(shell);
    spinney.ok(&format!("take m one --mode {mode}")).unwrap();
    let mut shell = Shell::wait(spinney);
    shell.set("after");
    drop(shell);
    spinney.ok("goto m@one --off").unwrap();
    spinney.ok("start m").unwrap();
    let mut shell = Shell::wait(spinney);
    assert!(shell.has("before"), "what was set before the snapshot is lost");
    !shell.has("after")
}

#[test]
fn a_variable_that_was_set_after_a_snapshot_is_gone_after_goto() {
    let spinney = Spinney::new();
    assert!(later_variable_is_gone(&spinney, "pre-copy"));
    // With its memory too: there the firmware goes on from what it knew.
    let mut shell = Shell::wait(&spinney);
    shell.set("after");
    drop(shell);
    spinney.ok("goto m@one").unwrap();
    let mut shell = Shell::wait(&spinney);
    assert!(shell.has("before") && !shell.has("after"));
    drop(shell);
    spinney.ok("undo").unwrap();
    assert!(Shell::wait(&spinney).has("after"), "the undo point has its own");

    // Deep below others the store is read as part of a flat file, like any disk.
    for number in 0..10 {
        spinney.ok(&format!("take m deep-{number} --disk-only")).unwrap();
    }
    if !spinney.can_map().unwrap() {
        eprintln!("SKIPPED: this host has no flat files");
        return;
    }
    spinney.ok("mount").unwrap();
    spinney.ok("goto m@deep-9 --running --discard --yes").unwrap();
    let pid = spinney.ok("show m").unwrap()["pid"].as_u64().unwrap() as u32;
    let files = spinney.open_files(pid);
    assert!(
        files.iter().any(|file| file.parent().is_some_and(|folder| folder.ends_with(".disk"))),
        "{files:?}"
    );
    assert!(Shell::wait(&spinney).has("after"));
}

/// The check itself: with the store not switched at the take it has to find the later variable.
#[test]
fn a_store_that_is_not_switched_is_found() {
    let mut spinney = Spinney::new();
    spinney.set("SPINNEY_FAULT", "switch-no-disk");
    assert!(!later_variable_is_gone(&spinney, "pre-copy"));
}
