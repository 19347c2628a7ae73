//! Depth is free: frozen layers settle, and no QEMU has more than a few of them open, one that runs included.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use vm_tests::guest::Guest;
use vm_tests::harness::{Spinney, cache, tool};

/// Layers of a disk that a QEMU may have open (issue: no more than 32).
const MOST: usize = 32;

fn guest(spinney: &Spinney, name: &str) -> Guest {
    let port = spinney.port(name).unwrap().expect("a process");
    Guest::connect(&port, Duration::from_secs(60)).unwrap()
}

/// Disk layers that a machine's QEMU has open.
fn open_layers(spinney: &Spinney, name: &str) -> usize {
    let pid = spinney.ok(&format!("show {name}")).unwrap()["pid"].as_u64().expect("a process") as u32;
    let layer = |path: &Path| path.parent().is_some_and(|folder| folder.ends_with("layers"));
    let mut files = spinney.open_files(pid);
    files.retain(|path| layer(path));
    files.sort();
    files.dedup();
    files.len()
}

fn write(guest: &mut Guest, number: usize) {
    let words = format!("echo {number} > /data/n; echo {number} > /data/n-{number}; sync");
    assert_eq!(guest.cmd(&words).unwrap().0, 0);
}

/// All that was written up to a number is there, and nothing later.
fn check(guest: &mut Guest, number: usize) {
    let (_, said) = guest
        .cmd("cat /data/n; ls /data | grep -c '^n-'; echo 3 > /proc/sys/vm/drop_caches; cat /data/n-*")
        .unwrap();
    let lines: Vec<usize> = said.lines().filter_map(|line| line.parse().ok()).collect();
    let mut written = lines[2..].to_vec();
    written.sort_unstable();
    assert_eq!((lines[0], lines[1], written), (number, number, (1..=number).collect()), "{said}");
}

#[test]
fn a_running_machine_has_few_layers_open_however_often_it_is_taken() {
    let spinney = Spinney::new();
    spinney.create_guest("m", 96).unwrap();
    spinney.ok("start m").unwrap();
    let mut inside = guest(&spinney, "m");
    let mut most = 0;
    for number in 1..=90 {
        write(&mut inside, number);
        let mode = if number % 10 == 0 { "" } else { " --disk-only" };
        spinney.ok(&format!("take m t{number}{mode}")).unwrap();
        most = most.max(open_layers(&spinney, "m"));
        assert!(most <= MOST, "{most} layers open after take {number}");
    }
    check(&mut inside, 90);
    // The guest has written on in between, over disks that were exchanged below it.
    write(&mut inside, 91);
    check(&mut inside, 91);
    drop(inside);
    spinney.settle().unwrap();
    for number in [90, 10, 50, 90] {
        spinney.ok(&format!("goto m@t{number} --discard --yes")).unwrap();
        assert!(open_layers(&spinney, "m") <= 10, "{} open", open_layers(&spinney, "m"));
        check(&mut guest(&spinney, "m"), number);
    }
    spinney.ok("fork m@t50 other").unwrap();
    check(&mut guest(&spinney, "other"), 50);
    // From power on, and with nobody who serves but a successor.
    spinney.ok("kill m").unwrap();
    spinney.ok("start m").unwrap();
    spinney.kill_views();
    check(&mut guest(&spinney, "m"), 90);
    // What nothing needs any more goes, and what is needed of it stays.
    for number in 1..=89 {
        spinney.ok(&format!("rm m@t{number}")).unwrap();
    }
    spinney.ok("gc --now").unwrap();
    check(&mut guest(&spinney, "m"), 90);
    assert_eq!(spinney.ok("fsck").unwrap()["damage"], json!([]));
}

#[test]
fn the_check_notices_chains_that_are_not_kept_short() {
    let mut spinney = Spinney::new();
    spinney.set("SPINNEY_FAULT", "never-shorten");
    spinney.create_guest("m", 96).unwrap();
    spinney.ok("start m").unwrap();
    for number in 1..=40 {
        spinney.ok(&format!("take m t{number} --disk-only")).unwrap();
    }
    assert!(open_layers(&spinney, "m") > MOST);
}

#[test]
fn the_check_notices_a_layer_that_settles_into_something_else() {
    let mut spinney = Spinney::new();
    spinney.set("SPINNEY_FAULT", "unsettled-zero");
    spinney.create_guest("m", 96).unwrap();
    spinney.ok("start m").unwrap();
    let mut inside = guest(&spinney, "m");
    for number in 1..=12 {
        write(&mut inside, number);
        spinney.ok(&format!("take m t{number} --disk-only")).unwrap();
    }
    drop(inside);
    spinney.settle().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    spinney.ok("goto m@t12 --discard --yes --running").unwrap();
    // The whole disk is zeros to whoever reads it so: the guest, which does not find its file system, and the host.
    assert!(!guest(&spinney, "m").hello().unwrap().data, "it has no disk");
    let mounted = spinney.ok("mount").unwrap();
    let disk = Path::new(mounted["path"].as_str().unwrap()).join("m/t12/disk0.raw");
    let bytes = fs::read(disk).unwrap();
    assert_eq!((bytes.len(), bytes.iter().any(|byte| *byte != 0)), (256 << 20, false));
}

/// Images of the user's: raw; qcow2 with compressed clusters, which have to be unpacked; and those whose data lies in other files.
#[test]
fn disks_over_images_of_any_kind_settle() {
    let spinney = Spinney::new();
    let data = cache().join("guest/data.img");
    let kinds = [
        ("packed.qcow2", "qcow2", "compression_type=zlib"),
        ("flat.vmdk", "vmdk", "subformat=monolithicFlat"),
        ("extents.vmdk", "vmdk", "subformat=twoGbMaxExtentFlat"),
        ("outside.qcow2", "qcow2", "data_file=DATA"),
    ];
    let outside = spinney.folder().join("outside.data").display().to_string();
    let images = kinds.map(|(name, format, options)| {
        let image = spinney.folder().join(name).display().to_string();
        let options = options.replace("DATA", &outside);
        let mut words = vec!["convert", "-f", "raw", "-O", format, "-o", options.as_str()];
        words.extend((name == "packed.qcow2").then_some("-c"));
        let made = tool("qemu-img", words.into_iter().chain([data.to_str().unwrap(), &image]));
        assert!(made.status.success(), "{name}: {}", String::from_utf8_lossy(&made.stderr));
        image
    });
    spinney.create_guest_without_memory("m", 96).unwrap();
    for image in &images {
        spinney.ok(&format!("set m --add-disk {image}")).unwrap();
    }
    spinney.ok("take m t0").unwrap();
    spinney.ok("start m").unwrap();
    let mut inside = guest(&spinney, "m");
    let disks = ["b", "c", "d", "e"];
    let mount =
        disks.map(|disk| format!("mkdir -p /{disk} && mount -t ext4 /dev/vd{disk} /{disk}")).join(" && ");
    assert_eq!(inside.cmd(&mount).unwrap().0, 0);
    let known = inside.cmd("md5sum < /data/known").unwrap().1;
    for number in 1..=20 {
        let write = disks.map(|disk| format!("echo {number} > /{disk}/n-{number}")).join("; ");
        assert_eq!(inside.cmd(&format!("{write}; sync")).unwrap().0, 0);
        spinney.ok(&format!("take m t{number} --disk-only")).unwrap();
    }
    drop(inside);
    spinney.settle().unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    loop {
        spinney.ok("goto m@t20 --discard --yes --running").unwrap();
        if open_layers(&spinney, "m") <= 8 * (1 + disks.len()) {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{} layers are open", open_layers(&spinney, "m"));
        std::thread::sleep(Duration::from_millis(500));
    }
    let mut inside = guest(&spinney, "m");
    assert_eq!(inside.cmd(&mount).unwrap().0, 0);
    for disk in disks {
        assert_eq!(inside.cmd(&format!("md5sum < /{disk}/known")).unwrap().1, known, "{disk}");
        let written = inside.cmd(&format!("cat /{disk}/n-* | sort -n | tail -n 1; ls /{disk}/n-* | wc -l"));
        assert_eq!(written.unwrap().1, "20\n20\n", "{disk}");
    }
    drop(inside);
    // Every block, those that the guest did not look at among them, of the disks as they were before anything was written.
    let mounted = spinney.ok("mount").unwrap();
    let folder = Path::new(mounted["path"].as_str().unwrap()).join("m/t0");
    for number in 0..=disks.len() {
        let shown = folder.join(format!("disk{number}.raw"));
        assert!(tool("cmp", [&data, &shown]).status.success(), "{} is not the image", shown.display());
    }
}

/// What a settled disk needs of the page store counts as needed, is looked at, and is made again from the layers' files.
#[test]
fn a_settled_map_that_is_damaged_is_named_and_settles_again() {
    let spinney = Spinney::new();
    spinney.create_guest("m", 96).unwrap();
    spinney.ok("start m").unwrap();
    let mut inside = guest(&spinney, "m");
    write(&mut inside, 1);
    spinney.ok("take m t1 --disk-only").unwrap();
    spinney.ok("mount").unwrap();
    let du = spinney.ok("du").unwrap();
    assert_eq!(du["reclaimable"], json!(0), "maps of settled disks are needed: {du}");
    spinney.ok("gc --now").unwrap();
    // Nothing but the nodes of those maps was ever stored.
    let packs = spinney.packs();
    assert!(!packs.is_empty());
    for pack in &packs {
        let mut bytes = fs::read(pack).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(pack, bytes).unwrap();
    }
    let found = spinney.run(["fsck"]);
    assert_eq!(found.code, Some(6), "{}", found.stderr);
    let named = found.document["damage"].to_string();
    assert!(named.contains("m@t1"), "{named}");
    let mended = spinney.run(["fsck", "--repair"]);
    assert_eq!((mended.code, &mended.document["damage"]), (Some(0), &json!([])), "{}", mended.stderr);
    spinney.ok("mount").unwrap();
    assert_eq!(spinney.ok("fsck").unwrap()["damage"], json!([]));
    drop(inside);
    spinney.ok("goto m@t1 --discard --yes --running").unwrap();
    check(&mut guest(&spinney, "m"), 1);
}

/// The daemon dies while a layer settles, or when a running machine's chain has just been shortened.
#[test]
fn a_death_in_the_middle_of_settling_costs_nothing() {
    let mut spinney = Spinney::new();
    spinney.create_guest("m", 96).unwrap();
    spinney.ok("start m").unwrap();
    let mut inside = guest(&spinney, "m");
    let mut number = 0;
    for step in ["settle.stored", "settle.written", "shorten.reopened"] {
        let marker = spinney.folder().join(step);
        spinney.set("SPINNEY_CRASH", &format!("{step} kill {}", marker.display()));
        spinney.kill_daemon();
        let done = spinney.folder().join(format!("{step}.done"));
        while !done.exists() {
            number += 1;
            assert!(number < 120, "{step} is reached");
            write(&mut inside, number);
            // The daemon may be gone in the middle of it.
            let _ = spinney.run(["take", "m", &format!("t{number}"), "--disk-only"]);
        }
        spinney.set("SPINNEY_CRASH", "");
        check(&mut inside, number);
        write(&mut inside, number + 1);
        number += 1;
        spinney.ok(&format!("take m t{number} --disk-only")).unwrap();
    }
    drop(inside);
    spinney.settle().unwrap();
    spinney.ok("kill m").unwrap();
    spinney.ok("start m").unwrap();
    check(&mut guest(&spinney, "m"), number);
    assert_eq!(spinney.ok("fsck").unwrap()["damage"], json!([]));
}
