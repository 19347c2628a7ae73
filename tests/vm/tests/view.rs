//! Machines whose memory is mapped from the snapshot file system: complete before they are loaded, and alive whoever dies.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vm_tests::guest::{Guest, Mix};
use vm_tests::harness::{Spinney, kill, tool};

const PAGE: usize = 4096;

fn guest(spinney: &Spinney, name: &str) -> Guest {
    let port = spinney.port(name).unwrap().expect("a process");
    Guest::connect(&port, Duration::from_secs(60)).unwrap()
}

/// A guest with 120 MiB of pages of its own, taken as `full`; with their hash.
fn filled(spinney: &Spinney) -> u64 {
    spinney.create_guest("m", 224).unwrap();
    spinney.ok("start m").unwrap();
    let mut guest = guest(spinney, "m");
    guest.fill(120, Mix { unique: 60, dup: 10, disk: 20, zero: 10, seed: 5 }).unwrap();
    let hash = guest.hash().unwrap();
    drop(guest);
    spinney.ok("take m full").unwrap();
    hash
}

/// Bytes of a machine's memory that QEMU has touched so far.
fn touched(spinney: &Spinney, name: &str) -> u64 {
    let pid = spinney.ok(&format!("show {name}")).unwrap()["pid"].as_u64().expect("a process");
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let own = maps.split_once("/.ram/").expect("mapped").1;
    let rss = own.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
    rss.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

fn goes_on(guest: &mut Guest, limit: Duration) -> bool {
    guest.set_timeout(limit);
    let before = guest.counter();
    thread::sleep(Duration::from_millis(50));
    before.is_ok_and(|before| guest.counter().is_ok_and(|now| now > before))
}

#[test]
fn a_machine_that_is_half_loaded_is_taken_whole() {
    let spinney = Spinney::new();
    let hash = filled(&spinney);
    let mut chain = vec!["full".to_owned()];
    for mode in ["", "--mode pre-copy", "--mode stop-copy"] {
        spinney.ok(&format!("goto m@{} --discard --yes", chain.last().unwrap())).unwrap();
        assert!(spinney.is_mapped("m").unwrap());
        assert!(touched(&spinney, "m") < 100 << 20, "most of it was never touched");
        guest(&spinney, "m").cmd(&format!("echo '{mode}' > /word")).unwrap();
        let name = format!("half-{}", chain.len());
        spinney.ok(format!("take m {name} {mode}").trim()).unwrap();
        chain.push(name);
    }
    // Each of them was taken of one that had hardly touched anything.
    spinney.ok("goto m@half-3 --discard --yes").unwrap();
    let mut last = guest(&spinney, "m");
    assert_eq!(last.cmd("cat /word").unwrap().1.trim(), "--mode stop-copy");
    assert_eq!(last.hash().unwrap(), hash);
    drop(last);
    // Suspended half loaded, and gone back to with what is kept of here.
    spinney.ok("goto m@half-1 --discard --yes").unwrap();
    spinney.ok("suspend m").unwrap();
    spinney.ok("start m").unwrap();
    assert!(spinney.is_mapped("m").unwrap());
    spinney.ok("goto m@full").unwrap();
    spinney.ok("undo m").unwrap();
    assert_eq!(guest(&spinney, "m").hash().unwrap(), hash);
    assert_eq!(spinney.ok("fsck").unwrap()["damage"], serde_json::json!([]));
}

#[test]
fn the_check_notices_a_take_that_forgets_what_was_not_touched() {
    let mut spinney = Spinney::new();
    let hash = filled(&spinney);
    spinney.set("SPINNEY_FAULT", "forget-image");
    spinney.ok("goto m@full --discard --yes").unwrap();
    spinney.kill_daemon();
    spinney.ok("take m half --mode stop-copy").unwrap();
    // What such a guest comes back with is not what it was; it may not even come back.
    let folder = spinney.folder().join("snapshots");
    spinney.ok(&format!("mount {}", folder.display())).unwrap();
    let written = |name: &str| {
        let ram = fs::read(folder.join("m").join(name).join("ram")).unwrap();
        ram.chunks(PAGE).filter(|page| page.iter().any(|byte| *byte != 0)).count()
    };
    let (full, half) = (written("full"), written("half"));
    assert!(half < full / 2, "{half} pages of {full}");
    let port = (spinney.run(["goto", "m@half", "--discard", "--yes"]).code == Some(0))
        .then(|| spinney.port("m").unwrap().expect("a process"));
    let found = port.and_then(|port| {
        let mut guest = Guest::connect(&port, Duration::from_secs(3)).ok()?;
        guest.set_timeout(Duration::from_secs(5));
        guest.hash().ok()
    });
    assert_ne!(found, Some(hash));
}

#[test]
fn a_guest_survives_the_death_of_whoever_serves_its_memory_and_of_all_others() {
    let spinney = Spinney::new();
    let hash = filled(&spinney);
    let mut deaths = 0;
    for round in 0..4 {
        spinney.ok("goto m@full --discard --yes").unwrap();
        let deadline = Instant::now() + Duration::from_secs(100);
        let mut guest = guest(&spinney, "m");
        let hashing = thread::spawn(move || (guest.hash(), guest));
        let mut killed = 0;
        while !hashing.is_finished() {
            assert!(Instant::now() < deadline, "round {round}: the guest stands still");
            // Nobody can do anything about the death of both.
            if !spinney.views().1.is_empty() {
                killed += u32::from(spinney.kill_views());
            }
            if round > 0 {
                spinney.kill_daemon();
                spinney.warden().into_iter().for_each(kill);
            }
            thread::sleep(Duration::from_millis(120));
        }
        let (found, mut guest) = hashing.join().unwrap();
        assert_eq!(found.unwrap(), hash, "round {round}, after {killed} deaths");
        deaths += killed;
        assert!(goes_on(&mut guest, Duration::from_secs(10)));
        drop(guest);
        // What is taken of it now is whole, too.
        spinney.ok(&format!("take m after-{round}")).unwrap();
    }
    assert!(deaths > 3, "{deaths} deaths");
    spinney.ok("goto m@after-3").unwrap();
    assert_eq!(guest(&spinney, "m").hash().unwrap(), hash);
}

#[test]
fn a_snapshot_that_is_removed_stays_for_whoever_runs_from_it() {
    let spinney = Spinney::new();
    let hash = filled(&spinney);
    spinney.ok("goto m@full --discard --yes").unwrap();
    assert!(touched(&spinney, "m") < 100 << 20);
    spinney.ok("rm m@full").unwrap();
    spinney.ok("gc --now").unwrap();
    assert_eq!(spinney.ok("tree m").unwrap()["snapshots"], serde_json::json!([]));
    spinney.kill_views();
    assert_eq!(guest(&spinney, "m").hash().unwrap(), hash);
    // Compressed and moved meanwhile, and found all the same.
    spinney.ok("gc --now").unwrap();
    spinney.ok("take m again").unwrap();
    spinney.ok("goto m@again --discard --yes").unwrap();
    assert_eq!(guest(&spinney, "m").hash().unwrap(), hash);
    spinney.ok("kill m").unwrap();
    spinney.ok("rm m@again").unwrap();
    let freed = spinney.ok("gc --now").unwrap()["bytes"].as_u64().unwrap();
    assert!(freed > 20 << 20, "{freed} bytes: nobody runs from it any more");
}

#[test]
fn the_check_notices_a_collector_that_forgets_who_runs_from_a_snapshot() {
    let mut spinney = Spinney::new();
    let hash = filled(&spinney);
    spinney.set("SPINNEY_FAULT", "forget-mapped");
    spinney.kill_daemon();
    spinney.ok("goto m@full --discard --yes").unwrap();
    spinney.ok("rm m@full").unwrap();
    spinney.ok("gc --now").unwrap();
    // Whoever serves has the packs open that are gone.
    spinney.kill_views();
    // It may not even answer.
    let port = spinney.port("m").unwrap().expect("a process");
    let found = Guest::connect(&port, Duration::from_secs(20)).and_then(|mut guest| guest.hash());
    assert!(!found.is_ok_and(|found| found == hash));
    assert!(spinney.ok("show m").unwrap()["held_because"].is_string());
}

/// Words that fill some pages of the guest's memory, and are nowhere else.
const WORDS: &str = "a page that will be spoilt";

/// A machine that was taken with such pages, which were spoilt then, and brought back; and what to write where to mend them.
fn spoilt(spinney: &Spinney) -> Vec<(std::path::PathBuf, u64, Vec<u8>)> {
    spinney.create_guest("m", 128).unwrap();
    spinney.ok("start m").unwrap();
    let fill = format!("yes {WORDS} | head -c 100000 > /tmp/words");
    guest(spinney, "m").cmd(&fill).unwrap();
    spinney.ok("take m x").unwrap();
    let mut good = Vec::new();
    for pack in spinney.packs() {
        let bytes = fs::read(&pack).unwrap();
        let file = fs::File::options().write(true).open(&pack).unwrap();
        for (number, page) in bytes.chunks(PAGE).enumerate() {
            if page
                .windows(WORDS.len() * 3)
                .any(|part| String::from_utf8_lossy(part).matches(WORDS).count() > 1)
            {
                let at = (number * PAGE) as u64;
                file.write_all_at(&[0xdb; 16], at).unwrap();
                good.push((pack.clone(), at, page[..16].to_vec()));
            }
        }
    }
    assert!(good.len() > 10, "{} pages", good.len());
    // Nobody notices before it is touched.
    spinney.ok("goto m@x --discard --yes").unwrap();
    good
}

fn held(spinney: &Spinney) -> Option<String> {
    spinney.ok("show m").unwrap()["held_because"].as_str().map(str::to_owned)
}

fn wait_until_held(spinney: &Spinney) -> String {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match held(spinney) {
            Some(why) => return why,
            None => assert!(Instant::now() < deadline, "it is held"),
        }
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_damaged_page_is_held_and_shown_until_it_is_mended() {
    let spinney = Spinney::new();
    let good = spoilt(&spinney);
    let pid = spinney.ok("show m").unwrap()["pid"].clone();
    let mut waiting = guest(&spinney, "m");
    let reading = thread::spawn(move || waiting.cmd("md5sum < /tmp/words; head -n 1 /tmp/words"));
    let why = wait_until_held(&spinney);
    assert!(why.contains("damaged"), "{why}");
    let (shown, _) = spinney.plain(&["show", "m"]);
    assert!(shown.contains("held") && shown.contains("fsck --repair"), "{shown}");
    let (list, _) = spinney.plain(&["ls"]);
    assert!(list.contains("page damaged"), "{list}");
    // Still there, whoever serves; nobody has killed it, and nobody lies to it.
    spinney.kill_views();
    thread::sleep(Duration::from_millis(800));
    assert!(!reading.is_finished());
    assert_eq!(spinney.ok("show m").unwrap()["pid"], pid);
    // The pages come from elsewhere: here from the disk, put right by hand.
    for (pack, at, was) in good {
        fs::File::options().write(true).open(pack).unwrap().write_all_at(&was, at).unwrap();
    }
    let said = reading.join().unwrap().unwrap().1;
    assert!(said.ends_with(&format!("{WORDS}\n")), "{said}");
    assert_eq!(held(&spinney), None);
}

/// The same pages come again in a take of another machine of the group, and a repair puts them where they are missed.
#[test]
fn a_held_page_is_answered_by_a_repair() {
    let spinney = Spinney::new();
    spoilt(&spinney);
    let mut waiting = guest(&spinney, "m");
    let reading = thread::spawn(move || waiting.cmd("head -n 1 /tmp/words"));
    wait_until_held(&spinney);
    spinney.create_guest("other", 128).unwrap();
    spinney.ok("start other").unwrap();
    assert_eq!(spinney.run(["fsck", "--repair"]).code, Some(6), "there is nothing to mend it with");
    let fill = format!("yes {WORDS} | head -c 100000 > /tmp/words");
    guest(&spinney, "other").cmd(&fill).unwrap();
    spinney.ok("take other y").unwrap();
    spinney.ok("fsck --repair").unwrap();
    assert_eq!(reading.join().unwrap().unwrap().1, format!("{WORDS}\n"));
}

/// What a repair has said is lost is not found out by the guest.
#[test]
fn a_snapshot_that_could_not_be_mended_is_not_gone_to_until_it_is_healed() {
    let spinney = Spinney::new();
    spoilt(&spinney);
    assert_eq!(spinney.run(["fsck", "--repair"]).code, Some(6));
    assert_eq!(spinney.ok("show m@x").unwrap()["state"], "damaged");
    let pid = spinney.ok("show m").unwrap()["pid"].clone();
    let ended = spinney.run(["goto", "m@x", "--discard", "--yes"]);
    let problem = ended.problem();
    assert_eq!(ended.code, Some(6), "{problem}");
    assert!(problem["hint"].as_str().is_some_and(|hint| hint.contains("goto m@x --off")), "{problem}");
    assert_eq!(spinney.ok("show m").unwrap()["pid"], pid, "the machine is as it was");
    assert!(goes_on(&mut guest(&spinney, "m"), Duration::from_secs(20)));
    // What it lacks comes with a take of another machine.
    spinney.create_guest("other", 128).unwrap();
    spinney.ok("start other").unwrap();
    let fill = format!("yes {WORDS} | head -c 100000 > /tmp/words");
    guest(&spinney, "other").cmd(&fill).unwrap();
    spinney.ok("take other y").unwrap();
    spinney.ok("goto m@x --discard --yes").unwrap();
    assert!(spinney.is_mapped("m").unwrap());
    assert_eq!(guest(&spinney, "m").cmd("head -n 1 /tmp/words").unwrap().1, format!("{WORDS}\n"));
}

#[test]
fn a_machine_that_is_held_can_be_ended() {
    let spinney = Spinney::new();
    spoilt(&spinney);
    let mut waiting = guest(&spinney, "m");
    waiting.set_timeout(Duration::from_secs(3));
    assert!(waiting.cmd("head -n 1 /tmp/words").is_err());
    wait_until_held(&spinney);
    let began = Instant::now();
    spinney.ok("kill m").unwrap();
    assert!(began.elapsed() < Duration::from_secs(20) && spinney.machines().is_empty());
    assert_eq!(spinney.ok("show m").unwrap()["power"], "off");
    // The others of its group do not wait with it.
    spinney.create_guest("other", 96).unwrap();
    spinney.ok("start other").unwrap();
    guest(&spinney, "other").counter().unwrap();
    spinney.ok("take other y").unwrap();
    spinney.ok("goto other@y --discard --yes").unwrap();
    assert!(goes_on(&mut guest(&spinney, "other"), Duration::from_secs(20)));
}

/// Where there can be no view, memory is loaded, and all else is the same.
#[test]
fn without_a_view_memory_is_loaded() {
    let mut spinney = Spinney::new();
    spinney.set("SPINNEY_VIEW", "off");
    let hash = filled(&spinney);
    spinney.ok("goto m@full --discard --yes").unwrap();
    assert!(!spinney.is_mapped("m").unwrap());
    assert_eq!(guest(&spinney, "m").hash().unwrap(), hash);
    let (said, _) = spinney.plain(&["doctor"]);
    assert!(said.contains("SPINNEY_VIEW"), "{said}");
    // From one to the other and back.
    spinney.set_view(true);
    spinney.ok("goto m@full --discard --yes").unwrap();
    assert!(spinney.is_mapped("m").unwrap());
    assert_eq!(guest(&spinney, "m").hash().unwrap(), hash);
}

/// Both processes of a view die at once, which is the end of what was mapped from it; but not of what comes after.
#[test]
fn a_view_that_is_lost_is_made_anew() {
    let spinney = Spinney::new();
    let hash = filled(&spinney);
    spinney.ok("goto m@full --discard --yes").unwrap();
    spinney.ok("kill m").unwrap();
    let (serving, standing_by) = spinney.views();
    // The one who stands by first, stopped, or it would take over.
    tool("kill", ["-STOP".to_owned(), standing_by[0].to_string()]);
    serving.into_iter().chain(standing_by).for_each(kill);
    spinney.ok("goto m@full --discard --yes").unwrap();
    assert!(spinney.is_mapped("m").unwrap());
    assert_eq!(guest(&spinney, "m").hash().unwrap(), hash);
}

/// An orderly end leaves nothing behind, but for what a machine needs.
#[test]
fn a_view_ends_with_the_daemon_unless_a_machine_needs_it() {
    let spinney = Spinney::new();
    let hash = filled(&spinney);
    spinney.ok("goto m@full --discard --yes").unwrap();
    spinney.ok("serve --stop").unwrap();
    assert_ne!(spinney.views().0, Vec::<u32>::new());
    assert_eq!(guest(&spinney, "m").hash().unwrap(), hash);
    spinney.ok("kill m").unwrap();
    spinney.ok("goto m@full --discard --yes").unwrap();
    spinney.ok("kill m").unwrap();
    // Also one that an earlier daemon has opened.
    spinney.kill_daemon();
    spinney.ok("ls").unwrap();
    assert_ne!(spinney.views().0, Vec::<u32>::new());
    spinney.ok("serve --stop").unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while spinney.views().0 != Vec::<u32>::new() {
        assert!(Instant::now() < deadline, "whoever served is gone");
        thread::sleep(Duration::from_millis(20));
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&*Path::new(&spinney.state()).to_string_lossy()), "{mounts}");
}

/// Whoever serves a group's view stands still: its machines are loaded instead, and nobody else waits for that.
#[test]
fn a_view_that_stands_still_holds_nobody_else_up() {
    let spinney = Spinney::new();
    if !spinney.can_map().unwrap() {
        eprintln!("SKIPPED, and nothing tested: this host maps no memory");
        return;
    }
    spinney.ok("group create others").unwrap();
    for name in ["m", "n"] {
        spinney.create_guest(name, 96).unwrap();
    }
    spinney.ok("edit n --group others").unwrap();
    for name in ["m", "n"] {
        spinney.ok(&format!("start {name}")).unwrap();
        guest(&spinney, name).cmd(&format!("echo {name} > /word")).unwrap();
        spinney.ok(&format!("take {name} x")).unwrap();
        spinney.ok(&format!("goto {name}@x --discard --yes")).unwrap();
        assert!(spinney.is_mapped(name).unwrap());
    }
    let pid = spinney.ok("show m").unwrap()["pid"].as_u64().unwrap();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let (folder, _) = maps.split_once("/mnt/.ram/").unwrap();
    let folder = &folder[folder.rfind('/').unwrap()..];
    let (serving, standing_by) = spinney.views();
    let of_m = |pid: &u32| {
        fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| String::from_utf8_lossy(&line).contains(folder))
    };
    let stopped: Vec<u32> = serving.into_iter().chain(standing_by).filter(of_m).collect();
    assert_eq!(stopped.len(), 2, "one serves, one stands by");
    let send = |signal| {
        for pid in &stopped {
            kill_process(Pid::from_raw(*pid as i32).unwrap(), signal).unwrap();
        }
    };
    send(Signal::STOP);
    let mut going = spinney.begin(&["fork", "m@x", "loaded"]);
    thread::sleep(Duration::from_millis(500));
    for _ in 0..2 {
        spinney.ok("goto n@x --discard --yes").unwrap();
    }
    assert!(going.try_wait().unwrap().is_none(), "it was to wait for an answer yet");
    assert!(going.wait().unwrap().success());
    send(Signal::CONT);
    spinney.ok("fork m@x mapped").unwrap();
    for (name, mapped) in [("loaded", false), ("mapped", true)] {
        assert_eq!(spinney.is_mapped(name).unwrap(), mapped, "{name}");
        assert_eq!(guest(&spinney, name).cmd("cat /word").unwrap().1, "m\n");
    }
}
