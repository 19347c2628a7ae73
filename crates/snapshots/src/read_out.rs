//! The memory of a guest that stands still into the page store, read from outside.
//!
//! ```text
//!   each thread:  claim a run of pages -> read those that are there -> hash, look up, write -> their names, each in its place
//! ```
//! Nobody waits for a stream here, and nothing is queued: a run is read into the cache of a core and stored from there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use pages::{PAGE_SIZE, PageHash, Session};
use qemu::command::RAM_ID;
use qemu::outside::StillMemory;

use crate::context::Context;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted, step};
use crate::ingest::{BlockPages, Ending, Intake};

/// Pages that a thread reads at a time: 1 MiB, small enough for the cache of a core.
const RUN_PAGES: usize = 256;
/// Most threads; the session has one lock for all of them.
const THREADS_MAX: usize = 4;

/// Pages of a block whose names are wanted.
struct Run<'a> {
    block: usize,
    from: u64,
    names: &'a mut [PageHash],
    /// The planted fault loses the first of them.
    skip: bool,
}

/// Reads all of the memory into `session`.
pub(crate) fn read_out(
    session: &dyn Session,
    cx: &Context,
    memory: &StillMemory<'_>,
    intake: Intake<'_>,
) -> Result<Vec<BlockPages>> {
    intake.check(memory.blocks().total()).map_err(|words| Error::new(Code::Failed, words))?;
    let mut blocks: Vec<BlockPages> = memory
        .blocks()
        .iter()
        .map(|block| {
            let count = usize::try_from(block.length).unwrap_or(usize::MAX) / PAGE_SIZE;
            BlockPages { name: block.name.clone(), pages: vec![PageHash::ZERO; count] }
        })
        .collect();
    let mut skip = planted(Fault::SkipPage);
    let runs = blocks.iter_mut().enumerate().flat_map(|(block, BlockPages { name, pages })| {
        let runs = pages.chunks_mut(RUN_PAGES).enumerate();
        let is_ram = name == RAM_ID;
        runs.map(move |(number, names)| (block, (number * RUN_PAGES) as u64, names, is_ram))
    });
    let runs = runs.map(|(block, from, names, is_ram)| {
        // Far enough up that it is a page of the test's own filling.
        let skip = is_ram && from >= 160 << 8 && std::mem::take(&mut skip);
        Run { block, from, names, skip }
    });
    let (runs, failed, stepping) = (&Mutex::new(runs), &AtomicBool::new(false), &Mutex::new(()));
    let work = move || -> Result<()> {
        let (mut bytes, mut there, mut names) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            // The lock is gone before the run is worked on.
            let next = runs.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(run) = next else { return Ok(()) };
            if failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            cx.check()?;
            let read = memory.read(run.block, run.from, run.names.len(), &mut bytes, &mut there);
            read.map_err(crate::let_go::save_error)?;
            names.clear();
            names.resize(bytes.len() / PAGE_SIZE, PageHash::ZERO);
            session.put(&bytes, &mut names)?;
            let mut stored_names = names.iter();
            for (name, there) in run.names.iter_mut().zip(&there) {
                if *there {
                    *name = *stored_names.next().unwrap_or(&PageHash::ZERO);
                }
            }
            if let (true, Some(name)) = (run.skip, run.names.first_mut()) {
                *name = PageHash::ZERO;
            }
            cx.advance((run.names.len() * PAGE_SIZE) as u64);
            (intake.stored)();
            // Who waits here has the other threads wait as well.
            let _turn = stepping.lock().unwrap_or_else(PoisonError::into_inner);
            step("take.memory");
        }
    };
    let threads = thread::available_parallelism().map_or(1, |cores| cores.get().min(THREADS_MAX));
    let first: &Mutex<Option<Error>> = &Mutex::new(None);
    let work = move || {
        let _ending = Ending(failed);
        if let Err(error) = work() {
            // The first one knows why; the others only that the session has failed.
            first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            failed.store(true, Ordering::Relaxed);
        }
    };
    thread::scope(|scope| {
        // This one works too. With fewer threads than there might be it takes longer.
        let more = (1..threads).filter_map(|_| {
            let named = thread::Builder::new().name("read-out".into());
            named
                .spawn_scoped(scope, work)
                .inspect_err(|error| tracing::warn!(%error, "one thread less"))
                .ok()
        });
        let more: Vec<_> = more.collect();
        work();
        more.into_iter().for_each(|worker| drop(worker.join()));
    });
    if let Some(error) = first.lock().unwrap_or_else(PoisonError::into_inner).take() {
        return Err(error);
    }
    if failed.load(Ordering::Relaxed) {
        return Err(Error::new(Code::Failed, "a thread that reads memory ended early"));
    }
    Ok(blocks)
}
