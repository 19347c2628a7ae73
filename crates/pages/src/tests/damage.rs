//! One flipped bit or a cut anywhere in a pack: never a panic, never wrong bytes, always found by `fsck`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::crash_disk::CrashDisk;
use super::{SMALL, names, pages};
use crate::*;

const NUMBERS: [u64; 7] = [1, 2, 0, 3, 4, 1, 5];

fn open(disk: &CrashDisk) -> Result<Store> {
    let key = GroupKey::from_bytes([4; 32]);
    Store::open_on(Arc::new(disk.clone()), PathBuf::from("/"), &key, SMALL, None)
}

fn take(store: &Store, numbers: &[u64]) -> MapRoot {
    let session = store.begin().unwrap();
    let mut hashes = names(numbers.len());
    session.put(&pages(numbers), &mut hashes).unwrap();
    let root = session.put_map(&hashes).unwrap();
    session.commit().unwrap();
    root
}

/// A disk with one intact pack, its path and the map in it.
fn one_pack() -> (CrashDisk, PathBuf, MapRoot) {
    let disk = CrashDisk::default();
    let root = take(&open(&disk).unwrap(), &NUMBERS);
    let path = disk.paths().remove(0);
    (disk, path, root)
}

fn read_back(store: &Store, root: &MapRoot) -> Result<Vec<u8>> {
    let mut hashes = names(root.pages as usize);
    store.map_range(root, 0, &mut hashes)?;
    let mut out = vec![0; hashes.len() * PAGE_SIZE];
    store.read(&hashes, &mut out)?;
    Ok(out)
}

/// Opens the damaged store. Returns whether reading noticed.
fn look(disk: &CrashDisk, root: &MapRoot, what: &str) -> bool {
    let store = open(disk).unwrap_or_else(|e| panic!("{what}: cannot be opened: {e}"));
    let read = read_back(&store, root);
    if let Ok(bytes) = &read {
        assert!(*bytes == pages(&NUMBERS), "{what}: wrong bytes");
    }
    if let Err(e) = &read {
        assert!(e.is_damage(), "{what}: {e}");
    }
    let report = store.fsck(&[(*root, "web@a".into())], &|_, _| true).unwrap();
    assert!(!report.damage.is_empty(), "{what}: not found");
    if read.is_err() {
        assert!(report.damage.iter().any(|d| d.labels == ["web@a"]), "{what}: {report:?}");
    }
    read.is_err()
}

#[test]
fn an_intact_pack_is_found_intact() {
    let (disk, _, root) = one_pack();
    let store = open(&disk).unwrap();
    let report = store.fsck(&[(root, "web@a".into())], &|_, _| true).unwrap();
    assert_eq!((report.packs, report.pages, report.nodes, report.roots), (1, 5, 1, 1));
    assert_eq!(report.damage, []);
}

#[test]
fn a_flipped_bit_anywhere() {
    let (disk, path, root) = one_pack();
    let intact = disk.bytes(&path);
    let behind_pages = 4096 + 5 * PAGE_SIZE;
    let sampled = (0..behind_pages).step_by(37);
    let mut noticed = 0;
    for at in (0..64).chain(sampled).chain(behind_pages..intact.len()) {
        let mut bytes = intact.clone();
        bytes[at] ^= 1 << (at % 8);
        disk.replace(&path, &bytes);
        noticed += u64::from(look(&disk, &root, &format!("bit flipped at {at} of {}", intact.len())));
    }
    assert!(noticed > 500);
}

#[test]
fn a_cut_or_a_tail_anywhere() {
    let (disk, path, root) = one_pack();
    let intact = disk.bytes(&path);
    let ends = intact.len() - 600..intact.len();
    for len in (0..intact.len()).step_by(211).chain(ends) {
        disk.replace(&path, &intact[..len]);
        assert!(look(&disk, &root, &format!("cut to {len}")));
    }
    let mut longer = intact.clone();
    longer.push(0);
    disk.replace(&path, &longer);
    assert!(look(&disk, &root, "a byte too many"));
}

#[test]
fn one_bad_pack_leaves_the_others_in_use() {
    let (disk, bad, first) = one_pack();
    let store = open(&disk).unwrap();
    let second = take(&store, &[10, 11]);
    let both = take(&store, &[1, 10]);
    disk.replace(&bad, &[0; 100]);
    let store = open(&disk).unwrap();
    assert_eq!(store.set_aside(), [file_name(&bad)]);
    assert!(read_back(&store, &second).unwrap() == pages(&[10, 11]));
    let error = read_back(&store, &both).unwrap_err().to_string();
    assert!(error.starts_with("page ") && error.contains(&file_name(&bad)), "{error}");
    let roots = [(first, "web@a".into()), (second, "web@b".into()), (both, "db@c".into())];
    let report = store.fsck(&roots, &|_, _| true).unwrap();
    let pack = report.damage.iter().find(|d| d.what.contains(&file_name(&bad))).unwrap();
    assert_eq!(
        (pack.problem.as_str(), &*pack.labels),
        ("too short", &["db@c".to_owned(), "web@a".to_owned()][..])
    );
    // Garbage cannot be told from what a lost node leads to.
    assert!(store.plan_gc(&[first]).unwrap_err().is_damage());
    // A set-aside pack is nobody's garbage.
    let plan = store.plan_gc(&[]).unwrap();
    store.run_gc(&plan, &|_, _| true).unwrap();
    assert_eq!(disk.paths(), [bad]);
    // What is lost can be stored again.
    assert!(read_back(&store, &take(&store, &NUMBERS)).unwrap() == pages(&NUMBERS));
}

#[test]
fn a_later_format_is_refused_as_such() {
    let (disk, path, _) = one_pack();
    let mut bytes = disk.bytes(&path);
    bytes[8] = 3;
    let checksum = *blake3::hash(&bytes[..4064]).as_bytes();
    bytes[4064..4096].copy_from_slice(&checksum);
    disk.replace(&path, &bytes);
    let error = open(&disk).unwrap_err();
    assert!(matches!(error, Error::NewerFormat { version: 3, .. }), "{error}");
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}
