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
