//! The tree of a machine that is off.

mod lab;

use snapshots::{Code, Context, DiskSource, Edit, Engine, GotoPower, OpState, Power, Settings, TakeOptions};

use lab::{DISK, Lab, config, layers};

#[test]
fn disks_go_back_and_branches_do_not_disturb_each_other() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.write(0, 1);
    lab.take("one");
    lab.write(0, 2);
    lab.take("two");
    lab.write(0, 3);
    lab.goto("one", false);
    assert!(lab.holds(0, 1));
    lab.write(0, 4);
    lab.take("branch");
    lab.goto("two", true);
    assert!(lab.holds(0, 2) && !lab.holds(0, 4));
    lab.goto("branch", true);
    assert!(lab.holds(0, 4));
    let tree = lab.engine().tree("m").unwrap();
    let parent = |name: &str| {
        let one = tree.snapshots.iter().find(|s| s.name == name).unwrap();
        let id = one.parent.clone()?;
        Some(tree.snapshots.iter().find(|s| s.id == id).unwrap().name.clone())
    };
    assert_eq!((parent("two").as_deref(), parent("branch").as_deref()), (Some("one"), Some("one")));
    assert_eq!(tree.machine.parent.as_deref(), Some("branch"));
}

#[test]
fn what_a_goto_would_lose_comes_back_by_undo() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.take("one");
    lab.write(0, 7);
    lab.goto("one", false);
    assert!(!lab.holds(0, 7));
    lab.engine().undo(&Context::new(), None).unwrap();
    assert!(lab.holds(0, 7));
}

#[test]
fn rm_takes_the_name_and_gc_only_what_nobody_needs() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.write(0, 1);
    lab.take("one");
    lab.write(4096, 2);
    lab.take("two");
    let before = layers(lab.dir.path()).len();
    let plan = lab.engine().rm(&Context::new(), "m@one", false).unwrap();
    assert!(plan.kept_bytes > 0 && plan.kept_by == ["m@two", "m (here)"], "{plan:?}");
    assert_eq!(lab.names(), ["two"]);
    lab.engine().gc(&Context::new(), true, false).unwrap();
    assert_eq!(layers(lab.dir.path()).len(), before, "every layer is under `two` or here");
    lab.goto("two", true);
    assert!(lab.holds(0, 1) && lab.holds(4096, 2));

    lab.take("leaf");
    lab.write(8192, 9);
    lab.goto("two", true);
    lab.engine().rm(&Context::new(), "m@leaf", false).unwrap();
    assert_eq!(lab.engine().gc(&Context::new(), false, false).unwrap().layers, 2, "what two gotos discarded");
    lab.engine().undo(&Context::new(), None).unwrap();
    assert_eq!(lab.names(), ["two", "leaf"], "undo pins what rm took away");
    lab.engine().rm(&Context::new(), "m@leaf", false).unwrap();
    let report = lab.engine().gc(&Context::new(), true, false).unwrap();
    assert_eq!((report.layers, report.ends_undo_of.len()), (1, 1), "{report:?}");
    assert!(lab.engine().fsck(&Context::new(), false).unwrap().damage.is_empty());
}

#[test]
fn a_machine_is_removed_and_comes_back() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.write(0, 5);
    lab.take("one");
    lab.engine().rm(&Context::new(), "m", false).unwrap();
    assert_eq!(lab.code(lab.engine().machine("m")), Code::NotFound);
    lab.engine().undo(&Context::new(), None).unwrap();
    lab.goto("one", true);
    assert!(lab.holds(0, 5));
    lab.engine().rm(&Context::new(), "m", false).unwrap();
    lab.engine().gc(&Context::new(), true, false).unwrap();
    assert!(layers(lab.dir.path()).is_empty());
}

#[test]
fn what_is_refused_changes_nothing() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.take("one");
    let (engine, cx) = (lab.engine(), Context::new);
    assert_eq!(lab.code(engine.rm(&cx(), "m@", false)), Code::Usage);
    assert_eq!(lab.code(engine.rm(&cx(), "m@two", false)), Code::NotFound);
    assert_eq!(lab.code(engine.create(&cx(), "m", config(vec![]))), Code::Refused);
    let again = TakeOptions { name: Some("one".into()), ..TakeOptions::default() };
    assert_eq!(lab.code(engine.take(&cx(), "m", again)), Code::Refused);
    let long = TakeOptions { note: "x".repeat(5000), ..TakeOptions::default() };
    assert_eq!(lab.code(engine.take(&cx(), "m", long)), Code::Usage);
    engine.protect(&cx(), "m@one", true).unwrap();
    assert_eq!(lab.code(engine.rm(&cx(), "m@one", false)), Code::Refused);
    assert_eq!(lab.code(engine.rm(&cx(), "m", false)), Code::Refused, "its snapshot is protected");
    engine.protect(&cx(), "m@one", false).unwrap();
    let folder = config(vec![DiskSource::File("/etc".into())]);
    assert_eq!(lab.code(engine.create(&cx(), "n", folder)), Code::Usage);
    assert_eq!(engine.list().unwrap().len(), 1);
    assert_eq!(layers(lab.dir.path()).len(), 2);
    assert_eq!(lab.names(), ["one"]);
}

#[test]
fn names_and_notes_are_edited_and_the_edit_undone() {
    let lab = Lab::new();
    lab.create("m", vec![]);
    lab.take("one");
    let edit = Edit { name: Some("uno".into()), note: Some("first".into()), ..Edit::default() };
    assert_eq!(lab.engine().edit(&Context::new(), "m@one", edit).unwrap().address, "m@uno");
    lab.engine().undo(&Context::new(), None).unwrap();
    let snapshot = lab.engine().snapshot("m@one").unwrap();
    assert_eq!(snapshot.note, "");
    let edit = Edit { name: Some("web".into()), ..Edit::default() };
    assert_eq!(lab.engine().edit(&Context::new(), "m", edit).unwrap().address, "web");
    assert_eq!(lab.engine().machine("web").unwrap().power, Power::Off);
}

#[test]
fn an_image_of_the_users_is_not_written_and_a_change_is_noticed() {
    let lab = Lab::new();
    let image = lab.dir.path().join("base.raw");
    std::fs::write(&image, vec![7u8; 1 << 20]).unwrap();
    lab.create("m", vec![DiskSource::File(image.clone())]);
    lab.write(0, 9);
    lab.take("one");
    assert!(lab.holds(0, 9) && lab.holds(8192, 7));
    assert!(std::fs::read(&image).unwrap().iter().all(|b| *b == 7));
    std::fs::write(&image, vec![8u8; 1 << 20]).unwrap();
    let error = lab.engine().start(&Context::new(), "m").unwrap_err();
    assert_eq!(error.code(), Code::Damaged);
    assert!(error.to_string().contains("base.raw"), "{error}");
    let report = lab.engine().fsck(&Context::new(), false).unwrap();
    assert_eq!(report.damage.len(), 1);
    assert!(report.damage[0].snapshots.contains(&"m@one".to_owned()), "{report:?}");
}

#[test]
fn a_missing_layer_is_named_and_the_other_branch_is_usable() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.take("root");
    lab.write(0, 1);
    let lost = lab.here();
    lab.take("bad");
    lab.goto("root", true);
    lab.write(0, 2);
    lab.take("good");
    std::fs::remove_file(&lost).unwrap();
    let report = lab.engine().fsck(&Context::new(), false).unwrap();
    assert_eq!(report.damage.len(), 1, "{report:?}");
    assert_eq!(report.damage[0].snapshots, ["m@bad"]);
    let gone = lab.engine().goto(&Context::new(), "m@bad", GotoPower::Recorded, false);
    assert_eq!(lab.code(gone), Code::Damaged);
    lab.goto("good", false);
    assert!(lab.holds(0, 2));
}

#[test]
fn one_process_has_the_state_folder_and_the_next_finds_everything() {
    let mut lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.take("one");
    let state = lab.engine().state().to_owned();
    let second = Engine::open(Settings { state, qemu: None, qemu_img: None, accel: None, warden: None });
    assert_eq!(second.unwrap_err().code(), Code::Refused);
    let stray = lab.here().with_file_name("stray.qcow2");
    std::fs::write(&stray, "left by a crash").unwrap();
    assert!(lab.open().is_empty());
    assert!(!stray.exists(), "a layer that the catalog does not know is removed");
    assert_eq!(lab.names(), ["one"]);
}

#[test]
fn the_chain_has_an_end_and_says_so() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    for _ in 0..199 {
        lab.engine().take(&Context::new(), "m", TakeOptions::default()).unwrap();
    }
    let error = lab.engine().take(&Context::new(), "m", TakeOptions::default()).unwrap_err();
    assert_eq!(error.code(), Code::Refused);
    assert!(error.hint_text().is_some_and(|h| h.contains("branch")), "{error:?}");
    assert_eq!(layers(lab.dir.path()).len(), 200, "the refused take left nothing");
    let log = lab.engine().operations(1).unwrap();
    assert_eq!((log[0].kind.as_str(), log[0].state), ("take", OpState::Failed));
    lab.goto("snap-1", false);
    lab.take("branch");
}
