//! Bad days of a disk: it is full in the middle of a batch, read-only, or cannot read a sector; a clock was wrong. A clear error, nothing that
//! was committed is lost, and the next day all goes on.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::crash_disk::CrashDisk;
use super::{SMALL, check_all, names, pages};
use crate::store::Limits;
use crate::*;

type Kept = (MapRoot, Vec<u64>);

fn try_open(disk: &CrashDisk) -> Result<Store> {
    let key = GroupKey::from_bytes([8; 32]);
    Store::open_on(Arc::new(disk.clone()), PathBuf::from("/"), &key, SMALL, None)
}

fn open(disk: &CrashDisk) -> Store {
    try_open(disk).unwrap()
}

fn take(store: &Store, numbers: Vec<u64>) -> Result<Kept> {
    let session = store.begin()?;
    let mut hashes = names(numbers.len());
    session.put(&pages(&numbers), &mut hashes)?;
    let root = session.put_map(&hashes)?;
    session.commit()?;
    Ok((root, numbers))
}

fn collect(store: &Store, kept: &[Kept], compress: bool) -> Result<GcDone> {
    let plan = store.plan_gc_with(|| {
        let compress = compress.then_some(Cold { age: Duration::ZERO, level: 1 });
        let roots = kept.iter().map(|(root, _)| *root).collect();
        Ok::<_, Error>(GcRequest { roots, compress, ..GcRequest::default() })
    })?;
    store.run_gc(&plan, &|_, _| true)
}

#[test]
fn a_disk_that_is_full_after_any_number_of_bytes() {
    let disk = CrashDisk::default();
    let store = open(&disk);
    let mut kept = vec![take(&store, (1..40).collect()).unwrap()];
    let mut full = 0;
    for room in (0..400_000).step_by(9_973) {
        disk.fill(Some(room));
        match take(&store, (30 + room..90 + room).collect()) {
            Ok(taken) => kept.push(taken),
            Err(error) => {
                assert!(error.is_no_space(), "{error}");
                full += 1;
            }
        }
        match collect(&store, &kept, true) {
            Ok(_) => {}
            Err(error) => assert!(error.is_no_space(), "{error}"),
        }
        assert!(store.fold().map_or_else(|error| error.is_no_space(), |()| true));
        disk.fill(None);
        check_all(&store, &kept).unwrap();
        let left = disk.paths().into_iter().filter(|path| path.extension().is_some_and(|end| end == "tmp"));
        assert_eq!(left.count(), 0, "half a pack is left");
    }
    assert!(full > 10 && kept.len() > 3, "{full} {}", kept.len());
    check_all(&open(&disk), &kept).unwrap();
}

#[test]
fn a_store_that_was_made_read_only() {
    let disk = CrashDisk::default();
    let store = open(&disk);
    let kept = vec![take(&store, (1..40).collect()).unwrap(), take(&store, (30..90).collect()).unwrap()];
    disk.set_read_only(true);
    let error = take(&store, vec![200]).unwrap_err();
    assert!(error.to_string().starts_with("create /packs/"), "{error}");
    assert!(!error.is_damage(), "{error}");
    assert!(collect(&store, &kept[1..], false).is_err());
    check_all(&store, &kept[1..]).unwrap();
    // What is known needs no writing, and neither does opening.
    take(&store, (1..30).collect()).unwrap_err();
    drop(store);
    let store = open(&disk);
    check_all(&store, &kept).unwrap();
    assert_eq!(store.fsck(&[], &|_, _| true).unwrap().damage, []);
    disk.set_read_only(false);
    check_all(&store, &[take(&store, vec![200]).unwrap()]).unwrap();
}

#[test]
fn a_sector_that_cannot_be_read_costs_what_is_in_it() {
    let disk = CrashDisk::default();
    let store = open(&disk);
    let lost = take(&store, (1..=16).collect()).unwrap();
    let pack = disk.packs().remove(0);
    let other = take(&store, (20..30).collect()).unwrap();
    // The sixth page.
    disk.rot(Some((pack.clone(), 4096 + 5 * 4096 + 512..4096 + 5 * 4096 + 1024)));
    check_all(&store, std::slice::from_ref(&other)).unwrap();
    let mut hashes = names(16);
    store.map_range(&lost.0, 0, &mut hashes).unwrap();
    for (i, hash) in hashes.iter().enumerate() {
        let mut page = vec![0; PAGE_SIZE];
        let read = store.read(std::slice::from_ref(hash), &mut page);
        assert_eq!(read.is_err(), i == 5, "page {i}");
        if let Err(error) = read {
            assert!(error.is_damage() && error.to_string().contains(pack.to_str().unwrap()), "{error}");
        }
    }
    let roots = [(lost.0, "lost".to_owned()), (other.0, "other".to_owned())];
    let report = store.fsck(&roots, &|_, _| true).unwrap();
    assert_eq!(report.damage.len(), 1, "{report:?}");
    assert_eq!(report.damage[0].labels, ["lost"]);
    // The day after, it can be read again.
    disk.rot(None);
    check_all(&store, &[lost, other]).unwrap();
    assert_eq!(store.fsck(&roots, &|_, _| true).unwrap().damage, []);
}

/// A disk that answers nothing may do so tomorrow: nothing is given up. One that answers, but for a whole pack, has lost that pack; and
/// nobody waits for each of its pages.
#[test]
fn a_disk_that_cannot_be_read_at_all_is_no_damage_and_a_pack_is() {
    let disk = CrashDisk::default();
    let limits = Limits { pack_pages: 4096, ..SMALL };
    let key = GroupKey::from_bytes([8; 32]);
    let store = Store::open_on(Arc::new(disk.clone()), PathBuf::from("/"), &key, limits, None).unwrap();
    let lost = take(&store, (1..=2000).collect()).unwrap();
    let pack = disk.packs().remove(0);
    disk.rot(Some((PathBuf::new(), 4096..usize::MAX)));
    let before = disk.paths();
    let error = store.repair(&[lost.0], &|| true).unwrap_err();
    assert!(matches!(error, Error::NoAnswer { .. }) && error.to_string().contains("/packs/"), "{error}");
    assert_eq!(disk.paths(), before);
    disk.rot(None);
    let other = take(&store, (3000..3010).collect()).unwrap();
    check_all(&store, &[lost.clone(), other.clone()]).unwrap();

    disk.rot(Some((pack.clone(), 4096..usize::MAX)));
    let began = std::time::Instant::now();
    let done = store.repair(&[lost.0, other.0], &|| true).unwrap();
    assert!(began.elapsed() < Duration::from_secs(60), "each page was waited for");
    assert_eq!(done.aside.len(), 1, "{done:?}");
    assert!(done.lost >= 2000, "{done:?}");
    // What is brought again is stored again.
    let again = take(&store, lost.1).unwrap();
    check_all(&store, &[again, other]).unwrap();
}

/// A file from the future is as cold as any: the clock was wrong then, or is now.
#[test]
fn a_clock_that_jumps_does_not_keep_packs_from_being_compressed() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::create(folder.path(), GroupKey::from_bytes([8; 32])).unwrap();
    let kept = take(&store, (1..40).collect()).unwrap();
    let plan = |age| {
        let request = GcRequest {
            roots: vec![kept.0],
            compress: Some(Cold { age: Duration::from_secs(age), level: 1 }),
            ..GcRequest::default()
        };
        store.plan_gc_with(|| Ok::<_, Error>(request)).unwrap().compress.len()
    };
    assert_eq!((plan(3600), plan(0)), (0, 1));
    for entry in std::fs::read_dir(folder.path().join("packs")).unwrap() {
        let file = std::fs::File::options().write(true).open(entry.unwrap().path()).unwrap();
        file.set_modified(std::time::SystemTime::now() + Duration::from_secs(1 << 30)).unwrap();
    }
    assert_eq!(plan(3600), 1);
}
