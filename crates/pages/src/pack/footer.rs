//! The index of one pack: an entry for each page and node, sorted by name.

use super::At;
use crate::codec::Reader;
use crate::error::{Kind, Problem};
use crate::{Fingerprint, PAGE_SIZE, PageHash};

/// Bytes of an entry.
pub(crate) const ENTRY: usize = 24;

/// One page or node of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Entry {
    pub(crate) name: Fingerprint,
    pub(crate) at: At,
    /// Length in bytes.
    pub(crate) len: u16,
}

impl Entry {
    pub(crate) fn page(name: Fingerprint, slot: u32) -> Self {
        Self { name, at: At::page(slot), len: PAGE_SIZE as u16 }
    }

    /// The page behind this one lies right behind it.
    pub(crate) fn is_before(&self, next: &Self) -> bool {
        next.at.slot().zip(self.at.slot()).is_some_and(|(next, own)| next == own + 1)
    }

    pub(crate) fn kind(&self) -> Kind {
        self.at.kind()
    }
}

/// Encodes entries, which are sorted.
pub(crate) fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::with_capacity(entries.len() * ENTRY);
    for entry in entries {
        out.extend(entry.name.0);
        out.extend(entry.at.raw().to_le_bytes());
        out.extend(entry.len.to_le_bytes());
        out.extend([0; 2]);
    }
    out
}

/// Decodes entries, which must be sorted and different.
pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<Entry>, Problem> {
    decode_as::<ENTRY>(bytes, |reader| {
        let (name, at) = (Fingerprint(reader.array()?), At::from_raw(reader.u32()?));
        let (len, zero) = (reader.u16()?, reader.u16()?);
        if zero != 0 {
            return Err(Problem::Field("footer entry"));
        }
        Ok(Entry { name, at, len })
    })
}

/// Version 1: whole names, and places in bytes from the start of the file.
pub(crate) mod v1 {
    use super::{At, Entry, PAGE_SIZE, PageHash, Problem, decode_as};
    use crate::pack::HEADER;

    /// Bytes of an entry.
    pub(crate) const ENTRY: usize = 40;

    /// As [`super::decode`]; the nodes begin at `node_offset`.
    pub(crate) fn decode(bytes: &[u8], node_offset: u64) -> Result<Vec<Entry>, Problem> {
        decode_as::<ENTRY>(bytes, |reader| {
            let (name, offset) = (PageHash(reader.array()?), u64::from(reader.u32()?) * 8);
            let len = reader.u16()?;
            let at = match (reader.u8()?, reader.u8()?) {
                (0, 0) => {
                    let from = offset.checked_sub(HEADER).filter(|from| from % PAGE_SIZE as u64 == 0);
                    At::page(within(from.map(|from| from / PAGE_SIZE as u64), "place of a page")?)
                }
                (1, 0) => {
                    let from = offset.checked_sub(node_offset).map(|from| from / 8);
                    At::node(within(from, "place of a node")?)
                }
                _ => return Err(Problem::Field("footer entry kind")),
            };
            Ok(Entry { name: name.fingerprint(), at, len })
        })
    }

    fn within(number: Option<u64>, what: &'static str) -> Result<u32, Problem> {
        let number = number.and_then(|number| u32::try_from(number).ok()).filter(|number| *number < At::END);
        number.ok_or(Problem::Field(what))
    }
}

fn decode_as<const N: usize>(
    bytes: &[u8],
    entry: impl Fn(&mut Reader<'_>) -> Result<Entry, Problem>,
) -> Result<Vec<Entry>, Problem> {
    let (records, rest) = bytes.as_chunks::<N>();
    if !rest.is_empty() {
        return Err(Problem::Field("footer length"));
    }
    let mut entries: Vec<Entry> = Vec::with_capacity(records.len());
    for record in records {
        let entry = entry(&mut Reader::new(record))?;
        let zero = entry.name == PageHash::ZERO.fingerprint();
        if zero || entries.last().is_some_and(|last| last.name >= entry.name) {
            return Err(Problem::Field("footer order"));
        }
        entries.push(entry);
    }
    Ok(entries)
}
