//! Writes the small store that is kept in `src/tests/fixtures` for every version of the format: `fixture FOLDER`.
//!
//! Key: 32 times 0x07. Sessions, each a map: pages 1 to 40 and forty zero pages and page 41; then pages 1 to 20 with 100 to 119. From
//! version 2 on these two packs are compressed then, and a third map has pages 200 to 205, which are blocks of the file `image`, and 50.
//! Page `n` is what BLAKE3 makes of `n` (8 bytes, little-endian), drawn out to 4,096 bytes, for `n` above 20; below it is `n` repeated.

use std::path::Path;
use std::time::Duration;

use pages::{Cold, Extent, GcRequest, GroupKey, MapRoot, NewImage, PAGE_SIZE, PageHash, PageStore, Store};

fn page(n: u64) -> Vec<u8> {
    let mut page = vec![n as u8; PAGE_SIZE];
    if n > 20 {
        blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().fill(&mut page);
    }
    page
}

fn take(store: &Store, numbers: &[u64]) -> pages::Result<MapRoot> {
    let session = store.begin()?;
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| page(*n)).collect();
    let mut names = vec![PageHash::ZERO; numbers.len()];
    session.put(&bytes, &mut names)?;
    let root = session.put_map(&names)?;
    session.commit()?;
    Ok(root)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args().nth(1).ok_or("usage: fixture FOLDER")?;
    let store = Store::create(&folder, GroupKey::from_bytes([7; 32]))?;
    let first: Vec<u64> = (1..=40).chain([0; 40]).chain([41]).collect();
    let second: Vec<u64> = (1..=20).chain(100..120).collect();
    let roots = vec![take(&store, &first)?, take(&store, &second)?];
    let compress = Some(Cold { age: Duration::ZERO, level: 3 });
    let request = GcRequest { roots: roots.clone(), compress, ..GcRequest::default() };
    let plan = store.plan_gc_with(|| Ok::<_, pages::Error>(request))?;
    store.run_gc(&plan, &|_, _| true)?;
    std::fs::write(Path::new(&folder).join("image"), (200..210).flat_map(page).collect::<Vec<_>>())?;
    let data = vec![Extent { offset: 0, bytes: 10 * PAGE_SIZE as u64 }];
    let image = NewImage { label: "image".into(), path: "image".into(), private: false, seen: None, data };
    store.add_image(&image, &|_, _| true)?;
    let third = take(&store, &[200, 201, 202, 203, 204, 205, 50])?;
    for (name, root) in ["first", "second", "third"].iter().zip(roots.iter().chain([&third])) {
        println!("{name} {}", serde_json::to_string(root)?);
    }
    Ok(())
}
