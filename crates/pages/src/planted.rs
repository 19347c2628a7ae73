//! Mistakes in what keeps threads apart, for tests to find, the explorer of schedules above all (`tests/schedules`): a test that
//! cannot fail proves nothing. Outside of tests there are none.

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mistake {
    /// A look-up asks the runs before it asks memory.
    RunsFirst,
    /// What a fold has copied leaves memory whether it has changed meanwhile or not.
    ForgetChanged,
    /// A fold takes packs that are published while it copies.
    PublishedLate,
    /// A session's look-up does not hold the gate.
    NoGate,
    /// The collector does not care what sessions rely on.
    IgnoreTouches,
    /// Nobody is told what a repair gives up.
    LoseSilently,
    /// An image that goes takes with it what is needed of it.
    LeaveNothing,
}

#[cfg(not(test))]
pub(crate) const fn is_made(_: Mistake) -> bool {
    false
}

#[cfg(test)]
pub(crate) use chosen::{is_made, making};

#[cfg(test)]
mod chosen {
    use super::Mistake;
    use std::cell::Cell;

    thread_local! {
        /// The explorer's threads are all one to the system.
        static MADE: Cell<Option<Mistake>> = const { Cell::new(None) };
    }

    pub(crate) fn is_made(mistake: Mistake) -> bool {
        MADE.get() == Some(mistake)
    }

    /// Runs `act` with a mistake in it.
    pub(crate) fn making<T>(mistake: Option<Mistake>, act: impl FnOnce() -> T) -> T {
        let before = MADE.replace(mistake);
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        MADE.set(before);
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
