//! Planted faults: what a safety check has to be seen to find.
//!
//! Only with the feature `faults`, which nothing but tests turns on, the variable `SPINNEY_FAULT` names one. Without the
//! feature every question is answered by a constant.

/// A step that a test can have go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// `take` does not switch the disks.
    SwitchNoDisk,
    /// `take` loses a page of guest memory.
    SkipPage,
    /// `goto` loads the device state of another snapshot.
    OtherDeviceState,
}

#[cfg(feature = "faults")]
pub(crate) fn planted(fault: Fault) -> bool {
    let name = match fault {
        Fault::SwitchNoDisk => "switch-no-disk",
        Fault::SkipPage => "skip-page",
        Fault::OtherDeviceState => "other-device-state",
    };
    std::env::var_os("SPINNEY_FAULT").is_some_and(|value| value == name)
}

#[cfg(not(feature = "faults"))]
pub(crate) const fn planted(_: Fault) -> bool {
    false
}
