//! Work on a few items side by side.

use std::thread;

use crate::sync::{Mutex, lock};

/// Threads at most: more syncs than that at once help no disk that we know.
const THREADS: usize = if cfg!(feature = "schedules") { 1 } else { 4 };

/// Runs `act` on every item; what it returned comes back in the order of the items. With fewer threads than there might be it takes
/// longer, and nothing else.
pub(crate) fn side_by_side<T: Send, R: Send>(
    items: impl ExactSizeIterator<Item = T> + Send,
    act: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let threads = items.len().min(THREADS);
    let (items, done) = (&Mutex::new(items.enumerate()), &Mutex::new(Vec::new()));
    let act = &act;
    let work = move || loop {
        // The lock is gone before the item is worked on.
        let next = lock(items).next();
        let Some((number, item)) = next else { return };
        let result = act(item);
        lock(done).push((number, result));
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            let _ = thread::Builder::new().name("pack".into()).spawn_scoped(scope, work);
        }
        work();
    });
    let mut done = std::mem::take(&mut *lock(done));
    done.sort_unstable_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order() {
        for count in [0, 1, 3, 50] {
            let squares = side_by_side(0..count, |n| n * n);
            assert_eq!(squares, (0..count).map(|n| n * n).collect::<Vec<_>>());
        }
    }
}
