//! The index of one pack: an entry of 40 bytes for each page and node, sorted by name.

use crate::PageHash;
use crate::codec::Reader;
use crate::error::{Kind, Problem};

/// Bytes of an entry.
pub(crate) const ENTRY: usize = 40;

/// One page or node of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Entry {
    pub(crate) name: PageHash,
    /// Offset in the pack in units of eight bytes.
    pub(crate) at: u32,
    /// Length in bytes.
    pub(crate) len: u16,
    pub(crate) kind: Kind,
}

/// Encodes entries, which are sorted.
pub(crate) fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::with_capacity(entries.len() * ENTRY);
    for entry in entries {
        out.extend(entry.name.0);
        out.extend(entry.at.to_le_bytes());
        out.extend(entry.len.to_le_bytes());
        let kind: u8 = match entry.kind {
            Kind::Page => 0,
            Kind::Node => 1,
        };
        out.extend([kind, 0]);
    }
    out
}

/// Decodes entries, which must be sorted and different.
pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<Entry>, Problem> {
    let (records, rest) = bytes.as_chunks::<ENTRY>();
    if !rest.is_empty() {
        return Err(Problem::Field("footer length"));
    }
    let mut entries: Vec<Entry> = Vec::with_capacity(records.len());
    for record in records {
        let mut reader = Reader::new(record);
        let (name, at, len) = (PageHash(reader.array()?), reader.u32()?, reader.u16()?);
        let kind = match (reader.u8()?, reader.u8()?) {
            (0, 0) => Kind::Page,
            (1, 0) => Kind::Node,
            _ => return Err(Problem::Field("footer entry kind")),
        };
        if name == PageHash::ZERO || entries.last().is_some_and(|last| last.name >= name) {
            return Err(Problem::Field("footer order"));
        }
        entries.push(Entry { name, at, len, kind });
    }
    Ok(entries)
}
