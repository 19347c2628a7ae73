//! Undo points: what a goto would lose, kept as a snapshot that `tree` folds away.

use std::time::Instant;

use rusqlite::Transaction;

use crate::capture::Unwritten;
use crate::catalog::{OpRow, SnapshotRow, TargetRow, now};
use crate::context::Context;
use crate::engine::Engine;
use crate::error::Result;
use crate::power_off;
use crate::running::Running;
use crate::swap::GotoPlan;
use crate::take::TakeJob;
use crate::types::{Mode, OpState, Power};

/// Undo points that a target keeps.
const UNDO_POINTS: usize = 5;
/// Operations that are looked at for the one that ended a machine.
const LOOK_BACK: usize = 1000;

impl Engine {
    /// Step 4: here as it is now, to become a snapshot that `tree` folds away. A guest that ran stands still afterwards.
    pub(crate) fn capture_undo_point(
        &self,
        cx: &Context,
        row: &TargetRow,
        was: Power,
        old: Option<&Running>,
    ) -> Result<Unwritten<'_>> {
        self.capture_still(cx, row, was, old, self.undo_point_name(row)?)
    }

    /// Here as it is now, for whoever replaces it. A guest that ran stands still afterwards.
    pub(crate) fn capture_still(
        &self,
        cx: &Context,
        row: &TargetRow,
        was: Power,
        old: Option<&Running>,
        name: String,
    ) -> Result<Unwritten<'_>> {
        let began = Instant::now();
        // A paused guest stays so by itself, except on QEMU before 8.1, which lets it run for an instant.
        let stays = was == Power::Paused && old.is_some_and(|old| old.row.keeps_paused());
        let (mode, power) = match (old, was) {
            (Some(_), _) => (Mode::StopCopy, was),
            (None, Power::Suspended) => (Mode::Suspended, was),
            (None, _) => (Mode::Off, Power::Off),
        };
        let job = TakeJob {
            target: row,
            name,
            note: "before goto".into(),
            keep: false,
            expire: None,
            undo_point: true,
            mode,
            power,
            max_pause: None,
            stands_still: !stays,
            at_power_off: false,
        };
        if old.is_none() {
            let here = self.catalog.read(|tx| TargetRow::disks(tx, &row.id))?;
            self.sync_layers(&here)?;
        }
        self.capture(cx, &job, old, &[], began)
    }

    /// "undo-N". N is the number of gotos and undos so far: a number that was shown once never means another state.
    fn undo_point_name(&self, row: &TargetRow) -> Result<String> {
        self.catalog.read(|tx| {
            let all = SnapshotRow::of_target(tx, &row.id)?;
            let mut number = OpRow::count(tx, &row.id, &["goto", power_off::GOTO, "undo", "redo"])?;
            while all.iter().any(|s| s.name == format!("undo-{number}")) {
                number += 1;
            }
            Ok(format!("undo-{number}"))
        })
    }

    /// Removes undo points beyond the newest few.
    pub(crate) fn trim_undo_points(&self, target: &str) -> Result<()> {
        self.catalog.write(|tx| {
            let here = TargetRow::by_id(tx, target)?.parent;
            let mut points = SnapshotRow::undo_points(tx, target)?;
            points.retain(|s| s.removed.is_none());
            let excess = points.len().saturating_sub(UNDO_POINTS);
            for old in points
                .into_iter()
                .take(excess)
                .filter(|s| Some(&s.id) != here.as_ref() && !s.protected && !s.keep)
            {
                SnapshotRow::set_removed(tx, &old.id, Some(now()))?;
            }
            Ok(())
        })
    }
}

/// The undo point that is the machine as it was, for one that is off because a goto in place ended it and could bring neither the new
/// one nor the old one up. Once it has been started, or is elsewhere, there is nothing to bring back.
pub(crate) fn brought_back_by(tx: &Transaction<'_>, target: &str) -> Result<Option<SnapshotRow>> {
    for op in OpRow::newest(tx, LOOK_BACK)?.into_iter().filter(|op| op.target.as_deref() == Some(target)) {
        let kind = op.kind.as_str();
        let goes = |word: &str| kind == word || op.subject.starts_with(&format!("{word} "));
        let went = kind == "start" || goes("goto") || goes(power_off::GOTO);
        if went && matches!(op.state, OpState::Done | OpState::Undone) {
            return Ok(None);
        }
        if matches!(op.state, OpState::Failed | OpState::Cancelled)
            && let Some(id) =
                serde_json::from_value::<GotoPlan>(op.plan).ok().and_then(|plan| plan.brought_back_by)
        {
            return Ok(SnapshotRow::by_id(tx, &id).ok().filter(|point| point.removed.is_none()));
        }
    }
    Ok(None)
}
