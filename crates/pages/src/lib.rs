//! The page store of one group: content-addressed 4 KiB pages in append-only packs, and page maps over them.
//!
//! **Must not know:** machines, QEMU, snapshots, the catalog. Callers bring bytes and keep [`MapRoot`]s; what is
//! kept alive is decided by the roots that they hand to the collector.
//!
//! The format on disk is described in `docs/formats/pages.md` and nowhere else.
//!
//! # What may run beside what
//! All operations take `&self`, and a folder is open in one process at a time; others may read it meanwhile, as a [`Visitor`].
//!
//! | | put, put_… | commit | read, map_range | plan_gc, usage, fsck | run_gc |
//! |---|---|---|---|---|---|
//! | **put, put_…** | yes: shard locks; own pages under the session's lock, written outside it | yes | yes | yes: reads only | yes: a hit touches its pack under the *gate* (shared); a touched pack is left alone |
//! | **commit** | | yes: files of its own; shard locks to publish | yes | yes: what came later is not in the plan | yes: new packs are in no plan, and their names win over older places |
//! | **read, map_range** | | | yes | yes | yes: a pack gone between look-up and open is looked up once more; an open file outlives its name |
//! | **usage, fsck** | | | | yes | yes: as read |
//! | **plan_gc, run_gc** | | | | estimate_gc: yes, its numbers are as of some moment meanwhile; else the collector's lock | no: the collector's lock |
//! | **add_image** | yes: as commit | yes | yes | yes | yes: as commit; the caller sees to it that an image which leaves is not being added |
//! | **fold** | yes: memory says nothing less before the run is found | yes: a pack whose names are not all entered is in no run | yes: memory is asked before runs | yes | yes: places in packs that are gone count for nothing |
//! | **repair** | yes; what it gives up is told by [`Hold::check`] to whoever records a root | as put | yes: as run_gc | yes | no: the collector's lock |
//!
//! The *gate* is a reader-writer lock: look-ups that a session will rely on hold it shared; the collector holds it alone for
//! the moment in which it decides that a pack goes. A session counts from `begin` to the end of `commit`; whoever
//! records a root after that keeps a [`Hold`] until the record is durable (see [`Store::plan_gc`]).

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

mod codec;
mod disk;
mod error;
#[cfg(feature = "faults")]
pub mod fault;
#[cfg(not(feature = "faults"))]
mod fault;
mod fsck;
mod gc;
mod group;
mod hash;
mod hold;
mod images;
mod index;
mod map;
mod pack;
mod planted;
mod read;
mod reader;
mod repair;
mod segments;
mod session;
mod store;
mod sync;
mod threads;
mod usage;
mod visit;

#[doc(hidden)]
pub mod bench;
#[doc(hidden)]
pub mod fuzzing;

#[cfg(test)]
mod tests;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use disk::left_to_others;
pub use error::{Error, Kind, Problem, Result};
pub use fsck::{Damage, Report};
pub use gc::{Cold, GcDone, GcPlan, GcRequest, PackPlan};
pub use group::GroupKey;
pub use hold::Hold;
pub use images::{Extent, ImageInfo, NewImage};
pub use reader::{HostUser, let_read, open_as};
pub use repair::{Repaired, Salvaged};
pub use store::{Allocated, Store};
pub use usage::Usage;
pub use visit::{OpenFolders, Visitor};

/// Bytes of a page. Fixed: it is the x86 page, and the unit in which QEMU sends memory.
pub const PAGE_SIZE: usize = 4096;

/// Pages of a leaf of a page map: those of a leaf are named together.
pub const LEAF_PAGES: usize = map::FAN_OUT;

/// Name of a page or of a map node: BLAKE3 of its content, keyed with the group's key. All zero bytes stand for the
/// zero page, which is never stored.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageHash(pub [u8; 32]);

impl PageHash {
    /// The page of 4,096 zero bytes.
    pub const ZERO: Self = Self([0; 32]);
}

impl fmt::Debug for PageHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().take(6).try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl PageHash {
    fn fingerprint(&self) -> Fingerprint {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, ..] = self.0;
        Fingerprint([a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p])
    }
}

/// The first 16 bytes of a name: what indexes keep of it. Two names never share them: of 2^40 different pages (4 PiB) two do with a
/// chance of one in 2^49. What is read is compared with the whole name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Fingerprint(pub(crate) [u8; 16]);

impl Fingerprint {
    /// A name that begins with it.
    fn padded(self) -> PageHash {
        let mut name = [0; 32];
        name.iter_mut().zip(self.0).for_each(|(byte, own)| *byte = own);
        PageHash(name)
    }

    /// It is the beginning of this name.
    fn is_of(self, name: &PageHash) -> bool {
        name.fingerprint() == self
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.padded().fmt(f)
    }
}

/// Who brings pages: the caller's own number for it, a machine. It tells pages that the same one brought earlier from those of others
/// in [`Saved`], and nothing else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Origin(pub [u8; 16]);

/// What a session is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Purpose {
    /// Who brings the pages.
    pub origin: Origin,
    /// Labels of the private images that these pages may be left on: those that whoever keeps the maps depends on anyway.
    pub images: Vec<String>,
}

/// A page map: which page lies where in an image of `pages` pages. This is all that a caller has to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MapRoot {
    /// Top node of the radix tree; `PageHash::ZERO` if every page is zero. In text: 64 hex digits.
    #[serde(with = "hash_hex")]
    pub node: PageHash,
    /// Length of the image in pages.
    pub pages: u64,
}

/// What became of the pages of one session, by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Saved {
    /// Pages of zero bytes.
    pub zero: u64,
    /// Pages equal to one that came earlier in the same session.
    pub same: u64,
    /// Pages that the same origin brought in an earlier session.
    pub earlier: u64,
    /// Pages that another origin brought.
    #[serde(default)]
    pub other: u64,
    /// Pages that are blocks of an image.
    #[serde(default)]
    pub disk: u64,
    /// Pages written.
    pub new: u64,
    /// Bytes that the session added to the disk, map nodes and footers included.
    pub bytes_written: u64,
}

/// Access to one group's pages; used as `dyn`, so that callers can be tested against a store that fails.
pub trait PageStore: Send + Sync {
    /// Opens a session that adds pages. Nothing of it is visible after a crash before [`Session::commit`].
    fn begin_for(&self, purpose: &Purpose) -> Result<Box<dyn Session>>;
    /// As [`PageStore::begin_for`], for nobody in particular.
    fn begin(&self) -> Result<Box<dyn Session>> {
        self.begin_for(&Purpose::default())
    }
    /// Hashes of pages `first .. first + out.len()` of a map; past the end of the map is an error.
    fn map_range(&self, root: &MapRoot, first: u64, out: &mut [PageHash]) -> Result<()>;
    /// Reads pages, checking each against its name; `out` is `hashes.len()` pages long.
    fn read(&self, hashes: &[PageHash], out: &mut [u8]) -> Result<()>;
}

/// One writer's unfinished work. Several threads may `put` at once. Dropped without commit, it leaves nothing.
pub trait Session: Send + Sync {
    /// Stores the pages of `bytes` (a multiple of [`PAGE_SIZE`]) that are not known yet; writes their names to `names`.
    fn put(&self, bytes: &[u8], names: &mut [PageHash]) -> Result<()>;
    /// Stores leaves of a page map over pages put in this session or held by the store; writes their names to `leaves`, one for
    /// [`LEAF_PAGES`] pages. Best done while the pages are fresh: then looking after them costs next to nothing.
    fn put_leaves(&self, pages: &[PageHash], leaves: &mut [PageHash]) -> Result<()>;
    /// Stores a run of an image, whole leaves of it, in one go: [`Session::put`] of the pages that are there, the others being zero, then
    /// [`Session::put_leaves`] over all of them. What was stored just now need not be looked up again, so this is the fastest way.
    fn put_run(
        &self,
        bytes: &[u8],
        there: &[bool],
        names: &mut [PageHash],
        leaves: &mut [PageHash],
    ) -> Result<()>;
    /// Stores a page map of `pages` pages over leaves put in this session.
    fn put_map_over(&self, leaves: &[PageHash], pages: u64) -> Result<MapRoot>;
    /// Stores a page map that has these leaves, put in this session and in ascending order of their numbers, and is `base` otherwise.
    /// Costs what they are. The caller sees to it that `base` stays a root until that of the new map is recorded.
    fn put_map_changed(&self, base: &MapRoot, leaves: &[(u64, PageHash)]) -> Result<MapRoot>;
    /// Stores a page map over pages put in this session or held by the store.
    fn put_map(&self, pages: &[PageHash]) -> Result<MapRoot> {
        let mut leaves = vec![PageHash::ZERO; pages.len().div_ceil(LEAF_PAGES)];
        self.put_leaves(pages, &mut leaves)?;
        self.put_map_over(&leaves, pages.len() as u64)
    }
    /// Makes everything durable: data, footer, file, folder, in this order.
    fn commit(self: Box<Self>) -> Result<Saved>;
}

mod hash_hex {
    //! Hashes as 64 hex digits.

    use super::PageHash;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn text(bytes: &[u8; 32]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    pub(super) fn parse(text: &str) -> Option<[u8; 32]> {
        if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let mut out = [0u8; 32];
        for (i, byte) in out.iter_mut().enumerate() {
            *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
        }
        Some(out)
    }

    pub(super) fn serialize<S: Serializer>(h: &PageHash, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&text(&h.0))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<PageHash, D::Error> {
        let text = String::deserialize(d)?;
        let bytes = parse(&text).ok_or_else(|| serde::de::Error::custom("a page hash has 64 hex digits"))?;
        Ok(PageHash(bytes))
    }
}
