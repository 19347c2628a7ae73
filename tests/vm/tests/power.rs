//! Power, and what others do to it: paused guests, signals from outside, machines without memory snapshots, images that are
//! touched, a state folder that goes away.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vm_tests::harness::{Spinney, cache, is_gone, kill};

fn show(spinney: &Spinney) -> Value {
    spinney.ok("show m").unwrap()
}

fn signal(pid: u64, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process id");
    kill_process(pid, signal).unwrap();
}

/// Waits for something that comes soon.
fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what} did not come");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_stop_that_comes_to_nothing_leaves_a_paused_machine_paused() {
    let spinney = Spinney::new();
    spinney.create_guest("m", 96).unwrap();
    spinney.ok("start m").unwrap();
    spinney.ok("pause m").unwrap();
    assert_eq!(spinney.run(["pause", "m"]).code, Some(4), "it is paused already");
    // Just switched on, the guest has nobody at the button.
    assert_eq!(spinney.run(["stop", "m", "--timeout", "1"]).code, Some(9));
    assert_eq!(show(&spinney)["power"], "paused");

    // The daemon dies while the guest runs to hear the button.
    let mut command = spinney.begin(&["stop", "m", "--timeout", "60"]);
    wait_until("the stop", || show(&spinney)["power"] == "running");
    kill(spinney.daemon().expect("a daemon"));
    command.wait().unwrap();
    assert_eq!(show(&spinney)["power"], "paused", "the next start puts it in order");
    spinney.ok("resume m").unwrap();
    assert_eq!(spinney.run(["resume", "m"]).code, Some(4), "it runs already");
}

#[test]
fn a_machine_whose_process_is_ended_from_outside_lost_its_power() {
    let spinney = Spinney::new();
    spinney.create_guest("m", 96).unwrap();
    for (by, daemon_sees) in [(Signal::TERM, true), (Signal::TERM, false), (Signal::KILL, true)] {
        let pid = spinney.ok("start m").unwrap()["pid"].as_u64().expect("a process");
        if !daemon_sees {
            spinney.kill_daemon();
        }
        signal(pid, by);
        wait_until("the end of QEMU", || is_gone(pid.try_into().expect("a process id")));
        assert_eq!(show(&spinney)["power"], "lost_power", "{by:?}, seen by the daemon: {daemon_sees}");
    }
}

#[test]
fn a_machine_without_memory_snapshots_does_not_lose_its_memory_unasked() {
    let spinney = Spinney::new();
    spinney.ok("create m --no-memory --memory 64M --network none --disk 64M").unwrap();
    spinney.ok("take m one").unwrap();
    spinney.ok("start m").unwrap();
    let refused = spinney.run(["goto", "m@one"]);
    assert_eq!(refused.code, Some(4), "{}", refused.stderr);
    assert_eq!(show(&spinney)["power"], "running");
    spinney.ok("goto m@one --discard --yes").unwrap();
    assert_eq!(show(&spinney)["power"], "off");
}

#[test]
fn an_image_that_was_only_touched_is_accepted_when_somebody_says_so() {
    let spinney = Spinney::new();
    let image = spinney.folder().join("image");
    fs::copy(cache().join("guest/data.img"), &image).unwrap();
    spinney.ok(&format!("create m --memory 64M --network none --disk {}", image.display())).unwrap();
    spinney.ok("take m one").unwrap();
    let file = fs::File::options().append(true).open(&image).unwrap();
    file.set_modified(std::time::SystemTime::now() + Duration::from_secs(5)).unwrap();
    let refused = spinney.run(["start", "m"]);
    assert_eq!(refused.code, Some(6), "{}", refused.stderr);
    assert!(refused.problem()["hint"].as_str().is_some_and(|hint| hint.contains("--accept-disks")));
    let accepted = spinney.ok("edit m --accept-disks").unwrap();
    assert_eq!(accepted["changed"], true);
    assert!(accepted["warnings"].to_string().contains("image"), "{accepted}");
    assert_eq!(spinney.ok("edit m --accept-disks").unwrap()["changed"], false);
    spinney.ok("goto m@one --discard --yes").unwrap();
    spinney.ok("start m").unwrap();
    spinney.ok("kill m").unwrap();
    // What cannot be the image that it was is not accepted, and no image at all is damage.
    let bytes = file.metadata().unwrap().len();
    for size in [0, bytes / 2, bytes + 512] {
        file.set_len(size).unwrap();
        assert_eq!(spinney.run(["edit", "m", "--accept-disks"]).code, Some(4), "{size} bytes");
    }
    fs::remove_file(&image).unwrap();
    let gone = spinney.run(["edit", "m", "--accept-disks"]);
    assert_eq!(gone.code, Some(6), "{}", gone.stderr);
    assert_eq!(spinney.run(["start", "m"]).code, Some(6));
}

#[test]
fn a_daemon_whose_state_folder_is_gone_ends() {
    let spinney = Spinney::new();
    spinney.ok("ls").unwrap();
    assert!(spinney.daemon().is_some());
    fs::remove_dir_all(spinney.state()).unwrap();
    wait_until("the end of the daemon", || spinney.daemon().is_none());
}

#[test]
fn recovery_is_told_to_whoever_starts_the_daemon() {
    let spinney = Spinney::new();
    spinney.ok("create m --memory 64M --network none --disk 64M").unwrap();
    let pid = spinney.ok("start m").unwrap()["pid"].as_u64().expect("a process");
    spinney.kill_daemon();
    signal(pid, Signal::KILL);
    let (_, said) = spinney.plain(&["ls"]);
    assert!(said.contains("m lost its power"), "{said}");
    let (_, said) = spinney.plain(&["ls"]);
    assert!(!said.contains("lost its power"), "it is said once: {said}");
}
