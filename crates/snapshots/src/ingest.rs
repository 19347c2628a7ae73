//! Guest memory from QEMU's migration stream into the page store.
//!
//! ```text
//!   stream thread -> batches of 256 pages -> storing threads (hash, look up, write) -> the leaves of a map a block
//! ```
//! Batches are stored side by side and their names written down in the order in which the batches came, so that a later copy of a
//! page replaces an earlier one.
//!
//! How far the stream may be ahead of the store depends on who would wait. In a copy that the guest stands still for anyway QEMU
//! waits, and memory for eight batches does. A live save is another matter: there every write of the guest to a page that was not
//! sent waits for the stream, so what the store does not take at once is *spilled* to memory, up to a bound; beyond it the save is
//! given up rather than the guest slowed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use pages::{MapRoot, PAGE_SIZE, PageHash, Session};
use qemu::migration::{DeviceState, RamBlock, Sink, SinkError};

use crate::catalog::Memory;
use crate::context::Context;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted, step};
use crate::leaves::{BlockLeaves, OpenBlock};
use crate::running::available_memory;

/// Pages handed to the store at a time: 1 MiB, large enough to hide a lock, small enough for the cache.
const BATCH_PAGES: usize = 256;
/// Places in a batch, pages of zeros included.
const BATCH_PLACES: usize = 4096;
/// Batches under way, where QEMU may wait.
const BATCHES: usize = 8;
/// Threads that hash and write while the guest stands still. More than two wait for each other and for the stream.
const THREADS: usize = 2;
/// All spills together may take this part of the host's free memory.
const SPILL_PART: u64 = 4;
/// More than all blocks of a machine's but its memory: a stream that announces more is not believed.
const OTHER_BLOCKS: u64 = 4 << 30;

/// What all live takes of this process have spilled, in bytes.
static SPILLED: AtomicU64 = AtomicU64::new(0);

/// How far the stream may be ahead of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lead {
    /// A few batches; then QEMU waits.
    Short,
    /// So many bytes of pages; then the save fails. QEMU never waits.
    Spill(u64),
}

impl Lead {
    /// For a guest that must not be slowed: what the host can spare.
    pub(crate) fn spill() -> Self {
        if planted(Fault::NoSpill) {
            return Self::Short;
        }
        if planted(Fault::LittleSpill) {
            return Self::Spill(4 << 20);
        }
        Self::Spill(available_memory().map_or(256 << 20, |bytes| bytes / SPILL_PART))
    }
}

/// How the pages are taken in.
#[derive(Clone, Copy)]
pub(crate) struct Intake<'a> {
    pub(crate) lead: Lead,
    /// Bytes of memory that the machine has; its other blocks (video memory, ROMs) are less than [`OTHER_BLOCKS`].
    pub(crate) memory: u64,
    /// Each page comes once, so its name need not be kept for long.
    pub(crate) once: bool,
    /// Called after each batch that was stored.
    pub(crate) stored: &'a (dyn Fn() + Sync),
}

impl<'a> Intake<'a> {
    /// For a guest that stands still meanwhile: whoever reads may wait for the store.
    pub(crate) fn of_still_guest(memory: u64, stored: &'a (dyn Fn() + Sync)) -> Self {
        Self { lead: Lead::Short, memory, once: false, stored }
    }

    /// Refuses more memory than the machine can have, before any is taken for it.
    pub(crate) fn check(&self, bytes: u64) -> Result<(), String> {
        let limit = self.memory.saturating_add(OTHER_BLOCKS);
        if bytes <= limit {
            return Ok(());
        }
        Err(format!("QEMU announces {bytes} bytes of memory, the machine has at most {limit}"))
    }
}

/// Where a page belongs. The bytes of those that are not zero follow each other in the batch.
#[derive(Clone, Copy, Debug)]
struct Place {
    block: usize,
    page: usize,
    zero: bool,
}

impl Batch {
    /// Bytes of memory that it takes.
    fn weight(&self) -> u64 {
        (self.bytes.len() + self.places.len() * size_of::<Place>()) as u64
    }
}

#[derive(Debug, Default)]
struct Batch {
    /// Batches are numbered as they come.
    number: u64,
    /// Set in the first batch.
    blocks: Vec<RamBlock>,
    bytes: Vec<u8>,
    places: Vec<Place>,
}

/// What the threads of one ingest share.
struct Shared<'a> {
    intake: Intake<'a>,
    /// Bytes of this one's batches that are on the way to the store, all in [`SPILLED`] too.
    ahead: AtomicU64,
    /// A storing thread has failed: nobody needs to go on.
    failed: AtomicBool,
    named: Mutex<Named>,
}

/// The names of what is stored.
#[derive(Debug, Default)]
struct Named {
    blocks: Vec<OpenBlock>,
    /// The batch whose turn it is.
    turn: u64,
    /// Batches that were stored before their turn.
    early: BTreeMap<u64, (Batch, Vec<PageHash>)>,
}

/// Runs `body` with a sink whose pages go into `session`; returns what `body` returned, and the blocks. A `body` that has got all it
/// wants before everything is stored has returned by then.
pub(crate) fn ingest<T>(
    session: &dyn Session,
    cx: &Context,
    intake: Intake<'_>,
    body: impl FnOnce(&mut (dyn Sink + Send)) -> Result<T>,
) -> Result<(T, Vec<BlockLeaves>)> {
    let lead = intake.lead;
    let (full, batches) = if lead == Lead::Short { bounded(BATCHES) } else { unbounded() };
    let (empty, spares) = bounded(BATCHES);
    let shared =
        Shared { intake, ahead: AtomicU64::new(0), failed: AtomicBool::new(false), named: Mutex::default() };
    let shared = &shared;
    // A guest that runs on has better use for the second core.
    let threads = if lead == Lead::Short { THREADS } else { 1 };
    let done = thread::scope(|scope| {
        let spawn = |_| {
            let (batches, empty) = (batches.clone(), empty.clone());
            scope.spawn(move || shared.store_batches(session, cx, &batches, &empty))
        };
        let workers: Vec<_> = (0..threads).map(spawn).collect();
        // Theirs are the only ends: when all have failed, a sink that waits for room must hear of it.
        drop((batches, empty));
        let skip = planted(Fault::SkipPage);
        let mut sink = BatchSink { batch: Batch::default(), full, spares, shared, skip };
        let done = body(&mut sink);
        let flushed = sink.flush();
        if done.is_err() {
            // What waits to be stored is worth nothing any more.
            shared.failed.store(true, Ordering::Relaxed);
        }
        drop(sink);
        let mut failed: Option<Error> = None;
        for worker in workers {
            let early = |_| Err(Error::new(Code::Failed, "a thread that stores pages ended early"));
            if let Err(error) = worker.join().unwrap_or_else(early) {
                // One thread knows why; the others only that the session has failed.
                if failed.as_ref().is_none_or(|first| first.code() == Code::Failed) {
                    failed = Some(error);
                }
            }
        }
        // If the store failed, that is why the stream failed too.
        if let Some(error) = failed {
            return Err(error);
        }
        let value = done?;
        flushed.map_err(|error| Error::new(Code::Failed, "pages were left over").because(error))?;
        Ok(value)
    });
    let named = std::mem::take(&mut *shared.named.lock().unwrap_or_else(PoisonError::into_inner));
    let value = done?;
    let goes_on = || {
        (intake.stored)();
        cx.check()
    };
    let blocks =
        named.blocks.into_iter().map(|block| block.close(session, &goes_on)).collect::<Result<_>>()?;
    Ok((value, blocks))
}

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        SPILLED.fetch_sub(self.ahead.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

/// Tells the others if a thread that stores ends in a panic.
pub(crate) struct Ending<'a>(pub(crate) &'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

impl Shared<'_> {
    fn store_batches(
        &self,
        session: &dyn Session,
        cx: &Context,
        batches: &Receiver<Batch>,
        empty: &Sender<Vec<u8>>,
    ) -> Result<()> {
        let slow = planted(Fault::SlowStore) || planted(Fault::LittleSpill) || planted(Fault::NoSpill);
        let _ending = Ending(&self.failed);
        for mut batch in batches {
            if self.failed.load(Ordering::Relaxed) {
                break;
            }
            let mut names = vec![PageHash::ZERO; batch.bytes.len() / PAGE_SIZE];
            let mut put = || cx.check().and_then(|()| Ok(session.put(&batch.bytes, &mut names)?));
            put().inspect_err(|_| self.failed.store(true, Ordering::Relaxed))?;
            if slow {
                thread::sleep(Duration::from_millis(500));
            }
            cx.advance((batch.places.len() * PAGE_SIZE) as u64);
            (self.intake.stored)();
            let weight = batch.weight();
            self.ahead.fetch_sub(weight, Ordering::Relaxed);
            SPILLED.fetch_sub(weight, Ordering::Relaxed);
            // Its turn may come much later.
            let mut bytes = std::mem::take(&mut batch.bytes);
            bytes.clear();
            let _ = empty.try_send(bytes);
            let written = self.write_down(session, batch, names);
            written.inspect_err(|_| self.failed.store(true, Ordering::Relaxed))?;
        }
        Ok(())
    }

    /// Writes down where the pages of a batch belong, once those before it are.
    fn write_down(&self, session: &dyn Session, batch: Batch, names: Vec<PageHash>) -> Result<()> {
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        // Who waits here has the other threads wait as well.
        step("take.memory");
        named.early.insert(batch.number, (batch, names));
        loop {
            let turn = named.turn;
            let Some((batch, names)) = named.early.remove(&turn) else { return Ok(()) };
            named.turn += 1;
            named.blocks.extend(batch.blocks.iter().map(OpenBlock::new));
            let mut next = names.iter();
            for place in &batch.places {
                let name = if place.zero { PageHash::ZERO } else { *next.next().unwrap_or(&PageHash::ZERO) };
                // The reader has checked that the page lies in its block.
                named.blocks[place.block].set(place.page, name, self.intake.once, session)?;
            }
        }
    }
}

struct BatchSink<'a> {
    batch: Batch,
    full: Sender<Batch>,
    spares: Receiver<Vec<u8>>,
    shared: &'a Shared<'a>,
    /// The planted fault that loses one page.
    skip: bool,
}

impl BatchSink<'_> {
    fn flush(&mut self) -> Result<(), SinkError> {
        if self.shared.failed.load(Ordering::Relaxed) {
            return Err("the page store does not take pages any more".into());
        }
        let weight = self.batch.weight();
        self.shared.ahead.fetch_add(weight, Ordering::Relaxed);
        let spilled = SPILLED.fetch_add(weight, Ordering::Relaxed) + weight;
        if let Lead::Spill(limit) = self.shared.intake.lead
            && spilled > limit
        {
            return Err(Box::new(StoreTooSlow { limit }));
        }
        let spare = self.spares.try_recv();
        let next = Batch {
            number: self.batch.number + 1,
            blocks: Vec::new(),
            bytes: spare.unwrap_or_else(|_| Vec::with_capacity(BATCH_PAGES * PAGE_SIZE)),
            places: Vec::new(),
        };
        let batch = std::mem::replace(&mut self.batch, next);
        self.full.send(batch).map_err(|_| "the page store does not take pages any more".into())
    }

    fn place(&mut self, block: usize, offset: u64, zero: bool) -> Result<(), SinkError> {
        let page = usize::try_from(offset)? / PAGE_SIZE;
        self.batch.places.push(Place { block, page, zero });
        if self.batch.places.len() >= BATCH_PLACES || self.batch.bytes.len() >= BATCH_PAGES * PAGE_SIZE {
            return self.flush();
        }
        Ok(())
    }
}

impl Sink for BatchSink<'_> {
    fn blocks(&mut self, blocks: &[RamBlock]) -> Result<(), SinkError> {
        let sum = blocks.iter().fold(0_u64, |sum, block| sum.saturating_add(block.length));
        self.shared.intake.check(sum)?;
        self.batch.blocks = blocks.to_vec();
        Ok(())
    }

    fn page(&mut self, block: usize, offset: u64, bytes: &[u8; PAGE_SIZE]) -> Result<(), SinkError> {
        // Far enough up that it is a page of the test's own filling.
        if self.skip && offset >= 160 << 20 {
            self.skip = false;
            return Ok(());
        }
        self.batch.bytes.extend_from_slice(bytes);
        self.place(block, offset, false)
    }

    fn zero(&mut self, block: usize, offset: u64) -> Result<(), SinkError> {
        self.place(block, offset, true)
    }
}

/// The store was further behind the stream than there is memory for.
#[derive(Debug, thiserror::Error)]
#[error("the page store was {} MiB behind the guest", .limit >> 20)]
pub(crate) struct StoreTooSlow {
    limit: u64,
}

/// Stores the maps of the blocks and the device state; what comes back is all that a snapshot has to keep.
pub(crate) fn store_maps(
    session: &dyn Session,
    blocks: &[BlockLeaves],
    state: &DeviceState,
    screen: Option<Vec<u8>>,
) -> Result<Memory> {
    let (state, state_bytes) = store_bytes(session, state.encode())?;
    let blocks = blocks
        .iter()
        .map(|block| Ok((block.name.clone(), block.put_map(session)?)))
        .collect::<Result<_>>()?;
    let screen = screen.map(|picture| store_bytes(session, picture)).transpose()?;
    Ok(Memory { blocks, state, state_bytes, screen })
}

/// Stores bytes as an image of their own; its map and their length.
fn store_bytes(session: &dyn Session, mut bytes: Vec<u8>) -> Result<(MapRoot, u64)> {
    let length = bytes.len() as u64;
    bytes.resize(bytes.len().next_multiple_of(PAGE_SIZE), 0);
    let mut names = vec![PageHash::ZERO; bytes.len() / PAGE_SIZE];
    session.put(&bytes, &mut names)?;
    Ok((session.put_map(&names)?, length))
}
