//! A stop-copy reads the guest's memory from outside: the guest stands still, QEMU does not.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use vm_tests::guest::Guest;
use vm_tests::harness::Spinney;
use vm_tests::underway::reached;

fn guest(spinney: &Spinney) -> Guest {
    let port = spinney.port("m").unwrap().expect("a process");
    Guest::connect(&port, Duration::from_secs(60)).unwrap()
}

/// How many takes have gone by migration, as the daemon's log has it.
fn by_migration(spinney: &Spinney) -> usize {
    let log = fs::read_to_string(spinney.state().join("daemon.log")).unwrap();
    log.matches("by migration").count()
}

/// Somebody on the host opens a port of the guest's and says something: QEMU puts it into the guest's memory at once.
#[test]
fn what_comes_from_the_host_meanwhile_spoils_no_snapshot() {
    let mut spinney = Spinney::new();
    spinney.create_guest("m", 96).unwrap();
    spinney.ok("start m").unwrap();
    guest(&spinney).cmd("echo first > /word").unwrap();
    let port = spinney.port("m").unwrap().expect("a process");
    let marker = spinney.folder().join("marker");
    spinney.set("SPINNEY_CRASH", &format!("take.memory wait {}", marker.display()));
    spinney.kill_daemon();
    spinney.ok("ls").unwrap();

    let mut take = spinney.under_way("take m x --mode stop-copy");
    reached(&marker, "take.memory");
    let mut host = UnixStream::connect(&port).unwrap();
    host.write_all(b"something\n").unwrap();
    thread::sleep(Duration::from_millis(300));
    fs::remove_file(&marker).unwrap();
    while take.reaches("") {}
    let ended = take.end();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    drop(host);
    guest(&spinney).cmd("echo second > /word").unwrap();
    spinney.ok("goto m@x").unwrap();
    assert_eq!(guest(&spinney).cmd("cat /word").unwrap().1.trim(), "first");

    // With nobody at the port nothing is in its way: not even that the clock goes on, which a second shows.
    let before = by_migration(&spinney);
    let marker = spinney.folder().join("second");
    spinney.set("SPINNEY_CRASH", &format!("take.memory wait {}", marker.display()));
    spinney.kill_daemon();
    spinney.ok("ls").unwrap();
    let take = spinney.under_way("take m y --mode stop-copy");
    reached(&marker, "take.memory");
    thread::sleep(Duration::from_millis(1100));
    fs::remove_file(&marker).unwrap();
    let ended = take.end();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(by_migration(&spinney), before, "the clock is in nobody's way");
}
