//! What daemon and warden say to each other: one JSON object a line. Both are of the same executable, so there are no versions.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Longest line: a path and some numbers.
pub(crate) const LINE_LIMIT: u64 = 64 << 10;

/// The daemon's words. Those with a `question` are answered under that number; 0 asks for no answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    /// A guest is about to stand still. Answered when its monitor is at hand.
    Arm {
        question: u64,
        id: u64,
        watch: Watch,
        /// Milliseconds until the deadline: from the answer on or, without a question, from now on.
        within: u64,
    },
    /// It goes on as it should: the deadline is so many milliseconds from now. Not answered.
    Renew { id: u64, within: u64 },
    /// The same, and whether it is still armed.
    Confirm { question: u64, id: u64, within: u64 },
    /// From here on only the catalog knows what has to become of the machine: at the deadline it is the daemon that is ended,
    /// and the next one that decides.
    Hold { question: u64, id: u64, within: u64 },
    /// The guest goes on.
    Disarm { question: u64, id: u64 },
    /// The guest may stand still, and the daemon cannot let it go on: it lost its monitor, say. Not answered.
    Rescue { id: u64 },
    /// The daemon ends in order, or has another warden; so this one ends.
    Bye,
}

/// The warden's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub(crate) question: u64,
    /// False: the deadline has passed, and the warden has acted or is acting; to `arm`, that it cannot act.
    pub(crate) in_time: bool,
}

/// A machine to be let go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Watch {
    /// The second monitor's socket.
    pub(crate) monitor: PathBuf,
    /// The guest ran before, and is to run again.
    pub(crate) running: bool,
}
