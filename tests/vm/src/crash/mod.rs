//! Blows at every step: an act (a take, a goto, a `gc`, ...) is under way, at one of its steps somebody is killed, and afterwards
//! the tree is the old or the new one, nothing dangles, and the guest or its disk has every line of the log that was synced.
//!
//! [`table`] says which acts have which steps, [`act`] how each is prepared and what it makes of the tree, [`blow`] who is killed,
//! [`view`] what of a tree is compared, [`after`] the checks, [`on_disk`] what lies on the disk of a machine that is off.

mod act;
mod after;
mod blow;
mod on_disk;
mod scene;
mod table;
mod view;

use serde::Serialize;

pub use act::{Act, Stage};
pub use blow::{Victim, ticks_somewhere};
pub use scene::Scene;
pub use table::{RECOVERY, ROWS, Row};

/// One blow and what came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stroke {
    /// The act.
    pub act: String,
    /// Who was killed.
    pub victim: String,
    /// At which step.
    pub step: String,
    /// The act had happened; else it was taken back.
    pub happened: bool,
}

/// Counts of strokes, as people read them: how many, how many had happened, how many were taken back.
pub fn summary(strokes: &[Stroke]) -> String {
    let steps: std::collections::BTreeSet<_> = strokes.iter().map(|stroke| &stroke.step).collect();
    let happened = strokes.iter().filter(|stroke| stroke.happened).count();
    format!(
        "{} kills at {} steps: {happened} had happened, {} were taken back",
        strokes.len(),
        steps.len(),
        strokes.len() - happened
    )
}
