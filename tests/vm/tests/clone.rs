//! Clones of real guests: of a running one, which runs on, and of a snapshot; what each writes is its own, and so is its identity.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vm_tests::guest::Guest;
use vm_tests::harness::{Ended, Spinney, tool};
use vm_tests::underway::reached;

const SOON: Duration = Duration::from_secs(60);

fn connect(spinney: &Spinney, name: &str) -> Guest {
    let port = spinney.port(name).unwrap().expect("it has a process");
    Guest::connect(&port, SOON).unwrap()
}

fn shell(spinney: &Spinney, name: &str, words: &str) -> String {
    let (status, said) = connect(spinney, name).cmd(words).unwrap();
    assert_eq!(status, 0, "{name}: {words}: {said}");
    said
}

fn boot(spinney: &Spinney, name: &str) {
    spinney.ok(&format!("start {name}")).unwrap();
    connect(spinney, name).hello().unwrap();
}

/// Card by card: what the machine is to have, and what its guest sees.
fn has_its_cards(spinney: &Spinney, name: &str) -> Vec<Value> {
    let shown = spinney.ok(&format!("show {name}")).unwrap()["macs"].as_array().cloned().expect("cards");
    let mut seen: Vec<Value> =
        connect(spinney, name).macs().unwrap().into_values().map(Value::from).collect();
    let mut wanted = shown.clone();
    [&mut seen, &mut wanted].into_iter().for_each(|macs| macs.sort_by_key(Value::to_string));
    assert_eq!(seen, wanted, "{name}");
    shown
}

fn is_whole(spinney: &Spinney) {
    assert_eq!(spinney.ok("fsck").unwrap()["damage"], json!([]));
}

#[test]
fn a_running_guest_is_cloned_and_runs_on() {
    let spinney = Spinney::new();
    spinney.create_networked_guest("m", 128).unwrap();
    boot(&spinney, "m");
    shell(&spinney, "m", "echo before > /data/word; sync");
    let pid = spinney.ok("show m").unwrap()["pid"].clone();
    let before = connect(&spinney, "m").counter().unwrap();
    let cloned = spinney.ok("clone m c").unwrap();
    assert_eq!(cloned["machine"]["power"], "off");
    assert!(cloned["warnings"].to_string().contains("memory"), "{cloned}");
    // The source is the process that it was, and goes its own way.
    assert_eq!(spinney.ok("show m").unwrap()["pid"], pid);
    assert!(connect(&spinney, "m").counter().unwrap() > before);
    shell(&spinney, "m", "echo after > /data/word; sync");
    boot(&spinney, "c");
    assert_eq!(shell(&spinney, "c", "cat /data/word"), "before\n");
    shell(&spinney, "c", "echo clone > /data/word; sync");
    assert_eq!(shell(&spinney, "m", "cat /data/word"), "after\n");
    // Both run, and are two machines.
    let (source, clone) = (has_its_cards(&spinney, "m"), has_its_cards(&spinney, "c"));
    assert!(clone.iter().all(|mac| !source.contains(mac)), "{source:?} {clone:?}");
    let uuid = |name: &str| spinney.ok(&format!("show {name}")).unwrap()["uuid"].clone();
    assert_ne!(uuid("m"), uuid("c"));
    // So is a copy of it, while it runs.
    spinney.ok("clone m f --full").unwrap();
    assert_eq!(spinney.ok("show m").unwrap()["pid"], pid);
    boot(&spinney, "f");
    assert_eq!(shell(&spinney, "f", "cat /data/word"), "after\n");
    spinney.ok("kill f").unwrap();
    // A clone is a machine like any other; and it is there without its source.
    spinney.ok("take c one --mode live").unwrap();
    shell(&spinney, "c", "echo later > /data/word; sync");
    spinney.ok("kill m").unwrap();
    spinney.ok("rm m --yes").unwrap();
    spinney.ok("gc --now").unwrap();
    spinney.ok("goto c@one").unwrap();
    assert_eq!(shell(&spinney, "c", "cat /data/word"), "clone\n");
    spinney.ok("kill c").unwrap();
    is_whole(&spinney);
}

#[test]
fn a_full_clone_of_a_snapshot_needs_nothing_of_its_source() {
    let spinney = Spinney::new();
    spinney.create_guest("m", 128).unwrap();
    boot(&spinney, "m");
    shell(&spinney, "m", "echo one > /data/word; sync");
    spinney.ok("take m one").unwrap();
    shell(&spinney, "m", "echo two > /data/word; sync");
    let folder = spinney.folder().join("files");
    fs::create_dir(&folder).unwrap();
    let cloned = spinney.ok(&format!("clone m@one c --full --dir {}", folder.display())).unwrap();
    let file = folder.join("c-disk0.qcow2");
    assert_eq!(cloned["files"], json!([file]));
    for words in [&["check", "-q", "-f", "qcow2"][..], &["info", "-f", "qcow2"]] {
        let looked = tool("qemu-img", words.iter().copied().chain([file.to_str().unwrap()]));
        assert!(looked.status.success(), "{looked:?}");
        assert!(!String::from_utf8_lossy(&looked.stdout).contains("backing"), "{looked:?}");
    }
    spinney.ok("kill m").unwrap();
    spinney.ok("rm m --yes").unwrap();
    spinney.ok("gc --now").unwrap();
    boot(&spinney, "c");
    assert_eq!(shell(&spinney, "c", "cat /data/word"), "one\n");
    spinney.ok("kill c").unwrap();
    is_whole(&spinney);
}

/// UEFI's variables are a disk like any other, and come along.
#[test]
fn a_machine_with_uefi_is_cloned_with_its_variables() {
    let spinney = Spinney::new();
    spinney.ok("create m --memory 256M --network none --disk 64M --firmware uefi").unwrap();
    let folder = spinney.folder().join("files");
    fs::create_dir(&folder).unwrap();
    let ways =
        [("a", String::new()), ("b", " --full".into()), ("c", format!(" --full --dir {}", folder.display()))];
    for (name, words) in ways {
        spinney.ok(&format!("clone m {name}{words}")).unwrap();
        spinney.ok(&format!("start {name}")).unwrap();
        assert_eq!(spinney.ok(&format!("show {name}")).unwrap()["power"], "running", "{name}");
        spinney.ok(&format!("kill {name}")).unwrap();
    }
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "the disk alone");
    is_whole(&spinney);
}

/// Called off half-way, nothing is left.
#[test]
fn a_copy_that_is_called_off_leaves_nothing() {
    let mut spinney = Spinney::new();
    let words_file = spinney.folder().join("words");
    spinney.set("SPINNEY_CRASH", &format!("@{}", words_file.display()));
    spinney.ok("create m --memory 64M --network none --disk 64M").unwrap();
    spinney.ok("take m one").unwrap();
    let folder = spinney.folder().join("files");
    fs::create_dir(&folder).unwrap();
    let layers = spinney.layers();
    let ways =
        ["clone m@one c --full".to_owned(), format!("clone m@one c --full --dir {}", folder.display())];
    for (n, words) in ways.iter().enumerate() {
        let marker = spinney.folder().join(format!("marker{n}"));
        fs::write(&words_file, format!("clone.copied wait {}\n", marker.display())).unwrap();
        let command = spinney.under_way(words);
        reached(&marker, "clone.copied");
        command.interrupt();
        // Heard before the copy goes on.
        std::thread::sleep(Duration::from_millis(500));
        fs::remove_file(&marker).unwrap();
        let ended = command.end();
        assert_eq!(ended.code, Some(130), "{words}: {}", ended.stderr);
        assert_eq!(spinney.layers(), layers, "{words}");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "{words}");
        assert_eq!(spinney.run(["show", "c"]).code, Some(3));
    }
}

/// The check itself: a clone over what its source goes on writing to is found.
#[test]
fn a_clone_over_a_layer_that_is_written_to_is_found() {
    let mut spinney = Spinney::new();
    spinney.set("SPINNEY_FAULT", "clone-over-live");
    spinney.create_guest("m", 128).unwrap();
    boot(&spinney, "m");
    shell(&spinney, "m", "echo before > /data/word; sync");
    spinney.ok("clone m c").unwrap();
    shell(&spinney, "m", "echo after > /data/word; sync");
    // QEMU may see that somebody writes there.
    if spinney.run(["start", "c"]).code == Some(0) {
        assert_ne!(connect(&spinney, "c").cmd("cat /data/word").unwrap().1, "before\n");
    }
}

/// Copies a snapshot that goes meanwhile, and everything that nothing needs any more.
fn copy_what_goes(fault: &str) -> (Spinney, Ended) {
    let mut spinney = Spinney::new();
    let marker = spinney.folder().join("marker");
    spinney.set("SPINNEY_CRASH", &format!("clone.begun wait {}", marker.display()));
    spinney.set("SPINNEY_FAULT", fault);
    spinney.create_guest("m", 128).unwrap();
    boot(&spinney, "m");
    shell(&spinney, "m", "echo one > /data/word; sync");
    spinney.ok("kill m").unwrap();
    spinney.ok("take m one").unwrap();
    let command = spinney.under_way("clone m@one c --full");
    reached(&marker, "clone.begun");
    spinney.ok("rm m --yes").unwrap();
    spinney.ok("gc --now").unwrap();
    fs::remove_file(&marker).unwrap();
    let ended = command.end();
    (spinney, ended)
}

#[test]
fn what_is_being_copied_outlives_its_machine() {
    let (spinney, ended) = copy_what_goes("");
    ended.done().unwrap();
    boot(&spinney, "c");
    assert_eq!(shell(&spinney, "c", "cat /data/word"), "one\n");
    spinney.ok("kill c").unwrap();
    // And no longer.
    spinney.ok("gc --now").unwrap();
    assert_eq!(spinney.layers().len(), 1);
    is_whole(&spinney);
}

/// The check itself: without the pins the collector takes away what is being copied.
#[test]
fn without_pins_a_copy_loses_what_it_copies() {
    let (spinney, ended) = copy_what_goes("no-pins");
    assert_ne!(ended.code, Some(0));
    assert_eq!(spinney.run(["show", "c"]).code, Some(3));
}

/// A copy ends with the daemon, and the next one clears it away.
#[test]
fn a_daemon_that_dies_in_a_copy_leaves_nothing() {
    let spinney = Spinney::new();
    let image = spinney.folder().join("base.raw");
    let of = format!("of={}", image.display());
    let made = tool("dd", ["if=/dev/urandom", &of, "bs=1M", "count=700", "status=none"]);
    assert!(made.status.success(), "{made:?}");
    spinney.ok(&format!("create m --memory 64M --network none --disk {}", image.display())).unwrap();
    spinney.ok("take m one").unwrap();
    let folder = spinney.folder().join("files");
    fs::create_dir(&folder).unwrap();
    let layers = spinney.layers();
    for words in
        ["clone m@one c --full".to_owned(), format!("clone m@one c --full --dir {}", folder.display())]
    {
        let mut command = spinney.under_way(&words);
        assert!(command.reaches("copying disks"), "{words}");
        spinney.kill_daemon();
        command.end();
        let deadline = Instant::now() + SOON;
        while copies(&spinney) {
            assert!(Instant::now() < deadline, "{words}: qemu-img goes on without us");
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(spinney.run(["show", "c"]).code, Some(3), "{words}");
        assert_eq!(spinney.layers(), layers, "{words}");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "{words}");
    }
    is_whole(&spinney);
}

/// True while a qemu-img works on our files.
fn copies(spinney: &Spinney) -> bool {
    let folder = spinney.folder().display().to_string();
    let commands = fs::read_dir("/proc").unwrap().flatten();
    let commands = commands.filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok());
    commands.into_iter().any(|words| words.contains("convert") && words.contains(&folder))
}

/// As root, what is copied for a group is its owner's, and is copied by him.
#[test]
fn a_full_clone_belongs_to_the_owner_of_its_group() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED, and nothing tested: not root");
        return;
    }
    let spinney = Spinney::new();
    let folder = spinney.folder().join("files");
    fs::create_dir(&folder).unwrap();
    for open in [spinney.folder(), &folder] {
        fs::set_permissions(open, fs::Permissions::from_mode(0o755)).unwrap();
    }
    spinney.ok("group create theirs --owner nobody").unwrap();
    spinney.ok("create m --memory 64M --network none --disk 64M --group theirs").unwrap();
    for (name, words) in [("a", String::new()), ("b", format!(" --dir {}", folder.display()))] {
        spinney.ok(&format!("clone m {name} --full{words}")).unwrap();
        spinney.ok(&format!("start {name}")).unwrap();
        assert_eq!(spinney.ok(&format!("show {name}")).unwrap()["power"], "running");
        spinney.ok(&format!("kill {name}")).unwrap();
    }
    let file = fs::metadata(folder.join("b-disk0.qcow2")).unwrap();
    assert_ne!(file.uid(), 0);
    // Where he cannot get to nothing is begun.
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    let refused = spinney.run(["clone", "m", "c", "--full", "--dir", folder.to_str().unwrap()]);
    assert_eq!(refused.code, Some(8), "{}", refused.stderr);
    is_whole(&spinney);
}
