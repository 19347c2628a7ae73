//! Groups on real guests: nothing is shared across them, a machine can be copied from one to another, and as root its QEMU is its
//! group's owner's.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use vm_tests::guest::{Guest, Mix};
use vm_tests::harness::{Spinney, cache};
use vm_tests::small_disk::SmallDisk;

const SOON: Duration = Duration::from_secs(60);
/// MiB of each machine.
const MIB: u64 = 128;
/// What is in both stores if they share nothing: the kernel of the test guest alone is more.
const SAME_PAGES: u64 = 1000;

fn connect(spinney: &Spinney, name: &str) -> Guest {
    let port = spinney.port(name).unwrap().expect("it has a process");
    Guest::connect(&port, SOON).unwrap()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn folder(spinney: &Spinney, group: &str) -> PathBuf {
    let group = spinney.ok(&format!("group show {group}")).unwrap();
    PathBuf::from(group["folder"].as_str().expect("a folder"))
}

/// What `du` says of one group.
fn space(spinney: &Spinney, group: &str) -> Value {
    spinney.settle().unwrap();
    let du = spinney.ok("du").unwrap();
    let groups = du["groups"].as_array().expect("groups").iter();
    groups.clone().find(|found| found["group"] == group).cloned().expect("the group")
}

fn is_whole(spinney: &Spinney) {
    let report = spinney.ok("fsck").unwrap();
    assert_eq!(report["damage"], Value::Array(Vec::new()));
}

#[test]
fn equal_pages_of_two_groups_are_stored_twice_and_say_nothing_of_each_other() {
    let spinney = Spinney::new();
    spinney.ok("group create work").unwrap();
    for (name, group) in [("m", None), ("n", None), ("w", Some("work"))] {
        spinney.create_guest_in(group, name, MIB, &cache().join("guest")).unwrap();
    }
    let take = |name: &str| {
        spinney.ok(&format!("start {name}")).unwrap();
        connect(&spinney, name).fill(4, Mix::default()).unwrap();
        let taken = spinney.ok(&format!("take {name} a --mode stop-copy")).unwrap();
        spinney.ok(&format!("kill {name}")).unwrap();
        taken["saved"].clone()
    };
    let first = take("m");
    assert_eq!(number(&first["earlier"]), 0, "the store was empty: {first}");
    let before = (space(&spinney, "default"), spinney.ok("du m").unwrap());
    let other = take("w");
    assert_eq!(
        number(&other["earlier"]) + number(&other["other"]),
        0,
        "another group's pages are not known: {other}"
    );
    let near = number(&first["new"]).abs_diff(number(&other["new"]));
    assert!(near < number(&first["new"]) / 4, "as a fresh store's: {first} {other}");
    assert_eq!(
        (space(&spinney, "default"), spinney.ok("du m").unwrap()),
        before,
        "one says nothing of the other"
    );
    let same = take("n");
    assert!(number(&same["other"]) > SAME_PAGES, "the same group's pages are: {same}");

    // What keeps what is asked inside the group.
    let removed = spinney.ok("rm w@a").unwrap();
    assert_eq!(removed["kept_by"], serde_json::json!(["w (here)"]), "{removed}");
    spinney.ok("undo w").unwrap();
    let removed = spinney.ok("rm m@a").unwrap();
    assert!(
        number(&removed["kept_bytes"]) > 0 && removed["kept_by"].to_string().contains("n@a"),
        "{removed}"
    );
    spinney.ok("gc --now").unwrap();
    is_whole(&spinney);

    // The one's key does not open the other's packs, and only that group suffers.
    let key = folder(&spinney, "work").join("pages/key");
    let own = fs::read(&key).unwrap();
    spinney.ok("serve --stop").unwrap();
    fs::copy(folder(&spinney, "default").join("pages/key"), &key).unwrap();
    spinney.ok("serve --stop").unwrap();
    let shown = spinney.ok("show w").unwrap();
    assert!(shown["group_problem"].to_string().contains("another group"), "{shown}");
    let ended = spinney.run(["goto", "w@a"]);
    assert_eq!(ended.code, Some(6), "{}", ended.stderr);
    assert!(ended.stderr.contains("the group work cannot be used"), "{}", ended.stderr);
    let (_, said) = spinney.plain(&["ls"]);
    assert!(said.contains("the group work cannot be used"), "{said}");
    spinney.ok("goto n@a --paused").unwrap();
    spinney.ok("kill n").unwrap();
    spinney.ok("serve --stop").unwrap();
    fs::write(&key, own).unwrap();
    spinney.ok("goto w@a").unwrap();
    is_whole(&spinney);

    // A group goes when nothing belongs to it any more.
    spinney.ok("kill w").unwrap();
    for (words, code) in [("group rm work --yes", 4), ("group rm default --yes", 4), ("group rm nope", 3)] {
        assert_eq!(spinney.run(words.split(' ')).code, Some(code), "{words}");
    }
    spinney.ok("rm w --yes").unwrap();
    let ended = spinney.run(["group", "rm", "work", "--yes"]);
    assert!(ended.code == Some(4) && ended.stderr.contains("gc --now"), "{}", ended.stderr);
    let work = folder(&spinney, "work");
    spinney.ok("gc --now").unwrap();
    spinney.ok("group rm work --yes").unwrap();
    assert!(!work.exists());
    assert_eq!(spinney.ok("ls").unwrap()["machines"].as_array().map(Vec::len), Some(2));
}

#[test]
fn a_machine_that_was_copied_to_another_group_has_its_memory() {
    let mut spinney = Spinney::new();
    spinney.ok("group create work").unwrap();
    spinney.create_guest_in(None, "m", MIB, &cache().join("guest")).unwrap();
    spinney.ok("start m").unwrap();
    let mut guest = connect(&spinney, "m");
    guest.fill(8, Mix::default()).unwrap();
    guest.log_step(3).unwrap();
    let (nonce, hash) = (guest.nonce().unwrap(), guest.hash().unwrap());
    spinney.ok("take m a").unwrap();
    guest.mutate(5, 300).unwrap();
    guest.log_step(2).unwrap();
    let (later, log) = (guest.hash().unwrap(), guest.log_check().unwrap());
    assert_ne!(later, hash);
    let ended = spinney.run(["edit", "m", "--group", "work"]);
    assert!(ended.code == Some(4) && ended.stderr.contains("spinney suspend m"), "{}", ended.stderr);
    spinney.ok("suspend m").unwrap();
    let before = space(&spinney, "default");
    assert_eq!(number(&space(&spinney, "work")["store_bytes"]), 0);

    // Called off in the middle it has not happened.
    let marker = spinney.folder().join("marker");
    spinney.set("SPINNEY_CRASH", &format!("regroup.layer wait {}", marker.display()));
    spinney.ok("serve --stop").unwrap();
    let command = spinney.under_way("edit m --group work");
    let deadline = Instant::now() + SOON;
    while !marker.exists() {
        assert!(Instant::now() < deadline, "the step was not reached");
        thread::sleep(Duration::from_millis(5));
    }
    command.interrupt();
    // Until the daemon has heard it.
    thread::sleep(Duration::from_millis(300));
    fs::remove_file(&marker).unwrap();
    let ended = command.end();
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    assert_eq!(spinney.ok("show m").unwrap()["group"], "default");
    assert_eq!(fs::read_dir(folder(&spinney, "work").join("layers")).unwrap().count(), 0);
    spinney.ok("gc").unwrap();
    assert_eq!(number(&space(&spinney, "work")["store_bytes"]), 0, "its pages are garbage");
    is_whole(&spinney);

    spinney.ok("edit m --group work").unwrap();
    let shown = spinney.ok("show m").unwrap();
    assert_eq!((&shown["group"], &shown["power"]), (&"work".into(), &"suspended".into()));
    let (copied, stored) = (number(&space(&spinney, "work")["store_bytes"]), number(&before["store_bytes"]));
    assert!(copied > stored / 2 && copied < stored * 2, "{copied} of {stored}");
    is_whole(&spinney);
    spinney.ok("gc").unwrap();
    let left = space(&spinney, "default");
    assert_eq!(
        (number(&left["store_bytes"]), number(&left["disk_bytes"])),
        (0, 0),
        "the old group has nothing of it"
    );

    // Here goes on, and what was taken is what it was.
    spinney.ok("start m").unwrap();
    let mut guest = connect(&spinney, "m");
    assert_eq!((guest.nonce().unwrap(), guest.hash().unwrap()), (nonce.clone(), later));
    let now = guest.log_check().unwrap();
    assert!(now.ok && now.mem >= log.mem, "{now:?} after {log:?}");
    drop(guest);
    spinney.kill_daemon();
    spinney.ok("goto m@a").unwrap();
    let mut guest = connect(&spinney, "m");
    assert_eq!((guest.nonce().unwrap(), guest.hash().unwrap()), (nonce.clone(), hash));
    assert!(guest.log_check().unwrap().ok);
    guest.log_step(1).unwrap();
    spinney.ok("take m b").unwrap();
    drop(guest);
    is_whole(&spinney);

    // Undo copies it back, with what came since.
    spinney.ok("suspend m").unwrap();
    let log = spinney.ok("op log").unwrap();
    let copy = log["operations"]
        .as_array()
        .unwrap()
        .iter()
        .find(|op| op["kind"] == "edit" && op["undoable"] == true);
    let id = copy.expect("it can be undone")["id"].as_str().unwrap().to_owned();
    spinney.ok(&format!("undo {id}")).unwrap();
    assert_eq!(spinney.ok("show m").unwrap()["group"], "default");
    spinney.ok("goto m@b --running").unwrap();
    let mut guest = connect(&spinney, "m");
    assert_eq!((guest.nonce().unwrap(), guest.hash().unwrap()), (nonce, hash));
    assert_eq!(spinney.is_mapped("m").unwrap(), spinney.can_map().unwrap());
    drop(guest);
    spinney.ok("gc --now").unwrap();
    let views = || fs::read_dir(spinney.state().join("views")).unwrap().flatten().count();
    let (can_map, before) = (spinney.can_map().unwrap(), (views(), spinney.views().0.len()));
    assert_eq!(before, if can_map { (2, 2) } else { (0, 0) });
    spinney.ok("group rm work --yes").unwrap();
    is_whole(&spinney);
    // Its view went with it, and the other one is m's.
    assert_eq!(views(), usize::from(can_map));
    let deadline = Instant::now() + SOON;
    while spinney.views().0.len() > usize::from(can_map) {
        assert!(Instant::now() < deadline, "nobody is served any more");
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(connect(&spinney, "m").hash().unwrap(), hash);
}

/// A copy that cannot have room is refused before anything is made; with room it is done.
#[test]
fn a_copy_that_has_no_room_is_not_begun() {
    let Some(disk) = SmallDisk::new(420) else { return };
    let spinney = Spinney::at(&disk.path(), &[]);
    spinney.ok("group create work").unwrap();
    spinney.create_guest_in(None, "m", MIB, &cache().join("guest")).unwrap();
    spinney.ok("start m").unwrap();
    connect(&spinney, "m").fill(8, Mix::default()).unwrap();
    spinney.ok("suspend m").unwrap();
    let stored = number(&space(&spinney, "default")["store_bytes"]);
    disk.fill_but(stored / 2 + (22 << 20));
    let ended = spinney.run(["edit", "m", "--group", "work"]);
    assert_eq!(ended.code, Some(7), "{}", ended.stderr);
    let detail = ended.problem()["detail"].as_str().unwrap_or_default().to_owned();
    assert!(detail.starts_with("copying m takes up to"), "{detail}");
    assert_eq!(fs::read_dir(folder(&spinney, "work").join("layers")).unwrap().count(), 0);
    disk.empty();
    spinney.ok("edit m --group work").unwrap();
    spinney.ok("start m").unwrap();
    assert!(connect(&spinney, "m").log_check().unwrap().ok);
}

/// The ids of a process: user, group, and all other groups.
fn ids(pid: u32) -> (String, String, String) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    (field("Uid:"), field("Gid:"), field("Groups:"))
}

/// The guest's files where everybody can read them.
fn guest_files(spinney: &Spinney) -> PathBuf {
    let folder = spinney.folder().join("files");
    fs::create_dir(&folder).unwrap();
    for file in ["vmlinuz", "initrd.img", "data.img", "cmdline"] {
        fs::copy(cache().join("guest").join(file), folder.join(file)).unwrap();
        fs::set_permissions(folder.join(file), fs::Permissions::from_mode(0o644)).unwrap();
    }
    folder
}

/// Whether a user may do something with a file, with no groups but his own.
fn may(uid: u32, what: &str, file: &Path) -> bool {
    let mut test = std::process::Command::new("test");
    test.arg(what).arg(file).uid(uid).gid(uid).current_dir("/").status().unwrap().success()
}

#[test]
fn as_root_qemu_runs_as_the_owner_of_the_group() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED, and nothing tested: only root can run QEMU as somebody else");
        return;
    }
    let spinney = Spinney::new();
    let mode = |path: &Path, mode: u32| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let files = guest_files(&spinney);
    // The folder of a test is its own: its machines' QEMU would not get to their disks.
    mode(spinney.folder(), 0o700);
    let ended = spinney.run(["group", "create", "theirs", "--owner", "nobody"]);
    assert!(ended.code == Some(5) && ended.stderr.contains("chmod o+x"), "{}", ended.stderr);
    mode(spinney.folder(), 0o711);
    let made = spinney.ok("group create theirs --owner nobody").unwrap();
    assert_eq!((&made["owner"], &made["owner_name"]), (&65_534.into(), &"nobody".into()));

    let own = folder(&spinney, "theirs");
    let rights = |path: &Path| {
        let meta = fs::metadata(path).unwrap();
        (meta.uid(), meta.mode() & 0o777)
    };
    assert_eq!(rights(&own.join("pages/key")), (65_534, 0o600));
    assert_eq!(
        (rights(&own), rights(&own.join("layers"))),
        ((0, 0o711), (0, 0o711)),
        "no link of theirs leads root astray"
    );
    for name in ["pages", "pages/packs", "pages/index"] {
        assert_eq!(rights(&own.join(name)), (0, 0o711), "{name}");
    }
    for file in ["catalog.db", "lock", "daemon.log", "spinney.sock"] {
        assert_eq!(rights(&spinney.state().join(file)), (0, 0o600), "{file}");
    }

    // A file that they cannot read is said before QEMU would.
    mode(&files.join("data.img"), 0o600);
    let refused = spinney.create_guest_in(Some("theirs"), "t", MIB, &files).unwrap_err();
    assert_eq!(refused.code, Some(8), "{refused}");
    assert!(
        refused.stderr.contains("nobody cannot read the disk") && refused.stderr.contains("hint"),
        "{refused}"
    );
    mode(&files.join("data.img"), 0o644);
    spinney.create_guest_in(Some("theirs"), "t", MIB, &files).unwrap();
    spinney.create_guest_in(None, "m", MIB, &files).unwrap();
    mode(&files.join("data.img"), 0o600);
    let ended = spinney.run(["start", "t"]);
    assert!(ended.code == Some(8) && ended.stderr.contains("nobody cannot read"), "{}", ended.stderr);
    mode(&files.join("data.img"), 0o644);

    let started = spinney.ok("start t").unwrap();
    let pid = |machine: &Value| u32::try_from(number(&machine["pid"])).unwrap();
    let (uid, gid, groups) = ids(pid(&started));
    assert_eq!((uid.as_str(), groups.as_str()), ("65534 65534 65534 65534", ""));
    assert!(!gid.split(' ').any(|gid| gid == "0"), "{gid}");
    let mut guest = connect(&spinney, "t");
    guest.fill(4, Mix::default()).unwrap();
    guest.log_step(3).unwrap();
    let (nonce, hash) = (guest.nonce().unwrap(), guest.hash().unwrap());
    for mode in ["stop-copy", "pre-copy"] {
        spinney.ok(&format!("take t {mode} --mode {mode}")).unwrap();
        guest.log_step(1).unwrap();
    }
    spinney.ok("take t any").unwrap();
    guest.mutate(3, 100).unwrap();
    drop(guest);
    for name in ["stop-copy", "pre-copy", "any"] {
        spinney.ok(&format!("goto t@{name}")).unwrap();
        let mut guest = connect(&spinney, "t");
        assert_eq!((guest.nonce().unwrap(), guest.hash().unwrap()), (nonce.clone(), hash), "{name}");
        assert!(guest.log_check().unwrap().ok, "{name}");
        assert_eq!(ids(pid(&spinney.ok("show t").unwrap())).0, "65534 65534 65534 65534");
        assert_eq!(spinney.is_mapped("t").unwrap(), spinney.can_map().unwrap());
    }
    // Whoever serves its memory is its owner too, and reads what is his.
    let (serving, standing_by) = spinney.views();
    for pid in serving.into_iter().chain(standing_by) {
        assert_eq!((ids(pid).0.as_str(), ids(pid).2.as_str()), ("65534 65534 65534 65534", ""));
    }
    for folder in ["pages/packs", "pages/index"] {
        for file in fs::read_dir(own.join(folder)).unwrap().map(|entry| entry.unwrap().path()) {
            // With the access list of one reader; the daemon maps them, and nobody else may change them.
            assert_eq!(rights(&file), (0, 0o640), "{}", file.display());
            assert!(may(65_534, "-r", &file) && !may(65_534, "-w", &file), "{}", file.display());
            assert!(!may(65_533, "-r", &file), "{}", file.display());
        }
    }
    // And he reads his snapshots' files, as nobody else but root does.
    if spinney.can_map().unwrap() {
        let mounted = spinney.ok("mount --group theirs").unwrap();
        let ram = Path::new(mounted["path"].as_str().unwrap()).join("t/any/ram");
        assert!(may(65_534, "-r", &ram) && !may(65_533, "-r", &ram), "{}", ram.display());
    }
    spinney.kill_daemon();
    connect(&spinney, "t").log_step(1).unwrap();
    spinney.ok("suspend t").unwrap();

    // Where nobody else is named, nothing changes; and a copy becomes its new owner's.
    assert_eq!(ids(pid(&spinney.ok("start m").unwrap())).0, "0 0 0 0");
    spinney.ok("suspend m").unwrap();
    spinney.ok("edit m --group theirs").unwrap();
    let machine = spinney.ok("start m").unwrap();
    assert_eq!(ids(pid(&machine)).0, "65534 65534 65534 65534");
    assert!(connect(&spinney, "m").log_check().unwrap().ok);
    for layer in fs::read_dir(own.join("layers")).unwrap().map(|entry| entry.unwrap().path()) {
        assert_eq!(rights(&layer), (65_534, 0o600), "{}", layer.display());
    }
    spinney.ok("kill m").unwrap();
    is_whole(&spinney);
}
