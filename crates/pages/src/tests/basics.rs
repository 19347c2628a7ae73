//! What every user does: put, map, commit, read; and what errors name.

use super::{names, pages};
use crate::*;

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path().join("store"), GroupKey::generate().unwrap()).unwrap();
    (dir, store)
}

/// Puts numbered pages, makes a map of them and commits.
fn take(store: &Store, numbers: &[u64]) -> (MapRoot, Saved) {
    let session = store.begin().unwrap();
    let mut hashes = names(numbers.len());
    session.put(&pages(numbers), &mut hashes).unwrap();
    let root = session.put_map(&hashes).unwrap();
    (root, session.commit().unwrap())
}

fn read_back(store: &Store, root: &MapRoot) -> Vec<u8> {
    let mut hashes = names(root.pages as usize);
    store.map_range(root, 0, &mut hashes).unwrap();
    let mut out = vec![0xff; hashes.len() * PAGE_SIZE];
    store.read(&hashes, &mut out).unwrap();
    out
}

#[test]
fn comes_back_and_counts_by_cause() {
    let (dir, store) = store();
    let (root, saved) = take(&store, &[1, 2, 0, 1, 3]);
    assert_eq!((saved.zero, saved.same, saved.earlier, saved.new), (1, 1, 0, 3));
    assert_eq!(store.allocated().unwrap().packs / 4096, saved.bytes_written.div_ceil(4096));
    let (second, saved) = take(&store, &[3, 4, 1, 0]);
    assert_eq!((saved.zero, saved.same, saved.earlier, saved.new), (1, 0, 2, 1));
    assert!(read_back(&store, &root) == pages(&[1, 2, 0, 1, 3]));
    assert!(read_back(&store, &second) == pages(&[3, 4, 1, 0]));
    drop(store);
    let key = GroupKey::load(&dir.path().join("store/key")).unwrap();
    let store = Store::open(dir.path().join("store"), key).unwrap();
    assert!(read_back(&store, &root) == pages(&[1, 2, 0, 1, 3]));
    assert!(read_back(&store, &second) == pages(&[3, 4, 1, 0]));
    assert_eq!((store.pack_count(), store.page_count()), (2, 4));
}

#[test]
fn what_is_known_costs_nothing() {
    let (_dir, store) = store();
    let (root, _) = take(&store, &[1, 2, 3]);
    let (again, saved) = take(&store, &[1, 2, 3]);
    assert_eq!((root, saved.earlier, saved.bytes_written), (again, 3, 0));
    let (zero, saved) = take(&store, &[0; 1000]);
    assert_eq!((zero.node, saved.bytes_written), (PageHash::ZERO, 0));
    assert_eq!(store.pack_count(), 1);
}

#[test]
fn a_dropped_session_leaves_nothing() {
    let (dir, store) = store();
    let session = store.begin().unwrap();
    session.put(&pages(&[1, 2]), &mut names(2)).unwrap();
    let count = || std::fs::read_dir(dir.path().join("store/packs")).unwrap().count();
    assert_eq!(count(), 1);
    drop(session);
    assert_eq!((count(), store.page_count()), (0, 0));
}

#[test]
fn maps_of_any_size() {
    let (_dir, store) = store();
    for n in [0u64, 1, 63, 64, 65, 4095, 4096, 4097, 9000] {
        let numbers: Vec<u64> = (0..n).map(|i| if i % 7 < 3 { 0 } else { i % 50 }).collect();
        let (root, _) = take(&store, &numbers);
        assert_eq!(root.pages, n);
        let (mut all, mut one) = (names(n as usize), names(1));
        store.map_range(&root, 0, &mut all).unwrap();
        for first in (0..n).step_by(97) {
            store.map_range(&root, first, &mut one).unwrap();
            assert_eq!(one[0], all[first as usize]);
        }
        assert!(read_back(&store, &root) == pages(&numbers), "{n} pages");
        assert!(matches!(store.map_range(&root, n, &mut one), Err(Error::PastEnd { .. })));
    }
}

/// Why the fan-out is 64: see the decision 0002.
#[test]
fn scattered_pages_cost_less_than_twice_their_bytes() {
    let (_dir, store) = store();
    let total = 262_144;
    let session = store.begin().unwrap();
    let mut hashes = names(total);
    session.put(&pages(&[7]), &mut hashes[..1]).unwrap();
    let first = hashes[0];
    hashes.fill(first);
    // Different leaves, as in a real guest.
    let mut other = names(4096);
    session.put(&pages(&(10_000..14_096).collect::<Vec<_>>()), &mut other).unwrap();
    hashes.chunks_mut(64).zip(&other).for_each(|(leaf, name)| leaf[0] = *name);
    session.put_map(&hashes).unwrap();
    session.commit().unwrap();

    let session = store.begin().unwrap();
    let mut dirty = names(1000);
    session.put(&pages(&(20_000..21_000).collect::<Vec<_>>()), &mut dirty).unwrap();
    dirty.iter().enumerate().for_each(|(i, name)| hashes[i * 262 + 5] = *name);
    session.put_map(&hashes).unwrap();
    let saved = session.commit().unwrap();
    assert_eq!(saved.new, 1000);
    assert!(saved.bytes_written < 2 * 1000 * PAGE_SIZE as u64, "{} bytes", saved.bytes_written);
}

#[test]
fn two_threads_store_a_page_once() {
    let (_dir, store) = store();
    let session = store.begin().unwrap();
    let numbers: Vec<u64> = (1..=512).collect();
    let bytes = pages(&numbers);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                bytes.chunks(64 * PAGE_SIZE).for_each(|part| session.put(part, &mut names(64)).unwrap());
            });
        }
    });
    let saved = session.commit().unwrap();
    assert_eq!((saved.new, saved.same), (512, 512));
    assert_eq!(store.page_count(), 512);
}

#[test]
fn unknown_pages_are_refused() {
    let (_dir, store) = store();
    let stranger = PageHash([5; 32]);
    let session = store.begin().unwrap();
    assert!(matches!(session.put_map(&[stranger]), Err(Error::Missing { kind: Kind::Page, .. })));
    let error = store.read(&[stranger], &mut [0; PAGE_SIZE]).unwrap_err();
    assert_eq!(error.to_string(), "page 050505050505 is in no readable pack");
    assert!(matches!(session.put(&[0; 5], &mut names(1)), Err(Error::Misuse(_))));
    assert!(matches!(store.read(&[stranger], &mut [0; 5]), Err(Error::Misuse(_))));
}

#[test]
fn one_process_and_one_key() {
    let (dir, store) = store();
    take(&store, &[1]);
    let path = dir.path().join("store");
    let other = GroupKey::generate().unwrap();
    assert!(matches!(Store::create(&path, other.clone()), Err(Error::Exists { .. })));
    let key = GroupKey::load(&path.join("key")).unwrap();
    assert!(matches!(Store::open(&path, key), Err(Error::Locked { .. })));
    drop(store);
    assert!(matches!(Store::open(&path, other), Err(Error::WrongKey { .. })));
}

#[test]
fn usage_tells_own_from_shared() {
    let (_dir, store) = store();
    let (a, _) = take(&store, &[1, 2, 3, 0, 3]);
    let (b, _) = take(&store, &[3, 4]);
    let node = |children: u64| 16 + 32 * children;
    let page = PAGE_SIZE as u64;
    let usage = store.usage(&[a, b]).unwrap();
    assert_eq!(usage[0], Usage { exclusive: 2 * page + node(4), shared: page });
    assert_eq!(usage[1], Usage { exclusive: page + node(2), shared: page });
    let twice = store.usage(&[a, a]).unwrap();
    assert_eq!(twice[0], Usage { exclusive: 0, shared: 3 * page + node(4) });
    assert_eq!(store.exclusive(&b, &[a]).unwrap(), (page + node(2), 2 * page + node(2)));
    assert_eq!(store.freed_by(&[a, b], &[]).unwrap(), 4 * page + node(4) + node(2));
    assert_eq!(store.freed_by(&[a], &[b]).unwrap(), 2 * page + node(4));
}
