//! Taking a snapshot, from top to bottom.
//!
//! ```text
//!   1  lock the target, choose name and mode
//!   2  overlay files: made, synced, folder synced                       nothing speaks of them yet
//!   3  catalog: "here's disks are the overlays", journal: "switching"   from now on every start uses them
//!   4  memory streams into a session of the page store                  the guest runs, or stands still
//!   5  pause: last pages, device state, one transaction switches all disks
//!   6  the guest runs on
//!   7  pages durable (data, footer, folder)
//!   8  catalog: the snapshot exists, here is its child, journal: "done"
//! ```
//! A failure before 5 takes 3 back, as long as it is certain that QEMU did not switch. After 5 disks only roll forward: the
//! guest has written to the overlays, so they stay, with or without a snapshot. A machine that is off skips 4 to 7.

use std::time::{Duration, Instant};

use pages::{PageStore, Saved};
use qemu::qmp::QmpError;
use qemu::save::{self, CopyMode, SaveError, run_state, settle};
use serde::{Deserialize, Serialize};
use serde_json::json;
use warden::{Armed, TooLate};

use crate::catalog::{Act, Facts, LayerRow, Memory, OpRow, SnapshotRow, TargetRow, Things, now};
use crate::context::Context;
use crate::disks::{DEPTH_LIMIT, NewOverlay, allocated};
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted, step};
use crate::id::new_id;
use crate::memory::{ingest, memory_bytes, store_maps};
use crate::name::{check_note, check_snapshot_name};
use crate::running::Running;
use crate::tree::view_by_id;
use crate::types::{Mode, Power, Snapshot, TakeOptions};

/// How long a guest stands still for us without anything getting on, or any sign of life.
pub(crate) const STILL_LIMIT: Duration = Duration::from_secs(3);

/// What recovery has to know of a take.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct TakePlan {
    /// The guest ran when the take began.
    pub(crate) was_running: bool,
}

/// What a take is to make.
pub(crate) struct TakeJob<'a> {
    pub(crate) target: &'a TargetRow,
    pub(crate) name: String,
    pub(crate) note: String,
    pub(crate) keep: bool,
    pub(crate) undo_point: bool,
    pub(crate) mode: Mode,
    pub(crate) power: Power,
    /// The guest stands still afterwards, until it is replaced or let go.
    pub(crate) stands_still: bool,
}

/// What the memory part brought.
#[derive(Default)]
struct Captured<'a> {
    memory: Option<Memory>,
    pause_us: Option<u64>,
    saved: Saved,
    still: Option<Armed<'a>>,
}

/// A snapshot that is durable in every part but its catalog entry.
pub(crate) struct Unwritten<'a> {
    pub(crate) row: SnapshotRow,
    /// The deadline of a guest that stands still.
    pub(crate) still: Option<Armed<'a>>,
    /// Keeps its pages from the collector until the catalog refers to them.
    _hold: pages::Hold,
}

impl Engine {
    /// Takes a snapshot of a machine as it is: running, paused or off. Returns when it is durable.
    pub fn take(&self, cx: &Context, target: &str, options: TakeOptions) -> Result<Snapshot> {
        check_note(&options.note)?;
        if let Some(name) = &options.name {
            check_snapshot_name(name)?;
        }
        let (row, _guard) = self.lock_target(cx, target, "take")?;
        let (power, running) = self.look(&row)?;
        let mode = choose_mode(&row, power, &options)?;
        let name = self.choose_name(&row, options.name)?;
        let power = if mode == Mode::DiskOnly { Power::Off } else { settled(power) };
        let job = TakeJob {
            target: &row,
            name,
            note: options.note,
            keep: options.keep,
            undo_point: false,
            mode,
            power,
            stands_still: false,
        };
        let subject = format!("{}@{}", row.name, job.name);
        let was_running = power == Power::Running;
        let plan = json!(TakePlan { was_running });
        let id = self.journaled(cx, "take", &subject, Some(&row.id), &plan, || {
            self.take_job(cx, &job, running.as_deref())
        })?;
        view_by_id(&self.catalog, &id)
    }

    /// The steps from 2 on. Returns the snapshot's id.
    fn take_job(&self, cx: &Context, job: &TakeJob<'_>, running: Option<&Running>) -> Result<String> {
        let target = job.target;
        let (frozen, overlays) = self.catalog.read(|tx| {
            let frozen = TargetRow::disks(tx, &target.id)?;
            let overlays = self.plan_overlays(tx, &target.name, &frozen, DEPTH_LIMIT)?;
            Ok((frozen, overlays))
        })?;
        cx.phase("preparing disks", 0);
        let began = Instant::now();
        if running.is_none() {
            // A process that was killed leaves what it wrote in the page cache.
            self.sync_layers(&frozen)?;
        }
        self.make_overlays(&overlays)?;
        step("take.overlays");
        let snapshot = self.capture(cx, job, running, &overlays, began)?;
        let row = &snapshot.row;
        let written = self.catalog.write(|tx| {
            if running.is_none() {
                point_here_at(tx, &target.id, &overlays)?;
            }
            row.insert(tx, &frozen)?;
            TargetRow::set_parent(tx, &target.id, Some(&row.id))?;
            let made = Things { snapshots: vec![row.id.clone()], target: None };
            OpRow::finish(tx, &cx.id, Some(Act::Remove(made)))
        });
        if written.is_err() && running.is_none() {
            self.remove_overlays(&overlays);
        }
        step("take.written");
        written.map(|()| snapshot.row.id)
    }

    /// Steps 3 to 7: everything but the catalog entry. Without overlays the disks are left as they are, which is right only for a
    /// machine that will not write to them again.
    pub(crate) fn capture(
        &self,
        cx: &Context,
        job: &TakeJob<'_>,
        running: Option<&Running>,
        overlays: &[NewOverlay],
        began: Instant,
    ) -> Result<Unwritten<'_>> {
        let target = job.target;
        let hold = self.store.hold();
        let frozen = self.catalog.read(|tx| {
            Self::layers_since(tx, &TargetRow::disks(tx, &target.id)?, target.parent.as_deref())
        })?;
        let captured = match running {
            Some(running) if job.mode != Mode::Off => self.capture_running(cx, job, running, overlays)?,
            _ => Captured::default(),
        };
        let row = SnapshotRow {
            id: new_id(),
            target: target.id.clone(),
            target_name: target.name.clone(),
            parent: target.parent.clone(),
            name: job.name.clone(),
            note: job.note.clone(),
            created: now(),
            undo_point: job.undo_point,
            keep: job.keep,
            protected: false,
            machine: target.machine.clone(),
            config: target.config.clone(),
            facts: Facts {
                power: job.power,
                mode: job.mode,
                pause_us: captured.pause_us,
                took_us: micros(began),
                memory_bytes: captured.memory.as_ref().map_or(0, |m| memory_bytes(m.roots())),
                disk_bytes: frozen.iter().map(|layer| allocated(&self.layer_file(layer))).sum(),
                saved: captured.saved,
            },
            memory: captured.memory,
            removed: None,
        };
        Ok(Unwritten { row, still: captured.still, _hold: hold })
    }

    /// Steps 3 to 7.
    fn capture_running(
        &self,
        cx: &Context,
        job: &TakeJob<'_>,
        running: &Running,
        overlays: &[NewOverlay],
    ) -> Result<Captured<'_>> {
        let target = &job.target.id;
        let taken_back = |error: Error| {
            self.take_back_overlays(target, running, overlays);
            error
        };
        self.check_active(job.target, running).inspect_err(|_| self.remove_overlays(overlays))?;
        self.add_overlay_nodes(running, overlays).map_err(taken_back)?;
        self.catalog.write(|tx| point_here_at(tx, target, overlays)).map_err(taken_back)?;

        step("take.announced");
        let mut switched = false;
        let captured = if job.mode == Mode::DiskOnly {
            cx.check().and_then(|()| switch_disks(running, overlays)).map(|()| Captured::default())
        } else {
            self.capture_memory(cx, job, running, overlays, &mut switched)
        };
        match captured {
            Err(error) if !switched => Err(taken_back(error)),
            other => other,
        }
    }

    /// Steps 4 to 7. On an error nothing of the pages is left.
    fn capture_memory(
        &self,
        cx: &Context,
        job: &TakeJob<'_>,
        running: &Running,
        overlays: &[NewOverlay],
        switched: &mut bool,
    ) -> Result<Captured<'_>> {
        let mode = if job.mode == Mode::PreCopy { CopyMode::PreCopy } else { CopyMode::StopCopy };
        let session = self.store.begin()?;
        cx.phase("saving memory", job.target.config.memory);
        let armed = self.arm(running, job.power == Power::Running)?;
        let progress = || armed.renew(STILL_LIMIT);
        if job.stands_still {
            // The verdict waits until the pages are durable: if we die before, QEMU lets the guest go on by itself.
            let (held, blocks) = ingest(session.as_ref(), cx, |sink| {
                save::read(&running.qmp, mode, sink, &cx.cancel, &progress).map_err(save_error)
            })?;
            let (memory, saved) = armed.during(STILL_LIMIT, || -> Result<(Memory, Saved)> {
                let whole = || Error::new(Code::Failed, "the machine's state has no end");
                let memory = store_maps(session.as_ref(), &blocks, &held.state().ok_or_else(whole)?.state)?;
                Ok((memory, session.commit()?))
            })?;
            held.stand_still().map_err(save_error)?;
            step("goto.still");
            return Ok(Captured { memory: Some(memory), pause_us: None, saved, still: Some(armed) });
        }
        let read = ingest(session.as_ref(), cx, |sink| {
            let held = save::read(&running.qmp, mode, sink, &cx.cancel, &progress).map_err(save_error)?;
            let mut at_end = || {
                step("take.read");
                switch_disks(running, overlays)?;
                *switched = true;
                step("take.switched");
                Ok(())
            };
            held.go_on(&mut at_end).map_err(save_error)
        });
        // If the guest was let go on before the disks were switched, they are ahead of its memory; and that is why it failed, if it did.
        step("take.resumed");
        armed.disarm().map_err(too_late)?;
        let (saved, blocks) = read?;
        cx.phase("making it durable", 0);
        let memory = store_maps(session.as_ref(), &blocks, &saved.finished.state)?;
        let pause_us = saved.pause_us.filter(|_| job.power == Power::Running);
        Ok(Captured { memory: Some(memory), pause_us, saved: session.commit()?, still: None })
    }

    /// Has the warden see to it that the guest does not stand still for longer than we get on.
    pub(crate) fn arm(&self, running: &Running, was_running: bool) -> Result<Armed<'_>> {
        let armed = self.keeper.arm(&running.run.second_monitor(), was_running, STILL_LIMIT);
        armed.map_err(|error| Error::new(Code::Failed, "the warden cannot be started").because(error))
    }

    /// Sees to it that every disk's device writes to the layer that the catalog calls here's. An overlay over any other would
    /// belong to nothing.
    fn check_active(&self, target: &TargetRow, running: &Running) -> Result<()> {
        // This would find that fault before the checks inside the guest can, and it is them that the fault is for.
        if planted(Fault::SwitchNoDisk) {
            return Ok(());
        }
        for (disk, layer) in self.catalog.read(|tx| TargetRow::disks(tx, &target.id))? {
            let active = active_node(running, &disk)?;
            if active.is_some_and(|node| node != format!("l-{layer}")) {
                return Err(Error::new(
                    Code::Failed,
                    format!("{disk} of {} writes to another layer than the catalog says", target.name),
                )
                .hint("`spinney serve --stop`: the next command starts a daemon that puts it in order"));
            }
        }
        Ok(())
    }

    /// Opens the overlays in QEMU, not yet in use.
    fn add_overlay_nodes(&self, running: &Running, overlays: &[NewOverlay]) -> Result<()> {
        let direct = self.direct_io();
        for new in overlays {
            running.qmp.execute("blockdev-add", self.layer_spec(&new.row).blockdev(None, true, direct))?;
        }
        Ok(())
    }

    /// Undoes step 3 if QEMU still writes to the layers below; else leaves everything: empty overlays harm nothing.
    fn take_back_overlays(&self, target: &str, running: &Running, overlays: &[NewOverlay]) {
        for new in overlays {
            if let Err(error) = self.take_back_overlay(target, running, &new.disk, &new.row, &new.below.id) {
                tracing::warn!(%error, disk = new.disk, "an overlay of a take that was rolled back stays in use");
            }
        }
    }

    /// Takes one overlay back, unless the guest writes to it.
    pub(crate) fn take_back_overlay(
        &self,
        target: &str,
        running: &Running,
        disk: &str,
        overlay: &LayerRow,
        below: &str,
    ) -> Result<()> {
        let node = format!("l-{}", overlay.id);
        if active_node(running, disk)?.is_none_or(|active| active == node) {
            return Ok(());
        }
        self.catalog.write(|tx| {
            let here = TargetRow::disks(tx, target)?;
            if here.iter().any(|(d, layer)| d == disk && *layer == overlay.id) {
                TargetRow::set_disk(tx, target, disk, below)?;
                LayerRow::purge(tx, &overlay.id)?;
            }
            Ok(())
        })?;
        let _ = running.qmp.execute("blockdev-del", json!({ "node-name": node }));
        crate::disks::remove_file(&self.layer_file(overlay));
        Ok(())
    }

    /// The name that was asked for, if it is free; else the next number that is.
    fn choose_name(&self, target: &TargetRow, wanted: Option<String>) -> Result<String> {
        if let Some(name) = wanted {
            if self.catalog.read(|tx| SnapshotRow::name_taken(tx, &target.id, &name))? {
                return Err(snapshot_name_taken(&target.name, &name));
            }
            return Ok(name);
        }
        self.catalog.write(|tx| {
            loop {
                let name = format!("snap-{}", TargetRow::next_number(tx, &target.id)?);
                if !SnapshotRow::name_taken(tx, &target.id, &name)? {
                    return Ok(name);
                }
            }
        })
    }
}

pub(crate) fn snapshot_name_taken(target: &str, name: &str) -> Error {
    Error::new(Code::Refused, format!("there already is a snapshot {target}@{name}"))
        .hint("choose another name; `spinney take` without one chooses one")
}

/// Whole microseconds since `began`.
pub(crate) fn micros(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// A machine that lost its power is off.
fn settled(power: Power) -> Power {
    if power == Power::LostPower { Power::Off } else { power }
}

fn choose_mode(target: &TargetRow, power: Power, options: &TakeOptions) -> Result<Mode> {
    let name = &target.name;
    if matches!(power, Power::Off | Power::LostPower) {
        return Ok(Mode::Off);
    }
    if options.disk_only {
        return Ok(Mode::DiskOnly);
    }
    if !target.config.memory_snapshots {
        return Err(Error::new(
            Code::Precondition,
            format!("{name} was made with --no-memory: its memory cannot be snapshotted"),
        )
        .hint(format!("`spinney take {name} --disk-only`, or stop it first")));
    }
    match options.mode {
        None | Some(Mode::PreCopy) => Ok(Mode::PreCopy),
        Some(Mode::StopCopy) => Ok(Mode::StopCopy),
        Some(mode) => Err(Error::new(Code::Usage, format!("{mode:?} is not a mode that can be asked for"))),
    }
}

pub(crate) fn point_here_at(
    tx: &rusqlite::Transaction<'_>,
    target: &str,
    overlays: &[NewOverlay],
) -> Result<()> {
    for new in overlays {
        new.row.insert(tx)?;
        TargetRow::set_disk(tx, target, &new.disk, &new.row.id)?;
    }
    Ok(())
}

/// Puts all overlays over their layers in one transaction of QEMU's: all disks or none.
fn switch_disks(running: &Running, overlays: &[NewOverlay]) -> Result<()> {
    if overlays.is_empty() || planted(Fault::SwitchNoDisk) {
        return Ok(());
    }
    let actions: Vec<_> = overlays
        .iter()
        .map(|new| {
            let data =
                json!({ "node": format!("l-{}", new.below.id), "overlay": format!("l-{}", new.row.id) });
            json!({ "type": "blockdev-snapshot", "data": data })
        })
        .collect();
    running.qmp.execute("transaction", json!({ "actions": actions }))?;
    Ok(())
}

/// The node that a disk's device writes to.
fn active_node(running: &Running, disk: &str) -> Result<Option<String>> {
    let devices = running.qmp.execute("query-block", json!({}))?;
    let node = devices.as_array().into_iter().flatten().find_map(|device| {
        let path = device.get("qdev")?.as_str()?;
        let ours = path == disk || path.split('/').any(|part| part == disk);
        ours.then(|| device.get("inserted")?.get("node-name")?.as_str().map(str::to_owned)).flatten()
    });
    Ok(node)
}

pub(crate) fn save_error(error: SaveError) -> Error {
    let code = match &error {
        SaveError::Cancelled => {
            return Error::new(Code::Interrupted, "cancelled; the machine goes on as before");
        }
        SaveError::Qmp(QmpError::Closed { .. }) => {
            return Error::new(Code::Failed, "QEMU ended while the machine's state was being saved")
                .because(error);
        }
        SaveError::Stuck { .. } => {
            return Error::new(Code::TimedOut, "QEMU did not come back from saving the machine's state")
                .because(error)
                .hint("the guest may stand still: `spinney resume` lets it go on");
        }
        SaveError::PausedTooLong => Code::TimedOut,
        SaveError::Blocked { .. } => Code::Precondition,
        SaveError::State { .. } => Code::Refused,
        _ => Code::Failed,
    };
    Error::new(code, "the machine's state could not be saved; it goes on as before").because(error)
}

pub(crate) fn too_late(error: TooLate) -> Error {
    Error::new(Code::TimedOut, "Spinney was held up for too long").because(error)
}

/// Lets a guest go on that was left standing in a migration of ours.
pub(crate) fn free_guest(running: &Running, was_running: bool) -> Result<()> {
    let state = run_state(&running.qmp)?;
    if was_running && state != "running" || matches!(state.as_str(), "finish-migrate" | "postmigrate") {
        settle(&running.qmp, if was_running { "running" } else { "paused" }).map_err(save_error)?;
    }
    Ok(())
}
