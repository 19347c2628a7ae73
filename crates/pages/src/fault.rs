//! Steps at which a test can have the process die, and a sync that does not happen. Without the feature `faults` there is neither.

#[cfg(feature = "faults")]
pub use planted::{forget_syncs, on_step};
#[cfg(feature = "faults")]
pub(crate) use planted::{step, syncs};

#[cfg(feature = "faults")]
mod planted {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};

    static STEP: OnceLock<fn(&str)> = OnceLock::new();
    static FORGET: AtomicBool = AtomicBool::new(false);

    /// Has `hook` called at every step, with its name.
    pub fn on_step(hook: fn(&str)) {
        let _ = STEP.set(hook);
    }

    /// From here on nothing is synced.
    pub fn forget_syncs() {
        FORGET.store(true, Ordering::Relaxed);
    }

    pub(crate) fn step(name: &str) {
        if let Some(hook) = STEP.get() {
            hook(name);
        }
    }

    pub(crate) fn syncs() -> bool {
        !FORGET.load(Ordering::Relaxed)
    }
}

#[cfg(not(feature = "faults"))]
pub(crate) const fn step(_: &str) {}

#[cfg(not(feature = "faults"))]
pub(crate) const fn syncs() -> bool {
    true
}
