//! Who needs how many bytes.

use std::collections::HashMap;

use crate::MapRoot;
use crate::error::Result;
use crate::map::{Child, Forest};
use crate::pack::{Place, View};
use crate::store::{Inner, Store};

/// Stored bytes (pages and map nodes, without framing) that one root reaches, each counted once: what they take in their packs. A page
/// that is a block of an image takes nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Reached from no other root of the question.
    pub exclusive: u64,
    /// Reached from another root too.
    pub shared: u64,
}

impl Store {
    /// What each root needs alone and together with others. Reads each map node once, however many roots share it. Pages
    /// that are missing count nothing.
    pub fn usage(&self, roots: &[MapRoot]) -> Result<Vec<Usage>> {
        let owners: Vec<u32> = (1..=roots.len() as u32).collect();
        Ledger::new(&self.inner, roots)?.settle(&owners)
    }

    /// Stored bytes reached from `root` and none of `others`, and all bytes reached from `root`.
    pub fn exclusive(&self, root: &MapRoot, others: &[MapRoot]) -> Result<(u64, u64)> {
        let mut roots = vec![*root];
        roots.extend(others);
        let usage = self.usage(&roots)?.first().copied().unwrap_or_default();
        Ok((usage.exclusive, usage.exclusive + usage.shared))
    }

    /// Stored bytes that nothing would need any more if all of `dropped` went and `kept` stayed.
    pub fn freed_by(&self, dropped: &[MapRoot], kept: &[MapRoot]) -> Result<u64> {
        let roots: Vec<MapRoot> = dropped.iter().chain(kept).copied().collect();
        // One owner for all that goes, another for all that stays.
        let owners: Vec<u32> =
            roots.iter().enumerate().map(|(i, _)| if i < dropped.len() { 1 } else { 2 }).collect();
        let mut ledger = Ledger::new(&self.inner, &roots)?;
        ledger.settle(&owners)?;
        Ok(ledger.owned().get(&1).copied().unwrap_or(0))
    }
}

/// Reached by nobody so far.
const NOBODY: u32 = 0;
/// Reached by two owners at least.
const SEVERAL: u32 = u32::MAX;

/// For every node and page of a forest: who reaches it, and which root's walk saw it last.
struct Ledger {
    forest: Forest,
    nodes: Vec<Mark>,
    pages: HashMap<u32, Vec<Mark>>,
    view: View,
}

#[derive(Clone, Copy, Default)]
struct Mark {
    owner: u32,
    seen: u32,
}

impl Mark {
    /// Notes a visit; false if this walk was here before.
    fn visit(&mut self, walk: u32, owner: u32) -> bool {
        if self.seen == walk {
            return false;
        }
        self.seen = walk;
        self.owner = match self.owner {
            NOBODY => owner,
            same if same == owner => owner,
            _ => SEVERAL,
        };
        true
    }
}

impl Ledger {
    fn new(store: &Inner, roots: &[MapRoot]) -> Result<Self> {
        let forest = Forest::read(store, roots)?;
        let nodes = vec![Mark::default(); forest.nodes().len()];
        let (mut pages, view) = (HashMap::new(), store.packs.view());
        for child in forest.all_children() {
            if let Child::Pages(first, _) = child
                && let Some(pack) = view.get(first.pack)
            {
                pages
                    .entry(first.pack)
                    .or_insert_with(|| vec![Mark::default(); pack.layout.slots() as usize]);
            }
        }
        Ok(Self { forest, nodes, pages, view })
    }

    /// Walks every root for its owner, then adds up.
    fn settle(&mut self, owners: &[u32]) -> Result<Vec<Usage>> {
        let tops = self.forest.tops.clone();
        let mut reached: Vec<u64> = Vec::with_capacity(tops.len());
        for (walk, (top, owner)) in (1..).zip(tops.iter().zip(owners)) {
            let mut bytes = 0;
            let mut todo: Vec<Child> = top.iter().copied().collect();
            while let Some(child) = todo.pop() {
                match child {
                    Child::Node(number) => {
                        if self.nodes.get_mut(number as usize).is_some_and(|mark| mark.visit(walk, *owner)) {
                            bytes += self.node_bytes(number);
                            todo.extend(self.forest.children(number));
                        }
                    }
                    Child::Pages(first, count) => bytes += self.visit_pages(first, count, walk, *owner),
                    Child::Missing(_) => {}
                }
            }
            reached.push(bytes);
        }
        let owned = self.owned();
        let usage = |(owner, all): (&u32, u64)| {
            let exclusive = owned.get(owner).copied().unwrap_or(0);
            Usage { exclusive, shared: all.saturating_sub(exclusive) }
        };
        Ok(owners.iter().zip(reached).map(usage).collect())
    }

    /// Bytes that each owner reaches alone.
    fn owned(&self) -> HashMap<u32, u64> {
        let nodes = (0..).zip(&self.nodes).map(|(number, mark)| (mark.owner, self.node_bytes(number)));
        let pages = self.pages.iter().flat_map(|(pack, marks)| {
            (0..)
                .zip(marks)
                .map(|(slot, mark)| (mark.owner, slot))
                .filter(|(owner, _)| *owner != NOBODY)
                .map(|(owner, slot)| (owner, self.page_bytes(*pack, slot)))
        });
        nodes.chain(pages).fold(HashMap::new(), |mut sums, (owner, bytes)| {
            *sums.entry(owner).or_default() += bytes;
            sums
        })
    }

    fn node_bytes(&self, number: u32) -> u64 {
        self.forest.nodes().get(number as usize).map_or(0, |node| node.bytes as u64)
    }

    fn page_bytes(&self, pack: u32, slot: u32) -> u64 {
        self.view.get(pack).map_or(0, |pack| pack.layout.page_bytes(slot))
    }

    /// Notes a visit to a run of pages. Bytes of those where this walk was not before.
    fn visit_pages(&mut self, first: Place, count: u16, walk: u32, owner: u32) -> u64 {
        let Some(marks) = self.pages.get_mut(&first.pack) else { return 0 };
        let Some(pack) = self.view.get(first.pack) else { return 0 };
        let slots = first.run(count).filter_map(|place| place.at.slot());
        let is_new = |slot: &u32| marks.get_mut(*slot as usize).is_some_and(|mark| mark.visit(walk, owner));
        slots.filter(is_new).map(|slot| pack.layout.page_bytes(slot)).sum()
    }
}
