//! Doors to the readers for the fuzz targets; no part of the crate's interface.

use std::io;

use crate::disk::DiskFile;
use crate::group::{GroupKey, Names};
use crate::index::{Mapping, Run};
use crate::map::Node;
use crate::pack::{PackId, read_footer, read_layout};

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

/// As [`pack`], with all checksums made to fit first, so that what lies behind them is reached.
pub fn pack_with_right_checksums(bytes: &[u8]) -> bool {
    let mut bytes = bytes.to_vec();
    let names = Names::new(&GroupKey::from_bytes([0; 32]));
    crate::pack::fit_checksums(&mut bytes, &names.fingerprint);
    pack(&bytes)
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

/// Decodes a frame of pages.
pub fn frame(bytes: &[u8]) {
    let _ = crate::pack::decode_frame(bytes, 256);
}
