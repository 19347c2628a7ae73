//! An area of memory that is dirtied all the time under a rule that can be checked at any moment.
//!
//! Step `n` (from 1) rewrites page `(n - 1) % count` with content that depends on `n` alone. So the
//! number of steps, which lies in memory elsewhere, tells every byte of the area: a page taken at
//! another instant than the rest shows up, even when it is whole in itself.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::page::{Page, ZERO, mix, randomise};
use crate::ticks::Steady;

/// The area and how many steps were done on it.
#[derive(Default)]
pub(crate) struct Area {
    pages: Vec<Page>,
    steps: u64,
}

/// What a check found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Steps done.
    pub(crate) steps: u64,
    /// Pages that are not what those steps leave.
    pub(crate) bad: usize,
    /// The first of them.
    pub(crate) first_bad: Option<usize>,
}

impl Area {
    fn new(count: usize) -> Area {
        Area { pages: vec![ZERO; count], steps: 0 }
    }

    fn step(&mut self, times: u64) {
        let count = self.pages.len() as u64;
        for _ in 0..times {
            if let Some(page) = self.pages.get_mut((self.steps % count.max(1)) as usize) {
                self.steps += 1;
                write(page, self.steps);
            }
        }
    }

    fn check(&self) -> Found {
        let count = self.pages.len() as u64;
        let mut expected = ZERO;
        let mut bad = (0_u64..).zip(&self.pages).filter(|(index, page)| {
            // The last step that hit this page: the greatest n <= steps with (n - 1) % count == index.
            match self.steps.checked_sub(index + 1) {
                None => expected = ZERO,
                Some(since) => write(&mut expected, index + 1 + since / count * count),
            }
            page.0 != expected.0
        });
        let first_bad = bad.next().map(|(index, _)| index as usize);
        let bad = bad.count() + usize::from(first_bad.is_some());
        Found { steps: self.steps, bad, first_bad }
    }
}

fn write(page: &mut Page, step: u64) {
    randomise(&mut page.0, mix(0x5C7A_7C81, step));
}

/// The area with the thread that writes to it.
#[derive(Default)]
pub(crate) struct Writer {
    area: Arc<Mutex<Area>>,
    thread: Option<Steady>,
}

impl Writer {
    /// Begins with a new area of `count` pages, of which `rate` are written each second.
    pub(crate) fn start(&mut self, rate: u64, count: usize) {
        self.stop();
        *self.lock() = Area::new(count);
        let area = Arc::clone(&self.area);
        self.thread = Some(Steady::start(rate, Duration::from_millis(2), move |times| {
            area.lock().unwrap_or_else(PoisonError::into_inner).step(times);
            true
        }));
    }

    /// Ends the writing; the area stays and can be checked.
    pub(crate) fn stop(&mut self) {
        self.thread = None;
    }

    /// Checks the whole area between two steps.
    pub(crate) fn check(&self) -> Found {
        self.lock().check()
    }

    fn lock(&self) -> MutexGuard<'_, Area> {
        self.area.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_of_steps_checks_out() {
        let mut area = Area::new(5);
        for steps in 0..17 {
            assert_eq!(area.check(), Found { steps, bad: 0, first_bad: None });
            area.step(1);
        }
    }

    #[test]
    fn a_page_of_another_instant_is_found() {
        let mut area = Area::new(5);
        area.step(12);
        let old = area.pages[3].clone();
        area.step(5);
        area.pages[3] = old;
        assert_eq!(area.check(), Found { steps: 17, bad: 1, first_bad: Some(3) });
        area.steps += 1;
        assert_eq!(area.check(), Found { steps: 18, bad: 2, first_bad: Some(2) });
    }
}
