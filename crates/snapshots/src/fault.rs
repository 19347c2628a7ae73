//! Planted faults: what a safety check has to be seen to find.
//!
//! Only with the feature `faults`, which nothing but tests turns on, the variable `SPINNEY_FAULT` names one, and `SPINNEY_CRASH` a
//! step at which the daemon is to die or to be stopped. Without the feature every question is answered by a constant.

/// A step that a test can have go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// `take` does not switch the disks.
    SwitchNoDisk,
    /// A live `take` lets the guest run on before its memory is protected.
    ResumeEarly,
    /// `take` loses a page of guest memory.
    SkipPage,
    /// `goto` loads the device state of another snapshot.
    OtherDeviceState,
    /// A `take` that is rolled back leaves its overlays where they are.
    LeaveOverlays,
    /// Nobody keeps deadlines.
    NoWarden,
    /// QEMU's monitor is lost when the disks have switched.
    LoseMonitor,
    /// The page store takes two batches a second.
    SlowStore,
    /// The same, and a live `take` has little memory to wait in.
    LittleSpill,
    /// The same, and a live `take` has none: QEMU waits.
    NoSpill,
}

#[cfg(feature = "faults")]
pub(crate) fn planted(fault: Fault) -> bool {
    let name = match fault {
        Fault::SwitchNoDisk => "switch-no-disk",
        Fault::ResumeEarly => "resume-early",
        Fault::SkipPage => "skip-page",
        Fault::OtherDeviceState => "other-device-state",
        Fault::LeaveOverlays => "leave-overlays",
        Fault::NoWarden => "no-warden",
        Fault::LoseMonitor => "lose-monitor",
        Fault::SlowStore => "slow-store",
        Fault::LittleSpill => "little-spill",
        Fault::NoSpill => "no-spill",
    };
    std::env::var_os("SPINNEY_FAULT").is_some_and(|value| value == name)
}

#[cfg(not(feature = "faults"))]
pub(crate) const fn planted(_: Fault) -> bool {
    false
}

/// A step after which the daemon may die. `SPINNEY_CRASH="STEP kill FILE"` has it die here, `stop` in place of `kill` has it stopped
/// (as by SIGSTOP), once: FILE is made first, and if it is there nothing happens. With `wait` this thread waits until FILE is gone.
#[cfg(feature = "faults")]
pub(crate) fn step(name: &str) {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use rustix::process::{Signal, getpid, kill_process};

    static REACHED: AtomicBool = AtomicBool::new(false);

    let Ok(asked) = std::env::var("SPINNEY_CRASH") else { return };
    let mut words = asked.split(' ');
    if words.next() != Some(name) {
        return;
    }
    let (how, marker) = (words.next(), words.next().unwrap_or_default());
    if REACHED.swap(true, Ordering::Relaxed) || std::fs::File::create_new(marker).is_err() {
        return;
    }
    let signal = match how {
        Some("kill") => Signal::KILL,
        Some("stop") => Signal::STOP,
        _ => {
            while std::path::Path::new(marker).exists() {
                std::thread::sleep(Duration::from_millis(5));
            }
            return;
        }
    };
    let _ = kill_process(getpid(), signal);
    // The signal is on its way; nothing more may be done before it is there.
    std::thread::sleep(Duration::from_millis(200));
}

#[cfg(not(feature = "faults"))]
pub(crate) const fn step(_: &str) {}
