//! A power cut behind every single operation on the disk: what was committed reads back, whatever of the rest survives.
//!
//! Guards against a wrong order of durability: a pack that has its name before its content, a commit that returns before the
//! folder is synced, a collector that deletes a pack before its successor is durable.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::crash_disk::{CrashDisk, Fault, Survive};
use super::{SMALL, names, pages};
use crate::disk::Disk;
use crate::*;

const FOLDER: &str = "/";

fn open(disk: &CrashDisk) -> Result<Store> {
    let key = GroupKey::from_bytes([9; 32]);
    Store::open_on(Arc::new(disk.clone()), PathBuf::from(FOLDER), &key, SMALL, None)
}

type Kept = Vec<(MapRoot, Vec<u64>)>;

fn take(store: &Store, numbers: Vec<u64>, kept: &mut Kept) -> Result<()> {
    let session = store.begin()?;
    let mut hashes = names(numbers.len());
    session.put(&pages(&numbers), &mut hashes)?;
    let root = session.put_map(&hashes)?;
    session.commit()?;
    kept.push((root, numbers));
    Ok(())
}

fn collect(store: &Store, kept: &Kept) -> Result<gc::GcDone> {
    let roots: Vec<MapRoot> = kept.iter().map(|(root, _)| *root).collect();
    store.run_gc(&store.plan_gc(&roots)?, &|_, _| true)
}

/// Takes, forgets and collects. `kept` is what has to survive a crash at this moment.
fn work(disk: &CrashDisk, kept: &mut Kept) -> Result<()> {
    let store = open(disk)?;
    take(&store, (1..40).collect(), kept)?;
    take(&store, (30..60).chain([0; 70]).chain(1..5).collect(), kept)?;
    let dropped = store.begin()?;
    dropped.put(&pages(&[100, 101]), &mut names(2))?;
    drop(dropped);
    // Half of the packs' pages die: some packs are deleted, others rewritten.
    take(&store, (1..60).filter(|n| n % 5 == 0 && *n > 20).collect(), kept)?;
    kept.remove(0);
    kept.remove(0);
    store.fold()?;
    let done = collect(&store, kept)?;
    assert!(done.deleted > 0 && done.rewritten > 0, "the work is meant to do both: {done:?}");
    take(&store, (20..50).collect(), kept)?;
    // Pages that are blocks of an image, which then goes.
    let path = PathBuf::from("/disk");
    disk.write(&path, &pages(&(200..240).collect::<Vec<_>>()));
    let data = vec![Extent { offset: 0, bytes: 40 * PAGE_SIZE as u64 }];
    let image = NewImage { label: "disk".into(), path: path.clone(), private: false, seen: None, data };
    assert!(store.add_image(&image, &|_, _| true)?);
    take(&store, (210..220).chain(20..25).chain([300]).collect(), kept)?;
    store.fold()?;
    let compress = Some(Cold { age: Duration::ZERO, level: 1 });
    let plan = store.plan_gc_with(|| {
        let roots = kept.iter().map(|(root, _)| *root).collect();
        Ok::<_, Error>(GcRequest { roots, leaving: vec!["disk".into()], compress, ..GcRequest::default() })
    })?;
    let done = store.run_gc(&plan, &|_, _| true)?;
    assert_eq!(done.left, ["disk"]);
    assert!(done.compressed > 0, "{done:?}");
    disk.remove(&path).map_err(Error::io("remove", &path))?;
    store.fold()?;
    take(&store, (230..245).collect(), kept)
}

/// Crashes everywhere. The error says where something was lost, and what.
fn crash_everywhere(fault: Fault) -> std::result::Result<u64, String> {
    let disk = CrashDisk::new(fault);
    work(&disk, &mut Kept::new()).map_err(|e| e.to_string())?;
    let total = disk.operations();
    for last in 0..=total {
        let disk = CrashDisk::new(fault);
        disk.crash_after(last);
        let mut kept = Kept::new();
        let ended = work(&disk, &mut kept);
        // Only the index's mark, which the end of the store takes away, may be there still.
        assert!(ended.is_err() || last + 1 >= total);
        let coins = (0..4).map(|seed| Survive::Some(seed * 7919 + last));
        for survive in [Survive::Nothing, Survive::Everything].into_iter().chain(coins) {
            check(&disk.after_crash(survive), &mut kept.clone()).map_err(|e| {
                format!("crash behind operation {last} of {total}, {survive:?} survives: {e}")
            })?;
        }
    }
    Ok(total)
}

/// Everything kept reads back; the store takes and collects as if nothing had happened.
fn check(disk: &CrashDisk, kept: &mut Kept) -> std::result::Result<(), String> {
    let store = open(disk).map_err(|e| e.to_string())?;
    if !store.set_aside().is_empty() {
        return Err(format!("set aside: {:?}", store.set_aside()));
    }
    if let Some(path) = disk.paths().iter().find(|path| path.extension().is_some_and(|e| e == "tmp")) {
        return Err(format!("{} was left", path.display()));
    }
    super::check_all(&store, kept)?;
    take(&store, (1..70).collect(), kept).map_err(|e| e.to_string())?;
    collect(&store, kept).map_err(|e| e.to_string())?;
    super::check_all(&store, kept)
}

#[test]
fn what_is_committed_survives_a_crash_anywhere() {
    let operations = crash_everywhere(Fault::None).unwrap();
    assert!(operations > 50, "only {operations} operations");
}

#[test]
fn the_check_notices_a_missing_file_sync() {
    let lost = crash_everywhere(Fault::SkipFileSync).unwrap_err();
    let kinds = ["set aside", "is in no readable pack", "is damaged"];
    assert!(kinds.iter().any(|kind| lost.contains(kind)), "{lost}");
}

#[test]
fn the_check_notices_a_missing_folder_sync() {
    let lost = crash_everywhere(Fault::SkipFolderSync).unwrap_err();
    assert!(lost.contains("is in no readable pack"), "{lost}");
}
