//! Settings of machines: what changes at once, what needs the machine off, and what a snapshot brings back.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;

use serde_json::Value;
use vm_tests::harness::{Spinney, tool};

fn disks(machine: &Value) -> Vec<(String, bool)> {
    let disks = machine["config"]["disks"].as_array().unwrap();
    let disk = |disk: &Value| (disk["id"].as_str().unwrap().to_owned(), disk["read_only"] == true);
    disks.iter().map(disk).collect()
}

fn raw(spinney: &Spinney, name: &str, mib: u64) -> String {
    let path = spinney.folder().join(name);
    File::create(&path).unwrap().set_len(mib << 20).unwrap();
    path.display().to_string()
}

#[track_caller]
fn refused(spinney: &Spinney, words: &str, code: i32, said: &[&str]) {
    let before = spinney.ok("ls").unwrap();
    let ended = spinney.run(words.split(' '));
    assert_eq!(ended.code, Some(code), "{words}: {}", ended.stderr);
    for word in said {
        assert!(ended.stderr.contains(word), "{words}: it says nothing of {word}: {}", ended.stderr);
    }
    assert!(spinney.ok("ls").unwrap() == before, "{words}: something changed");
}

#[test]
fn disks_keep_their_ids_and_a_snapshot_has_those_it_had() {
    let spinney = Spinney::new();
    let image = raw(&spinney, "a.img", 4);
    let before = std::fs::metadata(&image).unwrap().modified().unwrap();
    spinney
        .ok(&format!("create m --memory 64M --network none --disk 8M --disk {image},ro --disk 8M"))
        .unwrap();
    let layers = spinney.layers().len();
    spinney.ok("take m three").unwrap();
    assert_eq!(spinney.layers().len(), layers + 2, "a read-only disk gets no overlay");

    refused(&spinney, "set m --rm-disk disk7 --yes", 3, &["disk7", "disk0, disk1, disk2"]);
    refused(&spinney, "set m --rm-disk disk1", 4, &["--yes"]);
    refused(&spinney, "set m --add-disk /no/such.img", 3, &["/no/such.img"]);
    spinney.ok("set m --rm-disk disk1 --yes").unwrap();
    let ids = |words: &str| disks(&spinney.ok(words).unwrap());
    let has = |list: &[(&str, bool)]| list.iter().map(|(id, ro)| ((*id).to_owned(), *ro)).collect::<Vec<_>>();
    assert_eq!(ids("show m"), has(&[("disk0", false), ("disk2", false)]));
    spinney.ok("set m --add-disk 16M --memory 80M").unwrap();
    assert_eq!(ids("show m"), has(&[("disk0", false), ("disk2", false), ("disk1", false)]));

    spinney.ok("start m").unwrap();
    for (words, what) in [
        ("set m --memory 128M", "memory"),
        ("set m --cpus 2", "CPUs"),
        ("set m --add-disk 8M", "disks"),
        ("set m --rm-disk disk0 --yes", "disks"),
        ("set m --boot disk", "boot"),
        ("set m --display vnc", "display"),
        ("set m --cdrom none", "CD drive"),
    ] {
        refused(&spinney, words, 4, &[what, "spinney stop m"]);
    }
    spinney.ok("set m --autostart").unwrap();
    assert_eq!(spinney.ok("show m").unwrap()["config"]["autostart"], true);
    spinney.ok("take m running").unwrap();

    spinney.ok("gc --now").unwrap();
    spinney.ok("goto m@three").unwrap();
    assert_eq!(ids("show m"), has(&[("disk0", false), ("disk1", true), ("disk2", false)]));
    spinney.ok("start m").unwrap();
    spinney.ok("goto m@running").unwrap();
    let machine = spinney.ok("show m").unwrap();
    assert_eq!((&machine["power"], &machine["config"]["memory"]), (&"running".into(), &(80 << 20).into()));
    assert_eq!(disks(&machine).len(), 3);
    assert_eq!(std::fs::metadata(&image).unwrap().modified().unwrap(), before, "the image was written to");
}

#[test]
fn forwards_open_and_close_at_once_and_goto_stays_beside() {
    let spinney = Spinney::new();
    let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (a, b) = (free(), free());
    let open = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_err();
    refused(
        &spinney,
        &format!("create m --network none --forward {a}:22"),
        2,
        &["network card", &a.to_string()],
    );
    refused(&spinney, &format!("create m --forward {a}:22 --forward {a}:23"), 2, &["same port"]);
    for bad in ["22", "x:22", "0:22", "70000:22", "tcp:1:2:3:4"] {
        refused(&spinney, &format!("create m --forward {bad}"), 2, &[bad]);
    }
    spinney.ok(&format!("create m --memory 64M --forward {a}:22")).unwrap();
    let taken = TcpListener::bind(("127.0.0.1", a)).unwrap();
    refused(&spinney, "start m", 4, &[&a.to_string(), "spinney set m --forward"]);
    drop(taken);
    spinney.ok("start m").unwrap();
    assert!(open(a), "the port leads nowhere");
    spinney.ok("take m one").unwrap();
    spinney.ok(&format!("set m --forward {b}:22")).unwrap();
    assert!(!open(a) && open(b));
    let taken = TcpListener::bind(("127.0.0.1", a)).unwrap();
    refused(&spinney, &format!("set m --forward {a}:22"), 4, &[&a.to_string()]);
    assert!(open(b), "it has what it had");
    refused(&spinney, "goto m@one", 4, &[&a.to_string()]);
    drop(taken);

    let report = spinney.ok("goto m@one").unwrap();
    assert!(report["in_place"].is_null(), "{report}");
    assert!(open(a) && !open(b));
    let report = spinney.ok("goto m@one").unwrap();
    assert!(report["in_place"].is_null() && open(a), "the same port, and still beside: {report}");
    spinney.ok("suspend m").unwrap();
    assert!(!open(a));
    spinney.ok("start m").unwrap();
    assert!(open(a));
    spinney.ok("set m --forward none").unwrap();
    assert!(!open(a));
}

#[test]
fn the_daemon_dies_before_a_port_is_open() {
    let mut spinney = Spinney::new();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let open = || TcpListener::bind(("127.0.0.1", port)).is_err();
    spinney.ok(&format!("create m --memory 64M --forward {port}:22")).unwrap();
    spinney.ok("start m").unwrap();
    spinney.ok("take m one").unwrap();
    let marker = spinney.folder().join("marker");
    spinney.set("SPINNEY_CRASH", &format!("goto.ended kill {}", marker.display()));
    spinney.kill_daemon();
    let _ = spinney.run(["goto", "m@one"]);
    assert!(marker.exists());
    spinney.ok("ls").unwrap();
    assert!(open(), "recovery opens what is missing");
    assert_eq!(spinney.ok("show m").unwrap()["power"], "running");
}

#[test]
fn discs_are_changed_at_once_and_come_back() {
    let spinney = Spinney::new();
    let (a, b) = (raw(&spinney, "a.iso", 1), raw(&spinney, "b.iso", 2));
    refused(&spinney, "create m --cdrom /no/such.iso", 3, &["/no/such.iso"]);
    refused(&spinney, "create m --boot cd", 2, &["CD drive", "--cdrom"]);
    spinney.ok(&format!("create m --memory 64M --network none --cdrom {a} --boot cd --display vnc")).unwrap();
    spinney.ok("start m").unwrap();
    let held = |image: &str| {
        let pid = spinney.machines()[0];
        spinney.open_files(pid).iter().any(|file| file.display().to_string() == image)
    };
    assert!(held(&a));
    spinney.ok("take m one").unwrap();
    spinney.ok("take m live --mode live").unwrap();
    spinney.ok(&format!("set m --cdrom {b}")).unwrap();
    assert!(held(&b) && !held(&a));
    // Another file by the same name.
    std::fs::remove_file(&b).unwrap();
    raw(&spinney, "b.iso", 3);
    assert!(!held(&b));
    spinney.ok(&format!("set m --cdrom {b}")).unwrap();
    assert!(held(&b));
    refused(&spinney, "set m --cdrom /no/such.iso", 3, &["/no/such.iso"]);
    spinney.ok("set m --cdrom none").unwrap();
    assert!(!held(&a) && !held(&b));
    for snapshot in ["one", "live"] {
        spinney.ok(&format!("goto m@{snapshot}")).unwrap();
        assert!(held(&a), "{snapshot} had it in");
    }

    // The screen is there again, after a goto as after a start.
    let path = spinney.ok("show m").unwrap()["vnc"].as_str().expect("a socket").to_owned();
    let mut greeting = [0; 12];
    let mut screen = UnixStream::connect(path).unwrap();
    screen.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"RFB 003.008\n");
    screen.write_all(&greeting).unwrap();

    spinney.ok("kill m").unwrap();
    std::fs::remove_file(&a).unwrap();
    refused(&spinney, "start m", 3, &[&a, "--cdrom none"]);
    spinney.ok("set m --cdrom none").unwrap();
    spinney.ok("start m").unwrap();
    // Snapshots that had it in are worth having without it.
    for snapshot in ["one", "live"] {
        let gone = spinney.ok(&format!("goto m@{snapshot}")).unwrap();
        let warning = gone["warnings"][0].as_str().unwrap_or_default();
        assert!(warning.contains(&a) && warning.contains("empty"), "{gone}");
        let machine = spinney.ok("show m").unwrap();
        assert_eq!(
            (&machine["power"], &machine["config"]["cdrom"]["image"]),
            (&"running".into(), &Value::Null)
        );
    }
}

#[test]
fn a_read_only_disk_may_serve_two_machines_at_once() {
    let spinney = Spinney::new();
    let image = spinney.folder().join("shared.qcow2").display().to_string();
    tool("qemu-img", ["create", "-q", "-f", "qcow2", &image, "8M"]);
    for name in ["m", "n"] {
        spinney.ok(&format!("create {name} --memory 64M --network none --disk {image},ro")).unwrap();
        spinney.ok(&format!("start {name}")).unwrap();
    }
    spinney.ok("take m one").unwrap();
    spinney.ok("goto m@one").unwrap();
    refused(&spinney, "create o --disk 8M,ro", 2, &["read-only"]);
}
