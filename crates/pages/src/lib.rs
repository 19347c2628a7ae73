//! The page store of one group: content-addressed 4 KiB pages in append-only packs, and page maps over them.
//!
//! **Must not know:** machines, QEMU, snapshots, the catalog. Callers bring bytes and keep [`MapRoot`]s; what is
//! kept alive is decided by the roots that they hand to the collector.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes of a page. Fixed: it is the x86 page, and the unit in which QEMU sends memory.
pub const PAGE_SIZE: usize = 4096;

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
pub struct Saved {
    /// Pages of zero bytes.
    pub zero: u64,
    /// Pages equal to one that came earlier in the same session.
    pub same: u64,
    /// Pages that the store held before the session began.
    pub earlier: u64,
    /// Pages written.
    pub new: u64,
    /// Bytes that the session added to the disk, map nodes and footers included.
    pub bytes_written: u64,
}

/// Access to one group's pages; used as `dyn`, so that callers can be tested against a store that fails.
pub trait PageStore: Send + Sync {
    /// Opens a session that adds pages. Nothing of it is visible after a crash before [`Session::commit`].
    fn begin(&self) -> Result<Box<dyn Session>>;
    /// Hashes of pages `first .. first + out.len()` of a map; past the end of the map is an error.
    fn map_range(&self, root: &MapRoot, first: u64, out: &mut [PageHash]) -> Result<()>;
    /// Reads pages, checking each against its name; `out` is `hashes.len()` pages long.
    fn read(&self, hashes: &[PageHash], out: &mut [u8]) -> Result<()>;
}

/// One writer's unfinished work. Several threads may `put` at once. Dropped without commit, it leaves nothing.
pub trait Session: Send + Sync {
    /// Stores the pages of `bytes` (a multiple of [`PAGE_SIZE`]) that are not known yet; writes their names to `names`.
    fn put(&self, bytes: &[u8], names: &mut [PageHash]) -> Result<()>;
    /// Stores a page map over pages put in this session or held by the store.
    fn put_map(&self, pages: &[PageHash]) -> Result<MapRoot>;
    /// Makes everything durable: data, footer, file, folder, in this order.
    fn commit(self: Box<Self>) -> Result<Saved>;
}

/// Why the store could not do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{act} {path}")]
    Io {
        /// What was being done, as a verb: "read", "sync".
        act: &'static str,
        /// The file.
        path: std::path::PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// Result of a store call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

mod hash_hex {
    use super::PageHash;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(h: &PageHash, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&h.0.iter().map(|b| format!("{b:02x}")).collect::<String>())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<PageHash, D::Error> {
        let text = String::deserialize(d)?;
        let mut out = [0u8; 32];
        if text.len() != 64 || !text.is_ascii() {
            return Err(serde::de::Error::custom("a page hash has 64 hex digits"));
        }
        for (i, byte) in out.iter_mut().enumerate() {
            let digits = text.get(2 * i..2 * i + 2).unwrap_or_default();
            *byte = u8::from_str_radix(digits, 16).map_err(serde::de::Error::custom)?;
        }
        Ok(PageHash(out))
    }
}
