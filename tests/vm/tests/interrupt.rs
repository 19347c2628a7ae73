//! Ctrl-C in the middle of a command: the operation is rolled back, the guest goes on, nothing is left behind.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use vm_tests::harness::{Ended, Spinney};
use vm_tests::underway::{Underway, reached};
use vm_tests::walk::{Card, NAME, SOON, Violation, Walk};

/// Exit code of what was interrupted.
const INTERRUPTED: i32 = 130;
/// Exit code of a take that would need more pause than it is allowed.
const NO_PAUSE: i32 = 9;

/// Interrupts a command at this step; it must be rolled back.
fn interrupt(walk: &mut Walk, words: &str, to: Option<usize>, step: &str) {
    let (happened, ended) = interrupted(walk, words, to, step).unwrap();
    assert!(!happened, "{words}");
    assert_eq!(ended.code, Some(INTERRUPTED), "{ended:?}");
    assert_eq!(ended.problem()["code"], "interrupted", "{ended:?}");
    let log = walk.spinney.ok("op log -n 1").unwrap();
    assert_eq!(log["operations"][0]["state"], "cancelled", "{log}");
    writes_where_it_should(walk).unwrap();
}

/// The guest writes to the layers that the catalog calls here's: every take looks, also one that is not allowed any pause. An overlay
/// that QEMU has open and does not use is not seen in the files.
fn writes_where_it_should(walk: &Walk) -> Result<(), Ended> {
    let ended = walk.spinney.run(["take", NAME, "probe", "--mode", "stop-copy", "--max-pause", "0"]);
    if ended.code == Some(NO_PAUSE) { Ok(()) } else { Err(ended) }
}

fn interrupted(
    walk: &mut Walk,
    words: &str,
    to: Option<usize>,
    step: &str,
) -> Result<(bool, Ended), Violation> {
    // A step is waited at once for each marker.
    let number = walk.history.len();
    let marker = walk.spinney.folder().join(format!("{step}-{number}-{}", words.replace(' ', "-")));
    walk.spinney.set("SPINNEY_CRASH", &format!("{step} wait {}", marker.display()));
    // The next command starts one that knows the step.
    walk.spinney.kill_daemon();
    let mut blow = |walk: &Walk, command: &mut Underway, port: &Path| {
        reached(&marker, step);
        command.interrupt();
        // Until the daemon has heard of it.
        thread::sleep(Duration::from_millis(500));
        fs::remove_file(&marker).unwrap();
        walk.ticks_within(port, SOON)
    };
    walk.cut_short(words, to, &mut blow)
}

/// The check itself: it has to find an overlay that nobody took away.
#[test]
fn what_a_take_that_is_interrupted_leaves_behind_is_found() {
    let mut spinney = Spinney::new();
    spinney.set("SPINNEY_FAULT", "leave-overlays");
    let mut walk = Walk::begin(spinney, 131, 64).unwrap();
    let words = format!("take {NAME} live --mode live");
    interrupted(&mut walk, &words, None, "take.announced").unwrap();
    let found = writes_where_it_should(&walk).expect_err("who took the overlay away?");
    assert!(found.problem()["detail"].as_str().unwrap().contains("writes to another layer"), "{found:?}");
}

/// Interrupts a take that is done: the result decides, and not what was wished for.
fn too_late(walk: &mut Walk, mode: &str) {
    let marker = walk.spinney.folder().join(format!("written-{mode}"));
    walk.spinney.set("SPINNEY_CRASH", &format!("take.written wait {}", marker.display()));
    walk.spinney.kill_daemon();
    let mut blow = |_: &Walk, command: &mut Underway, _: &Path| {
        reached(&marker, "take.written");
        command.interrupt();
        thread::sleep(Duration::from_millis(500));
        fs::remove_file(&marker).unwrap();
        Ok(())
    };
    let words = format!("take {NAME} late-{mode} --mode {mode}");
    let (happened, ended) = walk.cut_short(&words, None, &mut blow).unwrap();
    assert!(happened, "{words}");
    let document = ended.done().unwrap();
    assert_eq!((&document["name"], &document["state"]), (&format!("late-{mode}").into(), &"ready".into()));
}

#[test]
fn a_take_or_goto_that_is_interrupted_leaves_everything_as_it_was() {
    let mut walk = Walk::begin(Spinney::new(), 130, 128).unwrap();
    for card in [Card::LogStep, Card::TakeStopCopy, Card::Mutate, Card::LogStep, Card::Writer, Card::LogRate]
    {
        walk.play(card).unwrap();
    }
    interrupt(&mut walk, &format!("take {NAME} stop --mode stop-copy"), None, "take.memory");
    interrupt(&mut walk, &format!("take {NAME} pre --mode pre-copy"), None, "take.memory");
    // Before the stop, in the pause, while it is saved, when it is durable and only lacks its name.
    for step in [
        "take.overlays",
        "take.announced",
        "take.read",
        "take.switched",
        "take.resumed",
        "take.memory",
        "take.saved",
        "take.stored",
    ] {
        interrupt(&mut walk, &format!("take {NAME} live --mode live"), None, step);
    }
    for mapped in [false, true] {
        walk.spinney.set_view(mapped);
        // In the middle of what is loaded: all of the memory, or what cannot be mapped.
        interrupt(&mut walk, &format!("goto {NAME}@s1"), Some(0), "goto.memory");
    }
    too_late(&mut walk, "live");
    too_late(&mut walk, "stop-copy");
    walk.spinney.set("SPINNEY_CRASH", "");
    walk.spinney.kill_daemon();
    println!("{}", walk.history.join("\n"));
    // All of it still works.
    for card in [Card::TakeLive, Card::Back, Card::Undo] {
        walk.play(card).unwrap();
    }
    walk.end().unwrap();
}
