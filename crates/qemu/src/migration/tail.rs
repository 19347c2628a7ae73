//! The device tail: everything behind RAM, kept as it came.
//!
//! The tail does not say where it ends, and a QEMU that waits for the receiver's verdict keeps the socket open. So its
//! end is found by its content: EOF, the element byte of the description, a length, and exactly that many bytes of
//! JSON, after which nothing more has come. Device state can hold bytes of the guest's choosing, so what looks like
//! the end counts only if the walk along the description ends there too.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::Read;

use super::codec::{Bytes, SliceReader};
use super::description::{
    DeviceSection, EOF, FOOTER, MAX_DESCRIPTION_BYTES, SECTION_FULL, is_description, walk,
};
use super::error::{Error, ErrorKind, Result};
use super::header::read_magic;
use super::source::StreamReader;

/// Most bytes of device state and description together: 64 MiB. A small machine has 60 KiB, each network card adds
/// up to 200 KiB.
pub const MAX_TAIL_BYTES: usize = 64 << 20;

/// Element byte of the description.
pub(super) const VMDESCRIPTION: u8 = 0x06;
/// Bytes from EOF to the description: EOF, element byte, be32 length.
const END_BYTES: usize = 6;

/// The state of all devices, and what QEMU says about it, if it does. Checked: the two agree on every section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceTail {
    bytes: Vec<u8>,
    description: Vec<u8>,
    sections: Vec<DeviceSection>,
}

impl DeviceTail {
    /// Puts a tail together from the bytes of the first device section up to and with EOF, and the description.
    /// Fails as [`ErrorKind::Description`] or [`ErrorKind::Section`] if the two do not agree.
    pub fn new(bytes: Vec<u8>, description: Vec<u8>) -> Result<Self> {
        Self::new_at(bytes, description, 0)
    }

    /// The tail in a file that `xen-save-devices-state` has written: magic, version, and then what a stream has behind RAM, up to
    /// and with EOF. There is no description, and so no list of sections.
    pub fn from_file(bytes: &[u8]) -> Result<Self> {
        let mut input = SliceReader::new(bytes, 0);
        read_magic(&mut input)?;
        let at = input.offset();
        Self::undescribed_at(input.rest().to_vec(), at)
    }

    /// A tail without a description, with errors counting from `base`: of it only the ends are looked at.
    pub(super) fn undescribed_at(bytes: Vec<u8>, base: u64) -> Result<Self> {
        check_ends(&bytes, base)?;
        Ok(Self { bytes, description: Vec::new(), sections: Vec::new() })
    }

    /// As [`Self::new`], with errors counting from `base`.
    pub(super) fn new_at(bytes: Vec<u8>, description: Vec<u8>, base: u64) -> Result<Self> {
        let sections = walk(&bytes, &description, base)?;
        Ok(Self { bytes, description, sections })
    }

    /// Reads from behind the element byte of the first device section to the end of the description, and not further.
    ///
    /// If something looked like the end but was refused by the walk, and nothing more comes, that refusal is the error.
    pub(super) fn collect<R: Read>(input: &mut StreamReader<R>) -> Result<Self> {
        let base = input.offset().saturating_sub(1);
        let mut bytes = vec![SECTION_FULL];
        let mut ends = Ends::default();
        let mut refused = None;
        loop {
            match input.more(&mut bytes) {
                Ok(true) => {}
                Ok(false) => {
                    let kind = ErrorKind::Truncated { what: "the device state" };
                    return Err(refused.unwrap_or(Error::new(base + bytes.len() as u64, kind)));
                }
                Err(error) => return Err(refused.unwrap_or(error)),
            }
            if bytes.len() > MAX_TAIL_BYTES {
                let (value, limit) = (bytes.len() as u64, MAX_TAIL_BYTES as u64);
                return Err(Error::new(base, ErrorKind::TooLarge { what: "the device state", value, limit }));
            }
            ends.scan(&bytes);
            while let Some(eof) = ends.next(&bytes) {
                let (tail, rest) = bytes.split_at(eof + 1);
                let description = rest.get(END_BYTES - 1..).unwrap_or_default();
                match walk(tail, description, base) {
                    Ok(sections) => {
                        let description = description.to_vec();
                        bytes.truncate(eof + 1);
                        return Ok(Self { bytes, description, sections });
                    }
                    Err(error) => refused = Some(error),
                }
            }
        }
    }

    /// The device sections and EOF, as they came.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// QEMU's description of them, JSON; empty if there is none.
    pub fn description(&self) -> &[u8] {
        &self.description
    }

    /// Where each device's section lies in [`Self::bytes`], in their order; empty without a description.
    pub fn sections(&self) -> &[DeviceSection] {
        &self.sections
    }

    /// Payload of the first section of this name.
    pub fn payload(&self, name: &str) -> Option<&[u8]> {
        let section = self.sections.iter().find(|section| section.name == name)?;
        self.bytes.get(section.payload.clone())
    }

    /// The run state that QEMU was in when it began to migrate ("running", "paused"); none if it was not stored.
    pub fn run_state(&self) -> Option<&str> {
        // be32 size, then the name, padded with zeros to 32 bytes.
        let name = self.payload("globalstate")?.get(4..36)?.split(|&byte| byte == 0).next()?;
        std::str::from_utf8(name).ok().filter(|name| !name.is_empty())
    }
}

/// A tail begins with a section and ends with the footer of one, and EOF.
fn check_ends(bytes: &[u8], base: u64) -> Result<()> {
    match bytes {
        [SECTION_FULL, .., FOOTER, _, _, _, _, EOF] => Ok(()),
        [SECTION_FULL, ..] => {
            let kind = ErrorKind::Truncated { what: "the device state" };
            Err(Error::new(base + bytes.len() as u64, kind))
        }
        _ => {
            let found = bytes.first().copied().unwrap_or_default();
            let (what, expected) = ("the first device section", u64::from(SECTION_FULL));
            Err(Error::new(base, ErrorKind::Unexpected { what, found: found.into(), expected }))
        }
    }
}

/// Places that look like the end. The scan passes each byte once, whatever pieces it comes in. A guest may plant as
/// many as fit into its device state; they cost eight bytes each, and at least seven there.
#[derive(Debug, Default)]
struct Ends {
    scanned: usize,
    // (end of the description, position of EOF), the nearest end first. Both are at most MAX_TAIL_BYTES.
    open: BinaryHeap<Reverse<(u32, u32)>>,
}

impl Ends {
    fn scan(&mut self, bytes: &[u8]) {
        let new = bytes.get(self.scanned..).unwrap_or_default();
        for window in new.windows(END_BYTES + 1) {
            if let [EOF, VMDESCRIPTION, a, b, c, d, b'{'] = *window {
                let length = u32::from_be_bytes([a, b, c, d]) as usize;
                let end = self.scanned.saturating_add(END_BYTES).saturating_add(length);
                if length <= MAX_DESCRIPTION_BYTES && end <= MAX_TAIL_BYTES {
                    self.open.push(Reverse((end as u32, self.scanned as u32)));
                }
            }
            self.scanned += 1;
        }
    }

    /// Position of the EOF of a description that ends with `bytes`. What ended before was no end.
    fn next(&mut self, bytes: &[u8]) -> Option<usize> {
        while let Some(&Reverse((end, eof))) = self.open.peek() {
            let (end, eof) = (end as usize, eof as usize);
            if end > bytes.len() {
                return None;
            }
            self.open.pop();
            if end == bytes.len() && is_description(bytes.get(eof + END_BYTES..).unwrap_or_default()) {
                return Some(eof);
            }
        }
        None
    }
}
