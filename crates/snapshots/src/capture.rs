//! Steps 3 to 7 of a take: the machine's disks, memory and devices at one instant, durable in every part but the catalog entry.

use std::cell::Cell;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use pages::{MapRoot, PageHash, PageStore, Saved, Session};
use qemu::live::Live;
use qemu::outside::{self, Outside};
use qemu::save::{self, CallbackError, CopyMode, SaveError, SavedState};
use serde_json::json;
use warden::Armed;

use crate::catalog::{Facts, Memory, SnapshotRow, TargetRow, now};
use crate::config::Display;
use crate::context::Context;
use crate::disks::{NewOverlay, allocated};
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted, step};
use crate::id::new_id;
use crate::ingest::{Intake, Lead, ingest, store_maps};
use crate::leaves::BlockLeaves;
use crate::let_go::{STILL_LIMIT, over, save_error, save_failed, still_limit, unkept};
use crate::memory::memory_bytes;
use crate::mount::screen;
use crate::read_out::read_out;
use crate::running::Running;
use crate::saving;
use crate::switch::switch_disks;
use crate::take::{TakeJob, micros};
use crate::tree::view_at;
use crate::types::{Mode, Power, Snapshot, SnapshotState};

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
    hold: pages::Hold,
}

impl Unwritten<'_> {
    /// Asked in the transaction that writes it: fails if a repair has given up pages meanwhile, which may be its own.
    pub(crate) fn check(&self) -> Result<()> {
        Ok(self.hold.check()?)
    }

    /// The snapshot, for whoever keeps it as something else, and what holds its pages.
    pub(crate) fn into_parts(self) -> (SnapshotRow, pages::Hold) {
        (self.row, self.hold)
    }
}

impl Engine {
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
        let hold = self.store_of(target)?.hold();
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
            facts: Facts::of_nothing(job.mode, job.power),
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
        Ok(Unwritten { row, still: captured.still, _saving: captured.saving, hold })
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
        self.announce_overlays(job.target, running, overlays)?;
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
        let session = self.store_of(job.target)?.begin_for(&self.purpose(job.target)?)?;
        cx.phase("saving memory", job.target.config.memory);
        // Before anything stands still: it takes a moment.
        let has_screen = job.target.config.display == Display::Vnc && !job.stands_still;
        let picture = has_screen.then(|| screen(running)).flatten();
        let armed = self.arm(running, job.power == Power::Running)?;
        let progress = || armed.renew(STILL_LIMIT);
        if job.stands_still {
            return self.capture_and_hold(cx, job, running, session, armed);
        }
        let instant = Cell::new(row.created);
        let mut saving = None;
        let mut runs_on = |pause_us| {
            saving = self.show_saving(cx, job, row, overlays, instant.get(), pause_us);
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
        let once = job.mode == Mode::Live;
        let intake = Intake { lead, memory: job.target.config.memory, once, stored };
        let stream = |mode, switch: &mut dyn FnMut() -> _, runs_on: &mut dyn FnMut(Option<u64>)| {
            ingest(session.as_ref(), cx, intake, |sink| {
                let held = save::read(&running.qmp, mode, job.max_pause, sink, &cx.cancel, &progress);
                let saved = over(&armed, running, held.and_then(|held| held.go_on(switch)))?;
                runs_on(saved.pause_us.filter(|_| job.power == Power::Running));
                Ok(saved)
            })
        };
        let read = match way(job, running) {
            Way::Stream(mode) => stream(mode, &mut switch, &mut runs_on),
            Way::Outside => {
                match self.read_from_outside(cx, job, running, session.as_ref(), &armed, &mut switch) {
                    Ok(None) => stream(CopyMode::StopCopy, &mut switch, &mut runs_on),
                    Ok(Some(read)) => {
                        runs_on(read.0.pause_us);
                        Ok(read)
                    }
                    Err(error) => Err(error),
                }
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
        };
        step("take.saved");
        let (saved, blocks) = read?;
        let pause_us = saved.pause_us.filter(|_| job.power == Power::Running);
        check_pause(pause_us, job.max_pause)?;
        cx.phase("making it durable", 0);
        let memory = store_maps(session.as_ref(), &blocks, &saved.finished.state, picture)?;
        drop(blocks);
        row.created = instant.get();
        Ok(Captured { memory: Some(memory), pause_us, saved: session.commit()?, still: None, saving })
    }

    /// The guest runs on: from here on the snapshot is shown, and whoever does not want to wait for the rest may go.
    fn show_saving(
        &self,
        cx: &Context,
        job: &TakeJob<'_>,
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
        let shown = self.catalog.read(|tx| {
            // Its time begins when it is durable, but nobody is to think that it stays.
            let expires = job.expire.and_then(|after| now().checked_add(after).ok());
            Ok(Snapshot { expires, ..view_at(tx, &row, depth, SnapshotState::Saving)? })
        });
        let shown =
            shown.inspect_err(|error| tracing::warn!(%error, "a snapshot cannot be shown yet")).ok()?;
        cx.so_far(&shown);
        Some(self.saving.show(&row.target, shown))
    }

    /// Steps 4 to 6 for a machine that stands still from then on: it is about to be replaced.
    fn capture_and_hold<'a>(
        &self,
        cx: &Context,
        job: &TakeJob<'_>,
        running: &Running,
        session: Box<dyn Session>,
        armed: Armed<'a>,
    ) -> Result<Captured<'a>> {
        let progress = || armed.renew(STILL_LIMIT);
        // A migration would have all of it read that was never touched.
        if job.power == Power::Running && running.row.ram.is_some() {
            let read = self.read_from_outside(cx, job, running, session.as_ref(), &armed, &mut || Ok(()))?;
            if let Some((held, blocks)) = read {
                let (memory, saved) = armed.during(STILL_LIMIT, || -> Result<(Memory, Saved)> {
                    let memory = store_maps(session.as_ref(), &blocks, &held.finished.state, None)?;
                    Ok((memory, session.commit()?))
                })?;
                step("goto.still");
                return Ok(Captured {
                    memory: Some(memory),
                    saved,
                    still: Some(armed),
                    ..Captured::default()
                });
            }
        }
        // The verdict waits until the pages are durable: if we die before, QEMU lets the guest go on by itself.
        let intake = Intake::of_still_guest(job.target.config.memory, &progress);
        let (held, blocks) = ingest(session.as_ref(), cx, intake, |sink| {
            let held = save::read(&running.qmp, CopyMode::StopCopy, None, sink, &cx.cancel, &progress);
            if held.is_err() {
                return over(&armed, running, held);
            }
            held.map_err(save_error)
        })?;
        let (memory, saved) = armed.during(STILL_LIMIT, || -> Result<(Memory, Saved)> {
            let whole = || Error::new(Code::Failed, "the machine's state has no end");
            let memory = store_maps(session.as_ref(), &blocks, &held.state().ok_or_else(whole)?.state, None)?;
            drop(blocks);
            Ok((memory, session.commit()?))
        })?;
        // From the verdict on only we can let it go on.
        if let Err(error) = held.stand_still() {
            armed.rescue();
            return Err(save_failed(running, error));
        }
        step("goto.still");
        Ok(Captured { memory: Some(memory), saved, still: Some(armed), ..Captured::default() })
    }

    /// Steps 4 to 6 of a stop-copy, or of a save of a machine that stands still from then on. Nothing comes back if it has to be saved by a
    /// migration after all: it runs on, as before.
    fn read_from_outside(
        &self,
        cx: &Context,
        job: &TakeJob<'_>,
        running: &Running,
        session: &dyn Session,
        armed: &Armed<'_>,
        switch: &mut dyn FnMut() -> Result<(), CallbackError>,
    ) -> Result<Option<(SavedState, Vec<BlockLeaves>)>> {
        let mut outcome = Ok(Vec::new());
        let progress = || armed.renew(still_limit(job.max_pause));
        let intake = Intake::of_still_guest(job.target.config.memory, &progress);
        let store = self.store_of(job.target)?;
        let was = |root: MapRoot| match planted(Fault::ForgetImage) {
            true => MapRoot { node: PageHash::ZERO, ..root },
            false => root,
        };
        let image = running.row.ram.map(|root| (store.as_ref() as &dyn PageStore, was(root)));
        let outside = Outside {
            qmp: &running.qmp,
            process: running.process.id(),
            machine: &job.target.machine,
            mapped: image.is_some(),
            stays: job.stands_still,
            scratch: &running.run.device_state(),
            max_pause: job.max_pause,
            cancel: &cx.cancel,
            confirm: &|| Ok(armed.confirm(still_limit(job.max_pause))?),
            read: &mut |memory| {
                outcome = read_out(session, cx, memory, image, intake);
                outcome.as_ref().map(drop).map_err(|_| "its memory could not be stored".into())
            },
            at_end: switch,
        };
        let saved = outside.save();
        if let Err(error @ SaveError::NotOutside { .. }) = &saved {
            tracing::info!(machine = job.target.name, %error, "a stop-copy by migration after all");
            armed.confirm(STILL_LIMIT).map_err(unkept)?;
            return Ok(None);
        }
        let qemu_is_lost = matches!(saved, Err(SaveError::Stuck { .. } | SaveError::Qmp(_)));
        let saved = match saved {
            // It stands still, and the deadline stays armed.
            Ok(saved) if job.stands_still => Ok(saved),
            saved => over(armed, running, saved),
        };
        // Unless QEMU is the reason, what went wrong with the pages is why the rest did.
        match outcome {
            Err(error) if !qemu_is_lost => Err(error),
            blocks => Ok(Some((saved?, blocks?))),
        }
    }
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
            match outside::check(&running.qmp, running.process.id(), running.row.ram.is_some()) {
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

/// What was allowed is kept to even where it is only known afterwards: the disks have switched by then, and stay so.
fn check_pause(pause_us: Option<u64>, limit: Option<Duration>) -> Result<()> {
    match (pause_us.map(Duration::from_micros), limit) {
        (Some(pause), Some(limit)) if pause > limit => Err(save_error(SaveError::PauseBudget { limit })),
        _ => Ok(()),
    }
}
