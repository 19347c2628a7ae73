//! Forks on bad days: no room for what they write, and an image below them that is gone or another.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use vm_tests::guest::Guest;
use vm_tests::harness::{Ended, Spinney, cache};
use vm_tests::small_disk::SmallDisk;

fn guest(spinney: &Spinney, name: &str) -> Guest {
    let port = spinney.port(name).unwrap().expect("a process");
    Guest::connect(&port, Duration::from_secs(60)).unwrap()
}

fn wait_for(spinney: &Spinney, name: &str, power: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let machine = spinney.ok(&format!("show {name}")).unwrap();
        if machine["power"] == power {
            return;
        }
        assert!(Instant::now() < deadline, "{name} is not {power}: {machine}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn names(spinney: &Spinney) -> Vec<String> {
    let list = spinney.ok("ls").unwrap();
    let machines = list["machines"].as_array().expect("machines").iter();
    machines.map(|machine| machine["name"].as_str().expect("a name").to_owned()).collect()
}

/// It fails so, says that, and no machine has come of it.
fn refused(spinney: &Spinney, words: &str, code: i32, says: &str) -> Ended {
    let before = (names(spinney), spinney.layers());
    let ended = spinney.run(words.split(' '));
    let problem = ended.problem().to_string();
    assert_eq!(ended.code, Some(code), "{words}: {problem}");
    assert!(problem.contains(says), "{words}: {problem}");
    assert_eq!((names(spinney), spinney.layers()), before, "{words}");
    ended
}

#[test]
fn a_disk_that_is_full_while_forks_write() {
    let Some(disk) = SmallDisk::new(420) else { return };
    let spinney = Spinney::at(&disk.path(), &[]);
    spinney.create_guest("web", 96).unwrap();
    spinney.ok("start web").unwrap();
    let mut source = guest(&spinney, "web");
    source.counter().unwrap();
    spinney.ok("take web x").unwrap();
    spinney.ok("fork web@x -n 3").unwrap();
    let forks = ["web-1", "web-2", "web-3"];
    let mut inside: Vec<Guest> = forks.iter().map(|name| guest(&spinney, name)).collect();
    for (guest, name) in inside.iter_mut().zip(forks) {
        assert_eq!(guest.cmd(&format!("echo {name} > /data/who; sync")).unwrap().0, 0);
    }
    spinney.settle().unwrap();
    disk.fill();
    for guest in &mut inside {
        guest.disk_write(8).unwrap();
    }
    for name in forks {
        wait_for(&spinney, name, "paused");
        let why = spinney.ok(&format!("show {name}")).unwrap()["stopped_because"].to_string();
        assert!(why.contains("no room"), "{name}: {why}");
    }
    // Who writes nothing goes on, and reads memory that it never read before.
    assert!(source.cmd("md5sum /bin/busybox").unwrap().0 == 0);
    refused(&spinney, "fork web@x more", 7, "room");
    refused(&spinney, "fork web more", 7, "room");
    drop(inside);
    disk.empty();
    for name in forks {
        wait_for(&spinney, name, "running");
        let mut guest = guest(&spinney, name);
        guest.disk_write(0).unwrap();
        let (_, said) = guest.cmd("cat /data/who; dmesg | grep -ic error").unwrap();
        assert_eq!(said, format!("{name}\n0\n"), "the guest has seen an error");
    }
    spinney.ok("fork web@x more").unwrap();
    guest(&spinney, "more").counter().unwrap();
}

/// Forks that run go on with the file that they have; new ones are refused until it is back.
#[test]
fn an_image_below_forks_that_is_gone_or_changed() {
    let spinney = Spinney::new();
    // The guest's files, with an image of its own.
    let files = spinney.folder().join("files");
    fs::create_dir(&files).unwrap();
    for file in fs::read_dir(cache().join("guest")).unwrap() {
        let file = file.unwrap().path();
        if file.is_file() {
            fs::copy(&file, files.join(file.file_name().expect("a name"))).unwrap();
        }
    }
    let image = files.join("data.img");
    spinney.create_guest_in(None, "web", 96, &files).unwrap();
    spinney.ok("start web").unwrap();
    let known = guest(&spinney, "web").cmd("md5sum < /data/known").unwrap().1;
    spinney.ok("take web x").unwrap();
    spinney.ok("mount").unwrap();
    spinney.ok("fork web@x before").unwrap();

    let moved = image.with_extension("moved");
    fs::rename(&image, &moved).unwrap();
    let path = image.display().to_string();
    for words in ["fork web@x", "fork web", "fork web@x -n 3", "goto web@x --discard --yes"] {
        let ended = refused(&spinney, words, 6, &path);
        assert!(ended.stderr.contains("put"), "what to do: {}", ended.stderr);
    }
    go_on(&spinney, &known);

    // Another in its place: as large, and not the same.
    fs::copy(&moved, &image).unwrap();
    refused(&spinney, "fork web@x", 6, &path);
    fs::remove_file(&image).unwrap();
    fs::rename(&moved, &image).unwrap();
    spinney.ok("fork web@x after -n 2").unwrap();
    for name in ["after-1", "after-2"] {
        let mut inside = guest(&spinney, name);
        assert_eq!(uncached(&mut inside), known);
    }
}

/// The source and the fork of before run, and read their disks.
fn go_on(spinney: &Spinney, known: &str) {
    for name in ["web", "before"] {
        assert_eq!(uncached(&mut guest(spinney, name)), known, "{name}");
    }
}

/// What the disk itself says.
fn uncached(guest: &mut Guest) -> String {
    guest.cmd("echo 3 > /proc/sys/vm/drop_caches; md5sum < /data/known").unwrap().1
}
