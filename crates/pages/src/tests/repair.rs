//! What a repair mends, by kind of damage; and that one which is cut short anywhere has made nothing worse.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::crash_disk::{CrashDisk, Fault, Survive};
use super::{SMALL, check_all, names, page, pages};
use crate::*;

type Kept = Vec<(MapRoot, Vec<u64>)>;

fn open(disk: &CrashDisk) -> Result<Store> {
    let key = GroupKey::from_bytes([4; 32]);
    Store::open_on(Arc::new(disk.clone()), PathBuf::from("/"), &key, SMALL, None)
}

fn take(store: &Store, numbers: &[u64]) -> (MapRoot, Vec<u64>) {
    let session = store.begin().unwrap();
    let mut hashes = names(numbers.len());
    session.put(&pages(numbers), &mut hashes).unwrap();
    let root = session.put_map(&hashes).unwrap();
    session.commit().unwrap();
    (root, numbers.to_vec())
}

/// Maps `a` and `c` in a pack each, and `b` with pages of both.
fn three_maps() -> (CrashDisk, Kept, PathBuf) {
    let disk = CrashDisk::default();
    let store = open(&disk).unwrap();
    let a = take(&store, &[1, 2, 0, 3, 4]);
    let first = disk.paths().remove(0);
    let c = take(&store, &[10, 11, 12]);
    let b = take(&store, &[1, 10, 20]);
    (disk, vec![a, b, c], first)
}

#[test]
fn who_may_have_met_what_a_repair_gives_up_is_told() {
    let (disk, kept, first) = three_maps();
    let store = open(&disk).unwrap();
    let before = store.hold();
    repair(&store, &kept);
    before.check().expect("nothing was wrong");
    // Page 2, which no other pack has; the session has been told that it is there.
    let session = store.begin().unwrap();
    let (mut name, mut leaf) = (names(1), names(1));
    session.put(&pages(&[2]), &mut name).unwrap();
    session.put_leaves(&name, &mut leaf).unwrap();
    flip(&disk, &first, 4096 + 4096);
    assert_eq!(repair(&store, &kept).lost, 1);
    session.put_map_over(&leaf, 1).unwrap();
    session.commit().unwrap();
    assert!(matches!(before.check(), Err(Error::Forgotten)));
    store.hold().check().unwrap();
}

fn repair(store: &Store, kept: &Kept) -> Repaired {
    let roots: Vec<MapRoot> = kept.iter().map(|(root, _)| *root).collect();
    store.repair(&roots, &|| true).unwrap()
}

/// Labels of the maps that `fsck` finds damaged, and what it names besides.
fn damaged(store: &Store, kept: &Kept) -> (Vec<String>, Vec<String>) {
    let roots: Vec<_> =
        kept.iter().zip(["a", "b", "c"]).map(|((root, _), l)| (*root, l.to_owned())).collect();
    let report = store.fsck(&roots, &|_, _| true).unwrap();
    let mut labels: Vec<String> = report.damage.iter().flat_map(|d| d.labels.clone()).collect();
    labels.sort();
    labels.dedup();
    let others = report.damage.iter().map(|d| d.what.clone()).filter(|what| !what.starts_with("map"));
    (labels, others.collect())
}

fn flip(disk: &CrashDisk, path: &Path, at: usize) {
    let mut bytes = disk.bytes(path);
    bytes[at] ^= 1;
    disk.replace(path, &bytes);
}

fn bad_files(disk: &CrashDisk) -> usize {
    disk.paths().iter().filter(|path| path.extension().is_some_and(|end| end == "bad")).count()
}

#[test]
fn a_pack_whose_frame_is_damaged_is_whole_again() {
    let (disk, _, first) = three_maps();
    let len = disk.bytes(&first).len();
    // Header, footer, trailer.
    for at in [3, 50, len - 160 - 20, len - 100, len - 1] {
        let (disk, kept, first) = three_maps();
        // The random ids of packs differ, their lengths do not.
        flip(&disk, &first, at);
        let store = open(&disk).unwrap();
        assert_eq!(damaged(&store, &kept).0, ["a", "b"], "byte {at}");
        let done = repair(&store, &kept);
        assert_eq!(
            done.aside.values().copied().collect::<Vec<_>>(),
            [Salvaged { pages: 4, nodes: 1 }],
            "{at}"
        );
        for store in [store, open(&disk).unwrap()] {
            check_all(&store, &kept).unwrap();
            assert_eq!(damaged(&store, &kept), (vec![], vec![]), "byte {at}");
        }
        assert_eq!(bad_files(&disk), 1, "it is put aside, not deleted");
    }
}

#[test]
fn a_damaged_page_costs_the_maps_that_have_it_and_no_others() {
    for (number, touched) in [(0, vec!["a", "b"]), (1, vec!["a"])] {
        let (disk, kept, first) = three_maps();
        flip(&disk, &first, 4096 * (number + 1) + 100);
        let store = open(&disk).unwrap();
        assert_eq!(damaged(&store, &kept).0, touched);
        let done = repair(&store, &kept);
        assert_eq!(done.lost, 1);
        assert_eq!(damaged(&store, &kept), (touched.iter().map(|l| (*l).to_owned()).collect(), vec![]));
        check_all(&store, &kept[2..]).unwrap();
        // A repair that has been done finds nothing more to do.
        assert_eq!(repair(&store, &kept), Repaired::default());
        // Somebody has the page after all: it is stored again, and with it every map is whole.
        take(&store, &[number as u64 + 1]);
        check_all(&store, &kept).unwrap();
        check_all(&open(&disk).unwrap(), &kept).unwrap();
    }
}

#[test]
fn a_damaged_page_that_is_not_mended_is_relied_on_and_one_that_is_mended_is_not() {
    // Without a repair a new map gets the damaged page: this is what the repair is for.
    for mend in [false, true] {
        let (disk, kept, first) = three_maps();
        flip(&disk, &first, 4096 + 100);
        let store = open(&disk).unwrap();
        if mend {
            repair(&store, &kept);
        }
        let new = vec![take(&store, &[1, 99])];
        assert_eq!(check_all(&store, &new).is_ok(), mend);
    }
}

#[test]
fn a_damaged_node_costs_its_map_until_it_is_built_again() {
    let (disk, kept, first) = three_maps();
    // Behind four pages.
    flip(&disk, &first, 4096 * 5 + 20);
    let store = open(&disk).unwrap();
    repair(&store, &kept);
    assert_eq!(damaged(&store, &kept).0, ["a"]);
    check_all(&store, &kept[1..]).unwrap();
    take(&store, &kept[0].1.clone());
    check_all(&store, &kept).unwrap();
}

#[test]
fn of_a_cut_pack_the_pages_before_the_cut_are_saved() {
    let (disk, kept, first) = three_maps();
    let bytes = disk.bytes(&first);
    disk.replace(&first, &bytes[..4096 * 3 + 500]);
    let store = open(&disk).unwrap();
    assert_eq!(damaged(&store, &kept).0, ["a", "b"]);
    repair(&store, &kept);
    // Its map lay behind the cut; of `b` only a page lay before it.
    assert_eq!(damaged(&store, &kept), (vec!["a".to_owned()], vec![]));
    check_all(&store, &kept[1..]).unwrap();
}

#[test]
fn a_pack_that_is_cut_or_gone_under_an_open_store() {
    for gone in [false, true] {
        let (disk, kept, first) = three_maps();
        let store = open(&disk).unwrap();
        match gone {
            true => crate::disk::Disk::remove(&disk, &first).unwrap(),
            false => disk.replace(&first, &disk.bytes(&first)[..4096 * 2]),
        }
        repair(&store, &kept);
        let touched: &[&str] = if gone { &["a", "b"] } else { &["a"] };
        assert_eq!(damaged(&store, &kept).0, touched);
        check_all(&store, &kept[2..]).unwrap();
    }
}

#[test]
fn a_copy_in_another_pack_is_found() {
    let (disk, kept, first) = three_maps();
    let bytes = disk.bytes(&first);
    // The pack is damaged for a while, and what it had is stored again.
    disk.replace(&first, &bytes[..5000]);
    take(&open(&disk).unwrap(), &[1, 2, 3, 4]);
    disk.replace(&first, &bytes);
    // Whichever of the two the index takes, the other has the page.
    for path in disk.paths() {
        let whole = disk.bytes(&path);
        let Some(at) = whole.windows(4096).position(|part| part == page(2)) else { continue };
        flip(&disk, &path, at);
        let store = open(&disk).unwrap();
        let done = repair(&store, &kept);
        assert_eq!((done.aside.len(), done.lost), (1, 0), "{done:?}");
        check_all(&store, &kept).unwrap();
        assert_eq!(damaged(&store, &kept), (vec![], vec![]));
        return;
    }
    panic!("no pack has the page");
}

#[test]
fn a_pack_of_another_group_is_left_alone() {
    let (disk, kept, _) = three_maps();
    let other = CrashDisk::default();
    let key = GroupKey::from_bytes([5; 32]);
    let theirs = Store::open_on(Arc::new(other.clone()), PathBuf::from("/"), &key, SMALL, None).unwrap();
    take(&theirs, &[1]);
    let path = other.paths().remove(0);
    let file = crate::disk::Disk::create(&disk, &path).unwrap();
    file.write_at(&[&other.bytes(&path)], 0).unwrap();
    let store = open(&disk).unwrap();
    assert_eq!(repair(&store, &kept), Repaired::default());
    assert_eq!((store.set_aside().len(), bad_files(&disk)), (1, 0));
}

/// Damages two packs in different ways; the kept maps can all be mended.
fn mendable(fault: Fault) -> (CrashDisk, Kept) {
    let (mut disk, kept, first) = three_maps();
    let has = |path: &PathBuf| disk.bytes(path).windows(4096).any(|part| part == page(11));
    let second = disk.paths().into_iter().find(has).unwrap();
    let (len, bytes) = (disk.bytes(&first).len(), disk.bytes(&second));
    flip(&disk, &first, len - 140);
    // In the other one a byte between what is named: its trailer, so that only a search finds its pages.
    disk.replace(&second, &bytes[..bytes.len() - 1]);
    disk = disk.after_crash(Survive::Everything);
    disk.set_fault(fault);
    (disk, kept)
}

fn crash_everywhere(fault: Fault) -> std::result::Result<u64, String> {
    let (disk, kept) = mendable(fault);
    repair(&open(&disk).unwrap(), &kept);
    let total = disk.operations();
    for last in 0..=total {
        let coins = (0..4).map(|seed| Survive::Some(seed * 7919 + last));
        for survive in [Survive::Nothing, Survive::Everything].into_iter().chain(coins) {
            let (disk, kept) = mendable(fault);
            disk.crash_after(last);
            let roots: Vec<MapRoot> = kept.iter().map(|(root, _)| *root).collect();
            let ended = open(&disk).and_then(|store| store.repair(&roots, &|| true));
            // Only the index's mark, which the end of the store takes away, may be there still.
            assert!(ended.is_err() || last + 1 >= total);
            let after = disk.after_crash(survive);
            let told =
                |e: String| format!("crash behind operation {last} of {total}, {survive:?} survives: {e}");
            let store = open(&after).map_err(|e| told(e.to_string()))?;
            repair(&store, &kept);
            check_all(&store, &kept).map_err(told)?;
            check_all(&open(&after).map_err(|e| told(e.to_string()))?, &kept).map_err(told)?;
        }
    }
    Ok(total)
}

#[test]
fn a_repair_that_is_cut_short_has_lost_nothing() {
    let operations = crash_everywhere(Fault::None).unwrap();
    assert!(operations >= 10, "only {operations} operations");
}

#[test]
fn the_check_notices_a_repair_that_does_not_sync() {
    crash_everywhere(Fault::SkipFileSync).unwrap_err();
}
