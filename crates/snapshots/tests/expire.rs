//! Expiry, on a machine that is off; nobody looks but the test.

mod lab;

use std::thread::sleep;
use std::time::Duration;

use snapshots::{Code, Context, Edit, OpState, TakeOptions};

use lab::{DISK, Lab};

fn take(lab: &Lab, name: &str, seconds: u64) {
    let options =
        TakeOptions { name: Some(name.into()), expire_seconds: Some(seconds), ..TakeOptions::default() };
    lab.engine().take(&Context::new(), "m", options).unwrap();
}

/// Names of the snapshots that the catalog has a time for.
fn rows(lab: &Lab) -> u32 {
    let catalog = rusqlite::Connection::open(lab.dir.path().join("s/catalog.db")).unwrap();
    catalog.query_row("SELECT count(*) FROM expiry", [], |row| row.get(0)).unwrap()
}

fn lab() -> Lab {
    let lab = Lab::new();
    lab.create("m", vec![DISK]);
    lab
}

#[test]
fn the_next_look_is_when_the_next_one_goes_and_within_a_minute() {
    let lab = lab();
    let minute = Duration::from_secs(60);
    assert_eq!(lab.engine().expire(), minute);
    take(&lab, "week", 7 * 86_400);
    assert_eq!(lab.engine().expire(), minute);
    take(&lab, "soon", 20);
    let next = lab.engine().expire();
    assert!((Duration::from_secs(1)..=Duration::from_secs(20)).contains(&next), "{next:?}");
    assert_eq!(lab.names().len(), 2);
}

#[test]
fn what_has_expired_is_undone_once_and_its_row_goes_with_it() {
    let mut lab = lab();
    take(&lab, "one", 1);
    lab.take("two");
    take(&lab, "three", 1);
    sleep(Duration::from_millis(1100));
    // A daemon that was away has missed nothing.
    lab.open();
    lab.engine().expire();
    assert_eq!(lab.names(), ["two"]);
    let log = lab.engine().operations(10).unwrap();
    let gone: Vec<_> = log.iter().filter(|op| op.kind == "expire").collect();
    assert!(gone.iter().all(|op| op.state == OpState::Done && op.undoable));
    assert_eq!(gone.iter().map(|op| op.subject.as_str()).collect::<Vec<_>>(), ["m@three", "m@one"]);
    assert_eq!(rows(&lab), 2, "a tombstone has its row");
    lab.engine().undo(&Context::new(), Some("m")).unwrap();
    assert_eq!((lab.names(), rows(&lab)), (vec!["two".into(), "three".into()], 1));
    lab.engine().expire();
    assert_eq!(lab.names(), ["two", "three"], "it stays");
    lab.engine().gc(&Context::new(), true, false).unwrap();
    assert_eq!(rows(&lab), 0);
}

#[test]
fn keep_and_an_expiry_exclude_each_other_and_times_have_bounds() {
    let lab = lab();
    let refused = |seconds, keep| {
        let options = TakeOptions { expire_seconds: Some(seconds), keep, ..TakeOptions::default() };
        lab.code(lab.engine().take(&Context::new(), "m", options))
    };
    assert_eq!(refused(60, true), Code::Usage);
    assert_eq!(refused(0, false), Code::Usage);
    assert_eq!(refused(u64::MAX, false), Code::Usage);
    take(&lab, "one", 60);
    let edit = |change: Edit| lab.engine().edit(&Context::new(), "m@one", change);
    let keep = |keep| Edit { keep: Some(keep), ..Edit::default() };
    assert_eq!(lab.code(edit(Edit { expire_seconds: Some(60), ..keep(true) })), Code::Usage);
    edit(keep(true)).unwrap();
    assert_eq!(rows(&lab), 0);
    assert_eq!(lab.code(edit(Edit { expire_seconds: Some(60), ..Edit::default() })), Code::Refused);
    edit(Edit { expire_seconds: Some(60), ..keep(false) }).unwrap();
    assert!(lab.engine().snapshot("m@one").unwrap().expires.is_some());
    edit(Edit { expire_seconds: Some(0), ..Edit::default() }).unwrap();
    assert_eq!(rows(&lab), 0);
    lab.engine().undo(&Context::new(), None).unwrap();
    assert!(lab.engine().snapshot("m@one").unwrap().expires.is_some());
}
