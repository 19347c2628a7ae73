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

use std::sync::Arc;
use std::time::Instant;

use qemu::load::load;
use qemu::save::settle;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::address;
use crate::catalog::{Act, OpRow, ProcessRow, SnapshotRow, TargetRow};
use crate::context::Context;
use crate::disks::{GOTO_DEPTH_LIMIT, NewOverlay};
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted};
use crate::memory::{feed, read_state};
use crate::running::{Begin, Running, log_tail};
use crate::take::{TakeJob, Unwritten, free_guest, micros};
use crate::tree::view_by_id;
use crate::types::{GotoPower, GotoReport, Mode, Power};

/// Undo points that a target keeps.
const UNDO_POINTS: usize = 5;

/// What recovery has to know of a goto.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct GotoPlan {
    /// The old guest ran.
    pub(crate) was_running: bool,
    /// The new process, once it exists.
    pub(crate) new: Option<ProcessRow>,
}

/// On whose behalf a goto happens, for the journal.
pub(crate) struct Purpose<'a> {
    pub(crate) kind: &'a str,
    pub(crate) subject: String,
    /// The operation that it takes back.
    pub(crate) undoes: Option<&'a OpRow>,
}

/// What a swap did.
struct Swapped {
    undo_point: Option<String>,
    power: Power,
    /// From the end of the old process to the new guest being as wanted.
    took_us: Option<u64>,
}

/// Both machines while either may still be the one that stays. Dropped before the commit, by an error or a panic, it ends the new
/// one and lets the old one go on.
struct Standby<'a> {
    new: Option<Running>,
    old: Option<&'a Running>,
    was_running: bool,
}

impl Standby<'_> {
    /// The commit has happened: nothing is taken back any more.
    fn disarm(mut self) -> Option<Running> {
        self.old = None;
        self.new.take()
    }
}

impl Drop for Standby<'_> {
    fn drop(&mut self) {
        if let Some(new) = &self.new {
            abandon(new);
        }
        if let Some(old) = self.old
            && let Err(error) = free_guest(old, self.was_running)
        {
            tracing::error!(%error, run = old.row.run, "a machine could not be let go on");
        }
    }
}

/// Ends a process that did not become the machine's.
fn abandon(new: &Running) {
    new.process.kill();
    let _ = std::fs::remove_dir_all(&new.run.0);
}

impl Engine {
    /// Makes a target what it was at a snapshot. What would be lost is kept as an undo point unless `discard`.
    pub fn goto(&self, cx: &Context, address: &str, power: GotoPower, discard: bool) -> Result<GotoReport> {
        let (target, _) = address::split(address);
        let (row, _guard) = self.lock_target(cx, target, "goto")?;
        let (_, snapshot) = self.catalog.read(|tx| address::resolve(tx, address))?;
        let purpose = Purpose { kind: "goto", subject: snapshot.full_name(), undoes: None };
        self.goto_locked(cx, &purpose, &row, &snapshot, power, discard)
    }

    /// Goes to the parent of here.
    pub fn back(&self, cx: &Context, target: &str) -> Result<GotoReport> {
        let (row, _guard) = self.lock_target(cx, target, "back")?;
        let parent = self.catalog.read(|tx| {
            let id = SnapshotRow::visible(tx, row.parent.as_deref())?;
            id.map(|id| SnapshotRow::by_id(tx, &id)).transpose()
        })?;
        let Some(snapshot) = parent else {
            return Err(Error::new(Code::NotFound, format!("{target} has no snapshot to go back to"))
                .hint(format!("`spinney take {target}` takes one")));
        };
        let purpose = Purpose { kind: "goto", subject: snapshot.full_name(), undoes: None };
        self.goto_locked(cx, &purpose, &row, &snapshot, GotoPower::Recorded, false)
    }

    /// What `goto --discard` would throw away, in words; none if nothing is lost.
    pub fn discard_plan(&self, target: &str) -> Result<Option<String>> {
        let row = self.catalog.read(|tx| TargetRow::by_name(tx, target))?;
        let (power, _) = self.look(&row)?;
        let bytes = self.here_bytes(&row)?;
        let memory = match power {
            Power::Running | Power::Paused => " and everything in its memory",
            Power::Off | Power::LostPower => "",
        };
        Ok(Some(format!(
            "what {target} wrote to its disks since its last snapshot ({} KiB){memory}",
            bytes.div_ceil(1024)
        )))
    }

    /// Bytes in the layers that here writes to.
    fn here_bytes(&self, row: &TargetRow) -> Result<u64> {
        self.catalog.read(|tx| {
            let mut bytes = 0;
            for (_, layer) in TargetRow::disks(tx, &row.id)? {
                let layer = crate::catalog::LayerRow::by_id(tx, &layer)?;
                bytes += crate::disks::allocated(&self.layer_file(&layer));
            }
            Ok(bytes)
        })
    }

    /// All steps, for a target that is locked.
    pub(crate) fn goto_locked(
        &self,
        cx: &Context,
        purpose: &Purpose<'_>,
        row: &TargetRow,
        snapshot: &SnapshotRow,
        power: GotoPower,
        discard: bool,
    ) -> Result<GotoReport> {
        let began = Instant::now();
        let (was, old) = self.look(row)?;
        let wanted = wanted_power(snapshot, power);
        let plan = json!(GotoPlan { was_running: was == Power::Running, new: None });
        let swapped = self.journaled(cx, purpose.kind, &purpose.subject, Some(&row.id), &plan, || {
            let overlays = self.catalog.read(|tx| {
                let disks = SnapshotRow::disks(tx, &snapshot.id)?;
                self.check_chains(tx, &disks)?;
                self.plan_overlays(tx, &row.name, &disks, GOTO_DEPTH_LIMIT)
            })?;
            cx.phase("preparing disks", 0);
            self.make_overlays(&overlays)?;
            let swapped =
                self.swap(cx, purpose, row, snapshot, wanted, discard, (was, old.as_deref()), &overlays);
            if swapped.is_err() {
                self.remove_overlays(&overlays);
            }
            swapped
        })?;
        Ok(GotoReport {
            snapshot: view_by_id(&self.catalog, &snapshot.id)?,
            power: swapped.power,
            undo_point: swapped.undo_point.map(|id| view_by_id(&self.catalog, &id)).transpose()?,
            took_us: swapped.took_us.unwrap_or_else(|| micros(began)),
        })
    }

    /// Steps 3 to 7.
    #[expect(clippy::too_many_arguments, reason = "one step of one story")]
    fn swap(
        &self,
        cx: &Context,
        purpose: &Purpose<'_>,
        row: &TargetRow,
        snapshot: &SnapshotRow,
        wanted: Power,
        discard: bool,
        (was, old): (Power, Option<&Running>),
        overlays: &[NewOverlay],
    ) -> Result<Swapped> {
        let mut standby = Standby { new: None, old, was_running: was == Power::Running };
        if matches!(wanted, Power::Paused | Power::Running) {
            standby.new = Some(self.load_beside(cx, row, snapshot, (was, old), overlays)?);
        }
        cx.check()?;
        let undo_point = match discard {
            true => None,
            false => Some(self.capture_undo_point(cx, row, was, old)?),
        };
        let process = standby.new.as_ref().map(|new| new.row.clone());
        self.catalog.write(|tx| {
            if let Some(point) = &undo_point {
                point.row.insert(tx, &TargetRow::disks(tx, &row.id)?)?;
            }
            for overlay in overlays {
                overlay.row.insert(tx)?;
                TargetRow::set_disk(tx, &row.id, &overlay.disk, &overlay.row.id)?;
            }
            // An undo point is here as it was, and so it hangs where here hung.
            let parent = if purpose.undoes.is_some() { snapshot.parent.as_ref() } else { Some(&snapshot.id) };
            TargetRow::set_parent(tx, &row.id, parent.map(String::as_str))?;
            TargetRow::set_config(tx, &row.id, &snapshot.config)?;
            TargetRow::set_process(tx, &row.id, wanted, process.as_ref())?;
            let undo = undo_point.as_ref().map(|point| Act::Goto(point.row.id.clone()));
            match purpose.undoes {
                Some(undone) => undone.taken_back(tx, &cx.id, undo),
                None => OpRow::finish(tx, &cx.id, undo),
            }
        })?;
        // From here on the goto has happened, and whatever fails is told, not taken back.
        let new = standby.disarm();
        let ended = Instant::now();
        if let Some(old) = old {
            self.replace_process(&row.id, old);
        }
        let mut power = wanted;
        if let Some(new) = new {
            let new = Arc::new(new);
            self.running_map().insert(row.id.clone(), Arc::clone(&new));
            if wanted == Power::Running
                && let Err(error) = settle(&new.qmp, "running")
            {
                tracing::error!(%error, target = row.name, "the machine stands where it should and is paused");
                power = Power::Paused;
            }
        }
        let took_us = old.map(|_| micros(ended));
        if let Err(error) = self.trim_undo_points(&row.id) {
            tracing::warn!(%error, "old undo points could not be removed");
        }
        Ok(Swapped { undo_point: undo_point.map(|point| point.row.id), power, took_us })
    }

    /// Step 3: a QEMU of its own, loaded and standing still. On an error nothing of it is left.
    fn load_beside(
        &self,
        cx: &Context,
        row: &TargetRow,
        snapshot: &SnapshotRow,
        (was, old): (Power, Option<&Running>),
        overlays: &[NewOverlay],
    ) -> Result<Running> {
        let disks = self.catalog.read(|tx| {
            let mut disks = Vec::new();
            for new in overlays {
                let below = [(new.disk.clone(), new.below.id.clone())];
                for mut disk in self.disk_specs(tx, &below)? {
                    disk.layers.push(self.layer_spec(&new.row));
                    disks.push(disk);
                }
            }
            Ok(disks)
        })?;
        let begin = if snapshot.memory.is_some() { Begin::Incoming } else { Begin::BootPaused };
        cx.phase("starting", 0);
        let new = self.launch(row, &snapshot.config, &snapshot.machine, disks, begin);
        let new = new.map_err(|error| match old {
            // Something that only one process can have at a time: a host port of --qemu-arg, or simply the memory.
            Some(_) => error
                .hint(format!("the running machine may be in its way: `spinney kill {}` first", row.name)),
            None => error,
        })?;
        let loaded = self
            .catalog
            .write(|tx| {
                let plan = GotoPlan { was_running: was == Power::Running, new: Some(new.row.clone()) };
                OpRow::set_plan(tx, &cx.id, &json!(plan))
            })
            .and_then(|()| self.load_memory(cx, snapshot, &new));
        if let Err(error) = loaded {
            let words = log_tail(&new.run);
            abandon(&new);
            let noted = error.code() == Code::Failed && !words.is_empty();
            return Err(if noted { error.hint(format!("QEMU said: {words}")) } else { error });
        }
        Ok(new)
    }

    fn load_memory(&self, cx: &Context, snapshot: &SnapshotRow, new: &Running) -> Result<()> {
        let Some(memory) = &snapshot.memory else { return Ok(()) };
        let mut state = read_state(self.store.as_ref(), memory)?;
        if planted(Fault::OtherDeviceState)
            && let Some(other) = self.other_state(snapshot)?
        {
            state.tail = other.tail;
        }
        let version = self.tools()?.qemu.version;
        let mut store_failed = None;
        cx.phase("loading memory", state.blocks.total());
        let loaded = load(&new.qmp, version, &mut |socket| {
            let fed = feed(self.store.as_ref(), memory, &state, cx, socket);
            fed.map_err(|error| match error.downcast::<pages::Error>() {
                Ok(error) => {
                    store_failed = Some(*error);
                    "the page store failed".into()
                }
                Err(other) => other,
            })
        });
        if let Some(error) = store_failed {
            return Err(Error::from(error));
        }
        cx.check()?;
        loaded.map_err(|error| {
            Error::new(Code::Failed, format!("{} could not be loaded", snapshot.full_name())).because(error)
        })
    }

    /// For the planted fault: the device state of another snapshot of the same target.
    fn other_state(&self, snapshot: &SnapshotRow) -> Result<Option<qemu::migration::DeviceState>> {
        let all = self.catalog.read(|tx| SnapshotRow::of_target(tx, &snapshot.target))?;
        let other = all.iter().find_map(|s| s.memory.as_ref().filter(|_| s.id != snapshot.id));
        other.map(|memory| read_state(self.store.as_ref(), memory)).transpose()
    }

    /// Step 4: here as it is now, to become a snapshot that `tree` folds away. A guest that ran stands still afterwards.
    fn capture_undo_point(
        &self,
        cx: &Context,
        row: &TargetRow,
        was: Power,
        old: Option<&Running>,
    ) -> Result<Unwritten> {
        let began = Instant::now();
        let mode = match (old, row.config.memory_snapshots) {
            (None, _) => Mode::Off,
            (Some(_), true) => Mode::StopCopy,
            (Some(_), false) => Mode::DiskOnly,
        };
        if let Some(old) = old
            && mode == Mode::DiskOnly
        {
            // Nothing that the guest does from now on is lost, because it does nothing.
            old.qmp.execute("stop", json!({}))?;
        }
        // A paused guest stays so by itself, except on QEMU before 8.1, which lets it run for an instant.
        let stays = was == Power::Paused && old.is_some_and(|old| old.row.keeps_paused());
        let power = match (mode, was) {
            (Mode::DiskOnly | Mode::Off, _) | (_, Power::LostPower) => Power::Off,
            (_, was) => was,
        };
        let job = TakeJob {
            target: row,
            name: self.undo_point_name(row)?,
            note: "before goto".into(),
            keep: false,
            undo_point: true,
            mode,
            power,
            stands_still: !stays,
        };
        if old.is_none() {
            let here = self.catalog.read(|tx| TargetRow::disks(tx, &row.id))?;
            self.sync_layers(&here)?;
        }
        self.capture(cx, &job, old, &[], began)
    }

    /// "undo-N", counted apart from the names that people see. One that was removed keeps its name: `undo` may bring it back.
    fn undo_point_name(&self, row: &TargetRow) -> Result<String> {
        self.catalog.read(|tx| {
            let all = SnapshotRow::of_target(tx, &row.id)?;
            let mut number = all.iter().filter(|s| s.undo_point).count() + 1;
            while all.iter().any(|s| s.name == format!("undo-{number}")) {
                number += 1;
            }
            Ok(format!("undo-{number}"))
        })
    }

    /// Removes undo points beyond the newest few.
    fn trim_undo_points(&self, target: &str) -> Result<()> {
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
                SnapshotRow::set_removed(tx, &old.id, true)?;
            }
            Ok(())
        })
    }
}

fn wanted_power(snapshot: &SnapshotRow, power: GotoPower) -> Power {
    match power {
        GotoPower::Recorded => snapshot.facts.power,
        GotoPower::Off => Power::Off,
        GotoPower::Paused => Power::Paused,
        GotoPower::Running => Power::Running,
    }
}
