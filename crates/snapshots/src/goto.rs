//! Going to a snapshot, from top to bottom.
//!
//! ```text
//!   1  lock the target, resolve the address, look at every file that will be needed
//!   2  overlays over the snapshot's layers: made, synced            nothing speaks of them yet
//!   3  a new QEMU waits on them and loads the snapshot's memory     the old machine runs on
//!   4  the old machine stands still, its disks flushed; its memory goes into the page store
//!   5  catalog, one transaction: the undo point exists; disks, parent, settings, process and power of here are the new ones;
//!      journal: "done"
//!   6  the old QEMU ends
//!   7  the new guest runs
//! ```
//! Until 5 every failure leaves the machine as it was, running on: a snapshot that cannot be loaded costs nothing. From 5 on the
//! goto has happened; recovery ends the old process and lets the new guest run. The undo point freezes the layers that here wrote
//! to, without overlays of its own: nobody writes to them again.
//!
//! Where both cannot be there at once (a host port of `--qemu-arg`, no room for two) the order is another, `in_place`: undo point,
//! commit of that, end of the old process, steps 3, 5 and 7. If 3 fails, the undo point is loaded in its stead; if we die in
//! between, recovery does that.

use std::time::Instant;

use rusqlite::Transaction;
use serde_json::json;

use crate::address;
use crate::catalog::{Act, LayerRow, OpRow, SnapshotRow, TargetRow, now};
use crate::context::Context;
use crate::disks::{GOTO_DEPTH_LIMIT, NewOverlay, allocated};
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::step;
use crate::let_go::{STILL_LIMIT, too_late};
use crate::memory::check_readable;
use crate::running::{Running, check_host_memory};
use crate::swap::{Coming, GotoPlan, Standby, Swap, Swapped, rescue_if_lost};
use crate::take::{micros, point_here_at};
use crate::tree::view_by_id;
use crate::types::{GotoPower, GotoReport, Power};

/// On whose behalf a goto happens, for the journal.
pub(crate) struct Purpose<'a> {
    pub(crate) kind: &'a str,
    pub(crate) subject: String,
    /// The operation that it takes back.
    pub(crate) undoes: Option<&'a OpRow>,
    /// Somebody asked for it, if only by what he asked for before.
    pub(crate) asked: bool,
}

impl Purpose<'_> {
    /// The journal's part of the transaction that decides.
    fn end(&self, tx: &Transaction<'_>, cx: &Context, undo_point: Option<&SnapshotRow>) -> Result<()> {
        let undo = undo_point.map(|point| Act::Goto(point.id.clone()));
        match self.undoes {
            Some(undone) => undone.taken_back(tx, &cx.id, undo),
            None => OpRow::finish(tx, &cx.id, undo),
        }
    }
}

impl Engine {
    /// Makes a target what it was at a snapshot. What would be lost is kept as an undo point unless `discard`.
    pub fn goto(&self, cx: &Context, address: &str, power: GotoPower, discard: bool) -> Result<GotoReport> {
        let (target, _) = address::split(address);
        let (row, guard) = self.lock_target(cx, target, "goto")?;
        let (_, snapshot) = self.catalog.read(|tx| address::resolve(tx, address))?;
        guard.about(&snapshot.full_name());
        let purpose = Purpose { kind: "goto", subject: snapshot.full_name(), undoes: None, asked: true };
        let report =
            self.goto_locked(cx, &purpose, &row, &snapshot, wanted_power(&snapshot, power), discard)?;
        warn_of_policy(cx, &row, &snapshot);
        Ok(report)
    }

    /// Goes to the parent of here.
    pub fn back(&self, cx: &Context, target: &str) -> Result<GotoReport> {
        let (row, _guard) = self.lock_target(cx, target, "back")?;
        let snapshot = self.parent_of_here(&row)?;
        let purpose = Purpose { kind: "goto", subject: snapshot.full_name(), undoes: None, asked: true };
        let wanted = wanted_power(&snapshot, GotoPower::Recorded);
        let report = self.goto_locked(cx, &purpose, &row, &snapshot, wanted, false)?;
        warn_of_policy(cx, &row, &snapshot);
        Ok(report)
    }

    /// The snapshot that here comes from.
    pub(crate) fn parent_of_here(&self, row: &TargetRow) -> Result<SnapshotRow> {
        let parent = self.catalog.read(|tx| {
            let id = SnapshotRow::visible(tx, row.parent.as_deref())?;
            id.map(|id| SnapshotRow::by_id(tx, &id)).transpose()
        })?;
        let name = &row.name;
        parent.ok_or_else(|| {
            Error::new(Code::NotFound, format!("{name} has no snapshot to go back to"))
                .hint(format!("`spinney take {name}` takes one"))
        })
    }

    /// What `goto --discard` would throw away, in words; none if nothing is lost.
    pub fn discard_plan(&self, target: &str) -> Result<Option<String>> {
        let row = self.catalog.read(|tx| TargetRow::by_name(tx, target))?;
        let (power, _) = self.look(&row)?;
        let bytes = self.here_bytes(&row)?;
        let memory = match power {
            Power::Running | Power::Paused => " and everything in its memory",
            Power::Suspended => " and its memory, which is kept",
            Power::Off | Power::LostPower => "",
        };
        Ok(Some(format!(
            "what {target} wrote to its disks since its last snapshot ({} KiB){memory}",
            bytes.div_ceil(1024)
        )))
    }

    /// Bytes that were written to the disks since the snapshot that here comes from.
    fn here_bytes(&self, row: &TargetRow) -> Result<u64> {
        self.catalog.read(|tx| {
            // What only a snapshot keeps that was removed goes with it.
            let parent = SnapshotRow::visible(tx, row.parent.as_deref())?;
            let layers = Self::layers_since(tx, &TargetRow::disks(tx, &row.id)?, parent.as_deref())?;
            Ok(layers.iter().map(|layer| allocated(&self.layer_file(layer))).sum())
        })
    }

    /// All steps, for a target that is locked.
    pub(crate) fn goto_locked(
        &self,
        cx: &Context,
        purpose: &Purpose<'_>,
        row: &TargetRow,
        snapshot: &SnapshotRow,
        wanted: Power,
        discard: bool,
    ) -> Result<GotoReport> {
        let began = Instant::now();
        let (was, old) = self.look(row)?;
        if old.is_some() && !discard && !row.config.memory_snapshots {
            return Err(memory_would_go(&row.name, purpose.undoes.is_none()));
        }
        if discard || old.is_none() {
            self.check_room(row.config.disks.len())?;
        } else {
            self.check_room_for_pages(row.config.disks.len())?;
        }
        if !discard {
            self.check_not_full(row, old.as_deref())?;
        }
        let was_running = was == Power::Running;
        let plan = GotoPlan { was_running, asked: purpose.asked, ..GotoPlan::default() };
        let swapped =
            self.journaled(cx, purpose.kind, &purpose.subject, Some(&row.id), &json!(plan), || {
                let overlays = self.overlays_over(cx, row, snapshot)?;
                let swap = Swap {
                    cx,
                    row,
                    snapshot,
                    overlays: &overlays,
                    was,
                    wanted,
                    old: old.as_deref(),
                    keep: !discard,
                    // An undo point is here as it was, and so it hangs where here hung.
                    parent: if purpose.undoes.is_some() {
                        snapshot.parent.as_deref()
                    } else {
                        Some(&snapshot.id)
                    },
                    plan: &plan,
                    coming: Coming::New,
                };
                let swapped = match (self.swap(&swap, &|tx, point| purpose.end(tx, cx, point)), &old) {
                    (Err(error), Some(old)) if error.is_in_the_way() => {
                        self.in_place(&swap, purpose, old, error)
                    }
                    (swapped, _) => swapped,
                };
                if swapped.is_err() {
                    self.remove_overlays(&overlays);
                }
                swapped
            })?;
        if let Err(error) = self.trim_undo_points(&row.id) {
            tracing::warn!(%error, "old undo points could not be removed");
        }
        step("goto.trimmed");
        Ok(GotoReport {
            snapshot: view_by_id(&self.catalog, &snapshot.id)?,
            power: swapped.power,
            undo_point: swapped.undo_point.map(|id| view_by_id(&self.catalog, &id)).transpose()?,
            took_us: swapped.took_us.unwrap_or_else(|| micros(began)),
            in_place: swapped.in_place,
        })
    }

    /// Step 2.
    fn overlays_over(
        &self,
        cx: &Context,
        row: &TargetRow,
        snapshot: &SnapshotRow,
    ) -> Result<Vec<NewOverlay>> {
        let overlays = self.catalog.read(|tx| {
            let disks = SnapshotRow::disks(tx, &snapshot.id)?;
            self.check_chains(tx, &row.name, &disks)?;
            self.plan_overlays(tx, &row.name, &disks, GOTO_DEPTH_LIMIT)
        })?;
        cx.phase("preparing disks", 0);
        self.make_overlays(&overlays)?;
        step("goto.overlays");
        Ok(overlays)
    }

    /// For a new machine that cannot start beside the old one: the old one ends first, with an undo point that brings it back if
    /// the new one cannot be loaded.
    fn in_place(&self, swap: &Swap<'_>, purpose: &Purpose<'_>, old: &Running, why: Error) -> Result<Swapped> {
        let Swap { cx, row, was, .. } = *swap;
        if !row.config.memory_snapshots {
            return Err(why.hint(format!("`spinney stop {}` first", row.name)));
        }
        // Better no goto than one that ends a machine and cannot start the next.
        check_host_memory(swap.snapshot.config.memory, old.process.memory().unwrap_or(0))?;
        tracing::info!(target = row.name, error = %why, causes = ?why.causes(), "goto in place");
        // What cannot be read is found out while there still is a machine.
        let store = self.store_of(row)?;
        let check = |snapshot: &SnapshotRow| {
            cx.phase("checking memory", 0);
            let memory = snapshot.memory.as_ref();
            memory.map_or(Ok(()), |memory| check_readable(store.as_ref(), memory, cx))
        };
        check(swap.snapshot)?;
        // The disks of the machine that is off: nothing writes to what the undo point freezes. Made before anything stands still.
        let spare = self.catalog.read(|tx| {
            let disks = TargetRow::disks(tx, &row.id)?;
            self.plan_overlays(tx, &row.name, &disks, GOTO_DEPTH_LIMIT)
        })?;
        self.make_overlays(&spare)?;
        step("in-place.overlays");
        let standby = Standby { new: None, old: Some(old), was_running: was == Power::Running };
        let swapped = self.capture_undo_point(cx, row, was, Some(old)).and_then(|mut point| {
            // Until the next machine is there, our death is for the next daemon to mend, at once.
            let still = point.still.take().map_or_else(|| self.arm(old, false), Ok)?;
            still.hold(STILL_LIMIT).map_err(too_late)?;
            let exchanged = still.during(STILL_LIMIT, || {
                // A page that it shares with others may have been damaged long ago.
                check(&point.row)?;
                let plan = GotoPlan { brought_back_by: Some(point.row.id.clone()), ..swap.plan.clone() };
                self.catalog.write(|tx| {
                    point.check()?;
                    point.row.insert(tx, &TargetRow::disks(tx, &row.id)?)?;
                    point_here_at(tx, &row.id, &spare)?;
                    TargetRow::set_process(tx, &row.id, Power::LostPower, None)?;
                    OpRow::set_plan(tx, &cx.id, &json!(plan))
                })?;
                step("in-place.kept");
                drop(standby.disarm());
                self.replace_process(&row.id, old);
                step("goto.alone");
                Ok(self.exchange(swap, purpose, &point.row, &plan, &why))
            });
            rescue_if_lost(&still, exchanged.is_err(), Some(old));
            exchanged
        });
        // The outer error is one from before the commit: nobody speaks of them yet.
        swapped.inspect_err(|_| self.remove_overlays(&spare))?
    }

    /// The old process has ended, with its undo point committed: now the new one starts, or else the old one again.
    fn exchange(
        &self,
        swap: &Swap<'_>,
        purpose: &Purpose<'_>,
        point: &SnapshotRow,
        plan: &GotoPlan,
        why: &Error,
    ) -> Result<Swapped> {
        let Swap { cx, row, .. } = *swap;
        let ended = Instant::now();
        let alone = Swap { old: None, was: Power::LostPower, keep: false, plan, ..*swap };
        let swapped = self.swap(&alone, &|tx, _| match swap.keep {
            true => purpose.end(tx, cx, Some(point)),
            false => {
                SnapshotRow::set_removed(tx, &point.id, Some(now()))?;
                purpose.end(tx, cx, None)
            }
        });
        let name = point.full_name();
        match swapped {
            Ok(swapped) => {
                let causes = why.causes().join(": ");
                Ok(Swapped {
                    undo_point: swap.keep.then(|| point.id.clone()),
                    took_us: Some(micros(ended)),
                    in_place: Some(if causes.is_empty() { why.to_string() } else { causes }),
                    ..swapped
                })
            }
            Err(error) => match self.bring_back(cx, &row.id, &point.id, plan) {
                Ok(()) => Err(error),
                Err(second) => {
                    tracing::error!(error = %second, causes = ?second.causes(), "a machine could not be brought back");
                    // Whatever was the reason, a cancellation too: nothing is as it was.
                    let sentence = format!("{} is off: it could not be brought back as it was", row.name);
                    let code = if error.code() == Code::Interrupted { Code::Failed } else { error.code() };
                    Err(Error::new(code, sentence)
                        .because(second)
                        .hint(format!("`spinney goto {name}` brings it back as it was")))
                }
            },
        }
    }

    /// Loads the machine that an undo point holds, after a goto in place that came to nothing. Cannot be cancelled.
    pub(crate) fn bring_back(&self, cx: &Context, target: &str, point: &str, plan: &GotoPlan) -> Result<()> {
        let cx = &cx.uncancelled();
        step("in-place.back");
        let (row, point) =
            self.catalog.read(|tx| Ok((TargetRow::by_id(tx, target)?, SnapshotRow::by_id(tx, point)?)))?;
        // Here is empty overlays over the undo point's layers already: nothing has to be made, and no disk can be too full.
        let overlays = self.catalog.read(|tx| here_overlays(tx, target))?;
        let swap = Swap {
            cx,
            row: &row,
            snapshot: &point,
            overlays: &overlays,
            was: Power::LostPower,
            wanted: point.facts.power,
            old: None,
            keep: false,
            parent: point.parent.as_deref(),
            plan,
            coming: Coming::Back,
        };
        self.swap(&swap, &|tx, _| SnapshotRow::set_removed(tx, &point.id, Some(now()))).map(drop)
    }
}

/// The overlays that here's disks are.
fn here_overlays(tx: &Transaction<'_>, target: &str) -> Result<Vec<NewOverlay>> {
    let mut overlays = Vec::new();
    for (disk, layer) in TargetRow::disks(tx, target)? {
        let row = LayerRow::by_id(tx, &layer)?;
        if row.is_users() {
            continue;
        }
        let below =
            row.below.clone().ok_or_else(|| Error::new(Code::Damaged, format!("{disk} is no overlay")))?;
        overlays.push(NewOverlay { disk, below: LayerRow::by_id(tx, &below)?, row });
    }
    Ok(overlays)
}

fn memory_would_go(name: &str, can_discard: bool) -> Error {
    let error = Error::new(
        Code::Refused,
        format!("the memory of {name} would be lost: it was made with --no-memory"),
    );
    error.hint(match can_discard {
        true => format!("`spinney stop {name}` first; or add --discard, which keeps nothing of what is left"),
        false => format!("`spinney stop {name}` first"),
    })
}

/// What is done at a power-off comes with the other settings of a snapshot. It acts by itself some day, so one should know.
fn warn_of_policy(cx: &Context, was: &TargetRow, snapshot: &SnapshotRow) {
    let (before, now) = (was.config.on_poweroff, snapshot.config.on_poweroff);
    if before != now {
        let (name, snapshot) = (&was.name, snapshot.full_name());
        cx.warn(format!(
            "{snapshot} was taken with --on-poweroff {now}, and so is {name} now; `spinney set {name} --on-poweroff {before}` has it \
             as before"
        ));
    }
}

/// The power state that a goto to a snapshot is to bring.
pub(crate) fn wanted_power(snapshot: &SnapshotRow, power: GotoPower) -> Power {
    match power {
        GotoPower::Recorded if snapshot.facts.power == Power::Suspended && snapshot.memory.is_none() => {
            Power::Off
        }
        GotoPower::Recorded => snapshot.facts.power,
        GotoPower::Off => Power::Off,
        GotoPower::Paused => Power::Paused,
        GotoPower::Running => Power::Running,
    }
}
