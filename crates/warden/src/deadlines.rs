//! Which deadlines there are, and which have passed. No clock and no sockets: whoever calls says what time it is.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::protocol::Watch;

/// What is to be done when a deadline passes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    /// Let this guest go on.
    Release { id: u64, watch: Watch },
    /// End the daemon, which is stuck between two states of a machine.
    EndDaemon,
}

#[derive(Debug)]
struct Deadline {
    watch: Watch,
    at: Instant,
    /// The daemon is deciding: the guest is not to be touched.
    held: bool,
}

/// All deadlines.
#[derive(Debug, Default)]
pub(crate) struct Deadlines {
    by_id: HashMap<u64, Deadline>,
}

impl Deadlines {
    pub(crate) fn arm(&mut self, now: Instant, id: u64, watch: Watch, within: Duration) {
        self.by_id.insert(id, Deadline { watch, at: now + within, held: false });
    }

    /// Moves a deadline. One that has passed stays passed.
    pub(crate) fn renew(&mut self, now: Instant, id: u64, within: Duration) {
        if let Some(deadline) = self.by_id.get_mut(&id) {
            deadline.at = now + within;
        }
    }

    /// From now on this deadline is about the daemon and not about the guest. False if it has passed.
    pub(crate) fn hold(&mut self, now: Instant, id: u64, within: Duration) -> bool {
        self.renew(now, id, within);
        let deadline = self.by_id.get_mut(&id);
        deadline.map(|deadline| deadline.held = true).is_some()
    }

    /// It is armed, and has not passed.
    pub(crate) fn has(&self, id: u64) -> bool {
        self.by_id.contains_key(&id)
    }

    /// It is now: takes it out, unless it has passed.
    pub(crate) fn take(&mut self, id: u64) -> Option<Watch> {
        self.by_id.remove(&id).map(|deadline| deadline.watch)
    }

    /// False if it has passed.
    pub(crate) fn disarm(&mut self, id: u64) -> bool {
        self.by_id.remove(&id).is_some()
    }

    /// Time until the next deadline; none if there is none.
    pub(crate) fn next(&self, now: Instant) -> Option<Duration> {
        self.by_id.values().map(|deadline| deadline.at.saturating_duration_since(now)).min()
    }

    /// Takes out what has passed.
    pub(crate) fn due(&mut self, now: Instant) -> Vec<Due> {
        let passed = self.by_id.extract_if(|_, deadline| deadline.at <= now);
        passed.map(|(id, deadline)| deadline.due(id)).collect()
    }

    /// The daemon has died: everything is due that is about a guest. What was held is for the next daemon.
    pub(crate) fn all(&mut self) -> Vec<Due> {
        self.by_id.drain().map(|(id, deadline)| deadline.due(id)).collect()
    }
}

impl Deadline {
    fn due(self, id: u64) -> Due {
        if self.held { Due::EndDaemon } else { Due::Release { id, watch: self.watch } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch() -> Watch {
        Watch { monitor: "/m".into(), running: true }
    }

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn a_deadline_is_kept_renewed_and_disarmed() {
        let (mut deadlines, now) = (Deadlines::default(), Instant::now());
        deadlines.arm(now, 1, watch(), ms(100));
        assert!(deadlines.due(now + ms(99)).is_empty());
        deadlines.renew(now + ms(99), 1, ms(100));
        assert_eq!(deadlines.next(now + ms(99)), Some(ms(100)));
        assert!(deadlines.due(now + ms(198)).is_empty());
        assert!(deadlines.disarm(1));
        assert!(deadlines.due(now + ms(1000)).is_empty());
        assert_eq!(deadlines.next(now), None);
    }

    #[test]
    fn a_guest_can_be_seen_to_before_its_deadline_and_only_once() {
        let (mut deadlines, now) = (Deadlines::default(), Instant::now());
        deadlines.arm(now, 1, watch(), ms(100));
        assert_eq!(deadlines.take(1), Some(watch()));
        assert_eq!(deadlines.take(1), None);
        assert!(deadlines.due(now + ms(1000)).is_empty());
    }

    #[test]
    fn what_has_passed_cannot_be_disarmed_renewed_or_held() {
        let (mut deadlines, now) = (Deadlines::default(), Instant::now());
        deadlines.arm(now, 1, watch(), ms(100));
        assert_eq!(deadlines.due(now + ms(100)), [Due::Release { id: 1, watch: watch() }]);
        deadlines.renew(now + ms(100), 1, ms(100));
        assert!(!deadlines.hold(now + ms(100), 1, ms(100)));
        assert!(!deadlines.disarm(1));
        assert!(deadlines.due(now + ms(1000)).is_empty(), "once is enough");
    }

    #[test]
    fn while_the_daemon_decides_the_guest_is_left_alone() {
        let (mut deadlines, now) = (Deadlines::default(), Instant::now());
        deadlines.arm(now, 1, watch(), ms(100));
        assert!(deadlines.hold(now, 1, ms(200)));
        assert!(deadlines.due(now + ms(199)).is_empty());
        assert_eq!(deadlines.due(now + ms(200)), [Due::EndDaemon]);
    }

    #[test]
    fn the_daemons_death_makes_everything_due() {
        let (mut deadlines, now) = (Deadlines::default(), Instant::now());
        deadlines.arm(now, 1, watch(), ms(100));
        deadlines.arm(now, 2, watch(), ms(100));
        assert!(deadlines.hold(now, 2, ms(100)));
        let mut due = deadlines.all();
        due.sort_by_key(|due| *due == Due::EndDaemon);
        assert_eq!(due, [Due::Release { id: 1, watch: watch() }, Due::EndDaemon]);
        assert!(deadlines.all().is_empty());
    }
}
