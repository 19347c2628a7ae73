//! The index in files: it says what memory said, and goes and comes back without anybody missing anything.

use std::path::Path;

use super::crash_disk::CrashDisk;
use super::{check_all, open_small as open, take};
use crate::*;

type Kept = Vec<(MapRoot, Vec<u64>)>;

/// Ten maps that share half of their pages, with a fold behind each.
fn folded() -> (CrashDisk, Store, Kept) {
    let disk = CrashDisk::default();
    let store = open(&disk);
    let kept = (0..10)
        .map(|n| {
            let (kept, _) = take(&store, (n * 20 + 1..n * 20 + 41).collect());
            store.fold().unwrap();
            kept
        })
        .collect();
    (disk, store, kept)
}

#[test]
fn a_folded_index_says_what_memory_said() {
    let (disk, store, kept) = folded();
    assert_eq!(store.inner.index.in_memory(), 0);
    assert!(disk.index_paths().len() < 6, "small runs are merged: {:?}", disk.index_paths());
    for store in [store, open(&disk)] {
        check_all(&store, &kept).unwrap();
        let (_, saved) = take(&store, (1..=220).collect());
        assert_eq!((saved.earlier, saved.new), (220, 0));
        assert!(store.inner.index.in_memory() < 20, "only the nodes of the last map");
    }
}

#[test]
fn an_index_that_is_gone_or_damaged_comes_back() {
    let (disk, store, kept) = folded();
    drop(store);
    let paths = disk.index_paths();
    let largest = paths.iter().max_by_key(|path| disk.bytes(path).len()).unwrap().clone();
    let intact = disk.bytes(&largest);
    let behind = intact.len() - 96;
    for at in (0..4096).step_by(997).chain((4096..behind).step_by(101)).chain(behind..intact.len()) {
        let disk = disk.after_crash(super::crash_disk::Survive::Everything);
        let mut bytes = intact.clone();
        bytes[at] ^= 1 << (at % 8);
        disk.replace(&largest, &bytes);
        // Somebody died with the index in use.
        disk.write(Path::new("/index/in-use"), &[]);
        let store = open(&disk);
        check_all(&store, &kept).unwrap_or_else(|e| panic!("byte {at}: {e}"));
        assert_eq!(take(&store, (1..=220).collect()).1.new, 0, "byte {at}");
        store.fold().unwrap();
        check_all(&store, &kept).unwrap();
    }
    for path in &paths {
        disk::Disk::remove(&disk, path).unwrap();
    }
    let store = open(&disk);
    check_all(&store, &kept).unwrap();
    store.fold().unwrap();
    assert_eq!(disk.index_paths().len(), 1);
    check_all(&open(&disk), &kept).unwrap();
}

/// After an end in order only lengths and ends are looked at: a wrong place is found when it is read, and the page is read elsewhere.
#[test]
fn a_place_that_is_wrong_costs_time_and_not_data() {
    let (disk, store, kept) = folded();
    drop(store);
    let largest = disk.index_paths().into_iter().max_by_key(|path| disk.bytes(path).len()).unwrap();
    let mut bytes = disk.bytes(&largest);
    for entry in bytes[4096..].chunks_mut(24).take(60) {
        entry[20] ^= 1; // another slot
    }
    disk.replace(&largest, &bytes);
    check_all(&open(&disk), &kept).unwrap();
}

#[test]
fn what_is_collected_is_not_known_any_more() {
    let (disk, store, mut kept) = folded();
    let one = kept.remove(4);
    kept.truncate(1);
    kept.push(one);
    let roots: Vec<MapRoot> = kept.iter().map(|(root, _)| *root).collect();
    let done = store.run_gc(&store.plan_gc(&roots).unwrap(), &|_, _| true).unwrap();
    assert!(done.deleted > 0, "{done:?}");
    for store in [store, open(&disk)] {
        check_all(&store, &kept).unwrap();
        store.fold().unwrap();
        check_all(&store, &kept).unwrap();
    }
    let (_, saved) = take(&open(&disk), (201..=220).collect());
    assert_eq!(saved.new, 20);
}

#[test]
fn a_run_is_refused_at_every_cut() {
    let (disk, store, _) = folded();
    drop(store);
    let path = disk.index_paths().remove(0);
    let bytes = disk.bytes(&path);
    for len in (0..bytes.len()).step_by(31).chain(bytes.len() - 100..bytes.len()) {
        let disk = disk.after_crash(super::crash_disk::Survive::Everything);
        disk.replace(&path, &bytes[..len]);
        drop(open(&disk));
        assert!(!disk.index_paths().contains(&path), "cut to {len}");
    }
}

/// The mistake this guards against: a collector that takes the index at its word deletes what the index has forgotten.
#[test]
fn a_collection_does_not_take_a_damaged_index_at_its_word() {
    type Harm = fn(&mut [u8]);
    let harms: [(&str, Harm); 3] = [
        ("another slot", |entry| entry[20] ^= 1),
        ("another name", |entry| entry[10] ^= 1),
        ("another pack", |entry| entry[16] ^= 1),
    ];
    for (what, harm) in harms {
        let (disk, store, mut kept) = folded();
        drop(store);
        for path in disk.index_paths() {
            let mut bytes = disk.bytes(&path);
            let at = bytes.len() - 96;
            let entries = u64::from_le_bytes(bytes[at + 8..at + 16].try_into().unwrap()) as usize;
            bytes[4096..].chunks_mut(24).take(entries).for_each(harm);
            disk.replace(&path, &bytes);
        }
        let store = open(&disk);
        kept.retain(|(_, numbers)| numbers[0] % 40 == 1);
        let roots: Vec<MapRoot> = kept.iter().map(|(root, _)| *root).collect();
        let collected = store.plan_gc(&roots).and_then(|plan| store.run_gc(&plan, &|_, _| true));
        check_all(&store, &kept).unwrap_or_else(|e| panic!("{what}: {e}; {collected:?}"));
        check_all(&open(&disk), &kept).unwrap_or_else(|e| panic!("{what}: {e}; {collected:?}"));
    }
}

#[test]
fn a_collection_finds_what_the_index_has_forgotten() {
    let disk = CrashDisk::default();
    let store = open(&disk);
    let kept: Kept = (0..4).map(|n| take(&store, (n * 50 + 1..n * 50 + 90).collect()).0).collect();
    let kept = kept[1..].to_vec();
    let roots: Vec<MapRoot> = kept.iter().map(|(root, _)| *root).collect();
    let hold = store.hold();
    store.inner.index.retain(|place| place.pack % 3 == 1);
    let plan = store.plan_gc(&roots).unwrap();
    assert!(hold.check().is_err(), "whoever relied on the index meanwhile is told");
    let done = store.run_gc(&plan, &|_, _| true).unwrap();
    assert!(done.deleted + done.rewritten > 0, "{done:?}");
    for store in [store, open(&disk)] {
        check_all(&store, &kept).unwrap();
        assert_eq!(store.fsck(&[(roots[0], "x".into())], &|_, _| true).unwrap().damage, []);
    }
}
