//! Somebody is killed at every step of every act: the daemon, the warden, QEMU, or the host loses its power. Afterwards the tree is
//! the old or the new one, nothing dangles, and every line of the guest's log that was synced is there.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use vm_tests::crash::{Act, RECOVERY, ROWS, Scene, Stage, Victim, summary};
use vm_tests::harness::Spinney;

/// Strikes every row of a stage for these victims on one machine, and says what came of it.
fn through(spinney: Spinney, stage: Stage, victims: &[Victim]) {
    let mut scene = Scene::begin(spinney, stage).unwrap();
    for victim in victims {
        let before = scene.strokes.len();
        scene.play(ROWS, *victim, false).unwrap_or_else(|violation| panic!("{violation}"));
        println!("{stage:?}, {victim:?}: {}", summary(&scene.strokes[before..]));
    }
    scene.end().unwrap();
}

/// A state folder on a disk whose power can be cut; none where there are no loop devices, and that is said.
fn on_a_disk() -> Option<Spinney> {
    match Spinney::on_a_disk() {
        Ok(spinney) => Some(spinney),
        Err(why) => {
            eprintln!("SKIPPED, and nothing tested: no disk whose power can be cut: {why}");
            None
        }
    }
}

#[test]
fn the_daemon_dies_at_every_step() {
    through(Spinney::new(), Stage::Guest, &[Victim::Daemon]);
}

#[test]
fn the_warden_dies_at_every_step() {
    through(Spinney::new(), Stage::Guest, &[Victim::Warden]);
}

/// What is armed is armed again in the warden that takes over: it lets the guest go on when the daemon is stopped after that.
#[test]
fn a_warden_that_was_replaced_keeps_the_deadlines() {
    only(
        Victim::WardenThenDaemon,
        &[
            (Act::TakeStopCopy, "take.read"),
            (Act::TakeLive, "take.switched"),
            (Act::Goto, "goto.still"),
            (Act::Goto, "goto.held"),
        ],
    );
}

/// A guest in a take goes on by itself; one of a goto waits for the next command (decision 8).
#[test]
fn daemon_and_warden_die_at_once() {
    only(
        Victim::Both,
        &[
            (Act::TakeStopCopy, "take.read"),
            (Act::TakeLive, "take.memory"),
            (Act::Goto, "goto.still"),
            (Act::Goto, "goto.held"),
            (Act::Goto, "goto.decided"),
        ],
    );
}

/// Nobody notices: of the machine that is there, nor of the one that is on its way.
#[test]
fn whoever_serves_memory_dies_and_another_takes_over() {
    if !Spinney::new().can_map().unwrap() {
        eprintln!("SKIPPED, and nothing tested: this host maps no memory");
        return;
    }
    only(
        Victim::View,
        &[
            (Act::TakeStopCopy, "take.memory"),
            (Act::TakePreCopy, "take.memory"),
            (Act::Goto, "goto.started"),
            (Act::Goto, "goto.loaded"),
            (Act::Goto, "goto.still"),
            (Act::Goto, "goto.decided"),
            (Act::UndoGoto, "goto.loaded"),
            (Act::Suspend, "suspend.memory"),
            (Act::Wake, "wake.loaded"),
        ],
    );
}

fn only(victim: Victim, blows: &[(Act, &str)]) {
    let mut scene = Scene::begin(Spinney::new(), Stage::Guest).unwrap();
    for (act, step) in blows {
        scene.strike(*act, step, victim).unwrap_or_else(|violation| panic!("{violation}"));
    }
    println!("{victim:?}: {}", summary(&scene.strokes));
    scene.end().unwrap();
}

#[test]
fn qemu_dies_at_every_step() {
    through(Spinney::new(), Stage::Guest, &[Victim::Qemu, Victim::Incoming]);
}

#[test]
fn the_power_is_cut_at_every_step() {
    if let Some(spinney) = on_a_disk() {
        through(spinney, Stage::Guest, &[Victim::Power]);
    }
}

#[test]
fn a_machine_that_is_off_stays_whole() {
    match on_a_disk() {
        Some(spinney) => through(spinney, Stage::Cold, &[Victim::Daemon, Victim::Power]),
        None => through(Spinney::new(), Stage::Cold, &[Victim::Daemon]),
    }
}

#[test]
fn a_goto_in_place_is_whole_too() {
    match on_a_disk() {
        Some(spinney) => {
            through(
                spinney,
                Stage::GuestWithPort,
                &[Victim::Daemon, Victim::Warden, Victim::Qemu, Victim::Power],
            );
        }
        None => {
            through(Spinney::new(), Stage::GuestWithPort, &[Victim::Daemon, Victim::Warden, Victim::Qemu])
        }
    }
}

#[test]
fn recovery_can_be_cut_short_too() {
    for stage in [Stage::Guest, Stage::GuestWithPort, Stage::Cold] {
        let mut scene = Scene::begin(Spinney::new(), stage).unwrap();
        for (act, step, then) in RECOVERY.iter().filter(|(act, ..)| act.stage() == stage) {
            scene
                .strike(*act, step, Victim::Successor(then))
                .unwrap_or_else(|violation| panic!("{violation}"));
        }
        println!("recovery, {stage:?}: {}", summary(&scene.strokes));
        scene.end().unwrap();
    }
}

/// The table has every step that there is, and no other.
#[test]
fn every_step_is_struck() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crates");
    let mut named = BTreeSet::new();
    let mut folders = vec![crates];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                folders.push(entry);
            } else if entry.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&entry).unwrap();
                let names = text.split("step(\"").skip(1).filter_map(|rest| rest.split_once("\")"));
                named.extend(names.map(|(name, _)| name.to_owned()));
            }
        }
    }
    let rows = ROWS.iter().flat_map(|row| row.steps).chain(RECOVERY.iter().map(|(.., then)| then));
    // In `damage.rs`, where there is something to mend; in `fork.rs`, where there are several machines; in `depth.rs`, where chains are
    // deep; in `mount.rs`, where somebody waits.
    let rows =
        rows.chain(&["fsck.mended", "throw-away.written", "fork.origin", "shorten.reopened", "mount.begun"]);
    let struck: BTreeSet<String> = rows.map(|step| (*step).to_owned()).collect();
    assert!(named.len() > 40, "the sources name steps: {named:?}");
    assert_eq!(named, struck, "left: the sources; right: tests/vm/src/crash/table.rs");
}

/// The checks themselves: each of these faults has to be found.
#[test]
fn what_is_not_synced_is_missed() {
    let faults = [
        ("no-sync", Act::TakeStopCopy, "take.written", "damaged"),
        // Of a machine that is off: a QEMU that opens it past the page cache has the kernel write it.
        ("overlay-unsynced", Act::TakeOff, "take.written", "damaged"),
        // All of it: not even the catalog's first transaction is there.
        ("catalog-unsynced", Act::TakeStopCopy, "take.resumed", "is gone or empty"),
        ("roll-back-overlay", Act::TakeStopCopy, "take.stored", "were synced"),
    ];
    for (fault, act, step, words) in faults {
        let Some(mut spinney) = on_a_disk() else { return };
        spinney.set("SPINNEY_FAULT", fault);
        let mut scene = Scene::begin(spinney, act.stage()).unwrap();
        let found = scene.strike(act, step, Victim::Power);
        let found = found.expect_err(fault).to_string();
        println!("{fault}: {found}");
        assert!(found.contains(words), "{fault}: {found}");
    }
}
