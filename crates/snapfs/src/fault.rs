//! Planted faults: what a test has to be seen to find. Without the feature `faults` there are none.

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Whoever takes over does not ask for what had not been answered.
    NoResend,
    /// What cannot be read is answered with an error.
    AnswerErrors,
}

#[cfg(feature = "faults")]
pub(crate) fn planted(fault: Fault) -> bool {
    let name = match fault {
        Fault::NoResend => "no-resend",
        Fault::AnswerErrors => "answer-errors",
    };
    std::env::var_os("SPINNEY_FAULT").is_some_and(|value| value == name)
}

#[cfg(not(feature = "faults"))]
pub(crate) const fn planted(_: Fault) -> bool {
    false
}
