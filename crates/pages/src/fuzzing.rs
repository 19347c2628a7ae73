//! Doors to the readers for the fuzz targets; no part of the crate's interface.

use std::io;

use crate::PAGE_SIZE;
use crate::disk::DiskFile;
use crate::group::{GroupKey, Names};
use crate::index::{Mapping, Run};
use crate::map::Node;
use crate::pack::{HEADER, PackId, Packs, TRAILER, read_footer, read_layout};
use crate::read::read_span;

/// A file that is a slice of bytes.
struct Bytes(Vec<u8>);

impl DiskFile for Bytes {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start.checked_add(buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(self.0.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, _: &[&[u8]], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write_back(&self, _: u64, _: u64) {}

    fn forget_cached(&self) {}

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.len()
    }

    fn modified(&self) -> io::Result<i128> {
        Ok(0)
    }

    fn map(&self) -> io::Result<Mapping> {
        Ok(Mapping::Read(self.0.clone()))
    }
}

/// Reads a whole pack's structure: header, trailer, footer. True if all of it is accepted.
pub fn pack(bytes: &[u8]) -> bool {
    let names = Names::new(&GroupKey::from_bytes([0; 32]));
    let file = Bytes(bytes.to_vec());
    read_layout(&file, PackId(0), &names.fingerprint).is_ok_and(|layout| read_footer(&file, &layout).is_ok())
}

/// The parts of a pack, of which a fuzzer makes one without having to find 4,096 bytes of header.
#[derive(Debug)]
pub struct Parts<'a> {
    /// Format version, body and pages in a frame, as in the header.
    pub header: [u8; 3],
    /// Numbers of pages and nodes.
    pub counts: [u16; 2],
    /// Pages, nodes, table, footer.
    pub parts: [&'a [u8]; 4],
    /// What is added to the lengths in the trailer.
    pub errors: [u8; 4],
}

/// As [`pack`], of parts put together with checksums that fit, so that what lies behind them is reached; what is accepted is read.
pub fn pack_of_parts(parts: &Parts<'_>) -> bool {
    let names = Names::new(&GroupKey::from_bytes([0; 32]));
    let [version, body, per_frame] = parts.header;
    let mut bytes = vec![0; HEADER as usize];
    for (at, field) in [(8, version), (13, 16), (56, body), (60, per_frame)] {
        bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = field);
    }
    parts.parts.iter().for_each(|part| bytes.extend(*part));
    let mut trailer = vec![0; 16];
    parts.counts.iter().for_each(|count| trailer.extend(u64::from(*count).to_le_bytes()));
    for (part, error) in parts.parts.iter().zip(parts.errors) {
        trailer.extend((part.len() as u64).wrapping_add(u64::from(error)).to_le_bytes());
    }
    trailer.resize(TRAILER, 0);
    bytes.extend(trailer);
    crate::pack::fit_checksums(&mut bytes, &names.fingerprint);
    let file = Bytes(bytes);
    let Ok(layout) = read_layout(&file, PackId(0), &names.fingerprint) else { return false };
    let Ok(entries) = read_footer(&file, &layout) else { return false };
    let packs = Packs::new(std::sync::Arc::new(crate::disk::HostDisk::default()));
    let pack = packs.add("".as_ref(), "".into(), layout, 0);
    for slot in entries.iter().filter_map(|entry| entry.at.slot()) {
        let mut page = [[0; PAGE_SIZE]; 2];
        let _ = read_span(&pack, &file, slot, &mut page);
    }
    true
}

/// Decodes a footer's entries.
pub fn footer(bytes: &[u8]) {
    let _ = crate::pack::decode_footer(bytes).map(|entries| {
        assert_eq!(crate::pack::encode_footer(&entries), bytes, "a footer has one encoding");
    });
}

/// Decodes a map node, and encodes it again if it is one.
pub fn node(bytes: &[u8]) {
    if let Ok((node, len)) = Node::decode(bytes) {
        let children: Vec<_> = (0..64).map(|i| node.child(i)).collect();
        assert_eq!(
            Node::encode(node.level, &children).as_deref(),
            bytes.get(..len),
            "a node has one encoding"
        );
    }
}

/// Opens a file of the index and looks names up in it.
pub fn index(bytes: &[u8], names: &[[u8; 32]]) -> usize {
    let group = Names::new(&GroupKey::from_bytes([0; 32])).fingerprint;
    let run = Run::new(1, "run".into(), Mapping::Read(bytes.to_vec()), &group, |_| Some(0), true);
    run.map_or(0, |run| {
        let found = names.iter().filter(|name| run.get(crate::PageHash(**name).fingerprint()).is_some());
        found.count() + run.iter().count()
    })
}

/// As [`index`], of entries, buckets and packs put together with checksums that fit.
pub fn index_of_parts(entries: &[u8], bits: u8, buckets: &[u8], packs: &[u8], names: &[[u8; 32]]) -> usize {
    let group = Names::new(&GroupKey::from_bytes([0; 32])).fingerprint;
    index(&Run::bytes_of(&group, entries, bits, buckets, packs), names)
}

/// Decodes a frame of pages.
pub fn frame(bytes: &[u8]) {
    let _ = crate::pack::decode_frame(bytes, 256);
}
