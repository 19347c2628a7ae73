//! Memory images in warm buffers, put into a page store by two threads as a take puts what it reads (`snapshots/src/read_out.rs`), and
//! what the same pages cost to hash and nothing else.
//!
//! Only pages that are not zero: a zero page costs next to nothing to either side. They lie one behind the other, as in a guest whose
//! memory is full.

use std::collections::HashSet;
use std::fs::{self, File};
use std::hint::black_box;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pages::{LEAF_PAGES, PAGE_SIZE, PageHash, PageStore, Saved, Session};
use tempfile::TempDir;

use crate::error::{Error, Result, system};

/// Bytes of a run: what a take gives the store at a time.
const RUN: usize = 1 << 20;
const RUN_PAGES: usize = RUN / PAGE_SIZE;
/// Threads: both cores.
pub(crate) const THREADS: usize = 2;
/// Of no store.
const KEY: [u8; 32] = [7; 32];

/// Pages of one guest, in order.
pub(crate) type Image = Vec<u8>;

/// The pages of memory images that are not zero.
pub(crate) fn load(files: &[PathBuf]) -> Result<Vec<Image>> {
    let zero = [0; PAGE_SIZE];
    let pages_of = |path: &PathBuf| -> Result<Image> {
        let bytes = fs::read(path).map_err(system("read", path))?;
        Ok(bytes.chunks_exact(PAGE_SIZE).filter(|page| **page != zero).flatten().copied().collect())
    };
    files.iter().map(pages_of).collect()
}

/// Those that no earlier one is equal to, from all images, as one image.
pub(crate) fn different(images: &[Image]) -> Image {
    let mut seen = HashSet::new();
    let pages = images.iter().flat_map(|image| image.chunks_exact(PAGE_SIZE));
    pages.filter(|page| seen.insert(*page)).flatten().copied().collect()
}

/// What something took: by the clock, and of all threads' processor time, which others on the machine change less.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Took {
    pub(crate) wall: Duration,
    pub(crate) cpu: Duration,
}

impl Took {
    /// Times `act`.
    pub(crate) fn of<T>(act: impl FnOnce() -> Result<T>) -> Result<(T, Self)> {
        let cpu = || {
            let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
            Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
        };
        let (began, before) = (Instant::now(), cpu());
        let done = act()?;
        Ok((done, Self { wall: began.elapsed(), cpu: cpu() - before }))
    }

    /// How many times as long it took as another one, by the clock.
    pub(crate) fn over(&self, other: &Self) -> f64 {
        self.wall.as_secs_f64() / other.wall.as_secs_f64()
    }

    /// The same of processor time.
    pub(crate) fn cpu_over(&self, other: &Self) -> f64 {
        self.cpu.as_secs_f64() / other.cpu.as_secs_f64()
    }

    /// Gigabytes (10^9 bytes) a second by the clock.
    pub(crate) fn gb_s(&self, bytes: usize) -> f64 {
        bytes as f64 / 1e9 / self.wall.as_secs_f64()
    }
}

impl std::ops::AddAssign for Took {
    fn add_assign(&mut self, other: Self) {
        self.wall += other.wall;
        self.cpu += other.cpu;
    }
}

/// Has so many threads do their part of `runs`, one run after the other.
fn side_by_side(threads: usize, runs: usize, act: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    let next = &AtomicUsize::new(0);
    let act = &act;
    thread::scope(|scope| {
        let work = move || -> Result<()> {
            loop {
                let run = next.fetch_add(1, Ordering::Relaxed);
                if run >= runs {
                    return Ok(());
                }
                act(run)?;
            }
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or(Err(Error::Lacks("worker"))))
    })
}

/// How the pages are hashed that a store is compared with.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Hashing {
    /// `blake3::keyed_hash`, page by page.
    OneByOne,
    /// Several pages side by side, which is the fastest that we know.
    SideBySide,
}

/// Hashes all pages with so many threads.
pub(crate) fn hash(images: &[&Image], how: Hashing, threads: usize) -> Result<Took> {
    let runs: Vec<&[u8]> = images.iter().flat_map(|image| image.chunks(RUN)).collect();
    let hash = |run: usize| {
        let bytes = runs.get(run).copied().unwrap_or_default();
        match how {
            Hashing::OneByOne => bytes.chunks_exact(PAGE_SIZE).for_each(|page| {
                black_box(blake3::keyed_hash(&KEY, page));
            }),
            Hashing::SideBySide => pages::bench::hash_side_by_side(&KEY, bytes, |name| {
                black_box(name);
            }),
        }
        Ok(())
    };
    Ok(Took::of(|| side_by_side(threads, runs.len(), hash))?.1)
}

/// What a session of one image came to.
pub(crate) struct Put {
    pub(crate) saved: Saved,
    /// The threads' part of it: [`Session::put_run`].
    pub(crate) put: Took,
    /// From `begin` to the end of `commit`.
    pub(crate) whole: Took,
}

/// One image by two threads in one session.
pub(crate) fn put(store: &dyn PageStore, image: &Image) -> Result<Put> {
    let ((saved, put), whole) = Took::of(|| {
        let session = store.begin()?;
        let runs: Vec<&[u8]> = image.chunks(RUN).collect();
        let leaves: Vec<_> = runs.iter().map(|_| OnceLock::new()).collect();
        let put_run = |run: usize| {
            let own = put_run(&*session, runs.get(run).copied().unwrap_or_default())?;
            leaves.get(run).map_or(Err(Error::Lacks("room for leaves")), |slot| {
                let _ = slot.set(own);
                Ok(())
            })
        };
        let ((), put) = Took::of(|| side_by_side(THREADS, runs.len(), put_run))?;
        let leaves: Vec<PageHash> = leaves.into_iter().filter_map(OnceLock::into_inner).flatten().collect();
        session.put_map_over(&leaves, (image.len() / PAGE_SIZE) as u64)?;
        Ok((session.commit()?, put))
    })?;
    Ok(Put { saved, put, whole })
}

/// Several images, each by one thread in a session of its own, all at once: what a cluster's take does. From the first `begin` to the
/// end of the last `commit`.
pub(crate) fn put_at_once(store: &dyn PageStore, images: &[&Image]) -> Result<Took> {
    let all = || {
        thread::scope(|scope| {
            let workers: Vec<_> =
                images.iter().map(|image| scope.spawn(|| put_alone(store, image))).collect();
            workers.into_iter().try_for_each(|worker| worker.join().unwrap_or(Err(Error::Lacks("worker"))))
        })
    };
    Ok(Took::of(all)?.1)
}

fn put_alone(store: &dyn PageStore, image: &Image) -> Result<()> {
    let session = store.begin()?;
    let mut leaves = Vec::new();
    for bytes in image.chunks(RUN) {
        leaves.extend(put_run(&*session, bytes)?);
    }
    session.put_map_over(&leaves, (image.len() / PAGE_SIZE) as u64)?;
    session.commit()?;
    Ok(())
}

/// Puts a run; the names of its leaves.
fn put_run(session: &dyn Session, bytes: &[u8]) -> Result<Vec<PageHash>> {
    let pages = bytes.len() / PAGE_SIZE;
    let (mut names, mut leaves) =
        ([PageHash::ZERO; RUN_PAGES], vec![PageHash::ZERO; pages.div_ceil(LEAF_PAGES)]);
    let there = [true; RUN_PAGES].get(..pages).unwrap_or_default().to_vec();
    session.put_run(bytes, &there, names.get_mut(..pages).unwrap_or_default(), &mut leaves)?;
    Ok(leaves)
}

/// A tmpfs of our own, whose pages were all written to before. Unmounted when dropped.
#[derive(Debug)]
pub(crate) struct Tmpfs {
    folder: TempDir,
}

impl Tmpfs {
    /// Mounts one with room for `bytes`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where this process may not mount.
    pub(crate) fn mount(bytes: usize, huge: bool) -> Result<Self> {
        let place = std::env::temp_dir();
        let folder = tempfile::Builder::new().prefix("spinney-bench-tmpfs-").tempdir_in(&place);
        let folder = folder.map_err(system("make a folder in", &place))?;
        let options = format!("mode=0700,size={bytes},huge={}", if huge { "always" } else { "never" });
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(folder.path())
            .output()
            .map_err(|error| Error::Unavailable(format!("no `mount`: {error}")))?;
        if !mounted.status.success() {
            let words = String::from_utf8_lossy(&mounted.stderr).trim().to_owned();
            return Err(Error::Unavailable(format!("no tmpfs of its own ({options}): {words}")));
        }
        Ok(Self { folder })
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes so many bytes and takes them away again: the host gives memory out slowly the first time.
    pub(crate) fn warm_up(&self, bytes: usize) -> Result<()> {
        let path = self.path().join("warm-up");
        let mut file = File::create(&path).map_err(system("make", &path))?;
        let piece = vec![1; RUN];
        for _ in 0..bytes.div_ceil(RUN) {
            file.write_all(&piece).map_err(system("write", &path))?;
        }
        fs::remove_file(&path).map_err(system("remove", &path))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

/// Has the system forget what it has of a file, or of the files below a folder: the next one reads from the disk. They are synced first, and nobody
/// else's files are touched.
pub(crate) fn forget_files(folder: &Path) -> Result<()> {
    each_file(folder, &mut |path| {
        let file = File::open(path).map_err(system("open", path))?;
        file.sync_all().map_err(system("sync", path))?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)
            .map_err(|errno| system("forget", path)(errno.into()))
    })
}

/// Reads all files below a folder from begin to end, one after the other; how many bytes, and how long it took.
pub(crate) fn read_files(folder: &Path) -> Result<(u64, Duration)> {
    let (mut piece, mut bytes) = (vec![0; RUN], 0);
    let began = Instant::now();
    each_file(folder, &mut |path| {
        let mut file = File::open(path).map_err(system("open", path))?;
        file.rewind().map_err(system("read", path))?;
        loop {
            match file.read(&mut piece).map_err(system("read", path))? {
                0 => return Ok(()),
                n => bytes += n as u64,
            }
        }
    })?;
    Ok((bytes, began.elapsed()))
}

/// Does something with a file, or with each file below a folder.
pub(crate) fn each_file(folder: &Path, act: &mut dyn FnMut(&Path) -> Result<()>) -> Result<()> {
    if folder.is_file() {
        return act(folder);
    }
    for entry in fs::read_dir(folder).map_err(system("list", folder))? {
        let path = entry.map_err(system("list", folder))?.path();
        // Sockets are none.
        if path.is_dir() || path.is_file() {
            each_file(&path, act)?;
        }
    }
    Ok(())
}
