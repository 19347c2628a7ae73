//! Getting a machine's state out of QEMU from outside: its memory is read while it stands still.
//!
//! ```text
//!   ours                                QEMU
//!   stop                           ->   the guest stands still, its disks are idle and flushed
//!   xen-save-devices-state         ->   the state of the devices, in a file
//!   `read`: /proc/PID/mem               (nothing: every core is ours)
//!   xen-save-devices-state         ->   the same again: if it differs, memory may too
//!   `at_end`: switch the disks     ->
//!   cont                           ->   the guest runs
//! ```
//! A migration has QEMU copy every page to a socket, from one thread, and us from there. Here whoever wants the pages reads them, from
//! as many threads as there are cores, and what was never touched is not read at all. In return `stop` outlives its sender: whoever
//! calls needs a deadline that somebody else keeps, from before the call until its end.
//!
//! QEMU does not say which of its blocks belong to a machine's state (in a migration it sends those). So a block that is not known to
//! belong means that the machine has to be saved by a migration: [`check`].

use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use serde_json::json;

use crate::command::RAM_ID;
use crate::guest_memory::{Backing, GuestMemory, Mapped};
use crate::migration::{
    Counts, DeviceState, DeviceTail, FOOTER, Finished, MAX_TAIL_BYTES, PAGE_SIZE, RamBlock, RamBlocks,
    StreamHeader,
};
use crate::process::ProcessId;
use crate::qmp::{Qmp, QmpError};
use crate::save::{
    CallbackError, PAUSE_LIMIT, SaveError, SavedState, check_state, pause_after, run_state, settle, system,
};

/// Section id of RAM in the streams of such a state. QEMU counts from 0, and these streams have no other section in parts.
const RAM_SECTION: u32 = 0x5350_0001;

/// What such a save needs of its caller.
pub struct Outside<'a> {
    /// The machine's monitor.
    pub qmp: &'a Qmp,
    /// Its process.
    pub process: ProcessId,
    /// QEMU's name of the machine type, with its version.
    pub machine: &'a str,
    /// Its RAM was mapped privately from an image: what the guest has not written to is as it is there, and is not read.
    pub mapped: bool,
    /// Leave the guest standing still when all is well. The caller sees to it that it goes on, or that it is replaced.
    pub stays: bool,
    /// A file that QEMU may make; it is gone afterwards.
    pub scratch: &'a Path,
    /// How long the guest may stand still; a save that would need longer fails.
    pub max_pause: Option<Duration>,
    /// Looked at with every part of memory that is read.
    pub cancel: &'a AtomicBool,
    /// Called right before the guest is stopped, and again before `at_end`; if it fails, that is not done.
    pub confirm: &'a dyn Fn() -> Result<(), CallbackError>,
    /// Called while the guest stands still, to read all of its memory.
    pub read: &'a mut dyn FnMut(&StillMemory<'_>) -> Result<(), CallbackError>,
    /// Called while the guest stands still, when all is read. Fails with it.
    pub at_end: &'a mut dyn FnMut() -> Result<(), CallbackError>,
}

/// The memory of a guest that stands still.
#[derive(Debug)]
pub struct StillMemory<'a> {
    memory: GuestMemory,
    blocks: RamBlocks,
    cancel: &'a AtomicBool,
    pause: Pause,
}

/// How long the guest stands still, and may.
#[derive(Clone, Copy, Debug)]
struct Pause {
    began: Instant,
    max: Option<Duration>,
}

/// True if the state of this machine can be had so; `mapped` as in [`Outside`].
///
/// # Errors
/// [`SaveError::NotOutside`] with the reason why not. [`Outside::save`] may find another one later.
pub fn check(qmp: &Qmp, process: ProcessId, mapped: bool) -> Result<(), SaveError> {
    open(qmp, process, mapped).map(drop)
}

impl Outside<'_> {
    /// Saves the state of a machine that runs. On an error the guest runs on, and the state is worthless; `at_end` may have been
    /// called.
    pub fn save(mut self) -> Result<SavedState, SaveError> {
        let run_state = check_state(self.qmp)?;
        if run_state != "running" {
            return Err(SaveError::State { state: run_state });
        }
        let header = StreamHeader::of_machine(self.machine).map_err(SaveError::stream)?;
        let mark = self.qmp.last_event();
        (self.confirm)().map_err(SaveError::AtEnd)?;
        let pause = Pause { began: Instant::now(), max: self.max_pause };
        let saved = self.stand_still(header, pause, mark);
        let _ = fs::remove_file(self.scratch);
        let goes_on = match &saved {
            Ok(_) if self.stays => {
                let pause_us = None;
                return saved.map(|finished| SavedState { finished, pause_us, run_state });
            }
            Ok(_) => self.qmp.execute("cont", json!({})).map(drop).map_err(SaveError::from),
            Err(error) => {
                if matches!(error, SaveError::Qmp(QmpError::TimedOut { .. })) {
                    // What QEMU was asked it may still do: then this comes right behind it. Nobody waits for the answer.
                    let _ = self.qmp.execute_within("cont", json!({}), Duration::from_millis(1));
                }
                settle(self.qmp, &run_state)
            }
        };
        let finished = match (saved, goes_on) {
            (Ok(finished), Ok(())) => finished,
            (Err(error), Ok(())) | (_, Err(error)) => return Err(error),
        };
        let pause_us = pause_after(self.qmp, mark).unwrap_or_else(|| pause.micros());
        Ok(SavedState { finished, pause_us: Some(pause_us), run_state })
    }

    /// From `stop` to right before `cont`.
    fn stand_still(&mut self, header: StreamHeader, pause: Pause, mark: u64) -> Result<Finished, SaveError> {
        self.qmp.execute("stop", json!({}))?;
        pause.check()?;
        let tail = self.device_tail()?;
        let (memory, blocks) = open(self.qmp, self.process, self.mapped)?;
        let still = StillMemory { memory, blocks, cancel: self.cancel, pause };
        (self.read)(&still).map_err(|error| match error.downcast::<SaveError>() {
            Ok(error) => *error,
            Err(error) => SaveError::AtEnd(error),
        })?;
        still.check()?;
        // The guest stands still, QEMU does not: a device whose other end is on the host (a virtio-serial port) may have taken bytes
        // from there, and written to memory what its saved state does not know.
        if !same_but_for_the_clock(tail.bytes(), self.device_tail()?.bytes()) {
            return Err(SaveError::NotOutside { reason: "a device has changed its state meanwhile".into() });
        }
        (self.confirm)().map_err(SaveError::AtEnd)?;
        self.is_still(mark)?;
        (self.at_end)().map_err(SaveError::AtEnd)?;
        self.is_still(mark)?;
        let state = DeviceState { header, blocks: still.blocks, ram_section: RAM_SECTION, tail };
        Ok(Finished { state, counts: Counts::default() })
    }

    /// Whoever has let it go on meanwhile: what was read is of no one instant.
    fn is_still(&self, mark: u64) -> Result<(), SaveError> {
        let state = run_state(self.qmp)?;
        if state != "paused" {
            return Err(SaveError::NotStill { reason: format!("it is in the state {state:?}") });
        }
        match self.qmp.events_after(mark).iter().any(|event| event.name == "RESUME") {
            true => Err(SaveError::NotStill { reason: "it was let go on meanwhile".into() }),
            false => Ok(()),
        }
    }

    /// The state of the devices.
    fn device_tail(&self) -> Result<DeviceTail, SaveError> {
        let file = self.scratch.to_string_lossy();
        // `live` is not what it sounds like: with it, QEMU would let go of the disks.
        let saved = self.qmp.execute("xen-save-devices-state", json!({ "filename": file, "live": false }));
        saved.map_err(|error| match error {
            QmpError::Refused { description, .. } => SaveError::NotOutside { reason: description },
            other => other.into(),
        })?;
        // QEMU may run as somebody else than we do: what it has put there is not to lead us anywhere.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let failed = system("read the state of the devices");
        let file =
            rustix::fs::open(self.scratch, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
        let mut bytes = Vec::new();
        let limit = MAX_TAIL_BYTES as u64;
        let failed = system("read the state of the devices");
        File::from(file).take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > limit {
            let words = format!("more than {limit} bytes are more than there can be");
            return Err(system("read the state of the devices")(io::Error::other(words)));
        }
        DeviceTail::from_file(&bytes).map_err(SaveError::stream)
    }
}

impl StillMemory<'_> {
    /// Its blocks. `read` counts them in this order.
    pub fn blocks(&self) -> &RamBlocks {
        &self.blocks
    }

    /// True of a block that was mapped from an image: what is not there is as it is in that.
    pub fn is_image(&self, block: usize) -> bool {
        self.memory.blocks().get(block).is_some_and(|block| block.backing == Backing::Image)
    }

    /// Reads pages `from .. from + count` of block `block`: `bytes` gets those that are there, one after the other, `there` whether
    /// they are. The others are zero, or as they are in the image that the block was mapped from.
    ///
    /// # Errors
    /// The caller has cancelled, the guest has stood still for too long, or its memory cannot be read.
    pub fn read(
        &self,
        block: usize,
        from: u64,
        count: usize,
        bytes: &mut Vec<u8>,
        there: &mut Vec<bool>,
    ) -> Result<(), SaveError> {
        self.check()?;
        let reading = system("read the guest's memory");
        let Some(block) = self.memory.blocks().get(block) else {
            return Err(reading(io::ErrorKind::InvalidInput.into()));
        };
        there.clear();
        let (memory, mut scratch) = (&self.memory, Vec::new());
        let mut read = || -> io::Result<()> {
            memory.present(block, from, count, &mut scratch, |_, present| {
                there.push(present || block.backing == Backing::File);
                Ok(())
            })?;
            let present = there.iter().filter(|there| **there).count();
            bytes.resize(present * PAGE_SIZE, 0);
            let (mut rest, mut page) = (&mut bytes[..], from);
            for run in there.chunk_by(|a, b| a == b) {
                if run.first() == Some(&true) {
                    let (part, behind) = rest.split_at_mut(run.len() * PAGE_SIZE);
                    memory.read(block, page, part)?;
                    rest = behind;
                }
                page += run.len() as u64;
            }
            Ok(())
        };
        read().map_err(reading)
    }

    fn check(&self) -> Result<(), SaveError> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(SaveError::Cancelled);
        }
        self.pause.check()
    }
}

impl Pause {
    fn check(self) -> Result<(), SaveError> {
        let took = self.began.elapsed();
        match self.max {
            Some(limit) if took >= limit => Err(SaveError::PauseBudget { limit }),
            None if took >= PAUSE_LIMIT => Err(SaveError::PausedTooLong),
            _ => Ok(()),
        }
    }

    fn micros(self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

fn open(qmp: &Qmp, process: ProcessId, mapped: bool) -> Result<(GuestMemory, RamBlocks), SaveError> {
    let not = |reason: String| SaveError::NotOutside { reason };
    let memory = GuestMemory::open(qmp, process, mapped.then_some(RAM_ID));
    let memory = memory.map_err(|error| not(error.to_string()))?;
    if let Some(Mapped { block, .. }) = memory.blocks().iter().find(|mapped| !belongs(&mapped.block)) {
        return Err(not(format!("it is not known whether the block {:?} belongs to its state", block.name)));
    }
    let blocks = memory.blocks().iter().map(|mapped| mapped.block.clone()).collect();
    let blocks = RamBlocks::new(blocks).map_err(|error| not(error.to_string()))?;
    Ok((memory, blocks))
}

/// The section of the PC's clock. It shows the time of the host, also while the guest stands still, and writes to no memory.
const CLOCK: &[u8] = b"\x0bmc146818rtc";

/// True if two tails differ in nothing but the clock.
fn same_but_for_the_clock(one: &[u8], other: &[u8]) -> bool {
    let (Some(clock), true) = (section_of_clock(one), one.len() == other.len()) else { return one == other };
    one.get(..clock.start) == other.get(..clock.start) && one.get(clock.end..) == other.get(clock.end..)
}

/// Where the clock's payload lies: from behind its name up to its footer, which repeats the id before the name.
fn section_of_clock(tail: &[u8]) -> Option<Range<usize>> {
    let name = tail.windows(CLOCK.len()).position(|window| window == CLOCK)?;
    let start = name + CLOCK.len();
    let id = tail.get(name.checked_sub(4)?..name)?;
    let footer = [&[FOOTER], id].concat();
    let payload = tail.get(start..)?.windows(footer.len()).position(|window| window == footer)?;
    Some(start..start + payload)
}

/// True of the blocks that QEMU sends for the machines that we make: RAM, flash, the ROMs of the board and of cards, the tables it makes
/// for the firmware, video memory.
fn belongs(block: &RamBlock) -> bool {
    let name = block.name.as_str();
    let of_a_card = name.split_once('/').is_some_and(|(address, rest)| {
        address.split(':').count() == 3 && (rest.ends_with(".rom") || rest == "vga.vram")
    });
    matches!(name, RAM_ID | "pc.bios" | "pc.rom" | "system.flash0" | "system.flash1")
        || name.starts_with("/rom@etc/")
        || of_a_card
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_clock_may_go_on() {
        let tail = |time: u8, port: u8| {
            let clock = [
                b"\x04\0\0\0\x07".as_slice(),
                CLOCK,
                &[0, 0, 0, 0, 0, 0, 0, 3, time, time],
                b"\x7e\0\0\0\x07",
            ]
            .concat();
            [&[4, 0, 0, 0, 9, 1, b'a', port][..], &clock, &[4, 0, 0, 0, 8, 1, b'b', port, 0]].concat()
        };
        assert!(same_but_for_the_clock(&tail(1, 5), &tail(1, 5)));
        assert!(same_but_for_the_clock(&tail(1, 5), &tail(2, 5)));
        assert!(!same_but_for_the_clock(&tail(1, 5), &tail(1, 6)));
        assert!(!same_but_for_the_clock(&tail(1, 5), &[&tail(1, 5)[..], &[0]].concat()));
        assert!(
            same_but_for_the_clock(b"no clock", b"no clock")
                && !same_but_for_the_clock(b"no clock", b"no clack")
        );
        for length in 0..tail(1, 5).len() {
            let _ = section_of_clock(&tail(1, 5)[..length]);
        }
    }

    #[test]
    fn only_blocks_that_are_known_belong() {
        let belongs = |name: &str| super::belongs(&RamBlock { name: name.into(), length: 4096 });
        for known in [
            RAM_ID,
            "pc.bios",
            "/rom@etc/acpi/tables",
            "0000:00:02.0/vga.vram",
            "0000:00:18.0/virtio-net-pci.rom",
        ] {
            assert!(belongs(known), "{known}");
        }
        for unknown in [
            "",
            "ivshmem",
            "mem1",
            "0000:00:05.0/qxl.vram",
            "0000:00:05.0/vfio",
            "a/vga.vram",
            "rom@etc/acpi/tables",
        ] {
            assert!(!belongs(unknown), "{unknown}");
        }
    }
}
