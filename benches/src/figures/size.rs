//! Does the page store need less than what people use today? The memory of eight guests, in our store, in restic's
//! repository, in borg's, and in one stream of zstd's: the same files, and what each takes on the disk.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pages::{Cold, GcRequest, GroupKey, MapRoot, PAGE_SIZE, PageHash, PageStore, Saved, Store};
use tempfile::TempDir;

use super::ms;
use crate::disk;
use crate::error::{Error, Result, system};
use crate::memory_images;
use crate::page_count::Pages;
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::stats::Summary::Median;
use crate::tool::{self, Stored};

/// restic cuts files where a polynomial says that it draws for each repository: what it finds differs by a fifth from one to the next.
const RESTIC_ROUNDS: u64 = 5;
/// Level of zstd at which the daemon compresses.
const LEVEL: i32 = 3;
/// Pages that are put at a time.
const BATCH: usize = 4096;

/// `size.duplicates_left`.
pub(super) fn duplicates(bench: &Bench) -> Result<Vec<Figure>> {
    let files = memory_images::eight(bench)?;
    let folder = folder(bench)?;
    Ok(vec![duplicates_left(files, &store(&folder.path().join("spinney"), files)?)?.target(0.0)])
}

/// `size.vs_best_of_restic_borg`, and the bytes of everyone.
pub(super) fn rivals(bench: &Bench) -> Result<Vec<Figure>> {
    let files = memory_images::eight(bench)?;
    let folder = folder(bench)?;
    let place = folder.path();
    let ours = store(&place.join("spinney"), files)?;
    bench.check()?;
    let rounds = bench.count(RESTIC_ROUNDS, 1);
    let restic = |compression| -> Result<Vec<Stored>> {
        (0..rounds).map(|_| tool::restic(place, files, compression)).collect()
    };
    let rivals = [
        bytes("size.restic.bytes", &restic("auto")?)?,
        bytes("size.restic_max.bytes", &restic("max")?)?,
        bytes("size.borg.bytes", &[tool::borg(place, files, &[])?])?,
        bytes("size.borg_zstd.bytes", &[tool::borg(place, files, &["--compression", "zstd"])?])?,
    ];
    bench.check()?;
    // Not among those that count: borg keeps an index entry in memory for each such chunk, so nobody runs it so, and nothing can be
    // read from the middle of a stream. They show what there is to be had.
    let fixed = ["--compression", "zstd", "--chunker-params", "fixed,4096"];
    let shown = [
        bytes("size.borg_fixed_4k_zstd.bytes", &[tool::borg(place, files, &fixed)?])?,
        bytes("size.zstd_3.bytes", &[tool::zstd(place, files, &["-3"])?])?,
        bytes("size.zstd_3_long.bytes", &[tool::zstd(place, files, &["-3", "--long=27"])?])?,
    ];
    let best = rivals.iter().map(Figure::value).min_by(f64::total_cmp).ok_or(Error::Lacks("rivals"))?;
    let bytes_of_ours = ours.stored.bytes as f64;
    let ratio = Run::new(bytes_of_ours / best).beside("ours_bytes", bytes_of_ours).beside("best_bytes", best);
    let mut figures = vec![
        Figure::new("size.vs_best_of_restic_borg", "", Better::Lower, Median, vec![ratio])?.target(0.85),
        bytes("size.spinney.bytes", &[ours.stored])?,
    ];
    figures.extend(rivals.into_iter().chain(shown));
    Ok(figures)
}

fn folder(bench: &Bench) -> Result<TempDir> {
    let folder = tempfile::Builder::new().prefix("spinney-bench-size-").tempdir_in(&bench.disk);
    folder.map_err(system("make a folder in", &bench.disk))
}

fn bytes(id: &str, stored: &[Stored]) -> Result<Figure> {
    let run = |stored: &Stored| Run::new(stored.bytes as f64).beside("took_ms", ms(stored.took));
    Figure::new(id, "B", Better::Lower, Median, stored.iter().map(run).collect())
}

/// Our store of the files.
struct Ours {
    stored: Stored,
    /// Different pages that it knows.
    known: u64,
    /// Pages that it wrote.
    written: u64,
}

fn store(folder: &Path, files: &[PathBuf]) -> Result<Ours> {
    let began = Instant::now();
    let store = Store::create(folder, GroupKey::generate()?)?;
    let mut written = 0;
    let mut roots = Vec::new();
    for file in files {
        let (root, saved) = put(&store, file)?;
        written += saved.new;
        roots.push(root);
    }
    compact(&store, &roots)?;
    let took = began.elapsed();
    let known = store.page_count();
    drop(store);
    disk::settle(folder)?;
    Ok(Ours { stored: Stored { bytes: disk::allocated(folder), took }, known, written })
}

/// One memory image, as a take would put it.
fn put(store: &Store, path: &Path) -> Result<(MapRoot, Saved)> {
    let mut file = File::open(path).map_err(system("open", path))?;
    let length = fs::metadata(path).map_err(system("look at", path))?.len() as usize;
    let session = store.begin()?;
    let mut names = vec![PageHash::ZERO; length / PAGE_SIZE];
    let mut bytes = vec![0; BATCH * PAGE_SIZE];
    for names in names.chunks_mut(BATCH) {
        let batch = bytes.get_mut(..names.len() * PAGE_SIZE).ok_or(Error::Lacks("room for a batch"))?;
        file.read_exact(batch).map_err(system("read", path))?;
        session.put(batch, names)?;
    }
    let root = session.put_map(&names)?;
    Ok((root, session.commit()?))
}

/// Has the store make itself as small as it gets.
fn compact(store: &Store, roots: &[MapRoot]) -> Result<()> {
    let compress = Some(Cold { age: Duration::ZERO, level: LEVEL });
    let request = GcRequest { roots: roots.to_vec(), compress, ..GcRequest::default() };
    let plan = store.plan_gc_with(|| Ok::<_, pages::Error>(request))?;
    store.run_gc(&plan, &|_, _| true)?;
    store.fold()?;
    Ok(())
}

/// Pages that the store has more than once, by counting the pages of the files.
fn duplicates_left(files: &[PathBuf], ours: &Ours) -> Result<Figure> {
    let mut pages = Pages::default();
    files.iter().try_for_each(|file| pages.add(file))?;
    let (all, different) = (pages.all(), pages.different());
    // A store that knows fewer has lost some, and is no smaller than another's.
    let stored = ours.known.max(ours.written);
    let left = stored.checked_sub(different).ok_or(Error::Lacks("pages that are in the files"))?;
    let run = Run::new(left as f64)
        .beside("nonzero_pages", all as f64)
        .beside("different_pages", different as f64)
        .beside("known_pages", ours.known as f64)
        .beside("written_pages", ours.written as f64);
    Figure::new("size.duplicates_left", "pages", Better::Lower, Median, vec![run])
}
