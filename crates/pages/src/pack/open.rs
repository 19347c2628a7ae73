//! Reading the structure of a pack, trusting nothing: lengths are compared with the file's own before anything is
//! allocated for them.

use super::frame::{Header, TRAILER, Trailer};
use super::{HEADER, PackId, VERSION, footer};
use crate::PAGE_SIZE;
use crate::disk::DiskFile;
use crate::error::{Kind, Problem};
use crate::map::MAX_NODE;

use super::footer::{ENTRY, Entry};

/// Where things are in an intact pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) id: PackId,
    /// Number of pages; they lie from [`HEADER`] on.
    pub(crate) pages: u32,
    /// Number of map nodes.
    pub(crate) nodes: u32,
    /// Where the nodes begin.
    pub(crate) node_offset: u64,
    /// Where the nodes end and the footer begins.
    pub(crate) node_end: u64,
    /// Length of the file in bytes.
    pub(crate) len: u64,
    footer_checksum: [u8; 32],
}

impl Layout {
    pub(crate) fn new(trailer: &Trailer, len: u64) -> Result<Self, Problem> {
        let pages = u32::try_from(trailer.pages).map_err(|_| Problem::Field("page count"))?;
        let nodes = u32::try_from(trailer.nodes).map_err(|_| Problem::Field("node count"))?;
        let node_offset = HEADER + u64::from(pages) * PAGE_SIZE as u64;
        let footer_bytes = (u64::from(pages) + u64::from(nodes)) * ENTRY as u64;
        let node_end = node_offset.checked_add(trailer.node_bytes);
        let end = node_end.and_then(|end| end.checked_add(footer_bytes + TRAILER as u64));
        if trailer.node_offset != node_offset
            || Some(trailer.footer_offset) != node_end
            || trailer.footer_bytes != footer_bytes
            || end != Some(len)
        {
            return Err(Problem::Field("lengths in the trailer"));
        }
        Ok(Self {
            id: trailer.id,
            pages,
            nodes,
            node_offset,
            node_end: trailer.footer_offset,
            len,
            footer_checksum: trailer.footer_checksum,
        })
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

/// Reads header and trailer. `id` is the one that the file is named after.
pub(crate) fn read_layout(
    file: &dyn DiskFile,
    id: PackId,
    fingerprint: &[u8; 16],
) -> Result<Layout, Refused> {
    let unreadable = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => Problem::TooShort,
        kind => Problem::Unreadable(kind),
    };
    let mut block = [0; HEADER as usize];
    file.read_at(&mut block, 0).map_err(unreadable)?;
    let header = Header::decode(&block)?;
    if header.version > VERSION {
        return Err(Refused::Newer(header.version));
    }
    if header.version != VERSION {
        return Err(Problem::Field("version").into());
    }
    if header.fingerprint != *fingerprint {
        return Err(Problem::OtherGroup.into());
    }
    let len = file.len().map_err(unreadable)?;
    let at = len.checked_sub(TRAILER as u64).filter(|at| *at >= HEADER).ok_or(Problem::TooShort)?;
    let mut tail = [0; TRAILER];
    file.read_at(&mut tail, at).map_err(unreadable)?;
    let trailer = Trailer::decode(&tail)?;
    if header.id != id || trailer.id != id {
        return Err(Problem::Field("pack id").into());
    }
    Ok(Layout::new(&trailer, len)?)
}

/// Reads and checks the footer: every slot of the page region is named exactly once, and every node lies in its region.
pub(crate) fn read_footer(file: &dyn DiskFile, layout: &Layout) -> Result<Vec<Entry>, Problem> {
    let len = (layout.len - layout.node_end).saturating_sub(TRAILER as u64);
    let mut bytes = vec![0; usize::try_from(len).map_err(|_| Problem::Field("footer length"))?];
    file.read_at(&mut bytes, layout.node_end).map_err(|e| Problem::Unreadable(e.kind()))?;
    if blake3::hash(&bytes).as_bytes() != &layout.footer_checksum {
        return Err(Problem::Checksum("footer"));
    }
    let entries = footer::decode(&bytes)?;
    let mut named = vec![false; layout.pages as usize];
    let mut pages = 0;
    for entry in &entries {
        let (start, len) = (u64::from(entry.at) * 8, u64::from(entry.len));
        match entry.kind {
            Kind::Page => {
                pages += 1;
                let slot = start.checked_sub(HEADER).filter(|s| s % PAGE_SIZE as u64 == 0);
                let slot = slot.and_then(|s| named.get_mut((s / PAGE_SIZE as u64) as usize));
                match slot {
                    Some(slot) if !*slot && len == PAGE_SIZE as u64 => *slot = true,
                    _ => return Err(Problem::Field("place of a page")),
                }
            }
            Kind::Node => {
                if start < layout.node_offset || start + len > layout.node_end || len > MAX_NODE as u64 {
                    return Err(Problem::Field("place of a node"));
                }
            }
        }
    }
    if pages != layout.pages {
        return Err(Problem::Field("page count"));
    }
    Ok(entries)
}
