//! The maps of several roots, each node read and each name looked up once however many roots share it.
//!
//! What is asked of it (what is live, what is shared, what damage touches) are walks over numbers in memory: twelve bytes for each child
//! of a different node, or for a run of pages that lie behind each other, as those do that came together. So a leaf in which one page
//! has changed takes three runs, not 64 children.

use std::collections::HashMap;

use crate::error::{Error, Kind, Result};
use crate::pack::Place;
use crate::store::Inner;
use crate::{MapRoot, PageHash};

use super::top_level;

/// What lies under a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Child {
    /// Number of a node of the forest.
    Node(u32),
    /// Pages that lie behind each other, where they were when the forest was read: the place of the first, and how many.
    Pages(Place, u16),
    /// Number of an entry in [`Forest::missing`].
    Missing(u32),
}

/// A node of the forest.
pub(crate) struct ForestNode {
    pub(crate) name: PageHash,
    /// Bytes in its pack.
    pub(crate) bytes: usize,
    first: usize,
    count: usize,
}

/// What a map refers to and cannot be read.
#[derive(Debug)]
pub(crate) struct Missing {
    pub(crate) kind: Kind,
    pub(crate) name: PageHash,
    pub(crate) why: Error,
}

/// All maps of some roots.
pub(crate) struct Forest {
    nodes: Vec<ForestNode>,
    children: Vec<Child>,
    /// Top of each root's map, in the order given; none if all its pages are zero.
    pub(crate) tops: Vec<Option<Child>>,
    pub(crate) missing: Vec<Missing>,
    known: HashMap<(PageHash, u8), Child>,
}

impl Forest {
    /// Reads the maps. What is damaged or missing is noted; only what is no damage (a failing system call) is an error.
    pub(crate) fn read(store: &Inner, roots: &[MapRoot]) -> Result<Self> {
        let mut forest = Self {
            nodes: Vec::new(),
            children: Vec::new(),
            tops: Vec::new(),
            missing: Vec::new(),
            known: HashMap::new(),
        };
        for root in roots {
            let top = match root.node {
                PageHash::ZERO => None,
                name => Some(forest.node(store, name, top_level(root.pages))?),
            };
            forest.tops.push(top);
        }
        forest.known = HashMap::new();
        Ok(forest)
    }

    /// Number of nodes that could be read.
    pub(crate) fn nodes(&self) -> &[ForestNode] {
        &self.nodes
    }

    /// All children of all nodes, shared ones once.
    pub(crate) fn all_children(&self) -> &[Child] {
        &self.children
    }

    /// Children of a node.
    pub(crate) fn children(&self, node: u32) -> &[Child] {
        let own = self.nodes.get(node as usize).map(|n| n.first..n.first + n.count);
        own.and_then(|range| self.children.get(range)).unwrap_or_default()
    }

    /// Depth is bounded by the level, which goes down by one each time.
    fn node(&mut self, store: &Inner, name: PageHash, level: u8) -> Result<Child> {
        if let Some(known) = self.known.get(&(name, level)) {
            return Ok(*known);
        }
        let child = match store.read_node(&name) {
            Ok((node, _)) if node.level != level => self.miss(Kind::Node, name, store.wrong_level(&name)),
            Ok((node, bytes)) => {
                let mut own = Vec::with_capacity(node.names().len());
                match level.checked_sub(1) {
                    Some(lower) => {
                        for below in node.names() {
                            own.push(self.node(store, *below, lower)?);
                        }
                    }
                    None => self.pages(store, node.names(), &mut own),
                }
                let number = self.nodes.len() as u32;
                self.nodes.push(ForestNode { name, bytes, first: self.children.len(), count: own.len() });
                self.children.append(&mut own);
                Child::Node(number)
            }
            Err(why) if why.is_damage() => self.miss(Kind::Node, name, why),
            Err(why) => return Err(why),
        };
        self.known.insert((name, level), child);
        Ok(child)
    }

    fn pages(&mut self, store: &Inner, names: &[PageHash], own: &mut Vec<Child>) {
        let mut places = vec![None; names.len()];
        store.index.lookup_surely(names, |i, place, _| {
            if let Some(slot) = places.get_mut(i) {
                *slot = Some(place);
            }
        });
        for (name, place) in names.iter().zip(places) {
            match (place, own.last_mut()) {
                (Some(place), Some(Child::Pages(first, count))) if first.is_before(*count, place) => {
                    *count += 1
                }
                (Some(place), _) => own.push(Child::Pages(place, 1)),
                (None, _) => own.push(self.miss(Kind::Page, *name, store.missing(Kind::Page, *name))),
            }
        }
    }

    fn miss(&mut self, kind: Kind, name: PageHash, why: Error) -> Child {
        self.missing.push(Missing { kind, name, why });
        Child::Missing(self.missing.len() as u32 - 1)
    }
}
