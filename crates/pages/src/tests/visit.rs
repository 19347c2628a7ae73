//! A visitor beside the store's own process: takes, collections, compression, damage and repair go on while it reads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::{names, pages};
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
