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
//! A live take has 5 and 6 before 4: the guest stands still while the disks switch and its memory is protected, and runs on while that
//! streams (`qemu/src/live.rs`).
//!
//! A failure before the switch takes 3 back, as long as it is certain that QEMU did not switch. After it disks only roll forward: the
//! guest has written to the overlays, so they stay, with or without a snapshot. A machine that is off skips 4 to 7.

use std::cell::Cell;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use pages::{PageStore, Saved, Session};
use qemu::command::device_of;
use qemu::live::{self, Live};
use qemu::outside::{self, Outside};
use qemu::qmp::{Qmp, QmpError};
use qemu::save::{self, CallbackError, CopyMode, SaveError, SavedState, run_state, settle};
use serde::{Deserialize, Serialize};
use serde_json::json;
use warden::{Armed, TooLate};

use crate::catalog::{Act, Facts, LayerRow, Memory, OpRow, SnapshotRow, TargetRow, Things, now};
use crate::config::Firmware;
use crate::context::Context;
use crate::disks::{DEPTH_LIMIT, NewOverlay, allocated};
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted, step};
use crate::id::new_id;
use crate::ingest::{BlockPages, Intake, Lead, StoreTooSlow, ingest, store_maps};
use crate::memory::memory_bytes;
use crate::name::{check_note, check_snapshot_name};
use crate::read_out::read_out;
use crate::running::Running;
use crate::saving;
use crate::tree::{view_at, view_by_id};
use crate::types::{Mode, Power, Snapshot, SnapshotState, TakeOptions};

/// How long a guest stands still for us without anything getting on, or any sign of life.
pub(crate) const STILL_LIMIT: Duration = Duration::from_secs(2);

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
    /// How long the guest may stand still.
    pub(crate) max_pause: Option<Duration>,
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
    /// For as long as the guest runs on and the snapshot is not durable.
    saving: Option<saving::Entry<'a>>,
}

/// A snapshot that is durable in every part but its catalog entry.
pub(crate) struct Unwritten<'a> {
    pub(crate) row: SnapshotRow,
    /// The deadline of a guest that stands still.
    pub(crate) still: Option<Armed<'a>>,
    /// Shows it until it is written, or given up.
    _saving: Option<saving::Entry<'a>>,
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
        let (row, guard) = self.lock_target(cx, target, "take")?;
        let (power, running) = self.look(&row)?;
        self.check_not_full(&row, running.as_deref())?;
        let mode = choose_mode(&row, power, running.as_deref(), &options)?;
        self.check_room(row.config.disks.len())?;
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
            max_pause: options.max_pause_us.map(Duration::from_micros),
            stands_still: false,
        };
        let subject = format!("{}@{}", row.name, job.name);
        guard.about(&subject);
        self.warn_of_disks(cx, &row)?;
        let was_running = power == Power::Running;
        let plan = json!(TakePlan { was_running });
        let id = self.journaled(cx, "take", &subject, Some(&row.id), &plan, || {
            self.take_job(cx, &job, running.as_deref())
        })?;
        view_by_id(&self.catalog, &id)
    }

    /// A snapshot whose disks cannot be used as they are now is worth having all the same: its memory is safe, and an image can be put
    /// back. But nobody should rely on it without knowing.
    fn warn_of_disks(&self, cx: &Context, row: &TargetRow) -> Result<()> {
        let (disks, checked) = self.catalog.read(|tx| {
            let disks = TargetRow::disks(tx, &row.id)?;
            let checked = self.check_chains(tx, &row.name, &disks);
            Ok((disks, checked))
        })?;
        match checked {
            Err(error) if !disks.is_empty() && error.code() == Code::Damaged => {
                let hint = error.hint_text().map(|hint| format!(" ({hint})")).unwrap_or_default();
                cx.warn(format!("{error}; until that is mended nothing can go to this snapshot{hint}"));
            }
            Err(error) => return Err(error),
            Ok(()) => {}
        }
        Ok(())
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
        step("take.stored");
        let write = || {
            // The last moment in which it can be called off.
            cx.check()?;
            self.catalog.write(|tx| {
                if running.is_none() {
                    point_here_at(tx, &target.id, &overlays)?;
                }
                row.insert(tx, &frozen)?;
                TargetRow::set_parent(tx, &target.id, Some(&row.id))?;
                let made = Things { snapshots: vec![row.id.clone()], target: None };
                OpRow::finish(tx, &cx.id, Some(Act::Remove(made)))
            })
        };
        let written = write();
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
        let mut row = SnapshotRow {
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
                pause_us: None,
                took_us: 0,
                memory_bytes: 0,
                disk_bytes: 0,
                saved: Saved::default(),
            },
            memory: None,
            removed: None,
        };
        let captured = match running {
            Some(running) if job.mode != Mode::Off => {
                self.capture_running(cx, job, running, overlays, &mut row)?
            }
            // What is kept of it already.
            None if job.mode == Mode::Suspended => {
                let memory = target.suspended.as_ref().map(|kept| kept.memory.clone());
                Captured { memory, ..Captured::default() }
            }
            _ => Captured::default(),
        };
        let facts = &mut row.facts;
        facts.pause_us = captured.pause_us;
        facts.took_us = micros(began);
        facts.memory_bytes = captured.memory.as_ref().map_or(0, |m| memory_bytes(m.roots()));
        facts.disk_bytes = frozen.iter().map(|layer| allocated(&self.layer_file(layer))).sum();
        facts.saved = captured.saved;
        row.memory = captured.memory;
        Ok(Unwritten { row, still: captured.still, _saving: captured.saving, _hold: hold })
    }

    /// Steps 3 to 7.
    fn capture_running(
        &self,
        cx: &Context,
        job: &TakeJob<'_>,
        running: &Running,
        overlays: &[NewOverlay],
        row: &mut SnapshotRow,
    ) -> Result<Captured<'_>> {
        let target = &job.target.id;
        let taken_back = |error: Error| {
            self.take_back_overlays(target, running, overlays);
            error
        };
        self.check_active(job.target, running).inspect_err(|_| self.remove_overlays(overlays))?;
        self.add_overlay_nodes(running, overlays).map_err(taken_back)?;
        step("take.opened");
        self.catalog.write(|tx| point_here_at(tx, target, overlays)).map_err(taken_back)?;

        step("take.announced");
        let mut switched = false;
        let captured = if job.mode == Mode::DiskOnly {
            cx.check().and_then(|()| switch_disks(running, overlays)).map(|()| {
                step("take.switched");
                Captured::default()
            })
        } else {
            self.capture_memory(cx, job, running, overlays, row, &mut switched)
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
        row: &mut SnapshotRow,
        switched: &mut bool,
    ) -> Result<Captured<'_>> {
        let mode = if job.mode == Mode::PreCopy { CopyMode::PreCopy } else { CopyMode::StopCopy };
        let session = self.store.begin()?;
        cx.phase("saving memory", job.target.config.memory);
        let armed = self.arm(running, job.power == Power::Running)?;
        let progress = || armed.renew(STILL_LIMIT);
        if job.stands_still {
            // The verdict waits until the pages are durable: if we die before, QEMU lets the guest go on by itself.
            let intake = Intake { lead: Lead::Short, memory: job.target.config.memory, stored: &progress };
            let (held, blocks) = ingest(session.as_ref(), cx, intake, |sink| {
                let held = save::read(&running.qmp, mode, None, sink, &cx.cancel, &progress);
                if held.is_err() {
                    return over(&armed, running, held);
                }
                held.map_err(save_error)
            })?;
            let (memory, saved) = armed.during(STILL_LIMIT, || -> Result<(Memory, Saved)> {
                let whole = || Error::new(Code::Failed, "the machine's state has no end");
                let memory = store_maps(session.as_ref(), &blocks, &held.state().ok_or_else(whole)?.state)?;
                drop(blocks);
                Ok((memory, session.commit()?))
            })?;
            // From the verdict on only we can let it go on.
            if let Err(error) = held.stand_still() {
                armed.rescue();
                return Err(save_failed(running, error));
            }
            step("goto.still");
            return Ok(Captured { memory: Some(memory), saved, still: Some(armed), ..Captured::default() });
        }
        let instant = Cell::new(row.created);
        let mut saving = None;
        let mut runs_on = |pause_us| {
            saving = self.show_saving(cx, row, overlays, instant.get(), pause_us);
            step("take.resumed");
        };
        let mut switch = || {
            step("take.read");
            switch_disks(running, overlays)?;
            *switched = true;
            instant.set(now());
            step("take.switched");
            if planted(Fault::LoseMonitor) {
                running.qmp.close();
            }
            if job.mode == Mode::Live && planted(Fault::ResumeEarly) {
                running.qmp.execute("cont", json!({}))?;
                // More than a page of the guest's log: what lies in its last page comes right again by itself.
                std::thread::sleep(Duration::from_millis(1800));
            }
            Ok(())
        };
        // What a live take waits for is the stream; the store has all the time it needs.
        let (lead, stored): (_, &(dyn Fn() + Sync)) =
            if job.mode == Mode::Live { (Lead::spill(), &|| {}) } else { (Lead::Short, &progress) };
        let intake = Intake { lead, memory: job.target.config.memory, stored };
        let read = match way(job, running) {
            Way::Outside => {
                let read = read_from_outside(cx, job, running, session.as_ref(), &armed, &mut switch);
                read.inspect(|(saved, _)| runs_on(saved.pause_us))
            }
            Way::Live => ingest(session.as_ref(), cx, intake, |sink| {
                let live = Live {
                    qmp: &running.qmp,
                    process: running.process.id(),
                    max_pause: job.max_pause,
                    cancel: &cx.cancel,
                    progress: &progress,
                    confirm: &|| Ok(armed.confirm(still_limit(job.max_pause))?),
                    at_stop: &mut switch,
                    // The catalog may have others to serve first, on a disk that is busy.
                    runs_on: &mut |pause_us| armed.during(STILL_LIMIT, || runs_on(Some(pause_us))),
                };
                over(&armed, running, live.save(sink))
            }),
            Way::Stream(mode) => ingest(session.as_ref(), cx, intake, |sink| {
                let held = save::read(&running.qmp, mode, job.max_pause, sink, &cx.cancel, &progress);
                let saved = over(&armed, running, held.and_then(|held| held.go_on(&mut switch)))?;
                runs_on(saved.pause_us.filter(|_| job.power == Power::Running));
                Ok(saved)
            }),
        };
        step("take.saved");
        let (saved, blocks) = read?;
        let pause_us = saved.pause_us.filter(|_| job.power == Power::Running);
        check_pause(pause_us, job.max_pause)?;
        cx.phase("making it durable", 0);
        let memory = store_maps(session.as_ref(), &blocks, &saved.finished.state)?;
        drop(blocks);
        row.created = instant.get();
        Ok(Captured { memory: Some(memory), pause_us, saved: session.commit()?, still: None, saving })
    }

    /// The guest runs on: from here on the snapshot is shown, and whoever does not want to wait for the rest may go.
    fn show_saving(
        &self,
        cx: &Context,
        row: &SnapshotRow,
        overlays: &[NewOverlay],
        instant: Timestamp,
        pause_us: Option<u64>,
    ) -> Option<saving::Entry<'_>> {
        let mut row = row.clone();
        row.created = instant;
        row.facts.pause_us = pause_us;
        row.facts.memory_bytes = row.config.memory;
        let depth = overlays.iter().map(|new| new.below.depth).max().unwrap_or(0);
        let shown = self.catalog.read(|tx| view_at(tx, &row, depth, SnapshotState::Saving));
        let shown =
            shown.inspect_err(|error| tracing::warn!(%error, "a snapshot cannot be shown yet")).ok()?;
        cx.so_far(&shown);
        Some(self.saving.show(&row.target, shown))
    }

    /// Has the warden see to it that the guest does not stand still for longer than we get on.
    pub(crate) fn arm(&self, running: &Running, was_running: bool) -> Result<Armed<'_>> {
        let armed = self.keeper.arm(&running.run.second_monitor(), was_running, STILL_LIMIT);
        armed.map_err(|error| {
            let gone = !running.process.is_alive();
            let sentence = if gone { "QEMU ended" } else { "the warden cannot be started" };
            Error::new(Code::Failed, sentence).because(error)
        })
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
        if planted(Fault::LeaveOverlays) {
            return;
        }
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
        // Only where the guest writes to the layer below: with a catalog that is a copy of an earlier time, it may be further on.
        if active_node(running, disk)?.is_none_or(|active| active != format!("l-{below}")) {
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
        step("take.taken-back");
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

/// How memory gets out of QEMU.
enum Way {
    /// A migration stream.
    Stream(CopyMode),
    /// QEMU's background-snapshot.
    Live,
    /// Read by us, while the guest stands still.
    Outside,
}

/// The way for a take of this mode.
fn way(job: &TakeJob<'_>, running: &Running) -> Way {
    match job.mode {
        Mode::Live => Way::Live,
        Mode::PreCopy => Way::Stream(CopyMode::PreCopy),
        // Of a guest that is paused anyway, the stream knows in which state it was.
        Mode::StopCopy if job.power == Power::Running => {
            match outside::check(&running.qmp, running.process.id()) {
                Ok(()) => Way::Outside,
                Err(error) => {
                    tracing::info!(machine = job.target.name, %error, "a stop-copy by migration");
                    Way::Stream(CopyMode::StopCopy)
                }
            }
        }
        _ => Way::Stream(CopyMode::StopCopy),
    }
}

/// Steps 4 to 6 of a stop-copy.
fn read_from_outside(
    cx: &Context,
    job: &TakeJob<'_>,
    running: &Running,
    session: &dyn Session,
    armed: &Armed<'_>,
    switch: &mut dyn FnMut() -> Result<(), CallbackError>,
) -> Result<(SavedState, Vec<BlockPages>)> {
    let mut outcome = Ok(Vec::new());
    let outside = Outside {
        qmp: &running.qmp,
        process: running.process.id(),
        machine: &job.target.machine,
        scratch: &running.run.device_state(),
        max_pause: job.max_pause,
        cancel: &cx.cancel,
        confirm: &|| Ok(armed.confirm(still_limit(job.max_pause))?),
        read: &mut |memory| {
            outcome = read_out(session, cx, memory, &|| armed.renew(still_limit(job.max_pause)));
            outcome.as_ref().map(drop).map_err(|_| "its memory could not be stored".into())
        },
        at_end: switch,
    };
    let saved = over(armed, running, outside.save());
    // What went wrong with the pages is why the rest did.
    let blocks = outcome?;
    saved.map(|saved| (saved, blocks))
}

/// QEMU has nothing left to send, or failed: whatever the store still has to do, no guest waits for it. If the guest was let go on
/// before the disks were switched, they are ahead of its memory; and that is why it failed, if it did. A guest of which we do not know
/// whether it runs is left to the warden.
fn over<T>(armed: &Armed<'_>, running: &Running, saved: Result<T, SaveError>) -> Result<T> {
    match saved {
        Err(error @ (SaveError::Stuck { .. } | SaveError::Qmp(_))) => {
            let failed = save_failed(running, error);
            if running.process.is_alive() {
                armed.rescue();
                wait_until_free(running);
            }
            Err(failed)
        }
        saved => {
            armed.release().map_err(too_late)?;
            saved.map_err(save_error)
        }
    }
}

/// The warden needs a moment for that; what comes next would only break into it.
fn wait_until_free(running: &Running) {
    let deadline = Instant::now() + STILL_LIMIT;
    let moment = Duration::from_millis(100);
    while Instant::now() < deadline && running.process.is_alive() {
        let state = Qmp::connect(&running.run.monitor(), false, moment).and_then(|qmp| run_state(&qmp));
        if state.is_ok_and(|state| state == "running") {
            return;
        }
        std::thread::sleep(moment);
    }
}

/// As [`save_error`], for an error after which QEMU may not be there any more.
fn save_failed(running: &Running, error: SaveError) -> Error {
    let closed = matches!(error, SaveError::Qmp(QmpError::Closed { .. } | QmpError::Send { .. }));
    // Its end may be a moment behind that of its monitor.
    if closed && !running.process.wait(Duration::from_millis(500)) {
        return Error::new(
            Code::Failed,
            "QEMU closed its monitor in the middle of a save; the machine goes on as before",
        )
        .because(error)
        .hint("try again: Spinney connects anew");
    }
    save_error(error)
}

/// How long a guest that is stopped for a live take may stand still before the warden lets it go on: with some room above what is
/// allowed, in which the take itself can give up.
fn still_limit(max_pause: Option<Duration>) -> Duration {
    max_pause.map_or(STILL_LIMIT, |limit| (limit * 3 / 2).clamp(Duration::from_millis(100), STILL_LIMIT))
}

/// Whole microseconds since `began`.
pub(crate) fn micros(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// A machine that lost its power is off.
fn settled(power: Power) -> Power {
    if power == Power::LostPower { Power::Off } else { power }
}

fn choose_mode(
    target: &TargetRow,
    power: Power,
    running: Option<&Running>,
    options: &TakeOptions,
) -> Result<Mode> {
    let name = &target.name;
    if matches!(power, Power::Off | Power::LostPower) {
        return Ok(Mode::Off);
    }
    if options.disk_only {
        return Ok(Mode::DiskOnly);
    }
    if power == Power::Suspended {
        return Ok(Mode::Suspended);
    }
    if !target.config.memory_snapshots {
        return Err(Error::new(
            Code::Precondition,
            format!("{name} was made with --no-memory: its memory cannot be snapshotted"),
        )
        .hint(format!("`spinney take {name} --disk-only`, or stop it first")));
    }
    // A guest that stands still anyway has no pause to be spared.
    if power == Power::Paused && !matches!(options.mode, Some(Mode::Off | Mode::DiskOnly)) {
        return Ok(Mode::StopCopy);
    }
    let live = || {
        // QEMU protects no flash: its variables would be those of a later instant than all else.
        if target.config.firmware == Firmware::Uefi {
            return Err(SaveError::NotLive { reason: "UEFI's variables may change meanwhile".into() });
        }
        running.map_or(Ok(()), |running| live::check(&running.qmp))
    };
    match options.mode {
        None => match live() {
            Ok(()) => Ok(Mode::Live),
            Err(SaveError::NotLive { reason }) => {
                tracing::info!(machine = name, reason, "no live take");
                Ok(Mode::PreCopy)
            }
            Err(error) => Err(save_error(error)),
        },
        Some(Mode::Live) => live().map(|()| Mode::Live).map_err(save_error),
        Some(mode @ (Mode::PreCopy | Mode::StopCopy)) => Ok(mode),
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
        let ours = path.split('/').any(|part| part == device_of(disk));
        ours.then(|| device.get("inserted")?.get("node-name")?.as_str().map(str::to_owned)).flatten()
    });
    Ok(node)
}

pub(crate) fn save_error(error: SaveError) -> Error {
    if has_cause::<StoreTooSlow>(&error) {
        return Error::new(Code::TimedOut, "the disk is too slow for a live take; the machine goes on as before")
            .because(error)
            .hint("`--mode pre-copy` lets the guest wait a moment at the end; or have the state folder on a faster disk");
    }
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
        SaveError::PauseBudget { limit } => {
            let sentence = format!(
                "the guest would have stood still for longer than {} ms; it goes on as before",
                limit.as_millis()
            );
            return Error::new(Code::TimedOut, sentence)
                .hint("allow more with --max-pause, or try again when the host is less busy");
        }
        SaveError::NotLive { .. } => {
            return Error::new(Code::Precondition, "this machine cannot be saved while it runs on")
                .because(error)
                .hint("`--mode pre-copy` stops it for a moment at the end; `spinney doctor` says what live takes need");
        }
        SaveError::Blocked { .. } => Code::Precondition,
        SaveError::State { .. } => Code::Refused,
        _ => Code::Failed,
    };
    Error::new(code, "the machine's state could not be saved; it goes on as before").because(error)
}

/// True if one of its causes is of this kind.
fn has_cause<T: std::error::Error + 'static>(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |error| error.source()).any(|error| error.is::<T>())
}

/// What was allowed is kept to even where it is only known afterwards: the disks have switched by then, and stay so.
fn check_pause(pause_us: Option<u64>, limit: Option<Duration>) -> Result<()> {
    match (pause_us.map(Duration::from_micros), limit) {
        (Some(pause), Some(limit)) if pause > limit => Err(save_error(SaveError::PauseBudget { limit })),
        _ => Ok(()),
    }
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
