//! Keyed BLAKE3 of many pages at once.
//!
//! A page is four chunks of BLAKE3's tree, too few to fill the lanes of a wide processor: hashed one page at a time, AVX-512 works at a
//! quarter of its width. So the same chunk of sixteen pages is hashed side by side, then the parents, then the roots. What comes out is
//! `blake3::keyed_hash` of each page, to the bit; the tree is that of the BLAKE3 paper, section 2.1.
//!
//! `blake3::platform` is public but not documented, and so not promised: the crate is pinned to a version, and a test compares.
//!
//! Its assembly for four inputs at once, and for two, loads whole registers from the first of them, up to 48 bytes past that input's
//! end (1.8.7, `vmovups zmm9, zmmword ptr [r8+rdx-0x10]`): no harm to the chunks of one input, which follow each other, and the end of
//! the process if a page is the last before a hole in memory. So it is only ever given eights, which are read to the byte.

use blake3::IncrementCounter;
use blake3::platform::{Platform, le_bytes_from_words_32, words_from_le_bytes_32};

use crate::PAGE_SIZE;

/// Bytes that are compressed at a time.
const BLOCK: usize = 64;
/// Bytes of a chunk.
const CHUNK: usize = 1024;
/// Chunks of a page.
const CHUNKS: usize = PAGE_SIZE / CHUNK;
/// Bytes of a chaining value, and of a name.
const VALUE: usize = 32;
/// Two chaining values make a parent.
const PARENT: usize = 2 * VALUE;
/// Pages hashed side by side: as many as the widest processor has lanes.
pub(crate) const LANES: usize = 16;
/// Pages that hash to nothing are added until there are so many, or a multiple.
const STEP: usize = 8;

/// Flags of the compression function, from the BLAKE3 paper, table 3.
mod flag {
    pub(super) const CHUNK_START: u8 = 1 << 0;
    pub(super) const CHUNK_END: u8 = 1 << 1;
    pub(super) const PARENT: u8 = 1 << 2;
    pub(super) const ROOT: u8 = 1 << 3;
    pub(super) const KEYED_HASH: u8 = 1 << 4;
}

static FILLER: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Calls `named` with the number and the keyed hash of each page, in order.
pub(crate) fn keyed_pages<'a>(
    key: &[u8; VALUE],
    pages: impl IntoIterator<Item = &'a [u8; PAGE_SIZE]>,
    mut named: impl FnMut(usize, [u8; VALUE]),
) {
    let (platform, key) = (Platform::detect(), words_from_le_bytes_32(key));
    let mut pages = pages.into_iter().peekable();
    let mut first = 0;
    while pages.peek().is_some() {
        let mut lanes = [&FILLER; LANES];
        let mut count = 0_usize;
        for (lane, page) in lanes.iter_mut().zip(&mut pages) {
            *lane = page;
            count += 1;
        }
        let names = lanes_of(platform, &key, lanes.get(..count.next_multiple_of(STEP)).unwrap_or_default());
        for (i, name) in names.iter().take(count).enumerate() {
            named(first + i, *name);
        }
        first += count;
    }
}

/// Bytes of a full node of a map: two chunks and a bit.
pub(crate) const NODE: usize = crate::map::MAX_NODE;
const _: () = assert!(2 * CHUNK < NODE && NODE <= 2 * CHUNK + BLOCK);

/// The same of full nodes: two chunks side by side with those of the others, then the bit that is left, then two levels of parents.
pub(crate) fn keyed_nodes(
    key: &[u8; VALUE],
    nodes: &[&[u8; NODE]],
    mut named: impl FnMut(usize, [u8; VALUE]),
) {
    let (platform, key) = (Platform::detect(), words_from_le_bytes_32(key));
    for (nodes, first) in nodes.chunks(LANES).zip((0..).step_by(LANES)) {
        let lanes = nodes.len().next_multiple_of(STEP);
        let chunk = |number: usize| {
            let mut inputs = [FILLER.first_chunk::<CHUNK>().unwrap_or(&[0; CHUNK]); LANES];
            for (input, node) in inputs.iter_mut().zip(nodes) {
                if let Some(chunk) = node.as_chunks::<CHUNK>().0.get(number) {
                    *input = chunk;
                }
            }
            chunks_of(platform, &key, inputs.get(..lanes).unwrap_or_default(), number as u64)
        };
        let left = parents_of(platform, &key, &chunk(0), &chunk(1), lanes, flag::KEYED_HASH | flag::PARENT);
        let mut right = [[0; VALUE]; LANES];
        for (value, node) in right.iter_mut().zip(nodes) {
            let rest = node.as_chunks::<CHUNK>().1;
            let (mut words, mut block) = (key, [0; BLOCK]);
            block.iter_mut().zip(rest).for_each(|(byte, own)| *byte = *own);
            let flags = flag::KEYED_HASH | flag::CHUNK_START | flag::CHUNK_END;
            platform.compress_in_place(&mut words, &block, rest.len() as u8, 2, flags);
            *value = le_bytes_from_words_32(&words);
        }
        let root = flag::KEYED_HASH | flag::PARENT | flag::ROOT;
        let names = parents_of(platform, &key, &left, &right, lanes, root);
        names.iter().take(nodes.len()).enumerate().for_each(|(i, name)| named(first + i, *name));
    }
}

/// The hashes of [`STEP`] pages or of [`LANES`].
fn lanes_of(platform: Platform, key: &[u32; 8], pages: &[&[u8; PAGE_SIZE]]) -> [[u8; VALUE]; LANES] {
    // Chunk by chunk: those with the same number in their pages have the same counter.
    let mut chunks = [[[0; VALUE]; LANES]; CHUNKS];
    for (number, values) in chunks.iter_mut().enumerate() {
        let mut inputs = [&[0; CHUNK]; LANES];
        for (input, page) in inputs.iter_mut().zip(pages) {
            if let Some(chunk) = page.as_chunks::<CHUNK>().0.get(number) {
                *input = chunk;
            }
        }
        *values = chunks_of(platform, key, inputs.get(..pages.len()).unwrap_or_default(), number as u64);
    }
    let [a, b, c, d] = &chunks;
    let parents = flag::KEYED_HASH | flag::PARENT;
    let left = parents_of(platform, key, a, b, pages.len(), parents);
    let right = parents_of(platform, key, c, d, pages.len(), parents);
    parents_of(platform, key, &left, &right, pages.len(), parents | flag::ROOT)
}

/// The values of chunks that have the same number in what they are chunks of.
fn chunks_of(
    platform: Platform,
    key: &[u32; 8],
    inputs: &[&[u8; CHUNK]],
    number: u64,
) -> [[u8; VALUE]; LANES] {
    let mut values = [[0; VALUE]; LANES];
    platform.hash_many(
        inputs,
        key,
        number,
        IncrementCounter::No,
        flag::KEYED_HASH,
        flag::CHUNK_START,
        flag::CHUNK_END,
        values.as_flattened_mut(),
    );
    values
}

fn parents_of(
    platform: Platform,
    key: &[u32; 8],
    left: &[[u8; VALUE]; LANES],
    right: &[[u8; VALUE]; LANES],
    count: usize,
    flags: u8,
) -> [[u8; VALUE]; LANES] {
    let mut nodes = [[0; PARENT]; LANES];
    for ((node, left), right) in nodes.iter_mut().zip(left).zip(right) {
        let (first, second) = node.split_at_mut(VALUE);
        first.copy_from_slice(left);
        second.copy_from_slice(right);
    }
    let mut values = [[0; VALUE]; LANES];
    let nodes = nodes.each_ref();
    let inputs = nodes.get(..count).unwrap_or_default();
    platform.hash_many(inputs, key, 0, IncrementCounter::No, flags, 0, 0, values.as_flattened_mut());
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn many_at_once_are_what_each_is_alone(key: [u8; 32], count in 0usize..70, seed: u64) {
            let mut state = seed | 1;
            let pages: Vec<[u8; PAGE_SIZE]> = (0..count)
                .map(|_| {
                    std::array::from_fn(|_| {
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        state as u8
                    })
                })
                .collect();
            let mut names = Vec::new();
            keyed_pages(&key, &pages, |i, name| {
                assert_eq!(i, names.len());
                names.push(name);
            });
            let alone: Vec<_> = pages.iter().map(|page| *blake3::keyed_hash(&key, page).as_bytes()).collect();
            prop_assert_eq!(names, alone);
            let (nodes, _) = pages.as_flattened().as_chunks::<NODE>();
            let nodes: Vec<_> = nodes.iter().collect();
            let mut names = Vec::new();
            keyed_nodes(&key, &nodes, |i, name| {
                assert_eq!(i, names.len());
                names.push(name);
            });
            let alone: Vec<_> = nodes.iter().map(|node| *blake3::keyed_hash(&key, *node).as_bytes()).collect();
            prop_assert_eq!(names, alone);
        }
    }

    /// Whatever the number and the order of pages: nothing is read behind the last byte of any. This one ends the process if it fails.
    #[test]
    fn nothing_is_read_past_the_end_of_a_page() {
        // Larger than what malloc takes from a heap, so each is a mapping of its own, and the second lies right below the first.
        const BYTES: usize = 64 << 20;
        // malloc keeps 16 bytes before them for itself, and counts 8 behind.
        let buffers: [Vec<u8>; 2] = std::array::from_fn(|_| vec![7; BYTES - 24]);
        let [above, buffer] = buffers;
        drop(above);
        let end = buffer.len() - 64 * PAGE_SIZE;
        let (pages, _) = buffer[end..].as_chunks::<PAGE_SIZE>();
        let one = *blake3::keyed_hash(&[3; 32], &[7; PAGE_SIZE]).as_bytes();
        for count in 1..=40 {
            // The last page of all comes first.
            keyed_pages(&[3; 32], pages.iter().rev().take(count), |_, name| assert_eq!(name, one));
        }
    }
}
