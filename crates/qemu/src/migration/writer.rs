//! Writing the stream that a QEMU started with `-incoming` loads: header, RAM, device tail.
//!
//! ```text
//!   header  START(ram){blocks}  PART(ram){pages}  END(ram){}  device tail with EOF  VMDESCRIPTION
//! ```
//! QEMU does not check that all pages arrived: what is left out stays as it is in its memory. So where RAM is a mapping
//! of an image, only the other blocks travel.

use std::io::{self, Write};

use super::codec::put_str8;
use super::description::FOOTER;
use super::header::StreamHeader;
use super::ram::{PAGE_SIZE, RamBlock, RamBlocks, flag};
use super::reader::{RAM_VERSION, SECTION_END, SECTION_PART, SECTION_START};
use super::tail::{DeviceTail, VMDESCRIPTION};

/// Bytes collected before they are written. As with the reader's buffer: large for the system call, small for the cache.
const BUFFER_BYTES: usize = 256 << 10;
/// Longest record: word, block name with its length, page.
const MAX_RECORD: usize = 8 + 256 + PAGE_SIZE;

/// Why a stream could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The receiver does not take the bytes.
    #[error("cannot write the migration stream")]
    Write(#[from] io::Error),
    /// There is no block of this index.
    #[error("RAM block {index} of {count}")]
    NoBlock {
        /// The index.
        index: usize,
        /// Number of blocks.
        count: usize,
    },
    /// Pages that are not all in their block, or that do not start and end at page borders.
    #[error(
        "{length:#x} bytes at {offset:#x} are not whole pages of RAM block {name:?} ({block_length:#x} bytes)"
    )]
    NotPages {
        /// Name of the block.
        name: String,
        /// Byte offset in it.
        offset: u64,
        /// Bytes handed in.
        length: u64,
        /// Bytes of the block.
        block_length: u64,
    },
}

/// A restore stream under way. Dropped before [`Self::finish`], it leaves a stream that QEMU refuses.
#[derive(Debug)]
pub struct RestoreStream<W> {
    out: W,
    buffer: Vec<u8>,
    blocks: RamBlocks,
    section: u32,
    // Block of the previous page; none before the first.
    current: Option<usize>,
}

impl<W: Write> RestoreStream<W> {
    /// Begins a stream with the header and blocks of a snapshot, and its RAM section's id (see
    /// [`DeviceState`](super::DeviceState)). Capabilities in the header are left out: RAM is written in the plain way.
    pub fn new(out: W, header: &StreamHeader, blocks: &RamBlocks, section: u32) -> Result<Self, WriteError> {
        let mut buffer = Vec::with_capacity(BUFFER_BYTES + MAX_RECORD);
        buffer.extend(header.with_capabilities(&[]).raw());
        buffer.push(SECTION_START);
        buffer.extend(section.to_be_bytes());
        put_str8(&mut buffer, "ram");
        buffer.extend(0u32.to_be_bytes());
        buffer.extend(RAM_VERSION.to_be_bytes());
        blocks.put(&mut buffer);
        put_end(&mut buffer, section);
        let mut stream = Self { out, buffer, blocks: blocks.clone(), section, current: None };
        stream.flush_if_full()?;
        Ok(stream)
    }

    /// Writes a run of pages, `offset` bytes into block `block`. Fails with [`WriteError::NotPages`] if these are not
    /// whole pages of the block.
    pub fn pages(&mut self, block: usize, offset: u64, run: &[u8]) -> Result<(), WriteError> {
        self.check(block, offset, run.len() as u64)?;
        let (pages, _) = run.as_chunks::<PAGE_SIZE>();
        let mut at = offset;
        for page in pages {
            self.put_word(block, at, flag::PAGE);
            self.buffer.extend_from_slice(page);
            self.flush_if_full()?;
            at += PAGE_SIZE as u64;
        }
        Ok(())
    }

    /// Writes a page of zeros. Needed only where the memory of the new machine may hold something else: QEMU fills
    /// ROMs and ACPI tables before it loads.
    pub fn zero_page(&mut self, block: usize, offset: u64) -> Result<(), WriteError> {
        self.check(block, offset, PAGE_SIZE as u64)?;
        self.put_word(block, offset, flag::ZERO);
        self.buffer.push(0);
        self.flush_if_full()
    }

    /// Ends RAM, writes the device tail with its description, flushes, and gives the output back.
    pub fn finish(mut self, tail: &DeviceTail) -> Result<W, WriteError> {
        if self.current.is_some() {
            put_end(&mut self.buffer, self.section);
        }
        self.buffer.push(SECTION_END);
        self.buffer.extend(self.section.to_be_bytes());
        put_end(&mut self.buffer, self.section);
        self.flush()?;
        self.out.write_all(tail.bytes())?;
        // QEMU waits for a description after EOF, though it does nothing with it: one of no bytes will do.
        self.buffer.push(VMDESCRIPTION);
        self.buffer.extend((tail.description().len() as u32).to_be_bytes());
        self.buffer.extend(tail.description());
        self.flush()?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn check(&self, index: usize, offset: u64, length: u64) -> Result<(), WriteError> {
        let Some(RamBlock { name, length: block_length }) = self.blocks.get(index) else {
            return Err(WriteError::NoBlock { index, count: self.blocks.len() });
        };
        let page = PAGE_SIZE as u64;
        let aligned = offset.is_multiple_of(page) && length.is_multiple_of(page);
        if aligned && offset.checked_add(length).is_some_and(|end| end <= *block_length) {
            return Ok(());
        }
        Err(WriteError::NotPages { name: name.clone(), offset, length, block_length: *block_length })
    }

    /// Appends the word of a record, with the block's name where it changes. Opens the one PART of the stream before
    /// the first record: QEMU sets no limit on its length.
    fn put_word(&mut self, block: usize, offset: u64, kind: u64) {
        if self.current.is_none() {
            self.buffer.push(SECTION_PART);
            self.buffer.extend(self.section.to_be_bytes());
        }
        if self.current == Some(block) {
            self.buffer.extend((offset | kind | flag::CONTINUE).to_be_bytes());
        } else {
            self.buffer.extend((offset | kind).to_be_bytes());
            put_str8(&mut self.buffer, self.blocks.get(block).map_or("", |block| &block.name));
            self.current = Some(block);
        }
    }

    fn flush_if_full(&mut self) -> Result<(), WriteError> {
        if self.buffer.len() >= BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), WriteError> {
        self.out.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

/// Ends a payload of the RAM section, and the section's part with its footer.
fn put_end(out: &mut Vec<u8>, section: u32) {
    out.extend(flag::EOS.to_be_bytes());
    out.push(FOOTER);
    out.extend(section.to_be_bytes());
}
