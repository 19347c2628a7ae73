//! Packs: files of pages and map nodes that are never changed once they are sealed (`docs/formats/pages.md`, "Packs").

mod at;
mod build;
mod footer;
mod frame;
mod frames;
mod image;
mod open;
mod table;

pub(crate) use at::{At, Place};
pub(crate) use build::{Building, NewBody, Slots};
pub(crate) use footer::{ENTRY, Entry, decode as decode_footer, encode as encode_footer};
pub(crate) use frame::{MAX_FRAME_PAGES, TRAILER, fit_checksums, seal, unseal};
pub(crate) use frames::{FRAME_MAGIC, Frames, decode_frame, frame_bytes};
pub(crate) use image::Image;
pub(crate) use open::{Body, Layout, Refused, is_raw, read_footer, read_layout};
pub(crate) use table::{Pack, Packs, View};

#[cfg(test)]
mod tests;

/// Format version that this program writes, and the highest that it reads.
pub(crate) const VERSION: u32 = 2;

/// Bytes of the header; the first page follows it.
pub(crate) const HEADER: u64 = 4096;

/// Random number by which a pack is called on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PackId(pub(crate) u64);

impl PackId {
    pub(crate) fn random() -> crate::Result<Self> {
        crate::group::random().map(|bytes| Self(u64::from_le_bytes(bytes)))
    }

    /// Name of the sealed file.
    pub(crate) fn file_name(self) -> String {
        format!("{:016x}.pack", self.0)
    }

    /// Name of the file while it is being written.
    pub(crate) fn tmp_name(self) -> String {
        format!("{:016x}.tmp", self.0)
    }
}
