//! How fast a session takes pages in and gives them back: `throughput DIR [MIB] [THREADS]`.
//!
//! Puts MIB mebibytes of different pages in batches of 1 MiB from THREADS threads, maps and commits them, puts the same
//! again (all known), and reads everything back. DIR is made and removed.

use std::path::PathBuf;
use std::time::Instant;

use pages::{GroupKey, PAGE_SIZE, PageHash, PageStore, Store};

const BATCH: usize = 256;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let dir =
        PathBuf::from(args.next().ok_or("usage: throughput DIR [MIB] [THREADS]")?).join("throughput-store");
    let mib: usize = args.next().map_or(Ok(1024), |n| n.parse())?;
    let threads: usize = args.next().map_or(Ok(2), |n| n.parse())?;
    let store = Store::create(&dir, GroupKey::generate()?)?;

    // Different pages that cost nothing to make: a random stream, written over and over with a number in each page.
    let mut memory = vec![0u8; mib << 20];
    for (i, page) in memory.chunks_mut(PAGE_SIZE).enumerate() {
        page.fill(i as u8 | 1);
        if let Some(number) = page.first_chunk_mut::<8>() {
            *number = (i as u64 + 1).to_le_bytes();
        }
    }
    let mut names = vec![PageHash::ZERO; memory.len() / PAGE_SIZE];
    let report = |what: &str, start: Instant| {
        let seconds = start.elapsed().as_secs_f64();
        println!("{what:<24} {seconds:7.3} s {:8.0} MiB/s", mib as f64 / seconds);
    };

    let start = Instant::now();
    let key = [7; 32];
    let sum =
        memory.chunks(PAGE_SIZE).fold(0u8, |sum, page| sum ^ blake3::keyed_hash(&key, page).as_bytes()[0]);
    report("BLAKE3 alone, one thread", start);
    std::hint::black_box(sum);

    for (round, what) in ["new", "known"].iter().enumerate() {
        let session = store.begin()?;
        let start = Instant::now();
        let share = names.len().div_ceil(threads).next_multiple_of(BATCH);
        let mut worst = std::time::Duration::ZERO;
        std::thread::scope(|scope| -> pages::Result<()> {
            let parts = names.chunks_mut(share).zip(memory.chunks(share * PAGE_SIZE));
            let workers: Vec<_> = parts
                .map(|(names, bytes)| {
                    let session = &session;
                    scope.spawn(move || -> pages::Result<_> {
                        let mut worst = std::time::Duration::ZERO;
                        for (names, bytes) in names.chunks_mut(BATCH).zip(bytes.chunks(BATCH * PAGE_SIZE)) {
                            let start = Instant::now();
                            session.put(bytes, names)?;
                            worst = worst.max(start.elapsed());
                        }
                        Ok(worst)
                    })
                })
                .collect();
            for worker in workers {
                if let Ok(result) = worker.join() {
                    worst = worst.max(result?);
                }
            }
            Ok(())
        })?;
        report(&format!("put, {what}"), start);
        println!("  slowest put {worst:?}");
        let start = Instant::now();
        let root = session.put_map(&names)?;
        report("put_map", start);
        let start = Instant::now();
        let saved = session.commit()?;
        report("commit", start);
        println!("  {saved:?}");
        if round == 1 {
            let mut out = vec![0; BATCH * PAGE_SIZE];
            let mut hashes = vec![PageHash::ZERO; BATCH];
            let start = Instant::now();
            for first in (0..root.pages).step_by(BATCH) {
                store.map_range(&root, first, &mut hashes)?;
                store.read(&hashes, &mut out)?;
            }
            report("read in order", start);
        }
    }
    drop(store);
    let start = Instant::now();
    let store = Store::open(&dir, GroupKey::load(&dir.join("key"))?)?;
    report("open", start);
    drop(store);
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}
