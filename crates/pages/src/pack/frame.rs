//! What frames a pack: the header block and the trailer, encode beside decode.

use super::{HEADER, PackId, VERSION};
use crate::codec::Reader;
use crate::error::Problem;
use crate::{Origin, PAGE_SIZE};

const HEADER_MAGIC: &[u8; 8] = b"SPINPACK";
const TRAILER_MAGIC: &[u8; 8] = b"SPINTAIL";
const CHECKSUM: usize = 32;

/// Bytes of the trailer.
pub(crate) const TRAILER: usize = 160;
/// Bytes of the trailer of version 1.
pub(crate) const TRAILER_V1: usize = 128;

/// How the pages of a pack are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BodyKind {
    /// As they are.
    Raw,
    /// In frames of so many pages, compressed where it pays.
    Frames(u32),
    /// In a file of somebody else's that never changes.
    Image,
}

/// The first block of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) id: PackId,
    pub(crate) group: [u8; 16],
    /// Who brought the pages; none in version 1.
    pub(crate) origin: Origin,
    pub(crate) body: BodyKind,
}

impl Header {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER as usize);
        out.extend(HEADER_MAGIC);
        out.extend(self.version.to_le_bytes());
        out.extend((PAGE_SIZE as u32).to_le_bytes());
        out.extend(self.id.0.to_le_bytes());
        out.extend(self.group);
        out.extend(self.origin.0);
        let (kind, pages): (u32, u32) = match self.body {
            BodyKind::Raw => (0, 0),
            BodyKind::Frames(pages) => (1, pages),
            BodyKind::Image => (2, 0),
        };
        out.extend(kind.to_le_bytes());
        out.extend(pages.to_le_bytes());
        out.resize(HEADER as usize - CHECKSUM, 0);
        seal(out)
    }

    /// Magic, version and checksum come first in every version, so that a later one is told from damage. Of a later version nothing
    /// else is looked at.
    pub(crate) fn decode(block: &[u8; HEADER as usize]) -> Result<Self, Problem> {
        let mut reader = Reader::new(block);
        if &reader.array::<8>()? != HEADER_MAGIC {
            return Err(Problem::Magic("pack"));
        }
        unseal(block, "header")?;
        let version = reader.u32()?;
        let page_size = reader.u32()?;
        if version <= VERSION && page_size != PAGE_SIZE as u32 {
            return Err(Problem::Field("page size"));
        }
        let (id, group, origin) = (PackId(reader.u64()?), reader.array()?, Origin(reader.array()?));
        let body = match (version, reader.u32()?, reader.u32()?) {
            (2, 0, 0) => BodyKind::Raw,
            (2, 1, pages @ 1..=MAX_FRAME_PAGES) => BodyKind::Frames(pages),
            (2, 2, 0) => BodyKind::Image,
            (2, ..) => return Err(Problem::Field("body kind")),
            _ => BodyKind::Raw,
        };
        Ok(Self { version, id, group, origin, body })
    }
}

/// Pages of a frame at most: 1 MiB.
pub(crate) const MAX_FRAME_PAGES: u32 = 256;

/// The last bytes of a pack: how long each part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trailer {
    pub(crate) id: PackId,
    pub(crate) pages: u64,
    pub(crate) nodes: u64,
    pub(crate) body_bytes: u64,
    pub(crate) node_bytes: u64,
    pub(crate) table_bytes: u64,
    pub(crate) footer_bytes: u64,
    pub(crate) table_checksum: [u8; CHECKSUM],
    pub(crate) footer_checksum: [u8; CHECKSUM],
}

impl Trailer {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(TRAILER);
        out.extend(TRAILER_MAGIC);
        let fields = [
            self.id.0,
            self.pages,
            self.nodes,
            self.body_bytes,
            self.node_bytes,
            self.table_bytes,
            self.footer_bytes,
        ];
        fields.iter().for_each(|field| out.extend(field.to_le_bytes()));
        out.extend(self.table_checksum);
        out.extend(self.footer_checksum);
        seal(out)
    }

    pub(crate) fn decode(bytes: &[u8; TRAILER]) -> Result<Self, Problem> {
        let mut reader = open_trailer(bytes)?;
        Ok(Self {
            id: PackId(reader.u64()?),
            pages: reader.u64()?,
            nodes: reader.u64()?,
            body_bytes: reader.u64()?,
            node_bytes: reader.u64()?,
            table_bytes: reader.u64()?,
            footer_bytes: reader.u64()?,
            table_checksum: reader.array()?,
            footer_checksum: reader.array()?,
        })
    }

    /// Version 1 says where the parts begin, which follows from their lengths.
    pub(crate) fn decode_v1(bytes: &[u8; TRAILER_V1]) -> Result<Self, Problem> {
        let mut reader = open_trailer(bytes)?;
        let (id, pages, nodes) = (PackId(reader.u64()?), reader.u64()?, reader.u64()?);
        let (node_offset, node_bytes) = (reader.u64()?, reader.u64()?);
        let (footer_offset, footer_bytes) = (reader.u64()?, reader.u64()?);
        let impossible = Problem::Field("lengths in the trailer");
        let body_bytes = node_offset.checked_sub(HEADER).ok_or(impossible)?;
        if node_offset.checked_add(node_bytes) != Some(footer_offset) {
            return Err(impossible);
        }
        Ok(Self {
            id,
            pages,
            nodes,
            body_bytes,
            node_bytes,
            table_bytes: 0,
            footer_bytes,
            table_checksum: *blake3::hash(&[]).as_bytes(),
            footer_checksum: reader.array()?,
        })
    }
}

fn open_trailer(bytes: &[u8]) -> Result<Reader<'_>, Problem> {
    let mut reader = Reader::new(bytes);
    if &reader.array::<8>()? != TRAILER_MAGIC {
        return Err(Problem::Magic("trailer"));
    }
    unseal(bytes, "trailer")?;
    Ok(reader)
}

/// Appends the checksum of everything before it.
pub(crate) fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let checksum = *blake3::hash(&bytes).as_bytes();
    bytes.extend(checksum);
    bytes
}

/// Checks what [`seal`] appended.
pub(crate) fn unseal(bytes: &[u8], what: &'static str) -> Result<(), Problem> {
    let (content, checksum) = bytes.split_last_chunk::<CHECKSUM>().ok_or(Problem::TooShort)?;
    if blake3::hash(content).as_bytes() == checksum { Ok(()) } else { Err(Problem::Checksum(what)) }
}

/// Makes magic, pack id 0, group and checksums of header, trailer, table and footer fit the rest of a pack, for fuzzing. The header's
/// version, origin and body stay as they are.
pub(crate) fn fit_checksums(bytes: &mut [u8], group: &[u8; 16]) {
    let sums = bytes.split_last_chunk::<TRAILER>().and_then(|(body, trailer)| {
        let mut reader = Reader::new(trailer.get(48..64)?);
        let (table, footer) =
            (usize::try_from(reader.u64().ok()?).ok()?, usize::try_from(reader.u64().ok()?).ok()?);
        let (rest, footer) = body.split_at_checked(body.len().checked_sub(footer)?)?;
        let (_, table) = rest.split_at_checked(rest.len().checked_sub(table)?)?;
        Some([blake3::hash(table), blake3::hash(footer)])
    });
    if let Some(trailer) = bytes.last_chunk_mut::<TRAILER>() {
        let mut fixed = TRAILER_MAGIC.to_vec();
        fixed.extend([0; 8]);
        fixed.extend(trailer.get(16..64).unwrap_or_default());
        sums.iter().flatten().for_each(|sum| fixed.extend(sum.as_bytes()));
        fixed.resize(TRAILER - CHECKSUM, 0);
        trailer.copy_from_slice(&seal(fixed));
    }
    if let Some(header) = bytes.first_chunk_mut::<{ HEADER as usize }>() {
        let mut fixed = HEADER_MAGIC.to_vec();
        fixed.extend(header.get(8..16).unwrap_or_default());
        fixed.extend([0; 8]);
        fixed.extend(group);
        fixed.extend(header.get(40..HEADER as usize - CHECKSUM).unwrap_or_default());
        header.copy_from_slice(&seal(fixed));
    }
}
