//! Whoever may put pages into one group's store learns nothing of another's from how long it takes.
//!
//! Two stores in one process, as the server has them, one with a secret page and one without; a third group's store is asked for that
//! page. It would be told by time if names or anything kept by them were shared between groups. The control shows that the measurement
//! can see what there is to be seen: within a group a known page is faster than a new one, by far.

use std::time::Instant;

use pages::{GroupKey, PAGE_SIZE, PageHash, PageStore, Session, Store};

/// Rounds; in each of them every case is measured once, in an order that changes.
const ROUNDS: u64 = 10_000;

/// Every order, so that each case comes as often behind each other one: behind a page that was written all are slower.
const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

fn page(n: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE_SIZE];
    blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().fill(&mut page);
    page
}

fn store(folder: &tempfile::TempDir, key: u8) -> Store {
    Store::create(folder.path(), GroupKey::from_bytes([key; 32])).unwrap()
}

/// Puts pages and makes them durable.
fn give(store: &Store, numbers: std::ops::Range<u64>) {
    let session = store.begin().unwrap();
    let bytes: Vec<u8> = numbers.clone().flat_map(page).collect();
    session.put(&bytes, &mut vec![PageHash::ZERO; bytes.len() / PAGE_SIZE]).unwrap();
    session.commit().unwrap();
}

/// Nanoseconds that it takes to put a page.
fn time(session: &dyn Session, page: &[u8]) -> u64 {
    let mut name = [PageHash::ZERO];
    let start = Instant::now();
    session.put(page, &mut name).unwrap();
    start.elapsed().as_nanos() as u64
}

/// The chance that a time of `a` is above one of `b`: a half if they cannot be told apart (the statistic of Mann and Whitney, for which
/// it is nothing that some times are enormous).
fn above(a: &[u64], b: &[u64]) -> f64 {
    let mut b = b.to_vec();
    b.sort_unstable();
    let below = |time: &u64| {
        let (less, not_more) =
            (b.partition_point(|other| other < time), b.partition_point(|other| other <= time));
        (less + not_more) as f64 / 2.0
    };
    a.iter().map(below).sum::<f64>() / (a.len() * b.len()) as f64
}

/// Whether a page is one that only another group holds, or one that nobody does, is not to be seen; whether the own group holds it is.
#[test]
fn time_tells_nothing_of_another_group() {
    let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let (mine, theirs) = (store(&folders[0], 1), store(&folders[1], 2));
    // Each round has a page that they have, one that nobody has, and one that the own group has. All three are as new to the processor.
    let (secret, known, nobody) = (1_u64 << 32, 2_u64 << 32, 3_u64 << 32);
    for start in (0..ROUNDS).step_by(1000) {
        give(&theirs, secret + start..secret + start + 1000);
        give(&mine, known + start..known + start + 1000);
    }
    theirs.fold().unwrap();
    mine.fold().unwrap();
    let session = mine.begin().unwrap();
    let (mut held_by_them, mut held_by_nobody, mut held_by_us) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let cases = [secret, nobody, known].map(|first| page(first + round));
        for case in ORDERS[(round % 6) as usize] {
            let time = time(&*session, &cases[case]);
            [&mut held_by_them, &mut held_by_nobody, &mut held_by_us][case].push(time);
        }
    }
    let (others, own) = (above(&held_by_them, &held_by_nobody), above(&held_by_nobody, &held_by_us));
    println!("another group's above nobody's: {others}; nobody's above the own: {own}");
    // Chance alone makes 0.004 of it: what is allowed is ten times as much, and the control has to be ten times as much again.
    assert!((others - 0.5).abs() < 0.04, "another group's pages can be told by time: {others}");
    assert!(own > 0.9, "the measurement sees nothing at all: {own}");
}
