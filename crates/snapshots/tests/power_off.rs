//! What follows a power-off, on machines without a guest: QEMU runs, and nothing in it. A guest that powers itself off is QEMU asked to
//! quit over its second monitor: it ends in the same way.

mod lab;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use snapshots::{
    Code, Context, GotoPower, OnPowerOff, OpState, Operation, Power, PoweredOff, SetOptions, TakeOptions,
};

use lab::{DISK, Lab};

/// A machine with this setting and a snapshot `one`, whose disk has changed since.
fn lab(on_poweroff: OnPowerOff) -> Lab {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.write(0, 1);
    lab.take("one");
    set(&lab, on_poweroff);
    lab.write(0, 2);
    lab
}

fn set(lab: &Lab, on_poweroff: OnPowerOff) {
    let options = SetOptions { on_poweroff: Some(on_poweroff), ..SetOptions::default() };
    lab.engine().set(&Context::new(), "m", options).unwrap();
}

fn start(lab: &Lab) {
    lab.engine().start(&Context::new(), "m").unwrap();
}

fn kill(lab: &Lab) -> PoweredOff {
    lab.engine().kill(&Context::new(), "m").unwrap()
}

/// Its QEMU ends as if the guest had powered itself off.
fn power_off(lab: &Lab) {
    // What an earlier one left may still be there.
    let deadline = Instant::now() + Duration::from_secs(30);
    let (run, monitor) = loop {
        let runs = std::fs::read_dir(lab.dir.path().join("s/run")).unwrap();
        let mut runs = runs.map(|run| run.unwrap().path());
        if let Some(found) = runs.find_map(|run| Some((UnixStream::connect(run.join("oob")).ok()?, run))) {
            break (found.1, found.0);
        }
        assert!(Instant::now() < deadline, "no monitor");
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut answers = BufReader::new(monitor.try_clone().unwrap()).lines();
    for command in ["qmp_capabilities", "quit"] {
        answers.next().unwrap().unwrap();
        writeln!(&monitor, "{{\"execute\": \"{command}\"}}").unwrap();
    }
    while answers.next().is_some_and(|line| line.is_ok()) || run.join("pid").exists() {
        assert!(Instant::now() < deadline, "QEMU does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What the daemon's thread does, once.
fn watch(lab: &Lab) -> Vec<Operation> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let due = lab.engine().look_for_ends().due;
        // The end of a process comes a moment behind that of its monitor.
        if lab.engine().machine("m").unwrap().pid.is_none() {
            let see_to =
                |(id, _): &(String, String)| lab.engine().see_to_power_off(&Context::new(), id).unwrap().then;
            let due = if due.is_empty() { lab.engine().look_for_ends().due } else { due };
            return due.iter().filter_map(see_to).collect();
        }
        assert!(Instant::now() < deadline, "the end of QEMU is not seen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn entries(lab: &Lab) -> Vec<Operation> {
    let mut all = lab.engine().operations(100).unwrap();
    all.retain(|op| op.kind.starts_with("power-off"));
    all
}

#[test]
fn it_goes_back_every_time_and_undo_has_it_as_it_was() {
    let lab = lab(OnPowerOff::Back);
    for round in 2..4 {
        start(&lab);
        let off = kill(&lab);
        let then = off.then.unwrap();
        assert_eq!(
            (then.kind.as_str(), then.subject.as_str(), then.state, then.undoable),
            ("power-off goto", "m@one", OpState::Done, true)
        );
        let machine = off.machine;
        assert_eq!((machine.power, machine.parent.as_deref()), (Power::Off, Some("one")));
        assert_eq!(machine.config.on_poweroff, OnPowerOff::Back, "set after the snapshot was taken");
        assert!(lab.holds(0, 1));
        // The last thing that somebody did to it.
        lab.engine().undo(&Context::new(), None).unwrap();
        assert!(lab.holds(0, round), "what it had was kept");
        assert_eq!(lab.engine().machine("m").unwrap().power, Power::Off);
        assert!(lab.engine().look_for_ends().due.is_empty(), "it is not due again");
        lab.write(0, round + 1);
    }
}

#[test]
fn what_is_as_it_was_at_the_snapshot_is_left_alone() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.write(0, 1);
    lab.take("one");
    set(&lab, OnPowerOff::Back);
    start(&lab);
    let layer = lab.here();
    assert!(kill(&lab).then.is_none());
    assert_eq!((lab.here(), entries(&lab).len()), (layer, 0));
    // A setting is something.
    let options = SetOptions { memory: Some(80 << 20), ..SetOptions::default() };
    lab.engine().set(&Context::new(), "m", options).unwrap();
    start(&lab);
    let off = kill(&lab);
    assert!(off.then.is_some_and(|then| then.undoable));
    assert_eq!(off.machine.config.memory, 64 << 20);
}

#[test]
fn a_snapshot_with_memory_is_gone_back_to_suspended() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    set(&lab, OnPowerOff::Back);
    start(&lab);
    lab.take("one");
    let off = kill(&lab);
    assert_eq!((off.machine.power, off.machine.parent.as_deref()), (Power::Suspended, Some("one")));
    assert!(off.then.is_some());
    start(&lab);
    assert_eq!(lab.engine().machine("m").unwrap().power, Power::Running);
    power_off(&lab);
    let done = watch(&lab);
    assert_eq!(done.len(), 1);
    assert_eq!(lab.engine().machine("m").unwrap().power, Power::Suspended);
    // Given up, that memory is no power-off.
    assert!(kill(&lab).then.is_none());
    assert_eq!(lab.engine().machine("m").unwrap().power, Power::Off);
    assert!(lab.engine().look_for_ends().due.is_empty());
}

#[test]
fn a_snapshot_is_taken_of_it() {
    let lab = lab(OnPowerOff::Take);
    start(&lab);
    let then = kill(&lab).then.unwrap();
    assert_eq!((then.kind.as_str(), then.subject.as_str()), ("power-off take", "m@snap-1"));
    let taken = lab.engine().snapshot("m@snap-1").unwrap();
    assert_eq!((taken.note.as_str(), taken.power), ("taken at power-off", Power::Off));
    start(&lab);
    power_off(&lab);
    assert_eq!(watch(&lab).len(), 1);
    assert_eq!(lab.names(), ["one", "snap-1", "snap-2"]);
    assert!(watch(&lab).is_empty());
    // What a guest brings about is nobody's last work, unless its machine is named.
    lab.create("n", vec![DISK]);
    lab.engine().take(&Context::new(), "n", TakeOptions::default()).unwrap();
    start(&lab);
    power_off(&lab);
    watch(&lab);
    assert_eq!(lab.engine().undo(&Context::new(), None).unwrap().operation, "take n@snap-1");
    assert_eq!(lab.engine().undo(&Context::new(), Some("m")).unwrap().operation, "power-off take m@snap-3");
    assert_eq!(lab.names(), ["one", "snap-1", "snap-2"]);
}

#[test]
fn whoever_comes_before_the_daemon_finds_it_done() {
    let lab = lab(OnPowerOff::Back);
    start(&lab);
    power_off(&lab);
    start(&lab);
    assert!(lab.holds(0, 1), "it was started at its snapshot");
    let done = entries(&lab);
    assert_eq!((done.len(), done[0].state), (1, OpState::Done));
    kill(&lab);
    lab.write(0, 3);
    start(&lab);
    power_off(&lab);
    // What goes is what it would have gone back to.
    lab.engine().rm(&Context::new(), "m@one", false).unwrap();
    assert!(lab.holds(0, 1));
    assert_eq!(entries(&lab).len(), 2);
    assert!(watch(&lab).is_empty());
}

#[test]
fn what_the_daemon_has_not_seen_is_done_once_by_the_next() {
    let mut lab = lab(OnPowerOff::Take);
    for number in 1..3 {
        start(&lab);
        lab.engine = None;
        power_off(&lab);
        let notes = lab.open();
        assert!(notes.iter().any(|note| note.contains("m was powered off: a snapshot")), "{notes:?}");
        // It dies again, before it has done anything.
        let notes = lab.open();
        assert!(notes.iter().any(|note| note.contains("m was powered off")), "{notes:?}");
        assert_eq!(watch(&lab).len(), 1);
        assert_eq!(lab.names().len(), 1 + number);
        assert!(lab.open().is_empty());
        assert!(watch(&lab).is_empty());
    }
}

#[test]
fn lost_power_is_no_power_off() {
    let mut lab = lab(OnPowerOff::Back);
    start(&lab);
    let pid = lab.engine().machine("m").unwrap().pid.unwrap();
    lab::kill_process(pid);
    assert!(watch(&lab).is_empty());
    assert_eq!(lab.engine().machine("m").unwrap().power, Power::LostPower);
    start(&lab);
    let pid = lab.engine().machine("m").unwrap().pid.unwrap();
    lab.engine = None;
    lab::kill_process(pid);
    lab.open();
    assert!(watch(&lab).is_empty());
    assert!(lab.holds(0, 2) && entries(&lab).is_empty());
}

#[test]
fn what_fails_is_told_once_and_the_machine_stays_off() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    set(&lab, OnPowerOff::Back);
    start(&lab);
    let cx = Context::new();
    let off = lab.engine().kill(&cx, "m").unwrap();
    let said = cx.progress.warnings.lock().unwrap().join("\n");
    assert!(said.contains("m has no snapshot to go back to") && said.contains("spinney take m"), "{said}");
    assert_eq!(off.machine.left_at_power_off.as_deref(), Some("m has no snapshot to go back to"));
    assert!(watch(&lab).is_empty() && entries(&lab).is_empty());
    start(&lab);
    assert_eq!(lab.engine().machine("m").unwrap().left_at_power_off, None, "it is on");
}

#[test]
fn whoever_was_not_asked_may_answer_later_and_once() {
    let lab = lab(OnPowerOff::Ask);
    let answer = |then| lab.engine().answer_power_off(&Context::new(), "m", then);
    let left = || lab.engine().machine("m").unwrap().left_at_power_off;
    assert_eq!(lab.code(answer(OnPowerOff::Back)), Code::Refused);
    start(&lab);
    power_off(&lab);
    assert!(watch(&lab).is_empty(), "nobody is asked");
    assert!(left().is_some_and(|why| why.contains("nobody has said")));
    assert_eq!(lab.code(answer(OnPowerOff::Ask)), Code::Usage);
    assert_eq!(answer(OnPowerOff::Back).unwrap().then.unwrap().kind, "power-off goto");
    assert!(lab.holds(0, 1) && left().is_none());
    assert_eq!(lab.code(answer(OnPowerOff::Back)), Code::Refused);
    for (then, names) in [(OnPowerOff::Take, 2), (OnPowerOff::Nothing, 2)] {
        start(&lab);
        assert!(kill(&lab).machine.left_at_power_off.is_some());
        answer(then).unwrap();
        assert_eq!((left(), lab.names().len()), (None, names));
    }
    start(&lab);
    kill(&lab);
    lab.take("by-hand");
    assert_eq!(left(), None, "that was an answer");
}

#[test]
fn the_setting_comes_with_a_snapshot_and_is_told_and_a_clone_has_none() {
    let lab = lab(OnPowerOff::Take);
    let cx = Context::new();
    lab.engine().goto(&cx, "m@one", GotoPower::Recorded, false).unwrap();
    let said = cx.progress.warnings.lock().unwrap().join("\n");
    assert!(said.contains("--on-poweroff nothing") && said.contains("--on-poweroff take"), "{said}");
    assert_eq!(lab.engine().machine("m").unwrap().config.on_poweroff, OnPowerOff::Nothing);
    lab.engine().undo(&Context::new(), None).unwrap();
    assert_eq!(lab.engine().machine("m").unwrap().config.on_poweroff, OnPowerOff::Take);
    let options = snapshots::CloneOptions { name: "n".into(), ..Default::default() };
    let cloned = lab.engine().clone_target(&Context::new(), "m", &options).unwrap();
    assert_eq!(cloned.machine.config.on_poweroff, OnPowerOff::Nothing);
}

#[test]
fn a_removed_machine_is_left_alone() {
    let lab = lab(OnPowerOff::Back);
    start(&lab);
    power_off(&lab);
    lab.engine().rm(&Context::new(), "m", false).unwrap();
    assert!(lab.engine().look_for_ends().due.is_empty());
    lab.engine().undo(&Context::new(), None).unwrap();
    assert!(lab.engine().look_for_ends().due.is_empty() && lab.holds(0, 2), "it is back as it was");
}
