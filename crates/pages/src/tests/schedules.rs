//! What threads may do beside each other, in thousands of orders: the protocol that keeps pages alive beside a collection, and the index
//! complete beside a fold. Each scene is also played with a mistake planted in the protocol, which the explorer has to find.
//!
//! `cargo test -p spinney-pages --features schedules schedules`: locks and atomic numbers are the explorer's then (`sync.rs`), and
//! between any two of them it may let another thread go on. It runs one thread at a time, so what a processor does out of order is not
//! tried.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::thread;
use shuttle::{Config, FailurePersistence, Runner};

use super::crash_disk::CrashDisk;
use super::{SMALL, check_all, names, pages};
use crate::planted::{Mistake, making};
use crate::sync::{Mutex, lock};
use crate::*;

type Kept = (MapRoot, Vec<u64>);

/// Orders tried of a scene, at random and by changing the order at few points each, unless `SPINNEY_ORDERS` says another number.
const ORDERS: usize = 400;
const CHANGES: usize = 3;
/// Hundreds of orders, of both kinds, in which a planted mistake has to show; it mostly does within the first few.
const SEARCH: usize = 500;

fn open(disk: &CrashDisk) -> Store {
    let key = GroupKey::from_bytes([12; 32]);
    Store::open_on(Arc::new(disk.clone()), PathBuf::from("/"), &key, SMALL, None).unwrap()
}

fn take(store: &Store, numbers: &[u64]) -> Kept {
    try_take(store, numbers).unwrap()
}

fn try_take(store: &Store, numbers: &[u64]) -> Result<Kept> {
    let session = store.begin()?;
    let mut hashes = names(numbers.len());
    session.put(&pages(numbers), &mut hashes)?;
    let root = session.put_map(&hashes)?;
    session.commit()?;
    Ok((root, numbers.to_vec()))
}

fn collect(store: &Store, plan: &GcPlan) -> GcDone {
    store.run_gc(plan, &|_, _| true).unwrap()
}

/// The names of a map's pages and of its top node.
fn names_of(store: &Store, (root, numbers): &Kept) -> Vec<PageHash> {
    let mut hashes = names(numbers.len());
    store.map_range(root, 0, &mut hashes).unwrap();
    hashes.push(root.node);
    hashes
}

/// How many of the names one look-up finds.
fn found(store: &Store, names: &[PageHash], surely: bool) -> usize {
    let mut found = vec![false; names.len()];
    match surely {
        true => store.inner.index.lookup_surely(names, |i, _, _| found[i] = true),
        false => store.inner.index.lookup(names, |i, _, _| found[i] = true),
    }
    found.iter().filter(|found| **found).count()
}

/// Everything is known and reads back, now and when the store is opened again.
fn is_all_there(disk: &CrashDisk, store: Store, kept: &[Kept]) {
    let hashes: Vec<PageHash> = kept.iter().flat_map(|one| names_of(&store, one)).collect();
    let known =
        |store: &Store| assert_eq!(found(store, &hashes, false), hashes.len(), "the index lacks names");
    check_all(&store, kept).unwrap();
    known(&store);
    drop(store);
    let store = open(disk);
    check_all(&store, kept).unwrap();
    known(&store);
}

/// Plays a scene in many orders.
fn explore(scene: fn()) {
    let orders = std::env::var("SPINNEY_ORDERS").map_or(ORDERS, |orders| orders.parse().unwrap());
    play(scene, orders);
}

fn play(scene: fn(), orders: usize) {
    let mut config = Config::new();
    config.stack_size = 1 << 20;
    config.failure_persistence = FailurePersistence::None;
    Runner::new(RandomScheduler::new(orders), config.clone()).run(scene);
    Runner::new(PctScheduler::new(CHANGES, orders), config).run(scene);
}

/// Some order of the scene fails with the mistake in it.
fn finds(mistake: Option<Mistake>, scene: fn()) {
    let ended =
        catch_unwind(AssertUnwindSafe(|| making(mistake, || (0..SEARCH).for_each(|_| play(scene, 100)))));
    assert!(ended.is_err(), "{mistake:?} was not found");
}

/// A session hits pages that a plan made before calls dead, while that plan is carried out.
fn hit_beside_an_old_plan() {
    let disk = CrashDisk::default();
    let store = open(&disk);
    take(&store, &[1, 2, 3]);
    let half = take(&store, &[4, 5, 6, 7, 8]);
    let live = take(&store, &[4]);
    let plan = store.plan_gc(&[live.0]).unwrap();
    assert_eq!((plan.delete.len(), plan.rewrite.len()), (1, 1));
    drop(half);
    let collector = {
        let store = store.clone();
        thread::spawn(move || drop(collect(&store, &plan)))
    };
    let taken = take(&store, &[2, 7, 9]);
    collector.join().unwrap();
    is_all_there(&disk, store, &[live, taken]);
}

#[test]
fn what_a_session_hits_outlives_an_old_plan() {
    explore(hit_beside_an_old_plan);
    finds(Some(Mistake::IgnoreTouches), hit_beside_an_old_plan);
    finds(Some(Mistake::NoGate), hit_beside_an_old_plan);
}

/// A map is committed while the index is folded, with what it shares with an older one.
fn commit_beside_fold() {
    let disk = CrashDisk::default();
    let store = open(&disk);
    let old = take(&store, &[1, 2, 3]);
    let folder = {
        let store = store.clone();
        thread::spawn(move || store.fold().unwrap())
    };
    let new = take(&store, &[3, 4, 5, 6]);
    folder.join().unwrap();
    is_all_there(&disk, store, &[old, new]);
}

#[test]
fn a_fold_beside_a_commit_keeps_all_names() {
    explore(commit_beside_fold);
    finds(Some(Mistake::PublishedLate), commit_beside_fold);
}

/// A name that does not move is found at once, wherever the index keeps it just then.
fn lookup_beside_fold() {
    let disk = CrashDisk::default();
    let store = open(&disk);
    let first = take(&store, &[1, 2, 3]);
    store.fold().unwrap();
    let second = take(&store, &[4, 5, 6]);
    let hashes: Vec<PageHash> = [&first, &second].into_iter().flat_map(|one| names_of(&store, one)).collect();
    let folder = {
        let store = store.clone();
        thread::spawn(move || store.fold().unwrap())
    };
    for _ in 0..2 {
        assert_eq!(found(&store, &hashes, false), hashes.len(), "a look-up missed names");
    }
    folder.join().unwrap();
    is_all_there(&disk, store, &[first, second]);
}

#[test]
fn a_lookup_beside_a_fold_misses_nothing() {
    explore(lookup_beside_fold);
    finds(Some(Mistake::RunsFirst), lookup_beside_fold);
}

/// Names move to another pack and from memory to a run, and are looked up and read all the while.
fn lookup_beside_fold_and_rewrite() {
    let disk = CrashDisk::default();
    let store = open(&disk);
    take(&store, &[1, 2, 3, 4, 5, 6]);
    let live = take(&store, &[1, 2]);
    let plan = store.plan_gc(&[live.0]).unwrap();
    assert_eq!(plan.rewrite.len(), 1);
    let hashes = names_of(&store, &live);
    let folder = {
        let store = store.clone();
        thread::spawn(move || store.fold().unwrap())
    };
    let collector = {
        let store = store.clone();
        thread::spawn(move || assert_eq!(collect(&store, &plan).rewritten, 1))
    };
    assert_eq!(found(&store, &hashes, true), hashes.len(), "a sure look-up missed names");
    check_all(&store, std::slice::from_ref(&live)).unwrap();
    folder.join().unwrap();
    collector.join().unwrap();
    is_all_there(&disk, store, &[live]);
}

#[test]
fn a_sure_lookup_beside_fold_and_rewrite_misses_nothing() {
    explore(lookup_beside_fold_and_rewrite);
    finds(Some(Mistake::ForgetChanged), lookup_beside_fold_and_rewrite);
}

/// A root is recorded some time after its commit, and a collector reads what is recorded.
fn commit_then_record(with_hold: bool) {
    let disk = CrashDisk::default();
    let store = open(&disk);
    let recorded = Arc::new(Mutex::new(vec![take(&store, &[1, 2])]));
    take(&store, &[2, 3, 4, 5]);
    let collector = {
        let (store, recorded) = (store.clone(), recorded.clone());
        thread::spawn(move || {
            for _ in 0..3 {
                let ask = || {
                    let roots = lock(&recorded).iter().map(|(root, _)| *root).collect();
                    Ok::<_, Error>(GcRequest { roots, ..GcRequest::default() })
                };
                collect(&store, &store.plan_gc_with(ask).unwrap());
            }
        })
    };
    let hold = with_hold.then(|| store.hold());
    let taken = take(&store, &[3, 6]);
    lock(&recorded).push(taken);
    drop(hold);
    collector.join().unwrap();
    let kept = lock(&recorded).clone();
    is_all_there(&disk, store, &kept);
}

#[test]
fn a_hold_keeps_what_is_committed_until_it_is_recorded() {
    explore(|| commit_then_record(true));
    finds(None, || commit_then_record(false));
}

/// A page turns out to be damaged, in no other pack, after a session may have met it.
fn hit_beside_repair() {
    let disk = CrashDisk::default();
    let store = open(&disk);
    let old = take(&store, &[1, 2, 3]);
    let path = disk.paths().remove(0);
    let mut bytes = disk.bytes(&path);
    let at = bytes.windows(8).position(|part| part == &pages(&[2])[..8]).unwrap();
    bytes[at] ^= 1;
    disk.replace(&path, &bytes);
    let mender = {
        let store = store.clone();
        thread::spawn(move || drop(store.repair(&[old.0], &|| true).unwrap()))
    };
    let hold = store.hold();
    let taken = try_take(&store, &[2, 4]);
    mender.join().unwrap();
    // Found before the root is recorded: whoever records it is told, or the session, or it has nothing to do with it. Found later, it
    // is a damaged snapshot like any other.
    match (taken, hold.check()) {
        (Ok(taken), Ok(())) => is_all_there(&disk, store, &[taken]),
        (Err(error), _) => assert!(matches!(error, Error::Missing { .. }), "{error}"),
        (_, Err(error)) => assert!(matches!(error, Error::Forgotten), "{error}"),
    }
}

#[test]
fn whoever_met_what_a_repair_gives_up_is_told() {
    explore(hit_beside_repair);
    finds(Some(Mistake::LoseSilently), hit_beside_repair);
}
