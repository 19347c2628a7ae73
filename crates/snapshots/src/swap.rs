//! Here exchanged for a snapshot: the new state is loaded beside the old machine, and one transaction decides.

use std::borrow::Cow;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use pages::Store;
use qemu::command::Disk;
use qemu::load::load;
use qemu::save::settle;
use rusqlite::Transaction;
use serde::{Deserialize, Serialize};
use serde_json::json;
use warden::Armed;

use crate::capture::Unwritten;
use crate::catalog::{Memory, OpRow, ProcessRow, SnapshotRow, TargetRow};
use crate::check::existing_file;
use crate::config::{CdDrive, MachineConfig};
use crate::context::Context;
use crate::disks::NewOverlay;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted, step};
use crate::forwards::{check_ports, set_ports};
use crate::let_go::{STILL_LIMIT, free_guest, too_late};
use crate::memory::{check_readable, feed, read_state};
use crate::running::{Begin, Running, check_host_memory, log_tail};
use crate::take::{micros, point_here_at};
use crate::types::Power;

/// What recovery has to know of a goto.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct GotoPlan {
    /// The old guest ran.
    pub(crate) was_running: bool,
    /// The new process, once it exists.
    pub(crate) new: Option<ProcessRow>,
    /// The old process has ended, and this undo point is the machine as it was.
    pub(crate) brought_back_by: Option<String>,
    /// Somebody asked for it.
    #[serde(default)]
    pub(crate) asked: bool,
}

/// One exchange, of a target that is locked.
#[derive(Clone, Copy)]
pub(crate) struct Swap<'a> {
    pub(crate) cx: &'a Context,
    pub(crate) row: &'a TargetRow,
    pub(crate) snapshot: &'a SnapshotRow,
    /// Over the snapshot's layers; no record speaks of them yet, unless what comes is coming back.
    pub(crate) overlays: &'a [NewOverlay],
    pub(crate) was: Power,
    pub(crate) wanted: Power,
    pub(crate) old: Option<&'a Running>,
    /// Keep here as an undo point.
    pub(crate) keep: bool,
    /// The snapshot that here is a child of afterwards.
    pub(crate) parent: Option<&'a str>,
    pub(crate) plan: &'a GotoPlan,
    pub(crate) coming: Coming,
}

/// Whether what is loaded is new, or what has just been there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Coming {
    New,
    Back,
}

/// What an exchange did.
pub(crate) struct Swapped {
    pub(crate) undo_point: Option<String>,
    pub(crate) power: Power,
    /// From the end of the old process to the new guest being as wanted.
    pub(crate) took_us: Option<u64>,
    /// Why the old process had to end before the new one could start, if it had to.
    pub(crate) in_place: Option<String>,
}

/// Both machines while either may still be the one that stays. Dropped before the commit, by an error or a panic, it ends the new
/// one and lets the old one go on.
pub(crate) struct Standby<'a> {
    pub(crate) new: Option<Running>,
    pub(crate) old: Option<&'a Running>,
    pub(crate) was_running: bool,
}

impl Standby<'_> {
    /// The commit has happened: nothing is taken back any more.
    pub(crate) fn disarm(mut self) -> Option<Running> {
        self.old = None;
        self.new.take()
    }
}

impl Drop for Standby<'_> {
    fn drop(&mut self) {
        if let Some(new) = &self.new {
            new.give_up();
        }
        if let Some(old) = self.old
            && let Err(error) = free_guest(old, self.was_running)
        {
            tracing::error!(%error, run = old.row.run, "a machine could not be let go on");
        }
    }
}

/// After a failure the old guest goes on, and we have told it so: unless it does not hear us. Then the warden does.
pub(crate) fn rescue_if_lost(still: &Armed<'_>, failed: bool, old: Option<&Running>) {
    if failed && old.is_some_and(|old| old.qmp.is_closed() && old.process.is_alive()) {
        still.rescue();
    }
}

/// The snapshot, with an empty drive if the file of its disc is gone, and what to say of that: a disc is not worth a machine.
fn without_lost_disc(snapshot: &SnapshotRow) -> (Cow<'_, SnapshotRow>, Option<String>) {
    let image = snapshot.config.cdrom.as_ref().and_then(|drive| drive.image.as_deref());
    let is_gone =
        |image: &Path| existing_file("disc", image).is_err_and(|error| error.code() == Code::NotFound);
    let Some(image) = image.filter(|image| is_gone(image)) else { return (Cow::Borrowed(snapshot), None) };
    let name = snapshot.full_name();
    let words = format!("the disc of {name} is gone, so its drive is empty now: {}", image.display());
    let mut without = snapshot.clone();
    without.config.cdrom = Some(CdDrive { image: None });
    (Cow::Owned(without), Some(words))
}

/// What can be done about memory that is damaged, besides a repair.
pub(crate) fn with_way_out(error: Error, way_out: String) -> Error {
    match error.code() {
        Code::Damaged => error.hint(format!("`spinney fsck --repair` mends what can be mended; {way_out}")),
        _ => error,
    }
}

fn with_disks_alone(error: Error, name: &str) -> Error {
    with_way_out(error, format!("`spinney goto {name} --off` brings its disks, without the memory"))
}

impl Engine {
    /// Loads, keeps, decides, and lets the new guest run: steps 3 to 7. `end` writes the journal's part of the transaction, and gets
    /// the undo point if there is one.
    pub(crate) fn swap(
        &self,
        swap: &Swap<'_>,
        end: &dyn Fn(&Transaction<'_>, Option<&SnapshotRow>) -> Result<()>,
    ) -> Result<Swapped> {
        let (there, lost) = without_lost_disc(swap.snapshot);
        let swapped = self.swap_to(&Swap { snapshot: &there, ..*swap }, end)?;
        lost.into_iter().for_each(|words| swap.cx.warn(words));
        Ok(swapped)
    }

    fn swap_to(
        &self,
        swap: &Swap<'_>,
        end: &dyn Fn(&Transaction<'_>, Option<&SnapshotRow>) -> Result<()>,
    ) -> Result<Swapped> {
        let Swap { cx, row, wanted, was, old, .. } = *swap;
        let mut standby = Standby { new: None, old, was_running: was == Power::Running };
        if matches!(wanted, Power::Paused | Power::Running) {
            standby.new = Some(self.load_beside(swap)?);
            step("goto.loaded");
        }
        if wanted == Power::Suspended
            && let Some(memory) = &swap.snapshot.memory
        {
            // Nothing is loaded: what cannot be read must be found out while there still is a machine.
            check_readable(self.store_of(row)?.as_ref(), memory, cx)?;
        }
        cx.check()?;
        let mut undo_point = swap.keep.then(|| self.capture_undo_point(cx, row, was, old)).transpose()?;
        // From here to its end the guest depends on us, the old one or the new one.
        let still = match (undo_point.as_mut().and_then(|point| point.still.take()), &standby.new) {
            (None, Some(new)) => Some(self.arm(new, wanted == Power::Running)?),
            (still, _) => still,
        };
        let Some(still) = still else { return self.decide(swap, standby, undo_point.as_ref(), end) };
        still.hold(STILL_LIMIT).map_err(too_late)?;
        step("goto.held");
        let decided = still.during(STILL_LIMIT, || self.decide(swap, standby, undo_point.as_ref(), end));
        rescue_if_lost(&still, decided.is_err(), old);
        decided
    }

    /// Steps 5 to 7.
    fn decide(
        &self,
        swap: &Swap<'_>,
        standby: Standby<'_>,
        undo_point: Option<&Unwritten<'_>>,
        end: &dyn Fn(&Transaction<'_>, Option<&SnapshotRow>) -> Result<()>,
    ) -> Result<Swapped> {
        let Swap { cx, row, snapshot, wanted, old, .. } = *swap;
        let point = undo_point.map(|point| &point.row);
        let process = standby.new.as_ref().map(|new| new.row.clone());
        // What is here now is not given up for a machine that is gone already.
        if standby.new.as_ref().is_some_and(|new| !new.process.is_alive()) {
            let name = snapshot.full_name();
            return Err(Error::new(Code::Failed, format!("the QEMU that {name} was loaded into has ended")));
        }
        self.catalog.write(|tx| {
            undo_point.map_or(Ok(()), Unwritten::check)?;
            if let Some(point) = point {
                point.insert(tx, &TargetRow::disks(tx, &row.id)?)?;
            }
            if swap.coming == Coming::New {
                self.replace_disks(tx, &row.id, swap)?;
            }
            TargetRow::set_parent(tx, &row.id, swap.parent)?;
            TargetRow::set_config(tx, &row.id, &snapshot.config)?;
            match snapshot.memory.as_ref().filter(|_| wanted == Power::Suspended) {
                Some(memory) => TargetRow::set_suspended(tx, &row.id, memory)?,
                None => TargetRow::set_process(tx, &row.id, wanted, process.as_ref())?,
            }
            end(tx, point)
        })?;
        step("goto.decided");
        // From here on the goto has happened, and whatever fails is told, not taken back.
        let new = standby.disarm();
        let ended = Instant::now();
        if let Some(old) = old {
            self.replace_process(&row.id, old);
            step("goto.ended");
        }
        let mut power = wanted;
        if let Some(new) = new {
            let new = Arc::new(new);
            self.enlist(&row.id, Arc::clone(&new));
            // The old process had them until just now.
            let ports = &snapshot.config.forwards;
            if !ports.is_empty()
                && let Err(error) = set_ports(&new.qmp, &row.name, ports)
            {
                tracing::error!(%error, target = row.name, "a port could not be opened");
                cx.warn(error.to_string());
            }
            if wanted == Power::Running
                && let Err(error) = settle(&new.qmp, "running")
            {
                tracing::error!(%error, target = row.name, "the machine stands where it should and does not run");
                let ended = new.process.wait(Duration::from_millis(200));
                power = if ended { Power::LostPower } else { Power::Paused };
            }
            step("goto.runs");
            if let Some(root) = new.row.ram {
                let before = self.memory_before(snapshot);
                self.fetch_ahead(row, root, before.as_ref());
            }
        }
        let took_us = old.map(|_| micros(ended));
        let undo_point = point.map(|point| point.id.clone());
        Ok(Swapped { undo_point, power, took_us, in_place: None })
    }

    /// The memory of the snapshot that a snapshot came after.
    fn memory_before(&self, snapshot: &SnapshotRow) -> Option<Memory> {
        let parent = snapshot.parent.as_deref()?;
        self.catalog.read(|tx| SnapshotRow::by_id(tx, parent)).ok()?.memory
    }

    /// Here's disks become the snapshot's: overlays over what it wrote to, what it only read as it is, and no others.
    fn replace_disks(&self, tx: &Transaction<'_>, target: &str, swap: &Swap<'_>) -> Result<()> {
        for (disk, _) in TargetRow::disks(tx, target)? {
            TargetRow::remove_disk(tx, target, &disk)?;
        }
        for (disk, layer) in Self::read_only_disks(tx, &SnapshotRow::disks(tx, &swap.snapshot.id)?)? {
            TargetRow::set_disk(tx, target, &disk, &layer)?;
        }
        point_here_at(tx, target, swap.overlays)
    }

    /// Step 3: a QEMU of its own, loaded and standing still. On an error nothing of it is left.
    fn load_beside(&self, swap: &Swap<'_>) -> Result<Running> {
        let Swap { cx, row, snapshot, .. } = *swap;
        let held = swap.old.map_or(&[][..], |_| &row.config.forwards);
        // What had its ports is brought back without them rather than not at all.
        if swap.coming != Coming::Back {
            check_ports(&row.name, &snapshot.config.forwards, held).map_err(|error| {
                let snapshot = snapshot.full_name();
                error.hint(format!(
                    "{snapshot} was taken with it: end what has it (another machine?); or `spinney goto {snapshot} --off` brings its \
                     disks, and `spinney set {} --forward` another port",
                    row.name
                ))
            })?;
        }
        let read_only =
            self.catalog.read(|tx| Self::read_only_disks(tx, &SnapshotRow::disks(tx, &snapshot.id)?))?;
        let disks = self.specs_over(&row.name, &read_only, swap.overlays)?;
        // What a machine had once it gets again, whatever the host has now: most of it was never touched.
        if swap.coming != Coming::Back {
            check_host_memory(snapshot.config.memory, 0)?;
        }
        let store = self.store_of(row)?;
        let memory = snapshot.memory.as_ref();
        if swap.coming != Coming::Back
            && let Some(memory) = memory
        {
            let checked = self.check_if_damaged(cx, snapshot, store.as_ref(), memory);
            checked.map_err(|error| with_disks_alone(error, &snapshot.full_name()))?;
        }
        cx.phase("starting", 0);
        let launch = || self.launch_for(row, &snapshot.config, &snapshot.machine, &disks, memory);
        // Its old process has ended already.
        let is_last = swap.coming == Coming::Back || swap.plan.brought_back_by.is_some();
        let new = match launch() {
            // There is no machine that could stay: this one takes what room there is.
            Err(error) if error.code() == Code::NoSpace && is_last && self.catalog.give_up_reserve() => {
                launch()?
            }
            launched => launched?,
        };
        step("goto.started");
        let loaded = self
            .catalog
            .write(|tx| {
                let plan = GotoPlan { new: Some(new.row.clone()), ..swap.plan.clone() };
                OpRow::set_plan(tx, &cx.id, &json!(plan))
            })
            .and_then(|()| {
                step("goto.noted");
                match &snapshot.memory {
                    Some(memory) => {
                        let name = snapshot.full_name();
                        self.load_memory(cx, row, &name, store.as_ref(), memory, &new)
                            .map_err(|error| with_disks_alone(error, &name))
                    }
                    None => Ok(()),
                }
            });
        if let Err(error) = loaded {
            let words = log_tail(&new.run);
            new.give_up();
            let noted = error.code() == Code::Failed && !words.is_empty();
            return Err(if noted { error.hint(format!("QEMU said: {words}")) } else { error });
        }
        Ok(new)
    }

    /// What is mapped is not read before the guest touches it. Memory that a repair could not mend is read first: a take may have
    /// brought what it lacked.
    pub(crate) fn check_if_damaged(
        &self,
        cx: &Context,
        snapshot: &SnapshotRow,
        store: &Store,
        memory: &Memory,
    ) -> Result<()> {
        if self.catalog.read(|tx| SnapshotRow::damage(tx, &snapshot.id))?.is_none() {
            return Ok(());
        }
        cx.phase("checking memory", 0);
        check_readable(store, memory, cx)
    }

    /// Starts a QEMU that is to go on with this memory, mapped if it can be, or that stands still before it boots if there is none.
    pub(crate) fn launch_for(
        &self,
        row: &TargetRow,
        config: &MachineConfig,
        machine: &str,
        disks: &[Disk],
        memory: Option<&Memory>,
    ) -> Result<Running> {
        let launch = |begin| self.launch(row, config, machine, disks.to_vec(), begin);
        let Some(memory) = memory else { return launch(Begin::BootPaused) };
        let Some(image) = self.ram_image(row, memory) else { return launch(Begin::Incoming) };
        match launch(Begin::Mapped(&image)) {
            // Whatever there is to be said of what the host lacks has been said.
            Err(error) if matches!(error.code(), Code::Failed) && !error.is_in_the_way() => {
                tracing::warn!(target = row.name, %error, causes = ?error.causes(), "memory cannot be mapped, and is loaded");
                launch(Begin::Incoming)
            }
            launched => launched,
        }
    }

    /// Puts the memory and devices of `name` into a QEMU that waits for them. What it has mapped is there already.
    pub(crate) fn load_memory(
        &self,
        cx: &Context,
        row: &TargetRow,
        name: &str,
        store: &Store,
        memory: &Memory,
        new: &Running,
    ) -> Result<()> {
        let mut state = read_state(store, memory)?;
        if planted(Fault::OtherDeviceState)
            && let Some(other) = self.other_state(store, memory)?
        {
            state.tail = other.tail;
        }
        let version = self.tools()?.qemu.version;
        let mut store_failed = None;
        let mapped = new.row.ram.is_some();
        cx.phase("loading memory", if mapped { 0 } else { state.blocks.total() });
        let mut read_in = |socket: &UnixStream| {
            let fed = feed(store, memory, &state, mapped, cx, socket);
            fed.map_err(|error| match error.downcast::<pages::Error>() {
                Ok(error) => {
                    store_failed = Some(*error);
                    "the page store failed".into()
                }
                Err(other) => other,
            })
        };
        let (loaded, held) = thread::scope(|scope| {
            let (loading, over) = channel();
            let watch = scope.spawn(move || self.end_load_that_is_held(row, new, &over));
            let loaded = load(&new.qmp, version, &mut read_in);
            drop(loading);
            (loaded, watch.join().unwrap_or_default())
        });
        if let Some(why) = held {
            return Err(Error::new(Code::Damaged, format!("{name} cannot be loaded")).because(why));
        }
        if let Some(error) = store_failed {
            return Err(Error::from(error));
        }
        cx.check()?;
        loaded.map_err(|error| {
            // A pipe that broke is only how we came to hear of it.
            let ended = new.process.wait(Duration::from_millis(200));
            let sentence = match ended {
                true => format!("QEMU ended while {name} was being loaded"),
                false => format!("{name} could not be loaded"),
            };
            Error::new(Code::Failed, sentence).because(error)
        })
    }

    /// For the planted fault: the device state of another snapshot of the same target.
    fn other_state(&self, store: &Store, memory: &Memory) -> Result<Option<qemu::migration::DeviceState>> {
        let all = self.catalog.read(SnapshotRow::all)?;
        let of = |s: &SnapshotRow| s.memory.as_ref().is_some_and(|m| m == memory).then(|| s.target.clone());
        let target = all.iter().find_map(of);
        let mut others = all.iter().filter(|s| Some(&s.target) == target.as_ref());
        let other = others.find_map(|s| s.memory.as_ref().filter(|m| *m != memory));
        other.map(|memory| read_state(store, memory)).transpose()
    }
}
