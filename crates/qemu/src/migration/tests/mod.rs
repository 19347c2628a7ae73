//! Tests of the migration stream. Bytes are written out by hand here, so that a mistake that reader and writer share
//! still shows.

mod damage;
mod device_state;
mod header;
mod reader;
mod real;
mod refused;
mod return_path;
mod tail;
mod writer;

use std::collections::BTreeMap;
use std::io::{self, Read};

use super::{Finished, PAGE_SIZE, RamBlock, Result, Sink, SinkError, read_stream};

/// Header of a `pc` machine without subsections.
const HEADER: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc";
const OPEN_RETURN_PATH: &[u8] = b"\x08\0\x01\0\0";
const PING: &[u8] = b"\x08\0\x02\0\x04\0\0\0\x2a";
const SWITCHOVER_START: &[u8] = b"\x08\0\x0b\0\0";
/// Up to its payload; the section's id is 5.
const START_RAM: &[u8] = b"\x01\0\0\0\x05\x03ram\0\0\0\0\0\0\0\x04";
const PART_RAM: &[u8] = b"\x02\0\0\0\x05";
const END_RAM: &[u8] = b"\x03\0\0\0\x05";
/// EOS and the footer of section 5.
const END_PAYLOAD: &[u8] = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x05";
/// `pc.ram` with three pages, `bios` with one.
const BLOCK_LIST: &[u8] = b"\0\0\0\0\0\0\x40\x04\x06pc.ram\0\0\0\0\0\0\x30\0\x04bios\0\0\0\0\0\0\x10\0";

/// A `timer` section with a field of 2 bytes, an array of 3 bytes, and a subsection with 1 byte; then `globalstate`.
fn tail_bytes() -> Vec<u8> {
    let mut out =
        b"\x04\0\0\0\x06\x05timer\0\0\0\x01\0\0\0\x02\x11\x12ABC\x05\x05timer\0\0\0\x01\x77\x7e\0\0\0\x06"
            .to_vec();
    out.extend(b"\x04\0\0\0\x07\x0bglobalstate\0\0\0\0\0\0\0\x01\0\0\0\x64running\0");
    out.extend([0; 92]);
    out.extend(b"\x7e\0\0\0\x07\0");
    out
}

const DESCRIPTION: &str = r#"{"page_size":4096,"devices":[{"name":"timer","instance_id":1,"vmsd_name":"timer","version":2,"fields":[{"name":"a","type":"int16","size":2},{"name":"b","array_len":3,"type":"uint8","size":1}],"subsections":[{"vmsd_name":"timer","version":1,"fields":[{"name":"c","size":1}]}]},{"name":"globalstate","instance_id":0,"fields":[{"name":"size","size":4},{"name":"runstate","size":100}]}]}"#;

/// The whole tail of a stream: sections, EOF, description.
fn whole_tail() -> Vec<u8> {
    [&tail_bytes(), b"\x06".as_slice(), &(DESCRIPTION.len() as u32).to_be_bytes(), DESCRIPTION.as_bytes()]
        .concat()
}

/// Page records of the sample: `pc.ram` page 0 twice, page 1 zero, page 2; then `bios`.
fn first_pages() -> Vec<u8> {
    [b"\0\0\0\0\0\0\0\x08\x06pc.ram".as_slice(), &[0x11; PAGE_SIZE], b"\0\0\0\0\0\0\x10\x22\0"].concat()
}

fn last_pages() -> Vec<u8> {
    [
        b"\0\0\0\0\0\0\x20\x28".as_slice(),
        &[0x33; PAGE_SIZE],
        b"\0\0\0\0\0\0\0\x28",
        &[0x44; PAGE_SIZE],
        b"\0\0\0\0\0\0\0\x08\x04bios",
        &[0x55; PAGE_SIZE],
    ]
    .concat()
}

/// A small stream with everything that a precopy stream may have.
fn sample() -> Vec<u8> {
    [
        HEADER,
        OPEN_RETURN_PATH,
        PING,
        START_RAM,
        BLOCK_LIST,
        END_PAYLOAD,
        PART_RAM,
        &first_pages(),
        END_PAYLOAD,
        SWITCHOVER_START,
        END_RAM,
        &last_pages(),
        END_PAYLOAD,
        &whole_tail(),
    ]
    .concat()
}

/// Keeps the last copy of each page; zero pages as none.
#[derive(Debug, Default, PartialEq, Eq)]
struct Memory {
    blocks: Vec<RamBlock>,
    pages: BTreeMap<(usize, u64), Option<Vec<u8>>>,
    ends: u32,
    pings: Vec<u32>,
}

impl Sink for Memory {
    fn blocks(&mut self, blocks: &[RamBlock]) -> Result<(), SinkError> {
        self.blocks.extend_from_slice(blocks);
        Ok(())
    }
    fn page(&mut self, block: usize, offset: u64, bytes: &[u8; PAGE_SIZE]) -> Result<(), SinkError> {
        self.pages.insert((block, offset), Some(bytes.to_vec()));
        Ok(())
    }
    fn zero(&mut self, block: usize, offset: u64) -> Result<(), SinkError> {
        self.pages.insert((block, offset), None);
        Ok(())
    }
    fn ram_end(&mut self) -> Result<(), SinkError> {
        self.ends += 1;
        Ok(())
    }
    fn ping(&mut self, value: u32) -> Result<(), SinkError> {
        self.pings.push(value);
        Ok(())
    }
}

fn read(input: impl Read) -> Result<(Finished, Memory)> {
    let mut memory = Memory::default();
    let finished = read_stream(input, &mut memory)?;
    Ok((finished, memory))
}

/// The message of the error that reading `bytes` gives.
fn error_of(bytes: &[u8]) -> String {
    read(bytes).expect_err("the stream should be refused").to_string()
}

/// Gives `bytes` in pieces, then fails the test if asked for more: a socket that stays open would block there.
struct StaysOpen<'a> {
    bytes: &'a [u8],
    piece: usize,
}

impl Read for StaysOpen<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        assert!(!self.bytes.is_empty(), "read beyond the end of the stream: a socket would block");
        let count = self.piece.min(out.len()).min(self.bytes.len());
        let (now, later) = self.bytes.split_at(count);
        out[..count].copy_from_slice(now);
        self.bytes = later;
        Ok(count)
    }
}
