//! Clones of machines that are off.

mod lab;

use std::fs;
use std::path::Path;
use std::process::Command;

use snapshots::{
    CloneOptions, Cloned, Code, Context, DiskSource, Forward, MachineConfig, Result, TakeOptions,
};

use lab::{DISK, Lab, config, layers, qemu_io};

fn options(name: &str, full: bool, dir: Option<&Path>) -> CloneOptions {
    CloneOptions { name: name.into(), full, dir: dir.map(Into::into) }
}

fn clone(lab: &Lab, address: &str, name: &str, full: bool) -> Result<Cloned> {
    lab.engine().clone_target(&Context::new(), address, &options(name, full, None))
}

fn gc(lab: &Lab) {
    lab.engine().gc(&Context::new(), true, false).unwrap();
}

fn is_whole(lab: &Lab) {
    let report = lab.engine().fsck(&Context::new(), false).unwrap();
    assert!(report.damage.is_empty(), "{:?}", report.damage);
}

#[test]
fn a_linked_clone_has_the_disks_of_its_snapshot_and_goes_its_own_way() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.write(0, 1);
    lab.take("one");
    lab.write(0, 2);
    let cloned = clone(&lab, "m@one", "c", false).unwrap();
    assert!(cloned.files.is_empty());
    assert!(lab.holds_in("c", 0, 1) && lab.holds(0, 2));
    lab.write_to("c", 0, 3);
    lab.write(0, 4);
    assert!(lab.holds_in("c", 0, 3) && lab.holds(0, 4));
    lab.goto("one", false);
    assert!(lab.holds(0, 1), "what the clone wrote is its own");
    // The source goes, and everything that only it needs.
    let engine = lab.engine();
    engine.rm(&Context::new(), "m", false).unwrap();
    gc(&lab);
    assert!(lab.holds_in("c", 0, 3));
    is_whole(&lab);
    // And then the clone.
    engine.rm(&Context::new(), "c", false).unwrap();
    gc(&lab);
    assert_eq!(layers(lab.dir.path()), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_clone_of_here_has_what_here_has_now() {
    let lab = Lab::new();
    lab.create("m", vec![DISK, DISK]);
    lab.write(0, 1);
    clone(&lab, "m", "c", false).unwrap();
    lab.write(0, 2);
    assert!(lab.holds_in("c", 0, 1) && lab.holds(0, 2));
    // Another one, of what has changed since; and one of the clone.
    clone(&lab, "m", "d", false).unwrap();
    clone(&lab, "c", "e", false).unwrap();
    lab.write_to("c", 0, 5);
    assert!(lab.holds_in("d", 0, 2) && lab.holds_in("e", 0, 1) && lab.holds_in("c", 0, 5));
    assert!(lab.engine().tree("m").unwrap().snapshots.is_empty(), "no snapshot is left behind");
    lab.take("one");
    lab.write(0, 9);
    lab.goto("one", true);
    assert!(lab.holds(0, 2));
    is_whole(&lab);
}

#[test]
fn a_clone_has_an_identity_of_its_own() {
    let lab = Lab::new();
    let forward: Forward = "2222:22".parse().unwrap();
    let wanted = MachineConfig {
        networks: vec!["user".into(), "user".into()],
        forwards: vec![forward],
        autostart: true,
        ..config(vec![DISK])
    };
    lab.engine().create(&Context::new(), "m", wanted).unwrap();
    let cx = Context::new();
    let cloned = lab.engine().clone_target(&cx, "m", &options("c", false, None)).unwrap().machine;
    let source = lab.engine().machine("m").unwrap();
    assert_ne!(cloned.uuid, source.uuid);
    assert_eq!(cloned.macs.len(), 2);
    assert!(cloned.macs.iter().all(|mac| !source.macs.contains(mac)));
    assert!(cloned.config.forwards.is_empty() && !cloned.config.autostart);
    let warnings = cx.progress.warnings.lock().unwrap().clone();
    assert!(warnings.iter().any(|words| words.contains("forwards")), "{warnings:?}");
    assert_eq!(source.config.forwards, [forward]);
}

#[test]
fn a_full_clone_has_no_tie_left() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.write(0, 1);
    lab.take("one");
    lab.write(8192, 2);
    lab.take("two");
    let before = layers(lab.dir.path());
    clone(&lab, "m@two", "c", true).unwrap();
    let new: Vec<_> = layers(lab.dir.path()).into_iter().filter(|file| !before.contains(file)).collect();
    assert_eq!(new, [lab.here_of("c")]);
    let info = Command::new("qemu-img").args(["info", "--output=json"]).arg(&new[0]).output().unwrap();
    assert!(!String::from_utf8_lossy(&info.stdout).contains("backing-filename"));
    assert!(lab.holds_in("c", 0, 1) && lab.holds_in("c", 8192, 2));
    assert_eq!(lab.engine().machine("c").unwrap().config.disks[0].source, DISK);
    lab.engine().rm(&Context::new(), "m", false).unwrap();
    gc(&lab);
    assert_eq!(layers(lab.dir.path()), new);
    assert!(lab.holds_in("c", 8192, 2));
    is_whole(&lab);
}

#[test]
fn the_files_of_a_full_clone_are_where_one_wants_them() {
    let lab = Lab::new();
    let base = lab.dir.path().join("base.img");
    fs::write(&base, vec![7; 1 << 20]).unwrap();
    lab.create("m", vec![DiskSource::File(base.clone()), DISK]);
    lab.write(4096, 1);
    let folder = lab.dir.path().join("chosen");
    fs::create_dir(&folder).unwrap();
    let options = options("c", true, Some(&folder));
    let cloned = lab.engine().clone_target(&Context::new(), "m", &options).unwrap();
    let files = [folder.join("c-disk0.qcow2"), folder.join("c-disk1.qcow2")];
    assert_eq!(cloned.files, files);
    // Without Spinney, and without what they were made of.
    let bytes = Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .arg(&files[0])
        .arg(folder.join("raw"))
        .status()
        .unwrap();
    assert!(bytes.success());
    let raw = fs::read(folder.join("raw")).unwrap();
    assert_eq!((raw[0], raw[4096], raw[8192], raw.len()), (7, 1, 7, 1 << 20));
    fs::rename(&base, lab.dir.path().join("elsewhere")).unwrap();
    // They are images like others: never written to.
    let was = fs::read(&files[0]).unwrap();
    lab.write_to("c", 0, 9);
    assert!(lab.holds_in("c", 0, 9) && lab.holds_in("c", 8192, 7));
    assert_eq!(fs::read(&files[0]).unwrap(), was);
    fs::rename(lab.dir.path().join("elsewhere"), &base).unwrap();
    is_whole(&lab);
    // Nothing that is there is written over, and nothing of what was begun stays.
    fs::remove_file(&files[0]).unwrap();
    let again = CloneOptions { name: "d".into(), ..options.clone() };
    fs::write(folder.join("d-disk1.qcow2"), "mine").unwrap();
    assert_eq!(lab.code(lab.engine().clone_target(&Context::new(), "m", &again)), Code::Refused);
    assert!(!folder.join("d-disk0.qcow2").exists());
    assert_eq!(fs::read(folder.join("d-disk1.qcow2")).unwrap(), b"mine");
}

#[test]
fn what_cannot_be_cloned_is_refused_and_changes_nothing() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.create("other", vec![DISK]);
    lab.take("one");
    let before = layers(lab.dir.path()).len();
    let code = |address: &str, options: CloneOptions| {
        lab.code(lab.engine().clone_target(&Context::new(), address, &options))
    };
    assert_eq!(code("m@one", options("other", false, None)), Code::Refused);
    assert_eq!(code("m@two", options("c", false, None)), Code::NotFound);
    assert_eq!(code("n", options("c", false, None)), Code::NotFound);
    assert_eq!(code("m@one", options("a/b", false, None)), Code::Usage);
    assert_eq!(code("m@one", options("c", false, Some(lab.dir.path()))), Code::Usage);
    assert_eq!(code("m@one", options("c", true, Some(Path::new("/no/such/folder")))), Code::NotFound);
    // Called off before anything is there.
    for full in [false, true] {
        let cx = Context::new();
        cx.cancel.store(true, std::sync::atomic::Ordering::Relaxed);
        let called_off = lab.engine().clone_target(&cx, "m@one", &options("c", full, None));
        assert_eq!(lab.code(called_off), Code::Interrupted);
    }
    assert_eq!(layers(lab.dir.path()).len(), before);
    assert_eq!(lab.engine().list().unwrap().len(), 2);
}

#[test]
fn a_clone_is_undone_and_done_again() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.write(0, 1);
    clone(&lab, "m", "c", false).unwrap();
    let undone = lab.engine().undo(&Context::new(), None).unwrap();
    assert_eq!(undone.operation, "clone m c");
    assert!(lab.engine().machine("c").is_err());
    lab.engine().undo(&Context::new(), undone.again.as_deref()).unwrap();
    assert!(lab.holds_in("c", 0, 1));
    // It is a machine again.
    lab.engine().take(&Context::new(), "c", TakeOptions::default()).unwrap();
    assert_eq!(lab.engine().undo(&Context::new(), None).unwrap().operation, "take c@snap-1");
    // Taken back it is no machine that anybody works on: asked again, undo goes further back.
    lab.take("one");
    clone(&lab, "m", "d", false).unwrap();
    for undone in ["clone m d", "take m@one"] {
        assert_eq!(lab.engine().undo(&Context::new(), None).unwrap().operation, undone);
    }
}

#[test]
fn a_base_image_that_was_changed_is_not_cloned() {
    let lab = Lab::new();
    let base = lab.dir.path().join("base.qcow2");
    assert!(
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&base)
            .arg("1M")
            .status()
            .unwrap()
            .success()
    );
    lab.create("m", vec![DiskSource::File(base.clone())]);
    lab.take("one");
    qemu_io(&base, "write -P 3 0 4096");
    for full in [false, true] {
        assert_eq!(lab.code(clone(&lab, "m@one", "c", full)), Code::Damaged);
        assert_eq!(lab.code(clone(&lab, "m", "c", full)), Code::Damaged);
    }
}

#[test]
fn clones_of_what_stays_the_same_cost_the_source_nothing() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.write(0, 1);
    clone(&lab, "m", "c", false).unwrap();
    let here = lab.here();
    for n in 0..5 {
        clone(&lab, "m", &format!("c{n}"), n % 2 == 0).unwrap();
        assert!(lab.holds_in(&format!("c{n}"), 0, 1));
    }
    assert_eq!(lab.here(), here);
    // Zeros that were written are something that was written.
    qemu_io(&here, "write -z 0 65536");
    clone(&lab, "m", "z", false).unwrap();
    assert!(lab.holds_in("z", 0, 0) && lab.holds_in("c", 0, 1));
    assert_ne!(lab.here(), here);
    // What is refused freezes nothing.
    let here = lab.here();
    lab.write(0, 2);
    let folder = lab.dir.path().join("chosen");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("f-disk0.qcow2"), "mine").unwrap();
    let refused = lab.engine().clone_target(&Context::new(), "m", &options("f", true, Some(&folder)));
    assert_eq!(lab.code(refused), Code::Refused);
    assert_eq!(
        lab.code(lab.engine().clone_target(
            &Context::new(),
            "m",
            &options("f", true, Some(&lab.dir.path().join("s")))
        )),
        Code::Refused
    );
    assert_eq!(lab.here(), here);
}

#[test]
fn what_a_clone_wrote_is_what_it_wrote() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    qemu_io(&lab.here(), "write -P 1 0 8M");
    lab.take("one");
    clone(&lab, "m@one", "c", false).unwrap();
    lab.write_to("c", 0, 3);
    let taken = lab.engine().take(&Context::new(), "c", TakeOptions::default()).unwrap();
    assert!(taken.disk_bytes < 4 << 20, "{}", taken.disk_bytes);
}

#[test]
fn one_of_two_gets_a_name() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.take("one");
    let made = std::thread::scope(|scope| {
        let both: Vec<_> = (0..2).map(|_| scope.spawn(|| clone(&lab, "m@one", "c", false).is_ok())).collect();
        both.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(made.iter().filter(|made| **made).count(), 1);
    assert_eq!(lab.engine().list().unwrap().len(), 2);
    is_whole(&lab);
}

#[test]
fn a_clone_that_was_not_made_is_not_in_the_way_of_undo() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.take("one");
    assert_eq!(lab.code(clone(&lab, "m@two", "c", false)), Code::NotFound);
    assert!(lab.engine().operations(10).unwrap().iter().all(|op| op.kind != "clone"));
    let cx = Context::new();
    cx.cancel.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(lab.engine().clone_target(&cx, "m@one", &options("c", false, None)).is_err());
    assert_eq!(lab.engine().undo(&Context::new(), None).unwrap().operation, "take m@one");
}
