//! Reading the structure of a pack, trusting nothing: lengths are compared with the file's own before anything is
//! allocated for them.

use std::sync::Arc;

use super::footer::{self, ENTRY, Entry};
use super::frame::{BodyKind, Header, TRAILER, TRAILER_V1, Trailer};
use super::{At, Frames, HEADER, Image, PackId, VERSION};
use crate::disk::DiskFile;
use crate::error::Problem;
use crate::map::MAX_NODE;
use crate::{Origin, PAGE_SIZE};

/// Where things are in an intact pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) id: PackId,
    version: u32,
    /// Who brought the pages.
    pub(crate) origin: Origin,
    /// Number of pages.
    pub(crate) pages: u32,
    /// Number of map nodes.
    pub(crate) nodes: u32,
    pub(crate) body: Body,
    /// Where the nodes begin.
    pub(crate) node_offset: u64,
    /// Where the nodes end and the table begins.
    pub(crate) node_end: u64,
    footer_offset: u64,
    footer_bytes: u64,
    /// Length of the file in bytes.
    pub(crate) len: u64,
    footer_checksum: [u8; 32],
}

/// How the pages are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// As they are, from [`HEADER`] on.
    Raw,
    /// In frames, from [`HEADER`] on.
    Frames(Arc<Frames>),
    /// As blocks of another file.
    Image(Arc<Image>),
}

impl Layout {
    /// Holds the lengths against the file's own. The table comes later: see [`read_layout`].
    pub(crate) fn new(header: &Header, trailer: &Trailer, len: u64) -> Result<Self, Problem> {
        let count = |count: u64, what| {
            u32::try_from(count).ok().filter(|count| *count < At::END).ok_or(Problem::Field(what))
        };
        let (pages, nodes) = (count(trailer.pages, "page count")?, count(trailer.nodes, "node count")?);
        let (entry, tail) = match header.version {
            1 => (footer::v1::ENTRY, TRAILER_V1),
            _ => (ENTRY, TRAILER),
        };
        let impossible = Problem::Field("lengths in the trailer");
        let entries = u64::from(pages) + u64::from(nodes);
        let sum = |from: u64, bytes: u64| from.checked_add(bytes).ok_or(impossible);
        let node_offset = sum(HEADER, trailer.body_bytes)?;
        let node_end = sum(node_offset, trailer.node_bytes)?;
        let footer_offset = sum(node_end, trailer.table_bytes)?;
        let end = sum(sum(footer_offset, trailer.footer_bytes)?, tail as u64)?;
        let body_fits = match header.body {
            BodyKind::Raw => {
                trailer.body_bytes == u64::from(pages) * PAGE_SIZE as u64 && trailer.table_bytes == 0
            }
            BodyKind::Frames(_) => trailer.body_bytes.is_multiple_of(8),
            BodyKind::Image => trailer.body_bytes == 0,
        };
        let fits = trailer.footer_bytes == entries * entry as u64 && trailer.node_bytes.is_multiple_of(8);
        if !body_fits || !fits || end != len || trailer.node_bytes / 8 >= u64::from(At::END) {
            return Err(impossible);
        }
        Ok(Self {
            id: trailer.id,
            version: header.version,
            origin: header.origin,
            pages,
            nodes,
            body: Body::Raw,
            node_offset,
            node_end,
            footer_offset,
            footer_bytes: trailer.footer_bytes,
            len,
            footer_checksum: trailer.footer_checksum,
        })
    }

    /// Puts the body in that the table describes.
    pub(crate) fn with_table(mut self, kind: BodyKind, table: &[u8]) -> Result<Self, Problem> {
        self.body = match kind {
            BodyKind::Raw => Body::Raw,
            BodyKind::Frames(per_frame) => {
                let frames = Frames::decode(table, per_frame, self.pages, self.node_offset - HEADER)?;
                Body::Frames(Arc::new(frames))
            }
            BodyKind::Image => Body::Image(Arc::new(Image::decode(table)?)),
        };
        Ok(self)
    }

    /// Slots that a page's place may name.
    pub(crate) fn slots(&self) -> u32 {
        match &self.body {
            Body::Raw | Body::Frames(_) => self.pages,
            Body::Image(image) => {
                u32::try_from(image.bytes / PAGE_SIZE as u64).unwrap_or(At::END).min(At::END)
            }
        }
    }

    /// Bytes of the store that a page takes: nothing if it lies in an image.
    pub(crate) fn page_bytes(&self, slot: u32) -> u64 {
        match &self.body {
            Body::Raw => PAGE_SIZE as u64,
            Body::Frames(frames) => frames.page_bytes(slot, self.pages),
            Body::Image(_) => 0,
        }
    }

    /// Bytes of the pages.
    pub(crate) fn body_bytes(&self) -> u64 {
        self.node_offset - HEADER
    }

    /// The file whose blocks are the pages, if they are not in the pack.
    pub(crate) fn image(&self) -> Option<&Arc<Image>> {
        if let Body::Image(image) = &self.body { Some(image) } else { None }
    }
}

/// Why a pack is not used.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    Damaged(Problem),
    Newer(u32),
}

impl From<Problem> for Refused {
    fn from(problem: Problem) -> Self {
        Self::Damaged(problem)
    }
}

/// Reads header, trailer and table. `id` is the one that the file is named after.
pub(crate) fn read_layout(file: &dyn DiskFile, id: PackId, group: &[u8; 16]) -> Result<Layout, Refused> {
    let mut block = [0; HEADER as usize];
    file.read_at(&mut block, 0).map_err(unreadable)?;
    let header = Header::decode(&block)?;
    if header.version > VERSION {
        return Err(Refused::Newer(header.version));
    }
    if header.version == 0 {
        return Err(Problem::Field("version").into());
    }
    if header.group != *group {
        return Err(Problem::OtherGroup.into());
    }
    let len = file.len().map_err(unreadable)?;
    let trailer = match header.version {
        1 => Trailer::decode_v1(&tail::<TRAILER_V1>(file, len)?)?,
        _ => Trailer::decode(&tail::<TRAILER>(file, len)?)?,
    };
    if header.id != id || trailer.id != id {
        return Err(Problem::Field("pack id").into());
    }
    let layout = Layout::new(&header, &trailer, len)?;
    let mut table =
        vec![0; usize::try_from(trailer.table_bytes).map_err(|_| Problem::Field("table length"))?];
    file.read_at(&mut table, layout.node_end).map_err(unreadable)?;
    if blake3::hash(&table).as_bytes() != &trailer.table_checksum {
        return Err(Problem::Checksum("table").into());
    }
    Ok(layout.with_table(header.body, &table)?)
}

/// Its header can be read, and says that pages lie in it as they are.
pub(crate) fn is_raw(file: &dyn DiskFile) -> bool {
    let mut block = [0; HEADER as usize];
    let header = file.read_at(&mut block, 0).ok().and_then(|()| Header::decode(&block).ok());
    header.is_some_and(|header| header.body == BodyKind::Raw)
}

fn tail<const N: usize>(file: &dyn DiskFile, len: u64) -> Result<[u8; N], Problem> {
    let at = len.checked_sub(N as u64).filter(|at| *at >= HEADER).ok_or(Problem::TooShort)?;
    let mut tail = [0; N];
    file.read_at(&mut tail, at).map_err(unreadable)?;
    Ok(tail)
}

fn unreadable(error: std::io::Error) -> Problem {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => Problem::TooShort,
        kind => Problem::Unreadable(kind),
    }
}

/// Reads and checks the footer: every page has a slot of its own, none is left over, and every node lies among the nodes.
pub(crate) fn read_footer(file: &dyn DiskFile, layout: &Layout) -> Result<Vec<Entry>, Problem> {
    let len = usize::try_from(layout.footer_bytes).map_err(|_| Problem::Field("footer length"))?;
    let mut bytes = vec![0; len];
    file.read_at(&mut bytes, layout.footer_offset).map_err(unreadable)?;
    if blake3::hash(&bytes).as_bytes() != &layout.footer_checksum {
        return Err(Problem::Checksum("footer"));
    }
    let entries = match layout.version {
        1 => footer::v1::decode(&bytes, layout.node_offset)?,
        _ => footer::decode(&bytes)?,
    };
    // Not a mark for each slot: an image may say of itself that it is as long as it likes.
    let mut slots = Vec::with_capacity(entries.len());
    for entry in &entries {
        let len = u64::from(entry.len);
        if let Some(slot) = entry.at.slot() {
            if slot >= layout.slots() || len != PAGE_SIZE as u64 {
                return Err(Problem::Field("place of a page"));
            }
            slots.push(slot);
        } else if let Some(offset) = entry.at.node_offset()
            && (offset + len > layout.node_end - layout.node_offset || len > MAX_NODE as u64)
        {
            return Err(Problem::Field("place of a node"));
        }
    }
    slots.sort_unstable();
    if slots.windows(2).any(|pair| matches!(pair, [a, b] if a == b)) {
        return Err(Problem::Field("place of a page"));
    }
    if slots.len() != layout.pages as usize {
        return Err(Problem::Field("page count"));
    }
    Ok(entries)
}
