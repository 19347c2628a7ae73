//! The map of a RAM block while its pages come in, in any order: the names of a leaf's pages are kept until all of them are known, or
//! until no more can come.

use pages::{LEAF_PAGES, MapRoot, PAGE_SIZE, PageHash, Session};
use qemu::migration::RamBlock;

use crate::error::{Code, Error, Result};

/// A RAM block with the names of its map's leaves.
#[derive(Debug)]
pub(crate) struct BlockLeaves {
    pub(crate) name: String,
    /// Pages it has.
    pub(crate) pages: u64,
    pub(crate) leaves: Vec<PageHash>,
    /// What it was mapped from, and which leaves are not as they are there: the others count nothing. None if all of them count.
    pub(crate) image: Option<(MapRoot, Vec<bool>)>,
}

impl BlockLeaves {
    /// The block, as if it were all zero.
    pub(crate) fn of(block: &RamBlock) -> Self {
        let pages = block.length / PAGE_SIZE as u64;
        let leaves = usize::try_from(pages.div_ceil(LEAF_PAGES as u64)).unwrap_or(usize::MAX);
        Self { name: block.name.clone(), pages, leaves: vec![PageHash::ZERO; leaves], image: None }
    }

    /// The block as it was mapped from an image.
    pub(crate) fn of_image(block: &RamBlock, root: MapRoot) -> Result<Self> {
        let own = Self::of(block);
        if own.pages != root.pages {
            let name = &own.name;
            return Err(Error::new(Code::Failed, format!("the block {name:?} is not as long as its image")));
        }
        let changed = vec![false; own.leaves.len()];
        Ok(Self { image: Some((root, changed)), ..own })
    }

    /// Stores its map.
    pub(crate) fn put_map(&self, session: &dyn Session) -> Result<MapRoot> {
        let Some((root, changed)) = &self.image else {
            return Ok(session.put_map_over(&self.leaves, self.pages)?);
        };
        let leaves = self.leaves.iter().zip(changed).zip(0..).filter(|((_, changed), _)| **changed);
        let leaves: Vec<(u64, PageHash)> = leaves.map(|((leaf, _), number)| (number, *leaf)).collect();
        Ok(session.put_map_changed(root, &leaves)?)
    }
}

/// A RAM block whose pages come in.
#[derive(Debug)]
pub(crate) struct OpenBlock {
    block: BlockLeaves,
    leaves: Vec<Leaf>,
}

/// What is known of a leaf.
#[derive(Clone, Debug)]
enum Leaf {
    /// Nothing: all of its pages may be zero.
    Untouched,
    Open(Box<Names>),
    /// It is stored, and its pages have come.
    Stored,
}

/// The names of a leaf's pages.
#[derive(Clone, Debug)]
struct Names {
    names: [PageHash; LEAF_PAGES],
    /// A bit for each page that has come.
    come: u64,
}

impl OpenBlock {
    pub(crate) fn new(block: &RamBlock) -> Self {
        let block = BlockLeaves::of(block);
        let leaves = vec![Leaf::Untouched; block.leaves.len()];
        Self { block, leaves }
    }

    /// Writes down the name of a page. If each comes `once`, a leaf is stored with its last page.
    pub(crate) fn set(
        &mut self,
        page: usize,
        name: PageHash,
        once: bool,
        session: &dyn Session,
    ) -> Result<()> {
        let (number, place) = (page / LEAF_PAGES, page % LEAF_PAGES);
        let pages = self.pages_of(number);
        let (Some(leaf), Some(stored)) = (self.leaves.get_mut(number), self.block.leaves.get_mut(number))
        else {
            return Err(self.wrong(page, "lies behind its end"));
        };
        let names = match leaf {
            // Most of a guest's memory may never have been touched.
            Leaf::Untouched if !once && name == PageHash::ZERO => return Ok(()),
            Leaf::Untouched => {
                *leaf = Leaf::Open(Box::new(Names { names: [PageHash::ZERO; LEAF_PAGES], come: 0 }));
                let Leaf::Open(names) = leaf else { return Ok(()) };
                names
            }
            Leaf::Open(names) => names,
            Leaf::Stored => return Err(self.wrong(page, "came twice")),
        };
        if let Some(slot) = names.names.get_mut(place) {
            *slot = name;
            names.come |= 1 << place;
        }
        if once && names.come.count_ones() as usize == pages {
            let own = names.names.get(..pages).unwrap_or_default();
            session.put_leaves(own, std::slice::from_mut(stored))?;
            *leaf = Leaf::Stored;
        }
        Ok(())
    }

    /// Stores what is still open: no more pages come. `goes_on` is asked after each MiB or so.
    pub(crate) fn close(
        mut self,
        session: &dyn Session,
        goes_on: &dyn Fn() -> Result<()>,
    ) -> Result<BlockLeaves> {
        for number in 0..self.leaves.len() {
            if number.is_multiple_of(4) {
                goes_on()?;
            }
            let pages = self.pages_of(number);
            if let (Some(Leaf::Open(names)), Some(stored)) =
                (self.leaves.get(number), self.block.leaves.get_mut(number))
            {
                let own = names.names.get(..pages).unwrap_or_default();
                session.put_leaves(own, std::slice::from_mut(stored))?;
            }
        }
        Ok(self.block)
    }

    /// Pages under a leaf: the last one may have fewer than the others.
    fn pages_of(&self, leaf: usize) -> usize {
        let behind = self.block.pages.saturating_sub((leaf * LEAF_PAGES) as u64);
        behind.min(LEAF_PAGES as u64) as usize
    }

    fn wrong(&self, page: usize, what: &str) -> Error {
        Error::new(Code::Failed, format!("page {page} of the block {:?} {what}", self.block.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pages::{GroupKey, PageStore, Store};

    fn page(n: u8) -> [u8; PAGE_SIZE] {
        [n; PAGE_SIZE]
    }

    /// 100 pages: a leaf and a part of one.
    fn block() -> RamBlock {
        RamBlock { name: "ram".into(), length: (100 * PAGE_SIZE) as u64 }
    }

    #[test]
    fn a_map_is_the_same_in_whatever_order_its_pages_come() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::create(folder.path(), GroupKey::generate().unwrap()).unwrap();
        let session = store.begin().unwrap();
        let mut names = vec![PageHash::ZERO; 100];
        for (i, name) in names.iter_mut().enumerate().filter(|(i, _)| i % 3 != 0) {
            session.put(&page(i as u8), std::slice::from_mut(name)).unwrap();
        }
        let whole = session.put_map(&names).unwrap();
        for (once, step) in [(true, 1), (true, 37), (false, 1), (false, 37)] {
            let mut open = OpenBlock::new(&block());
            for i in (0..100).map(|i| i * step % 100) {
                if !once {
                    open.set(i, names[1], once, session.as_ref()).unwrap();
                }
                open.set(i, names[i], once, session.as_ref()).unwrap();
            }
            let closed = open.close(session.as_ref(), &|| Ok(())).unwrap();
            assert_eq!(session.put_map_over(&closed.leaves, closed.pages).unwrap(), whole, "{once} {step}");
        }
    }

    #[test]
    fn what_should_come_once_may_not_come_again() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::create(folder.path(), GroupKey::generate().unwrap()).unwrap();
        let session = store.begin().unwrap();
        let mut open = OpenBlock::new(&block());
        (64..100).try_for_each(|i| open.set(i, PageHash::ZERO, true, session.as_ref())).unwrap();
        assert!(open.set(70, PageHash::ZERO, true, session.as_ref()).is_err());
        assert!(open.set(128, PageHash::ZERO, true, session.as_ref()).is_err());
    }
}
