//! The memory of a guest that stands still into the page store, read from outside.
//!
//! ```text
//!   each thread:  claim a run of pages -> read those that are there -> hash, look up, write -> the names of the map's leaves, each in its place
//! ```
//! Nobody waits for a stream here, and nothing is queued: a run is read into the cache of a core and stored from there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use pages::{LEAF_PAGES, MapRoot, PAGE_SIZE, PageHash, PageStore, Session};
use qemu::command::RAM_ID;
use qemu::outside::StillMemory;

use crate::context::Context;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted, step};
use crate::ingest::{Ending, Intake};
use crate::leaves::BlockLeaves;

/// Pages that a thread reads at a time: 1 MiB, small enough for the cache of a core.
const RUN_PAGES: usize = RUN_LEAVES * LEAF_PAGES;
const RUN_LEAVES: usize = 4;
/// Most threads; the session has one lock for all of them.
const THREADS_MAX: usize = 4;

/// Pages of a block, whose leaves are wanted.
struct Run<'a> {
    block: usize,
    from: u64,
    pages: usize,
    leaves: &'a mut [PageHash],
    /// Of a block that was mapped from an image: that, and which leaves are not as they are there.
    image: Option<(MapRoot, &'a mut [bool])>,
    /// The planted fault loses the first of them.
    skip: bool,
}

/// Reads all of the memory into `session`. Of a block that was mapped from an image, whose map and store come as `image`, only what the
/// guest has written to since is read: so a machine that was never loaded as a whole is as complete as any other.
pub(crate) fn read_out(
    session: &dyn Session,
    cx: &Context,
    memory: &StillMemory<'_>,
    image: Option<(&dyn PageStore, MapRoot)>,
    intake: Intake<'_>,
) -> Result<Vec<BlockLeaves>> {
    intake.check(memory.blocks().total()).map_err(|words| Error::new(Code::Failed, words))?;
    let store = image.map(|(store, _)| store);
    let blocks = memory.blocks().iter().enumerate().map(|(number, block)| match image {
        Some((_, root)) if memory.is_image(number) => BlockLeaves::of_image(block, root),
        _ => Ok(BlockLeaves::of(block)),
    });
    let mut blocks: Vec<BlockLeaves> = blocks.collect::<Result<_>>()?;
    let mut skip = planted(Fault::SkipPage);
    let runs = blocks.iter_mut().enumerate().flat_map(|(block, own)| {
        let BlockLeaves { name, pages, leaves, image } = own;
        let (is_ram, pages) = (name == RAM_ID, *pages);
        let root = image.as_ref().map(|(root, _)| *root);
        let mut changed = image.as_mut().map(|(_, changed)| changed.chunks_mut(RUN_LEAVES));
        leaves.chunks_mut(RUN_LEAVES).zip((0..).step_by(RUN_PAGES)).map(move |(leaves, from)| {
            let pages = pages.saturating_sub(from).min(RUN_PAGES as u64) as usize;
            let image = changed.as_mut().and_then(|changed| Some((root?, changed.next()?)));
            (Run { block, from, pages, leaves, image, skip: false }, is_ram)
        })
    });
    let runs = runs.map(|(run, is_ram)| {
        // Far enough up that it is a page of the test's own filling.
        let skip = is_ram && run.from >= 160 << 8 && std::mem::take(&mut skip);
        Run { skip, ..run }
    });
    let (runs, failed, stepping) = (&Mutex::new(runs), &AtomicBool::new(false), &Mutex::new(()));
    let work = move || -> Result<()> {
        let (mut bytes, mut there) = (Vec::new(), Vec::new());
        let mut names = Vec::new();
        loop {
            // The lock is gone before the run is worked on.
            let next = runs.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(run) = next else { return Ok(()) };
            if failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            cx.check()?;
            let read = memory.read(run.block, run.from, run.pages, &mut bytes, &mut there);
            read.map_err(crate::let_go::save_error)?;
            if run.skip && there.first() == Some(&true) {
                there[0] = false;
                bytes.drain(..PAGE_SIZE);
            }
            names.clear();
            names.resize(run.pages, PageHash::ZERO);
            match (run.image, store) {
                (Some((root, changed)), Some(store)) => {
                    let base =
                        |first: u64, names: &mut [PageHash]| store.map_range(&root, run.from + first, names);
                    put_changed(session, &bytes, &there, &base, &mut names, run.leaves, changed)?;
                }
                _ => session.put_run(&bytes, &there, &mut names, run.leaves)?,
            }
            cx.advance((run.pages * PAGE_SIZE) as u64);
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

/// Stores what has changed of a run, and its leaves as far as they have; `base` says what the pages were.
fn put_changed(
    session: &dyn Session,
    bytes: &[u8],
    there: &[bool],
    base: &dyn Fn(u64, &mut [PageHash]) -> pages::Result<()>,
    names: &mut [PageHash],
    leaves: &mut [PageHash],
    changed: &mut [bool],
) -> Result<()> {
    let mut own = vec![PageHash::ZERO; bytes.len() / PAGE_SIZE];
    session.put(bytes, &mut own)?;
    let mut own = own.into_iter();
    let parts = names.chunks_mut(LEAF_PAGES).zip(there.chunks(LEAF_PAGES)).zip(leaves.iter_mut());
    for (((names, there), leaf), (changed, first)) in
        parts.zip(changed.iter_mut().zip((0..).step_by(LEAF_PAGES)))
    {
        if !there.contains(&true) {
            continue;
        }
        base(first, names)?;
        for (name, _) in names.iter_mut().zip(there).filter(|(_, there)| **there) {
            *name = own.next().unwrap_or(PageHash::ZERO);
        }
        session.put_leaves(names, std::slice::from_mut(leaf))?;
        *changed = true;
    }
    Ok(())
}
