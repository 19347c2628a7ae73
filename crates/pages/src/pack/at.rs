//! Where a page or node lies.

use crate::error::Kind;

/// Where in a pack: a page's slot, or the offset of a node among the nodes. As on disk: the highest bit tells which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct At(u32);

const NODE: u32 = 1 << 31;

impl At {
    /// Slots of a pack at most, and units of eight bytes that its nodes may take.
    pub(crate) const END: u32 = NODE;

    /// A page slot: below [`At::END`].
    pub(crate) fn page(slot: u32) -> Self {
        Self(slot & !NODE)
    }

    /// A node, by its offset from the first one in units of eight bytes: below [`At::END`].
    pub(crate) fn node(units: u32) -> Self {
        Self(units | NODE)
    }

    pub(crate) fn from_raw(raw: u32) -> Self {
        Self(raw)
    }

    pub(crate) fn raw(self) -> u32 {
        self.0
    }

    pub(crate) fn kind(self) -> Kind {
        if self.0 & NODE == 0 { Kind::Page } else { Kind::Node }
    }

    /// The page's slot; none for a node.
    pub(crate) fn slot(self) -> Option<u32> {
        (self.kind() == Kind::Page).then_some(self.0)
    }

    /// The node's offset from the first one in bytes; none for a page.
    pub(crate) fn node_offset(self) -> Option<u64> {
        (self.kind() == Kind::Node).then_some(u64::from(self.0 & !NODE) * 8)
    }
}

/// Where a page or node lies in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Place {
    /// Number of the pack in this process (see [`super::Packs`]).
    pub(crate) pack: u32,
    pub(crate) at: At,
}

impl Place {
    /// Another page lies so many slots behind this one, in the same pack.
    pub(crate) fn is_before(self, slots: u16, other: Self) -> bool {
        let slot = self.at.slot().and_then(|slot| slot.checked_add(slots.into()));
        self.pack == other.pack && slot.is_some() && slot == other.at.slot()
    }

    /// The places of this page and of those behind it, so many in all.
    pub(crate) fn run(self, count: u16) -> impl Iterator<Item = Self> {
        let first = self.at.slot().into_iter();
        let slots = first.flat_map(move |first| first..first.saturating_add(count.into()));
        slots.map(move |slot| Self { pack: self.pack, at: At::page(slot) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_goes_on_in_the_same_pack_and_never_among_nodes() {
        let page = |pack, slot| Place { pack, at: At::page(slot) };
        assert!(page(1, 5).is_before(2, page(1, 7)));
        assert!(!page(1, 5).is_before(2, page(1, 8)) && !page(1, 5).is_before(2, page(2, 7)));
        let node = Place { pack: 1, at: At::node(7) };
        assert!(!page(1, 5).is_before(2, node) && !node.is_before(0, node));
        assert_eq!(page(1, 5).run(2).collect::<Vec<_>>(), [page(1, 5), page(1, 6)]);
        assert_eq!(node.run(2).count(), 0);
    }
}
