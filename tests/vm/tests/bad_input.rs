//! What people get wrong: each mistake has its exit code, names the thing, and leaves nothing half made.

use std::fs::File;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use vm_tests::harness::{Spinney, kill, tool};

/// Exit codes of the contract.
const USAGE: i32 = 2;
const NOT_FOUND: i32 = 3;
const REFUSED: i32 = 4;
const PRECONDITION: i32 = 5;

/// Runs a command that must fail with `code`, name all `words` in what it says, and change neither the list of machines,
/// nor a tree, nor a layer. Words of the command are split at spaces.
#[track_caller]
fn fails(spinney: &Spinney, command: &str, code: i32, words: &[&str]) {
    fails_with(spinney, &command.split(' ').collect::<Vec<_>>(), code, words);
}

#[track_caller]
fn fails_with(spinney: &Spinney, command: &[&str], code: i32, words: &[&str]) {
    let look = || {
        let list = spinney.ok("ls").expect("ls");
        (list, spinney.ok("tree").expect("tree"), spinney.layers())
    };
    let before = look();
    let ended = spinney.run(command);
    let problem = ended.problem();
    assert_eq!(ended.code, Some(code), "{}: {}", ended.command, ended.stderr);
    assert!(ended.document.is_null(), "{}: a failure prints no document: {}", ended.command, ended.document);
    let said = format!("{} {} {}", problem["detail"], problem["cause"], problem["hint"]);
    for word in words {
        assert!(said.contains(word), "{}: it says nothing of {word}: {said}", ended.command);
    }
    assert!(look() == before, "{}: something changed", ended.command);
}

/// A machine without a guest, off.
fn with_machine() -> Spinney {
    let spinney = Spinney::new();
    spinney.ok("create web --memory 64M --disk 8M --network none").expect("a machine");
    spinney
}

#[test]
fn names_that_are_unknown_taken_or_impossible() {
    let spinney = with_machine();
    spinney.ok("take web base").unwrap();
    for verb in ["show", "start", "stop", "kill", "pause", "resume", "take", "tree", "back", "protect", "rm"]
    {
        fails(&spinney, &format!("{verb} nosuch"), NOT_FOUND, &["nosuch"]);
    }
    for verb in ["show", "goto", "rm", "protect", "edit --name x"] {
        fails(&spinney, &format!("{verb} web@nosuch"), NOT_FOUND, &["web@nosuch", "spinney tree web"]);
    }
    fails(&spinney, "goto web@~9", NOT_FOUND, &["web", "9"]);
    fails(&spinney, "create web --disk 8M", REFUSED, &["web", "another name"]);
    fails(&spinney, "take web base", REFUSED, &["web@base", "another name"]);
    let long = "a".repeat(65);
    for name in [".web", "_web", "a@b", "a/b", "ä", "a:b", &long] {
        fails(&spinney, &format!("create {name}"), USAGE, &["name", "letters, digits"]);
        fails(&spinney, &format!("take web {name}"), USAGE, &["name", "letters, digits"]);
    }
    fails_with(&spinney, &["create", "a b"], USAGE, &["a b"]);
    fails_with(&spinney, &["create", ""], USAGE, &["name"]);
    fails(&spinney, "rm web@", USAGE, &["web@", "web@~1"]);
    fails(&spinney, "goto web", USAGE, &["web", "web@SNAP"]);
    fails(&spinney, "take web@base", USAGE, &["web@base"]);
    fails_with(&spinney, &["take", "web", "-m", &"x".repeat(5000)], USAGE, &["5000", "4096"]);
    fails(&spinney, "undo 0123456789abcdef", NOT_FOUND, &["0123456789abcdef"]);
    fails(&spinney, "op cancel 0123456789abcdef", NOT_FOUND, &["0123456789abcdef"]);
    fails(&spinney, "frobnicate web", USAGE, &["frobnicate"]);
}

#[test]
fn what_is_protected_or_off_or_needs_a_yes() {
    let spinney = with_machine();
    spinney.ok("take web base").unwrap();
    spinney.ok("protect web@base").unwrap();
    fails(&spinney, "rm web@base", REFUSED, &["web@base", "spinney unprotect"]);
    fails(&spinney, "rm web --yes", REFUSED, &["web@base", "spinney unprotect"]);
    spinney.ok("unprotect web@base").unwrap();
    spinney.ok("protect web").unwrap();
    fails(&spinney, "rm web --yes", REFUSED, &["web", "spinney unprotect"]);
    spinney.ok("unprotect web").unwrap();
    fails(&spinney, "rm web", REFUSED, &["--yes"]);
    fails(&spinney, "goto web@base --discard", REFUSED, &["--yes"]);
    for verb in ["stop", "kill", "pause", "resume"] {
        fails(&spinney, &format!("{verb} web"), REFUSED, &["web is off", "spinney start web"]);
    }
    spinney.ok("start web").unwrap();
    fails(&spinney, "start web", REFUSED, &["web"]);
    fails(&spinney, "rm web --yes", REFUSED, &["web", "spinney stop web"]);
    fails(&spinney, "stop web --timeout 1s", 9, &["web", "spinney kill web"]);
    spinney.ok("kill web").unwrap();
    spinney.ok("rm web@base").unwrap();
    spinney.ok("rm web --yes").unwrap();
}

#[test]
fn disks_that_cannot_be_used() {
    let spinney = with_machine();
    let folder = spinney.folder().display().to_string();
    fails(&spinney, "create b --disk /no/such.img", NOT_FOUND, &["/no/such.img"]);
    fails(&spinney, &format!("create b --disk {folder}"), USAGE, &[&folder, "not a file"]);
    for size in ["0", "0M", "16E", "8E", "1K", "999999999999999999999G"] {
        fails(&spinney, &format!("create b --disk {size}"), USAGE, &[]);
    }
    let text = spinney.folder().join("text.qcow2");
    std::fs::write(&text, "QFI\u{fffd}").unwrap();
    let overlay = spinney.folder().join("overlay.qcow2").display().to_string();
    let base = spinney.folder().join("base.qcow2").display().to_string();
    tool("qemu-img", ["create", "-q", "-f", "qcow2", &base, "8M"]);
    tool("qemu-img", ["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &overlay]);
    fails(
        &spinney,
        &format!("create b --disk {overlay}"),
        PRECONDITION,
        &[&overlay, &base, "qemu-img convert"],
    );
    let empty = spinney.folder().join("empty.img").display().to_string();
    File::create(&empty).unwrap();
    fails(&spinney, &format!("create b --disk {empty}"), USAGE, &[&empty, "is empty", "--disk 10G"]);
    tool("qemu-img", ["create", "-q", "-f", "qcow2", &empty, "0"]);
    fails(&spinney, &format!("create b --disk {empty}"), USAGE, &[&empty, "is empty"]);
    // One disk is good and the other is not: the good one's layer goes too.
    fails(&spinney, "create b --disk 8M --disk /no/such.img", NOT_FOUND, &["/no/such.img"]);

    let holder = Holder::new(&base);
    fails(&spinney, &format!("create b --disk {base}"), REFUSED, &[&base, "in use"]);
    drop(holder);
    spinney.ok(&format!("create b --disk {base} --memory 64M --network none")).unwrap();
    let holder = Holder::new(&base);
    fails(&spinney, "start b", REFUSED, &["in use"]);
    drop(holder);
    File::options().write(true).open(&base).unwrap().set_len(16 << 20).unwrap();
    fails(&spinney, "start b", 6, &[&base, "changed"]);
}

#[test]
fn an_image_that_is_missing_at_a_take() {
    let spinney = Spinney::new();
    let base = spinney.folder().join("base.qcow2");
    let name = base.display().to_string();
    tool("qemu-img", ["create", "-q", "-f", "qcow2", &name, "8M"]);
    spinney.ok(&format!("create b --disk {name} --memory 64M --network none")).unwrap();
    spinney.ok("start b").unwrap();
    assert!(spinney.ok("take b sound").unwrap()["warnings"].is_null());
    let elsewhere = spinney.folder().join("elsewhere");
    std::fs::rename(&base, &elsewhere).unwrap();
    // Its memory is worth keeping, and the image may come back.
    let taken = spinney.ok("take b lame").unwrap();
    let warnings = taken["warnings"].to_string();
    for words in [name.as_str(), "missing", "nothing can go to this snapshot"] {
        assert!(warnings.contains(words), "{taken}");
    }
    let (_, said) = spinney.plain(&["take", "b", "-q"]);
    assert!(said.contains("warning: ") && said.contains(&name), "{said}");
    fails(&spinney, "goto b@lame", 6, &[&name, "missing"]);
    std::fs::rename(&elsewhere, &base).unwrap();
    assert!(spinney.ok("take b whole").unwrap()["warnings"].is_null());
    spinney.ok("goto b@lame").unwrap();
}

#[test]
fn a_second_console() {
    let spinney = with_machine();
    fails(&spinney, "console web", REFUSED, &["web is off", "spinney start web"]);
    spinney.ok("start web").unwrap();
    let mut first = spinney.begin(&["console", "web"]);
    let deadline = Instant::now() + Duration::from_secs(20);
    let lock = || spinney.runs().iter().any(|run| run.join("console.lock").exists());
    while !lock() {
        assert!(Instant::now() < deadline, "the console does not open");
        thread::sleep(Duration::from_millis(10));
    }
    let words = ["console of web", "open already", &format!("process {}", first.id()), "Ctrl-]"];
    fails(&spinney, "console web", REFUSED, &words);
    // However it ends, the next one gets in: until its machine ends.
    kill(first.id());
    first.wait().unwrap();
    let mut second = spinney.begin(&["console", "web"]);
    thread::sleep(Duration::from_millis(500));
    assert!(second.try_wait().unwrap().is_none(), "it was refused");
    spinney.ok("kill web").unwrap();
    assert!(second.wait().unwrap().success());
}

/// Another program that has an image open for writing: a virtual machine of somebody else's.
struct Holder(Child);

impl Holder {
    fn new(image: &str) -> Self {
        let child = Command::new("qemu-system-x86_64")
            .args(["-S", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none", "-drive"])
            .arg(format!("if=virtio,format=qcow2,file={image}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("QEMU");
        let holder = Self(child);
        let deadline = Instant::now() + Duration::from_secs(10);
        // Only a second writer is refused a raw image.
        while tool("qemu-io", ["-f", "raw", "-c", "quit", image]).status.success() {
            assert!(Instant::now() < deadline, "the other QEMU does not lock {image}");
            thread::sleep(Duration::from_millis(10));
        }
        holder
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        kill(self.0.id());
        let _ = self.0.wait();
    }
}

#[test]
fn memory_that_is_too_little_or_too_much() {
    let spinney = with_machine();
    for size in ["0", "1K", "15M", "5000000G", "-1G", "1.5G"] {
        fails(&spinney, &format!("create b --memory={size}"), USAGE, &[]);
    }
    fails(&spinney, "create b --cpus 0", USAGE, &["cpus"]);
    fails(&spinney, "create b --cpus 100000", USAGE, &["100000"]);
    fails(
        &spinney,
        "create b --memory 4000G",
        PRECONDITION,
        &["b with 4000 GiB", "could never start", "--memory"],
    );
    // All that the host has, of which others have some.
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total = text.lines().next().and_then(|line| line.split_whitespace().nth(1)).unwrap();
    let mib = total.parse::<u64>().unwrap() / 1024;
    spinney.ok(&format!("create big --memory {mib}M --network none")).unwrap();
    fails(&spinney, "start big", PRECONDITION, &[&format!("{mib} MiB"), "less --memory"]);
}

#[test]
fn no_qemu() {
    let mut spinney = with_machine();
    spinney.ok("serve --stop").unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while spinney.daemon().is_some() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    spinney.set("SPINNEY_QEMU", "/nonexistent/qemu");
    fails(&spinney, "create b --disk 8M", PRECONDITION, &["QEMU", "/nonexistent/qemu", "SPINNEY_QEMU"]);
    fails(&spinney, "start web", PRECONDITION, &["QEMU", "SPINNEY_QEMU"]);
}

#[test]
fn a_device_that_cannot_be_migrated() {
    let spinney = Spinney::new();
    let nvme = [
        "--network",
        "none",
        "--memory",
        "64M",
        "--disk",
        "8M",
        "--qemu-arg=-blockdev",
        "--qemu-arg=null-co,node-name=n0,read-zeroes=on",
        "--qemu-arg=-device",
        "--qemu-arg=nvme,drive=n0,serial=1",
    ];
    fails_with(&spinney, &[&["create", "b"], &nvme[..]].concat(), PRECONDITION, &["nvme", "--no-memory"]);
    let bad = ["create", "b", "--qemu-arg=-device", "--qemu-arg=nosuchdevice"];
    fails_with(&spinney, &bad, 1, &["nosuchdevice", "--qemu-arg"]);

    spinney.run([&["create", "b", "--no-memory"], &nvme[..]].concat()).done().unwrap();
    spinney.ok("start b").unwrap();
    fails(&spinney, "take b", PRECONDITION, &["b", "--no-memory", "--disk-only"]);
    let taken = spinney.ok("take b --disk-only").unwrap();
    assert_eq!((&taken["mode"], &taken["power"]), (&"disk-only".into(), &"off".into()));
    spinney.ok("kill b").unwrap();
    assert_eq!(spinney.ok("take b").unwrap()["mode"], "off");
}

#[test]
fn a_chain_that_is_too_deep_where_disks_cannot_be_read_as_one() {
    let mut spinney = with_machine();
    spinney.set("SPINNEY_VIEW", "off");
    spinney.kill_daemon();
    // The machine's own empty disk is the first layer; every take adds one.
    for n in 1..200 {
        spinney.ok("take web").unwrap_or_else(|error| panic!("take {n}: {error}"));
    }
    fails(&spinney, "take web one-more", REFUSED, &["web", "200", "earlier snapshot"]);
    // The way out that the hint names.
    spinney.ok("goto web@snap-150").unwrap();
    spinney.ok("take web branch").unwrap();
}
