//! A second program reads our stores: `reader.py`, which was written from `docs/formats/pages.md` and knows nothing of this crate. What
//! it reads has to be what was stored, and it has to notice whatever is not as the page says.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use pages::{
    Cold, Extent, GcRequest, GroupKey, MapRoot, NewImage, Origin, PAGE_SIZE, PageHash, PageStore, Purpose,
    Store,
};

/// Python and zstd, or a word on standard error that nothing is tested. Where tests are run for everybody, both have to be there.
fn is_there() -> bool {
    let runs =
        |program: &str| Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success());
    let missing: Vec<&str> = ["python3", "zstd"].into_iter().filter(|program| !runs(program)).collect();
    if !missing.is_empty() {
        assert!(std::env::var_os("CI").is_none(), "CI lacks {missing:?}");
        eprintln!("SKIPPED: the second reader needs {missing:?}");
    }
    missing.is_empty()
}

fn reader(store: &Path, roots: &[MapRoot]) -> Output {
    let hex = |root: &MapRoot| root.node.0.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reader.py");
    let roots = roots.iter().map(|root| format!("{}:{}", hex(root), root.pages));
    Command::new("python3").arg("-B").arg(script).arg(store).args(roots).output().unwrap()
}

/// What the reader complains about; nothing if it is content.
fn complaint(store: &Path, roots: &[MapRoot]) -> Option<String> {
    let output = reader(store, roots);
    (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Numbers up to 20 make pages of one byte, others of noise; 0 is the zero page.
fn page(n: u64) -> Vec<u8> {
    let mut page = vec![n as u8; PAGE_SIZE];
    if n > 20 {
        blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().fill(&mut page);
    }
    page
}

fn take(store: &Store, origin: u8, numbers: &[u64]) -> MapRoot {
    let session = store.begin_for(&Purpose { origin: Origin([origin; 16]), images: Vec::new() }).unwrap();
    let mut names = vec![PageHash::ZERO; numbers.len()];
    session.put(&numbers.iter().flat_map(|n| page(*n)).collect::<Vec<_>>(), &mut names).unwrap();
    let root = session.put_map(&names).unwrap();
    session.commit().unwrap();
    root
}

/// The bytes of maps as the library reads them.
fn library(store: &Store, roots: &[MapRoot]) -> Vec<u8> {
    let image = |root: &MapRoot| {
        let mut names = vec![PageHash::ZERO; root.pages as usize];
        store.map_range(root, 0, &mut names).unwrap();
        let mut out = vec![0; names.len() * PAGE_SIZE];
        store.read(&names, &mut out).unwrap();
        out
    };
    roots.iter().flat_map(image).collect()
}

/// A store with packs of every kind of body, the index in files, and pages in more packs than one; and the maps.
fn fresh(folder: &Path) -> (Store, Vec<MapRoot>) {
    let store = Store::create(folder, GroupKey::from_bytes([11; 32])).unwrap();
    // Frames: of pages that can be compressed, of some that cannot, and a last one that is not full.
    let framed = take(&store, 1, &(1..=18).chain([0, 0, 7]).chain(30..55).collect::<Vec<_>>());
    let compress = Some(Cold { age: Duration::ZERO, level: 3 });
    let ask = || Ok::<_, pages::Error>(GcRequest { roots: vec![framed], compress, ..GcRequest::default() });
    let done = store.run_gc(&store.plan_gc_with(ask).unwrap(), &|_, _| true).unwrap();
    assert_eq!(done.compressed, 1);
    // An image whose length is no multiple of a page.
    let mut image: Vec<u8> = [200, 0, 201, 200, 202].into_iter().flat_map(page).collect();
    image.extend([9; 1000]);
    fs::write(folder.join("disk"), image).unwrap();
    let data = vec![Extent { offset: 0, bytes: 1 << 20 }];
    let new = NewImage { label: "the disk".into(), path: "disk".into(), private: false, seen: None, data };
    assert!(store.add_image(&new, &|_, _| true).unwrap());
    // Three levels, mostly zero, with a page on the image; then one that shares pages with all.
    let mut sparse = vec![0; 5000];
    for (at, number) in [(0, 300), (63, 201), (64, 301), (4095, 302), (4096, 200), (4999, 303)] {
        sparse[at] = number;
    }
    let sparse = take(&store, 2, &sparse);
    let shared = take(&store, 3, &(5..=10).chain([202, 303, 310, 0, 40]).collect::<Vec<_>>());
    store.fold().unwrap();
    (store, vec![framed, sparse, shared, MapRoot { node: PageHash::ZERO, pages: 3 }])
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to),
            false => drop(fs::copy(entry.path(), to).unwrap()),
        }
    }
}

/// A fixture, copied, and its maps.
fn fixture(version: &str, folder: &Path) -> Vec<MapRoot> {
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/tests/fixtures").join(version), folder);
    let roots = fs::read_to_string(folder.join("roots.txt")).unwrap();
    roots.lines().map(|line| serde_json::from_str(line.split_once(' ').unwrap().1).unwrap()).collect()
}

fn packs(store: &Path) -> Vec<PathBuf> {
    let mut packs: Vec<PathBuf> =
        fs::read_dir(store.join("packs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    packs.sort();
    packs
}

fn same_as_library(folder: &Path, store: &Store, roots: &[MapRoot]) {
    let output = reader(folder, roots);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout == library(store, roots), "other bytes than the library reads");
}

#[test]
fn a_second_program_reads_every_version() {
    if !is_there() {
        return;
    }
    for version in ["v1", "v2"] {
        let folder = tempfile::tempdir().unwrap();
        let roots = fixture(version, folder.path());
        let store = Store::open(folder.path(), GroupKey::load(&folder.path().join("key")).unwrap()).unwrap();
        same_as_library(folder.path(), &store, &roots);
    }
}

#[test]
fn a_second_program_reads_what_is_written_today() {
    if !is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (store, roots) = fresh(folder.path());
    same_as_library(folder.path(), &store, &roots);
    // What a collection and a new version of old packs leave, too.
    let ask = || {
        let (roots, leaving) = (roots[1..].to_vec(), vec!["the disk".into()]);
        Ok::<_, pages::Error>(GcRequest { roots, leaving, ..GcRequest::default() })
    };
    let done = store.run_gc(&store.plan_gc_with(ask).unwrap(), &|_, _| true).unwrap();
    assert_eq!(done.left, ["the disk"]);
    fs::remove_file(folder.path().join("disk")).unwrap();
    same_as_library(folder.path(), &store, &roots[1..]);
    assert!(complaint(folder.path(), &roots).is_some_and(|why| why.contains("is missing")));
}

/// The reader checks everything: a bit of any part of a pack of any kind, of an image, and of the key.
#[test]
fn the_second_program_notices_a_flipped_bit() {
    if !is_there() {
        return;
    }
    for version in ["v1", "v2", "today"] {
        let folder = tempfile::tempdir().unwrap();
        match version {
            "today" => drop(fresh(folder.path())),
            _ => drop(fixture(version, folder.path())),
        }
        assert_eq!(complaint(folder.path(), &[]), None);
        let flip = |path: &Path, at: usize| {
            let bytes = fs::read(path).unwrap();
            let mut changed = bytes.clone();
            changed[at] ^= 0x10;
            fs::write(path, changed).unwrap();
            assert!(complaint(folder.path(), &[]).is_some(), "{version}, {}: byte {at}", path.display());
            fs::write(path, bytes).unwrap();
        };
        // One pack for each kind of body. Of version 2 there are frames and an image, of version 1 only pages as they are.
        let mut seen = Vec::new();
        for pack in packs(folder.path()) {
            let bytes = fs::read(&pack).unwrap();
            if (version == "today") != (bytes[56] == 0) && version != "v1" || seen.contains(&bytes[56]) {
                continue;
            }
            seen.push(bytes[56]);
            // Header, start of the body or of what comes without one, somewhere behind it, trailer.
            for at in [4000, 4100, bytes.len() / 2 + 2048, bytes.len() - 40] {
                flip(&pack, at);
            }
        }
        assert_eq!(seen.len(), if version == "v2" { 2 } else { 1 });
        if version == "v2" {
            flip(&folder.path().join("image"), 10);
            flip(&folder.path().join("key"), 20);
        }
    }
}

#[test]
fn the_second_program_refuses_what_is_newer() {
    if !is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fixture("v2", folder.path());
    let pack = packs(folder.path()).remove(0);
    let mut bytes = fs::read(&pack).unwrap();
    bytes[8] = 3;
    let checksum = *blake3::hash(&bytes[..4064]).as_bytes();
    bytes[4064..4096].copy_from_slice(&checksum);
    fs::write(&pack, bytes).unwrap();
    assert!(complaint(folder.path(), &[]).is_some_and(|why| why.contains("newer")));
}
