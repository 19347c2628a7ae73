//! What a collection would do.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::MapRoot;
use crate::PAGE_SIZE;
use crate::error::Result;
use crate::map::{Child, Forest};
use crate::pack::{Pack, slot};
use crate::store::Store;
use crate::sync::lock;

/// What a collection would do; nothing has been done yet.
#[derive(Clone, Debug)]
pub struct GcPlan {
    /// Packs without a live page or node.
    pub delete: Vec<PackPlan>,
    /// Packs of which half at least is dead: what lives in them is written to a new pack.
    pub rewrite: Vec<PackPlan>,
    /// Bytes of pages and nodes that a root needs, in all packs.
    pub live_bytes: u64,
    /// Bytes of pages and nodes that no root needs, in all packs; those of packs that are left alone included.
    pub dead_bytes: u64,
    /// Bytes by which the packs' files will shrink.
    pub freed_bytes: u64,
    /// Packs that are left alone because a session relied on them lately.
    pub in_use: u64,
    /// Everything touched at this tick or later is left alone.
    pub(super) since: u64,
    pub(super) instance: u64,
}

/// What a plan says about one pack.
#[derive(Clone, Debug)]
pub struct PackPlan {
    /// File name.
    pub pack: String,
    /// Bytes of live pages and nodes.
    pub live_bytes: u64,
    /// Bytes of dead pages and nodes.
    pub dead_bytes: u64,
    pub(super) number: u32,
    pub(super) live: Live,
}

/// Live content of one pack.
#[derive(Clone, Debug, Default)]
pub(super) struct Live {
    /// One for each page slot; empty if no page lives.
    pub(super) pages: Vec<bool>,
    /// Places of live nodes.
    pub(super) nodes: HashSet<u32>,
    node_bytes: u64,
    page_count: u64,
}

impl Store {
    /// Plans a collection that keeps what `roots` need. Nothing may be committed between reading the roots and this call
    /// unless a [`Hold`](crate::Hold) covers it; [`Store::plan_gc_with`] has no such condition.
    ///
    /// Fails if a map node is damaged or missing: what lies below it could not be told from garbage. The error names it.
    pub fn plan_gc(&self, roots: &[MapRoot]) -> Result<GcPlan> {
        self.plan_gc_with(|| Ok::<_, crate::Error>(roots.to_vec()))
    }

    /// Plans a collection that keeps what the roots need that `read_roots` returns. It is called after the plan has begun
    /// to watch, so no commit falls between the two. Whoever commits keeps a [`Hold`](crate::Hold) until `read_roots`
    /// would see the root.
    pub fn plan_gc_with<E: From<crate::Error>>(
        &self,
        read_roots: impl FnOnce() -> Result<Vec<MapRoot>, E>,
    ) -> Result<GcPlan, E> {
        let hold = self.inner.clock.hold_all();
        let roots = read_roots()?;
        Ok(self.plan(&roots, hold.since)?)
    }

    fn plan(&self, roots: &[MapRoot], since: u64) -> Result<GcPlan> {
        let _one = lock(&self.inner.collector);
        let mut live = self.mark(roots)?;
        let mut plan = GcPlan {
            delete: Vec::new(),
            rewrite: Vec::new(),
            live_bytes: 0,
            dead_bytes: 0,
            freed_bytes: 0,
            in_use: 0,
            since,
            instance: self.inner.instance,
        };
        for pack in self.inner.packs.all() {
            let relied_on = self.inner.is_relied_on(&pack, since);
            plan.add(&pack, live.remove(&pack.number).unwrap_or_default(), relied_on);
        }
        Ok(plan)
    }

    /// Live content by number of the pack.
    fn mark(&self, roots: &[MapRoot]) -> Result<HashMap<u32, Live>> {
        let mut forest = Forest::read(&self.inner, roots)?;
        if let Some(at) = forest.missing.iter().position(|missing| missing.kind == crate::Kind::Node) {
            return Err(forest.missing.swap_remove(at).why);
        }
        let mut live: HashMap<u32, Live> = HashMap::new();
        for node in forest.nodes() {
            if let Some(place) = self.inner.nodes.get(&node.name) {
                let own = live.entry(place.pack).or_default();
                if own.nodes.insert(place.at) {
                    own.node_bytes += node.bytes as u64;
                }
            }
        }
        for child in forest.all_children() {
            let Child::Page(place) = child else { continue };
            let own = live.entry(place.pack).or_default();
            if own.pages.is_empty() {
                let pages = self.inner.packs.get(place.pack).map_or(0, |pack| pack.layout.pages);
                own.pages = vec![false; pages as usize];
            }
            if let Some(page) = slot(place.at).and_then(|slot| own.pages.get_mut(slot)) {
                own.page_count += u64::from(!*page);
                *page = true;
            }
        }
        Ok(live)
    }
}

impl GcPlan {
    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.delete.is_empty() && self.rewrite.is_empty()
    }

    fn add(&mut self, pack: &Arc<Pack>, live: Live, relied_on: bool) {
        let layout = &pack.layout;
        let page_bytes = u64::from(layout.pages) * PAGE_SIZE as u64;
        let all = page_bytes + (layout.node_end - layout.node_offset);
        let live_bytes = live.page_count * PAGE_SIZE as u64 + live.node_bytes;
        let dead_bytes = all.saturating_sub(live_bytes);
        self.live_bytes += live_bytes;
        self.dead_bytes += dead_bytes;
        if live_bytes > 0 && dead_bytes < live_bytes {
            return;
        }
        if relied_on {
            self.in_use += 1;
            return;
        }
        let entries = u64::from(layout.pages) + u64::from(layout.nodes);
        let gone = entries.saturating_sub(live.page_count + live.nodes.len() as u64);
        let (list, freed) = match live_bytes {
            0 => (&mut self.delete, layout.len),
            _ => (&mut self.rewrite, dead_bytes + gone * crate::pack::ENTRY as u64),
        };
        self.freed_bytes += freed;
        list.push(PackPlan { pack: pack.name(), live_bytes, dead_bytes, number: pack.number, live });
    }
}
