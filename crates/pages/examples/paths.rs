//! Does one of the store's hot paths a number of times, for `scripts/instructions.sh`, which counts the processor's instructions:
//! `paths FOLDER PATH TIMES`. Everything that the path needs is made first, whatever the number, so that what one time more costs is the
//! path's alone. `paths` without arguments names the paths; behind those that hash every page once it says `hashed`: what `hash` takes
//! is not theirs, and would hide the rest, being nine tenths of all.
//!
//! The pages are always the same ones, and so is the key: what is counted must not depend on chance.

use std::hint::black_box;
use std::path::{Path, PathBuf};

use pages::{GroupKey, LEAF_PAGES, MapRoot, PAGE_SIZE, PageHash, PageStore, Session, Store};

type Failure = Box<dyn std::error::Error>;

/// Pages of a run: 1 MiB, as a take puts them.
const RUN: usize = 256;
/// Runs that a path works on.
const RUNS: usize = 8;
/// Pages of the generated index; and names asked for at once.
const INDEXED: u64 = 200_000;
const NAMES: u64 = 10_000;

type Act = fn(&Path, usize) -> Result<(), Failure>;

const PATHS: [(&str, &str, Act); 7] = [
    ("hash", "", hash),
    ("put-known", "hashed", put_known),
    ("put-new", "hashed", put_new),
    ("read", "hashed", read),
    ("fsck", "hashed", fsck),
    ("look-up", "", look_up),
    ("map", "", map),
];

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [folder, path, times] = args.as_slice() else {
        PATHS.iter().for_each(|(name, hashed, _)| println!("{name} {hashed}"));
        return Ok(());
    };
    let (folder, times) = (PathBuf::from(folder), times.parse()?);
    let (.., act) = PATHS.iter().find(|(name, ..)| name == path).ok_or("no such path")?;
    act(&folder, times)
}

/// Different pages that cost little to make.
fn pages(seed: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![3; count * PAGE_SIZE];
    for (page, number) in bytes.chunks_exact_mut(PAGE_SIZE).zip(1_u64..) {
        page[..16].copy_from_slice(&(u128::from(seed) << 64 | u128::from(number)).to_le_bytes());
    }
    bytes
}

fn put_runs(session: &dyn Session, bytes: &[u8]) -> Result<Vec<PageHash>, Failure> {
    let mut names = vec![PageHash::ZERO; bytes.len() / PAGE_SIZE];
    let mut leaves = [PageHash::ZERO; RUN / LEAF_PAGES];
    for (names, bytes) in names.chunks_mut(RUN).zip(bytes.chunks(RUN * PAGE_SIZE)) {
        session.put_run(bytes, &[true; RUN], names, &mut leaves)?;
    }
    Ok(names)
}

/// A store with the pages of `seed`.
fn store_with(folder: &Path, bytes: &[u8]) -> Result<(Store, Vec<PageHash>, MapRoot), Failure> {
    let store = Store::create(folder, GroupKey::from_bytes([9; 32]))?;
    let session = store.begin()?;
    let names = put_runs(&*session, bytes)?;
    let root = session.put_map(&names)?;
    session.commit()?;
    Ok((store, names, root))
}

/// The hash of each page, and nothing else.
fn hash(_: &Path, times: usize) -> Result<(), Failure> {
    let bytes = pages(1, RUNS * RUN);
    for _ in 0..times {
        for bytes in bytes.chunks(RUN * PAGE_SIZE) {
            pages::bench::hash_side_by_side(&[7; 32], bytes, |name| {
                black_box(name);
            });
        }
    }
    Ok(())
}

/// A session that brings what the store has.
fn put_known(folder: &Path, times: usize) -> Result<(), Failure> {
    let bytes = pages(1, RUNS * RUN);
    let (store, ..) = store_with(folder, &bytes)?;
    for _ in 0..times {
        let session = store.begin()?;
        put_runs(&*session, &bytes)?;
        session.commit()?;
    }
    Ok(())
}

/// A session whose pages are all new.
fn put_new(folder: &Path, times: usize) -> Result<(), Failure> {
    let (store, ..) = store_with(folder, &pages(1, RUN))?;
    let mut bytes = pages(2, RUNS * RUN);
    for time in 0..times {
        bytes.chunks_exact_mut(PAGE_SIZE).for_each(|page| page[15] = time as u8);
        let session = store.begin()?;
        put_runs(&*session, &bytes)?;
        session.commit()?;
    }
    Ok(())
}

/// Ten thousand names, half of them known, in an index that lies in a file.
fn look_up(folder: &Path, times: usize) -> Result<(), Failure> {
    let key = GroupKey::from_bytes([9; 32]);
    pages::bench::make_synthetic(folder, &key, INDEXED)?;
    let store = Store::open(folder, key)?;
    let name = |i: u64| {
        pages::bench::synthetic_name(i.wrapping_mul(0x9E37_79B9) % INDEXED, INDEXED, i.is_multiple_of(2))
    };
    let names: Vec<PageHash> = (0..NAMES).map(name).collect();
    for _ in 0..times {
        if black_box(pages::bench::look_up(&store, &names)) as u64 != NAMES / 2 {
            return Err("half of the names are known".into());
        }
    }
    Ok(())
}

/// The map of an image of 512 MiB over the same few pages, all of its leaves different ones.
fn map(folder: &Path, times: usize) -> Result<(), Failure> {
    let bytes = pages(1, RUN);
    let (store, names, _) = store_with(folder, &bytes)?;
    for time in 0..times {
        let session = store.begin()?;
        let page = |i: usize| names[(i + i / LEAF_PAGES * (time + 1)) % RUN];
        session.put_map(&(0..131_072).map(page).collect::<Vec<_>>())?;
        session.commit()?;
    }
    Ok(())
}

/// A run of pages as they lie, found through their map.
fn read(folder: &Path, times: usize) -> Result<(), Failure> {
    let (store, _, root) = store_with(folder, &pages(1, RUNS * RUN))?;
    let (mut names, mut out) = (vec![PageHash::ZERO; RUN], vec![0; RUN * PAGE_SIZE]);
    for _ in 0..times {
        for run in 0..RUNS {
            store.map_range(&root, (run * RUN) as u64, &mut names)?;
            store.read(&names, &mut out)?;
        }
    }
    Ok(())
}

/// A check of everything.
fn fsck(folder: &Path, times: usize) -> Result<(), Failure> {
    let (store, _, root) = store_with(folder, &pages(1, RUNS * RUN))?;
    for _ in 0..times {
        let report = store.fsck(&[(root, "root".into())], &|_, _| true)?;
        if !report.damage.is_empty() {
            return Err("the store is damaged".into());
        }
    }
    Ok(())
}
