//! All of a stream but its pages, and the bytes in which a snapshot keeps it: `docs/formats/device-state.md`.

use super::codec::{Bytes, SliceReader, put_str8};
use super::error::{Error, ErrorKind, Result};
use super::header::StreamHeader;
use super::ram::{MAX_BLOCKS, RamBlock, RamBlocks};
use super::tail::{DeviceTail, MAX_TAIL_BYTES};
use super::{MAX_CAPABILITIES, MAX_DESCRIPTION_BYTES, MAX_MACHINE_NAME};

/// First bytes of a stored device state.
const MAGIC: &[u8; 8] = b"SPINNEYD";
/// Version of the layout, and of a state whose tail has no description: a reader that knows only the first must not take the empty one
/// for damage.
const VERSION: u32 = 1;
const VERSION_UNDESCRIBED: u32 = 2;
/// Most bytes of a stream header: the names it may hold, and room for the fields between them.
const MAX_HEADER_BYTES: usize = MAX_MACHINE_NAME + MAX_CAPABILITIES * 256 + 256;

/// What a machine's snapshot consists of, besides the content of its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// The stream's header, with the machine type.
    pub header: StreamHeader,
    /// The blocks of memory.
    pub blocks: RamBlocks,
    /// Section id of RAM. A restore must use the same: QEMU matches parts of sections by id across all devices.
    pub ram_section: u32,
    /// The state of the devices.
    pub tail: DeviceTail,
}

impl DeviceState {
    /// The bytes to store.
    pub fn encode(&self) -> Vec<u8> {
        let lengths = [self.header.raw(), self.tail.bytes(), self.tail.description()].map(<[u8]>::len);
        let mut out = Vec::with_capacity(lengths.iter().sum::<usize>() + self.blocks.len() * 64 + 64);
        out.extend(MAGIC);
        let described = !self.tail.description().is_empty();
        out.extend(if described { VERSION } else { VERSION_UNDESCRIBED }.to_be_bytes());
        put_bytes(&mut out, self.header.raw());
        out.extend(self.ram_section.to_be_bytes());
        out.extend((self.blocks.len() as u32).to_be_bytes());
        for RamBlock { name, length } in self.blocks.iter() {
            put_str8(&mut out, name);
            out.extend(length.to_be_bytes());
        }
        put_bytes(&mut out, self.tail.bytes());
        put_bytes(&mut out, self.tail.description());
        out
    }

    /// Reads stored bytes. They may be padded with zeros at the end, as they are when they fill whole pages of a
    /// store. Everything that was checked when the state came from QEMU is checked again.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut input = SliceReader::new(bytes, 0);
        let magic = input.array::<8>("the magic of a device state")?;
        if magic != MAGIC {
            let found = magic.first_chunk().map_or(0, |first| u32::from_be_bytes(*first));
            return Err(Error::new(0, ErrorKind::Magic(found)));
        }
        let at = input.offset();
        let version = input.be32("the version of a device state")?;
        if !matches!(version, VERSION | VERSION_UNDESCRIBED) {
            let known = VERSION_UNDESCRIBED;
            let kind = ErrorKind::Version { what: "the device state", found: version, known };
            return Err(Error::new(at, kind));
        }

        let (header, at) = take_bytes(&mut input, "the stream header", MAX_HEADER_BYTES)?;
        let header = StreamHeader::decode_at(&header, at)?;
        let ram_section = input.be32("the RAM section's id")?;

        let at = input.offset();
        let count = input.length("the number of RAM blocks", MAX_BLOCKS)?;
        let mut blocks = Vec::with_capacity(count);
        for _ in 0..count {
            let name = input.str8("a RAM block's name")?;
            let length = input.be64("a RAM block's length")?;
            blocks.push(RamBlock { name, length });
        }
        let blocks = RamBlocks::checked(blocks).map_err(|kind| Error::new(at, kind))?;

        let (tail, at) = take_bytes(&mut input, "the device tail", MAX_TAIL_BYTES)?;
        let (description, described_at) = take_bytes(&mut input, "the description", MAX_DESCRIPTION_BYTES)?;
        if input.rest().iter().any(|&byte| byte != 0) {
            input.end("the device state")?;
        }
        let tail = if version == VERSION {
            DeviceTail::new_at(tail, description, at)?
        } else if description.is_empty() {
            DeviceTail::undescribed_at(tail, at)?
        } else {
            let (what, found) =
                ("the length of the description that this version lacks", description.len() as u64);
            return Err(Error::new(described_at, ErrorKind::Unexpected { what, found, expected: 0 }));
        };
        Ok(Self { header, blocks, ram_section, tail })
    }
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    // Every part is bounded by a limit far below 4 GiB before it gets here.
    out.extend((bytes.len() as u32).to_be_bytes());
    out.extend(bytes);
}

/// A be32 length and that many bytes, with the offset of the first of them.
fn take_bytes(input: &mut SliceReader<'_>, what: &'static str, limit: usize) -> Result<(Vec<u8>, u64)> {
    let count = input.length(what, limit)?;
    let at = input.offset();
    Ok((input.take(count, what)?.to_vec(), at))
}
