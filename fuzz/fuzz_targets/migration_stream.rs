//! A stream from a hostile QEMU: reading it must not panic, and what is read must survive being written and read again.
//! Seeds: `crates/qemu/src/migration/tests/data/`.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use qemu::migration::{PAGE_SIZE, RamBlock, RestoreStream, Sink, SinkError, read_stream};

/// The last copy of each page; zero pages as none.
#[derive(Default)]
struct Memory(BTreeMap<(usize, u64), Option<Box<[u8; PAGE_SIZE]>>>);

impl Sink for Memory {
    fn blocks(&mut self, _: &[RamBlock]) -> Result<(), SinkError> {
        Ok(())
    }

    fn page(&mut self, block: usize, offset: u64, bytes: &[u8; PAGE_SIZE]) -> Result<(), SinkError> {
        self.0.insert((block, offset), Some(Box::new(*bytes)));
        Ok(())
    }

    fn zero(&mut self, block: usize, offset: u64) -> Result<(), SinkError> {
        self.0.insert((block, offset), None);
        Ok(())
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut memory = Memory::default();
    let Ok(finished) = read_stream(bytes, &mut memory) else { return };
    let state = finished.state;
    let mut stream = RestoreStream::new(Vec::new(), &state.header, &state.blocks, state.ram_section).unwrap();
    for (&(block, offset), page) in &memory.0 {
        match page {
            Some(page) => stream.pages(block, offset, page.as_slice()).unwrap(),
            None => stream.zero_page(block, offset).unwrap(),
        }
    }
    let written = stream.finish(&state.tail).unwrap();
    let mut again = Memory::default();
    let finished = read_stream(written.as_slice(), &mut again).unwrap();
    assert_eq!(finished.state, state);
    assert!(again.0 == memory.0);
});
