//! Maps built from others, and where two differ: held against maps built whole.

use proptest::prelude::*;

use super::{names, pages};
use crate::*;

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path().join("store"), GroupKey::generate().unwrap()).unwrap();
    (dir, store)
}

fn take(store: &Store, numbers: &[u64]) -> MapRoot {
    let session = store.begin().unwrap();
    let mut hashes = names(numbers.len());
    session.put(&pages(numbers), &mut hashes).unwrap();
    let root = session.put_map(&hashes).unwrap();
    session.commit().unwrap();
    root
}

/// Puts the leaves in which `numbers` differ from what `base` was made of, and makes the map from it.
fn change(store: &Store, base: &MapRoot, before: &[u64], numbers: &[u64]) -> MapRoot {
    let session = store.begin().unwrap();
    let mut leaves = Vec::new();
    for (number, (old, new)) in before.chunks(LEAF_PAGES).zip(numbers.chunks(LEAF_PAGES)).enumerate() {
        if old != new {
            let (mut hashes, mut leaf) = (names(new.len()), names(1));
            session.put(&pages(new), &mut hashes).unwrap();
            session.put_leaves(&hashes, &mut leaf).unwrap();
            leaves.push((number as u64, leaf[0]));
        }
    }
    let root = session.put_map_changed(base, &leaves).unwrap();
    session.commit().unwrap();
    root
}

fn differences(store: &Store, one: &MapRoot, other: &MapRoot) -> Vec<u64> {
    let mut found = Vec::new();
    store
        .differences(one, other, &mut |range| {
            assert!(found.last().is_none_or(|last| *last < range.start) && !range.is_empty());
            found.extend(range);
            true
        })
        .unwrap();
    found
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn a_changed_map_is_the_map_of_what_it_became(
        count in prop_oneof![1usize..70, 4000usize..4200],
        mut before in proptest::collection::vec(0u64..4, 4200),
        changes in proptest::collection::vec((0usize..4200, 0u64..4), 0..40),
    ) {
        let (_dir, store) = store();
        before.truncate(count);
        let mut after = before.clone();
        changes.iter().filter(|(at, _)| *at < count).for_each(|(at, page)| after[*at] = *page);
        let (base, whole) = (take(&store, &before), take(&store, &after));
        prop_assert_eq!(change(&store, &base, &before, &after), whole);
        let expected: Vec<u64> =
            (0..count).filter(|i| before[*i] != after[*i]).map(|i| i as u64).collect();
        prop_assert_eq!(differences(&store, &base, &whole), expected.clone());
        prop_assert_eq!(differences(&store, &whole, &base), expected);
        let empty = MapRoot { node: PageHash::ZERO, pages: base.pages };
        prop_assert_eq!(change(&store, &empty, &vec![0; count], &after), whole);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (_dir, store) = store();
    let (base, longer) = (take(&store, &[1; 200]), take(&store, &[1; 201]));
    let session = store.begin().unwrap();
    let (mut hashes, mut leaf) = (names(1), names(1));
    session.put(&pages(&[7]), &mut hashes).unwrap();
    session.put_leaves(&hashes, &mut leaf).unwrap();
    for leaves in [vec![(4, leaf[0])], vec![(2, leaf[0]), (1, leaf[0])], vec![(1, leaf[0]), (1, leaf[0])]] {
        assert!(matches!(session.put_map_changed(&base, &leaves), Err(Error::Misuse(_))), "{leaves:?}");
    }
    let strange = PageHash([3; 32]);
    assert!(matches!(session.put_map_changed(&base, &[(1, strange)]), Err(Error::Missing { .. })));
    assert_eq!(session.put_map_changed(&base, &[]).unwrap(), base);
    assert!(store.differences(&base, &longer, &mut |_| true).is_err());
    let mut first = None;
    let other = take(&store, &[2; 200]);
    store.differences(&base, &other, &mut |range| first.replace(range).is_some()).unwrap();
    assert_eq!(first, Some(0..64), "stopped after the first");
}
