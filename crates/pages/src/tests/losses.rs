//! Ways in which pages were lost once, each found by a reviewer: an index that lacks names or has wrong places, images that go or pass from
//! one owner to another, syncs that were left out.

use std::path::{Path, PathBuf};

use super::crash_disk::{CrashDisk, Survive};
use super::{check_all, names, open_small as open, pages, take};
use crate::*;

type Kept = (MapRoot, Vec<u64>);

fn collect(store: &Store, kept: &[Kept], leaving: &[&str]) -> GcDone {
    let ask = || {
        let roots = kept.iter().map(|(root, _)| *root).collect();
        let leaving = leaving.iter().map(|label| (*label).to_owned()).collect();
        Ok::<_, Error>(GcRequest { roots, leaving, ..GcRequest::default() })
    };
    store.run_gc(&store.plan_gc_with(ask).unwrap(), &|_, _| true).unwrap()
}

fn image(label: &str, private: bool) -> NewImage {
    let data = vec![Extent { offset: 0, bytes: u64::MAX }];
    NewImage { label: label.into(), path: label.into(), private, seen: None, data }
}

/// A run whose names have rotted, found by nobody before the collector.
#[test]
fn an_index_that_lacks_names_makes_nothing_garbage() {
    let disk = CrashDisk::default();
    let store = open(&disk);
    let kept = vec![take(&store, (1..=16).collect()).0];
    store.fold().unwrap();
    drop(store);
    let run = disk.index_paths().remove(0);
    let mut bytes = disk.bytes(&run);
    bytes[4096..].chunks_mut(24).take(12).for_each(|entry| entry[3] ^= 1);
    disk.replace(&run, &bytes);
    let store = open(&disk);
    check_all(&store, &kept).unwrap();
    let done = collect(&store, &kept, &[]);
    assert_eq!((done.deleted, done.rewritten), (0, 0));
    check_all(&store, &kept).unwrap();
}

/// A repair sets names in a pack of an old run; two folds later they were gone, and the pack with them.
#[test]
fn what_a_repair_has_found_stays_found() {
    let disk = CrashDisk::default();
    let store = open(&disk);
    // So many that the old run is not merged with what comes.
    let (first, _) = take(&store, (1..=2000).collect());
    let numbers: Vec<u64> = (3001..=3008).collect();
    let sessions = [store.begin().unwrap(), store.begin().unwrap()];
    let mut before = Vec::new();
    let roots = sessions.map(|session| {
        let mut hashes = names(numbers.len());
        session.put(&pages(&numbers), &mut hashes).unwrap();
        (session.put_map(&hashes).unwrap(), session)
    });
    let mut kept = vec![first];
    for (root, session) in roots {
        before = disk.paths();
        session.commit().unwrap();
        kept.push((root, numbers.clone()));
    }
    let newest: Vec<PathBuf> = disk.paths().into_iter().filter(|path| !before.contains(path)).collect();
    assert_eq!(newest.len(), 1);
    store.fold().unwrap();
    // The newer copy rots; the older one is found.
    let mut bytes = disk.bytes(&newest[0]);
    bytes[4096..4096 + 8 * 4096].iter_mut().for_each(|byte| *byte ^= 0x55);
    disk.replace(&newest[0], &bytes);
    let all: Vec<MapRoot> = kept.iter().map(|(root, _)| *root).collect();
    assert!(store.repair(&all, &|| true).unwrap().elsewhere >= 8);
    store.fold().unwrap();
    kept.push(take(&store, (5001..=5030).collect()).0);
    store.fold().unwrap();
    for store in [store, open(&disk)] {
        check_all(&store, &kept).unwrap();
        assert_eq!(collect(&store, &kept, &[]).deleted, 0);
        check_all(&store, &kept).unwrap();
    }
}

#[test]
fn an_image_whose_file_goes_while_it_is_hashed_is_not_believed() {
    let disk = CrashDisk::default();
    disk.write(Path::new("/layer"), &pages(&(1..=600).collect::<Vec<_>>()));
    let store = open(&disk);
    let go_on = |done: u64, _: u64| {
        if done == 256 * PAGE_SIZE as u64 {
            disk::Disk::remove(&disk, Path::new("/layer")).unwrap();
        }
        true
    };
    assert!(store.add_image(&image("layer", false), &go_on).is_err());
    let (kept, saved) = take(&store, (1..=100).collect());
    assert_eq!(saved.disk, 0);
    check_all(&store, &[kept]).unwrap();
}

/// Which of two images has a block must not change with a restart, from one that lasts to one that its user edits.
#[test]
fn nobody_passes_to_a_private_image_with_a_restart() {
    for round in 0..20 {
        let disk = CrashDisk::default();
        let all: Vec<u64> = (1..=40).collect();
        for path in ["/shared", "/private"] {
            disk.write(Path::new(path), &pages(&all));
        }
        let store = open(&disk);
        let order = if round % 2 == 0 { ["shared", "private"] } else { ["private", "shared"] };
        for label in order {
            store.add_image(&image(label, label == "private"), &|_, _| true).unwrap();
        }
        let (kept, saved) = take(&store, all);
        assert_eq!(saved.disk, 40);
        drop(store);
        let store = open(&disk);
        assert_eq!(collect(&store, std::slice::from_ref(&kept), &["shared"]).left, ["shared"]);
        disk.replace(Path::new("/shared"), &[]);
        disk.replace(Path::new("/private"), b"the user edits his file");
        check_all(&store, &[kept]).unwrap();
    }
}

/// The power goes after nothing but an image has left, and its file is gone.
#[test]
fn an_image_that_has_left_does_not_come_back() {
    let disk = CrashDisk::default();
    disk.write(Path::new("/a"), &pages(&(1..=40).collect::<Vec<_>>()));
    let store = open(&disk);
    store.add_image(&image("a", false), &|_, _| true).unwrap();
    assert_eq!(collect(&store, &[], &["a"]).left, ["a"]);
    let disk = disk.after_crash(Survive::Nothing);
    assert_eq!(open(&disk).images(), []);
}

/// An image that came back after all, or whose file is another's by now, is not relied on.
#[test]
fn an_image_without_its_file_or_its_owner_is_not_relied_on() {
    let disk = CrashDisk::default();
    for path in ["/a", "/b"] {
        disk.write(Path::new(path), &pages(&(1..=40).collect::<Vec<_>>()));
    }
    let store = open(&disk);
    store.add_image(&image("a", false), &|_, _| true).unwrap();
    store.add_image(&image("b", false), &|_, _| true).unwrap();
    drop(store);
    disk::Disk::remove(&disk, Path::new("/a")).unwrap();
    let store = open(&disk);
    assert_eq!(take(&store, vec![1]).1.disk, 1, "b has it");
    store.trust_images(&std::collections::HashSet::new());
    assert_eq!(take(&store, vec![2]).1.disk, 0);
}

/// What a guest writes into its pages to look like frames costs a repair no time.
#[test]
fn a_repair_does_not_look_for_frames_among_raw_pages() {
    let disk = CrashDisk::default();
    let store = open(&disk);
    let bomb: Vec<u8> = b"SPFR\xff\xff\xff\xff\xff\xff\x01\0\0\0\0\0".repeat(PAGE_SIZE / 16);
    let session = store.begin().unwrap();
    let mut name = names(1);
    session.put(&bomb, &mut name).unwrap();
    let root = session.put_map(&name).unwrap();
    session.commit().unwrap();
    drop(store);
    let path = disk.paths().remove(0);
    let mut bytes = disk.bytes(&path);
    let end = bytes.len() - 1;
    bytes[end] ^= 1;
    disk.replace(&path, &bytes);
    let store = open(&disk);
    assert_eq!(store.set_aside().len(), 1);
    store.repair(&[root], &|| true).unwrap();
    let mut out = vec![0; PAGE_SIZE];
    store.read(&name, &mut out).unwrap();
    assert!(out == bomb);
    assert_eq!(crate::pack::frame_bytes(&bomb), None);
}
