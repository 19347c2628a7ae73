//! Guest memory from QEMU's migration stream into the page store.
//!
//! ```text
//!   stream thread -> batches of 256 pages -> storing threads (hash, look up, write) -> one list of names a block
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
use pages::{PAGE_SIZE, PageHash, Session};
use qemu::migration::{DeviceState, RamBlock, Sink, SinkError};

use crate::catalog::Memory;
use crate::context::Context;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted, step};
use crate::running::available_memory;

/// Pages handed to the store at a time: 1 MiB, large enough to hide a lock, small enough for the cache.
const BATCH_PAGES: usize = 256;
/// Places in a batch, pages of zeros included.
const BATCH_PLACES: usize = 4096;
/// Batches under way, where QEMU may wait.
const BATCHES: usize = 8;
/// Threads that hash and write while the guest stands still. More than two wait for each other and for the stream.
const THREADS: usize = 2;
/// The spill may take this part of the host's free memory.
const SPILL_PART: u64 = 4;

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

/// A RAM block with the names of its pages.
#[derive(Debug)]
pub(crate) struct BlockPages {
    pub(crate) name: String,
    pub(crate) pages: Vec<PageHash>,
}

/// Where a page belongs. The bytes of those that are not zero follow each other in the batch.
#[derive(Clone, Copy, Debug)]
struct Place {
    block: usize,
    page: usize,
    zero: bool,
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
#[derive(Debug)]
struct Shared {
    lead: Lead,
    /// Bytes of pages on the way to the store.
    ahead: AtomicU64,
    /// A storing thread has failed: nobody needs to go on.
    failed: AtomicBool,
    named: Mutex<Named>,
}

/// The names of what is stored.
#[derive(Debug, Default)]
struct Named {
    blocks: Vec<BlockPages>,
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
    lead: Lead,
    body: impl FnOnce(&mut (dyn Sink + Send)) -> Result<T>,
) -> Result<(T, Vec<BlockPages>)> {
    let (full, batches) = if lead == Lead::Short { bounded(BATCHES) } else { unbounded() };
    let (empty, spares) = bounded(BATCHES);
    let shared =
        Shared { lead, ahead: AtomicU64::new(0), failed: AtomicBool::new(false), named: Mutex::default() };
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
        let mut sink = BatchSink { batch: Batch::default(), number: 0, full, spares, shared, skip };
        let done = body(&mut sink);
        let flushed = sink.flush();
        drop(sink);
        for worker in workers {
            // If the store failed, that is why the stream failed too.
            let ended = worker.join();
            ended.unwrap_or_else(|_| {
                Err(Error::new(Code::Failed, "a thread that stores pages ended early"))
            })?;
        }
        let value = done?;
        flushed.map_err(|error| Error::new(Code::Failed, "pages were left over").because(error))?;
        Ok(value)
    });
    let named = std::mem::take(&mut *shared.named.lock().unwrap_or_else(PoisonError::into_inner));
    done.map(|value| (value, named.blocks))
}

impl Shared {
    fn store_batches(
        &self,
        session: &dyn Session,
        cx: &Context,
        batches: &Receiver<Batch>,
        empty: &Sender<Batch>,
    ) -> Result<()> {
        let slow = planted(Fault::SlowStore) || planted(Fault::LittleSpill) || planted(Fault::NoSpill);
        for batch in batches {
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
            step("take.memory");
            self.ahead.fetch_sub(batch.bytes.len() as u64, Ordering::Relaxed);
            for mut spare in self.write_down(batch, names) {
                spare.bytes.clear();
                spare.places.clear();
                let _ = empty.try_send(spare);
            }
        }
        Ok(())
    }

    /// Writes down where the pages of a batch belong, once those before it are; returns the batches that are done with.
    fn write_down(&self, batch: Batch, names: Vec<PageHash>) -> Vec<Batch> {
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        named.early.insert(batch.number, (batch, names));
        let mut done = Vec::new();
        loop {
            let turn = named.turn;
            let Some((mut batch, names)) = named.early.remove(&turn) else { return done };
            named.turn += 1;
            for block in batch.blocks.drain(..) {
                let count = usize::try_from(block.length).unwrap_or(usize::MAX) / PAGE_SIZE;
                named.blocks.push(BlockPages { name: block.name, pages: vec![PageHash::ZERO; count] });
            }
            let mut next = names.iter();
            for place in &batch.places {
                let name = if place.zero { PageHash::ZERO } else { *next.next().unwrap_or(&PageHash::ZERO) };
                // The reader has checked that the page lies in its block.
                named.blocks[place.block].pages[place.page] = name;
            }
            done.push(batch);
        }
    }
}

struct BatchSink<'a> {
    batch: Batch,
    number: u64,
    full: Sender<Batch>,
    spares: Receiver<Batch>,
    shared: &'a Shared,
    /// The planted fault that loses one page.
    skip: bool,
}

impl BatchSink<'_> {
    fn flush(&mut self) -> Result<(), SinkError> {
        if self.shared.failed.load(Ordering::Relaxed) {
            return Err("the page store does not take pages any more".into());
        }
        let bytes = self.batch.bytes.len() as u64;
        let ahead = self.shared.ahead.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if let Lead::Spill(limit) = self.shared.lead
            && ahead > limit
        {
            return Err(Box::new(StoreTooSlow { limit }));
        }
        let next = self.spares.try_recv().unwrap_or_else(|_| Batch {
            number: 0,
            blocks: Vec::new(),
            bytes: Vec::with_capacity(BATCH_PAGES * PAGE_SIZE),
            places: Vec::with_capacity(BATCH_PLACES),
        });
        let batch = std::mem::replace(&mut self.batch, Batch { number: self.number + 1, ..next });
        self.number += 1;
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
    blocks: &[BlockPages],
    state: &DeviceState,
) -> Result<Memory> {
    let mut bytes = state.encode();
    let state_bytes = bytes.len() as u64;
    bytes.resize(bytes.len().next_multiple_of(PAGE_SIZE), 0);
    let mut names = vec![PageHash::ZERO; bytes.len() / PAGE_SIZE];
    session.put(&bytes, &mut names)?;
    let state = session.put_map(&names)?;
    let blocks = blocks
        .iter()
        .map(|block| Ok((block.name.clone(), session.put_map(&block.pages)?)))
        .collect::<Result<_>>()?;
    Ok(Memory { blocks, state, state_bytes })
}
