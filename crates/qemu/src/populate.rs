//! Touching guest memory that has never been touched, before it is write-protected.
//!
//! QEMU's background-snapshot reads every page of RAM once, so that there is something to protect. For memory that the guest has
//! never used that is a page fault each, and where the guest already stands still they are its pause: up to a second for 1 GiB. So
//! it is done here first, from outside and with the guest running: a read maps the kernel's zero page.

use std::io;

use crate::guest_memory::GuestMemory;
use crate::process::ProcessId;
use crate::qmp::Qmp;

/// Pages looked at together: 64 MiB of memory.
const PAGES: u64 = 16 << 10;

/// Reads one byte of each page of RAM that is not there yet; `goes_on` is called now and then, and ends it with false. Returns how
/// many pages that were.
///
/// # Errors
/// QEMU's memory may not be read. Then nothing is lost but time later.
pub(crate) fn populate(qmp: &Qmp, process: ProcessId, goes_on: &dyn Fn() -> bool) -> io::Result<u64> {
    let memory = GuestMemory::open(qmp, process, None)?;
    let (mut touched, mut scratch) = (0, Vec::new());
    for block in memory.blocks() {
        let mut at = 0;
        while at < block.pages() {
            let count = PAGES.min(block.pages() - at);
            memory.present(block, at, count as usize, &mut scratch, |page, present| {
                if present {
                    return Ok(());
                }
                touched += 1;
                memory.read(block, page, &mut [0])
            })?;
            if !goes_on() {
                return Ok(touched);
            }
            at += count;
        }
    }
    Ok(touched)
}
