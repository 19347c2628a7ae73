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
    /// The page store syncs neither packs nor their folder.
    #[cfg(feature = "faults")]
    NoSync,
    /// The page store cannot read its pages from the disk.
    #[cfg(feature = "faults")]
    ReadError,
    /// An overlay's file is not synced before the catalog speaks of it.
    OverlayUnsynced,
    /// The catalog's transactions are not synced.
    CatalogUnsynced,
    /// Recovery rolls the disks of an unfinished take back.
    RollBackOverlay,
    /// A clock that jumps is believed.
    TrustClock,
    /// The catalog has no room of its own on a full disk.
    NoReserve,
    /// `clone` lies over the layers that its source goes on writing to.
    CloneOverLive,
    /// The collector does not ask what is being copied.
    NoPins,
    /// A layer that settles has zeros in the place of its data.
    UnsettledZero,
    /// The chains of machines that run get longer and longer.
    NeverShorten,
    /// What a guest has not written to since it was brought back counts as zero.
    ForgetImage,
    /// The collector does not ask what running machines may still touch.
    ForgetMapped,
    /// A guest has no time to let go of a card.
    HastyCard,
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
        Fault::NoSync => "no-sync",
        Fault::ReadError => "read-error",
        Fault::OverlayUnsynced => "overlay-unsynced",
        Fault::CatalogUnsynced => "catalog-unsynced",
        Fault::RollBackOverlay => "roll-back-overlay",
        Fault::TrustClock => "trust-clock",
        Fault::NoReserve => "no-reserve",
        Fault::CloneOverLive => "clone-over-live",
        Fault::NoPins => "no-pins",
        Fault::UnsettledZero => "unsettled-zero",
        Fault::NeverShorten => "never-shorten",
        Fault::ForgetImage => "forget-image",
        Fault::ForgetMapped => "forget-mapped",
        Fault::HastyCard => "hasty-card",
    };
    std::env::var_os("SPINNEY_FAULT").is_some_and(|value| value == name)
}

/// Seconds by which a test has the clock be wrong: they stand in the file that `SPINNEY_CLOCK` names.
#[cfg(feature = "faults")]
pub(crate) fn clock_is_off_by() -> i64 {
    let file = std::env::var_os("SPINNEY_CLOCK");
    let text = file.and_then(|file| std::fs::read_to_string(file).ok());
    text.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

#[cfg(not(feature = "faults"))]
pub(crate) const fn clock_is_off_by() -> i64 {
    0
}

#[cfg(not(feature = "faults"))]
pub(crate) const fn planted(_: Fault) -> bool {
    false
}

/// What of the faults concerns others: the page store has steps of its own, and syncs of its own to leave out.
#[cfg(feature = "faults")]
pub(crate) fn plant() {
    pages::fault::on_step(step);
    if planted(Fault::NoSync) {
        pages::fault::forget_syncs();
    }
    if planted(Fault::ReadError) {
        pages::fault::fail_reads();
    }
}

#[cfg(not(feature = "faults"))]
pub(crate) const fn plant() {}

/// The boot of the host that `SPINNEY_BOOT` names in place of the real one: after a power cut it would be another.
#[cfg(feature = "faults")]
pub(crate) fn boot() -> Option<String> {
    std::env::var("SPINNEY_BOOT").ok()
}

#[cfg(not(feature = "faults"))]
pub(crate) const fn boot() -> Option<String> {
    None
}

/// A step after which the daemon may die. `SPINNEY_CRASH="STEP kill FILE"` has it die here, `stop` in place of `kill` has it stopped
/// (as by SIGSTOP), once: FILE is made first, and if it is there nothing happens. With `wait` this thread waits until FILE is gone.
/// `SPINNEY_CRASH=@WORDS` has such lines in a file, so that one daemon can be asked for one thing after the other.
#[cfg(feature = "faults")]
pub(crate) fn step(name: &str) {
    use std::time::Duration;

    use rustix::process::{Signal, getpid, kill_process};

    let Ok(mut asked) = std::env::var("SPINNEY_CRASH") else { return };
    if let Some(file) = asked.strip_prefix('@') {
        asked = std::fs::read_to_string(file).unwrap_or_default();
    }
    let Some(line) = asked.lines().find(|line| line.split(' ').next() == Some(name)) else { return };
    let mut words = line.split(' ').skip(1);
    let (how, marker) = (words.next(), words.next().unwrap_or_default());
    // Made in one step with the question whether it is there; gone again, `FILE.done` is there.
    let done = format!("{marker}.done");
    if std::path::Path::new(&done).exists() || std::fs::File::create_new(marker).is_err() {
        return;
    }
    let _ = std::fs::File::create_new(done);
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
