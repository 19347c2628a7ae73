//! Touching guest memory that has never been touched, before it is write-protected.
//!
//! QEMU's background-snapshot reads every page of RAM once, so that there is something to protect. For memory that the guest has
//! never used that is a page fault each, and where the guest already stands still they are its pause: up to a second for 1 GiB. So
//! it is done here first, from outside and with the guest running: a read through `/proc/PID/mem` maps the kernel's zero page. What
//! `/proc/PID/pagemap` calls present is passed over.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::param::page_size;
use serde_json::json;

use crate::process::ProcessId;
use crate::qmp::Qmp;

/// Entries of the page map that are read at a time: 64 MiB of memory.
const ENTRIES: usize = 16 << 10;
/// Bits of an entry, from the kernel's `Documentation/admin-guide/mm/pagemap.rst`.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;

/// A part of QEMU's address space that holds a RAM block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    start: u64,
    length: u64,
}

/// Reads one byte of each page of RAM that is not there yet; `goes_on` is called now and then, and ends it with false. Returns how
/// many pages that were.
///
/// # Errors
/// QEMU's memory may not be read (see `ptrace(2)`). Then nothing is lost but time later.
pub(crate) fn populate(qmp: &Qmp, process: ProcessId, goes_on: &dyn Fn() -> bool) -> io::Result<u64> {
    let command = json!({ "command-line": "info ramblock" });
    let answer = qmp.execute("human-monitor-command", command).map_err(io::Error::other)?;
    let ranges = ram_ranges(answer.as_str().unwrap_or_default());
    let map = File::open(format!("/proc/{}/pagemap", process.pid))?;
    let memory = File::open(format!("/proc/{}/mem", process.pid))?;
    let page = page_size() as u64;
    let mut entries = vec![0; ENTRIES * 8];
    let mut touched = 0;
    for range in ranges {
        let (mut at, end) = (range.start / page, (range.start + range.length) / page);
        while at < end {
            let count = ENTRIES.min(usize::try_from(end - at).unwrap_or(ENTRIES));
            let entries = entries.get_mut(..count * 8).unwrap_or_default();
            map.read_exact_at(entries, at * 8)?;
            for (number, entry) in (at..).zip(entries.as_chunks::<8>().0) {
                if u64::from_ne_bytes(*entry) & (PRESENT | SWAPPED) == 0 {
                    memory.read_exact_at(&mut [0], number * page)?;
                    touched += 1;
                }
            }
            if !goes_on() {
                return Ok(touched);
            }
            at += count as u64;
        }
    }
    Ok(touched)
}

/// The blocks of `info ramblock` as they lie in QEMU's address space; lines that are not understood are passed over.
///
/// `pc.ram    4 KiB  0x0 (offset)  0x40000000 (used)  0x40000000 (total)  0x7f5c3fe00000 (host)  rw`
fn ram_ranges(table: &str) -> Vec<Range> {
    let hex = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let range = |line: &str| match line.split_whitespace().filter_map(hex).collect::<Vec<_>>()[..] {
        [_, used, _, start] => start.checked_add(used).map(|_| Range { start, length: used }),
        _ => None,
    };
    table.lines().filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_found_in_the_monitors_table() {
        let table = "\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                     ram    4 KiB  0x0000000000000000 0x0000000040000000 0x0000000040000000 0x00007f5c3fe00000  rw
    /rom@etc/acpi/rsdp    4 KiB  0x0000000041040000 0x0000000000001000 0x0000000000001000 0x00007f5c4c400000  ro
";
        assert_eq!(
            ram_ranges(table),
            [
                Range { start: 0x7f5c_3fe0_0000, length: 0x4000_0000 },
                Range { start: 0x7f5c_4c40_0000, length: 0x1000 }
            ]
        );
        for bad in ["", "ram 4 KiB 0x0 0x1", "0x1 0xzz 0x3 0x4", "0x0 0xffffffffffffffff 0x0 0x2"] {
            assert_eq!(ram_ranges(bad), [], "{bad:?}");
        }
    }
}
