//! The daemon can be killed at any moment: the guest runs on, nothing is half made, and the next command finds all.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use vm_tests::harness::Spinney;
use vm_tests::underway::Underway;
use vm_tests::walk::{Card, NAME, Random, SOON, Walk};

/// Kills in the middle of a goto.
const GOTO_KILLS: usize = 9;

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
fn a_daemon_that_dies_in_a_stop_copy_take_leaves_the_old_tree_or_the_new() {
    die_in_takes("stop-copy", Card::TakeStopCopy, 10);
}

#[test]
fn a_daemon_that_dies_in_a_pre_copy_take_leaves_the_old_tree_or_the_new() {
    die_in_takes("pre-copy", Card::TakePreCopy, 7);
}

fn die_in_takes(mode: &str, card: Card, kills: usize) {
    let seed = 20;
    let mut random = Random::new(seed);
    let mut walk = Walk::begin(Spinney::new(), seed, 96).unwrap();
    for card in [Card::LogStep, Card::Writer, Card::LogRate, card] {
        walk.play(card).unwrap();
    }
    let taken = walk.spinney.ok(&format!("show {NAME}@s1")).unwrap();
    let took = taken["took_us"].as_u64().expect("how long a take takes here") / 1000;
    let mut new = 0;
    for kill in 0..kills {
        // Something to save, so that takes are of one length.
        walk.play(Card::Mutate).unwrap();
        // From before the request gets there to a little after its end; early ones for certain, since a take may be over much sooner than
        // the first one was.
        let span = (took * 5 / 4 + 60) * (kill as u64 + 1) / kills as u64;
        let delay = Duration::from_millis(random.below(span));
        let mut blow = |walk: &Walk, _: &mut Underway, port: &Path| {
            thread::sleep(delay);
            walk.spinney.kill_daemon();
            walk.ticks_within(port, SOON)
        };
        let words = format!("take {NAME} killed-{kill} --mode {mode}");
        let (happened, _) = walk
            .cut_short(&words, None, &mut blow)
            .unwrap_or_else(|violation| panic!("killed {delay:?} into {words}: {violation}"));
        if happened {
            new += 1;
            walk.play(Card::Back).unwrap();
        }
    }
    assert!(new < kills, "no take was cut short: all were over within {took} ms");
    println!("of {kills} takes {new} were done when the daemon died");
    walk.play(Card::Goto("")).unwrap();
    walk.play(Card::Goto("")).unwrap();
    walk.end().unwrap();
}

/// Memory is loaded, which has phases of some length: kills in each of them.
#[test]
fn a_daemon_that_dies_in_a_goto_leaves_the_machine_where_it_was_or_there() {
    let mut random = Random::new(21);
    let mut walk = Walk::begin(Spinney::with(&[("SPINNEY_VIEW", "off")]), 21, 96).unwrap();
    for card in [Card::LogStep, Card::TakeStopCopy, Card::Mutate, Card::LogStep, Card::Writer, Card::LogRate]
    {
        walk.play(card).unwrap();
    }
    let words = format!("goto {NAME}@s1");
    // How long it is from each phase to the next.
    let (mut loading, mut saving) = (Duration::ZERO, Duration::ZERO);
    let mut measure = |_: &Walk, command: &mut Underway, _: &Path| {
        assert!(command.reaches("loading memory"));
        let began = Instant::now();
        assert!(command.reaches("saving memory"));
        loading = began.elapsed();
        let began = Instant::now();
        while command.reaches("saving memory") {}
        saving = began.elapsed();
        Ok(())
    };
    assert!(walk.cut_short(&words, Some(0), &mut measure).unwrap().0);
    println!("loading takes {loading:?}, the undo point and the commit {saving:?}");
    let mut there = 0;
    for kill in 0..GOTO_KILLS {
        walk.play(Card::Mutate).unwrap();
        // At any time: that the guest goes on without us is asked in `crash_points`, where it is known which guest that is.
        let (phase, least, span) = match kill % 3 {
            0 => ("loading memory", Duration::ZERO, loading / 2),
            1 => ("saving memory", Duration::ZERO, saving),
            _ => ("saving memory", saving / 2, saving),
        };
        let delay = least + Duration::from_micros(random.below(span.as_micros() as u64 + 1));
        let mut blow = |walk: &Walk, command: &mut Underway, _: &Path| {
            // Phases are looked at now and then: one that was missed is over.
            command.reaches(phase);
            thread::sleep(delay);
            walk.spinney.kill_daemon();
            Ok(())
        };
        let (happened, _) = walk
            .cut_short(&words, Some(0), &mut blow)
            .unwrap_or_else(|violation| panic!("killed {delay:?} into {phase}: {violation}"));
        there += usize::from(happened);
    }
    whole_after_gotos(walk, there);
}

/// Memory is mapped, and it is all over soon: kills at any time.
#[test]
fn a_daemon_that_dies_in_a_goto_that_maps_memory_leaves_the_machine_where_it_was_or_there() {
    let mut random = Random::new(22);
    let mut walk = Walk::begin(Spinney::new(), 22, 96).unwrap();
    for card in [Card::LogStep, Card::TakeStopCopy, Card::Mutate, Card::LogStep, Card::Writer, Card::LogRate]
    {
        walk.play(card).unwrap();
    }
    let words = format!("goto {NAME}@s1");
    let (mut there, mut whole) = (0, Duration::ZERO);
    for kill in 0..=GOTO_KILLS {
        walk.play(Card::Mutate).unwrap();
        let (first, begun) = (kill == 0, Instant::now());
        let delay = Duration::from_micros(random.below(whole.as_micros() as u64 + 1));
        let mut blow = |walk: &Walk, command: &mut Underway, _: &Path| {
            match first {
                true => while command.reaches("") {},
                false => thread::sleep(delay),
            }
            whole = whole.max(begun.elapsed());
            if !first {
                walk.spinney.kill_daemon();
            }
            Ok(())
        };
        let (happened, _) = walk
            .cut_short(&words, Some(0), &mut blow)
            .unwrap_or_else(|violation| panic!("killed after {delay:?}: {violation}"));
        assert!(happened || !first);
        if happened {
            assert_eq!(walk.spinney.is_mapped(NAME).unwrap(), walk.spinney.can_map().unwrap());
        }
        there += usize::from(happened && !first);
    }
    println!("a goto takes {whole:?}");
    whole_after_gotos(walk, there);
}

/// Some of the gotos were cut short, and with the machine all is well.
fn whole_after_gotos(mut walk: Walk, there: usize) {
    println!("{}", walk.history.join("\n"));
    assert!(there < GOTO_KILLS, "no goto was cut short");
    println!("of {GOTO_KILLS} gotos {there} had happened when the daemon died");
    for card in [Card::Undo, Card::TakePreCopy, Card::Goto("")] {
        walk.play(card).unwrap();
    }
    walk.end().unwrap();
}
