//! The payload of the RAM section: the list of blocks, then page records.

use std::collections::HashSet;
use std::io::Read;
use std::ops::Deref;

use super::codec::{Bytes, put_str8};
use super::error::{Error, ErrorKind, Result};
use super::reader::{Counts, Sink};
use super::source::StreamReader;

/// Bytes of a page: the x86 target page, in which QEMU's offsets and flags are packed.
pub const PAGE_SIZE: usize = 4096;
/// Most RAM blocks in a list. A `pc` machine has about ten; each DIMM, graphics card and option ROM adds one.
pub const MAX_BLOCKS: usize = 1024;
/// Most bytes in all blocks together, 16 TiB: above any host, and small enough that sums cannot overflow.
pub const MAX_RAM_BYTES: u64 = 1 << 44;

/// The word of a record carries the flags in the bits below the page offset.
const FLAG_MASK: u64 = PAGE_SIZE as u64 - 1;

/// Flags of a record's word, as in QEMU's `migration/ram.c`.
pub(super) mod flag {
    pub(in super::super) const ZERO: u64 = 0x002;
    pub(in super::super) const MEM_SIZE: u64 = 0x004;
    pub(in super::super) const PAGE: u64 = 0x008;
    pub(in super::super) const EOS: u64 = 0x010;
    pub(in super::super) const CONTINUE: u64 = 0x020;
    pub(in super::super) const XBZRLE: u64 = 0x040;
    pub(in super::super) const HOOK: u64 = 0x080;
    pub(in super::super) const COMPRESS_PAGE: u64 = 0x100;
    pub(in super::super) const MULTIFD_FLUSH: u64 = 0x200;
}

/// A block of guest memory: main memory, video memory, a ROM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's name for it: the id of the memory backend, `pc.bios`, `0000:00:02.0/vga.vram`.
    pub name: String,
    /// Bytes in use, a multiple of [`PAGE_SIZE`].
    pub length: u64,
}

/// A list of blocks that was checked: at least one, at most [`MAX_BLOCKS`], different names of at most 255 bytes,
/// whole pages, none empty, at most [`MAX_RAM_BYTES`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlocks {
    blocks: Vec<RamBlock>,
    total: u64,
}

impl RamBlocks {
    /// Checks a list. Fails with [`ErrorKind::Block`] or [`ErrorKind::TooLarge`]; the offset of the error is 0.
    pub fn new(blocks: Vec<RamBlock>) -> Result<Self> {
        Self::checked(blocks).map_err(|kind| Error::new(0, kind))
    }

    pub(super) fn checked(blocks: Vec<RamBlock>) -> Result<Self, ErrorKind> {
        let too_large = |what, value, limit| ErrorKind::TooLarge { what, value, limit };
        if blocks.len() > MAX_BLOCKS {
            return Err(too_large("the number of RAM blocks", blocks.len() as u64, MAX_BLOCKS as u64));
        }
        let mut names = HashSet::with_capacity(blocks.len());
        let mut total = 0u64;
        for RamBlock { name, length } in &blocks {
            let wrong = |problem| ErrorKind::Block { name: name.clone(), problem };
            if name.len() > usize::from(u8::MAX) {
                return Err(wrong("has a name of more than 255 bytes"));
            }
            if *length == 0 {
                return Err(wrong("is empty"));
            }
            if length & FLAG_MASK != 0 {
                return Err(wrong("does not consist of whole pages"));
            }
            if !names.insert(name.as_str()) {
                return Err(wrong("is listed twice"));
            }
            total = total.saturating_add(*length);
            if total > MAX_RAM_BYTES {
                return Err(too_large("the size of all RAM blocks", total, MAX_RAM_BYTES));
            }
        }
        if blocks.is_empty() {
            return Err(ErrorKind::BlockTotal { sum: 0, total: 0 });
        }
        Ok(Self { blocks, total })
    }

    /// Bytes of all blocks together.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Reads the list whose MEM_SIZE word announced `total` bytes.
    fn read(input: &mut impl Bytes, total: u64, at: u64) -> Result<Self> {
        let (mut blocks, mut sum) = (Vec::new(), 0u64);
        while sum < total {
            if blocks.len() == MAX_BLOCKS {
                let limit = MAX_BLOCKS as u64;
                let kind = ErrorKind::TooLarge { what: "the number of RAM blocks", value: limit + 1, limit };
                return Err(Error::new(input.offset(), kind));
            }
            let name = input.str8("a RAM block's name")?;
            let length = input.be64("a RAM block's length")?;
            sum = sum.saturating_add(length);
            blocks.push(RamBlock { name, length });
        }
        let blocks = Self::checked(blocks).map_err(|kind| Error::new(at, kind))?;
        if sum != total {
            return Err(Error::new(at, ErrorKind::BlockTotal { sum, total }));
        }
        Ok(blocks)
    }

    /// Appends the list as a MEM_SIZE record.
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        out.extend((self.total | flag::MEM_SIZE).to_be_bytes());
        for RamBlock { name, length } in &self.blocks {
            put_str8(out, name);
            out.extend(length.to_be_bytes());
        }
    }
}

impl Deref for RamBlocks {
    type Target = [RamBlock];

    fn deref(&self) -> &[RamBlock] {
        &self.blocks
    }
}

/// Reads the payload of the section's START: the block list and nothing else.
pub(super) fn read_start(input: &mut impl Bytes) -> Result<RamBlocks> {
    let at = input.offset();
    let word = input.be64("the RAM block list's size")?;
    if word & FLAG_MASK != flag::MEM_SIZE {
        let place = "where the RAM block list should start";
        return Err(Error::new(
            at,
            ErrorKind::Misplaced { what: format!("page record, flags {:#x}", word & FLAG_MASK), place },
        ));
    }
    let blocks = RamBlocks::read(input, word & !FLAG_MASK, at)?;
    let at = input.offset();
    match input.be64("the end of the RAM block list")? {
        flag::EOS => Ok(blocks),
        found => {
            let what = "the word after the RAM block list";
            Err(Error::new(at, ErrorKind::Unexpected { what, found, expected: flag::EOS }))
        }
    }
}

/// Reads the page records of one PART or END payload after another.
#[derive(Debug)]
pub(super) struct PageRecords {
    blocks: RamBlocks,
    // Block of the previous record. It outlives the payload: CONTINUE goes on across sections.
    current: Option<usize>,
}

impl PageRecords {
    pub(super) fn new(blocks: RamBlocks) -> Self {
        Self { blocks, current: None }
    }

    pub(super) fn into_blocks(self) -> RamBlocks {
        self.blocks
    }

    /// Reads records up to and with EOS, and hands the pages to `sink`.
    pub(super) fn read<R: Read>(
        &mut self,
        input: &mut StreamReader<R>,
        sink: &mut dyn Sink,
        counts: &mut Counts,
    ) -> Result<()> {
        loop {
            let at = input.offset();
            let word = input.be64("a page record")?;
            let page = word & !FLAG_MASK;
            match word & FLAG_MASK & !flag::CONTINUE {
                flag::PAGE => {
                    let block = self.block(input, at, word)?;
                    let bytes = input.array::<PAGE_SIZE>("a page")?;
                    sink.page(block, page, bytes).map_err(|e| Error::new(at, ErrorKind::Sink(e)))?;
                    counts.pages += 1;
                }
                flag::ZERO => {
                    let block = self.block(input, at, word)?;
                    // QEMU once could send pages of any one byte here, and refuses all but zero today.
                    input.expect_u8(0, "the fill byte of a zero page")?;
                    sink.zero(block, page).map_err(|e| Error::new(at, ErrorKind::Sink(e)))?;
                    counts.zero_pages += 1;
                }
                flag::EOS if word == flag::EOS => return Ok(()),
                _ => return Err(Error::new(at, refused(word & FLAG_MASK))),
            }
        }
    }

    /// Index of the block that the record at `at` is about, which its page is part of.
    #[inline]
    fn block(&mut self, input: &mut impl Bytes, at: u64, word: u64) -> Result<usize> {
        if word & flag::CONTINUE == 0 {
            self.current = Some(self.find(input)?);
        }
        let Some(index) = self.current else {
            return Err(Error::new(at, ErrorKind::NoPreviousBlock));
        };
        let page = word & !FLAG_MASK;
        match self.blocks.get(index) {
            Some(block) if page < block.length => Ok(index),
            Some(RamBlock { name, length }) => {
                let kind = ErrorKind::PageOutOfRange { name: name.clone(), page, length: *length };
                Err(Error::new(at, kind))
            }
            None => Err(Error::new(at, ErrorKind::NoPreviousBlock)),
        }
    }

    /// Reads a block's name. Lists are short and records name their block only where it changes, so a search does.
    fn find(&self, input: &mut impl Bytes) -> Result<usize> {
        let at = input.offset();
        let count = input.u8("a page record's block name")?;
        let name = input.take(usize::from(count), "a page record's block name")?;
        match self.blocks.iter().position(|block| block.name.as_bytes() == name) {
            Some(index) => Ok(index),
            None => {
                let name = String::from_utf8_lossy(name).into_owned();
                Err(Error::new(at, ErrorKind::UnknownBlock(name)))
            }
        }
    }
}

/// The error for a record that is not read.
fn refused(flags: u64) -> ErrorKind {
    match flags & !flag::CONTINUE {
        flag::XBZRLE => ErrorKind::Xbzrle,
        flag::COMPRESS_PAGE => ErrorKind::CompressedPage,
        flag::HOOK => ErrorKind::RdmaHook,
        flag::MULTIFD_FLUSH => ErrorKind::Multifd,
        flag::MEM_SIZE => {
            ErrorKind::Misplaced { what: "a second RAM block list".into(), place: "among the page records" }
        }
        _ => ErrorKind::Flags(flags),
    }
}
