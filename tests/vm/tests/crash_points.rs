//! The daemon is stopped after each step of a take and of a goto, on a guest that writes all the time. It ticks again without any new
//! command: the warden waits for a sign of life, lets the guest go on and starts the next daemon. Afterwards the tree is the old one or
//! the new one. (`crash_matrix.rs` has the daemon die, and others.)

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vm_tests::crash::ticks_somewhere;
use vm_tests::harness::Spinney;
use vm_tests::underway::Underway;
use vm_tests::walk::{Card, NAME, Walk};

const TAKE: &[&str] = &[
    "take.overlays",
    "take.announced",
    "take.memory",
    "take.read",
    "take.switched",
    "take.resumed",
    "take.written",
];
/// Those of a live take that differ: the guest is stopped, then runs on and waits for us where it writes.
const LIVE: &[&str] =
    &["take.read", "take.switched", "take.resumed", "take.memory", "take.saved", "take.written"];
const GOTO: &[&str] =
    &["goto.memory", "goto.loaded", "goto.still", "goto.held", "goto.decided", "goto.ended"];

/// How soon a guest ticks whose daemon is gone.
const DEAD: Duration = Duration::from_secs(4);
/// How soon a guest ticks whose daemon is stopped: twice the pause that is allowed, two seconds, after which the warden acts.
const STOPPED: Duration = Duration::from_secs(4);
/// How long a guest's second monitor is held by another: for longer than a guest may stand still.
const HELD: Duration = Duration::from_secs(3);

#[test]
fn no_guest_stands_still_because_the_daemon_was_stopped_in_a_take() {
    through(TAKE, "stop-copy", "on");
}

#[test]
fn no_guest_stands_still_because_the_daemon_was_stopped_in_a_live_take() {
    through(LIVE, "live", "on");
}

#[test]
fn no_guest_stands_still_because_the_daemon_was_stopped_in_a_goto() {
    through(GOTO, "", "on");
}

#[test]
fn no_guest_stands_still_because_the_daemon_was_stopped_in_a_goto_that_loads_memory() {
    through(GOTO, "", "off");
}

/// The check itself: without the warden it has to find a guest that stands still.
#[test]
fn without_the_warden_a_guest_does_stand_still() {
    let mut spinney = Spinney::new();
    spinney.set("SPINNEY_FAULT", "no-warden");
    let mut walk = Walk::begin(spinney, 7, 64).unwrap();
    walk.play(Card::TakeStopCopy).unwrap();
    for how in ["kill", "stop"] {
        let marker = walk.spinney.folder().join(how);
        walk.spinney.set("SPINNEY_CRASH", &format!("goto.still {how} {}", marker.display()));
        walk.spinney.kill_daemon();
        let command = walk.spinney.under_way(&format!("goto {NAME}@s1"));
        while !marker.exists() {
            thread::sleep(Duration::from_millis(5));
        }
        assert!(ticks_somewhere(&walk.spinney, STOPPED).is_err(), "{how}: who let it go on?");
        walk.spinney.kill_daemon();
        command.end();
        walk.spinney.ok("ls").unwrap();
        ticks_somewhere(&walk.spinney, DEAD).unwrap();
    }
}

/// A guest's second monitor serves one client. On a busy host the warden of a daemon that died may still be at it: nothing has begun yet,
/// so a take waits for its own.
#[test]
fn a_take_waits_for_the_second_monitor() {
    let mut walk = Walk::begin(Spinney::new(), 7, 64).unwrap();
    walk.play(Card::TakeStopCopy).unwrap();
    let run = walk.spinney.runs().pop().expect("a machine that runs");
    let other = UnixStream::connect(run.join("oob")).unwrap();
    let (done, over) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| done.send(walk.play(Card::TakeStopCopy)));
        let early = over.recv_timeout(HELD);
        assert!(early.is_err(), "the take did not need the monitor: {early:?}");
        drop(other);
        over.recv().unwrap().unwrap();
    });
    walk.end().unwrap();
}

/// `view` is on, and memory that is brought back is mapped, or off, and it is loaded.
fn through(steps: &[&str], mode: &str, view: &str) {
    let mut walk = Walk::begin(Spinney::with(&[("SPINNEY_VIEW", view)]), 7, 64).unwrap();
    for card in [Card::LogStep, Card::TakeStopCopy, Card::Mutate, Card::Writer, Card::LogRate] {
        walk.play(card).unwrap();
    }
    let (mut there, mut back) = (0, 0);
    for step in steps {
        walk.play(Card::Mutate).unwrap();
        let marker = walk.spinney.folder().join(step);
        walk.spinney.set("SPINNEY_CRASH", &format!("{step} stop {}", marker.display()));
        // The next command starts one that knows the step.
        walk.spinney.kill_daemon();
        walk.spinney.ok("ls").unwrap();
        let daemon = walk.spinney.daemon().expect("a daemon");
        let goto = step.starts_with("goto");
        let words =
            if goto { format!("goto {NAME}@s1") } else { format!("take {NAME} {step} --mode {mode}") };
        let mut blow = |walk: &Walk, _: &mut Underway, _: &Path| {
            let deadline = Instant::now() + Duration::from_secs(60);
            while !marker.exists() {
                assert!(Instant::now() < deadline, "{step} was not reached");
                thread::sleep(Duration::from_millis(5));
            }
            let began = Instant::now();
            let ticked = ticks_somewhere(&walk.spinney, STOPPED);
            println!("{step}: ticked after {:?}", began.elapsed());
            // One that was ended meanwhile does not hear it.
            let _ =
                i32::try_from(daemon).ok().and_then(Pid::from_raw).map(|pid| kill_process(pid, Signal::CONT));
            ticked
        };
        let (happened, _) = walk
            .cut_short(&words, goto.then_some(0), &mut blow)
            .unwrap_or_else(|violation| panic!("{step}: {violation}"));
        if happened { there += 1 } else { back += 1 }
    }
    println!("stopped: {there} had happened, {back} were taken back");
    walk.end().unwrap();
}
