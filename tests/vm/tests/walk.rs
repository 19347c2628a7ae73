//! A random walk over a machine's tree finds nothing; the same checks find planted faults.
//!
//! `SPINNEY_WALK_SEED` repeats a walk, `SPINNEY_WALK_STEPS` makes it longer.

use std::time::{Duration, SystemTime};

use vm_tests::harness::Spinney;
use vm_tests::walk::{Card, FILL, Violation, Walk};

/// Cards played: one deck and a bit of another.
const STEPS: usize = 54;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

#[test]
fn a_random_walk_finds_every_state_as_it_was() {
    let now = || SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
    let seed = number("SPINNEY_WALK_SEED").unwrap_or_else(now);
    let steps = number("SPINNEY_WALK_STEPS").map_or(STEPS, |steps| steps as usize);
    println!("SPINNEY_WALK_SEED={seed} SPINNEY_WALK_STEPS={steps}");
    let mut walk = Walk::begin(Spinney::new(), seed, FILL).expect("a machine");
    let result = walk.wander(steps).and_then(|()| walk.end());
    println!("{}", walk.history.join("\n"));
    if let Err(violation) = result {
        panic!("seed {seed}, step {}: {violation}", walk.history.len());
    }
}

/// A fixed walk: two snapshots with much between them, then to each of them.
fn short_walk(fault: &str, view: &str) -> Result<(), Violation> {
    let spinney = Spinney::with(&[("SPINNEY_FAULT", fault), ("SPINNEY_VIEW", view)]);
    // Much memory is filled, so that a page that is lost is one that is looked at.
    let mut walk = Walk::begin(spinney, 7, 128).expect("a machine");
    walk.set_patience(Duration::from_secs(15));
    let begin =
        [Card::LogStep, Card::TakeStopCopy, Card::LogStep, Card::Writer, Card::Mutate, Card::TakeStopCopy];
    // No fault shows before the first goto; what failed until then would be another matter.
    begin.into_iter().try_for_each(|card| walk.play(card)).expect("a whole machine");
    let rest = [Card::LogStep, Card::Back, Card::Goto(""), Card::LogStep, Card::Goto("")];
    let result = rest.into_iter().try_for_each(|card| walk.play(card)).and_then(|()| walk.end());
    println!("{fault}: {}", walk.history.join(", "));
    result
}

#[test]
fn the_short_walk_is_whole_without_a_fault() {
    short_walk("", "on").unwrap();
}

/// As where there is no FUSE.
#[test]
fn the_short_walk_is_whole_with_memory_that_is_loaded() {
    short_walk("", "off").unwrap();
}

/// Runs the short walk with a fault and returns what was found.
fn found(fault: &str) -> String {
    found_with(fault, "on")
}

/// The same with memory that is mapped (`on`) or loaded (`off`).
fn found_with(fault: &str, view: &str) -> String {
    let violation = short_walk(fault, view)
        .expect_err("the checks do not see the fault; has the executable the feature `faults`?")
        .to_string();
    println!("{fault}: {violation}");
    violation
}

#[test]
fn disks_that_are_not_switched_are_found() {
    let violation = found("switch-no-disk");
    // The guest goes on writing to a layer that is taken for frozen: it is seen in the guest, or by who reads a page of memory there.
    let seen = ["two instants", "the file has changed since its blocks were stored"];
    assert!(seen.iter().any(|words| violation.contains(words)), "{violation}");
}

#[test]
fn a_guest_that_runs_on_before_its_memory_is_protected_is_found() {
    let walk = |fault: &str| {
        let mut walk = Walk::begin(Spinney::with(&[("SPINNEY_FAULT", fault)]), 9, 32).expect("a machine");
        let cards = [Card::LogRate, Card::TakeLive, Card::LogStep, Card::Back, Card::LogStep];
        let result = cards.into_iter().try_for_each(|card| walk.play(card)).and_then(|()| walk.end());
        println!("{fault}: {}", walk.history.join(", "));
        result
    };
    walk("").unwrap();
    let violation = walk("resume-early").expect_err("the checks do not see the fault").to_string();
    assert!(violation.contains("two instants"), "{violation}");
}

#[test]
fn a_page_that_is_lost_is_found() {
    for view in ["on", "off"] {
        let violation = found_with("skip-page", view);
        assert!(violation.contains("memory is not what it was"), "{violation}");
    }
}

#[test]
fn the_device_state_of_another_snapshot_is_found() {
    // Devices compare their own state with what lies in memory, so QEMU itself may notice and refuse to load.
    for view in ["on", "off"] {
        let violation = found_with("other-device-state", view);
        let seen = ["being loaded", "could not be loaded", "did not answer"];
        assert!(seen.iter().any(|words| violation.contains(words)), "{violation}");
    }
}

#[test]
fn a_page_cache_that_is_not_of_the_disk_is_found() {
    let spinney = Spinney::with(&[("SPINNEY_FAULT", "switch-no-disk")]);
    let mut walk = Walk::begin(spinney, 8, 32).expect("a machine");
    let violation =
        walk.play(Card::TakeWhileWriting).expect_err("the checks do not see the fault").to_string();
    assert!(violation.contains("scratch file"), "{violation}");
}
