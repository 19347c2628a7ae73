//! Guest memory between QEMU's migration stream and the page store.
//!
//! ```text
//!   take:  stream thread -> batches of 256 pages -> store thread (hash, look up, write) -> one page map a block
//!   goto:  store thread (look up, read, check)  -> runs of pages -> stream
//! ```
//! Batches are applied in the order in which they came, so that a later copy of a page replaces an earlier one.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};
use pages::{MapRoot, PAGE_SIZE, PageHash, PageStore, Session};
use qemu::command::RAM_ID;
use qemu::migration::{DeviceState, RamBlock, RestoreStream, Sink, SinkError};
use qemu::save::CallbackError;

use crate::catalog::Memory;
use crate::context::Context;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted, step};

/// Pages handed to the store at a time: 1 MiB, large enough to hide a lock, small enough for the cache.
const BATCH_PAGES: usize = 256;
/// Places in a batch, pages of zeros included.
const BATCH_PLACES: usize = 4096;
/// Batches under way: what the stream may be ahead of the store.
const BATCHES: usize = 16;

/// Where a page belongs. The bytes of those that are not zero follow each other in the batch.
#[derive(Clone, Copy, Debug)]
struct Place {
    block: usize,
    page: usize,
    zero: bool,
}

#[derive(Debug, Default)]
struct Batch {
    /// Set in the first batch.
    blocks: Vec<RamBlock>,
    bytes: Vec<u8>,
    places: Vec<Place>,
}

/// A RAM block with the names of its pages.
#[derive(Debug)]
pub(crate) struct BlockPages {
    pub(crate) name: String,
    pub(crate) pages: Vec<PageHash>,
}

/// Runs `body` with a sink whose pages go into `session`; returns what `body` returned, and the blocks.
pub(crate) fn ingest<T>(
    session: &dyn Session,
    cx: &Context,
    body: impl FnOnce(&mut (dyn Sink + Send)) -> Result<T>,
) -> Result<(T, Vec<BlockPages>)> {
    let (full, batches) = bounded::<Batch>(BATCHES);
    let (empty, spares) = bounded::<Batch>(BATCHES);
    thread::scope(|scope| {
        let worker = scope.spawn(move || store_batches(session, cx, &batches, &empty));
        let mut sink = BatchSink { batch: Batch::default(), full, spares, skip: planted(Fault::SkipPage) };
        let done = body(&mut sink);
        let flushed = sink.flush();
        drop(sink);
        let stored = worker
            .join()
            .unwrap_or_else(|_| Err(Error::new(Code::Failed, "the thread that stores pages ended early")));
        // If the store failed, that is why the stream failed too.
        let blocks = stored?;
        let value = done?;
        flushed.map_err(|error| Error::new(Code::Failed, "pages were left over").because(error))?;
        Ok((value, blocks))
    })
}

fn store_batches(
    session: &dyn Session,
    cx: &Context,
    batches: &Receiver<Batch>,
    empty: &Sender<Batch>,
) -> Result<Vec<BlockPages>> {
    let mut blocks: Vec<BlockPages> = Vec::new();
    let mut names = vec![PageHash::ZERO; BATCH_PAGES];
    for mut batch in batches {
        for block in batch.blocks.drain(..) {
            let count = usize::try_from(block.length).unwrap_or(usize::MAX) / PAGE_SIZE;
            blocks.push(BlockPages { name: block.name, pages: vec![PageHash::ZERO; count] });
        }
        let count = batch.bytes.len() / PAGE_SIZE;
        session.put(&batch.bytes, &mut names[..count])?;
        let mut next = names.iter();
        for place in &batch.places {
            let name = if place.zero { PageHash::ZERO } else { *next.next().unwrap_or(&PageHash::ZERO) };
            // The reader has checked that the page lies in its block.
            blocks[place.block].pages[place.page] = name;
        }
        cx.advance((batch.places.len() * PAGE_SIZE) as u64);
        step("take.memory");
        batch.bytes.clear();
        batch.places.clear();
        let _ = empty.try_send(batch);
    }
    Ok(blocks)
}

struct BatchSink {
    batch: Batch,
    full: Sender<Batch>,
    spares: Receiver<Batch>,
    /// The planted fault that loses one page.
    skip: bool,
}

impl BatchSink {
    fn flush(&mut self) -> Result<(), SinkError> {
        let next = self.spares.try_recv().unwrap_or_else(|_| Batch {
            blocks: Vec::new(),
            bytes: Vec::with_capacity(BATCH_PAGES * PAGE_SIZE),
            places: Vec::with_capacity(BATCH_PLACES),
        });
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

impl Sink for BatchSink {
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

/// Reads a snapshot's device state.
pub(crate) fn read_state(store: &dyn PageStore, memory: &Memory) -> Result<DeviceState> {
    let count = usize::try_from(memory.state.pages).unwrap_or(usize::MAX);
    if count > (256 << 20) / PAGE_SIZE || memory.state_bytes > memory.state.pages * PAGE_SIZE as u64 {
        return Err(Error::new(Code::Damaged, "the catalog gives a device state an impossible length"));
    }
    let mut names = vec![PageHash::ZERO; count];
    store.map_range(&memory.state, 0, &mut names)?;
    let mut bytes = vec![0; count * PAGE_SIZE];
    store.read(&names, &mut bytes)?;
    bytes.truncate(usize::try_from(memory.state_bytes).unwrap_or(usize::MAX));
    DeviceState::decode(&bytes)
        .map_err(|error| Error::new(Code::Damaged, "a snapshot's device state cannot be read").because(error))
}

/// Reads all of a snapshot's memory, and checks it on the way: for whoever is about to depend on it.
pub(crate) fn check_readable(store: &dyn PageStore, memory: &Memory, cx: &Context) -> Result<()> {
    read_state(store, memory)?;
    let mut names = vec![PageHash::ZERO; BATCH_PAGES];
    let mut bytes = vec![0; BATCH_PAGES * PAGE_SIZE];
    for (_, root) in &memory.blocks {
        let mut page = 0;
        while page < root.pages {
            let count = BATCH_PAGES.min(usize::try_from(root.pages - page).unwrap_or(BATCH_PAGES));
            let names = &mut names[..count];
            store.map_range(root, page, names)?;
            for run in names.chunk_by(|a, b| (*a == PageHash::ZERO) == (*b == PageHash::ZERO)) {
                if run.first() != Some(&PageHash::ZERO) {
                    store.read(run, &mut bytes[..run.len() * PAGE_SIZE])?;
                }
            }
            cx.check()?;
            page += count as u64;
        }
    }
    Ok(())
}

/// Writes a snapshot's whole state as a stream that QEMU loads.
pub(crate) fn feed(
    store: &dyn PageStore,
    memory: &Memory,
    state: &DeviceState,
    cx: &Context,
    socket: &UnixStream,
) -> Result<(), CallbackError> {
    let mut stream = RestoreStream::new(socket, &state.header, &state.blocks, state.ram_section)?;
    let (full, runs) = bounded::<Run>(BATCHES);
    let (empty, spares) = bounded::<Vec<u8>>(BATCHES);
    thread::scope(|scope| {
        let reader = scope.spawn(move || read_runs(store, memory, state, cx, &full, &spares));
        let written = write_runs(&mut stream, &runs, &empty);
        drop(runs);
        let read = reader.join().unwrap_or_else(|_| Err("the thread that reads pages ended early".into()));
        // A store that fails is the cause of a stream that ends early; a stream that breaks is QEMU's doing.
        match (written, read) {
            (Err(error), Ok(())) | (_, Err(error)) => Err(error),
            // Only now: with its end, QEMU would take a stream for whole that lacks pages.
            (Ok(()), Ok(())) => {
                stream.finish(&state.tail)?;
                Ok(())
            }
        }
    })
}

/// Pages `page ..` of a block; empty bytes stand for one page of zeros.
struct Run {
    block: usize,
    page: u64,
    bytes: Vec<u8>,
}

fn write_runs(
    stream: &mut RestoreStream<impl Write>,
    runs: &Receiver<Run>,
    empty: &Sender<Vec<u8>>,
) -> Result<(), CallbackError> {
    for run in runs {
        let offset = run.page * PAGE_SIZE as u64;
        if run.bytes.is_empty() {
            stream.zero_page(run.block, offset)?;
        } else {
            stream.pages(run.block, offset, &run.bytes)?;
            let _ = empty.try_send(run.bytes);
        }
    }
    Ok(())
}

fn read_runs(
    store: &dyn PageStore,
    memory: &Memory,
    state: &DeviceState,
    cx: &Context,
    full: &Sender<Run>,
    spares: &Receiver<Vec<u8>>,
) -> Result<(), CallbackError> {
    for (block, ram) in state.blocks.iter().enumerate() {
        let root = memory.blocks.iter().find(|(name, _)| *name == ram.name).map(|(_, root)| root);
        let root = root.ok_or_else(|| format!("the snapshot has no memory for the block {:?}", ram.name))?;
        if root.pages * PAGE_SIZE as u64 != ram.length {
            return Err(format!("the block {:?} has another length in the catalog", ram.name).into());
        }
        // QEMU's fresh RAM is zero; ROMs and tables it fills itself.
        let skip_zero = ram.name == RAM_ID;
        let mut names = vec![PageHash::ZERO; BATCH_PAGES];
        let mut page = 0;
        while page < root.pages {
            let count = BATCH_PAGES.min(usize::try_from(root.pages - page)?);
            let names = &mut names[..count];
            store.map_range(root, page, names)?;
            if !send_batch(store, block, page, names, skip_zero, full, spares)? {
                return Ok(());
            }
            step("goto.memory");
            cx.check()?;
            cx.advance((count * PAGE_SIZE) as u64);
            page += count as u64;
        }
    }
    Ok(())
}

/// Sends the pages of one batch, run by run; false if nobody takes them any more.
fn send_batch(
    store: &dyn PageStore,
    block: usize,
    first: u64,
    names: &[PageHash],
    skip_zero: bool,
    full: &Sender<Run>,
    spares: &Receiver<Vec<u8>>,
) -> Result<bool, CallbackError> {
    let mut at = first;
    for run in names.chunk_by(|a, b| (*a == PageHash::ZERO) == (*b == PageHash::ZERO)) {
        let page = at;
        at += run.len() as u64;
        if run.first() == Some(&PageHash::ZERO) {
            let zeros = if skip_zero { 0 } else { run.len() as u64 };
            for page in page..page + zeros {
                if full.send(Run { block, page, bytes: Vec::new() }).is_err() {
                    return Ok(false);
                }
            }
            continue;
        }
        let mut bytes = spares.try_recv().unwrap_or_default();
        bytes.resize(run.len() * PAGE_SIZE, 0);
        store.read(run, &mut bytes)?;
        if full.send(Run { block, page, bytes }).is_err() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Bytes of memory that a snapshot's maps describe.
pub(crate) fn memory_bytes(roots: impl Iterator<Item = MapRoot>) -> u64 {
    roots.map(|root| root.pages * PAGE_SIZE as u64).sum()
}
