//! Steps at which a test can have the process die, a sync that does not happen, and a disk that cannot be read. Without the feature `faults` there is neither.

#[cfg(feature = "faults")]
pub use planted::{fail_reads, forget_syncs, on_step};
#[cfg(feature = "faults")]
pub(crate) use planted::{readable, step, syncs};

#[cfg(feature = "faults")]
mod planted {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};

    static STEP: OnceLock<fn(&str)> = OnceLock::new();
    static FORGET: AtomicBool = AtomicBool::new(false);
    static UNREADABLE: AtomicBool = AtomicBool::new(false);

    /// Has `hook` called at every step, with its name.
    pub fn on_step(hook: fn(&str)) {
        let _ = STEP.set(hook);
    }

    /// From here on nothing is synced.
    pub fn forget_syncs() {
        FORGET.store(true, Ordering::Relaxed);
    }

    /// From here on the pages of packs cannot be read: EIO.
    pub fn fail_reads() {
        UNREADABLE.store(true, Ordering::Relaxed);
    }

    pub(crate) fn readable() -> std::io::Result<()> {
        if UNREADABLE.load(Ordering::Relaxed) { Err(rustix::io::Errno::IO.into()) } else { Ok(()) }
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

#[cfg(not(feature = "faults"))]
pub(crate) const fn readable() -> std::io::Result<()> {
    Ok(())
}
