//! What a collection would do.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::MapRoot;
use crate::error::{Error, Result};
use crate::map::Child;
use crate::pack::{At, Body, ENTRY, Pack};
use crate::planted::{Mistake, is_made};
use crate::store::{Inner, Store};
use crate::sync::lock;

/// What a collection would do; nothing has been done yet.
#[derive(Clone, Debug)]
pub struct GcPlan {
    /// Packs without a live page or node.
    pub delete: Vec<PackPlan>,
    /// Packs of which half at least is dead, and images that go: what lives in them is written to a new pack.
    pub rewrite: Vec<PackPlan>,
    /// Packs that have not been written to frames yet: what lives in them is compressed into a new pack.
    pub compress: Vec<PackPlan>,
    /// Bytes of pages and nodes that a root needs, in all packs.
    pub live_bytes: u64,
    /// Bytes of pages and nodes that no root needs, in all packs; those of packs that are left alone included.
    pub dead_bytes: u64,
    /// Bytes by which the packs' files will shrink.
    pub freed_bytes: u64,
    /// Bytes of pages that lie on images that go, and have to be written.
    pub moved_bytes: u64,
    /// Packs that are left alone because a session relied on them lately.
    pub in_use: u64,
    /// Everything touched at this tick or later is left alone.
    pub(super) since: u64,
    pub(super) instance: u64,
    /// Level of zstd for what is compressed.
    pub(super) level: i32,
    thorough: bool,
}

/// What a plan says about one pack.
#[derive(Clone, Debug)]
pub struct PackPlan {
    /// File name.
    pub pack: String,
    /// Label of the image that goes.
    pub image: Option<String>,
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
    pub(super) nodes: HashSet<At>,
    node_bytes: u64,
    page_bytes: u64,
    page_count: u64,
}

/// What a collection is asked for.
#[derive(Clone, Debug, Default)]
pub struct GcRequest {
    /// All maps that anybody needs.
    pub roots: Vec<MapRoot>,
    /// Labels of images whose files are about to go: nothing is left on them.
    pub leaving: Vec<String>,
    /// Packs of which a sixteenth is dead are worth rewriting; else half of it must be.
    pub thorough: bool,
    /// Also compress packs that were not touched since they were written, if their files are older than this.
    pub compress: Option<Cold>,
}

/// Which packs are compressed, and how.
#[derive(Clone, Copy, Debug)]
pub struct Cold {
    /// Only files that were written so long ago.
    pub age: Duration,
    /// Level of zstd.
    pub level: i32,
}

impl Store {
    /// Plans a collection that keeps what `roots` need. Nothing may be committed between reading the roots and this call
    /// unless a [`Hold`](crate::Hold) covers it; [`Store::plan_gc_with`] has no such condition.
    ///
    /// Fails if a map node is damaged or missing: what lies below it could not be told from garbage. The error names it.
    pub fn plan_gc(&self, roots: &[MapRoot]) -> Result<GcPlan> {
        self.plan_gc_with(|| {
            Ok::<_, crate::Error>(GcRequest { roots: roots.to_vec(), ..GcRequest::default() })
        })
    }

    /// What a collection would do, as far as that can be told while another one may be at work. It cannot be carried out.
    pub fn estimate_gc(&self, request: &GcRequest) -> Result<GcPlan> {
        let since = self.inner.clock.hold_all().since;
        Ok(GcPlan { instance: 0, ..self.plan(request, since)? })
    }

    /// Plans the collection that `ask` asks for. It is called after the plan has begun to watch, so no commit falls between the two.
    /// Whoever commits keeps a [`Hold`](crate::Hold) until `ask` would see the root.
    pub fn plan_gc_with<E: From<crate::Error>>(
        &self,
        ask: impl FnOnce() -> Result<GcRequest, E>,
    ) -> Result<GcPlan, E> {
        let hold = self.inner.clock.hold_all();
        let request = ask()?;
        let _one = lock(&self.inner.collector);
        Ok(self.plan(&request, hold.since)?)
    }

    fn plan(&self, request: &GcRequest, since: u64) -> Result<GcPlan> {
        let mut live = self.mark(&request.roots)?;
        let mut plan = GcPlan {
            delete: Vec::new(),
            rewrite: Vec::new(),
            compress: Vec::new(),
            level: request.compress.map_or(0, |cold| cold.level),
            thorough: request.thorough,
            live_bytes: 0,
            dead_bytes: 0,
            freed_bytes: 0,
            moved_bytes: 0,
            in_use: 0,
            since,
            instance: self.inner.instance,
        };
        for pack in self.inner.packs.all() {
            let relied_on = self.inner.is_relied_on(&pack, since);
            let live = live.remove(&pack.number).unwrap_or_default();
            match pack.layout.image() {
                None => plan.add(&pack, live, relied_on, self.inner.is_cold(&pack, request.compress)),
                Some(image) if request.leaving.contains(&image.label) => {
                    let live = if is_made(Mistake::LeaveNothing) { Live::default() } else { live };
                    plan.leave(&pack, &image.label, live, relied_on);
                }
                Some(_) => {}
            }
        }
        Ok(plan)
    }

    /// Live content by number of the pack.
    fn mark(&self, roots: &[MapRoot]) -> Result<HashMap<u32, Live>> {
        let mut forest = self.inner.forest_surely(roots)?;
        if let Some(at) = forest.missing.iter().position(|missing| missing.kind == crate::Kind::Node) {
            return Err(forest.missing.swap_remove(at).why);
        }
        let mut live: HashMap<u32, Live> = HashMap::new();
        for node in forest.nodes() {
            if let Some((place, _)) = self.inner.index.get(&node.name) {
                let own = live.entry(place.pack).or_default();
                if own.nodes.insert(place.at) {
                    own.node_bytes += node.bytes as u64;
                }
            }
        }
        let view = self.inner.packs.view();
        for child in forest.all_children() {
            let Child::Pages(first, count) = child else { continue };
            let Some(pack) = view.get(first.pack) else { continue };
            let own = live.entry(first.pack).or_default();
            if own.pages.is_empty() {
                own.pages = vec![false; pack.layout.slots() as usize];
            }
            for slot in first.run(*count).filter_map(|place| place.at.slot()) {
                if let Some(page) = own.pages.get_mut(slot as usize).filter(|page| !**page) {
                    *page = true;
                    own.page_count += 1;
                    own.page_bytes += pack.layout.page_bytes(slot);
                }
            }
        }
        Ok(live)
    }
}

impl Inner {
    /// A pack of pages as they are that has been left alone for so long.
    fn is_cold(&self, pack: &Pack, cold: Option<Cold>) -> bool {
        let Some(cold) = cold.filter(|_| pack.layout.body == Body::Raw) else { return false };
        let written =
            self.packs.file(pack).and_then(|f| f.modified().map_err(Error::io("look at", &pack.path)));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let age = (now.as_nanos() as i128).checked_sub(written.unwrap_or(i128::MAX));
        // A file from the future is as good as an old one: the clock was wrong then, or is now.
        age.is_some_and(|age| age < 0 || age as u128 >= cold.age.as_nanos())
    }
}

impl GcPlan {
    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.delete.is_empty() && self.rewrite.is_empty() && self.compress.is_empty()
    }

    fn add(&mut self, pack: &Arc<Pack>, live: Live, relied_on: bool, cold: bool) {
        let layout = &pack.layout;
        let all = layout.body_bytes() + (layout.node_end - layout.node_offset);
        let live_bytes = live.page_bytes + live.node_bytes;
        let dead_bytes = all.saturating_sub(live_bytes);
        self.live_bytes += live_bytes;
        self.dead_bytes += dead_bytes;
        let mostly_dead =
            live_bytes == 0 || dead_bytes >= if self.thorough { (all / 16).max(1) } else { live_bytes };
        if !mostly_dead && !cold {
            return;
        }
        if relied_on {
            self.in_use += u64::from(mostly_dead);
            return;
        }
        let entries = u64::from(layout.pages) + u64::from(layout.nodes);
        let gone = entries.saturating_sub(live.page_count + live.nodes.len() as u64);
        let freed = if live_bytes == 0 { layout.len } else { dead_bytes + gone * ENTRY as u64 };
        let list = match live_bytes {
            0 => &mut self.delete,
            _ if cold => &mut self.compress,
            _ => &mut self.rewrite,
        };
        self.freed_bytes += if mostly_dead { freed } else { 0 };
        list.push(PackPlan {
            pack: pack.name(),
            image: None,
            live_bytes,
            dead_bytes,
            number: pack.number,
            live,
        });
    }

    /// An image whose file is about to go. What lives on it moves to a pack.
    fn leave(&mut self, pack: &Arc<Pack>, label: &str, live: Live, relied_on: bool) {
        if relied_on {
            self.in_use += 1;
            return;
        }
        let list = if live.page_count == 0 { &mut self.delete } else { &mut self.rewrite };
        self.moved_bytes += live.page_count * crate::PAGE_SIZE as u64;
        list.push(PackPlan {
            pack: pack.name(),
            image: Some(label.to_owned()),
            live_bytes: live.page_count * crate::PAGE_SIZE as u64,
            dead_bytes: 0,
            number: pack.number,
            live,
        });
    }
}
