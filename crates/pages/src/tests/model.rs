//! The store against a plain map: any set of kept snapshots survives any interleaving of takes, forgetting, collections, folds, images
//! that come and go, repairs, crashes and openings. What is damaged on purpose may be lost; then it is reported, and never are other
//! bytes read than were put.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::crash_disk::{CrashDisk, Survive};
use super::{SMALL, names, pages};
use crate::map::Forest;
use crate::pack::{Body, Entry, HEADER, PackId, read_footer, read_layout};
use crate::*;

#[derive(Clone, Debug)]
enum Step {
    /// Put pages in the open session, beginning one if there is none; it may rely on the private image if it is told so.
    Put(Vec<u64>, bool),
    /// Map all that was put, and commit.
    Commit,
    Drop,
    /// Put, map and commit in one go.
    Take(Vec<u64>, bool),
    /// Map pages of a root without putting them again.
    Fork(usize, usize),
    Forget(usize),
    Plan {
        compress: bool,
    },
    Run,
    Fold,
    /// Name the blocks of an image.
    Add(Image),
    /// Have nothing left on an image, and remove its file when the store says so.
    Leave(Image),
    Reopen,
    /// The power fails; what was not synced survives by the toss of a coin.
    Crash(u64),
    /// A bit of a pack is flipped.
    Damage(usize, usize),
    /// A user edits his image.
    Edit(usize),
    Repair,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Image {
    Shared,
    Private,
}

impl Image {
    fn label(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Private => "private",
        }
    }

    fn path(self) -> PathBuf {
        Path::new("/layers").join(self.label())
    }

    fn numbers(self) -> Vec<u64> {
        match self {
            Self::Shared => (10..30).chain([0, 0]).chain(30..40).collect(),
            Self::Private => (35..55).chain([35, 0]).collect(),
        }
    }
}

/// Any step; with none that damages anything, unless there is to be harm.
fn step(harm: bool) -> impl Strategy<Value = Step> {
    let numbers = || prop::collection::vec(0..60u64, 0..100);
    let image = || prop_oneof![Just(Image::Shared), Just(Image::Private)];
    prop_oneof![
        3 => (numbers(), any::<bool>()).prop_map(|(numbers, on)| Step::Put(numbers, on)),
        2 => Just(Step::Commit),
        1 => Just(Step::Drop),
        4 => (numbers(), any::<bool>()).prop_map(|(numbers, on)| Step::Take(numbers, on)),
        1 => (any::<usize>(), 1..200usize).prop_map(|(root, n)| Step::Fork(root, n)),
        4 => any::<usize>().prop_map(Step::Forget),
        3 => any::<bool>().prop_map(|compress| Step::Plan { compress }),
        3 => Just(Step::Run),
        2 => Just(Step::Fold),
        2 => image().prop_map(Step::Add),
        2 => image().prop_map(Step::Leave),
        1 => Just(Step::Reopen),
        2 => any::<u64>().prop_map(Step::Crash),
        2 => (any::<usize>(), any::<usize>()).prop_map(move |(pack, at)| match harm {
            true => Step::Damage(pack, at),
            false => Step::Fold,
        }),
        2 => any::<usize>().prop_map(move |at| if harm { Step::Edit(at) } else { Step::Repair }),
        2 => Just(Step::Repair),
    ]
}

/// A session, the numbers of the pages put so far, their names, and what keeps them.
type OpenSession = (Box<dyn Session>, Vec<u64>, Vec<PageHash>, Hold);

struct Kept {
    root: MapRoot,
    numbers: Vec<u64>,
    /// What it needs: pages and nodes.
    needs: HashSet<Fingerprint>,
}

struct World {
    disk: CrashDisk,
    store: Store,
    session: Option<OpenSession>,
    plan: Option<GcPlan>,
    kept: Vec<Kept>,
    /// A copy of these was damaged on purpose. A collector may keep just that one: it does not read what it leaves where it is.
    harmed: HashSet<Fingerprint>,
}

fn open(disk: &CrashDisk) -> Result<Store> {
    let key = GroupKey::from_bytes([3; 32]);
    Store::open_on(Arc::new(disk.clone()), PathBuf::from("/"), &key, SMALL, None)
}

/// What a map reads as: true if it is right, false if it cannot be read.
///
/// # Panics
/// It reads as something else.
fn reads(store: &Store, root: &MapRoot, numbers: &[u64]) -> bool {
    let mut hashes = names(numbers.len());
    let mut out = vec![0xee; numbers.len() * PAGE_SIZE];
    match store.map_range(root, 0, &mut hashes).and_then(|()| store.read(&hashes, &mut out)) {
        Ok(()) => {
            assert!(out == pages(numbers), "{root:?}: other bytes than were put");
            true
        }
        Err(e) => {
            assert!(e.is_damage(), "{root:?}: {e}");
            false
        }
    }
}

impl World {
    fn new() -> Self {
        let disk = CrashDisk::default();
        let store = open(&disk).unwrap();
        Self { store, disk, session: None, plan: None, kept: Vec::new(), harmed: HashSet::new() }
    }

    fn roots(&self) -> Vec<MapRoot> {
        self.kept.iter().map(|kept| kept.root).collect()
    }

    fn purpose(on_private: bool) -> Purpose {
        let images = if on_private { vec![Image::Private.label().to_owned()] } else { Vec::new() };
        Purpose { origin: Origin([1; 16]), images }
    }

    /// Damage may be met by whatever is done, if there is any.
    fn forgive<T>(&self, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(done) => Ok(Some(done)),
            Err(e) if !self.harmed.is_empty() && (e.is_damage() || matches!(e, Error::SessionFailed)) => {
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// A root is recorded, if nothing that it may need was given up.
    fn keep(&mut self, root: MapRoot, hashes: &[PageHash], numbers: Vec<u64>, hold: &Hold) {
        if hold.check().is_ok() {
            let forest = Forest::read(&self.store.inner, &[root]).unwrap();
            let nodes = forest.nodes().iter().map(|node| node.name);
            let missing = forest.missing.iter().map(|missing| missing.name);
            let needs = hashes.iter().copied().chain(nodes).chain(missing).map(|name| name.fingerprint());
            self.kept.push(Kept { root, needs: needs.collect(), numbers });
        } else {
            assert!(!self.harmed.is_empty(), "something was given up, and nothing was damaged");
        }
    }

    fn step(&mut self, step: Step) -> Result<()> {
        match step {
            Step::Put(numbers, on) => {
                let (session, all, hashes, _) = match &mut self.session {
                    Some(open) => open,
                    None => {
                        let hold = self.store.hold();
                        let session = self.store.begin_for(&Self::purpose(on))?;
                        self.session.insert((session, Vec::new(), Vec::new(), hold))
                    }
                };
                let mut own = names(numbers.len());
                session.put(&pages(&numbers), &mut own)?;
                all.extend(numbers);
                hashes.extend(own);
            }
            Step::Commit => {
                if let Some((session, numbers, hashes, hold)) = self.session.take() {
                    let done = session.put_map(&hashes).and_then(|root| session.commit().map(|_| root));
                    if let Some(root) = self.forgive(done)? {
                        self.keep(root, &hashes, numbers, &hold);
                    }
                }
            }
            Step::Drop => self.session = None,
            Step::Take(numbers, on) => {
                let hold = self.store.hold();
                let session = self.store.begin_for(&Self::purpose(on))?;
                let mut hashes = names(numbers.len());
                session.put(&pages(&numbers), &mut hashes)?;
                let done = session.put_map(&hashes).and_then(|root| Ok((root, session.commit()?)));
                if let Some((root, saved)) = self.forgive(done)? {
                    check_saved(&saved, &numbers);
                    self.keep(root, &hashes, numbers, &hold);
                }
            }
            Step::Fork(at, n) => {
                if let Some(Kept { root, numbers, .. }) = self.kept.get(at % self.kept.len().max(1)) {
                    let numbers = numbers[..n.min(numbers.len())].to_vec();
                    let mut hashes = names(numbers.len());
                    let hold = self.store.hold();
                    let done = self.store.map_range(root, 0, &mut hashes).and_then(|()| {
                        // Whoever forks depends on what the other depends on.
                        let session = self.store.begin_for(&Self::purpose(true))?;
                        let root = session.put_map(&hashes)?;
                        session.commit().map(|_| root)
                    });
                    // A user's image that has changed is not relied on any more, even where the block is as it was.
                    if let Some(root) = self.forgive(done)? {
                        self.keep(root, &hashes, numbers, &hold);
                    }
                }
            }
            Step::Forget(at) => {
                if !self.kept.is_empty() {
                    self.kept.swap_remove(at % self.kept.len());
                }
            }
            Step::Plan { compress } => {
                let compress = compress.then_some(Cold { age: Duration::ZERO, level: 1 });
                let request =
                    GcRequest { roots: self.roots(), compress, thorough: true, ..GcRequest::default() };
                self.plan = self.forgive(self.store.plan_gc_with(|| Ok::<_, Error>(request)))?;
            }
            Step::Run => {
                if let Some(plan) = self.plan.take() {
                    self.store.run_gc(&plan, &|_, _| true)?;
                }
            }
            Step::Fold => self.store.fold()?,
            Step::Add(image) => {
                if self.disk.exists(&image.path()) {
                    return Ok(());
                }
                self.disk.write(&image.path(), &pages(&image.numbers()));
                let data = vec![Extent { offset: 0, bytes: 1 << 20 }];
                let private = image == Image::Private;
                let new =
                    NewImage { label: image.label().into(), path: image.path(), private, seen: None, data };
                assert!(self.store.add_image(&new, &|_, _| true)?);
            }
            Step::Leave(image) => {
                let leaving = vec![image.label().to_owned()];
                let request = GcRequest { roots: self.roots(), leaving, ..GcRequest::default() };
                if let Some(plan) = self.forgive(self.store.plan_gc_with(|| Ok::<_, Error>(request)))? {
                    let done = self.store.run_gc(&plan, &|_, _| true)?;
                    if done.left == [image.label()] && self.disk.exists(&image.path()) {
                        disk::Disk::remove(&self.disk, &image.path()).unwrap();
                    }
                }
            }
            Step::Reopen => self.open_again(self.disk.clone())?,
            Step::Crash(seed) => self.open_again(self.disk.after_crash(Survive::Some(seed)))?,
            Step::Damage(pack, at) => {
                let packs = self.disk.packs();
                if let Some(path) = packs.get(pack % packs.len().max(1)) {
                    let harmed = self.lies_at(path, at);
                    self.harmed.extend(harmed);
                    self.flip(path, at);
                }
            }
            Step::Edit(at) => {
                if self.disk.exists(&Image::Private.path()) {
                    let numbers = Image::Private.numbers();
                    let number = numbers[at % (numbers.len() * PAGE_SIZE) / PAGE_SIZE];
                    let name = self.store.inner.names.page(&pages(&[number]).try_into().unwrap());
                    self.harmed.insert(name.fingerprint());
                    self.flip(&Image::Private.path(), at);
                }
            }
            Step::Repair => {
                self.store.repair(&self.roots(), &|| true)?;
            }
        }
        Ok(())
    }

    fn flip(&mut self, path: &Path, at: usize) {
        let mut bytes = self.disk.bytes(path);
        let len = bytes.len();
        bytes[at % len] ^= 1 << (at % 8);
        self.disk.replace(path, &bytes);
    }

    /// What a byte of a pack belongs to: a page, the pages of frames, the nodes, or all of it.
    fn lies_at(&self, path: &Path, at: usize) -> HashSet<Fingerprint> {
        let file = disk::Disk::open(&self.disk, path).unwrap();
        let id = u64::from_str_radix(path.file_stem().unwrap().to_str().unwrap(), 16).unwrap();
        let layout = read_layout(&*file, PackId(id), &self.store.inner.names.fingerprint);
        // What cannot be read was all of it damaged before.
        let Ok(layout) = layout else { return HashSet::new() };
        let Ok(entries) = read_footer(&*file, &layout) else { return HashSet::new() };
        let at = at as u64 % layout.len;
        let is_hit = |entry: &Entry| match entry.at.slot() {
            _ if at < HEADER || at >= layout.node_end => true,
            Some(slot) if at < layout.node_offset => {
                layout.body != Body::Raw || u64::from(slot) == (at - HEADER) / PAGE_SIZE as u64
            }
            slot => slot.is_none() && at >= layout.node_offset,
        };
        entries.iter().filter(|entry| is_hit(entry)).map(|entry| entry.name).collect()
    }

    fn open_again(&mut self, disk: CrashDisk) -> Result<()> {
        self.session = None;
        self.plan = None;
        self.store = open(&disk)?;
        self.disk = disk;
        Ok(())
    }

    fn check(&self) {
        for kept in &self.kept {
            let fine = reads(&self.store, &kept.root, &kept.numbers);
            assert!(fine || !kept.needs.is_disjoint(&self.harmed), "{:?} is lost", kept.root);
        }
    }

    /// Whatever cannot be read is in the report, and named.
    fn check_report(&self) {
        let labels = (0..).map(|n: u32| n.to_string());
        let roots: Vec<_> = self.roots().into_iter().zip(labels).collect();
        let report = self.store.fsck(&roots, &|_, _| true).unwrap();
        for (kept, (_, label)) in self.kept.iter().zip(&roots) {
            let named = report.damage.iter().any(|damage| damage.labels.contains(label));
            let fine = reads(&self.store, &kept.root, &kept.numbers);
            assert!(fine || named, "{:?} cannot be read, and the report does not say so", kept.root);
        }
        assert!(!self.harmed.is_empty() || report.damage.is_empty(), "{report:?}");
    }
}

fn check_saved(saved: &Saved, numbers: &[u64]) {
    let sum = saved.zero + saved.same + saved.earlier + saved.other + saved.disk + saved.new;
    assert_eq!(sum, numbers.len() as u64);
    assert_eq!(saved.zero, numbers.iter().filter(|n| **n == 0).count() as u64);
}

fn play(steps: Vec<Step>) -> std::result::Result<(), TestCaseError> {
    let mut world = World::new();
    for step in steps {
        let shown = format!("{step:?}");
        world.step(step).map_err(|e| TestCaseError::fail(format!("{shown}: {e}")))?;
        world.check();
    }
    world.check_report();
    world.open_again(world.disk.clone())?;
    world.check();
    world.check_report();
    if world.harmed.is_empty() {
        // Whatever happened: with no root left, nothing is left.
        let leaving = vec![Image::Shared.label().into(), Image::Private.label().into()];
        let request = GcRequest { leaving, ..GcRequest::default() };
        let plan = world.store.plan_gc_with(|| Ok::<_, Error>(request))?;
        world.store.run_gc(&plan, &|_, _| true)?;
        prop_assert_eq!((world.store.pack_count(), world.store.page_count()), (0, 0));
        prop_assert!(world.disk.paths().iter().all(|path| path.starts_with("/layers")));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn what_is_kept_survives_anything(steps in prop::collection::vec(step(false), 1..50)) {
        play(steps)?;
    }

    #[test]
    fn what_is_damaged_is_reported_and_nothing_else_is_lost(steps in prop::collection::vec(step(true), 1..50)) {
        play(steps)?;
    }
}
