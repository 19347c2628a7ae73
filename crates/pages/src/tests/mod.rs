//! Tests of the whole store, on a real folder and on disks that fail.

mod bad_days;
mod basics;
mod change;
mod crash;
mod crash_disk;
mod damage;
mod fixtures;
mod gc;
mod images;
mod index;
mod losses;
mod model;
mod repair;
#[cfg(feature = "schedules")]
mod schedules;
mod visit;

use std::path::PathBuf;
use std::sync::Arc;

use crate::store::Limits;
use crate::{GroupKey, MapRoot, PAGE_SIZE, PageHash, PageStore, Saved, Store};

/// Small packs, so that a few pages make several.
pub(crate) const SMALL: Limits = Limits { pack_pages: 16, node_bytes: 4096 };

/// A page that differs from those of other numbers; number 0 is the zero page.
pub(crate) fn page(number: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE_SIZE];
    if number > 0 {
        blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut page);
    }
    page
}

/// Several of them, one behind the other.
pub(crate) fn pages(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|n| page(*n)).collect()
}

/// Room for names.
pub(crate) fn names(n: usize) -> Vec<PageHash> {
    vec![PageHash::ZERO; n]
}

/// Every map reads back as its numbered pages; else what is wrong.
pub(crate) fn check_all(store: &Store, kept: &[(MapRoot, Vec<u64>)]) -> Result<(), String> {
    for (root, numbers) in kept {
        let mut hashes = names(numbers.len());
        let mut out = vec![0xee; numbers.len() * PAGE_SIZE];
        store
            .map_range(root, 0, &mut hashes)
            .and_then(|()| store.read(&hashes, &mut out))
            .map_err(|e| format!("{root:?}: {e}"))?;
        if out != pages(numbers) {
            return Err(format!("{root:?}: other bytes than were put"));
        }
    }
    Ok(())
}

/// A store of small packs on such a disk.
pub(crate) fn open_small(disk: &crash_disk::CrashDisk) -> Store {
    let key = GroupKey::from_bytes([6; 32]);
    Store::open_on(Arc::new(disk.clone()), PathBuf::from("/"), &key, SMALL, None).unwrap()
}

/// Stores pages under one map; returns it with their numbers, and where they were found.
pub(crate) fn take(store: &Store, numbers: Vec<u64>) -> ((MapRoot, Vec<u64>), Saved) {
    let session = store.begin().unwrap();
    let mut hashes = names(numbers.len());
    session.put(&pages(&numbers), &mut hashes).unwrap();
    let root = session.put_map(&hashes).unwrap();
    let saved = session.commit().unwrap();
    ((root, numbers), saved)
}
