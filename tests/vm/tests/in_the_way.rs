//! A goto whose new machine cannot start beside the old one: here both want the same port of the host's.

use std::fs;
use std::net::TcpListener;
use std::thread;
use std::time::{Duration, Instant};

use vm_tests::guest::Guest;
use vm_tests::harness::{Spinney, kill};

/// A machine that forwards a port of the host's to itself.
fn create(spinney: &Spinney, port: u16) {
    let forward = format!("user,id=fwd,hostfwd=tcp:127.0.0.1:{port}-:22");
    let card = ["-netdev", &forward, "-device", "virtio-net-pci,netdev=fwd"];
    spinney.create_guest_with("m", 128, &card).unwrap();
}

/// A port that nobody has at this moment.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn guest(spinney: &Spinney) -> Guest {
    let port = spinney.port("m").unwrap().expect("a process");
    Guest::connect(&port, Duration::from_secs(60)).unwrap()
}

/// Says a word to the guest's memory.
fn tell(spinney: &Spinney, word: &str) {
    guest(spinney).cmd(&format!("echo {word} > /word")).unwrap();
}

/// The last word that it knows.
fn word(spinney: &Spinney) -> String {
    guest(spinney).cmd("cat /word").unwrap().1.trim().to_owned()
}

fn text(value: &serde_json::Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[test]
fn the_old_machine_ends_first_and_never_for_a_snapshot_that_cannot_be_read() {
    let spinney = Spinney::new();
    create(&spinney, free_port());
    spinney.ok("start m").unwrap();
    tell(&spinney, "first");
    spinney.ok("take m one").unwrap();
    tell(&spinney, "second");

    let report = spinney.ok("goto m@one").unwrap();
    assert!(text(&report["in_place"]).contains("host forwarding"), "{report}");
    assert_eq!(word(&spinney), "first");
    spinney.ok("undo").unwrap();
    assert_eq!(word(&spinney), "second", "the undo point has what was left");

    // A snapshot that cannot be read costs nothing, even so late.
    tell(&spinney, "third");
    spinney.ok("take m two").unwrap();
    tell(&spinney, "fourth");
    damage_newest_pack(&spinney);
    let failed = spinney.run(["goto", "m@two"]);
    assert_eq!(failed.code, Some(6), "{}", failed.stderr);
    assert_eq!(word(&spinney), "fourth", "it runs on as before");
    let machine = spinney.ok("show m").unwrap();
    assert_eq!(text(&machine["power"]), "running");
    assert_eq!(text(&machine["parent"]), "two");
}

#[test]
fn a_daemon_that_dies_in_between_brings_the_machine_back() {
    let spinney = Spinney::new();
    create(&spinney, free_port());
    spinney.ok("start m").unwrap();
    spinney.ok("take m one").unwrap();
    tell(&spinney, "late");
    let old = pid(&spinney).expect("a process");
    let mut command = spinney.begin(&["goto", "m@one"]);
    // The old process ends only after the undo point is committed, and the new machine takes a while to load.
    while fs::read(format!("/proc/{old}/cmdline")).is_ok_and(|line| !line.is_empty()) {
        std::thread::yield_now();
    }
    kill(spinney.daemon().expect("a daemon"));
    command.wait().unwrap();
    let machine = spinney.ok("show m").unwrap();
    assert_eq!(text(&machine["power"]), "running", "{machine}\n{}", spinney.log());
    let log = spinney.ok("op log").unwrap();
    assert_eq!(text(&log["operations"][0]["state"]), "failed", "killed before its end: {log}");
    assert_eq!(word(&spinney), "late", "as it was before the goto");
    spinney.ok("goto m@one").unwrap();
    let report = spinney.ok("fsck").unwrap();
    assert_eq!(report["damage"].as_array().map(Vec::len), Some(0), "{report}");
}

#[test]
fn a_machine_that_could_not_be_brought_back_says_how_it_can_be() {
    let mut spinney = Spinney::new();
    let number = free_port();
    create(&spinney, number);
    spinney.ok("start m").unwrap();
    spinney.ok("take m one").unwrap();
    tell(&spinney, "late");
    let marker = spinney.folder().join("alone");
    spinney.set("SPINNEY_CRASH", &format!("goto.alone wait {}", marker.display()));
    // The next command starts a daemon that knows the step.
    spinney.kill_daemon();
    let goto = spinney.under_way("goto m@one");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !marker.exists() {
        assert!(Instant::now() < deadline, "the old machine did not end");
        thread::sleep(Duration::from_millis(5));
    }
    // Somebody else is quicker.
    let port = TcpListener::bind(("127.0.0.1", number)).unwrap();
    fs::remove_file(&marker).unwrap();
    let ended = goto.end();
    let problem = ended.problem();
    assert_eq!(ended.code, Some(4), "{problem}");
    assert!(text(&problem["hint"]).contains("`spinney goto m@undo-1` brings it back"), "{problem}");

    let machine = spinney.ok("show m").unwrap();
    assert_eq!((text(&machine["power"]), text(&machine["brought_back_by"])), ("lost_power", "m@undo-1"));
    for words in [&["ls"][..], &["show", "m"], &["start", "m"]] {
        let (stdout, stderr) = spinney.plain(words);
        assert!(
            format!("{stdout}{stderr}").contains("`spinney goto m@undo-1`"),
            "{words:?}: {stdout}{stderr}"
        );
    }
    drop(port);
    spinney.ok("goto m@undo-1").unwrap();
    assert_eq!(word(&spinney), "late", "memory and all");
    let machine = spinney.ok("show m").unwrap();
    assert!(machine["brought_back_by"].is_null(), "{machine}");
}

fn pid(spinney: &Spinney) -> Option<u64> {
    spinney.ok("show m").ok()?["pid"].as_u64()
}

/// Flips a byte in the middle of every page pack that the last take wrote.
fn damage_newest_pack(spinney: &Spinney) {
    let newest = spinney.packs().into_iter().max_by_key(|path| path.metadata().unwrap().modified().unwrap());
    let newest = newest.expect("a pack");
    let mut bytes = fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&newest, bytes).unwrap();
}
