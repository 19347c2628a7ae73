//! The daemon can be killed at any moment: the guest runs on, nothing is half made, and the next command finds all.

use std::thread;
use std::time::Duration;

use vm_tests::harness::Spinney;
use vm_tests::walk::{Card, NAME, Random, Violation, Walk};

/// How soon a guest must tick after the daemon's death.
const SOON: Duration = Duration::from_secs(2);
/// Kills in the middle of a take.
const KILLS: usize = 10;

#[test]
fn a_guest_and_its_tree_outlive_the_daemon() {
    let mut walk = Walk::begin(Spinney::new(), 1, 32).unwrap();
    walk.play(Card::TakeStopCopy).unwrap();
    walk.play(Card::LogRate).unwrap();
    let port = walk.spinney.port(NAME).unwrap().expect("a port");
    assert!(walk.spinney.kill_daemon());
    assert!(walk.spinney.daemon().is_none());
    walk.ticks_within(&port, SOON).unwrap();
    walk.check().unwrap();
    assert!(walk.spinney.daemon().is_some(), "the next command starts it again");
    walk.play(Card::Back).unwrap();
}

#[test]
fn a_daemon_that_dies_in_a_take_leaves_the_old_tree_or_the_new() {
    let seed = 20;
    let mut random = Random::new(seed);
    let mut walk = Walk::begin(Spinney::new(), seed, 96).unwrap();
    for card in [Card::LogStep, Card::TakeStopCopy, Card::Writer, Card::LogRate] {
        walk.play(card).unwrap();
    }
    let taken = walk.spinney.ok(&format!("show {NAME}@s1")).unwrap();
    let took = taken["took_us"].as_u64().expect("how long a take takes here") / 1000;
    let (mut old, mut new) = (0, 0);
    for kill in 0..KILLS {
        // Something to save, so that takes are of one length.
        walk.play(Card::Mutate).unwrap();
        // From before the request gets there to a little after its end.
        let delay = Duration::from_millis(random.below(took * 5 / 4 + 60));
        match die_in_a_take(&mut walk, kill, delay) {
            Ok(true) => new += 1,
            Ok(false) => old += 1,
            Err(violation) => panic!("killed {delay:?} into take {kill}: {violation}"),
        }
    }
    assert!(old > 0, "no take was cut short: all were over within {took} ms");
    println!("of {KILLS} takes {new} were done when the daemon died, and {old} rolled back");
    walk.play(Card::Goto("")).unwrap();
    walk.play(Card::Goto("")).unwrap();
    walk.end().unwrap();
}

/// Kills the daemon `delay` into a take. True if the snapshot exists nevertheless; then it is gone to.
fn die_in_a_take(walk: &mut Walk, kill: usize, delay: Duration) -> Result<bool, Violation> {
    let name = format!("killed-{kill}");
    let port = walk.spinney.port(NAME)?;
    let port = port.ok_or_else(|| Violation::Wrong("no process".to_owned()))?;
    let mut command = walk.spinney.begin(&["take", NAME, &name, "--mode", "stop-copy"]);
    thread::sleep(delay);
    walk.spinney.kill_daemon();
    let ticks = walk.ticks_within(&port, SOON);
    let ended = command.wait();
    ticks?;
    ended.map_err(|error| Violation::Wrong(error.to_string()))?;
    let tree = walk.spinney.ok(&format!("tree {NAME}"))?;
    let found = tree["snapshots"].as_array().into_iter().flatten().find(|s| s["name"] == name.as_str());
    if let Some(found) = found {
        walk.adopt(found)?;
    }
    walk.check()?;
    if found.is_some() {
        walk.play(Card::Back)?;
    }
    Ok(found.is_some())
}
