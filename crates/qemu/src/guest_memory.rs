//! A machine's memory as it lies in QEMU's address space: where its blocks are, which pages exist, what is in them.
//!
//! `info ramblock` on the monitor tells the blocks, `/proc/PID/pagemap` which pages were ever touched, `/proc/PID/mem` their content.
//! All of it needs the right to look into that process (see `ptrace(2)`, "Ptrace access mode checking").

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use serde_json::json;

use crate::migration::{PAGE_SIZE, RamBlock};
use crate::process::ProcessId;
use crate::qmp::Qmp;

/// Bytes of a page of the host's, which x86 has in common with the guest's.
const PAGE: u64 = PAGE_SIZE as u64;
/// Bits of an entry, from the kernel's `Documentation/admin-guide/mm/pagemap.rst`.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// The page is one of a file, or shared; no bit of a page that belongs to the process alone.
const OF_FILE: u64 = 1 << 61;
/// Bytes of an entry of the page map.
const ENTRY: usize = 8;

/// The memory of one QEMU.
#[derive(Debug)]
pub(crate) struct GuestMemory {
    blocks: Vec<Mapped>,
    map: File,
    content: File,
}

/// A block of guest memory and where QEMU has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mapped {
    pub(crate) block: RamBlock,
    pub(crate) start: u64,
    pub(crate) backing: Backing,
}

/// What lies under a block, and so what can be told of a page without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// No file: what was never touched is zero.
    Anonymous,
    /// Some file: nothing can be told.
    File,
    /// An image that is mapped privately: what was not written to is as it is there.
    Image,
}

impl GuestMemory {
    /// Finds it. The block `image` is one that was mapped privately from an image.
    ///
    /// # Errors
    /// QEMU's memory may not be looked at, or its monitor fails; that block is not there, or not a private mapping of a file.
    pub(crate) fn open(qmp: &Qmp, process: ProcessId, image: Option<&str>) -> io::Result<Self> {
        let command = json!({ "command-line": "info ramblock" });
        let answer = qmp.execute("human-monitor-command", command).map_err(io::Error::other)?;
        let files = files(&fs::read_to_string(format!("/proc/{}/maps", process.pid))?);
        let mut blocks = blocks(answer.as_str().unwrap_or_default(), &files)
            .ok_or_else(|| io::Error::other("QEMU's table of its memory is not understood"))?;
        if let Some(name) = image {
            let mut mapped = blocks.iter_mut().filter(|mapped| mapped.block.name == name);
            let is_private = |mapped: &Mapped| {
                let (start, end) = (mapped.start, mapped.start + mapped.block.length);
                let inside = |file: &&FileMapping| file.range.start <= start && end <= file.range.end;
                files.iter().find(inside).is_some_and(|file| file.private)
            };
            match mapped.next().filter(|mapped| is_private(mapped)) {
                Some(mapped) => mapped.backing = Backing::Image,
                None => {
                    return Err(io::Error::other(format!("the block {name:?} is not mapped from an image")));
                }
            }
        }
        let map = File::open(format!("/proc/{}/pagemap", process.pid))?;
        let content = File::open(format!("/proc/{}/mem", process.pid))?;
        Ok(Self { blocks, map, content })
    }

    pub(crate) fn blocks(&self) -> &[Mapped] {
        &self.blocks
    }

    /// Calls `each` with pages `from .. from + count` of a block, and whether they are there: in an image's block, whether they are the
    /// process's own. `scratch` is for whoever comes again.
    pub(crate) fn present(
        &self,
        block: &Mapped,
        from: u64,
        count: usize,
        scratch: &mut Vec<u8>,
        mut each: impl FnMut(u64, bool) -> io::Result<()>,
    ) -> io::Result<()> {
        scratch.resize(count * ENTRY, 0);
        self.map.read_exact_at(scratch, (block.start / PAGE + from) * ENTRY as u64)?;
        let (entries, _) = scratch.as_chunks::<ENTRY>();
        for (page, entry) in (from..).zip(entries) {
            let entry = u64::from_ne_bytes(*entry);
            let there = entry & (PRESENT | SWAPPED) != 0;
            each(page, there && (block.backing != Backing::Image || entry & OF_FILE == 0))?;
        }
        Ok(())
    }

    /// Reads a block from page `from` on.
    pub(crate) fn read(&self, block: &Mapped, from: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.content.read_exact_at(bytes, block.start + from * PAGE)
    }
}

impl Mapped {
    /// Pages it has.
    pub(crate) fn pages(&self) -> u64 {
        self.block.length / PAGE
    }
}

/// The blocks of `info ramblock`, a line each below the head; none if one is not understood. `files` lie under some of them.
///
/// `pc.ram    4 KiB  0x0 (offset)  0x40000000 (used)  0x40000000 (total)  0x7f5c3fe00000 (host)  rw`
fn blocks(table: &str, files: &[FileMapping]) -> Option<Vec<Mapped>> {
    let hex = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let block = |line: &str| {
        let name = line.split_whitespace().next()?.to_owned();
        match line.split_whitespace().skip(1).filter_map(hex).collect::<Vec<_>>()[..] {
            [_, length, _, start] => {
                let end = start.checked_add(length)?;
                let file = files.iter().any(|file| file.range.start < end && start < file.range.end);
                let backing = if file { Backing::File } else { Backing::Anonymous };
                Some(Mapped { block: RamBlock { name, length }, start, backing })
            }
            _ => None,
        }
    };
    table.lines().skip(1).filter(|line| !line.trim().is_empty()).map(block).collect()
}

/// Where a file is mapped.
#[derive(Debug, PartialEq, Eq)]
struct FileMapping {
    range: Range<u64>,
    /// What is written to is the process's own.
    private: bool,
}

/// Where files are mapped: the lines of `/proc/PID/maps` with an inode.
///
/// `7f5c3fe00000-7f5c7fe00000 rw-p 00000000 00:1a 1045  /dev/shm/ram`
fn files(maps: &str) -> Vec<FileMapping> {
    let file = |line: &str| {
        let mut words = line.split_whitespace();
        let (from, to) = words.next()?.split_once('-')?;
        let hex = |word| u64::from_str_radix(word, 16).ok();
        let private = words.next()?.ends_with('p');
        (words.nth(2)? != "0").then_some(FileMapping { range: hex(from)?..hex(to)?, private })
    };
    maps.lines().filter_map(file).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped(name: &str, length: u64, start: u64, backing: Backing) -> Mapped {
        Mapped { block: RamBlock { name: name.into(), length }, start, backing }
    }

    #[test]
    fn blocks_are_found_in_the_monitors_table() {
        let table = "\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                     ram    4 KiB  0x0000000000000000 0x0000000040000000 0x0000000040000000 0x00007f5c3fe00000  rw
    /rom@etc/acpi/rsdp    4 KiB  0x0000000041040000 0x0000000000001000 0x0000000000010000 0x00007f5c8c400000  ro
";
        let files = files(
            "7f5c3fe00000-7f5c7fe00000 rw-p 00000000 00:00 0 \n\
             7f5c8c400000-7f5c8c401000 rw-p 00000000 00:1a 1045  /dev/shm/ram\n\
             7f5c8d400000-7f5c8d401000 rw-s 00000000 00:1a 1046  /dev/shm/other\n",
        );
        assert_eq!(files.iter().map(|file| file.private).collect::<Vec<_>>(), [true, false]);
        assert_eq!(
            blocks(table, &files).unwrap(),
            [
                mapped("ram", 0x4000_0000, 0x7f5c_3fe0_0000, Backing::Anonymous),
                mapped("/rom@etc/acpi/rsdp", 0x1000, 0x7f5c_8c40_0000, Backing::File)
            ]
        );
        for bad in ["ram 4 KiB 0x0 0x1", "a 0x1 0xzz 0x3 0x4", "a 0x0 0xffffffffffffffff 0x0 0x2"] {
            assert_eq!(blocks(&format!("{table}{bad}\n"), &[]), None, "{bad:?}");
        }
    }
}
