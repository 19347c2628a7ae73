//! The store against a plain map: random takes, sessions that stay open across collections, plans that are carried out
//! late, reopening.

use std::path::PathBuf;
use std::sync::Arc;

use proptest::prelude::*;

use super::crash_disk::CrashDisk;
use super::{SMALL, check_all, names, pages};
use crate::*;

#[derive(Clone, Debug)]
enum Step {
    /// Put pages in the open session, beginning one if there is none.
    Put(Vec<u64>),
    /// Map all that was put, and commit.
    Commit,
    Drop,
    /// Put, map and commit in one go.
    Take(Vec<u64>),
    /// Map pages of a root without putting them again.
    Fork(usize, usize),
    Forget(usize),
    Plan,
    Run,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let numbers = || prop::collection::vec(0..60u64, 0..150);
    prop_oneof![
        3 => numbers().prop_map(Step::Put),
        2 => Just(Step::Commit),
        1 => Just(Step::Drop),
        3 => numbers().prop_map(Step::Take),
        1 => (any::<usize>(), 1..200usize).prop_map(|(root, n)| Step::Fork(root, n)),
        3 => any::<usize>().prop_map(Step::Forget),
        3 => Just(Step::Plan),
        3 => Just(Step::Run),
        1 => Just(Step::Reopen),
    ]
}

/// A session, the numbers of the pages put so far, and their names.
type OpenSession = (Box<dyn Session>, Vec<u64>, Vec<PageHash>);

struct World {
    disk: CrashDisk,
    store: Store,
    session: Option<OpenSession>,
    plan: Option<GcPlan>,
    kept: Vec<(MapRoot, Vec<u64>)>,
}

fn open(disk: &CrashDisk) -> Store {
    let key = GroupKey::from_bytes([3; 32]);
    Store::open_on(Arc::new(disk.clone()), PathBuf::from("/"), &key, SMALL, None).unwrap()
}

impl World {
    fn new() -> Self {
        let disk = CrashDisk::default();
        Self { store: open(&disk), disk, session: None, plan: None, kept: Vec::new() }
    }

    fn step(&mut self, step: Step) -> Result<()> {
        match step {
            Step::Put(numbers) => {
                let (session, all, hashes) = match &mut self.session {
                    Some(open) => open,
                    None => self.session.insert((self.store.begin()?, Vec::new(), Vec::new())),
                };
                let mut own = names(numbers.len());
                session.put(&pages(&numbers), &mut own)?;
                all.extend(numbers);
                hashes.extend(own);
            }
            Step::Commit => {
                if let Some((session, numbers, hashes)) = self.session.take() {
                    let root = session.put_map(&hashes)?;
                    session.commit()?;
                    self.kept.push((root, numbers));
                }
            }
            Step::Drop => self.session = None,
            Step::Take(numbers) => {
                let session = self.store.begin()?;
                let mut hashes = names(numbers.len());
                session.put(&pages(&numbers), &mut hashes)?;
                let root = session.put_map(&hashes)?;
                let saved = session.commit()?;
                prop_saved(&saved, &numbers);
                self.kept.push((root, numbers));
            }
            Step::Fork(at, n) => {
                if let Some((root, numbers)) = self.kept.get(at % self.kept.len().max(1)) {
                    let n = n.min(numbers.len());
                    let mut hashes = names(n);
                    self.store.map_range(root, 0, &mut hashes)?;
                    let session = self.store.begin()?;
                    let root = session.put_map(&hashes)?;
                    session.commit()?;
                    self.kept.push((root, numbers[..n].to_vec()));
                }
            }
            Step::Forget(at) => {
                if !self.kept.is_empty() {
                    self.kept.swap_remove(at % self.kept.len());
                }
            }
            Step::Plan => {
                let roots: Vec<MapRoot> = self.kept.iter().map(|(root, _)| *root).collect();
                self.plan = Some(self.store.plan_gc(&roots)?);
            }
            Step::Run => {
                if let Some(plan) = self.plan.take() {
                    self.store.run_gc(&plan, &|_, _| true)?;
                }
            }
            Step::Reopen => {
                self.session = None;
                self.plan = None;
                self.store = open(&self.disk);
            }
        }
        Ok(())
    }
}

fn prop_saved(saved: &Saved, numbers: &[u64]) {
    assert_eq!(saved.zero + saved.same + saved.earlier + saved.new, numbers.len() as u64);
    assert_eq!(saved.zero, numbers.iter().filter(|n| **n == 0).count() as u64);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_a_map(steps in prop::collection::vec(step(), 1..40)) {
        let mut world = World::new();
        for step in steps {
            let shown = format!("{step:?}");
            world.step(step).map_err(|e| TestCaseError::fail(format!("{shown}: {e}")))?;
            check_all(&world.store, &world.kept).map_err(|e| TestCaseError::fail(format!("after {shown}: {e}")))?;
        }
        // Whatever happened: with no root left, nothing is left.
        world.session = None;
        let plan = world.store.plan_gc(&[])?;
        world.store.run_gc(&plan, &|_, _| true)?;
        prop_assert_eq!((world.store.pack_count(), world.store.page_count()), (0, 0));
        prop_assert!(world.disk.paths().is_empty());
    }
}
