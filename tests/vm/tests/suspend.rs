//! Suspending: the guest goes on from exactly where it was, whatever dies on the way.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use vm_tests::guest::Guest;
use vm_tests::harness::Spinney;

const SOON: Duration = Duration::from_secs(60);

fn connect(spinney: &Spinney) -> Guest {
    let port = spinney.port("m").unwrap().expect("it has a process");
    Guest::connect(&port, SOON).unwrap()
}

fn state(spinney: &Spinney) -> String {
    spinney.ok("show m").unwrap()["power"].as_str().unwrap_or_default().to_owned()
}

/// The daemon dies as soon as it has reached this step.
fn crash_at(spinney: &mut Spinney, step: &str, words: &str) {
    let marker = spinney.folder().join(step);
    spinney.set("SPINNEY_CRASH", &format!("{step} kill {}", marker.display()));
    spinney.kill_daemon();
    let ended = spinney.run(words.split(' '));
    assert!(marker.exists(), "{step} was not reached: {}", ended.stderr);
    spinney.ok("ls").unwrap();
}

fn wait_for(path: &Path) {
    let deadline = Instant::now() + SOON;
    while path.exists() {
        assert!(Instant::now() < deadline, "{} is still there", path.display());
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_suspended_machine_goes_on_where_it_was() {
    let spinney = Spinney::new();
    spinney.create_guest("m", 96).unwrap();
    spinney.ok("start m").unwrap();
    let mut guest = connect(&spinney);
    let nonce = guest.hello().unwrap().nonce;
    guest.log_step(1).unwrap();
    let (counter, log) = (guest.counter().unwrap(), guest.log_check().unwrap());
    assert!(log.ok, "{log:?}");

    spinney.ok("suspend m").unwrap();
    assert_eq!((state(&spinney).as_str(), spinney.machines().len()), ("suspended", 0));
    for (words, code) in
        [("suspend m", 4), ("pause m", 4), ("stop m", 4), ("kill m", 4), ("set m --memory 128M", 4)]
    {
        let ended = spinney.run(words.split(' '));
        assert_eq!(ended.code, Some(code), "{words}: {}", ended.stderr);
        assert_eq!(state(&spinney), "suspended", "{words}");
    }
    // Its pages are nobody's garbage, and its memory is looked at.
    spinney.ok("gc --now").unwrap();
    assert_eq!(spinney.ok("fsck").unwrap()["damage"].as_array().unwrap().len(), 0);
    let taken = spinney.ok("take m kept").unwrap();
    assert_eq!((&taken["power"], &taken["mode"]), (&"suspended".into(), &"suspended".into()));

    spinney.kill_daemon();
    spinney.ok("start m").unwrap();
    let mut guest = connect(&spinney);
    assert_eq!(guest.hello().unwrap().nonce, nonce);
    assert!(guest.counter().unwrap() >= counter);
    guest.log_step(1).unwrap();
    let now = guest.log_check().unwrap();
    assert!(now.ok && now.mem > log.mem, "{now:?} after {log:?}");

    // The snapshot has that moment too: the machine is suspended again, or runs at once.
    spinney.ok("goto m@kept").unwrap();
    assert_eq!(state(&spinney), "suspended");
    spinney.ok("undo").unwrap();
    assert_eq!(state(&spinney), "running");
    spinney.ok("goto m@kept --running").unwrap();
    let mut guest = connect(&spinney);
    assert_eq!(guest.hello().unwrap().nonce, nonce);
    let then = guest.log_check().unwrap();
    assert!(then.ok && then.mem == log.mem, "{then:?} is not {log:?}");

    spinney.ok("suspend m").unwrap();
    spinney.ok("kill m --yes").unwrap();
    assert_eq!(state(&spinney), "off");
}

#[test]
fn whatever_step_the_daemon_dies_at_it_runs_or_is_suspended() {
    let mut spinney = Spinney::new();
    spinney.create_guest("m", 96).unwrap();
    spinney.ok("start m").unwrap();
    let nonce = connect(&spinney).hello().unwrap().nonce;
    for (step, words, after) in [
        ("suspend.memory", "suspend m", "running"),
        ("suspend.written", "suspend m", "suspended"),
        ("wake.loaded", "start m", "suspended"),
        ("wake.decided", "start m", "running"),
        ("suspend.ended", "suspend m", "suspended"),
    ] {
        if after == "running" || words == "suspend m" {
            // What is written is there afterwards.
            if state(&spinney) == "running" {
                connect(&spinney).log_step(1).unwrap();
            }
        }
        crash_at(&mut spinney, step, words);
        assert_eq!(state(&spinney), after, "{step}");
        let processes = usize::from(after == "running");
        assert_eq!(spinney.machines().len(), processes, "{step}: no process too many");
        if after == "running" {
            let mut guest = connect(&spinney);
            assert_eq!(guest.hello().unwrap().nonce, nonce, "{step}");
            let (first, log) = (guest.counter().unwrap(), guest.log_check().unwrap());
            assert!(log.ok, "{step}: {log:?}");
            thread::sleep(Duration::from_millis(100));
            assert!(guest.counter().unwrap() > first, "{step}: it stands still");
        }
    }
    spinney.ok("start m").unwrap();
    assert!(connect(&spinney).log_check().unwrap().ok);
}

#[test]
fn a_machine_that_lost_its_power_starts_with_the_daemon_and_one_that_was_stopped_does_not() {
    let spinney = Spinney::new();
    let create = |name: &str| {
        spinney.ok(&format!("create {name} --memory 64M --network none --autostart")).unwrap();
        spinney.ok(&format!("start {name}")).unwrap();
    };
    create("m");
    create("off");
    spinney.ok("kill off").unwrap();
    spinney.kill_daemon();
    for pid in spinney.machines() {
        vm_tests::harness::kill(pid);
    }
    let runs = spinney.runs();
    spinney.ok("ls").unwrap();
    runs.iter().for_each(|run| wait_for(run));
    let power = |name: &str| spinney.ok(&format!("show {name}")).unwrap()["power"].clone();
    let deadline = Instant::now() + SOON;
    while power("m") != "running" {
        assert!(Instant::now() < deadline, "it did not start: {}", power("m"));
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(power("off"), "off", "somebody wanted it off");

    // Another boot of the host: whatever was off before it starts.
    spinney.kill_daemon();
    std::fs::write(spinney.state().join("boot"), "another").unwrap();
    spinney.ok("ls").unwrap();
    while power("off") != "running" {
        assert!(Instant::now() < deadline + SOON, "it did not start: {}", power("off"));
        thread::sleep(Duration::from_millis(50));
    }
}
