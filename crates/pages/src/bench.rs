//! Doors for the figures of `make bench` and the counts of instructions; no part of the crate's interface.

use std::path::Path;

use crate::error::Result;
use crate::hash::keyed_pages;
use crate::index::synthetic;
use crate::{GroupKey, PAGE_SIZE, PageHash, Store};

/// Keyed BLAKE3 of pages as the store computes it: several side by side. Calls `named` with each hash, in order.
pub fn hash_side_by_side(key: &[u8; 32], pages: &[u8], mut named: impl FnMut([u8; 32])) {
    keyed_pages(key, pages.as_chunks::<PAGE_SIZE>().0, |_, name| named(name));
}

/// Makes the files of a store with so many pages that are nowhere: packs of the usual size with holes for pages, and an index over all of
/// them. The store was closed in order.
pub fn make_synthetic(folder: &Path, key: &GroupKey, pages: u64) -> Result<()> {
    synthetic::make(folder, key, pages)
}

/// The name of a page of [`make_synthetic`]'s store; of one that it does not have.
pub fn synthetic_name(number: u64, pages: u64, known: bool) -> PageHash {
    synthetic::name(number, pages, known).padded()
}

/// Asks the index for all names in one batch; how many it knows.
pub fn look_up(store: &Store, names: &[PageHash]) -> usize {
    let mut known = 0;
    store.inner.index.lookup(names, |_, _, _| known += 1);
    known
}
