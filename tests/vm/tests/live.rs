//! Live takes: the guest runs on while its memory is saved, and who looks or waits meanwhile is told the truth.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vm_tests::guest::Guest;
use vm_tests::harness::Spinney;
use vm_tests::underway::reached;
use vm_tests::walk::{Card, NAME, SOON, Walk};

/// A walk whose next operation waits at this step until the file is removed.
fn waiting_at(walk: &mut Walk, step: &str) -> PathBuf {
    let marker = walk.spinney.folder().join(step);
    walk.spinney.set("SPINNEY_CRASH", &format!("{step} wait {}", marker.display()));
    // The next command starts a daemon that knows the step.
    walk.spinney.kill_daemon();
    marker
}

fn running_guest(seed: u64) -> Walk {
    let mut walk = Walk::begin(Spinney::new(), seed, 64).unwrap();
    for card in [Card::LogStep, Card::TakeStopCopy, Card::Mutate, Card::LogRate] {
        walk.play(card).unwrap();
    }
    walk
}

fn names(tree: &Value) -> Vec<&str> {
    tree["snapshots"].as_array().into_iter().flatten().filter_map(|s| s["name"].as_str()).collect()
}

#[test]
fn until_it_is_durable_a_snapshot_is_shown_as_saving_and_others_wait_for_it() {
    let mut walk = running_guest(21);
    let marker = waiting_at(&mut walk, "take.saved");
    let port = walk.spinney.port(NAME).unwrap().expect("a port");
    let taken = walk.spinney.ok(&format!("take {NAME} x --mode live --no-wait")).unwrap();
    reached(&marker, "take.saved");
    assert_eq!(taken["state"], "saving", "{taken}");
    assert!(taken["pause_us"].as_u64().is_some_and(|us| us > 0), "{taken}");
    walk.ticks_within(&port, SOON).unwrap();
    for address in
        [format!("{NAME}@x"), format!("{NAME}@"), format!("{NAME}@id:{}", taken["id"].as_str().unwrap())]
    {
        let shown = walk.spinney.ok(&format!("show {address}")).unwrap();
        assert_eq!((&shown["state"], &shown["id"]), (&"saving".into(), &taken["id"]), "{address}");
    }
    let tree = walk.spinney.ok(&format!("tree {NAME}")).unwrap();
    assert_eq!((names(&tree), &tree["here"]), (vec!["s1", "x"], &taken["id"]));

    let mut second = walk.spinney.under_way(&format!("take {NAME} y --mode stop-copy"));
    let mut goto = walk.spinney.under_way(&format!("goto {NAME}@x --discard --yes"));
    // For longer than the client takes to notice what it waits for.
    thread::sleep(Duration::from_secs(3));
    let log = walk.spinney.ok("op log").unwrap();
    let waiting: Vec<_> =
        log["operations"].as_array().into_iter().flatten().filter(|op| op["state"] == "running").collect();
    assert_eq!(waiting.len(), 3, "a take that saves, a take and a goto that wait: {log}");
    fs::remove_file(&marker).unwrap();
    // Either may be first.
    for command in [&mut second, &mut goto] {
        let _ = command.reaches("saving memory");
    }
    for command in [second, goto] {
        let ended = command.end();
        assert!(ended.stderr.contains(&format!("waiting for take {NAME}@x")), "{}", ended.stderr);
        ended.done().unwrap();
    }
    let shown = walk.spinney.ok(&format!("show {NAME}@x")).unwrap();
    assert_eq!(
        (&shown["state"], &shown["id"], &shown["mode"]),
        (&"ready".into(), &taken["id"], &"live".into())
    );
    let port = walk.spinney.port(NAME).unwrap().expect("a port");
    walk.ticks_within(&port, SOON).unwrap();
}

#[test]
fn a_qemu_that_dies_while_its_memory_is_saved_fails_the_take() {
    let mut walk = running_guest(22);
    let marker = waiting_at(&mut walk, "take.resumed");
    let take = walk.spinney.under_way(&format!("take {NAME} x --mode live"));
    reached(&marker, "take.resumed");
    for pid in walk.spinney.machines() {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, Signal::KILL).unwrap();
    }
    fs::remove_file(&marker).unwrap();
    let ended = take.end();
    let problem = ended.problem();
    assert_eq!(ended.code, Some(1), "{problem}");
    assert!(problem["detail"].as_str().is_some_and(|words| words.contains("QEMU ended")), "{problem}");
    let tree = walk.spinney.ok(&format!("tree {NAME}")).unwrap();
    assert_eq!((names(&tree), &tree["machine"]["power"]), (vec!["s1"], &"lost_power".into()));
    // What it had is there, and can be gone to.
    walk.spinney.ok(&format!("goto {NAME}@s1 --discard --yes")).unwrap();
    let port = walk.spinney.port(NAME).unwrap().expect("a port");
    walk.ticks_within(&port, SOON).unwrap();
}

#[test]
fn a_pause_that_would_be_too_long_is_not_taken() {
    let mut walk = running_guest(23);
    for mode in ["live", "pre-copy", "stop-copy"] {
        let words = format!("take {NAME} x --mode {mode} --max-pause 1ms");
        let (happened, ended) = walk.cut_short(&words, None, &mut |_, _, _| Ok(())).unwrap();
        assert!(!happened, "{mode}");
        assert_eq!(ended.code, Some(9), "{ended:?}");
        let problem = ended.problem();
        assert!(
            problem["detail"].as_str().is_some_and(|words| words.contains("longer than 1 ms")),
            "{problem}"
        );
    }
    walk.play(Card::TakeLive).unwrap();
    walk.play(Card::Back).unwrap();
    walk.end().unwrap();
}

/// How many steps the guest's writer, who dirties memory all the time, gets on while a live take waits for a store that takes two
/// mebibytes a second, over what it does while nothing is taken.
fn pace_beside_a_slow_store(fault: &str, seed: u64) -> f64 {
    let mut walk = running_guest(seed);
    let port = walk.spinney.port(NAME).unwrap().expect("a port");
    walk.spinney.set("SPINNEY_FAULT", fault);
    walk.spinney.kill_daemon();
    walk.spinney.ok("ls").unwrap();
    let mut guest = Guest::connect(&port, SOON).unwrap();
    guest.set_timeout(Duration::from_secs(60));
    guest.writer_start(4_000, 8_000).unwrap();
    let mut pace = || {
        let before = guest.writer_check().unwrap().steps;
        thread::sleep(Duration::from_secs(3));
        (guest.writer_check().unwrap().steps - before) as f64
    };
    let alone = pace();
    let marker = waiting_at(&mut walk, "take.resumed");
    let take = walk.spinney.under_way(&format!("take {NAME} x --mode live"));
    reached(&marker, "take.resumed");
    fs::remove_file(&marker).unwrap();
    let beside = pace();
    // The port serves one.
    drop(guest);
    take.interrupt();
    let ended = take.end();
    assert_eq!(ended.code, Some(130), "{ended:?}");
    walk.ticks_within(&port, SOON).unwrap();
    println!("{fault}: {beside} steps beside the take, {alone} alone");
    beside / alone
}

#[test]
fn a_slow_store_does_not_slow_the_guest() {
    assert!(pace_beside_a_slow_store("slow-store", 24) > 0.4);
}

/// The check itself: without the spill the guest waits for the store.
#[test]
fn without_the_spill_a_slow_store_does_slow_the_guest() {
    assert!(pace_beside_a_slow_store("no-spill", 25) < 0.3);
}

#[test]
fn a_store_too_slow_for_the_spill_ends_the_take_and_not_the_guest() {
    let mut walk = running_guest(26);
    walk.spinney.set("SPINNEY_FAULT", "little-spill");
    walk.spinney.kill_daemon();
    let (happened, ended) =
        walk.cut_short(&format!("take {NAME} x --mode live"), None, &mut |_, _, _| Ok(())).unwrap();
    assert!(!happened);
    assert_eq!(ended.code, Some(9), "{ended:?}");
    let problem = ended.problem();
    assert!(problem["detail"].as_str().is_some_and(|words| words.contains("too slow")), "{problem}");
    walk.spinney.set("SPINNEY_FAULT", "");
    walk.spinney.kill_daemon();
    walk.play(Card::TakeLive).unwrap();
    walk.end().unwrap();
}

#[test]
fn a_guest_whose_monitor_is_lost_in_the_middle_goes_on_and_is_found_again() {
    let mut walk = running_guest(27);
    walk.spinney.set("SPINNEY_FAULT", "lose-monitor");
    walk.spinney.kill_daemon();
    walk.spinney.ok("ls").unwrap();
    let port = walk.spinney.port(NAME).unwrap().expect("a port");
    // The same daemon connects anew: the next attempt fails as the first, and not because nobody hears.
    for mode in ["live", "stop-copy", "live", "stop-copy"] {
        let ended = walk.spinney.run(format!("take {NAME} x --mode {mode}").split(' '));
        let problem = ended.problem();
        assert_eq!(ended.code, Some(1), "{problem}");
        assert!(
            problem["detail"].as_str().is_some_and(|words| words.contains("closed its monitor")),
            "{problem}"
        );
        // Before any other command.
        walk.ticks_within(&port, SOON).unwrap();
        let shown = walk.spinney.ok(&format!("show {NAME}")).unwrap();
        assert_eq!(shown["power"], "running", "{shown}");
    }
    // Here the state was whole, and QEMU lets the guest go on by itself.
    for name in ["y", "z"] {
        walk.spinney.ok(&format!("take {NAME} {name} --mode pre-copy")).unwrap();
        walk.ticks_within(&port, SOON).unwrap();
    }
}

/// What is under way is neither passed over nor unknown.
#[test]
fn undo_and_rm_know_of_a_snapshot_that_is_being_saved() {
    let mut walk = running_guest(27);
    let marker = waiting_at(&mut walk, "take.saved");
    walk.spinney.ok(&format!("take {NAME} x --mode live --no-wait")).unwrap();
    reached(&marker, "take.saved");
    for address in ["x", "~1"] {
        let ended = walk.spinney.run(["rm", &format!("{NAME}@{address}")]);
        let problem = ended.problem();
        assert_eq!(ended.code, Some(4), "{problem}");
        assert_eq!(problem["detail"], format!("{NAME}@x is still being saved"));
    }
    let undo = walk.spinney.under_way("undo");
    thread::sleep(Duration::from_millis(300));
    fs::remove_file(&marker).unwrap();
    let undone = undo.end().done().unwrap();
    assert_eq!(undone["operation"], format!("take {NAME}@x"), "{undone}");
    let tree = walk.spinney.ok(&format!("tree {NAME}")).unwrap();
    assert_eq!(names(&tree), ["s1"]);
}
