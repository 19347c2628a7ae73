//! What frames a pack: the header block and the trailer, encode beside decode.

use super::{HEADER, PackId, VERSION};
use crate::PAGE_SIZE;
use crate::codec::Reader;
use crate::error::Problem;

const HEADER_MAGIC: &[u8; 8] = b"SPINPACK";
const TRAILER_MAGIC: &[u8; 8] = b"SPINTAIL";
const CHECKSUM: usize = 32;

/// Bytes of the trailer.
pub(crate) const TRAILER: usize = 128;

/// The first block of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) id: PackId,
    pub(crate) fingerprint: [u8; 16],
}

impl Header {
    pub(crate) fn new(id: PackId, fingerprint: [u8; 16]) -> Self {
        Self { version: VERSION, id, fingerprint }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER as usize);
        out.extend(HEADER_MAGIC);
        out.extend(self.version.to_le_bytes());
        out.extend((PAGE_SIZE as u32).to_le_bytes());
        out.extend(self.id.0.to_le_bytes());
        out.extend(self.fingerprint);
        out.resize(HEADER as usize - CHECKSUM, 0);
        seal(out)
    }

    /// Magic, version and checksum come first in every version, so that a later one is told from damage.
    pub(crate) fn decode(block: &[u8; HEADER as usize]) -> Result<Self, Problem> {
        let mut reader = Reader::new(block);
        if &reader.array::<8>()? != HEADER_MAGIC {
            return Err(Problem::Magic("pack"));
        }
        unseal(block, "header")?;
        let version = reader.u32()?;
        let page_size = reader.u32()?;
        if version == VERSION && page_size != PAGE_SIZE as u32 {
            return Err(Problem::Field("page size"));
        }
        Ok(Self { version, id: PackId(reader.u64()?), fingerprint: reader.array()? })
    }
}

/// The last bytes of a pack: where everything is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trailer {
    pub(crate) id: PackId,
    pub(crate) pages: u64,
    pub(crate) nodes: u64,
    pub(crate) node_offset: u64,
    pub(crate) node_bytes: u64,
    pub(crate) footer_offset: u64,
    pub(crate) footer_bytes: u64,
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
            self.node_offset,
            self.node_bytes,
            self.footer_offset,
            self.footer_bytes,
        ];
        fields.iter().for_each(|field| out.extend(field.to_le_bytes()));
        out.extend(self.footer_checksum);
        seal(out)
    }

    pub(crate) fn decode(bytes: &[u8; TRAILER]) -> Result<Self, Problem> {
        let mut reader = Reader::new(bytes);
        if &reader.array::<8>()? != TRAILER_MAGIC {
            return Err(Problem::Magic("trailer"));
        }
        unseal(bytes, "trailer")?;
        Ok(Self {
            id: PackId(reader.u64()?),
            pages: reader.u64()?,
            nodes: reader.u64()?,
            node_offset: reader.u64()?,
            node_bytes: reader.u64()?,
            footer_offset: reader.u64()?,
            footer_bytes: reader.u64()?,
            footer_checksum: reader.array()?,
        })
    }
}

/// Appends the checksum of everything before it.
fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let checksum = *blake3::hash(&bytes).as_bytes();
    bytes.extend(checksum);
    bytes
}

/// Makes magic, pack id 0, group and checksums of header, trailer and footer fit the rest of a pack, for fuzzing.
pub(crate) fn fit_checksums(bytes: &mut [u8], fingerprint: &[u8; 16]) {
    let footer = bytes.split_last_chunk::<TRAILER>().and_then(|(body, trailer)| {
        let at = Reader::new(trailer.get(48..)?).u64().ok()?;
        Some(*blake3::hash(body.get(usize::try_from(at).ok()?..)?).as_bytes())
    });
    if let Some(trailer) = bytes.last_chunk_mut::<TRAILER>() {
        let mut fixed = TRAILER_MAGIC.to_vec();
        fixed.extend([0; 8]);
        fixed.extend(trailer.get(16..64).unwrap_or_default());
        fixed.extend(footer.unwrap_or_default());
        trailer.copy_from_slice(&seal(fixed));
    }
    if let Some(header) = bytes.first_chunk_mut::<{ HEADER as usize }>() {
        header.copy_from_slice(&Header::new(PackId(0), *fingerprint).encode());
    }
}

fn unseal(bytes: &[u8], what: &'static str) -> Result<(), Problem> {
    let (content, checksum) = bytes.split_last_chunk::<CHECKSUM>().ok_or(Problem::TooShort)?;
    if blake3::hash(content).as_bytes() == checksum { Ok(()) } else { Err(Problem::Checksum(what)) }
}
