//! A snapshot's memory out of the page store: into a new machine, or only to see whether it can be read.
//!
//! ```text
//!   goto:  store thread (look up, read, check)  -> runs of pages -> stream
//! ```
//! The way into the store is `ingest.rs`.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};
use pages::{MapRoot, PAGE_SIZE, PageHash, PageStore};
use qemu::command::RAM_ID;
use qemu::migration::{DeviceState, RestoreStream};
use qemu::save::CallbackError;

use crate::catalog::Memory;
use crate::context::Context;
use crate::error::{Code, Error, Result};
use crate::fault::step;

/// Pages looked up and read at a time: 1 MiB, large enough to hide a lock, small enough for the cache.
const BATCH_PAGES: usize = 256;
/// Runs under way: what the store may be ahead of the stream.
const RUNS: usize = 8;

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

/// Writes a snapshot's whole state as a stream that QEMU loads. If RAM is `mapped`, its pages are left out.
pub(crate) fn feed(
    store: &dyn PageStore,
    memory: &Memory,
    state: &DeviceState,
    mapped: bool,
    cx: &Context,
    socket: &UnixStream,
) -> Result<(), CallbackError> {
    let mut stream = RestoreStream::new(socket, &state.header, &state.blocks, state.ram_section)?;
    let (full, runs) = bounded::<Run>(RUNS);
    let (empty, spares) = bounded::<Vec<u8>>(RUNS);
    thread::scope(|scope| {
        let reader = scope.spawn(move || read_runs(store, memory, state, mapped, cx, &full, &spares));
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
    mapped: bool,
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
        if skip_zero && mapped {
            continue;
        }
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
