//! A full disk: before, during and after what is done. The guest ticks on, nothing is half made, what makes room works, and with room
//! again everything does.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use vm_tests::crash::{Act, ROWS, Scene, Stage, Victim};
use vm_tests::guest::Guest;
use vm_tests::harness::Spinney;
use vm_tests::small_disk::SmallDisk;
use vm_tests::walk::{Card, NAME, SOON, Walk};

/// A guest with a snapshot on a small disk. It writes to its memory and, from now on, not to its disk.
fn guest_on(disk: &SmallDisk) -> Walk {
    let mut walk = Walk::begin(Spinney::at(&disk.path(), &[]), 7, 64).unwrap();
    for card in [Card::LogStep, Card::TakeStopCopy, Card::Mutate, Card::Writer] {
        walk.play(card).unwrap();
    }
    quiet(&walk);
    walk
}

/// Nothing of the guest's is still on its way to the disk.
fn quiet(walk: &Walk) {
    let port = walk.spinney.port(NAME).unwrap().expect("a port");
    Guest::connect(&port, SOON).unwrap().sync().unwrap();
}

/// What must be the same after whatever had no room: the tree, here, the layers, and no half of a pack.
fn standing(spinney: &Spinney) -> (Vec<Value>, Value, Vec<PathBuf>) {
    let tree = spinney.ok(&format!("tree {NAME}")).unwrap();
    let snapshots = tree["snapshots"].as_array().expect("snapshots").iter().map(|s| s["id"].clone());
    // What names the blocks of a layer in the background is there for a moment.
    let half = |path: &PathBuf| path.extension().is_some_and(|end| end == "tmp") && stays(path);
    assert!(!spinney.pack_files().iter().any(half), "half a pack is left");
    (snapshots.collect(), tree["here"].clone(), spinney.layers())
}

/// It is still there after a second.
fn stays(path: &Path) -> bool {
    std::thread::sleep(Duration::from_secs(1));
    path.exists()
}

/// It has no room, says where and what can be done.
fn has_no_room(spinney: &Spinney, words: &str) {
    let ended = spinney.run(words.split(' '));
    let problem = ended.problem();
    assert_eq!(ended.code, Some(7), "{words}: {problem} {}", ended.stderr);
    assert!(problem["hint"].as_str().is_some_and(|hint| hint.contains("room")), "{words}: {problem}");
    println!("{words}: {} ({})", problem["detail"], problem["cause"]);
}

#[test]
fn a_disk_that_is_full_already() {
    let Some(disk) = SmallDisk::new(420) else { return };
    let walk = guest_on(&disk);
    let spinney = &walk.spinney;
    spinney.ok("create idle --memory 64M --network none --disk 16M").unwrap();
    spinney.ok(&format!("take {NAME} s2 --mode stop-copy")).unwrap();
    spinney.ok(&format!("edit {NAME}@s2 --name other")).unwrap();
    quiet(&walk);
    let port = spinney.port(NAME).unwrap().expect("a port");
    disk.fill();
    let before = standing(spinney);
    for words in [
        format!("take {NAME} x --mode stop-copy"),
        format!("take {NAME} x --mode pre-copy"),
        format!("take {NAME} x --mode live"),
        format!("take {NAME} x --disk-only"),
        "take idle x".to_owned(),
        format!("goto {NAME}@s1"),
        format!("goto {NAME}@s1 --discard --yes"),
        "create more --memory 64M --network none --disk 16M".to_owned(),
        "start idle".to_owned(),
        format!("suspend {NAME}"),
    ] {
        has_no_room(spinney, &words);
        walk.ticks_within(&port, SOON).unwrap();
        assert_eq!(standing(spinney), before, "{words}");
    }
    assert_eq!(spinney.ok("ls").unwrap()["machines"].as_array().map(Vec::len), Some(2));

    // Often enough that its log has no room either.
    for _ in 0..30 {
        has_no_room(spinney, "take idle x");
    }
    // The daemon comes up on a full disk, and what makes room works.
    spinney.kill_daemon();
    for round in 0..20 {
        spinney.ok(&format!("edit {NAME}@other -m {round}")).unwrap();
    }
    // What has expired makes room by itself.
    spinney.ok(&format!("edit {NAME}@other --expire 1s")).unwrap();
    let deadline = Instant::now() + SOON;
    while spinney.run(["show", &format!("{NAME}@other")]).code == Some(0) {
        assert!(Instant::now() < deadline, "it was to expire");
        thread::sleep(Duration::from_millis(100));
    }
    spinney.ok("undo").unwrap();
    spinney.ok(&format!("rm {NAME}@other")).unwrap();
    spinney.ok("undo").unwrap();
    spinney.ok(&format!("rm {NAME}@other")).unwrap();
    spinney.ok("rm idle --yes").unwrap();
    assert!(disk.free() < 16 << 20, "it was to be a full disk");
    let free = disk.free();
    let freed = spinney.ok("gc --now").unwrap();
    assert!(freed["layers"].as_u64() >= Some(1) && disk.free() > free, "{freed}: {free} -> {}", disk.free());
    walk.ticks_within(&port, SOON).unwrap();

    disk.empty();
    for words in [
        "take web y --mode live",
        "goto web@s1",
        "undo",
        "create more --memory 64M --network none --disk 16M",
    ] {
        spinney.ok(words).unwrap();
    }
    assert!(spinney.state().join("reserve").exists(), "the reserve is made again");
    let port = spinney.port(NAME).unwrap().expect("a port");
    walk.ticks_within(&port, SOON).unwrap();
    assert_eq!(spinney.ok("fsck").unwrap()["damage"], serde_json::json!([]));
}

/// The machine whose memory has no room is not the one that has to wait for some.
#[test]
fn pages_leave_the_last_of_a_disk_to_guests() {
    let Some(disk) = SmallDisk::new(420) else { return };
    let spinney = Spinney::at(&disk.path(), &[]);
    spinney.create_guest("m", 96).unwrap();
    spinney.ok("start m").unwrap();
    let booted = Guest::connect(&spinney.port("m").unwrap().expect("a port"), Duration::from_secs(60));
    booted.unwrap().sync().unwrap();
    disk.fill_but(24 << 20);
    let least = thread::scope(|scope| {
        let take = scope.spawn(|| has_no_room(&spinney, "take m x --mode stop-copy"));
        let mut least = disk.free();
        while !take.is_finished() {
            least = least.min(disk.free());
            thread::sleep(Duration::from_millis(1));
        }
        take.join().unwrap();
        least
    });
    println!("{} KiB were left", least >> 10);
    assert!((5 << 20..20 << 20).contains(&least), "{least}");
}

/// The check itself: without its reserve the catalog has no room for what makes room.
#[test]
fn without_the_reserve_nothing_makes_room() {
    let Some(disk) = SmallDisk::new(64) else { return };
    let spinney = Spinney::at(&disk.path(), &[("SPINNEY_FAULT", "no-reserve")]);
    spinney.ok("create m --memory 64M --network none --disk 16M").unwrap();
    spinney.ok("take m s1").unwrap();
    disk.fill();
    let refused = (0..40).find_map(|round| {
        let ended = spinney.run(["edit", "m@s1", "-m", &round.to_string()]);
        (ended.code != Some(0)).then_some(ended)
    });
    assert_eq!(refused.expect("a catalog that has no room").code, Some(7));
}

/// Strikes every step of every act of a stage: what had no room is as it was, the rest is done.
fn becomes_full(stage: Stage) {
    let Some(disk) = SmallDisk::new(600) else { return };
    let mut scene = Scene::begin_on(disk, stage).unwrap();
    scene.play(ROWS, Victim::Room, false).unwrap_or_else(|violation| panic!("{violation}"));
    let done = scene.strokes.iter().filter(|stroke| stroke.happened).count();
    println!("{stage:?}: full {} times, {done} were done all the same", scene.strokes.len());
    assert!((1..scene.strokes.len()).contains(&done));
    scene.end().unwrap();
}

#[test]
fn a_disk_that_becomes_full_at_every_step() {
    becomes_full(Stage::Guest);
}

#[test]
fn a_disk_that_becomes_full_at_every_step_of_a_goto_in_place() {
    becomes_full(Stage::GuestWithPort);
}

/// Nor does the daemon that has to bring it back find any room.
#[test]
fn a_machine_that_a_goto_in_place_has_ended_comes_back_on_a_full_disk() {
    let Some(disk) = SmallDisk::new(600) else { return };
    let mut scene = Scene::begin_on(disk, Stage::GuestWithPort).unwrap();
    for step in ["in-place.kept", "goto.alone", "goto.loaded"] {
        scene.strike(Act::GotoInPlace, step, Victim::RoomThenDaemon).unwrap();
        assert!(!scene.strokes.last().unwrap().happened);
    }
    scene.end().unwrap();
}

/// The check itself: a machine that ends before the next one starts needs the reserve then.
#[test]
fn a_machine_that_has_no_room_to_come_back_is_found() {
    let Some(disk) = SmallDisk::new(600) else { return };
    let mut scene = Scene::begin_on(disk, Stage::GuestWithPort).unwrap();
    scene.spinney.set("SPINNEY_FAULT", "no-reserve");
    scene.spinney.kill_daemon();
    fs::remove_file(scene.spinney.state().join("reserve")).unwrap();
    let found = scene.strike(Act::GotoInPlace, "goto.alone", Victim::Room).expect_err("who made room?");
    assert!(found.to_string().contains("GotoInPlace"), "{found}");
    println!("{found}");
}

#[test]
fn a_disk_that_becomes_full_at_every_step_of_a_machine_that_is_off() {
    becomes_full(Stage::Cold);
}

#[test]
fn a_guest_whose_own_write_has_no_room_goes_on_when_there_is_some() {
    let Some(disk) = SmallDisk::new(420) else { return };
    let mut walk = guest_on(&disk);
    walk.play(Card::LogRate).unwrap();
    let show = |walk: &Walk| walk.spinney.ok(&format!("show {NAME}")).unwrap();
    let port = walk.spinney.port(NAME).unwrap().expect("a port");
    for with_daemon in [true, false] {
        let mut guest = Guest::connect(&port, SOON).unwrap();
        guest.disk_write(8).unwrap();
        disk.fill();
        let stopped = until(|| show(&walk), |machine| machine["power"] == "paused");
        let why = stopped["stopped_because"].as_str().unwrap_or_default();
        assert_eq!(why, "disk0 has no room on the host", "{stopped}");
        // It stands still indeed, and is not told of an error.
        guest.set_timeout(Duration::from_millis(500));
        assert!(guest.counter().is_err());
        drop(guest);
        let (table, _) = walk.spinney.plain(&["ls"]);
        assert!(table.contains("paused (disk0 has no room on the host)"), "{table}");
        for words in [format!("take {NAME} x"), format!("goto {NAME}@s1"), format!("resume {NAME}")] {
            has_no_room(&walk.spinney, &words);
        }
        if !with_daemon {
            walk.spinney.kill_daemon();
            assert_eq!(show(&walk)["power"], "paused", "the next daemon finds it so");
        }
        disk.empty();
        until(|| show(&walk), |machine| machine["power"] == "running");
        let mut guest = Guest::connect(&port, Duration::from_secs(20)).unwrap();
        guest.disk_write(0).unwrap();
        let (status, said) = guest.cmd("dmesg | grep -ic 'error'").unwrap();
        assert_eq!((status, said.trim()), (1, "0"), "the guest has seen an error");
        let log = guest.log_check().unwrap();
        assert!(log.ok && log.valid, "{log:?}");
    }
    walk.play(Card::TakeLive).unwrap();
    walk.play(Card::Back).unwrap();
}

fn until(look: impl Fn() -> Value, is_so: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let value = look();
        if is_so(&value) {
            return value;
        }
        assert!(Instant::now() < deadline, "it did not come: {value}");
        thread::sleep(Duration::from_millis(50));
    }
}
