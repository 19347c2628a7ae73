//! Collections beside sessions: what a session relies on stays, what nobody needs goes.

use std::path::PathBuf;
use std::sync::Arc;

use super::crash_disk::CrashDisk;
use super::{SMALL, check_all, names, pages};
use crate::planted::{Mistake, making};
use crate::store::Limits;
use crate::*;

fn store(limits: Limits) -> (CrashDisk, Store) {
    let disk = CrashDisk::default();
    let key = GroupKey::from_bytes([5; 32]);
    let store = Store::open_on(Arc::new(disk.clone()), PathBuf::from("/"), &key, limits, None).unwrap();
    (disk, store)
}

fn take(store: &Store, numbers: &[u64]) -> MapRoot {
    let session = store.begin().unwrap();
    finish(session, numbers)
}

fn finish(session: Box<dyn Session>, numbers: &[u64]) -> MapRoot {
    let mut hashes = names(numbers.len());
    session.put(&pages(numbers), &mut hashes).unwrap();
    let root = session.put_map(&hashes).unwrap();
    session.commit().unwrap();
    root
}

fn run(store: &Store, plan: &GcPlan) -> GcDone {
    store.run_gc(plan, &|_, _| true).unwrap()
}

#[test]
fn frees_what_the_plan_says() {
    let (_disk, store) = store(SMALL);
    // Sixteen pages fill a pack; their node goes to the next.
    let dead = take(&store, &(1..17).collect::<Vec<_>>());
    let live = take(&store, &[1, 2, 3]);
    let before = store.allocated().unwrap().packs;
    let plan = store.plan_gc(&[live]).unwrap();
    assert_eq!((plan.delete.len(), plan.rewrite.len(), plan.in_use), (1, 1, 0));
    let done = run(&store, &plan);
    assert_eq!((done.deleted, done.rewritten, done.skipped, done.stopped), (1, 1, 0, false));
    assert_eq!(before - store.allocated().unwrap().packs, done.freed_bytes);
    assert_eq!(plan.freed_bytes, done.freed_bytes);
    check_all(&store, &[(live, vec![1, 2, 3])]).unwrap();
    assert!(store.map_range(&dead, 0, &mut names(1)).is_err());
    assert!(store.plan_gc(&[live]).unwrap().is_empty());
    // Carried out twice, a plan finds nothing.
    assert_eq!(run(&store, &plan).skipped, 2);
}

#[test]
fn can_be_stopped() {
    let (_disk, store) = store(SMALL);
    take(&store, &[1, 2, 3]);
    let plan = store.plan_gc(&[]).unwrap();
    let done = store.run_gc(&plan, &|_, _| false).unwrap();
    assert_eq!(done, GcDone { stopped: true, ..GcDone::default() });
    assert_eq!(store.pack_count(), 1);
}

/// A session finds garbage in the store, relies on it, and the collector comes.
fn hit_then_collect(limits: Limits, plan_first: bool) -> std::result::Result<(), String> {
    let (_disk, store) = store(limits);
    take(&store, &[1, 2, 3]);
    let early = plan_first.then(|| store.plan_gc(&[]).unwrap());
    let session = store.begin().unwrap();
    let mut hashes = names(2);
    session.put(&pages(&[1, 2]), &mut hashes).unwrap();
    let plan = early.unwrap_or_else(|| store.plan_gc(&[]).unwrap());
    run(&store, &plan);
    let root = session.put_map(&hashes).map_err(|e| e.to_string())?;
    session.commit().unwrap();
    check_all(&store, &[(root, vec![1, 2])])
}

/// The same for a pack that is rewritten: the session relies on a page of it that the plan calls dead.
fn hit_then_rewrite(limits: Limits) -> std::result::Result<(), String> {
    let (_disk, store) = store(limits);
    take(&store, &(1..13).collect::<Vec<_>>());
    let live = take(&store, &[1]);
    let plan = store.plan_gc(&[live]).unwrap();
    assert_eq!(plan.rewrite.len(), 1);
    let session = store.begin().unwrap();
    let mut hashes = names(1);
    session.put(&pages(&[7]), &mut hashes).unwrap();
    run(&store, &plan);
    let root = session.put_map(&hashes).map_err(|e| e.to_string())?;
    session.commit().unwrap();
    check_all(&store, &[(live, vec![1]), (root, vec![7])])
}

#[test]
fn what_a_session_relies_on_stays() {
    hit_then_collect(SMALL, false).unwrap();
    hit_then_collect(SMALL, true).unwrap();
    hit_then_rewrite(SMALL).unwrap();
}

#[test]
fn the_checks_notice_a_collector_that_ignores_sessions() {
    making(Some(Mistake::IgnoreTouches), || {
        hit_then_collect(SMALL, false).unwrap_err();
        hit_then_collect(SMALL, true).unwrap_err();
        hit_then_rewrite(SMALL).unwrap_err();
    });
}

#[test]
fn commits_between_plan_and_run_lose_nothing() {
    let (_disk, store) = store(SMALL);
    take(&store, &[1, 2, 3]);
    let plan = store.plan_gc(&[]).unwrap();
    let root = take(&store, &[2, 3, 4]);
    assert_eq!(run(&store, &plan).skipped, 1);
    check_all(&store, &[(root, vec![2, 3, 4])]).unwrap();
}

#[test]
fn a_hold_covers_the_time_from_commit_to_record() {
    let (_disk, store) = store(SMALL);
    let hold = store.hold();
    let root = take(&store, &[1, 2]);
    let mut recorded = Vec::new();
    let plan = store
        .plan_gc_with(|| {
            let seen = recorded.clone();
            // Recorded a moment too late for the collector's caller.
            recorded.push(root);
            drop(hold);
            Ok::<_, Error>(GcRequest { roots: seen, ..GcRequest::default() })
        })
        .unwrap();
    assert_eq!(plan.in_use, 1);
    run(&store, &plan);
    check_all(&store, &[(root, vec![1, 2])]).unwrap();
    let plan = store.plan_gc(&[]).unwrap();
    assert_eq!(run(&store, &plan).deleted, 1, "nobody holds it any more");
}

#[test]
fn an_old_node_is_not_taken_at_its_word() {
    let (_disk, store) = store(Limits { pack_pages: 4, ..SMALL });
    // The pages lie in one pack, their node in the next together with a page that stays.
    let session = store.begin().unwrap();
    let mut hashes = names(5);
    session.put(&pages(&[1, 2, 3, 4, 5]), &mut hashes).unwrap();
    session.put_map(&hashes[..4]).unwrap();
    let live = session.put_map(&hashes[4..]).unwrap();
    session.commit().unwrap();
    let plan = store.plan_gc(&[live]).unwrap();
    assert_eq!((run(&store, &plan).deleted, plan.rewrite.len()), (1, 0));
    let root = take(&store, &[1, 2, 3, 4]);
    check_all(&store, &[(live, vec![5]), (root, vec![1, 2, 3, 4])]).unwrap();
}

#[test]
fn a_plan_ends_with_its_store() {
    let (disk, store) = store(SMALL);
    let plan = store.plan_gc(&[]).unwrap();
    drop(store);
    let key = GroupKey::from_bytes([5; 32]);
    let store = Store::open_on(Arc::new(disk), PathBuf::from("/"), &key, SMALL, None).unwrap();
    assert!(matches!(store.run_gc(&plan, &|_, _| true), Err(Error::StalePlan)));
}

/// Readers, writers and a collector at once, for as long as the collector finds work.
#[test]
fn everything_at_once() {
    let (_disk, store) = store(SMALL);
    let kept = std::sync::Mutex::new(vec![(take(&store, &[1, 2, 3]), vec![1, 2, 3])]);
    std::thread::scope(|scope| {
        for thread in 0..2u64 {
            let (store, kept) = (&store, &kept);
            scope.spawn(move || {
                for round in 0..60u64 {
                    let numbers: Vec<u64> = (0..20).map(|i| (i * (thread + 2) + round * 3) % 50).collect();
                    let hold = store.hold();
                    let root = take(store, &numbers);
                    let mut kept = kept.lock().unwrap();
                    kept.push((root, numbers));
                    if kept.len() > 4 {
                        kept.remove(1);
                    }
                    drop((kept, hold));
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..60 {
                let plan = store.plan_gc_with(|| {
                    let roots = kept.lock().unwrap().iter().map(|(root, _)| *root).collect();
                    Ok::<_, Error>(GcRequest { roots, ..GcRequest::default() })
                });
                // A root may be forgotten and collected by nobody else: planning never fails.
                run(&store, &plan.unwrap());
                let first = kept.lock().unwrap()[0].clone();
                check_all(&store, &[first]).unwrap();
            }
        });
    });
    check_all(&store, &kept.into_inner().unwrap()).unwrap();
}

/// The last frame of a pack has fewer pages than the others: it was taken for mostly dead once, and rewritten by every collection.
#[test]
fn what_was_compressed_is_left_alone() {
    let (_, store) = store(SMALL);
    let roots = [take(&store, &[1]), take(&store, &(2..40).collect::<Vec<_>>())];
    let collect = || {
        let compress = Some(Cold { age: std::time::Duration::ZERO, level: 1 });
        let request = GcRequest { roots: roots.to_vec(), compress, thorough: true, ..GcRequest::default() };
        run(&store, &store.plan_gc_with(|| Ok::<_, Error>(request)).unwrap())
    };
    assert!(collect().compressed > 1);
    let again = collect();
    assert_eq!((again.rewritten, again.compressed, again.freed_bytes), (0, 0, 0));
}

#[test]
fn a_thorough_collection_rewrites_what_is_mostly_alive() {
    let (_, store) = store(SMALL);
    let first = take(&store, &(1..15).collect::<Vec<_>>());
    let second = take(&store, &(1..12).collect::<Vec<_>>());
    let plan = |thorough| {
        let request = GcRequest { roots: vec![second], thorough, ..GcRequest::default() };
        store.plan_gc_with(|| Ok::<_, Error>(request)).unwrap()
    };
    assert_ne!(first, second);
    assert_eq!((plan(false).rewrite.len(), plan(true).rewrite.len()), (0, 1));
    assert!(run(&store, &plan(true)).freed_bytes >= 3 * PAGE_SIZE as u64);
}
