//! What an index of fifty million pages (200 GB of them) costs: memory, to open, to ask. And what checking and adding up cost.

use std::path::Path;
use std::time::Instant;

use pages::{GroupKey, MapRoot, PAGE_SIZE, PageHash, PageStore, Store};

use super::ms;
use super::store::new_store;
use crate::error::{Error, Result, system};
use crate::memory_images;
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::stats::Summary::Median;
use crate::warm;

/// Pages of the generated store: 191 packs of a gigabyte.
const PAGES: u64 = 50_000_000;
const NAMES: u64 = 10_000;
const ROUNDS: u64 = 11;

/// `index.bytes_per_page`: memory of the index over the pages of the eight images, once folded into a file, and before.
pub(super) fn memory(bench: &Bench) -> Result<Vec<Figure>> {
    let images = warm::load(memory_images::eight(bench)?)?;
    let folder = folder(bench)?;
    let store = new_store(&folder.path().join("store"))?;
    images.iter().try_for_each(|image| warm::put(&store, image).map(drop))?;
    let per_page = |store: &Store| {
        let (bytes, pages) = (store.index_memory() as f64, store.page_count() as f64);
        vec![Run::new(bytes / pages).beside("bytes", bytes).beside("pages", pages)]
    };
    let before = per_page(&store);
    store.fold()?;
    let after = per_page(&store);
    Ok(vec![
        Figure::new("index.bytes_per_page", "B", Better::Lower, Median, after)?.target(24.0),
        Figure::new("index.bytes_per_page.unfolded", "B", Better::Lower, Median, before)?,
    ])
}

/// `index.open_50m_ms`: [`Store::open`] after an orderly close, the files in the page cache; `.cold`, when they are not.
/// `index.batch_10k_ms.warm`: a batch of 10,000 names, half of them known, other ones each time, once each part of the index was touched;
/// `.first`, the first after the open; `.cold`, the first with nothing in the page cache.
///
/// The store is generated: real packs with holes where the pages would be, and a run of the index over all of them.
pub(super) fn fifty_millions(bench: &Bench) -> Result<Vec<Figure>> {
    let (folder, key) = (folder(bench)?, GroupKey::generate()?);
    let store = folder.path().join("store");
    pages::bench::make_synthetic(&store, &key, PAGES)?;
    let mut batch = Batches::default();
    let (mut opens, mut firsts, mut warms) = (Vec::new(), Vec::new(), Vec::new());
    let (mut cold_opens, mut colds) = (Vec::new(), Vec::new());
    let rounds = bench.count(ROUNDS, 3);
    warm::read_files(&store)?;
    for _ in 0..rounds {
        bench.check()?;
        let (took, open) = timed_open(&store, &key)?;
        opens.push(Run::new(took));
        firsts.push(Run::new(batch.ask(&open)?));
    }
    let (_, open) = timed_open(&store, &key)?;
    // Some 100 times as many names as there are parts of 64 KiB, which is what the kernel maps at a time.
    for _ in 0..WARM_UP {
        batch.ask(&open)?;
    }
    for _ in 0..10 * rounds {
        warms.push(Run::new(batch.ask(&open)?));
    }
    drop(open);
    for _ in 0..rounds {
        bench.check()?;
        warm::forget_files(&store)?;
        let (took, open) = timed_open(&store, &key)?;
        cold_opens.push(Run::new(took));
        colds.push(Run::new(batch.ask(&open)?));
    }
    Ok(vec![
        Figure::new("index.open_50m_ms", "ms", Better::Lower, Median, opens)?.target(1000.0),
        Figure::new("index.open_50m_ms.cold", "ms", Better::Lower, Median, cold_opens)?,
        Figure::new("index.batch_10k_ms.warm", "ms", Better::Lower, Median, warms)?.target(5.0),
        Figure::new("index.batch_10k_ms.first", "ms", Better::Lower, Median, firsts)?,
        Figure::new("index.batch_10k_ms.cold", "ms", Better::Lower, Median, colds)?,
    ])
}

/// Batches after which the whole index was touched.
const WARM_UP: u64 = 100;

fn timed_open(folder: &Path, key: &GroupKey) -> Result<(f64, Store)> {
    let began = Instant::now();
    let store = Store::open(folder, key.clone())?;
    Ok((ms(began.elapsed()), store))
}

/// Draws names.
#[derive(Default)]
struct Batches {
    state: u64,
}

impl Batches {
    /// Milliseconds that the store takes for the next ones.
    fn ask(&mut self, store: &Store) -> Result<f64> {
        let names: Vec<PageHash> = (0..NAMES)
            .map(|i| {
                self.state =
                    self.state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
                pages::bench::synthetic_name((self.state >> 16) % PAGES, PAGES, i.is_multiple_of(2))
            })
            .collect();
        let began = Instant::now();
        let known = pages::bench::look_up(store, &names);
        let took = ms(began.elapsed());
        if known as u64 == NAMES / 2 { Ok(took) } else { Err(Error::Lacks("names that it was given")) }
    }
}

/// Copies of the images, each made different from the others: together more than a gibibyte.
const COPIES: u8 = 7;

/// `fsck.vs_disk_read`: bytes per second of a check of a store of more than 1 GiB over those of reading the same files from begin to end,
/// both from the disk and by turns.
pub(super) fn fsck(bench: &Bench) -> Result<Vec<Figure>> {
    let folder = folder(bench)?;
    let place = folder.path().join("store");
    let store = new_store(&place)?;
    let mut image = warm::different(&warm::load(memory_images::eight(bench)?)?);
    for copy in 1..=COPIES {
        image.chunks_exact_mut(PAGE_SIZE).for_each(|page| {
            if let Some(byte) = page.last_mut() {
                *byte = byte.wrapping_add(copy);
            }
        });
        warm::put(&store, &image)?;
    }
    store.fold()?;
    drop(image);
    let packs = place.join("packs");
    let mut runs = Vec::new();
    for _ in 0..bench.count(ROUNDS, 3) {
        bench.check()?;
        warm::forget_files(&place)?;
        let (bytes, read) = warm::read_files(&packs)?;
        warm::forget_files(&place)?;
        let began = Instant::now();
        let report = store.fsck(&[], &|_, _| true)?;
        let took = began.elapsed();
        if !report.damage.is_empty() || bytes < 1 << 30 || report.pages < (1 << 30) / PAGE_SIZE as u64 {
            return Err(Error::Lacks("gibibyte of undamaged pages"));
        }
        let speed = |took: std::time::Duration| bytes as f64 / 1e6 / took.as_secs_f64();
        let run = Run::new(read.as_secs_f64() / took.as_secs_f64());
        runs.push(run.beside("fsck_mb_s", speed(took)).beside("read_mb_s", speed(read)));
    }
    Ok(vec![Figure::new("fsck.vs_disk_read", "", Better::Higher, Median, runs)?.target(0.8)])
}

/// Maps of a tree whose members differ by 1 % each.
const MAPS: u64 = 1000;
/// Pages of such a map: 64 MiB.
const MAP_PAGES: usize = 16_384;

/// `du.1000_vs_10`: the time of [`Store::usage`] over a thousand maps, each unlike the one before in one page of a hundred, over that for
/// ten of them.
pub(super) fn du(bench: &Bench) -> Result<Vec<Figure>> {
    let folder = folder(bench)?;
    let store = new_store(&folder.path().join("store"))?;
    let roots = tree(&store)?;
    let few: Vec<MapRoot> = roots.iter().take(10).copied().collect();
    let timed = |roots: &[MapRoot]| -> Result<f64> {
        let began = Instant::now();
        store.usage(roots)?;
        Ok(ms(began.elapsed()))
    };
    let mut runs = Vec::new();
    for _ in 0..bench.count(5, 2) {
        bench.check()?;
        let (ten, all) = (timed(&few)?, timed(&roots)?);
        runs.push(Run::new(all / ten).beside("ten_ms", ten).beside("thousand_ms", all));
    }
    Ok(vec![Figure::new("du.1000_vs_10", "", Better::Lower, Median, runs)?])
}

fn tree(store: &Store) -> Result<Vec<MapRoot>> {
    let mut names = vec![PageHash::ZERO; MAP_PAGES];
    let mut number = 0_u64;
    let mut page_of = |bytes: &mut Vec<u8>| {
        number += 1;
        bytes.extend(number.to_le_bytes());
        bytes.resize(bytes.len() + PAGE_SIZE - 8, 5);
    };
    let mut roots = Vec::new();
    for map in 0..MAPS as usize {
        let session = store.begin()?;
        // What a guest writes to lies together.
        let changed = if map == 0 { MAP_PAGES } else { MAP_PAGES / 100 };
        let from = if map == 0 { 0 } else { map * 7919 % (MAP_PAGES - changed) };
        let mut bytes = Vec::new();
        (0..changed).for_each(|_| page_of(&mut bytes));
        session.put(&bytes, names.get_mut(from..from + changed).ok_or(Error::Lacks("room"))?)?;
        roots.push(session.put_map(&names)?);
        session.commit()?;
        if store.wants_folding() {
            store.fold()?;
        }
    }
    Ok(roots)
}

fn folder(bench: &Bench) -> Result<tempfile::TempDir> {
    let folder = tempfile::Builder::new().prefix("spinney-bench-index-").tempdir_in(&bench.disk);
    folder.map_err(system("make a folder in", &bench.disk))
}
