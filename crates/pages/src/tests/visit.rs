//! A visitor beside the store's own process: takes, collections, compression, damage and repair go on while it reads.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::crash_disk::CrashDisk;
use super::{names, open_small, pages};
use crate::disk::{Disk, DiskFile};
use crate::*;

struct Scene {
    dir: tempfile::TempDir,
    store: Store,
    visitor: Visitor,
}

fn visitor(dir: &std::path::Path, doubt: bool) -> Visitor {
    let key = GroupKey::load(&dir.join("key")).unwrap();
    Visitor::open(dir, &key, OpenFolders::of(dir).unwrap(), doubt).unwrap()
}

fn scene() -> Scene {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path(), GroupKey::generate().unwrap()).unwrap();
    let visitor = visitor(dir.path(), false);
    Scene { dir, store, visitor }
}

fn take(store: &Store, numbers: &[u64]) -> MapRoot {
    super::take(store, numbers.to_vec()).0.0
}

fn read(visitor: &Visitor, root: &MapRoot) -> Result<Vec<u8>> {
    let mut hashes = names(root.pages as usize);
    visitor.map_range(root, 0, &mut hashes)?;
    let mut out = vec![0xee; hashes.len() * PAGE_SIZE];
    visitor.read(&hashes, &mut out)?;
    Ok(out)
}

#[test]
fn sees_what_came_after_it() {
    let Scene { dir, store, visitor: early } = scene();
    let mut kept = Vec::new();
    for i in 0..40 {
        let numbers = [i * 2 + 1, 0, i * 2 + 2];
        kept.push((take(&store, &numbers), numbers));
        if i == 20 {
            store.fold().unwrap();
        }
    }
    let late = visitor(dir.path(), true);
    for (root, numbers) in &kept {
        assert!(
            read(&early, root).unwrap() == pages(numbers) && read(&late, root).unwrap() == pages(numbers)
        );
    }
    let nowhere = MapRoot { node: PageHash([1; 32]), pages: 3 };
    assert!(read(&early, &nowhere).unwrap_err().is_damage());
}

#[test]
fn reads_on_where_packs_are_rewritten_and_compressed() {
    let Scene { dir: _dir, store, visitor } = scene();
    let live = take(&store, &[1, 2, 3]);
    let dead: Vec<u64> = (10..60).collect();
    let both = take(&store, &[dead.clone(), vec![4, 5]].concat());
    assert!(read(&visitor, &both).unwrap() == pages(&[dead, vec![4, 5]].concat()));
    let half = {
        let session = store.begin().unwrap();
        let mut hashes = names(2);
        session.put(&pages(&[4, 5]), &mut hashes).unwrap();
        let root = session.put_map(&hashes).unwrap();
        session.commit().unwrap();
        root
    };
    let compress = Some(Cold { age: Duration::ZERO, level: 3 });
    let roots = || GcRequest { roots: vec![live, half], thorough: true, compress, ..GcRequest::default() };
    let plan = store.plan_gc_with(|| Ok::<_, Error>(roots())).unwrap();
    let done = store.run_gc(&plan, &|_, _| true).unwrap();
    assert!(done.rewritten + done.compressed > 0, "{done:?}");
    assert!(read(&visitor, &live).unwrap() == pages(&[1, 2, 3]));
    assert!(read(&visitor, &half).unwrap() == pages(&[4, 5]));
    assert!(read(&visitor, &both).unwrap_err().is_damage(), "what nobody needs is gone");
}

/// Takes, collections and folds without end on one side, reads of what stays on the other: every read succeeds, with the right bytes.
#[test]
fn never_misses_what_is_live() {
    let Scene { dir: _dir, store, visitor } = scene();
    let numbers: Vec<u64> = (1..200).collect();
    let live = take(&store, &numbers);
    let over = AtomicBool::new(false);
    let bytes = pages(&numbers);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..60 {
                // Shares half of its pages with what lives, in another order.
                let other: Vec<u64> =
                    (0..150).map(|i| if i % 2 == 0 { 1 + i } else { 1000 + round * 200 + i }).collect();
                let root = take(&store, &other);
                let compress = (round % 3 == 0).then_some(Cold { age: Duration::ZERO, level: 1 });
                let roots = if round % 2 == 0 { vec![live] } else { vec![live, root] };
                let request = GcRequest { roots, thorough: round % 5 == 0, compress, ..GcRequest::default() };
                let plan = store.plan_gc_with(|| Ok::<_, Error>(request)).unwrap();
                store.run_gc(&plan, &|_, _| true).unwrap();
                if round % 4 == 0 {
                    store.fold().unwrap();
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        let mut reads = 0;
        while !over.load(Ordering::Relaxed) || reads == 0 {
            assert!(read(&visitor, &live).unwrap() == bytes);
            reads += 1;
        }
    });
}

#[test]
fn damage_is_told_until_it_is_repaired() {
    let Scene { dir, store, visitor } = scene();
    let root = take(&store, &[1, 2, 3]);
    assert!(read(&visitor, &root).unwrap() == pages(&[1, 2, 3]));
    let pack = std::fs::read_dir(dir.path().join("packs")).unwrap().next().unwrap().unwrap().path();
    let file = std::fs::File::options().write(true).open(&pack).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0x55; 64], 4096 + 4096).unwrap();
    assert!(read(&visitor, &root).unwrap_err().is_damage());
    let mut hashes = names(3);
    store.map_range(&root, 0, &mut hashes).unwrap();
    let mut good = vec![0; PAGE_SIZE];
    visitor.read(&hashes[2..], &mut good).unwrap();
    assert!(good == pages(&[3]), "the others can be read");
    // The page comes again, from whoever has it.
    store.repair(&[root], &|| true).unwrap();
    take(&store, &[2]);
    assert!(read(&visitor, &root).is_ok_and(|bytes| bytes == pages(&[1, 2, 3])));
}

/// A disk that a visitor finds in some mood.
#[derive(Clone)]
struct Moody {
    disk: CrashDisk,
    mood: Arc<Mutex<Mood>>,
}

#[derive(Default)]
struct Mood {
    /// Happens in the middle of the next listings of the packs, one each: what comes and what goes are both missed.
    meanwhile: Vec<Box<dyn FnOnce() + Send>>,
    /// No file can be opened.
    no_open: Option<Errno>,
    /// Files that were opened before are of no use.
    stale: u64,
    opened: u64,
    read: u64,
    listed: u64,
}

struct MoodyFile {
    file: Arc<dyn DiskFile>,
    number: u64,
    mood: Arc<Mutex<Mood>>,
}

impl Moody {
    fn mood(&self) -> MutexGuard<'_, Mood> {
        self.mood.lock().unwrap()
    }

    /// What is open now is of no use any more.
    fn close_all(&self) {
        let mut mood = self.mood();
        mood.stale = mood.opened;
    }

    fn visitor(&self) -> Visitor {
        let key = GroupKey::from_bytes([6; 32]);
        Visitor::open_on(Arc::new(self.clone()), PathBuf::from("/"), &key, false).unwrap()
    }
}

impl Disk for Moody {
    fn create(&self, _: &Path) -> io::Result<Arc<dyn DiskFile>> {
        unreachable!()
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let mut mood = self.mood();
        if let Some(error) = mood.no_open {
            return Err(error.into());
        }
        mood.opened += 1;
        let file = self.disk.open(path)?;
        Ok(Arc::new(MoodyFile { file, number: mood.opened, mood: Arc::clone(&self.mood) }))
    }

    fn rename(&self, _: &Path, _: &Path) -> io::Result<()> {
        unreachable!()
    }

    fn remove(&self, _: &Path) -> io::Result<()> {
        unreachable!()
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<OsString>> {
        let before = self.disk.list(folder)?;
        if folder != Path::new("/packs") {
            return Ok(before);
        }
        self.mood().listed += 1;
        let meanwhile = self.mood().meanwhile.pop();
        if let Some(act) = meanwhile {
            act();
        }
        let after = self.disk.list(folder)?;
        Ok(before.into_iter().filter(|name| after.contains(name)).collect())
    }

    fn sync_folder(&self, _: &Path) -> io::Result<()> {
        unreachable!()
    }
}

impl DiskFile for MoodyFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut mood = self.mood.lock().unwrap();
        if self.number <= mood.stale {
            return Err(Errno::STALE.into());
        }
        mood.read += buffer.len() as u64;
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, _: &[&[u8]], _: u64) -> io::Result<()> {
        unreachable!()
    }

    fn write_back(&self, _: u64, _: u64) {}

    fn forget_cached(&self) {}

    fn sync(&self) -> io::Result<()> {
        unreachable!()
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }

    fn modified(&self) -> io::Result<i128> {
        self.file.modified()
    }

    fn map(&self) -> io::Result<crate::index::Mapping> {
        self.file.map()
    }
}

fn moody() -> (Store, Moody) {
    let disk = CrashDisk::default();
    let store = open_small(&disk);
    (store, Moody { disk, mood: Arc::default() })
}

/// Has the collector rewrite whatever has something in it that these maps do not need; or compress everything.
fn collect(store: &Store, roots: &[MapRoot], compress: bool) -> GcDone {
    let compress = compress.then_some(Cold { age: Duration::ZERO, level: 1 });
    let request = GcRequest { roots: roots.to_vec(), thorough: true, compress, ..GcRequest::default() };
    let plan = store.plan_gc_with(|| Ok::<_, Error>(request)).unwrap();
    store.run_gc(&plan, &|_, _| true).unwrap()
}

#[test]
fn a_pack_that_comes_for_one_that_goes_is_not_missed_though_the_listing_has_neither() {
    let (store, moody) = moody();
    take(&store, &[1, 2, 3, 4, 5, 6]);
    let live = take(&store, &[5, 6]);
    let visitor = moody.visitor();
    let later = take(&store, &[7]);
    assert_eq!(collect(&store, &[live, later], false).rewritten, 1);
    // What the visitor knows is gone; what has come for it goes while he looks.
    let busy = store.clone();
    let rewrite = move || assert!(collect(&busy, &[live, later], true).compressed > 0);
    moody.mood().meanwhile.push(Box::new(rewrite));
    moody.close_all();
    assert!(read(&visitor, &live).unwrap() == pages(&[5, 6]));
    assert!(moody.mood().meanwhile.is_empty(), "it has looked");
    assert!(read(&visitor, &later).unwrap() == pages(&[7]));
    // The same for one who has only come, and knows nothing yet.
    take(&store, &[20, 21, 22, 23, 24, 25]);
    let second = take(&store, &[24, 25]);
    let busy = store.clone();
    let rewrite = move || assert_eq!(collect(&busy, &[live, later, second], false).rewritten, 1);
    moody.mood().meanwhile.push(Box::new(rewrite));
    assert!(read(&moody.visitor(), &second).unwrap() == pages(&[24, 25]));
}

#[test]
fn what_passes_is_not_told_as_damage_and_passes() {
    let (store, moody) = moody();
    let (early, late) = (take(&store, &[1, 2, 3]), take(&store, &[4, 5]));
    let visitor = moody.visitor();
    assert!(read(&visitor, &early).unwrap() == pages(&[1, 2, 3]));
    // Files that are open are of no use any more, as on a file system that was mounted anew.
    moody.close_all();
    assert!(read(&visitor, &early).unwrap() == pages(&[1, 2, 3]));
    // Another file has the name by now, as when one is put back from a backup.
    let path = moody.disk.packs().remove(0);
    let good = moody.disk.bytes(&path);
    let mut bad = good.clone();
    bad[4096..8192].fill(0x55);
    moody.disk.replace(&path, &bad);
    assert!(read(&visitor, &early).unwrap_err().is_damage());
    moody.disk.write(&path, &good);
    assert!(read(&visitor, &early).unwrap() == pages(&[1, 2, 3]));
    // No file can be opened: of what came meanwhile nothing can be said.
    assert!(visitor.state().is_some());
    let new = take(&store, &[8, 9]);
    moody.close_all();
    moody.mood().no_open = Some(Errno::MFILE);
    assert!(!read(&visitor, &early).unwrap_err().is_damage());
    assert!(read(&visitor, &new).is_err() && visitor.state().is_none());
    moody.mood().no_open = None;
    for (root, numbers) in [(early, &[1, 2, 3][..]), (late, &[4, 5])] {
        assert!(read(&visitor, &root).unwrap() == pages(numbers));
    }
    // The new pack is tried again after a while.
    let deadline = Instant::now() + Duration::from_secs(10);
    while read(&visitor, &new).map_or(true, |bytes| bytes != pages(&[8, 9])) {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(visitor.state().is_some());
}

#[test]
fn whoever_asks_again_for_what_is_lost_costs_little_and_hears_when_it_is_there() {
    let (store, moody) = moody();
    let roots: Vec<MapRoot> = (0..30).map(|i| take(&store, &[i * 3 + 1, i * 3 + 2, i * 3 + 3])).collect();
    let visitor = moody.visitor();
    let packs = moody.disk.packs();
    let good = moody.disk.bytes(&packs[4]);
    let mut bad = good.clone();
    bad[4096 + 4096..4096 + 3 * 4096].fill(0x55);
    moody.disk.replace(&packs[4], &bad);
    let mut hashes = names(3);
    visitor.map_range(&roots[4], 0, &mut hashes).unwrap();
    let slow = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&slow);
    visitor.when_slow(move || {
        told.store(true, Ordering::Relaxed);
        Box::new(())
    });
    let lost = |visitor: &Visitor| {
        let mut out = vec![0; 3 * PAGE_SIZE];
        let before = moody.mood().read;
        let lost = visitor.read_each(&hashes, &mut out).unwrap();
        assert!(lost.iter().all(|(_, why)| why.is_damage()));
        let lost: Vec<usize> = lost.into_iter().map(|(i, _)| i).collect();
        for i in (0..3).filter(|i| !lost.contains(i)) {
            assert!(out[i * PAGE_SIZE..][..PAGE_SIZE] == pages(&[13 + i as u64]), "the others are read");
        }
        (lost, moody.mood().read - before)
    };
    let (first, whole) = lost(&visitor);
    assert_eq!(first, [1, 2]);
    assert!(slow.load(Ordering::Relaxed));
    let state = visitor.state();
    let (again, little) = lost(&visitor);
    // The places that there are, a few times, and no footer.
    assert!(again == first && little <= 16 * PAGE_SIZE as u64 && whole > little, "{whole} {little}");
    assert!(visitor.state() == state && state.is_some());
    // A take brings one page anew.
    collect(&store, &roots, false);
    store.repair(&roots, &|| true).unwrap();
    let new = take(&store, &[14]);
    assert_eq!(lost(&visitor).0, [2]);
    assert_ne!(visitor.state(), state);
    assert!(read(&visitor, &new).unwrap() == pages(&[14]));
    // The other one comes with a copy that somebody puts there by hand.
    moody.disk.write(&packs[4], &good);
    assert_eq!(lost(&visitor).0, [] as [usize; 0]);
}

#[test]
fn a_pack_whose_footer_is_damaged_is_looked_at_once_in_a_while() {
    let (store, moody) = moody();
    let root = take(&store, &[1, 2, 3]);
    let visitor = moody.visitor();
    let later = take(&store, &[4, 5]);
    let path = moody.disk.packs().remove(1);
    let good = moody.disk.bytes(&path);
    let mut bad = good.clone();
    // The last byte before the trailer.
    let at = bad.len() - crate::pack::TRAILER - 1;
    bad[at] ^= 1;
    moody.disk.replace(&path, &bad);
    assert!(read(&visitor, &later).unwrap_err().is_damage());
    let (state, opened) = (visitor.state(), moody.mood().opened);
    for _ in 0..20 {
        assert!(read(&visitor, &later).unwrap_err().is_damage());
    }
    assert!(moody.mood().opened <= opened + 2, "{} {opened}", moody.mood().opened);
    assert_eq!(visitor.state(), state);
    moody.disk.replace(&path, &good);
    std::thread::sleep(Duration::from_millis(1100));
    assert!(read(&visitor, &later).unwrap() == pages(&[4, 5]));
    assert!(read(&visitor, &root).unwrap() == pages(&[1, 2, 3]));
}
