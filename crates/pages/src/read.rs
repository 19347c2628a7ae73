//! Reading pages and map nodes: look up, sort by place, read neighbours at once, check everything against its name.

use std::sync::Arc;

use crate::disk::DiskFile;
use crate::error::{Error, Kind, Problem, Result};
use crate::index::{Index, Place};
use crate::map::{MAX_NODE, Node};
use crate::pack::Pack;
use crate::store::Inner;
use crate::{PAGE_SIZE, PageHash};

/// Pages read at once at most: 1 MiB.
const RUN: usize = 256;

/// Places of one page and the next differ by this.
const STEP: u32 = (PAGE_SIZE / 8) as u32;

/// Look-ups of one name before it counts as missing. The collector moves a page at most once while we look.
const ATTEMPTS: usize = 3;

/// A pack with its open file.
pub(crate) type OpenPack = (Arc<Pack>, Arc<dyn DiskFile>);

/// One page to be read: where it lies, and where it goes.
#[derive(Clone, Copy)]
struct Wanted {
    place: Place,
    out: usize,
}

impl Inner {
    /// See [`crate::PageStore::read`].
    pub(crate) fn read_pages(&self, names: &[PageHash], out: &mut [u8]) -> Result<()> {
        let (pages, rest) = out.as_chunks_mut::<PAGE_SIZE>();
        if !rest.is_empty() || pages.len() != names.len() {
            return Err(Error::Misuse("read needs room for as many whole pages as names"));
        }
        let mut wanted: Vec<usize> = Vec::with_capacity(names.len());
        for (i, (name, page)) in names.iter().zip(pages.iter_mut()).enumerate() {
            if *name == PageHash::ZERO { page.fill(0) } else { wanted.push(i) }
        }
        for _ in 0..ATTEMPTS {
            wanted = self.read_found(names, &wanted, pages)?;
            if wanted.is_empty() {
                return Ok(());
            }
        }
        let name = wanted.first().and_then(|i| names.get(*i)).copied().unwrap_or(PageHash::ZERO);
        Err(self.missing(Kind::Page, name))
    }

    /// Reads the numbered pages. Returns the numbers of those whose pack was collected between look-up and reading.
    fn read_found(
        &self,
        names: &[PageHash],
        numbers: &[usize],
        out: &mut [[u8; PAGE_SIZE]],
    ) -> Result<Vec<usize>> {
        let own: Vec<PageHash> = numbers.iter().filter_map(|i| names.get(*i)).copied().collect();
        let mut wanted: Vec<Wanted> = Vec::with_capacity(own.len());
        self.pages.lookup(&own, |i, place| {
            wanted.extend(numbers.get(i).map(|out| Wanted { place, out: *out }));
        });
        if wanted.len() != own.len() {
            let unknown = own.iter().find(|name| self.pages.get(name).is_none());
            // A name that is back by now was never gone: the collector switches, it does not remove and add.
            return Err(self.missing(Kind::Page, *unknown.or(own.first()).unwrap_or(&PageHash::ZERO)));
        }
        wanted.sort_unstable_by_key(|w| (w.place, w.out));
        let mut again = Vec::new();
        for group in wanted.chunk_by(|a, b| a.place.pack == b.place.pack) {
            let Some(number) = group.first().map(|w| w.place.pack) else { continue };
            match self.open_pack(number)? {
                Some((pack, file)) => self.read_group(&pack, &*file, group, names, out)?,
                None => again.extend(group.iter().map(|w| w.out)),
            }
        }
        Ok(again)
    }

    /// Pack and file, or None if it was collected.
    pub(crate) fn open_pack(&self, number: u32) -> Result<Option<OpenPack>> {
        let Some(pack) = self.packs.get(number) else { return Ok(None) };
        match self.packs.file(&pack) {
            Ok(file) => Ok(Some((pack, file))),
            Err(e) if e.is_not_found() && self.packs.get(number).is_none() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Reads pages of one pack, sorted by place.
    fn read_group(
        &self,
        pack: &Pack,
        file: &dyn DiskFile,
        group: &[Wanted],
        names: &[PageHash],
        out: &mut [[u8; PAGE_SIZE]],
    ) -> Result<()> {
        let next = |a: &Wanted, b: &Wanted| b.place.at - a.place.at <= STEP;
        for run in group.chunk_by(next).flat_map(|run| run.chunks(RUN)) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
            let len = ((last.place.at - first.place.at) / STEP) as usize + 1;
            let in_order = run.windows(2).all(|w| matches!(w, [a, b] if a.out + 1 == b.out));
            let direct = in_order && len == run.len();
            let mut scratch = Vec::new();
            let bytes: &mut [[u8; PAGE_SIZE]] = if direct {
                out.get_mut(first.out..=last.out).unwrap_or_default()
            } else {
                scratch.resize(len, [0; PAGE_SIZE]);
                &mut scratch
            };
            file.read_at(bytes.as_flattened_mut(), first.place.offset())
                .map_err(Error::io("read", &pack.path))?;
            let slot = |wanted: &Wanted| ((wanted.place.at - first.place.at) / STEP) as usize;
            let mut bad = None;
            self.names.pages(run.iter().filter_map(|wanted| bytes.get(slot(wanted))), |number, found| {
                let name = run.get(number).and_then(|wanted| names.get(wanted.out));
                bad = bad.or(name.filter(|name| **name != found));
            });
            if let Some(name) = bad {
                return Err(damaged(Kind::Page, *name, pack, Problem::Content));
            }
            if !direct {
                for wanted in run {
                    if let (Some(to), Some(from)) = (out.get_mut(wanted.out), scratch.get(slot(wanted))) {
                        to.copy_from_slice(from);
                    }
                }
            }
        }
        Ok(())
    }

    /// A node by its name, which must be of this level; from the cache if it was used lately.
    pub(crate) fn node(&self, name: &PageHash, level: u8) -> Result<Arc<Node>> {
        let node = match self.node_cache.get(name) {
            Some(node) => node,
            None => {
                let (node, _) = self.read_node(name)?;
                let node = Arc::new(node);
                self.node_cache.put(*name, node.clone());
                node
            }
        };
        if node.level == level { Ok(node) } else { Err(self.wrong_level(name)) }
    }

    /// Reads and checks a node, past the cache; with its length in bytes.
    pub(crate) fn read_node(&self, name: &PageHash) -> Result<(Node, usize)> {
        for _ in 0..ATTEMPTS {
            let Some(place) = self.nodes.get(name) else { break };
            let Some((pack, file)) = self.open_pack(place.pack)? else { continue };
            return self.read_node_at(&pack, &*file, place.offset(), name);
        }
        Err(self.missing(Kind::Node, *name))
    }

    /// Reads and checks a node at a known place.
    pub(crate) fn read_node_at(
        &self,
        pack: &Pack,
        file: &dyn DiskFile,
        offset: u64,
        name: &PageHash,
    ) -> Result<(Node, usize)> {
        let bad = |problem| damaged(Kind::Node, *name, pack, problem);
        let room = pack.layout.node_end.saturating_sub(offset).min(MAX_NODE as u64) as usize;
        let mut bytes = [0; MAX_NODE];
        let bytes = bytes.get_mut(..room).unwrap_or_default();
        file.read_at(bytes, offset).map_err(Error::io("read", &pack.path))?;
        let (node, len) = Node::decode(bytes).map_err(bad)?;
        match bytes.get(..len) {
            Some(own) if self.names.node(own) == *name => Ok((node, len)),
            _ => Err(bad(Problem::Content)),
        }
    }

    /// A node that is intact, but at a place of the tree where it cannot be.
    pub(crate) fn wrong_level(&self, name: &PageHash) -> Error {
        let pack = self.nodes.get(name).and_then(|place| self.packs.get(place.pack));
        let pack = pack.map_or_else(String::new, |pack| pack.name());
        Error::Damaged { kind: Kind::Node, name: *name, pack, problem: Problem::Field("node level") }
    }

    pub(crate) fn missing(&self, kind: Kind, name: PageHash) -> Error {
        Error::Missing { kind, name, set_aside: self.set_aside_names() }
    }

    pub(crate) fn index(&self, kind: Kind) -> &Index {
        match kind {
            Kind::Page => &self.pages,
            Kind::Node => &self.nodes,
        }
    }
}

pub(crate) fn damaged(kind: Kind, name: PageHash, pack: &Pack, problem: Problem) -> Error {
    Error::Damaged { kind, name, pack: pack.name(), problem }
}
