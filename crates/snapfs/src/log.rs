//! Saying something seldom: what befalls one read befalls many, and each of them again and again.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The same is said again after so long.
const AGAIN: Duration = Duration::from_secs(600);
/// Different things of one kind that are said in that time at most.
const MOST: usize = 200;

/// Kinds of things that are said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Saying {
    /// A read waits: of a file, from a page on.
    Held,
    /// A read fails, likewise.
    Fails,
    /// The list cannot be read, or the report not be written.
    Told,
    /// The kernel's requests cannot be read.
    Requests,
    /// There is no thread for something.
    Threads,
    /// Nobody stands by.
    Heir,
}

type Said = HashMap<Saying, HashMap<(u64, u64), Instant>>;

static SAID: Mutex<Option<Said>> = Mutex::new(None);

/// True if this is to be said: not if it was lately, or if too much else of its kind was.
pub(crate) fn is_new(kind: Saying, what: (u64, u64)) -> bool {
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    let said = said.get_or_insert_default().entry(kind).or_default();
    say(said, what, Instant::now())
}

fn say(said: &mut HashMap<(u64, u64), Instant>, what: (u64, u64), now: Instant) -> bool {
    let is_late = |when: &Instant| now.saturating_duration_since(*when) < AGAIN;
    if said.get(&what).is_some_and(is_late) {
        return false;
    }
    if said.len() >= MOST {
        said.retain(|_, when| is_late(when));
    }
    let room = said.len() < MOST;
    if room {
        said.insert(what, now);
    }
    room
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_said_seldom_and_not_too_much_in_all() {
        let (mut said, now) = (HashMap::new(), Instant::now());
        assert!(say(&mut said, (1, 1), now) && say(&mut said, (1, 2), now));
        assert!(!say(&mut said, (1, 1), now + AGAIN / 2));
        assert_eq!((0..1000).filter(|i| say(&mut said, (2, *i), now)).count(), MOST - 2);
        assert!(!say(&mut said, (3, 1), now + AGAIN / 2));
        assert!(say(&mut said, (1, 1), now + AGAIN) && say(&mut said, (3, 1), now + AGAIN));
        assert_eq!(said.len(), 2);
    }
}
