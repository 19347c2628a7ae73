//! Which act has which steps. Every step that the sources name is struck in `make test`; a test compares the two.

use super::act::Act;

/// The steps of one act.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The act.
    pub act: Act,
    /// Steps that are struck in every test.
    pub steps: &'static [&'static str],
    /// Steps that it has too, and that the soak strikes: another act of the same kind stands for it in the test.
    pub more: &'static [&'static str],
}

const fn row(act: Act, steps: &'static [&'static str], more: &'static [&'static str]) -> Row {
    Row { act, steps, more }
}

/// All acts.
pub const ROWS: &[Row] = &[
    row(
        Act::TakeStopCopy,
        &[
            "journal.begun",
            "take.overlays",
            "take.opened",
            "take.announced",
            "take.memory",
            "take.read",
            "take.switched",
            "take.resumed",
            "pack.sealed",
            "pack.named",
            "take.stored",
            "take.written",
        ],
        &["take.saved"],
    ),
    row(
        Act::TakeLive,
        &["take.read", "take.switched", "take.resumed", "take.memory", "take.saved", "take.stored"],
        &["journal.begun", "take.overlays", "take.announced", "pack.sealed", "pack.named", "take.written"],
    ),
    row(
        Act::TakePreCopy,
        &["take.memory", "take.switched"],
        &[
            "take.announced",
            "take.read",
            "take.resumed",
            "take.saved",
            "pack.named",
            "take.stored",
            "take.written",
        ],
    ),
    row(Act::TakeDiskOnly, &["take.switched"], &["take.announced", "take.written"]),
    row(Act::TakeCancelled, &["take.taken-back"], &[]),
    row(
        Act::Goto,
        &[
            "goto.overlays",
            "goto.started",
            "goto.noted",
            "goto.loaded",
            "goto.still",
            "goto.held",
            "goto.decided",
            "goto.ended",
            "goto.runs",
            "goto.trimmed",
        ],
        &["journal.begun", "goto.memory", "pack.sealed", "pack.named"],
    ),
    row(
        Act::GotoLoaded,
        &["goto.memory", "goto.loaded", "goto.still", "goto.decided"],
        &["goto.overlays", "goto.started", "goto.noted", "goto.held", "goto.ended", "goto.runs"],
    ),
    row(
        Act::GotoDiscard,
        &["goto.decided"],
        &["goto.overlays", "goto.loaded", "goto.held", "goto.ended", "goto.runs"],
    ),
    row(Act::GotoToOff, &["goto.decided"], &["goto.overlays", "goto.still", "goto.held", "goto.ended"]),
    row(Act::GotoFromOff, &["goto.decided"], &["goto.overlays", "goto.loaded", "goto.held", "goto.runs"]),
    row(Act::UndoGoto, &["goto.decided"], &["goto.loaded", "goto.still", "goto.ended", "goto.runs"]),
    row(
        Act::Gc,
        &["gc.purged", "gc.layer", "gc.planned", "gc.copied", "gc.removed", "gc.freed", "gc.written"],
        &["journal.begun"],
    ),
    row(Act::Start, &["start.launched", "start.kept"], &["journal.begun"]),
    row(Act::Stop, &["stop.ended"], &["journal.begun"]),
    row(Act::Kill, &["kill.ended"], &["journal.begun"]),
    row(Act::StopBack, &["power-off.due", "goto.overlays", "goto.decided"], &["goto.trimmed"]),
    row(
        Act::Suspend,
        &["suspend.memory", "suspend.written", "suspend.ended"],
        &["journal.begun", "pack.sealed"],
    ),
    row(Act::Wake, &["wake.loaded", "wake.decided"], &["journal.begun", "goto.memory"]),
    row(
        Act::Regroup,
        &["regroup.memory", "regroup.stored", "regroup.layer", "regroup.copied", "regroup.written"],
        &["journal.begun", "pack.sealed", "pack.named"],
    ),
    row(Act::Clone, &["clone.overlays", "clone.switched", "clone.made", "clone.written"], &["journal.begun"]),
    row(
        Act::Fork,
        &["fork.overlays", "fork.started", "fork.written", "fork.runs"],
        &["journal.begun", "fork.origin"],
    ),
    row(Act::Settle, &["settle.stored", "settle.written"], &[]),
    row(
        Act::GotoInPlace,
        &["in-place.overlays", "in-place.kept", "goto.alone", "goto.loaded", "goto.decided"],
        &["goto.still", "goto.noted", "goto.memory", "goto.held", "goto.runs", "goto.trimmed"],
    ),
    row(
        Act::GotoInPlaceLoaded,
        &["goto.memory", "goto.decided"],
        &["goto.alone", "goto.loaded", "goto.held", "goto.runs"],
    ),
    row(Act::TakeOff, &["journal.begun", "take.overlays", "take.written"], &["take.stored"]),
    row(Act::Rm, &["journal.begun", "rm.written"], &[]),
    row(Act::Expire, &["expire.written"], &[]),
    row(Act::RmTree, &["rm.written"], &["journal.begun"]),
    row(Act::RmMachine, &["rm.written"], &["journal.begun"]),
    row(Act::Edit, &["journal.begun", "edit.written"], &[]),
    row(Act::Rename, &["edit.written"], &["journal.begun"]),
    row(Act::UndoTake, &["journal.begun", "undo.written"], &[]),
    row(Act::UndoRm, &["undo.written"], &["journal.begun"]),
    row(Act::UndoEdit, &["undo.written"], &["journal.begun"]),
    row(Act::RegroupOff, &["regroup.layer", "regroup.written"], &["journal.begun", "regroup.copied"]),
    row(Act::CloneFull, &["clone.copied", "clone.made"], &["journal.begun", "clone.written"]),
    row(Act::CloneTo, &["clone.begun", "clone.copied", "clone.made"], &["journal.begun", "clone.written"]),
    row(Act::GroupCreate, &["group.made", "group.written"], &["journal.begun"]),
    row(Act::GroupRm, &["group.removed", "group.cleared"], &["journal.begun"]),
];

/// The daemon dies at the first step, and the next one at the second: recovery can be interrupted too.
pub const RECOVERY: &[(Act, &str, &str)] = &[
    (Act::TakeStopCopy, "take.switched", "recover.mended"),
    (Act::Goto, "goto.decided", "recover.mended"),
    (Act::Goto, "goto.loaded", "recover.cleared"),
    (Act::TakeLive, "take.resumed", "recover.closed"),
    (Act::StopBack, "power-off.due", "goto.decided"),
    (Act::StopBack, "goto.overlays", "recover.closed"),
    (Act::Regroup, "regroup.copied", "recover.cleared"),
    (Act::CloneTo, "clone.copied", "recover.cleared"),
    (Act::GotoInPlace, "goto.alone", "in-place.back"),
    (Act::GotoInPlaceLoaded, "goto.memory", "in-place.back"),
    (Act::GotoInPlace, "goto.alone", "recover.closed"),
    (Act::GotoInPlace, "in-place.kept", "goto.loaded"),
];
