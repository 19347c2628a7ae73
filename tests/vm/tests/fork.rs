//! Forks: running copies, one or many, all or none; and what their guests say of themselves.

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use vm_tests::guest::{Guest, Mix};
use vm_tests::harness::{Spinney, kill};
use vm_tests::underway::reached;

fn guest(spinney: &Spinney, name: &str) -> Guest {
    let port = spinney.port(name).unwrap().expect("a process");
    Guest::connect(&port, Duration::from_secs(60)).unwrap()
}

fn names(spinney: &Spinney) -> Vec<String> {
    let list = spinney.ok("ls").unwrap();
    list["machines"].as_array().unwrap().iter().map(|m| m["name"].as_str().unwrap().to_owned()).collect()
}

/// What became of a part of a fork's identity.
fn state(fork: &Value, what: &str) -> String {
    let items = fork["identity"].as_array().unwrap();
    let item = items.iter().find(|item| item["what"] == what);
    item.map_or_else(String::new, |item| item["state"].as_str().unwrap().to_owned())
}

/// The source goes on counting; how far it is.
fn counts(guest: &mut Guest) -> u64 {
    let before = guest.counter().unwrap();
    thread::sleep(Duration::from_millis(60));
    let now = guest.counter().unwrap();
    assert!(now > before);
    now
}

#[test]
fn forks_of_a_running_machine_go_their_own_ways() {
    let spinney = Spinney::new();
    spinney.create_guest("web", 128).unwrap();
    spinney.ok("start web").unwrap();
    let mut source = guest(&spinney, "web");
    source.fill(24, Mix { seed: 9, ..Mix::default() }).unwrap();
    let (hash, nonce) = (source.hash().unwrap(), source.nonce().unwrap());
    source.cmd("echo before > /data/word; sync; echo before > /word").unwrap();
    let forked = spinney.ok("fork web -n 3").unwrap();
    assert!(forked["source_pause_us"].as_u64().unwrap() < 2_000_000);
    counts(&mut source);
    source.cmd("echo source > /data/word; sync; echo source > /word").unwrap();
    assert_eq!(names(&spinney), ["web", "web-1", "web-2", "web-3"]);
    let mut random = HashSet::new();
    for name in ["web-1", "web-2", "web-3"] {
        let mut fork = guest(&spinney, name);
        counts(&mut fork);
        assert_eq!((fork.hash().unwrap(), fork.nonce().unwrap()), (hash, nonce.clone()), "{name}");
        assert_eq!(fork.cmd("cat /data/word /word").unwrap().1, "before\nbefore\n", "{name}");
        assert!(random.insert(fork.random(64).unwrap()), "{name} draws what another drew");
        fork.cmd(&format!("echo {name} > /data/word; sync; echo {name} > /word")).unwrap();
    }
    assert!(random.insert(source.random(64).unwrap()));
    for name in ["web-1", "web-2", "web-3"] {
        let said = guest(&spinney, name).cmd("cat /data/word /word").unwrap().1;
        assert_eq!(said, format!("{name}\n{name}\n"), "nobody's disk is another's");
    }
    assert_eq!(source.cmd("cat /data/word /word").unwrap().1, "source\nsource\n");
    drop(source);
    // Each of them is a machine like any other: it can be taken, gone back with, and outlives what it came from.
    spinney.ok("take web-1 later").unwrap();
    spinney.ok("back web-2").unwrap();
    spinney.ok("goto web-2@start").unwrap();
    assert_eq!(guest(&spinney, "web-2").cmd("cat /data/word").unwrap().1, "before\n");
    spinney.ok("kill web").unwrap();
    spinney.ok("rm web --yes").unwrap();
    spinney.ok("gc --now").unwrap();
    assert_eq!(guest(&spinney, "web-3").hash().unwrap(), hash);
    spinney.ok("goto web-1@later").unwrap();
    assert_eq!(guest(&spinney, "web-1").hash().unwrap(), hash);
    // After a power cycle they boot from their own disks.
    spinney.ok("kill web-3").unwrap();
    spinney.ok("start web-3").unwrap();
    assert_eq!(guest(&spinney, "web-3").cmd("cat /data/word").unwrap().1, "web-3\n");
    assert_eq!(spinney.ok("fsck").unwrap()["damage"], json!([]));
}

/// Seen from inside: random numbers, MAC address, UUID, clock and host name, for each way.
#[test]
fn what_is_reported_of_an_identity_is_what_the_guest_sees() {
    let spinney = Spinney::new();
    spinney.create_guest_with_agent("web", 192).unwrap();
    spinney.ok("start web").unwrap();
    let mut source = guest(&spinney, "web");
    let (macs, uuid) = (source.macs().unwrap(), source.uuid().unwrap());
    source.cmd("hostname source").unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while source.cmd("pidof qemu-ga").unwrap().0 != 0 {
        assert!(Instant::now() < deadline, "the agent runs");
        thread::sleep(Duration::from_millis(200));
    }
    thread::sleep(Duration::from_millis(500));
    spinney.ok("take web x").unwrap();
    thread::sleep(Duration::from_secs(2));
    let mut random = HashSet::from([source.random(32).unwrap()]);
    for (way, mac, clock, host) in [
        ("isolate", "kept", "renewed", ""),
        ("renew", "renewed", "renewed", "renewed"),
        ("keep", "kept", "", ""),
    ] {
        let name = format!("by-{way}");
        let forked = spinney.ok(&format!("fork web@x {name} --identity {way}")).unwrap();
        let fork = &forked["forks"][0];
        let mut inside = guest(&spinney, &name);
        assert_eq!(state(fork, "VM generation id"), "renewed");
        assert_eq!(state(fork, "random numbers"), "renewed", "{fork}");
        assert!(random.insert(inside.random(32).unwrap()), "{way}");
        assert_eq!(state(fork, "MAC address"), mac, "{way}: {fork}");
        assert_eq!(inside.macs().unwrap() != macs, mac == "renewed", "{way}");
        let shown = spinney.ok(&format!("show {name}")).unwrap();
        assert_eq!(inside.macs().unwrap().values().next().unwrap(), shown["macs"][0].as_str().unwrap());
        assert_eq!(inside.uuid().unwrap(), uuid, "{way}: until the next power cycle");
        assert_eq!(state(fork, "clock"), clock, "{way}: {fork}");
        if clock == "renewed" {
            let off = match SystemTime::now().duration_since(inside.time().unwrap()) {
                Ok(late) => late,
                Err(early) => early.duration(),
            };
            assert!(off < Duration::from_millis(1500), "{way}: {off:?}");
        }
        assert_eq!(state(fork, "host name"), host, "{way}");
        let named = if host == "renewed" { name.as_str() } else { "source" };
        assert_eq!(inside.hostname().unwrap(), named);
        // The UUID becomes new with a power cycle, and is what is shown.
        spinney.ok(&format!("kill {name}")).unwrap();
        spinney.ok(&format!("start {name}")).unwrap();
        let mut inside = guest(&spinney, &name);
        assert_eq!(inside.uuid().unwrap() == uuid, way == "keep", "{way}");
        assert_eq!(inside.uuid().unwrap(), shown["uuid"].as_str().unwrap());
        assert_eq!(inside.macs().unwrap().values().next().unwrap(), shown["macs"][0].as_str().unwrap());
        spinney.ok(&format!("kill {name}")).unwrap();
    }
    // Gone back to, it draws others, too.
    for _ in 0..2 {
        spinney.ok("goto web@x --discard --yes").unwrap();
        assert!(random.insert(guest(&spinney, "web").random(32).unwrap()));
    }
}

#[test]
fn a_guest_without_an_agent_is_said_to_be_one() {
    let spinney = Spinney::new();
    spinney.create_networked_guest("web", 96).unwrap();
    spinney.ok("start web").unwrap();
    guest(&spinney, "web").counter().unwrap();
    let ended = spinney.run(["fork", "web", "--identity", "renew"]);
    let forked = ended.done().unwrap();
    let fork = &forked["forks"][0];
    assert_eq!(state(fork, "random numbers"), "pending");
    assert_eq!((state(fork, "clock"), state(fork, "host name")), ("impossible".into(), "impossible".into()));
    assert_eq!(state(fork, "MAC address"), "renewed", "that takes no agent");
    let (_, said) = spinney.plain(&["fork", "web"]);
    assert!(said.contains("random numbers may repeat"), "{said}");
}

/// A card that the guest lets go of late is replaced all the same, and one that it let go of while nobody was there to see.
#[test]
fn no_guest_is_left_without_its_card() {
    let mut spinney = Spinney::new();
    spinney.set("SPINNEY_FAULT", "hasty-card");
    spinney.create_networked_guest("web", 96).unwrap();
    spinney.ok("start web").unwrap();
    let macs = guest(&spinney, "web").macs().unwrap();
    let forked = spinney.ok("fork web other --identity renew").unwrap();
    assert_eq!(state(&forked["forks"][0], "MAC address"), "pending");
    let has_its_card = || {
        let mac = spinney.ok("show other").unwrap()["macs"][0].as_str().unwrap().to_owned();
        assert!(macs.values().all(|old| *old != mac));
        let deadline = Instant::now() + Duration::from_secs(20);
        while !guest(&spinney, "other").macs().unwrap().values().any(|now| *now == mac) {
            assert!(Instant::now() < deadline, "no card");
            thread::sleep(Duration::from_millis(50));
        }
    };
    has_its_card();
    let pid = guest_pid(&spinney, "other");
    let run = spinney
        .runs()
        .into_iter()
        .find(|run| fs::read_to_string(run.join("pid")).is_ok_and(|text| text.trim() == pid.to_string()));
    spinney.kill_daemon();
    take_card_out(&run.expect("a run folder").join("oob"));
    spinney.ok("ls").unwrap();
    has_its_card();
}

/// Has QEMU take the first card out, and waits until the guest has let go of it.
fn take_card_out(monitor: &Path) {
    let deadline = Instant::now() + Duration::from_secs(20);
    // The warden may have it for a moment.
    let mut socket = loop {
        match UnixStream::connect(monitor) {
            Ok(socket) => break socket,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        thread::sleep(Duration::from_millis(20));
    };
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    socket.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").unwrap();
    socket.write_all(b"{\"execute\":\"device_del\",\"arguments\":{\"id\":\"net0\"}}\n").unwrap();
    let said = BufReader::new(socket).lines().map(|line| line.unwrap());
    let mut said = said.skip_while(|line| !(line.contains("DEVICE_DELETED") && line.contains("net0")));
    assert!(said.next().is_some());
}

#[test]
fn what_cannot_be_is_refused_before_anything_is() {
    let spinney = Spinney::new();
    spinney.create_guest("web", 96).unwrap();
    spinney.create_guest("web-2", 96).unwrap();
    spinney.ok("start web").unwrap();
    guest(&spinney, "web").counter().unwrap();
    spinney.ok("take web x").unwrap();
    let before = (names(&spinney), spinney.layers(), spinney.machines());
    let refused = |words: &str, code: i32, says: &[&str]| {
        let ended = spinney.run(words.split(' '));
        let problem = ended.problem().to_string();
        assert_eq!(ended.code, Some(code), "{words}: {problem}");
        says.iter().for_each(|word| assert!(problem.contains(word), "{words}: {problem}"));
        assert_eq!((names(&spinney), spinney.layers(), spinney.machines()), before, "{words}");
    };
    refused("fork web@x web -n 4", 4, &["web-2"]);
    refused("fork web@x web-2", 4, &["web-2"]);
    refused("fork web@nothing", 3, &["nothing"]);
    refused("fork nobody", 3, &["nobody"]);
    refused("fork web -n 0", 2, &["between 1 and"]);
    refused("fork web@x a/b", 2, &["a/b"]);
    // More than this host has memory for, with the arithmetic.
    refused("fork web@x many -n 1000", 5, &["1000 forks", "room for", "QEMU"]);
    // A hundred with room for about twenty: one that is off shares nothing. Beside its memory each takes 64 MiB.
    let room = available_mib() / 20 - 64;
    spinney.ok(&format!("create big --memory {room}M --network none --no-memory --disk 1M")).unwrap();
    let ended = spinney.run(["fork", "big", "-n", "100"]);
    assert_eq!(ended.code, Some(5), "{}", ended.stderr);
    let error = ended.problem()["detail"].to_string();
    let said =
        error.split_once("room for ").and_then(|(_, rest)| rest.split('"').next()?.parse::<u32>().ok());
    assert!(error.contains("100 forks") && said.is_some_and(|room| (17..=23).contains(&room)), "{error}");
    assert!(!names(&spinney).contains(&"big-1".to_owned()));
    // A machine whose memory is not to be had.
    spinney.ok("create bare --memory 64M --network none --no-memory --disk 1M").unwrap();
    spinney.ok("start bare").unwrap();
    let ended = spinney.run(["fork", "bare"]);
    assert_eq!(ended.code, Some(5), "{}", ended.stderr);
    assert!(ended.problem().to_string().contains("--no-memory"), "{}", ended.stderr);
    assert!(!names(&spinney).contains(&"bare-1".to_owned()));
}

/// What the host has left for processes that are new.
fn available_mib() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() >> 10
}

/// Called off, or cut short, in the middle: nothing is left of any.
#[test]
fn all_of_them_come_to_be_or_none() {
    let mut spinney = Spinney::new();
    spinney.create_guest("web", 96).unwrap();
    spinney.ok("start web").unwrap();
    guest(&spinney, "web").counter().unwrap();
    spinney.ok("take web x").unwrap();
    let before = (names(&spinney), spinney.layers(), spinney.machines());
    let marker = spinney.folder().join("marker");
    spinney.set("SPINNEY_CRASH", &format!("fork.started wait {}", marker.display()));
    spinney.kill_daemon();
    spinney.ok("ls").unwrap();
    let mut fork = spinney.under_way("fork web@x -n 5");
    reached(&marker, "fork.started");
    fork.interrupt();
    thread::sleep(Duration::from_millis(300));
    fs::remove_file(&marker).unwrap();
    while fork.reaches("") {}
    let ended = fork.end();
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    assert_eq!((names(&spinney), spinney.layers(), spinney.machines()), before);
    for step in ["fork.origin", "fork.overlays", "fork.started", "fork.written", "fork.runs"] {
        let marker = spinney.folder().join(step);
        spinney.set("SPINNEY_CRASH", &format!("{step} kill {}", marker.display()));
        spinney.kill_daemon();
        spinney.ok("ls").unwrap();
        let ended = spinney.run(["fork", "web@x", "-n", "3"]);
        assert_ne!(ended.code, Some(0), "{step}");
        spinney.set("SPINNEY_CRASH", "");
        let there = names(&spinney);
        if there == before.0 {
            assert_eq!(
                (spinney.layers(), spinney.machines()),
                (before.1.clone(), before.2.clone()),
                "{step}"
            );
            continue;
        }
        // Once they are written down, they run, all of them.
        assert!(matches!(step, "fork.written" | "fork.runs"), "{step}: {there:?}");
        for name in ["web-1", "web-2", "web-3"] {
            counts(&mut guest(&spinney, name));
            spinney.ok(&format!("kill {name}")).unwrap();
            spinney.ok(&format!("rm {name} --yes")).unwrap();
        }
        spinney.ok("gc --now").unwrap();
    }
    counts(&mut guest(&spinney, "web"));
}

#[test]
fn a_fork_is_undone_once_it_is_off() {
    let spinney = Spinney::new();
    spinney.create_guest("web", 96).unwrap();
    spinney.ok("start web").unwrap();
    guest(&spinney, "web").counter().unwrap();
    spinney.ok("fork web -n 2").unwrap();
    let ended = spinney.run(["undo", "web-1"]);
    assert_eq!(ended.code, Some(4), "{}", ended.stderr);
    spinney.ok("kill web-1").unwrap();
    spinney.ok("kill web-2").unwrap();
    spinney.ok("undo web-1").unwrap();
    assert_eq!(names(&spinney), ["web"]);
    spinney.ok("gc --now").unwrap();
    counts(&mut guest(&spinney, "web"));
}

#[test]
fn a_peek_is_gone_when_it_stops_however_it_does() {
    let spinney = Spinney::new();
    spinney.create_guest("web", 96).unwrap();
    spinney.ok("start web").unwrap();
    guest(&spinney, "web").cmd("echo then > /word").unwrap();
    spinney.ok("take web x").unwrap();
    guest(&spinney, "web").cmd("echo now > /word").unwrap();
    let gone = |name: &str| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while names(&spinney).contains(&name.to_owned()) {
            assert!(Instant::now() < deadline, "{name} is gone");
            thread::sleep(Duration::from_millis(50));
        }
    };
    for way in ["kill", "off", "crash"] {
        let peeked = spinney.ok("peek web@x").unwrap();
        let fork = &peeked["forks"][0]["machine"];
        let name = fork["name"].as_str().unwrap().to_owned();
        assert!(fork["throw_away"] == true && name.starts_with("web-peek-"), "{fork}");
        let mut inside = guest(&spinney, &name);
        assert_eq!(inside.cmd("cat /word").unwrap().1, "then\n");
        match way {
            "kill" => drop(spinney.ok(&format!("kill {name}")).unwrap()),
            "off" => drop(inside.power_off()),
            _ => kill(u32::try_from(fork["pid"].as_u64().unwrap()).unwrap()),
        }
        gone(&name);
    }
    assert_eq!(guest(&spinney, "web").cmd("cat /word").unwrap().1, "now\n");
    // What was done with them is nothing that could be undone.
    spinney.ok("edit web@x -m text").unwrap();
    let peeked = spinney.ok("peek web@x").unwrap();
    let name = peeked["forks"][0]["machine"]["name"].as_str().unwrap().to_owned();
    let taken = spinney.run(["take", &name]);
    assert!(taken.code == Some(0) && taken.stderr.contains("when that stops"), "{}", taken.stderr);
    spinney.ok(&format!("kill {name}")).unwrap();
    gone(&name);
    spinney.ok("undo").unwrap();
    assert_eq!(spinney.ok("show web@x").unwrap()["note"], "");
    // Nothing keeps it.
    spinney.ok("gc").unwrap();
    assert_eq!(spinney.layers().len(), 2, "web's own");
    // Nor the daemon's absence.
    spinney.ok("peek web@x").unwrap();
    spinney.kill_daemon();
    let web = guest_pid(&spinney, "web");
    for pid in spinney.machines().into_iter().filter(|pid| *pid != web) {
        kill(pid);
    }
    gone("web-peek-1");
}

fn guest_pid(spinney: &Spinney, name: &str) -> u32 {
    spinney.ok(&format!("show {name}")).unwrap()["pid"].as_u64().unwrap() as u32
}

#[test]
fn a_protected_machine_is_a_template() {
    let spinney = Spinney::new();
    spinney.create_guest("golden", 96).unwrap();
    spinney.ok("start golden").unwrap();
    guest(&spinney, "golden").cmd("echo golden > /data/word; echo golden > /word; sync").unwrap();
    spinney.ok("suspend golden").unwrap();
    spinney.ok("protect golden").unwrap();
    for number in 1..=2 {
        let started = spinney.ok("start golden").unwrap();
        let name = started["name"].as_str().unwrap();
        assert!(started["throw_away"] == true && name.starts_with("golden-"), "{started}");
        let mut inside = guest(&spinney, name);
        assert_eq!(inside.cmd("cat /word /data/word").unwrap().1, "golden\ngolden\n", "start {number}");
        inside.cmd("echo spoilt > /data/word; sync").unwrap();
        drop(inside);
        spinney.ok(&format!("kill {name}")).unwrap();
        assert_eq!(names(&spinney), ["golden"]);
    }
    // What somebody has said that it is to stay stays, with its machine.
    let work = spinney.ok("start golden").unwrap()["name"].as_str().unwrap().to_owned();
    spinney.ok(&format!("take {work} done --keep")).unwrap();
    let killed = spinney.run(["kill", &work]);
    assert!(killed.stderr.contains("is kept"), "{}", killed.stderr);
    assert_eq!(names(&spinney), ["golden", &work]);
    let machine = spinney.ok(&format!("show {work}")).unwrap();
    assert_eq!((&machine["throw_away"], &machine["power"]), (&json!(false), &json!("off")), "{machine}");
    spinney.ok(&format!("goto {work}@done --discard --yes")).unwrap();
    spinney.ok(&format!("kill {work}")).unwrap();
    spinney.ok(&format!("rm {work} --yes")).unwrap();
    assert_eq!(spinney.ok("show golden").unwrap()["power"], "suspended");
    spinney.ok("unprotect golden").unwrap();
    assert_eq!(spinney.ok("start golden").unwrap()["name"], "golden");
    assert_eq!(guest(&spinney, "golden").cmd("cat /word /data/word").unwrap().1, "golden\ngolden\n");
}

/// Ten forks come up while those who serve their memory die.
#[test]
fn ten_forks_come_up_while_their_view_dies() {
    let spinney = Spinney::new();
    spinney.create_guest("web", 144).unwrap();
    spinney.ok("start web").unwrap();
    let mut source = guest(&spinney, "web");
    source.fill(16, Mix { seed: 4, ..Mix::default() }).unwrap();
    let hash = source.hash().unwrap();
    drop(source);
    spinney.ok("take web x").unwrap();
    // The view is there.
    spinney.ok("fork web@x first").unwrap();
    let fork = spinney.begin(&["fork", "web@x", "-n", "10"]);
    let mut fork = fork;
    let mut deaths = 0;
    while fork.try_wait().unwrap().is_none() {
        if !spinney.views().1.is_empty() {
            deaths += u32::from(spinney.kill_views());
        }
        thread::sleep(Duration::from_millis(150));
    }
    assert!(fork.wait().unwrap().success() && deaths > 2, "{deaths} deaths");
    for number in 1..=10 {
        let mut inside = guest(&spinney, &format!("web-{number}"));
        counts(&mut inside);
        if number % 3 == 0 {
            assert_eq!(inside.hash().unwrap(), hash);
        }
    }
}

/// The daemon dies when a throw-away machine has just been thrown away, or is about to be.
#[test]
fn a_peek_is_gone_also_when_the_daemon_dies_over_it() {
    let mut spinney = Spinney::new();
    spinney.create_guest("web", 96).unwrap();
    spinney.ok("start web").unwrap();
    guest(&spinney, "web").counter().unwrap();
    spinney.ok("take web x").unwrap();
    for step in ["kill.ended", "throw-away.written"] {
        spinney.ok("peek web@x").unwrap();
        let marker = spinney.folder().join(step);
        spinney.set("SPINNEY_CRASH", &format!("{step} kill {}", marker.display()));
        spinney.kill_daemon();
        spinney.ok("ls").unwrap();
        let _ = spinney.run(["kill", "web-peek-1"]);
        spinney.set("SPINNEY_CRASH", "");
        let deadline = Instant::now() + Duration::from_secs(20);
        while names(&spinney) != ["web"] {
            assert!(Instant::now() < deadline, "{step}: {:?}", names(&spinney));
            thread::sleep(Duration::from_millis(50));
        }
    }
    assert_eq!(spinney.machines().len(), 1);
    counts(&mut guest(&spinney, "web"));
}
