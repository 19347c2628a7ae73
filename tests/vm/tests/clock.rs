//! A clock that jumps: nothing goes early, nothing new counts as old.

use std::fs;

use serde_json::Value;
use vm_tests::harness::Spinney;

const HOUR: i64 = 3600;
const YEAR: i64 = 365 * 24 * HOUR;

/// A machine that is off, and the file that says by how much the clock is wrong.
fn with_clock(fault: &str) -> (Spinney, impl Fn(i64)) {
    let mut spinney = Spinney::new();
    let file = spinney.folder().join("clock");
    spinney.set("SPINNEY_CLOCK", file.to_str().unwrap());
    spinney.set("SPINNEY_FAULT", fault);
    let set = move |seconds: i64| fs::write(&file, seconds.to_string()).unwrap();
    set(0);
    spinney.ok("create m --memory 64M --network none --disk 16M").unwrap();
    (spinney, set)
}

fn names(spinney: &Spinney, undo_points: bool) -> Vec<String> {
    let tree = spinney.ok("tree m").unwrap();
    let all = tree["snapshots"].as_array().expect("snapshots").clone();
    let these = all.iter().filter(|s| s["undo_point"] == undo_points);
    these.filter_map(|s| s["name"].as_str().map(str::to_owned)).collect()
}

/// Removes a snapshot, has the clock be a year ahead, collects, and tries to have it back.
fn comes_back_after_a_jump(fault: &str) -> bool {
    let (spinney, set) = with_clock(fault);
    spinney.ok("take m one").unwrap();
    spinney.ok("take m two").unwrap();
    spinney.ok("rm m@two").unwrap();
    set(YEAR);
    spinney.ok("gc").unwrap();
    set(0);
    spinney.ok("gc").unwrap();
    spinney.run(["undo"]).code == Some(0) && names(&spinney, false) == ["one", "two"]
}

#[test]
fn what_undo_keeps_for_seven_days_does_not_go_because_the_clock_was_a_year_ahead() {
    assert!(comes_back_after_a_jump(""));
    assert!(!comes_back_after_a_jump("trust-clock"), "the check is to be seen to fail");
}

#[test]
fn what_is_removed_while_the_clock_is_ahead_goes_when_somebody_says_so() {
    let (spinney, set) = with_clock("");
    spinney.ok("take m one").unwrap();
    set(YEAR);
    spinney.ok("rm m@one").unwrap();
    set(-HOUR);
    spinney.kill_daemon();
    spinney.ok("gc").unwrap();
    spinney.ok("undo").unwrap();
    assert_eq!(names(&spinney, false), ["one"]);
    spinney.ok("rm m@one").unwrap();
    spinney.ok("gc --now").unwrap();
    assert_eq!(spinney.run(["undo"]).code, Some(4));
}

#[test]
fn the_order_is_that_in_which_things_came() {
    let (spinney, set) = with_clock("");
    spinney.ok("take m one").unwrap();
    // Six gotos with the clock going back: the newest undo points stay, not those that look newest.
    for hour in 0..6 {
        set(-HOUR * hour);
        spinney.ok("goto m@one").unwrap();
    }
    let points = names(&spinney, true);
    assert_eq!(points.len(), 5, "{points:?}");
    let last = spinney.ok("op log").unwrap();
    assert_eq!(last["operations"][0]["kind"], "goto");
    spinney.ok("undo").unwrap();
    set(0);
    // Siblings in the order of their takes.
    for (name, off) in [("a", 0), ("b", -2 * HOUR), ("c", HOUR)] {
        spinney.ok("goto m@one --discard --yes").unwrap();
        set(off);
        spinney.ok(&format!("take m {name}")).unwrap();
    }
    assert_eq!(names(&spinney, false), ["one", "a", "b", "c"]);
    set(0);
    let found = spinney.ok("show m@{1h}").unwrap();
    assert_eq!(found["name"], "b", "the only one whose own time is an hour ago");
    let ahead: Value = spinney.ok("show m@c").unwrap();
    assert!(ahead["created"].as_str().is_some());
    let (tree, _) = spinney.plain(&["tree", "m"]);
    assert!(tree.contains('c'), "{tree}");
}
