//! The restore stream, byte by byte and through the reader.

use crate::migration::{DeviceTail, RamBlocks, RestoreStream, StreamHeader, WriteError};

use super::*;

fn blocks() -> RamBlocks {
    RamBlocks::new(vec![
        RamBlock { name: "pc.ram".into(), length: 0x3000 },
        RamBlock { name: "bios".into(), length: 0x1000 },
    ])
    .unwrap()
}

fn begin() -> RestoreStream<Vec<u8>> {
    let header =
        [HEADER, b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared"].concat();
    RestoreStream::new(Vec::new(), &StreamHeader::decode(&header).unwrap(), &blocks(), 5).unwrap()
}

fn tail() -> DeviceTail {
    DeviceTail::new(tail_bytes(), DESCRIPTION.into()).unwrap()
}

#[test]
fn the_stream_has_these_bytes() {
    let mut stream = begin();
    stream.pages(0, 0x1000, &[[0x11; PAGE_SIZE], [0x22; PAGE_SIZE]].concat()).unwrap();
    stream.zero_page(0, 0).unwrap();
    stream.zero_page(1, 0).unwrap();
    let expected = [
        HEADER,
        START_RAM,
        BLOCK_LIST,
        END_PAYLOAD,
        PART_RAM,
        b"\0\0\0\0\0\0\x10\x08\x06pc.ram",
        &[0x11; PAGE_SIZE],
        b"\0\0\0\0\0\0\x20\x28",
        &[0x22; PAGE_SIZE],
        b"\0\0\0\0\0\0\0\x22\0",
        b"\0\0\0\0\0\0\0\x02\x04bios\0",
        END_PAYLOAD,
        END_RAM,
        END_PAYLOAD,
        &whole_tail(),
    ]
    .concat();
    assert_eq!(stream.finish(&tail()).unwrap(), expected);
}

#[test]
fn a_stream_without_pages_has_no_part() {
    let expected = [HEADER, START_RAM, BLOCK_LIST, END_PAYLOAD, END_RAM, END_PAYLOAD, &whole_tail()].concat();
    assert_eq!(begin().finish(&tail()).unwrap(), expected);
}

#[test]
fn what_was_read_is_written_and_read_again() {
    let (finished, memory) = read(sample().as_slice()).unwrap();
    let state = &finished.state;
    let mut stream = RestoreStream::new(Vec::new(), &state.header, &state.blocks, state.ram_section).unwrap();
    for (&(block, offset), page) in &memory.pages {
        match page {
            Some(bytes) => stream.pages(block, offset, bytes).unwrap(),
            None => stream.zero_page(block, offset).unwrap(),
        }
    }
    let bytes = stream.finish(&state.tail).unwrap();
    let (again, memory_again) = read(StaysOpen { bytes: &bytes, piece: 100 }).unwrap();
    assert_eq!(again.state, finished.state);
    assert_eq!(memory_again.pages, memory.pages);
}

#[test]
fn more_than_a_buffer_goes_through() {
    let length = 700 * PAGE_SIZE;
    let blocks = RamBlocks::new(vec![RamBlock { name: "r".into(), length: length as u64 }]).unwrap();
    let memory: Vec<u8> = (0..length).map(|i| (i / PAGE_SIZE + i) as u8).collect();
    let mut stream =
        RestoreStream::new(Vec::new(), &StreamHeader::decode(HEADER).unwrap(), &blocks, 1).unwrap();
    stream.pages(0, 0, &memory).unwrap();
    let (_, read) = read(stream.finish(&tail()).unwrap().as_slice()).unwrap();
    let pages: Vec<u8> = read.pages.into_values().flatten().flatten().collect();
    assert!(pages == memory);
}

#[test]
fn pages_that_are_none_are_refused() {
    let mut stream = begin();
    assert!(matches!(stream.zero_page(2, 0), Err(WriteError::NoBlock { index: 2, count: 2 })));
    for (offset, length) in [(1, 4096), (0, 4095), (0x3000, 4096), (0x1000, 0x3000), (!0xfff, 0x2000)] {
        let error = stream.pages(0, offset, &vec![0; length]).unwrap_err();
        assert!(matches!(error, WriteError::NotPages { .. }), "{offset:#x}+{length:#x}: {error}");
    }
    assert_eq!(
        stream.zero_page(1, 0x1000).unwrap_err().to_string(),
        "0x1000 bytes at 0x1000 are not whole pages of RAM block \"bios\" (0x1000 bytes)"
    );
    // Nothing of it reached the stream.
    let expected = [HEADER, START_RAM, BLOCK_LIST, END_PAYLOAD, END_RAM, END_PAYLOAD, &whole_tail()].concat();
    assert_eq!(stream.finish(&tail()).unwrap(), expected);
}
