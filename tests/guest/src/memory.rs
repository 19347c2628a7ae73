//! Memory filled with a chosen mix of content, hashed afresh on request.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::page::{self, Page, ZERO, hash, mix, randomise};

/// Words of a page.
const WORDS: u64 = (page::SIZE / 8) as u64;

/// What part of the pages is of which kind, in percent, and the seed of the random ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mix {
    /// Incompressible, and different from every other page.
    pub(crate) unique: usize,
    /// Incompressible, and each eight times.
    pub(crate) dup: usize,
    /// Copies of blocks of the known file on the disk.
    pub(crate) disk: usize,
    /// Zeros.
    pub(crate) zero: usize,
    /// What the random content is derived from.
    pub(crate) seed: u64,
}

impl Default for Mix {
    fn default() -> Mix {
        Mix { unique: 40, dup: 20, disk: 20, zero: 20, seed: 1 }
    }
}

/// How often a page of the kind `dup` is there.
const COPIES: usize = 8;

/// The filled pages.
#[derive(Default)]
pub(crate) struct Memory {
    pages: Vec<Page>,
}

impl Memory {
    /// Replaces what is there by `mib` MiB of `mix`; blocks of `known` serve for its part `disk`.
    ///
    /// The kinds alternate in runs that add up to a hundred pages, so each is all over the memory.
    pub(crate) fn fill(&mut self, mib: usize, mix_of: Mix, known: &Path) -> io::Result<usize> {
        let Mix { unique, dup, disk, zero, seed } = mix_of;
        if [unique, dup, disk, zero].iter().fold(0_usize, |sum, &part| sum.saturating_add(part)) != 100 {
            return Err(io::Error::other("the parts do not add up to 100"));
        }
        self.pages = Vec::new();
        let known = if disk > 0 { Some(Known::open(known)?) } else { None };
        let count = mib.saturating_mul(page::PER_MIB);
        let mut pages = Vec::new();
        pages.try_reserve_exact(count).map_err(io::Error::other)?;
        let (mut duplicates, mut blocks) = (0, 0);
        for index in 0..count {
            pages.push(ZERO);
            let Some(Page(bytes)) = pages.last_mut() else { continue };
            let place = index % 100;
            if place < unique {
                randomise(bytes, mix(seed, index as u64));
            } else if place < unique + dup {
                randomise(bytes, mix(!seed, (duplicates / COPIES) as u64));
                duplicates += 1;
            } else if let Some(known) = known.as_ref().filter(|_| place < unique + dup + disk) {
                known.block(blocks, bytes)?;
                blocks += 1;
            }
        }
        self.pages = pages;
        Ok(count)
    }

    /// The number of filled pages.
    pub(crate) fn count(&self) -> usize {
        self.pages.len()
    }

    /// The hash of all pages, in their order.
    pub(crate) fn hash(&self) -> u64 {
        self.pages.iter().fold(0, |sum, page| mix(sum, hash(&page.0)))
    }

    /// The hashes of `count` pages from `first` on; fewer where the memory ends.
    pub(crate) fn hashes(&self, first: usize, count: usize) -> impl Iterator<Item = u64> {
        self.pages.iter().skip(first).take(count).map(|page| hash(&page.0))
    }

    /// Rewrites `count` pages; `seed` decides which and with what.
    pub(crate) fn mutate(&mut self, seed: u64, count: u64) -> u64 {
        let total = self.pages.len() as u64;
        if total == 0 {
            return 0;
        }
        for step in 0..count {
            let index = (mix(seed, step) % total) as usize;
            if let Some(page) = self.pages.get_mut(index) {
                randomise(&mut page.0, mix(seed.rotate_left(32), step));
            }
        }
        count
    }
}

impl Memory {
    /// Looks at `steps` words, one after the other, that lie anywhere: where the next one is depends on what the last one was, so nothing
    /// can be fetched before it is its turn. With `write` each is changed. Returns what the last one came to.
    pub(crate) fn walk(&mut self, seed: u64, steps: u64, write: bool) -> u64 {
        let words = self.pages.len() as u64 * WORDS;
        let mut state = mix(seed, words);
        for _ in 0..steps {
            // The upper half of the product: as even as a remainder, and cheaper.
            let place = ((u128::from(state) * u128::from(words)) >> 64) as u64;
            let page = self.pages.get_mut((place / WORDS) as usize);
            let at = (place % WORDS) as usize * 8;
            let Some(bytes) = page.and_then(|page| page.0.get_mut(at..at + 8)) else { break };
            let word = bytes.as_ref().try_into().map_or(0, u64::from_le_bytes);
            state = (state ^ word).wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
            if write {
                bytes.copy_from_slice(&state.to_le_bytes());
            }
        }
        state
    }
}

/// The file of known content on the disk.
struct Known {
    file: File,
    blocks: usize,
}

impl Known {
    fn open(path: &Path) -> io::Result<Known> {
        let file = File::open(path)?;
        let blocks = (file.metadata()?.len() / page::SIZE as u64) as usize;
        if blocks == 0 {
            return Err(io::Error::other("the known file is shorter than one block"));
        }
        Ok(Known { file, blocks })
    }

    /// Copies a block; the numbering wraps around at the end of the file.
    fn block(&self, number: usize, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, (number % self.blocks * page::SIZE) as u64)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const NO_DISK: Mix = Mix { unique: 50, dup: 30, disk: 0, zero: 20, seed: 3 };

    fn filled(mix: Mix) -> Memory {
        let mut memory = Memory::default();
        memory.fill(5, mix, Path::new("/nonexistent")).unwrap();
        memory
    }

    #[test]
    fn the_mix_is_what_was_asked_for() {
        let memory = filled(NO_DISK);
        let mut counts: HashMap<u64, usize> = HashMap::new();
        for hash in memory.hashes(0, usize::MAX) {
            *counts.entry(hash).or_default() += 1;
        }
        // 1280 pages: 12 runs of a hundred and 80 of the next one.
        assert_eq!(counts.get(&hash(&ZERO.0)), Some(&240));
        assert_eq!(counts.values().filter(|&&n| n == 1).count(), 650);
        assert_eq!(counts.values().filter(|&&n| n == COPIES).count(), 48);
    }

    #[test]
    fn the_hash_tells_a_changed_page_and_names_it() {
        let mut memory = filled(NO_DISK);
        let (whole, pages) = (memory.hash(), memory.hashes(0, usize::MAX).collect::<Vec<_>>());
        memory.pages[700].0[4000] ^= 1;
        assert_ne!(memory.hash(), whole);
        let wrong: Vec<usize> = memory
            .hashes(0, usize::MAX)
            .zip(pages)
            .enumerate()
            .filter(|(_, (a, b))| a != b)
            .map(|(i, _)| i)
            .collect();
        assert_eq!(wrong, [700]);
    }

    #[test]
    fn the_same_changes_lead_to_the_same_memory() {
        let (mut a, mut b) = (filled(NO_DISK), filled(NO_DISK));
        a.mutate(9, 40);
        assert_ne!(a.hash(), b.hash());
        b.mutate(9, 40);
        assert_eq!(a.hash(), b.hash());
    }

    #[test]
    fn a_walk_depends_on_what_it_finds_and_writes_only_if_it_is_to() {
        let (mut a, mut b) = (filled(NO_DISK), filled(NO_DISK));
        let before = a.hash();
        let end = a.walk(4, 1000, false);
        assert_eq!((a.hash(), b.walk(4, 1000, false)), (before, end));
        assert_ne!(a.walk(5, 1000, false), end);
        b.mutate(9, 640);
        assert_ne!(b.walk(4, 1000, false), end);
        let pages = a.hashes(0, usize::MAX).collect::<Vec<_>>();
        a.walk(4, 1000, true);
        let changed = a.hashes(0, usize::MAX).zip(pages).filter(|(now, then)| now != then).count();
        assert!(changed > 600, "of 1280 pages {changed} were found by 1000 steps");
        assert_eq!(Memory::default().walk(4, 1000, true), mix(4, 0), "nothing is there");
    }

    #[test]
    fn a_mix_has_to_add_up() {
        let mut memory = Memory::default();
        assert!(memory.fill(1, Mix { zero: 21, ..NO_DISK }, Path::new("/nonexistent")).is_err());
        assert!(memory.fill(1, Mix::default(), Path::new("/nonexistent")).is_err(), "no known file");
    }
}
