//! Does the page store keep up with the hash that it cannot do without? Page bytes in per second, over keyed BLAKE3 of the same warm pages
//! on both cores.
//!
//! In our time is a whole session: `begin`, `put_run` by two threads in runs of 1 MiB, which hashes, looks up, writes and names the leaves
//! of the map, then `put_map_over` and `commit`. Not in it: reading the guest's memory, zero pages, and making an empty store. The syncs of
//! a commit cost nothing on tmpfs; what a disk makes of them is measured with real takes (`take.*`).
//!
//! In the other's time is `blake3::keyed_hash` of each page and nothing else. It leaves most of a wide processor unused, so the same is
//! shown over the fastest keyed BLAKE3 that we have, several pages side by side (`…_wide`), which is how the store itself hashes.
//!
//! Each round measures both by turns; `cpu` beside a ratio is the same ratio of processor time, which neighbours on the machine change less.
//! `new` pages are all different ones of the eight images, as one image of some 300 MB; `known` ones
//! are all pages of all images, in a session each, that the store has already.

use std::path::Path;

use pages::{GroupKey, PAGE_SIZE, Store};

use super::ms;
use crate::error::{Error, Result, system};
use crate::memory_images;
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::stats::Summary::Median;
use crate::warm::{self, Hashing, Image, THREADS, Tmpfs, Took};

const ROUNDS: u64 = 11;

/// Of so many rounds one will do for two sources.
const PATIENCE: u64 = 10;

/// How much faster two threads hash than one, at least, on a machine that has two cores for them. A round in which it has not says
/// nothing about the store and is not counted.
const TWO_CORES: f64 = 1.85;

/// Room of a tmpfs for all that is put on it.
const ROOM: usize = 4 << 30;

/// `store.known.vs_blake3`.
pub(super) fn known(bench: &Bench) -> Result<Vec<Figure>> {
    let images = warm::load(memory_images::eight(bench)?)?;
    let tmpfs = Tmpfs::mount(ROOM, false)?;
    let store = new_store(&tmpfs.path().join("store"))?;
    images.iter().try_for_each(|image| warm::put(&store, image).map(drop))?;
    compare("store.known", bench, &images, || {
        let mut sum = Times::default();
        for image in &images {
            let put = warm::put(&store, image)?;
            if put.saved.new > 0 {
                return Err(Error::Lacks("pages that it was given"));
            }
            sum.add(&put);
        }
        Ok(sum)
    })
    .and_then(|figures| with_targets(figures, 0.80))
}

/// `store.new.tmpfs.vs_blake3`.
pub(super) fn new_tmpfs(bench: &Bench) -> Result<Vec<Figure>> {
    new(bench, "store.new.tmpfs", false).and_then(|figures| with_targets(figures, 0.42))
}

/// `store.new.huge_tmpfs.vs_blake3`: huge pages, which the kernel clears and finds more cheaply.
pub(super) fn new_huge_tmpfs(bench: &Bench) -> Result<Vec<Figure>> {
    new(bench, "store.new.huge_tmpfs", true).and_then(|figures| with_targets(figures, 0.58))
}

fn new(bench: &Bench, id: &str, huge: bool) -> Result<Vec<Figure>> {
    let images = vec![warm::different(&warm::load(memory_images::eight(bench)?)?)];
    let tmpfs = Tmpfs::mount(ROOM, huge)?;
    let bytes: usize = images.iter().map(Vec::len).sum();
    let image = images.first().ok_or(Error::Lacks("image"))?;
    compare(id, bench, &images, || {
        tmpfs.warm_up(bytes + bytes / 8)?;
        let folder = tmpfs.path().join("store");
        let store = new_store(&folder)?;
        let put = warm::put(&store, image)?;
        if put.saved.new as usize * PAGE_SIZE != bytes {
            return Err(Error::Lacks("new pages only"));
        }
        drop(store);
        std::fs::remove_dir_all(&folder).map_err(system("remove", &folder))?;
        let mut sum = Times::default();
        sum.add(&put);
        Ok(sum)
    })
}

/// What sessions took together.
#[derive(Default)]
struct Times {
    put: Took,
    whole: Took,
}

impl Times {
    fn add(&mut self, put: &warm::Put) {
        self.put += put.put;
        self.whole += put.whole;
    }
}

/// Rounds of hashing one by one, side by side, and ours: the ratio over each.
fn compare(
    id: &str,
    bench: &Bench,
    images: &[Image],
    mut ours: impl FnMut() -> Result<Times>,
) -> Result<Vec<Figure>> {
    let (bytes, all) = (images.iter().map(Vec::len).sum(), images.iter().collect::<Vec<_>>());
    let (mut over, mut over_wide, mut speed) = (Vec::new(), Vec::new(), Vec::new());
    // A round before the first: caches, page tables, the processor's clock.
    for round in 0..=bench.count(ROUNDS, 3) {
        bench.check()?;
        let alone = warm::hash(&all, Hashing::OneByOne, THREADS)?;
        let wide = warm::hash(&all, Hashing::SideBySide, THREADS)?;
        let took = ours()?;
        if round == 0 {
            continue;
        }
        let ratio = |base: Took| {
            Run::new(base.over(&took.whole))
                .beside("put_only", base.over(&took.put))
                .beside("cpu", base.cpu_over(&took.whole))
                .beside("blake3_gb_s", base.gb_s(bytes))
                .beside("ours_gb_s", took.whole.gb_s(bytes))
        };
        over.push(ratio(alone));
        over_wide.push(ratio(wide));
        speed.push(Run::new(took.whole.gb_s(bytes)).beside("session_ms", ms(took.whole.wall)));
    }
    Ok(vec![
        Figure::new(format!("{id}.vs_blake3"), "", Better::Higher, Median, over)?,
        Figure::new(format!("{id}.vs_blake3_wide"), "", Better::Higher, Median, over_wide)?,
        Figure::new(format!("{id}.gb_s"), "GB/s", Better::Higher, Median, speed)?,
    ])
}

/// The first one has a target.
fn with_targets(figures: Vec<Figure>, target: f64) -> Result<Vec<Figure>> {
    let mut figures = figures.into_iter();
    let first = figures.next().ok_or(Error::Lacks("figures"))?.target(target);
    Ok(std::iter::once(first).chain(figures).collect())
}

/// `store.two_sources.vs_one`: two sessions at once, a thread each, over one session with one thread; different images, known to the
/// store. `store.two_sources.new.vs_one`: the same into a new store on tmpfs.
pub(super) fn two_sources(bench: &Bench) -> Result<Vec<Figure>> {
    let images = warm::load(memory_images::eight(bench)?)?;
    let (one, other) = halves(&images)?;
    let tmpfs = Tmpfs::mount(ROOM, false)?;
    let folder = tmpfs.path().join("store");
    let mut figures = Vec::new();
    for (id, new) in [("store.two_sources.vs_one", false), ("store.two_sources.new.vs_one", true)] {
        // No page is in both: else one of the two finds what the other has just written, and saves time by it.
        let (one, other) =
            if new { halves_of(&warm::different(&images)) } else { (one.clone(), other.clone()) };
        let fresh = || -> Result<Store> {
            tmpfs.warm_up((one.len() + other.len()) * 9 / 8)?;
            new_store(&folder)
        };
        let gone = || std::fs::remove_dir_all(&folder).map_err(system("remove", &folder));
        let store = new_store(&folder)?;
        let _ = warm::put_at_once(&store, &[&one, &other])?;
        let mut store = Some(store);
        let (mut runs, rounds) = (Vec::new(), bench.count(ROUNDS, 3));
        for _ in 0..rounds * PATIENCE {
            bench.check()?;
            let mut timed = |images: &[&Image]| -> Result<Took> {
                if new {
                    store = None;
                    gone()?;
                    store = Some(fresh()?);
                }
                warm::put_at_once(store.as_ref().ok_or(Error::Lacks("store"))?, images)
            };
            let by = |threads| warm::hash(&[&one, &other], Hashing::SideBySide, threads);
            let cores = || Ok::<_, Error>(by(1)?.over(&by(2)?));
            // What the machine has for two threads just now, before and after.
            let before = cores()?;
            let (alone, alone_too) = (timed(&[&one])?, timed(&[&other])?);
            let both = timed(&[&one, &other])?;
            let cores = before.min(cores()?);
            if cores < TWO_CORES {
                continue;
            }
            let bytes = one.len() + other.len();
            let mut single = alone;
            single += alone_too;
            runs.push(
                Run::new(single.over(&both))
                    .beside("cpu_one_vs_two", single.cpu_over(&both))
                    .beside("hash_two_vs_one", cores)
                    .beside("one_gb_s", single.gb_s(bytes))
                    .beside("two_gb_s", both.gb_s(bytes)),
            );
            if runs.len() as u64 == rounds {
                break;
            }
        }
        drop(store);
        gone()?;
        if (runs.len() as u64) < rounds {
            let words = format!("this machine had two cores for two threads in {} rounds only", runs.len());
            return Err(Error::Unavailable(words));
        }
        figures.push(Figure::new(id, "", Better::Higher, Median, runs)?);
    }
    with_targets(figures, 1.7)
}

/// Two images as long as each other, as nearly as may be, from the first and the last ones.
fn halves(images: &[Image]) -> Result<(Image, Image)> {
    let (first, last) = images.split_at_checked(images.len() / 2).ok_or(Error::Lacks("images"))?;
    Ok((first.concat(), last.concat()))
}

fn halves_of(image: &Image) -> (Image, Image) {
    let middle = image.len() / PAGE_SIZE / 2 * PAGE_SIZE;
    let (first, last) = image.split_at(middle);
    (first.to_vec(), last.to_vec())
}

pub(super) fn new_store(folder: &Path) -> Result<Store> {
    Ok(Store::create(folder, GroupKey::generate()?)?)
}
