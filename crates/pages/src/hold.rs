//! The store's clock, and who holds it: sessions and [`Hold`]s keep what was touched since they began.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::sync::{Mutex, lock};

/// Counts events, and knows which of them somebody still relies on. No relation to time.
#[derive(Default)]
pub(crate) struct Clock(Mutex<Ticks>);

#[derive(Default)]
struct Ticks {
    now: u64,
    /// How often something damaged was forgotten, which no hold keeps.
    losses: u64,
    /// Start of each hold, with the number of holds that share it.
    held: BTreeMap<u64, u64>,
}

impl Clock {
    /// Now.
    pub(crate) fn now(&self) -> u64 {
        lock(&self.0).now
    }

    /// Holds everything that is touched from now on.
    pub(crate) fn hold(self: &Arc<Self>) -> Hold {
        self.hold_from(|ticks| ticks.now)
    }

    /// Holds everything that anybody holds now, and what is touched from now on.
    pub(crate) fn hold_all(self: &Arc<Self>) -> Hold {
        self.hold_from(|ticks| ticks.held.keys().next().copied().unwrap_or(ticks.now))
    }

    fn hold_from(self: &Arc<Self>, since: impl Fn(&Ticks) -> u64) -> Hold {
        let mut ticks = lock(&self.0);
        ticks.now += 1;
        let since = since(&ticks);
        *ticks.held.entry(since).or_default() += 1;
        Hold { clock: self.clone(), since, losses: ticks.losses }
    }

    /// Something that sessions may rely on is gone all the same.
    pub(crate) fn lose(&self) {
        lock(&self.0).losses += 1;
    }
}

/// While it lives, nothing that was committed to the store since it was made is collected, whether a root leads to it or
/// not. Keep one from before a session's commit until its root is recorded where the collector's caller will look.
#[must_use = "dropping it lets the collector have what was committed since"]
pub struct Hold {
    clock: Arc<Clock>,
    /// Everything touched at this tick or later is held.
    pub(crate) since: u64,
    losses: u64,
}

impl Hold {
    /// Whoever records a root asks this at that moment.
    ///
    /// # Errors
    /// [`Error::Forgotten`] if a repair has given up pages since the hold was made: those of the root may be among them.
    pub fn check(&self) -> Result<()> {
        if lock(&self.clock.0).losses == self.losses { Ok(()) } else { Err(Error::Forgotten) }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut ticks = lock(&self.clock.0);
        if let Some(count) = ticks.held.get_mut(&self.since) {
            *count -= 1;
            if *count == 0 {
                ticks.held.remove(&self.since);
            }
        }
    }
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hold").field("since", &self.since).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_takes_over_what_others_hold() {
        let clock = Arc::new(Clock::default());
        let taker = clock.hold();
        let collector = clock.hold_all();
        assert_eq!(collector.since, taker.since);
        drop(taker);
        let later = clock.hold_all();
        assert_eq!(later.since, collector.since, "still held by the first collector");
        drop((collector, later));
        assert!(lock(&clock.0).held.is_empty());
        assert!(clock.hold_all().since > 1);
    }
}
