//! Undo, and undo of undo, on a machine that is off.

mod lab;

use std::path::PathBuf;
use std::process::Command;

use snapshots::{Code, Context, Edit, GotoPower, Operation, TakeOptions};

use lab::{DISK, Lab, layers};

/// Undoes the last operation; returns the id that does it again.
fn undo(lab: &Lab) -> String {
    let undone = lab.engine().undo(&Context::new(), None).unwrap();
    assert!(!undone.redone);
    undone.again.unwrap()
}

fn redo(lab: &Lab, id: &str) {
    let undone = lab.engine().undo(&Context::new(), Some(id)).unwrap();
    assert!(undone.redone && undone.again.is_none());
}

fn here(lab: &Lab) -> Option<String> {
    lab.engine().machine("m").unwrap().parent
}

fn last(lab: &Lab, kind: &str) -> Operation {
    lab.engine().operations(100).unwrap().into_iter().find(|op| op.kind == kind).unwrap()
}

#[test]
fn a_take_is_undone_and_done_again() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.take("one");
    lab.write(0, 1);
    lab.take("two");
    lab.write(0, 2);
    for _ in 0..2 {
        let id = undo(&lab);
        assert_eq!((lab.names(), here(&lab).as_deref()), (vec!["one".into()], Some("one")));
        redo(&lab, &id);
        assert_eq!((lab.names().len(), here(&lab).as_deref()), (2, Some("two")));
        assert_eq!(last(&lab, "redo").subject, "take m@two");
        let error = lab.engine().undo(&Context::new(), Some(&id)).unwrap_err();
        assert_eq!(error.code(), Code::Refused, "an undo is undone once: {error}");
    }
    assert!(lab.holds(0, 2), "here was not touched");
    undo(&lab);
    undo(&lab);
    assert!(lab.names().is_empty(), "take after take, as far as there are any");
    assert_eq!(lab.engine().undo(&Context::new(), None).unwrap_err().code(), Code::NotFound);
}

#[test]
fn what_threw_something_away_is_not_passed_over() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.take("one");
    lab.goto("one", false);
    let before = last(&lab, "goto").id;
    lab.take("two");
    undo(&lab);
    lab.goto("one", true);
    let error = lab.engine().undo(&Context::new(), None).unwrap_err();
    assert_eq!(error.code(), Code::Refused, "the goto before is not what was meant: {error}");
    // The undo in between would be a redo.
    assert!(error.hint_text().is_some_and(|hint| hint.contains(&before)), "{:?}", error.hint_text());
}

#[test]
fn an_edit_takes_back_what_it_changed_and_nothing_else() {
    let lab = Lab::new();
    lab.create("m", vec![]);
    lab.take("one");
    let edit = |address: &str, name: &str, note: Option<&str>| {
        let edit = Edit { name: Some(name.into()), note: note.map(Into::into), ..Edit::default() };
        lab.engine().edit(&Context::new(), address, edit).unwrap();
        last(&lab, "edit")
    };
    let noted = edit("m@one", "one", Some("a note"));
    assert_eq!(noted.changed, ["note"]);
    edit("m@one", "two", None);
    lab.engine().undo(&Context::new(), Some(&noted.id)).unwrap();
    assert_eq!(lab.names(), ["two"], "the name was so already");
    assert_eq!(lab.engine().snapshot("m@two").unwrap().note, "");
}

#[test]
fn undo_is_about_one_machine() {
    let lab = Lab::new();
    lab.create("m", vec![]);
    lab.create("other", vec![]);
    lab.take("one");
    lab.engine().take(&Context::new(), "other", TakeOptions::default()).unwrap();
    undo(&lab);
    let error = lab.engine().undo(&Context::new(), None).unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "m was not worked on last: {error}");
    assert_eq!(lab.names(), ["one"]);
    lab.engine().undo(&Context::new(), Some("m")).unwrap();
    assert!(lab.names().is_empty());
}

#[test]
fn an_undo_point_that_gets_a_name_is_a_snapshot_and_numbers_are_not_given_twice() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.take("one");
    lab.goto("one", false);
    let edit = Edit { name: Some("precious".into()), ..Edit::default() };
    lab.engine().edit(&Context::new(), "m@undo-1", edit).unwrap();
    let mut names = vec![];
    for _ in 0..8 {
        let report = lab.engine().goto(&Context::new(), "m@one", GotoPower::Recorded, false).unwrap();
        names.push(report.undo_point.unwrap().name);
        lab.engine().gc(&Context::new(), true, false).unwrap();
    }
    assert_eq!(names, ["undo-2", "undo-3", "undo-4", "undo-5", "undo-6", "undo-7", "undo-8", "undo-9"]);
    assert_eq!(lab.names(), ["one", "precious"]);
}

#[test]
fn a_goto_swings_between_what_was_and_what_is() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.take("one");
    lab.write(0, 1);
    lab.take("two");
    lab.write(0, 2);
    lab.goto("one", false);
    lab.write(0, 3);
    let mut id = undo(&lab);
    assert!(lab.holds(0, 2));
    assert_eq!(here(&lab).as_deref(), Some("two"), "where it was before the goto");
    for _ in 0..2 {
        redo(&lab, &id);
        assert!(lab.holds(0, 3), "what was written after the goto is there again");
        assert_eq!(here(&lab).as_deref(), Some("one"));
        id = undo(&lab);
        assert!(lab.holds(0, 2));
        assert_eq!(here(&lab).as_deref(), Some("two"));
    }
    assert!(lab.engine().fsck(&Context::new(), false).unwrap().damage.is_empty());
}

#[test]
fn rm_and_edit_are_undone_and_done_again() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.take("one");
    lab.engine().rm(&Context::new(), "m@one", false).unwrap();
    let id = undo(&lab);
    assert_eq!(lab.names(), ["one"]);
    lab.engine().protect(&Context::new(), "m@one", true).unwrap();
    let error = lab.engine().undo(&Context::new(), Some(&id)).unwrap_err();
    assert_eq!(error.code(), Code::Refused, "{error}");
    lab.engine().protect(&Context::new(), "m@one", false).unwrap();
    redo(&lab, &id);
    assert!(lab.names().is_empty());
    undo(&lab);

    let edit =
        Edit { name: Some("uno".into()), note: Some("first".into()), keep: Some(true), ..Edit::default() };
    lab.engine().edit(&Context::new(), "m@one", edit).unwrap();
    let id = undo(&lab);
    assert!(!lab.engine().snapshot("m@one").unwrap().keep);
    redo(&lab, &id);
    let snapshot = lab.engine().snapshot("m@uno").unwrap();
    assert_eq!((snapshot.note.as_str(), snapshot.keep), ("first", true));

    lab.engine().rm(&Context::new(), "m", false).unwrap();
    let id = undo(&lab);
    redo(&lab, &id);
    assert_eq!(lab.code(lab.engine().machine("m")), Code::NotFound);
    undo(&lab);
    assert_eq!(lab.names(), ["uno"]);
}

#[test]
fn a_name_that_was_taken_meanwhile_is_not_taken_twice() {
    let lab = Lab::new();
    lab.create("m", vec![]);
    lab.take("one");
    let id = undo(&lab);
    lab.take("one");
    let error = lab.engine().undo(&Context::new(), Some(&id)).unwrap_err();
    assert_eq!(error.code(), Code::Refused, "{error}");
    assert_eq!(lab.names(), ["one"]);
}

#[test]
fn undo_pins_a_tenth_of_the_store_at_most_and_a_gibibyte_in_any_case() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.take("base");
    let large = |name: &str| -> PathBuf {
        let layer = lab.here();
        lab.take(name);
        let sized = Command::new("fallocate").args(["--length", "700M"]).arg(&layer).status().unwrap();
        assert!(sized.success());
        lab.goto("base", true);
        layer
    };
    let (first, second) = (large("first"), large("second"));
    lab.engine().rm(&Context::new(), "m@first", false).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(5));
    lab.engine().gc(&Context::new(), false, false).unwrap();
    assert!(first.exists(), "700 MiB are less than a gibibyte");
    lab.engine().rm(&Context::new(), "m@second", false).unwrap();
    let plan = lab.engine().gc(&Context::new(), false, true).unwrap();
    assert_eq!(plan.ends_undo_of, ["rm m@first"]);
    lab.engine().gc(&Context::new(), false, false).unwrap();
    assert!(!first.exists() && second.exists(), "the oldest goes first");
    undo(&lab);
    assert_eq!(lab.names(), ["base", "second"]);
    assert_eq!(layers(lab.dir.path()).len(), 3, "of base, second, and here");
    assert!(lab.engine().fsck(&Context::new(), false).unwrap().damage.is_empty());
}

#[test]
fn an_operation_is_found_by_the_beginning_of_its_id_whatever_its_names_are_now() {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab.take("one");
    lab.take("two");
    let engine = lab.engine();
    engine.goto(&Context::new(), "m@one", GotoPower::Recorded, false).unwrap();
    let goto = last(&lab, "goto");
    let renamed = |address: &str, name: &str| {
        let edit = Edit { name: Some(name.into()), ..Edit::default() };
        engine.edit(&Context::new(), address, edit).unwrap()
    };
    assert_eq!(renamed("m@two", "zwei").address, "m@zwei");
    assert_eq!(last(&lab, "edit").changed, ["name"]);
    assert_eq!(renamed("m", "n").address, "n");
    // What is so already leaves no entry that undo would begin with.
    let entry = last(&lab, "edit").id;
    for (address, name) in [("n@zwei", "zwei"), ("n", "n")] {
        assert!(!renamed(address, name).changed);
    }
    assert_eq!(last(&lab, "edit").id, entry);
    // The log has the names of its time; ids mean the same as ever.
    assert_eq!(last(&lab, "take").subject, "m@two");
    let beginning = |id: &str| id.chars().take(8).collect::<String>();
    engine.undo(&Context::new(), Some(&beginning(&goto.id))).unwrap();
    assert_eq!(engine.machine("n").unwrap().parent.as_deref(), Some("zwei"));
    engine.undo(&Context::new(), Some(&beginning(&last(&lab, "take").id))).unwrap();
    assert_eq!(engine.machine("n").unwrap().parent.as_deref(), Some("one"));
    for unknown in ["", "g", "0123456789abcdef", &goto.id[..3], &format!("{}0", goto.id)] {
        let error = engine.undo(&Context::new(), Some(unknown)).unwrap_err();
        assert_eq!(error.code(), Code::NotFound, "{unknown:?}: {error}");
    }
}
