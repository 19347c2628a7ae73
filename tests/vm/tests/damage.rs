//! Damage to what is stored, by kind: reads fail and name the thing, `fsck` names the snapshots, `--repair` mends what can be mended,
//! and the others still restore on a real guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vm_tests::guest::Guest;
use vm_tests::harness::{Spinney, tool};
use vm_tests::underway::reached;

/// Bytes of a page, and of a pack before its first one.
const PAGE: usize = 4096;
/// More than what a pack has that is of maps alone.
const MAPS: u64 = 512 << 10;

/// A guest of 96 MiB that has been taken twice, with another word in its memory and on its disk each time.
fn taken_twice() -> (Spinney, Vec<PathBuf>) {
    taken_twice_with("on")
}

/// The same with memory that is mapped when it is brought back (`on`), or loaded (`off`).
fn taken_twice_with(view: &str) -> (Spinney, Vec<PathBuf>) {
    let spinney = Spinney::with(&[("SPINNEY_VIEW", view)]);
    spinney.create_guest("m", 96).unwrap();
    spinney.ok("start m").unwrap();
    let mut seen = Vec::new();
    for word in ["one", "two"] {
        say(&spinney, word);
        // The guest runs on, so that one thread stores, into one pack.
        let before = quiet_packs(&spinney);
        spinney.ok(&format!("take m {word} --mode live")).unwrap();
        let mut new = quiet_packs(&spinney);
        new.retain(|pack| !before.contains(pack));
        // Beside it there are the maps of layers that settle.
        new.retain(|pack| fs::metadata(pack).unwrap().len() > MAPS);
        assert_eq!(new.len(), 1, "a live take makes one pack");
        seen.extend(new);
    }
    (spinney, seen)
}

/// The packs, when nothing is done in the background any more that makes some.
fn quiet_packs(spinney: &Spinney) -> Vec<PathBuf> {
    spinney.settle().unwrap();
    spinney.packs()
}

fn guest(spinney: &Spinney) -> Guest {
    let port = spinney.port("m").unwrap().expect("a port");
    Guest::connect(&port, Duration::from_secs(60)).unwrap()
}

/// Writes a word to the guest's disk, and one page of its own to its memory.
fn say(spinney: &Spinney, word: &str) {
    let (status, said) =
        guest(spinney).cmd(&format!("echo {word} > /data/word; sync; echo {word} > /tmp/word")).unwrap();
    assert_eq!(status, 0, "{said}");
}

/// Goes there, and finds the word.
fn restores(spinney: &Spinney, word: &str) {
    spinney.ok(&format!("goto m@{word} --discard --yes")).unwrap();
    let (_, said) = guest(spinney).cmd("cat /tmp/word /data/word").unwrap();
    assert_eq!(said, format!("{word}\n{word}\n"));
}

/// Going there fails for damage, and the machine is as it was.
fn does_not_restore(spinney: &Spinney, word: &str) -> Value {
    let pid = spinney.ok("show m").unwrap()["pid"].clone();
    let ended = spinney.run(["goto", &format!("m@{word}"), "--discard", "--yes"]);
    assert_eq!(ended.code, Some(6), "{}", ended.stderr);
    assert_eq!(spinney.ok("show m").unwrap()["pid"], pid, "the machine is as it was");
    guest(spinney).counter().unwrap();
    ended.problem()
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

/// `fsck`, whatever it ends with.
fn fsck(spinney: &Spinney, words: &str) -> Value {
    let ended = spinney.run(words.split(' '));
    let clean = ended.document["damage"] == json!([]);
    assert_eq!(ended.code, Some(if clean { 0 } else { 6 }), "{}", ended.stderr);
    ended.document
}

fn touched(report: &Value) -> Vec<&str> {
    let damage = report["damage"].as_array().expect("damage").iter();
    let mut names: Vec<&str> = damage
        .flat_map(|d| d["snapshots"].as_array().into_iter().flatten())
        .filter_map(Value::as_str)
        .collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn state(spinney: &Spinney, word: &str) -> Value {
    spinney.ok(&format!("show m@{word}")).unwrap()["state"].clone()
}

/// The daemon dies and comes back, as it does when it finds what happened meanwhile.
fn again(spinney: &Spinney) {
    spinney.kill_daemon();
    spinney.ok("ls").unwrap();
}

#[test]
fn a_pack_whose_index_is_gone_is_mended_whole() {
    let (spinney, packs) = taken_twice();
    let (intact, before) = (fs::read(&packs[0]).unwrap(), spinney.packs());
    // Its footer, its header, its end.
    for kind in 0..3 {
        match kind {
            0 => flip(&packs[0], intact.len() - 160 - 400),
            1 => flip(&packs[0], 60),
            _ => fs::write(&packs[0], &intact[..intact.len() - 64]).unwrap(),
        }
        again(&spinney);
        let problem = does_not_restore(&spinney, "one");
        assert!(problem["hint"].as_str().is_some_and(|hint| hint.contains("fsck")), "{problem}");
        let report = fsck(&spinney, "fsck");
        // Here, too, once its disk has settled.
        let named: Vec<&str> = touched(&report).into_iter().filter(|name| *name != "m (here)").collect();
        assert_eq!(named, ["m@one", "m@two"], "they share pages: {report}");
        let name = packs[0].file_name().unwrap().to_string_lossy().into_owned();
        assert!(report.to_string().contains(&name), "{report}");
        let report = fsck(&spinney, "fsck --repair");
        assert_eq!(report["damage"], json!([]), "{report}");
        assert!(report["mended"][0].as_str().is_some_and(|said| said.contains(&name)), "{report}");
        assert_eq!(fsck(&spinney, "fsck")["damage"], json!([]));
        for word in ["one", "two"] {
            restores(&spinney, word);
        }
        // As before, for the next kind.
        for path in spinney.packs() {
            if !before.contains(&path) {
                fs::remove_file(path).unwrap();
            }
        }
        fs::write(&packs[0], &intact).unwrap();
        again(&spinney);
        assert_eq!(fsck(&spinney, "fsck")["damage"], json!([]));
    }
}

/// A disk that gives no answer is no damage: nothing is marked, nothing is put aside, and with the disk all is there again.
#[test]
fn a_disk_that_cannot_be_read_is_named_and_nothing_is_given_up() {
    let (mut spinney, packs) = taken_twice();
    let pack = packs[1].file_name().unwrap().to_string_lossy().into_owned();
    spinney.set("SPINNEY_FAULT", "read-error");
    again(&spinney);
    let pid = spinney.ok("show m").unwrap()["pid"].clone();
    let ended = spinney.run(["goto", "m@two", "--discard", "--yes"]);
    let problem = ended.problem();
    assert_eq!(ended.code, Some(6), "{problem}");
    let said = problem.to_string();
    assert!(said.contains(".pack") && said.contains("os error 5"), "{said}");
    assert_eq!(spinney.ok("show m").unwrap()["pid"], pid, "the machine is as it was");
    guest(&spinney).counter().unwrap();
    // What is new is stored beside what cannot be read.
    say(&spinney, "three");
    spinney.ok("take m three --mode live").unwrap();
    assert!(fsck(&spinney, "fsck")["damage"].to_string().contains(&pack));
    let refused = spinney.run(["fsck", "--repair"]);
    assert_eq!(refused.code, Some(1), "{}", refused.stderr);
    assert!(
        refused.problem()["hint"].as_str().is_some_and(|hint| hint.contains("disk")),
        "{}",
        refused.stderr
    );
    assert!(packs.iter().all(|pack| pack.exists()), "a pack that cannot be read now may be read tomorrow");

    spinney.set("SPINNEY_FAULT", "");
    again(&spinney);
    assert_eq!(fsck(&spinney, "fsck")["damage"], json!([]));
    for word in ["one", "two", "three"] {
        assert_eq!(state(&spinney, word), "ready");
        restores(&spinney, word);
    }
}

#[test]
fn a_page_that_is_lost_costs_its_snapshots_and_no_others() {
    // Memory that is mapped is not read before it is touched: `view.rs`.
    let (mut spinney, packs) = taken_twice_with("off");
    // The second pack is of `two` alone; whether the first page of it is read at once does not matter.
    flip(&packs[1], PAGE + 100);
    does_not_restore(&spinney, "two");
    restores(&spinney, "one");
    assert_eq!(touched(&fsck(&spinney, "fsck")), ["m@two"]);
    assert_eq!(state(&spinney, "two"), "ready", "a check changes nothing");
    let report = fsck(&spinney, "fsck --repair");
    assert_eq!(touched(&report), ["m@two"], "{report}");
    assert_eq!((state(&spinney, "one"), state(&spinney, "two")), (json!("ready"), json!("damaged")));
    let (tree, _) = spinney.plain(&["tree", "m"]);
    assert!(tree.lines().any(|line| line.contains("two") && line.contains("damaged")), "{tree}");
    does_not_restore(&spinney, "two");
    // Nor is it forked, though what is mapped is not missed before it is touched.
    spinney.set("SPINNEY_VIEW", "on");
    again(&spinney);
    let forked = spinney.run(["fork", "m@two"]);
    assert_eq!(forked.code, Some(6), "{}", forked.stderr);
    assert!(
        forked.problem()["hint"].as_str().is_some_and(|hint| hint.contains("clone m@two")),
        "{}",
        forked.stderr
    );
    assert_eq!(spinney.machines().len(), 1);
    spinney.set("SPINNEY_VIEW", "off");
    again(&spinney);
    restores(&spinney, "one");
    // Its disk is whole.
    spinney.ok("goto m@two --off --discard --yes").unwrap();
    // New takes are not dragged in.
    restores(&spinney, "one");
    spinney.ok("take m three --mode stop-copy").unwrap();
    assert_eq!(touched(&fsck(&spinney, "fsck")), ["m@two"]);
    restores(&spinney, "one");
}

/// Spoils the pages of the guest in a pack. The device state lies behind them.
fn spoil(pack: &Path) {
    let mut bytes = fs::read(pack).unwrap();
    (PAGE..bytes.len() / 2).step_by(PAGE).for_each(|at| bytes[at + 100] ^= 1);
    fs::write(pack, bytes).unwrap();
}

/// What QEMU itself touches of a memory that is mapped it misses while it is loaded, beside what is there still.
#[test]
fn a_page_that_is_missed_in_loading_ends_that_and_the_machine_is_as_it_was() {
    let (spinney, packs) = taken_twice();
    let can_map = spinney.can_map().unwrap();
    let is_named = |problem: &Value| {
        assert!(
            !can_map || problem["cause"].to_string().contains("of its memory cannot be read"),
            "{problem}"
        );
    };
    spoil(&packs[1]);
    let began = Instant::now();
    let problem = does_not_restore(&spinney, "two");
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    is_named(&problem);
    assert!(problem["hint"].as_str().is_some_and(|hint| hint.contains("goto m@two --off")), "{problem}");
    assert_eq!(spinney.machines().len(), 1, "nothing is left of the other one");
    restores(&spinney, "one");

    // A memory that is kept is not given up either.
    spinney.ok("suspend m").unwrap();
    let spoilt = spinney.packs().into_iter().filter(|pack| *pack != packs[0] && *pack != packs[1]);
    let spoilt: Vec<PathBuf> = spoilt.collect();
    spoilt.iter().for_each(|pack| spoil(pack));
    let ended = spinney.run(["start", "m"]);
    assert_eq!(ended.code, Some(6), "{}", ended.stderr);
    is_named(&ended.problem());
    assert_eq!((state_of(&spinney), spinney.machines().len()), ("suspended".into(), 0));
    // As it was: what is spoilt twice is whole.
    spoilt.iter().chain([&packs[1]]).for_each(|pack| spoil(pack));
    spinney.ok("start m").unwrap();
    assert_eq!(guest(&spinney).cmd("cat /tmp/word").unwrap().1, "one\n");
}

fn state_of(spinney: &Spinney) -> Value {
    spinney.ok("show m").unwrap()["power"].clone()
}

#[test]
fn a_repair_that_dies_in_the_middle_is_done_again() {
    let (mut spinney, packs) = taken_twice();
    let len = fs::metadata(&packs[0]).unwrap().len() as usize;
    flip(&packs[0], len - 160 - 400);
    let marker = spinney.folder().join("mended");
    spinney.set("SPINNEY_CRASH", &format!("fsck.mended kill {}", marker.display()));
    again(&spinney);
    assert_ne!(spinney.run(["fsck", "--repair"]).code, Some(0));
    assert!(marker.exists(), "it was to die there");
    assert_eq!(fsck(&spinney, "fsck --repair")["damage"], json!([]));
    for word in ["one", "two"] {
        restores(&spinney, word);
    }
}

#[test]
fn a_pack_that_is_gone_or_cut_costs_what_it_had() {
    for gone in [true, false] {
        let (spinney, packs) = taken_twice();
        let bytes = fs::read(&packs[1]).unwrap();
        match gone {
            true => fs::remove_file(&packs[1]).unwrap(),
            false => fs::write(&packs[1], &bytes[..PAGE * 3]).unwrap(),
        }
        again(&spinney);
        does_not_restore(&spinney, "two");
        assert_eq!(touched(&fsck(&spinney, "fsck")), ["m@two"]);
        assert_eq!(touched(&fsck(&spinney, "fsck --repair")), ["m@two"]);
        restores(&spinney, "one");
        spinney.ok("rm m@two").unwrap();
        spinney.ok("gc --now").unwrap();
        assert_eq!(fsck(&spinney, "fsck")["damage"], json!([]));
    }
}

#[test]
fn a_layer_that_is_gone_or_damaged_is_named() {
    let (spinney, _) = taken_twice();
    // In the order in which they were made: what `one` froze, what `two` froze, and what was written to then.
    let mut layers = spinney.layers();
    layers.sort_by_key(|path| path.metadata().unwrap().created().unwrap());
    assert_eq!(layers.len(), 3, "{layers:?}");
    let layer = layers.swap_remove(1);
    restores(&spinney, "one");
    let bytes = fs::read(&layer).unwrap();
    for gone in [true, false] {
        if gone {
            fs::remove_file(&layer).unwrap()
        } else {
            fs::write(&layer, &bytes[..1000]).unwrap()
        }
        its_disk_is_damaged(&spinney, &layer);
        let report = fsck(&spinney, "fsck --repair");
        assert_eq!(touched(&report), ["m@two"], "{report}");
        assert!(report.to_string().contains(layer.to_str().unwrap()), "{report}");
        assert_eq!(state(&spinney, "two"), "damaged");
        restores(&spinney, "one");
        fs::write(&layer, &bytes).unwrap();
    }
    fsck(&spinney, "fsck --repair");
    assert_eq!(state(&spinney, "two"), "ready", "put back, all is well");
    restores(&spinney, "two");
}

fn its_disk_is_damaged(spinney: &Spinney, layer: &Path) {
    let ended = spinney.run(["goto", "m@two", "--discard", "--yes"]);
    let name = layer.file_name().unwrap().to_str().unwrap();
    assert!(ended.stderr.contains(name), "{}", ended.stderr);
    assert_eq!(ended.code, Some(6), "{}", ended.stderr);
    guest(spinney).counter().unwrap();
}

#[test]
fn a_catalog_that_is_damaged_is_named_and_left_alone_and_a_torn_transaction_is_not_there() {
    let spinney = Spinney::new();
    spinney.ok("create m --memory 64M --network none --disk 16M").unwrap();
    spinney.ok("take m one").unwrap();
    // A copy is made when the catalog is opened.
    again(&spinney);
    spinney.ok("take m two").unwrap();
    let layers = spinney.layers();
    spinney.kill_daemon();
    let catalog = spinney.state().join("catalog.db");
    let wal = spinney.state().join("catalog.db-wal");

    // The end of the log of transactions, torn off in the middle of the last one: it has not happened.
    let log = fs::read(&wal).unwrap();
    assert!(log.len() > 9000, "the last take is in the log: {}", log.len());
    fs::write(&wal, &log[..log.len() - 100]).unwrap();
    let tree = spinney.ok("tree m").unwrap();
    let names = |tree: &Value| {
        tree["snapshots"]
            .as_array()
            .unwrap()
            .iter()
            .map(|s| s["name"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert!(names(&tree).contains(&"one".to_owned()), "{tree}");
    assert_eq!(fsck(&spinney, "fsck")["damage"], json!([]));
    if !names(&tree).contains(&"two".to_owned()) {
        spinney.ok("take m two").unwrap();
    }
    drop(layers);

    let id = spinney.ok("show m@one").unwrap()["id"].as_str().expect("an id").to_owned();
    // A daemon that ends while it is at something leaves what it wrote last in the log.
    for _ in 0..10 {
        spinney.ok("serve --stop").unwrap();
        if fs::metadata(&wal).is_ok_and(|log| log.len() > 0) {
            spinney.ok("ls").unwrap();
        }
    }
    assert!(spinney.daemon().is_none(), "it was always at something");
    let mut bytes = fs::read(&catalog).unwrap();
    // Every page that says something of a snapshot, all of it: one that is free would not be missed.
    let about = |page: &[u8]| page.windows(id.len()).any(|word| word == id.as_bytes());
    let pages: Vec<&mut [u8]> = bytes.chunks_mut(PAGE).skip(1).filter(|page| about(page)).collect();
    assert!(!pages.is_empty());
    pages.into_iter().for_each(|page| page.fill(0xa5));
    fs::write(&catalog, &bytes).unwrap();
    let ended = spinney.run(["ls"]);
    assert_eq!(ended.code, Some(6), "{}", ended.stderr);
    assert!(ended.stderr.contains("catalog.db"), "{}", ended.stderr);
    assert_eq!(fs::read(&catalog).unwrap(), bytes, "nothing was overwritten");

    // The copy in its place: older, and nothing of the disks is deleted.
    let before = spinney.layers().len();
    fs::copy(spinney.state().join("catalog.db.copy"), &catalog).unwrap();
    for end in ["-wal", "-shm"] {
        let _ = fs::remove_file(spinney.state().join(format!("catalog.db{end}")));
    }
    let tree = spinney.ok("tree m").unwrap();
    assert!(names(&tree).contains(&"one".to_owned()), "{tree}");
    let groups = fs::read_dir(spinney.state().join("groups")).unwrap();
    let lost =
        groups.filter_map(|group| fs::read_dir(group.unwrap().path().join("lost")).ok()).flatten().count();
    assert_eq!(spinney.layers().len() + lost, before, "what the copy does not know is kept");
    spinney.ok("goto m@one --discard --yes").unwrap();
}

/// Puts the catalog's copy in its place; the daemon has ended.
fn put_the_copy_back(spinney: &Spinney) {
    assert!(spinney.daemon().is_none(), "`serve --stop` waits until it is gone");
    let catalog = spinney.state().join("catalog.db");
    fs::copy(spinney.state().join("catalog.db.copy"), &catalog).unwrap();
    for end in ["-wal", "-shm"] {
        let _ = fs::remove_file(spinney.state().join(format!("catalog.db{end}")));
    }
}

#[test]
fn an_old_copy_of_the_catalog_takes_nothing_from_a_machine_that_went_on() {
    let spinney = Spinney::new();
    spinney.create_guest("m", 96).unwrap();
    spinney.ok("start m").unwrap();
    say(&spinney, "one");
    // The next daemon leaves a copy in which the machine runs.
    spinney.ok("serve --stop").unwrap();
    spinney.ok("ls").unwrap();
    let before = spinney.layers();
    spinney.ok("take m two --mode live").unwrap();
    say(&spinney, "three");
    spinney.ok("serve --stop").unwrap();
    put_the_copy_back(&spinney);
    assert_eq!(spinney.ok("show m").unwrap()["power"], "running");
    guest(&spinney).counter().unwrap();
    let after = spinney.layers();
    assert!(before.iter().all(|layer| after.contains(layer)), "{before:?} became {after:?}");

    // It writes to a layer that this catalog does not know: nothing more is taken of it, and its next start is from what is known.
    assert_eq!(spinney.run(["take", "m", "x"]).code, Some(1));
    spinney.ok("kill m").unwrap();
    spinney.ok("start m").unwrap();
    guest(&spinney).counter().unwrap();

    // One in which it is suspended, while it went on since: its memory is not that of its disks.
    spinney.ok("suspend m").unwrap();
    spinney.ok("serve --stop").unwrap();
    assert_eq!(spinney.ok("show m").unwrap()["power"], "suspended");
    spinney.ok("start m").unwrap();
    spinney.ok("serve --stop").unwrap();
    put_the_copy_back(&spinney);
    assert_eq!(spinney.ok("show m").unwrap()["power"], "lost_power");
    spinney.ok("start m").unwrap();
    guest(&spinney).counter().unwrap();

    // None at all, with a copy there, is no new one.
    spinney.ok("serve --stop").unwrap();
    let runs = spinney.machines();
    fs::write(spinney.state().join("catalog.db"), "").unwrap();
    for end in ["-wal", "-shm"] {
        let _ = fs::remove_file(spinney.state().join(format!("catalog.db{end}")));
    }
    let ended = spinney.run(["ls"]);
    assert_eq!(ended.code, Some(6), "{}", ended.stderr);
    assert_eq!(spinney.machines(), runs, "no machine is ended");
    put_the_copy_back(&spinney);
    spinney.ok("ls").unwrap();
}

/// The take has met pages that are given up before it is in the catalog: nobody would look for them there.
#[test]
fn a_take_that_has_met_what_a_repair_gives_up_fails_and_the_next_one_is_whole() {
    let (mut spinney, packs) = taken_twice();
    let marker = spinney.folder().join("saved");
    spinney.set("SPINNEY_CRASH", &format!("take.saved wait {}", marker.display()));
    spinney.kill_daemon();
    let take = spinney.under_way("take m three --mode live");
    reached(&marker, "take.saved");
    // Pages of its kernel, which are in the guest as ever.
    (100..140).for_each(|slot| flip(&packs[0], PAGE + slot * PAGE + 7));
    let report = fsck(&spinney, "fsck --repair");
    assert_ne!(report["damage"], json!([]), "nobody else has these pages");
    fs::remove_file(&marker).unwrap();
    let ended = take.end();
    let problem = ended.problem();
    assert_eq!(ended.code, Some(1), "{problem}");
    assert!(problem["detail"].as_str().is_some_and(|words| words.contains("repair")), "{problem}");
    guest(&spinney).counter().unwrap();
    // What the guest still has is stored again.
    spinney.ok("take m four --mode live").unwrap();
    assert!(!touched(&fsck(&spinney, "fsck")).contains(&"m@four"));
    spinney.ok("goto m@four --discard --yes").unwrap();
    assert_eq!(guest(&spinney).cmd("cat /tmp/word /data/word").unwrap().1, "two\ntwo\n");
}

/// One thing is wrong, for two machines and all of their snapshots.
#[test]
fn an_image_that_is_gone_is_named_once() {
    let spinney = Spinney::new();
    let image = spinney.folder().join("own.qcow2");
    tool("qemu-img", ["create", "-q", "-f", "qcow2", &image.display().to_string(), "8M"]);
    for name in ["a", "b"] {
        spinney.ok(&format!("create {name} --memory 64M --network none --disk {}", image.display())).unwrap();
        for snapshot in ["one", "two"] {
            spinney.ok(&format!("take {name} {snapshot}")).unwrap();
        }
    }
    let moved = image.with_extension("moved");
    fs::rename(&image, &moved).unwrap();
    let report = fsck(&spinney, "fsck");
    assert_eq!(report["damage"].as_array().map(Vec::len), Some(1), "{report}");
    assert_eq!(report["damage"][0]["what"], image.display().to_string());
    assert_eq!(touched(&report), ["a (here)", "a@one", "a@two", "b (here)", "b@one", "b@two"]);
    let hint = spinney.run(["fsck"]).problem()["hint"].to_string();
    assert!(hint.contains("put them back"), "{hint}");
    fs::rename(&moved, &image).unwrap();
    assert_eq!(fsck(&spinney, "fsck")["damage"], json!([]));
}
