//! A goto whose new machine cannot start beside the old one: here both want the same port of the host's.

use std::fs;
use std::net::TcpListener;
use std::time::Duration;

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

fn pid(spinney: &Spinney) -> Option<u64> {
    spinney.ok("show m").ok()?["pid"].as_u64()
}

/// Flips a byte in the middle of every page pack that the last take wrote.
fn damage_newest_pack(spinney: &Spinney) {
    let groups = fs::read_dir(spinney.state().join("groups")).unwrap();
    let packs = groups.flat_map(|group| fs::read_dir(group.unwrap().path().join("pages/packs")).unwrap());
    let newest = packs
        .map(|pack| pack.unwrap().path())
        .max_by_key(|path| path.metadata().unwrap().modified().unwrap());
    let newest = newest.expect("a pack");
    let mut bytes = fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&newest, bytes).unwrap();
}
