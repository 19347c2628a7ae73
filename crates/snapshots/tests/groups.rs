//! Groups of machines that are off: what belongs to whom, copying from one to another, a group that cannot be used.

#![cfg(test)]

mod lab;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use lab::{DISK, Lab, config, layers};
use pages::{GroupKey, PAGE_SIZE, PageHash, PageStore, Store};
use snapshots::{Code, Context, DiskSource, Edit, Power, TakeOptions};

fn cx() -> Context {
    Context::new()
}

fn to_group(name: &str) -> Edit {
    Edit { group: Some(name.into()), ..Edit::default() }
}

impl Lab {
    fn group_folder(&self, name: &str) -> PathBuf {
        self.engine().group(name).unwrap().folder
    }

    fn group_layers(&self, name: &str) -> Vec<PathBuf> {
        let folder = self.group_folder(name).join("layers");
        let mut files: Vec<PathBuf> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }

    fn is_whole(&self) {
        let report = self.engine().fsck(&cx(), false).unwrap();
        assert!(report.damage.is_empty(), "{:?}", report.damage);
    }
}

#[test]
fn groups_are_made_and_removed() {
    let mut lab = Lab::new();
    let made = lab.engine().create_group(&cx(), "work", None).unwrap();
    let rights = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(rights(made.folder.clone()), 0o700);
    assert_eq!(rights(made.folder.join("pages/key")), 0o600);
    let key = |group: &str| fs::read_to_string(lab.group_folder(group).join("pages/key")).unwrap();
    assert_ne!(key("work"), key("default"));
    for bad in ["", "-x", "a/b", "..", "a b"] {
        assert_eq!(lab.code(lab.engine().create_group(&cx(), bad, None)), Code::Usage, "{bad}");
    }
    for taken in ["work", "default"] {
        assert_eq!(lab.code(lab.engine().create_group(&cx(), taken, None)), Code::Refused);
    }
    assert_eq!(lab.code(lab.engine().create_group(&cx(), "x", Some("no-such-user"))), Code::NotFound);
    assert_eq!(lab.code(lab.engine().group("nope")), Code::NotFound);
    assert_eq!(lab.code(lab.engine().create_in(&cx(), Some("nope"), "m", config(vec![]))), Code::NotFound);

    lab.engine().create_in(&cx(), Some("work"), "m", config(vec![DISK])).unwrap();
    assert_eq!(lab.engine().machine("m").unwrap().group, "work");
    assert_eq!((lab.group_layers("work").len(), lab.group_layers("default").len()), (1, 0));
    lab.open();
    let names = |lab: &Lab| lab.engine().groups().unwrap().into_iter().map(|g| g.name).collect::<Vec<_>>();
    assert_eq!(names(&lab), ["default", "work"]);
    assert_eq!(lab.engine().group("work").unwrap().targets, ["m"]);

    let refused = lab.engine().rm_group(&cx(), "work").unwrap_err();
    assert_eq!(refused.code(), Code::Refused);
    assert!(
        refused.to_string().contains('m') && refused.hint_text().unwrap().contains("--group"),
        "{refused}"
    );
    lab.engine().rm(&cx(), "m", false).unwrap();
    let refused = lab.engine().rm_group(&cx(), "work").unwrap_err();
    assert!(refused.hint_text().unwrap().contains("gc --now"), "undo still keeps it: {refused}");
    lab.engine().gc(&cx(), true, false).unwrap();
    let plan = lab.engine().rm_group_plan("work").unwrap();
    assert!(!plan.needs_confirmation && plan.bytes == 0, "{plan:?}");
    lab.engine().rm_group(&cx(), "work").unwrap();
    assert!(!made.folder.exists());
    assert_eq!(lab.code(lab.engine().rm_group(&cx(), "work")), Code::NotFound);
    assert_eq!(lab.code(lab.engine().rm_group(&cx(), "default")), Code::Refused);
    lab.open();
    assert_eq!(names(&lab), ["default"]);
}

#[test]
fn a_machine_is_copied_with_its_snapshots_and_undo_copies_it_back() {
    let mut lab = Lab::new();
    let base = lab.dir.path().join("base.img");
    fs::write(&base, vec![0; 1 << 20]).unwrap();
    lab.create("m", vec![DISK, DiskSource::File(base.clone())]);
    for (n, name) in [(1, "a"), (2, "b")] {
        lab.write(n << 20, n as u8);
        lab.take(name);
    }
    lab.goto("a", false);
    lab.write(3 << 20, 3);
    lab.engine().rm(&cx(), "m@b", false).unwrap();
    lab.engine().create_group(&cx(), "work", None).unwrap();
    let (before, tree) = (layers(lab.dir.path()).len(), lab.engine().tree("m").unwrap());

    assert_eq!(lab.code(lab.engine().edit(&cx(), "m", to_group("nope"))), Code::NotFound);
    assert_eq!(lab.code(lab.engine().edit(&cx(), "m@a", to_group("work"))), Code::Usage);
    assert_eq!(lab.code(lab.engine().edit(&cx(), "m", to_group("default"))), Code::Refused);
    let both = Edit { name: Some("n".into()), ..to_group("work") };
    assert_eq!(lab.code(lab.engine().edit(&cx(), "m", both)), Code::Usage);
    let cancelled = cx();
    cancelled.cancel.store(true, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(lab.code(lab.engine().edit(&cancelled, "m", to_group("work"))), Code::Interrupted);
    assert_eq!(
        (lab.group_layers("work").len(), lab.engine().machine("m").unwrap().group.as_str()),
        (0, "default")
    );

    lab.engine().edit(&cx(), "m", to_group("work")).unwrap();
    let machine = lab.engine().machine("m").unwrap();
    assert_eq!((machine.group.as_str(), machine.power), ("work", Power::Off));
    assert_eq!(lab.group_layers("work").len(), before, "each layer of ours once");
    assert!(base.exists());
    // Nothing of the old group is needed any more.
    lab.engine().gc(&cx(), false, false).unwrap();
    assert_eq!(lab.group_layers("default").len(), 0);
    lab.is_whole();
    lab.open();
    assert!(lab.holds(1 << 20, 1) && lab.holds(3 << 20, 3) && !lab.holds(2 << 20, 2));
    let now = lab.engine().tree("m").unwrap();
    let names = |tree: &snapshots::Tree| {
        tree.snapshots.iter().map(|s| (s.id.clone(), s.parent.clone())).collect::<Vec<_>>()
    };
    assert_eq!((names(&now), &now.here), (names(&tree), &tree.here));
    lab.take("c");
    lab.goto("a", true);
    assert!(lab.holds(1 << 20, 1) && !lab.holds(3 << 20, 3));
    // What undo keeps was copied too.
    let log = lab.engine().operations(20).unwrap();
    let removal = log.iter().find(|op| op.kind == "rm").unwrap();
    lab.engine().undo(&cx(), Some(&removal.id)).unwrap();
    lab.goto("b", true);
    assert!(lab.holds(2 << 20, 2));

    let copy =
        lab.engine().operations(20).unwrap().into_iter().find(|op| op.kind == "edit" && op.undoable).unwrap();
    let undone = lab.engine().undo(&cx(), Some(&copy.id)).unwrap();
    assert_eq!(
        (undone.operation.as_str(), lab.engine().machine("m").unwrap().group.as_str()),
        ("edit m (group)", "default")
    );
    lab.is_whole();
    assert!(lab.holds(2 << 20, 2));
    // A redo goes there again; and with its group gone there is no way back.
    lab.engine().undo(&cx(), undone.again.as_deref()).unwrap();
    assert_eq!(lab.engine().machine("m").unwrap().group, "work");
    lab.engine().edit(&cx(), "m", to_group("default")).unwrap();
    lab.engine().gc(&cx(), true, false).unwrap();
    let gone = lab.engine().rm_group(&cx(), "work").unwrap();
    assert_eq!(gone.ends_undo_of, ["edit m (group)"]);
    assert_eq!(lab.code(lab.engine().undo(&cx(), None)), Code::Refused);
    lab.is_whole();
}

#[test]
fn counts_of_a_group_do_not_see_another() {
    let lab = Lab::new();
    lab.engine().create_group(&cx(), "work", None).unwrap();
    lab.create("m", vec![DISK]);
    lab.take("a");
    let of_m = |lab: &Lab| {
        let du = lab.engine().du(Some("m"), &[]).unwrap();
        assert_eq!(du.groups.len(), 1);
        (du.store_bytes, du.disk_bytes, du.reclaimable, du.pinned_by_undo)
    };
    let alone = of_m(&lab);
    lab.engine().create_in(&cx(), Some("work"), "w", config(vec![DISK])).unwrap();
    let options = TakeOptions { name: Some("x".into()), ..TakeOptions::default() };
    lab.engine().take(&cx(), "w", options).unwrap();
    lab.engine().rm(&cx(), "w@x", false).unwrap();
    assert_eq!(of_m(&lab), alone);
    let all = lab.engine().du(None, &[]).unwrap();
    assert_eq!(all.groups.iter().map(|g| g.group.as_str()).collect::<Vec<_>>(), ["default", "work"]);
    assert_eq!(all.groups[0].disk_bytes, alone.1);
    assert_eq!(all.disk_bytes, all.groups.iter().map(|g| g.disk_bytes).sum::<u64>());
    let foreign = lab.engine().du(Some("m"), &["w@x".into()]);
    assert_eq!(lab.code(foreign), Code::NotFound, "it was removed");
    lab.engine().undo(&cx(), None).unwrap();
    assert_eq!(lab.code(lab.engine().du(Some("m"), &["w@x".into()])), Code::Usage);
    let report = lab.engine().gc(&cx(), true, true).unwrap();
    assert_eq!(report.groups.len(), 2);
    assert_eq!(lab.engine().fsck(&cx(), false).unwrap().groups.len(), 2);
}

/// Puts a page into a store that nobody has open, so that its packs tell whose they are.
fn put_page(folder: &std::path::Path) {
    let key = GroupKey::load(&folder.join("pages/key")).unwrap();
    let store = Store::open(folder.join("pages"), key).unwrap();
    let session = store.begin().unwrap();
    session.put(&[7; PAGE_SIZE], &mut [PageHash::ZERO]).unwrap();
    session.commit().unwrap();
}

#[test]
fn a_group_that_cannot_be_used_takes_no_other_down() {
    let mut lab = Lab::new();
    lab.engine().create_group(&cx(), "work", None).unwrap();
    lab.create("m", vec![DISK]);
    lab.engine().create_in(&cx(), Some("work"), "w", config(vec![DISK])).unwrap();
    let (work, own) = (lab.group_folder("work"), lab.group_folder("default"));
    let key = fs::read_to_string(work.join("pages/key")).unwrap();
    lab.engine = None;
    put_page(&work);
    fs::copy(own.join("pages/key"), work.join("pages/key")).unwrap();

    let notes = lab.open();
    assert!(notes.iter().any(|note| note.contains("the group work cannot be used")), "{notes:?}");
    assert!(lab.engine().machine("w").unwrap().group_problem.unwrap().contains("another group"));
    assert_eq!(lab.engine().list().unwrap().len(), 2);
    lab.take("a");
    for result in [
        lab.engine().take(&cx(), "w", TakeOptions::default()).map(drop),
        lab.engine().start(&cx(), "w").map(drop),
        lab.engine().edit(&cx(), "w", to_group("default")).map(drop),
        lab.engine().edit(&cx(), "m", to_group("work")).map(drop),
        lab.engine().create_in(&cx(), Some("work"), "x", config(vec![])).map(drop),
        lab.engine().du(Some("w"), &[]).map(drop),
    ] {
        let error = result.unwrap_err();
        assert_eq!(
            (error.code(), error.to_string().as_str()),
            (Code::Damaged, "the group work cannot be used")
        );
        assert!(!error.causes().is_empty() && error.hint_text().is_some());
    }
    let gc = lab.engine().gc(&cx(), true, false).unwrap();
    assert!(gc.groups[0].problem.is_none() && gc.groups[1].problem.is_some(), "{gc:?}");
    let fsck = lab.engine().fsck(&cx(), true).unwrap();
    assert_eq!(fsck.damage.len(), 1, "{fsck:?}");
    assert!(lab.engine().du(None, &[]).unwrap().groups[1].problem.is_some());
    // It can be given up, and that taken back.
    lab.engine().rm(&cx(), "w", false).unwrap();
    lab.engine().undo(&cx(), Some("w")).unwrap();

    fs::remove_file(work.join("pages/key")).unwrap();
    lab.open();
    assert!(lab.engine().group("work").unwrap().problem.unwrap().contains("its key is gone"));
    assert!(!work.join("pages/key").exists(), "no new key is made for old packs");
    fs::write(work.join("pages/key"), key).unwrap();
    assert_eq!(lab.open(), Vec::<String>::new());
    lab.engine().take(&cx(), "w", TakeOptions::default()).unwrap();
    lab.is_whole();
}

#[test]
fn a_folder_that_the_catalog_does_not_know_is_cleared_away() {
    let mut lab = Lab::new();
    let stray = lab.dir.path().join("s/groups/0123456789abcdef");
    fs::create_dir_all(stray.join("pages/packs")).unwrap();
    lab.open();
    assert!(!stray.exists());
    assert!(lab.group_folder("default").exists());
}
