//! Counting equal pages, for figures about de-duplication: whole pages are compared, not their hashes, so that what is counted
//! depends on nothing that the page store does.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Result, system};

const PAGE: usize = 4096;
/// Read at a time.
const CHUNK: usize = 256 * PAGE;

/// The pages of memory images that are not zero.
#[derive(Debug, Default)]
pub(crate) struct Pages(HashMap<Box<[u8]>, u64>);

impl Pages {
    /// Adds the pages of a file.
    pub(crate) fn add(&mut self, path: &Path) -> Result<()> {
        each_block(path, |page| match self.0.get_mut(page) {
            Some(times) => *times += 1,
            None => {
                self.0.insert(page.into(), 1);
            }
        })
    }

    /// How many there are, equal ones as often as they are there.
    pub(crate) fn all(&self) -> u64 {
        self.0.values().sum()
    }

    /// How many different ones.
    pub(crate) fn different(&self) -> u64 {
        self.0.len() as u64
    }

    /// Takes out those that are equal to a block of a file, wherever it lies.
    pub(crate) fn remove_blocks_of(&mut self, path: &Path) -> Result<()> {
        each_block(path, |block| {
            self.0.remove(block);
        })
    }
}

/// Calls `each` with every block of a file that is not zero; a last one that is not whole is left out.
fn each_block(path: &Path, mut each: impl FnMut(&[u8])) -> Result<()> {
    let mut file = File::open(path).map_err(system("open", path))?;
    let mut chunk = Vec::with_capacity(CHUNK);
    loop {
        chunk.clear();
        file.by_ref().take(CHUNK as u64).read_to_end(&mut chunk).map_err(system("read", path))?;
        if chunk.is_empty() {
            return Ok(());
        }
        let blocks = chunk.chunks_exact(PAGE).filter(|block| block.iter().any(|&byte| byte != 0));
        blocks.for_each(&mut each);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_pages_count_once_and_blocks_of_a_file_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, pages: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, pages.iter().flat_map(|&fill| [fill; PAGE]).collect::<Vec<_>>()).unwrap();
            path
        };
        let many: Vec<u8> = (0..=255).cycle().take(600).collect();
        let (first, second, disk) = (write("a", &[1, 0, 1, 2]), write("b", &many), write("c", &[0, 2, 7]));
        let mut pages = Pages::default();
        pages.add(&first).unwrap();
        assert_eq!((pages.all(), pages.different()), (3, 2));
        pages.add(&second).unwrap();
        // 600 pages, of which every 256th is zero.
        assert_eq!((pages.all(), pages.different()), (3 + 597, 255));
        pages.remove_blocks_of(&disk).unwrap();
        assert_eq!(pages.different(), 253);
        assert!(pages.add(&folder.path().join("missing")).is_err());
    }
}
