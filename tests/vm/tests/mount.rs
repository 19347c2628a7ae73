//! Snapshots as folders of plain files.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use vm_tests::guest::Guest;
use vm_tests::harness::{Spinney, cache, tool};
use vm_tests::underway::reached;

fn guest(spinney: &Spinney, name: &str) -> Guest {
    let port = spinney.port(name).unwrap().expect("a process");
    Guest::connect(&port, Duration::from_secs(60)).unwrap()
}

fn names(folder: &Path) -> String {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names.join(" ")
}

/// Waits until a file is there: disks settle in the background.
fn there(path: &Path) -> PathBuf {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !path.exists() {
        assert!(Instant::now() < deadline, "{} is there", path.display());
        thread::sleep(Duration::from_millis(100));
    }
    path.to_owned()
}

fn contains(path: &Path, words: &str) -> bool {
    let bytes = fs::read(path).unwrap();
    bytes.windows(words.len()).any(|part| part == words.as_bytes())
}

#[test]
fn every_snapshot_is_a_folder_of_plain_files() {
    let spinney = Spinney::new();
    spinney.create_guest("web", 96).unwrap();
    spinney.ok("start web").unwrap();
    let mut inside = guest(&spinney, "web");
    inside.cmd("echo a-word-of-the-memory > /word; echo a-word-of-the-disk > /data/word; sync").unwrap();
    spinney.ok("take web one").unwrap();
    let link = spinney.folder().join("snapshots");
    let mounted = spinney.ok(&format!("mount {}", link.display())).unwrap();
    assert_eq!(mounted["path"].as_str().unwrap(), link.display().to_string());
    assert_eq!((names(&link).as_str(), names(&link.join("web")).as_str()), ("web", "one"));
    let one = link.join("web/one");
    assert_eq!(names(&one), "device-state disk0.raw ram snapshot.json");
    let document: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(one.join("snapshot.json")).unwrap()).unwrap();
    assert_eq!((document["name"].as_str(), document["target"].as_str()), (Some("one"), Some("web")));
    assert_eq!(fs::metadata(one.join("ram")).unwrap().len(), 96 << 20);
    assert!(contains(&one.join("ram"), "a-word-of-the-memory"));
    assert!(contains(&one.join("disk0.raw"), "a-word-of-the-disk"));
    // A whole disk: a tool of the host's finds its file system, and all in it.
    // In a copy, because the journal is to be gone through first, as at the next mount.
    let copy = spinney.folder().join("copy.raw");
    fs::copy(one.join("disk0.raw"), &copy).unwrap();
    let checked = |how: &str| {
        let checked = tool("e2fsck", [how.as_ref(), copy.as_os_str()]);
        (checked.status.code(), String::from_utf8_lossy(&checked.stdout).into_owned())
    };
    // It goes through the journal, mends only what nobody has to be asked about, and says 1 if it has written.
    let (code, words) = checked("-fp");
    assert!(matches!(code, Some(0 | 1)), "{code:?}: {words}");
    let (code, words) = checked("-fn");
    assert_eq!(code, Some(0), "{words}");
    let dumped = tool("debugfs", ["-R".as_ref(), "cat /word".as_ref(), copy.as_os_str()]);
    assert_eq!(String::from_utf8_lossy(&dumped.stdout), "a-word-of-the-disk\n");
    fs::remove_file(&copy).unwrap();
    // What comes later appears; nothing changes what was; the numbers of files stay.
    let number = fs::metadata(one.join("ram")).unwrap().ino();
    inside.cmd("echo another-word > /data/word; sync").unwrap();
    spinney.ok("take web two").unwrap();
    assert_eq!(names(&link.join("web")), "one two");
    assert!(contains(&there(&link.join("web/two/disk0.raw")), "another-word"));
    assert!(!contains(&one.join("disk0.raw"), "another-word"));
    spinney.kill_views();
    assert_eq!(fs::metadata(one.join("ram")).unwrap().ino(), number);
    assert!(contains(&one.join("ram"), "a-word-of-the-memory"));
    spinney.ok("edit web@two --name second").unwrap();
    assert_eq!(names(&link.join("web")), "one second");
    spinney.ok("rm web@one").unwrap();
    assert_eq!(names(&link.join("web")), "second");
    spinney.ok("undo").unwrap();
    assert_eq!(names(&link.join("web")), "one second");
    // The daemon is no part of it, and its next one goes on.
    spinney.kill_daemon();
    assert!(contains(&one.join("ram"), "a-word-of-the-memory"));
    spinney.ok("take web three").unwrap();
    there(&link.join("web/three/ram"));
    assert!(fs::write(one.join("ram"), "x").is_err() && fs::write(link.join("x"), "x").is_err());
    let refused = spinney.run(["mount", &cache().display().to_string()]);
    assert_eq!(refused.code, Some(4), "{}", refused.stderr);
}

/// The mistake this guards against: `gc` looks which layers are named in the page store and removes the file of one that `mount` is about to
/// name; later takes leave pages on it.
#[test]
fn gc_and_mount_wait_for_each_other() {
    let mut spinney = Spinney::new();
    let marker = spinney.folder().join("marker");
    spinney.set("SPINNEY_CRASH", &format!("mount.begun wait {}", marker.display()));
    let mount = spinney.under_way("mount");
    reached(&marker, "mount.begun");
    let mut gc = spinney.under_way("gc --now");
    // Long enough for a collection of nothing.
    thread::sleep(Duration::from_secs(3));
    assert!(!gc.has_ended(), "gc has not waited");
    fs::remove_file(&marker).unwrap();
    for command in [mount, gc] {
        let ended = command.end();
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }
}

#[test]
fn a_screen_is_a_picture() {
    let spinney = Spinney::new();
    let guest_files = cache().join("guest");
    let file = |name: &str| guest_files.join(name).display().to_string();
    let words = ["create", "web", "--memory", "96M", "--network", "none", "--display", "vnc", "--kernel"];
    let mut words: Vec<String> = words.map(str::to_owned).to_vec();
    words.extend([
        file("vmlinuz"),
        "--initrd".into(),
        file("initrd.img"),
        "--append".into(),
        "console=ttyS0".into(),
    ]);
    spinney.run(words).done().unwrap();
    spinney.ok("start web").unwrap();
    thread::sleep(Duration::from_secs(2));
    spinney.ok("take web x").unwrap();
    let mounted = spinney.ok("mount").unwrap();
    let folder = Path::new(mounted["path"].as_str().unwrap()).join("web/x");
    assert!(fs::read(folder.join("screen.png")).unwrap().starts_with(b"\x89PNG"));
}
