//! Stores of every version of the format, as they were written once: later versions read them.

use std::fs;
use std::path::Path;

use crate::*;

fn page(n: u64) -> Vec<u8> {
    let mut page = vec![n as u8; PAGE_SIZE];
    if n > 20 {
        blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().fill(&mut page);
    }
    page
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to)
        } else {
            drop(fs::copy(entry.path(), to))
        }
    }
}

/// What `examples/fixture.rs` puts into each.
fn numbers() -> [(&'static str, Vec<u64>); 3] {
    [
        ("first", (1..=40).chain([0; 40]).chain([41]).collect()),
        ("second", (1..=20).chain(100..120).collect()),
        ("third", (200..=205).chain([50]).collect()),
    ]
}

#[test]
fn every_version_is_read() {
    for version in ["v1", "v2"] {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/tests/fixtures").join(version);
        let folder = tempfile::tempdir().unwrap();
        copy(&fixture, folder.path());
        let roots = fs::read_to_string(fixture.join("roots.txt")).unwrap();
        let key = GroupKey::load(&folder.path().join("key")).unwrap();
        let store = Store::open(folder.path(), key).unwrap();
        let mut kept = Vec::new();
        for (line, (name, numbers)) in roots.lines().zip(numbers()) {
            let root: MapRoot = serde_json::from_str(line.strip_prefix(name).unwrap()).unwrap();
            let mut names = vec![PageHash::ZERO; numbers.len()];
            store.map_range(&root, 0, &mut names).unwrap();
            let mut out = vec![0; names.len() * PAGE_SIZE];
            store.read(&names, &mut out).unwrap();
            assert!(out == numbers.iter().flat_map(|n| page(*n)).collect::<Vec<_>>(), "{version}, {name}");
            kept.push((root, name.to_owned()));
        }
        assert_eq!(kept.len(), if version == "v1" { 2 } else { 3 });
        let report = store.fsck(&kept, &|_, _| true).unwrap();
        assert_eq!(report.damage, [], "{version}");
        // New writers lie beside old packs: what is known stays where it is, what goes is rewritten as of today.
        let session = store.begin().unwrap();
        let mut names = vec![PageHash::ZERO; 25];
        session.put(&(30..55).flat_map(page).collect::<Vec<_>>(), &mut names).unwrap();
        let third = session.put_map(&names).unwrap();
        let saved = session.commit().unwrap();
        let known = if version == "v1" { 12 } else { 13 };
        assert_eq!((saved.earlier + saved.other, saved.new), (known, 25 - known), "{version}");
        let plan = store.plan_gc(&[third]).unwrap();
        let done = store.run_gc(&plan, &|_, _| true).unwrap();
        assert!(done.rewritten + done.deleted >= 1, "{version}: {done:?}");
        let mut out = vec![0; 25 * PAGE_SIZE];
        store.read(&names, &mut out).unwrap();
        assert!(out == (30..55).flat_map(page).collect::<Vec<_>>());
    }
}
