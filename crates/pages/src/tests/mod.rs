//! Tests of the whole store, on a real folder and on disks that fail.

mod basics;

use crate::{PAGE_SIZE, PageHash};

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
