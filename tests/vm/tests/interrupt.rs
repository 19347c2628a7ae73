//! Ctrl-C in the middle of a command: the operation is rolled back, the guest goes on, nothing is left behind.

use std::path::Path;

use vm_tests::harness::Spinney;
use vm_tests::underway::Underway;
use vm_tests::walk::{Card, NAME, SOON, Violation, Walk};

/// Exit code of what was interrupted.
const INTERRUPTED: i32 = 130;
/// Attempts to be quicker than the command.
const ATTEMPTS: usize = 5;

/// Interrupts a command when it is in this phase.
fn interrupt(walk: &mut Walk, words: &str, to: Option<usize>, phase: &str) {
    let mut blow = |walk: &Walk, command: &mut Underway, port: &Path| {
        if command.reaches(phase) {
            command.interrupt();
            walk.ticks_within(port, SOON)?;
        }
        Ok::<(), Violation>(())
    };
    for attempt in 0..ATTEMPTS {
        let words = words.replace('#', &attempt.to_string());
        let (happened, ended) = walk.cut_short(&words, to, &mut blow).unwrap();
        if happened {
            assert_eq!(ended.code, Some(0), "{ended:?}");
            continue;
        }
        assert_eq!(ended.code, Some(INTERRUPTED), "{ended:?}");
        assert_eq!(ended.problem()["code"], "interrupted", "{ended:?}");
        let log = walk.spinney.ok("op log -n 1").unwrap();
        assert_eq!(log["operations"][0]["state"], "cancelled", "{log}");
        return;
    }
    panic!("{words}: over before it could be interrupted, {ATTEMPTS} times");
}

#[test]
fn a_take_or_goto_that_is_interrupted_leaves_everything_as_it_was() {
    let mut walk = Walk::begin(Spinney::new(), 130, 128).unwrap();
    for card in [Card::LogStep, Card::TakeStopCopy, Card::Mutate, Card::LogStep, Card::Writer, Card::LogRate]
    {
        walk.play(card).unwrap();
    }
    interrupt(&mut walk, &format!("take {NAME} stop-# --mode stop-copy"), None, "saving memory");
    interrupt(&mut walk, &format!("take {NAME} pre-# --mode pre-copy"), None, "saving memory");
    interrupt(&mut walk, &format!("goto {NAME}@s1"), Some(0), "loading memory");
    println!("{}", walk.history.join("\n"));
    // All of it still works.
    for card in [Card::TakePreCopy, Card::Back, Card::Undo] {
        walk.play(card).unwrap();
    }
    walk.end().unwrap();
}
