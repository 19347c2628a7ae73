//! Snapshots that go by themselves: what goes, what stays, what comes back.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use vm_tests::harness::Spinney;
use vm_tests::underway::reached;

const HOUR: i64 = 3600;
const YEAR: i64 = 365 * 24 * HOUR;
/// How soon something goes whose time has come, on a busy host.
const SOON: Duration = Duration::from_secs(30);

fn machine() -> Spinney {
    let spinney = Spinney::new();
    spinney.ok("create m --memory 64M --network none --disk 16M").unwrap();
    spinney
}

fn tree(spinney: &Spinney) -> Vec<Value> {
    spinney.ok("tree m").unwrap()["snapshots"].as_array().expect("snapshots").clone()
}

/// Names and the names of their parents.
fn names(spinney: &Spinney) -> Vec<(String, String)> {
    let all = tree(spinney);
    let name = |id: &Value| all.iter().find(|s| s["id"] == *id).map_or("", |s| s["name"].as_str().unwrap());
    all.iter().map(|s| (s["name"].as_str().unwrap().to_owned(), name(&s["parent"]).to_owned())).collect()
}

fn has(spinney: &Spinney, name: &str) -> bool {
    names(spinney).iter().any(|(own, _)| own == name)
}

fn goes(spinney: &Spinney, name: &str) {
    let deadline = Instant::now() + SOON;
    while has(spinney, name) {
        assert!(Instant::now() < deadline, "{name} does not go: {:?}", tree(spinney));
        thread::sleep(Duration::from_millis(100));
    }
}

fn stays(spinney: &Spinney, name: &str) {
    thread::sleep(Duration::from_secs(2));
    assert!(has(spinney, name), "{name} is gone: {:?}", names(spinney));
}

fn entries(spinney: &Spinney, kind: &str) -> Vec<Value> {
    let log = spinney.ok("op log -n 100").unwrap();
    let mut all = log["operations"].as_array().expect("operations").clone();
    all.retain(|op| op["kind"] == kind);
    all
}

fn pair(name: &str, parent: &str) -> (String, String) {
    (name.to_owned(), parent.to_owned())
}

#[test]
fn what_has_expired_goes_and_undo_brings_it_back_for_good() {
    let spinney = machine();
    spinney.ok("take m base --keep").unwrap();
    let taken = spinney.ok("take m short --expire 2s").unwrap();
    assert!(taken["expires"].is_string(), "{taken}");
    spinney.ok("take m child").unwrap();
    spinney.ok("take m long --expire 7d").unwrap();
    let (drawn, _) = spinney.plain(&["tree", "m"]);
    assert!(drawn.contains("expires in 7 d"), "{drawn}");
    let (shown, _) = spinney.plain(&["show", "m@long"]);
    assert!(shown.contains("UTC (in 7 d)"), "{shown}");

    goes(&spinney, "short");
    assert_eq!(names(&spinney), [pair("base", ""), pair("child", "base"), pair("long", "child")]);
    assert_eq!(spinney.ok("show m").unwrap()["parent"], "long", "here is untouched");
    let gone = entries(&spinney, "expire");
    assert_eq!(gone.len(), 1);
    assert_eq!((&gone[0]["subject"], &gone[0]["state"]), (&"m@short".into(), &"done".into()));

    // It is the last that happened to the machine.
    let back = spinney.ok("undo").unwrap();
    assert_eq!(back["operation"], "expire m@short");
    assert!(back["warnings"][0].as_str().is_some_and(|words| words.contains("does not expire")), "{back}");
    assert_eq!(spinney.ok("show m@short").unwrap()["expires"], Value::Null);
    stays(&spinney, "short");
    assert_eq!(names(&spinney)[2], pair("child", "short"));
    spinney.ok("goto m@short").unwrap();

    // Done again, and undone again.
    spinney.ok(&format!("undo {}", back["again"].as_str().unwrap())).unwrap();
    assert!(!has(&spinney, "short"));
    spinney.ok(&format!("undo {}", entries(&spinney, "redo")[0]["id"].as_str().unwrap())).unwrap();
    stays(&spinney, "short");
}

#[test]
fn what_is_kept_or_protected_stays() {
    let spinney = machine();
    assert_eq!(spinney.run(["take", "m", "x", "--keep", "--expire", "2s"]).code, Some(2));
    spinney.ok("take m kept --expire 3s").unwrap();
    let edited = spinney.ok("edit m@kept --keep").unwrap();
    assert!(edited["warnings"][0].as_str().is_some_and(|words| words.contains("not expire")), "{edited}");
    assert_eq!(spinney.run(["edit", "m@kept", "--expire", "1s"]).code, Some(4), "it is kept");
    assert_eq!(spinney.run(["edit", "m@kept", "--keep", "--expire", "1s"]).code, Some(2));
    spinney.ok("take m never --expire 3s").unwrap();
    spinney.ok("edit m@never --expire never").unwrap();
    spinney.ok("take m safe --expire 2s").unwrap();
    spinney.ok("protect m@safe").unwrap();
    // A point that a goto keeps goes by a rule of its own, unless it is given a name.
    spinney.ok("goto m@safe").unwrap();
    let point = tree(&spinney).iter().find(|s| s["undo_point"] == true).unwrap()["name"].clone();
    let point = format!("m@{}", point.as_str().unwrap());
    assert_eq!(spinney.run(["edit", &point, "--expire", "1s"]).code, Some(4));
    assert_eq!(spinney.run(["edit", "m", "--expire", "1s"]).code, Some(2), "a machine");
    thread::sleep(Duration::from_secs(3));
    for name in ["kept", "never", "safe"] {
        assert!(has(&spinney, name), "{name}");
    }
    assert!(entries(&spinney, "expire").is_empty());
    spinney.ok("unprotect m@safe").unwrap();
    goes(&spinney, "safe");
    assert!(has(&spinney, "kept") && has(&spinney, "never"));
}

#[test]
fn an_edit_is_undone_with_its_expiry_and_one_that_is_over_does_not_come_back() {
    let spinney = machine();
    spinney.ok("take m one --expire 7d").unwrap();
    let first = spinney.ok("show m@one").unwrap()["expires"].clone();
    spinney.ok("edit m@one --expire 4w -m note").unwrap();
    assert_ne!(spinney.ok("show m@one").unwrap()["expires"], first);
    spinney.ok("undo").unwrap();
    let shown = spinney.ok("show m@one").unwrap();
    assert_eq!((&shown["expires"], &shown["note"]), (&first, &"".into()));
    spinney.ok("edit m@one --keep").unwrap();
    spinney.ok("undo").unwrap();
    let shown = spinney.ok("show m@one").unwrap();
    assert_eq!((&shown["expires"], &shown["keep"]), (&first, &false.into()));
    // Removed with an expiry that is over before it is brought back.
    spinney.ok("take m two --expire 3s").unwrap();
    spinney.ok("rm m@two").unwrap();
    thread::sleep(Duration::from_secs(3));
    assert!(spinney.ok("undo").unwrap()["warnings"].is_array());
    stays(&spinney, "two");
    assert!(has(&spinney, "one"));
}

#[test]
fn what_expires_while_there_is_no_daemon_goes_when_there_is_one() {
    let spinney = machine();
    spinney.ok("take m one --expire 1s").unwrap();
    spinney.kill_daemon();
    thread::sleep(Duration::from_secs(1));
    goes(&spinney, "one");
    // In another group it expires all the same.
    spinney.ok("group create work").unwrap();
    spinney.ok("take m two --expire 15s").unwrap();
    spinney.ok("edit m --group work").unwrap();
    assert!(spinney.ok("show m@two").unwrap()["expires"].is_string());
    goes(&spinney, "two");
    spinney.ok("undo").unwrap();
    assert!(has(&spinney, "two"));
    assert_eq!(spinney.ok("fsck").unwrap()["damage"], serde_json::json!([]));
}

/// A bare `undo` stays with the machine that somebody worked on.
#[test]
fn what_expires_of_another_machine_is_not_what_undo_takes_back() {
    let spinney = machine();
    spinney.ok("take m one --expire 2s").unwrap();
    spinney.ok("create other --memory 64M --network none --disk 16M").unwrap();
    spinney.ok("take other mine").unwrap();
    goes(&spinney, "one");
    assert_eq!(spinney.ok("undo").unwrap()["operation"], "take other@mine");
    assert_eq!(spinney.ok("undo m").unwrap()["operation"], "expire m@one");
}

#[test]
fn a_target_that_is_worked_on_waits() {
    let mut spinney = Spinney::new();
    let marker = spinney.folder().join("held");
    spinney.set("SPINNEY_CRASH", &format!("goto.overlays wait {}", marker.display()));
    spinney.ok("create m --memory 64M --network none --disk 16M").unwrap();
    spinney.ok("take m one --expire 3s").unwrap();
    let command = spinney.under_way("goto m@one");
    reached(&marker, "goto.overlays");
    thread::sleep(Duration::from_secs(5));
    assert!(has(&spinney, "one"), "somebody is on the way to it");
    fs::remove_file(&marker).unwrap();
    let ended = command.end();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    goes(&spinney, "one");
    spinney.ok("start m").unwrap();
    spinney.ok("kill m").unwrap();
}

/// The daemon dies after each step: afterwards it is there or gone as by any other, never half, and what is not done yet is done.
#[test]
fn one_that_is_cut_short_is_done_by_the_next_daemon() {
    for (step, failed, done) in [("journal.begun", 1, 1), ("expire.written", 0, 1)] {
        let mut spinney = Spinney::new();
        let (words, marker) = (spinney.folder().join("words"), spinney.folder().join("marker"));
        spinney.set("SPINNEY_CRASH", &format!("@{}", words.display()));
        spinney.ok("create m --memory 64M --network none --disk 16M").unwrap();
        spinney.ok("take m one").unwrap();
        spinney.ok("take m two").unwrap();
        spinney.ok("take m three").unwrap();
        spinney.ok("edit m@two --expire 4s").unwrap();
        fs::write(&words, format!("{step} kill {}\n", marker.display())).unwrap();
        reached(&marker, step);
        goes(&spinney, "two");
        assert_eq!(names(&spinney), [pair("one", ""), pair("three", "one")], "{step}");
        let of = |state: &str| entries(&spinney, "expire").iter().filter(|op| op["state"] == state).count();
        assert_eq!((of("failed"), of("done")), (failed, done), "{step}: {:?}", entries(&spinney, "expire"));
        spinney.ok("undo").unwrap();
        stays(&spinney, "two");
        assert_eq!(spinney.ok("fsck").unwrap()["damage"], serde_json::json!([]));
    }
}

/// With the clock a year ahead for a while: what becomes of a snapshot that has a day.
fn survives_a_jump(fault: &str) -> bool {
    let mut spinney = Spinney::new();
    let file = spinney.folder().join("clock");
    spinney.set("SPINNEY_CLOCK", file.to_str().unwrap());
    spinney.set("SPINNEY_FAULT", fault);
    let set = |seconds: i64| fs::write(&file, seconds.to_string()).unwrap();
    set(0);
    spinney.ok("create m --memory 64M --network none --disk 16M").unwrap();
    spinney.ok("take m one --expire 1d").unwrap();
    set(YEAR);
    // Whatever is done has it look.
    spinney.ok("take m two").unwrap();
    thread::sleep(Duration::from_secs(2));
    if !has(&spinney, "one") {
        return false;
    }
    // A day of the new time is a day.
    set(YEAR + 23 * HOUR);
    spinney.kill_daemon();
    spinney.ok("take m three").unwrap();
    thread::sleep(Duration::from_secs(2));
    has(&spinney, "one")
}

#[test]
fn nothing_goes_because_the_clock_was_a_year_ahead() {
    assert!(survives_a_jump(""));
    assert!(!survives_a_jump("trust-clock"), "the check is to be seen to fail");
}
