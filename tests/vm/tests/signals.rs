//! A client that is ended takes its operation with it, also one that still waits in line behind another.

use std::io::{BufRead, BufReader};
use std::process::Child;

use rustix::process::{Pid, Signal, kill_process};
use vm_tests::harness::Spinney;

/// Reads a client's events until one says this.
fn wait_for(client: &mut Child, words: &str) {
    let events = BufReader::new(client.stderr.as_mut().expect("events on stderr"));
    let said = events.lines().map_while(Result::ok).any(|line| line.contains(words));
    assert!(said, "the client ended without {words:?}");
}

/// Sends SIGTERM, which no test runner has ignored, and returns the exit code.
fn terminate(client: &mut Child) -> Option<i32> {
    kill_process(Pid::from_child(client), Signal::TERM).expect("a signal");
    client.wait().expect("the client's end").code()
}

#[test]
fn what_waits_in_line_goes_with_its_client() {
    let spinney = Spinney::new();
    spinney.ok("create idle --memory 64M --network none").unwrap();
    spinney.ok("start idle").unwrap();
    // There is nothing to boot, and so nobody who would hear the power button.
    let mut stop = spinney.begin(&["stop", "idle", "--timeout", "60s"]);
    wait_for(&mut stop, "waiting for the guest");
    let mut take = spinney.begin(&["take", "idle", "never"]);
    wait_for(&mut take, "waiting for stop");
    assert_eq!(terminate(&mut take), Some(143));
    assert_eq!(terminate(&mut stop), Some(143));

    let idle = spinney.ok("show idle").unwrap();
    assert_eq!((&idle["power"], &idle["busy"]), (&"running".into(), &serde_json::Value::Null));
    spinney.ok("take idle later").unwrap();
    let tree = spinney.ok("tree idle").unwrap();
    let names: Vec<_> = tree["snapshots"].as_array().into_iter().flatten().map(|s| &s["name"]).collect();
    assert_eq!(names, ["later"]);
}
