//! What follows a power-off, on real guests: by the guest itself, by `stop`, by `kill`; whoever dies meanwhile; once and not again.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use vm_tests::guest::Guest;
use vm_tests::harness::{Spinney, kill};
use vm_tests::underway::reached;

const SOON: Duration = Duration::from_secs(60);

fn connect(spinney: &Spinney) -> Guest {
    let port = spinney.port("m").unwrap().expect("it has a process");
    Guest::connect(&port, SOON).unwrap()
}

fn show(spinney: &Spinney) -> Value {
    spinney.ok("show m").unwrap()
}

fn power(spinney: &Spinney) -> String {
    show(spinney)["power"].as_str().unwrap_or_default().to_owned()
}

/// What followed power-offs so far, newest first.
fn entries(spinney: &Spinney) -> Vec<Value> {
    let log = spinney.ok("op log -n 200").unwrap();
    let mut all = log["operations"].as_array().expect("operations").clone();
    all.retain(|op| op["kind"].as_str().is_some_and(|kind| kind.starts_with("power-off")));
    all
}

/// How many of them were done. What died on its way is in the log too.
fn done(spinney: &Spinney) -> usize {
    entries(spinney).iter().filter(|op| op["state"] == "done").count()
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what} did not come");
        thread::sleep(Duration::from_millis(20));
    }
}

/// The guest powers itself off. Returns when its QEMU has ended, without a question to the daemon.
fn power_off(spinney: &Spinney) {
    connect(spinney).power_off().unwrap();
    wait_until("the end of QEMU", || spinney.machines().is_empty());
}

fn snapshots(spinney: &Spinney) -> Vec<String> {
    let tree = spinney.ok("tree m").unwrap();
    let all = tree["snapshots"].as_array().expect("snapshots").clone();
    let names = all.iter().filter(|snapshot| snapshot["undo_point"] == false);
    names.map(|snapshot| snapshot["name"].as_str().unwrap_or_default().to_owned()).collect()
}

/// The guest as it was when it was taken: its nonce, and the log that it knew.
struct Then {
    nonce: String,
    log: u64,
}

/// A guest that runs, with a snapshot `base` of that, and this setting since.
fn running(spinney: &Spinney, on_poweroff: &str) -> Then {
    spinney.create_guest("m", 96).unwrap();
    spinney.ok("start m").unwrap();
    let mut guest = connect(spinney);
    let log = guest.log_step(2).unwrap();
    let nonce = guest.nonce().unwrap();
    drop(guest);
    spinney.ok("take m base").unwrap();
    spinney.ok(&format!("set m --on-poweroff {on_poweroff}")).unwrap();
    Then { nonce, log }
}

/// It goes on from `then` at once.
fn goes_on(spinney: &Spinney, then: &Then) {
    spinney.ok("start m").unwrap();
    let mut guest = connect(spinney);
    let log = guest.log_check().unwrap();
    assert_eq!((guest.nonce().unwrap(), log.mem, log.ok), (then.nonce.clone(), then.log, true), "{log:?}");
}

#[test]
fn a_guest_that_powers_itself_off_is_back_before_anybody_asks() {
    let spinney = Spinney::new();
    let then = running(&spinney, "back");
    for round in 1..3 {
        let written = connect(&spinney).log_step(3).unwrap();
        assert_eq!(written, then.log + 3);
        power_off(&spinney);
        // Nobody asks meanwhile.
        thread::sleep(Duration::from_millis(1500));
        let began = Instant::now();
        assert_eq!(power(&spinney), "suspended", "round {round}: {:?}", entries(&spinney));
        assert!(began.elapsed() < Duration::from_secs(5));
        let entry = &entries(&spinney)[0];
        assert_eq!((&entry["kind"], &entry["subject"]), (&"power-off goto".into(), &"m@base".into()));
        assert_eq!(entry["undoable"], true);
        assert_eq!(show(&spinney)["config"]["on_poweroff"], "back", "or it would go back once");
        assert_eq!(entries(&spinney).len(), round);
        goes_on(&spinney, &then);
    }
    // What it had is an undo point: it is off there, with all that it has written.
    power_off(&spinney);
    wait_until("going back", || done(&spinney) == 3);
    spinney.ok("undo m").unwrap();
    assert_eq!(power(&spinney), "off");
    thread::sleep(Duration::from_secs(1));
    assert_eq!((power(&spinney).as_str(), entries(&spinney).len()), ("off", 3), "it is not due again");
    spinney.ok("start m").unwrap();
    let mut guest = connect(&spinney);
    assert_ne!(guest.nonce().unwrap(), then.nonce, "it was booted");
    assert!(guest.log_check().unwrap().mem >= then.log);
}

#[test]
fn stop_and_kill_go_back_before_they_answer() {
    let spinney = Spinney::new();
    let then = running(&spinney, "back");
    for words in ["stop m", "kill m", "stop m --timeout 0 --kill"] {
        let off = spinney.ok(words).unwrap();
        assert_eq!((&off["power"], &off["parent"]), (&"suspended".into(), &"base".into()), "{words}: {off}");
        assert_eq!(
            (&off["then"]["kind"], &off["then"]["subject"], &off["then"]["state"]),
            (&"power-off goto".into(), &"m@base".into(), &"done".into())
        );
        goes_on(&spinney, &then);
    }
    connect(&spinney).log_step(1).unwrap();
    let (said, note) = spinney.plain(&["kill", "m"]);
    assert!(said.contains("back at m@base, suspended") && note.contains("spinney undo"), "{said}{note}");
    // Somebody asked for it, and so it is what a bare undo means.
    let undone = spinney.ok("undo").unwrap();
    assert_eq!((&undone["operation"], power(&spinney).as_str()), (&"power-off goto m@base".into(), "off"));
    let (shown, _) = spinney.plain(&["show", "m"]);
    assert!(shown.contains("at power-off") && shown.contains("back: it goes back"), "{shown}");
}

#[test]
fn a_snapshot_is_taken_whoever_powers_it_off() {
    let spinney = Spinney::new();
    running(&spinney, "take");
    power_off(&spinney);
    wait_until("a snapshot", || snapshots(&spinney).len() == 2);
    spinney.ok("start m").unwrap();
    drop(connect(&spinney));
    let off = spinney.ok("stop m").unwrap();
    assert_eq!((&off["power"], &off["then"]["subject"]), (&"off".into(), &"m@snap-2".into()), "{off}");
    spinney.ok("start m").unwrap();
    spinney.ok("kill m").unwrap();
    assert_eq!(snapshots(&spinney), ["base", "snap-1", "snap-2", "snap-3"]);
    let taken = spinney.ok("show m@snap-3").unwrap();
    assert_eq!((&taken["note"], &taken["power"]), (&"taken at power-off".into(), &"off".into()));
    spinney.ok("undo").unwrap();
    assert_eq!(snapshots(&spinney), ["base", "snap-1", "snap-2"]);
}

#[test]
fn what_happened_without_a_daemon_is_done_once_by_the_next() {
    let spinney = Spinney::new();
    let then = running(&spinney, "back");
    spinney.kill_daemon();
    let run = spinney.runs().pop().expect("a machine that runs");
    Guest::connect(&run.join("test"), SOON).unwrap().power_off().unwrap();
    wait_until("the end of QEMU", || spinney.machines().is_empty());
    assert!(spinney.daemon().is_none());
    let (_, said) = spinney.plain(&["ls"]);
    assert!(said.contains("m was powered off: it goes back"), "{said}");
    wait_until("going back", || power(&spinney) == "suspended");
    spinney.kill_daemon();
    spinney.ok("ls").unwrap();
    thread::sleep(Duration::from_secs(1));
    assert_eq!((power(&spinney).as_str(), entries(&spinney).len()), ("suspended", 1));
    goes_on(&spinney, &then);

    // The first command after that is a start: it finds the machine where it belongs.
    spinney.kill_daemon();
    let run = spinney.runs().pop().expect("a machine that runs");
    Guest::connect(&run.join("test"), SOON).unwrap().power_off().unwrap();
    wait_until("the end of QEMU", || spinney.machines().is_empty());
    goes_on(&spinney, &then);
    assert_eq!(done(&spinney), 2);
}

#[test]
fn whoever_is_quicker_a_start_finds_the_machine_back() {
    let spinney = Spinney::new();
    let then = running(&spinney, "back");
    for round in 1..5 {
        let guest = &mut connect(&spinney);
        guest.log_step(1).unwrap();
        guest.power_off().unwrap();
        // Refused as long as it runs.
        wait_until("a start", || spinney.run(["start", "m"]).code == Some(0));
        let mut guest = connect(&spinney);
        assert_eq!(guest.nonce().unwrap(), then.nonce, "round {round}: {:?}", entries(&spinney));
        assert_eq!((guest.log_check().unwrap().mem, done(&spinney)), (then.log, round));
    }
}

#[test]
fn the_daemon_dies_on_the_way_and_it_is_done_once() {
    for (word, kind, steps) in [
        ("back", "power-off goto", ["power-off.due", "goto.overlays", "goto.decided"]),
        ("take", "power-off take", ["power-off.due", "take.overlays", "take.written"]),
    ] {
        let mut spinney = Spinney::new();
        let then = running(&spinney, word);
        for (round, step) in (1..).zip(steps) {
            let marker = spinney.folder().join(step);
            spinney.set("SPINNEY_CRASH", &format!("{step} kill {}", marker.display()));
            spinney.kill_daemon();
            spinney.ok("ls").unwrap();
            power_off(&spinney);
            reached(&marker, step);
            wait_until("the end of the daemon", || spinney.daemon().is_none());
            spinney.ok("ls").unwrap();
            wait_until("what is due", || done(&spinney) == round);
            thread::sleep(Duration::from_secs(1));
            assert_eq!(done(&spinney), round, "{step}: {:?}", entries(&spinney));
            assert!(entries(&spinney).iter().all(|op| op["kind"] == kind));
            match word {
                "back" => goes_on(&spinney, &then),
                _ => {
                    assert_eq!(snapshots(&spinney).len(), 1 + round, "{step}");
                    spinney.ok("start m").unwrap();
                }
            }
        }
    }
}

#[test]
fn a_machine_that_loses_its_power_is_left_alone() {
    let spinney = Spinney::new();
    running(&spinney, "back");
    for daemon_sees in [true, false] {
        if !daemon_sees {
            spinney.kill_daemon();
        }
        spinney.machines().into_iter().for_each(kill);
        spinney.ok("ls").unwrap();
        thread::sleep(Duration::from_secs(1));
        assert_eq!(power(&spinney), "lost_power", "seen by the daemon: {daemon_sees}");
        assert!(entries(&spinney).is_empty());
        spinney.ok("start m").unwrap();
    }
}

#[test]
fn a_machine_without_a_snapshot_stays_off_with_a_warning() {
    let spinney = Spinney::new();
    spinney.create_guest("m", 96).unwrap();
    spinney.ok("set m --on-poweroff back").unwrap();
    spinney.ok("start m").unwrap();
    drop(connect(&spinney));
    let off = spinney.ok("stop m").unwrap();
    assert_eq!((&off["power"], &off["then"]), (&"off".into(), &Value::Null));
    assert!(off["warnings"].to_string().contains("no snapshot to go back to"), "{off}");
    let (shown, _) = spinney.plain(&["show", "m"]);
    assert!(shown.contains("left as it is: m has no snapshot to go back to"), "{shown}");
    spinney.ok("start m").unwrap();
    assert!(show(&spinney)["left_at_power_off"].is_null());
    power_off(&spinney);
    wait_until("the end", || show(&spinney)["left_at_power_off"].is_string());
    assert!(entries(&spinney).is_empty());
}

#[test]
fn who_is_to_be_asked_is_asked_on_a_terminal_alone() {
    let spinney = Spinney::new();
    let then = running(&spinney, "ask");
    let left = || show(&spinney)["left_at_power_off"].as_str().map(str::to_owned);
    // With --json, off a terminal, by the guest itself: it stays off, and `show` says so.
    spinney.ok("kill m").unwrap();
    assert!(left().is_some_and(|why| why.contains("nobody has said")));
    let (shown, _) = spinney.plain(&["show", "m"]);
    assert!(shown.contains("left as it is") && shown.contains("ask: "), "{shown}");
    spinney.ok("start m").unwrap();
    let (said, asked) = spinney.plain(&["kill", "m"]);
    assert!(said.contains("m is off") && !asked.contains("Leave"), "{said}{asked}");
    spinney.ok("start m").unwrap();
    power_off(&spinney);
    wait_until("the end", || left().is_some());
    assert!(entries(&spinney).is_empty());

    for (typed, shown, state, count) in [
        ("\n", "m is off", "off", 0),
        ("t\n", "m@snap-1 was taken", "off", 1),
        ("nonsense\n", "m is off", "off", 1),
    ] {
        spinney.ok("start m").unwrap();
        let seen = spinney.on_terminal("kill m", typed);
        assert!(seen.contains("[L/b/t]") && seen.contains(shown), "{typed:?}: {seen}");
        assert_eq!((power(&spinney).as_str(), left(), done(&spinney)), (state, None, count), "{typed:?}");
    }
    spinney.ok("goto m@base --running").unwrap();
    // It was taken before that was set.
    spinney.ok("set m --on-poweroff ask").unwrap();
    let seen = spinney.on_terminal("stop m", "b\n");
    assert!(seen.contains("back to m@base") && seen.contains("back at m@base, suspended"), "{seen}");
    goes_on(&spinney, &then);
}
