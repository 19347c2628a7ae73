//! What the daemon does when it starts: it reads the journal, looks at what exists, and finishes or rolls back.
//!
//! What exists decides, not what was planned: a process is there or not, the catalog names it or not, a disk's device
//! writes to one layer or the other. So recovery can itself be interrupted and run again.
//!
//! | found | done |
//! |---|---|
//! | a machine's process is gone | power "off" if QEMU ended in order, else "lost power" |
//! | a machine was powered off, and what its settings say of that is still due | told; done as soon as the daemon serves (`power_off.rs`) |
//! | a process that the catalog does not name as a machine's | ended: a goto or start that did not get to its commit |
//! | a paused guest that `stop` let run | paused |
//! | a guest standing still in a migration, or stopped by a goto or take that is unfinished | let go on |
//! | here's disk is an overlay that QEMU does not write to | the overlay is taken back |
//! | a layer file, group folder or run folder that the catalog does not know | removed |
//! | a machine that a goto in place had ended | loaded again from its undo point |
//! | images in a user's folder that a clone has not finished | removed |
//! | an unfinished operation | "failed", with a note for people |

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::catalog::{AtPowerOff, LayerRow, OpRow, ProcessRow, SnapshotRow, TargetRow};
use crate::context::Context;
use crate::disks::remove_file;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted, step};
use crate::half_made::HalfMade;
use crate::identity::put_missing_cards;
use crate::let_go::free_guest;
use crate::owner::{make_folder, read_of_others};
use crate::power_off;
use crate::running::{Adopted, Running, boot_id};
use crate::swap::GotoPlan;
use crate::types::{OpState, Power};

/// Why an operation failed that recovery closes.
const ENDED: &str = "the daemon ended while it was under way";

/// The parts of plans that recovery reads; each kind of operation has some of them.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Plan {
    was_running: bool,
    was_paused: bool,
    new: Option<ProcessRow>,
    brought_back_by: Option<String>,
    half_made: Vec<HalfMade>,
}

impl Engine {
    /// Brings files, processes and catalog together again. Returns what people should know.
    pub(crate) fn recover(&self) -> Result<Vec<String>> {
        let mut notes = Vec::new();
        let old_copy = self.catalog.is_old_copy()?;
        if old_copy {
            self.give_up_suspended(&mut notes)?;
        }
        let (targets, unfinished) =
            self.catalog.read(|tx| Ok((TargetRow::all(tx, true)?, OpRow::unfinished(tx)?)))?;
        // First of all: no two processes may run one machine.
        for op in &unfinished {
            self.end_stray(op, &targets);
        }
        self.end_unrecorded(&targets);
        let mut silent = HashSet::new();
        for target in &targets {
            let op = unfinished.iter().rfind(|op| op.target.as_ref() == Some(&target.id));
            if !self.recover_target(target, op.map(|op| plan_of(&op.plan)), &mut notes)? {
                silent.insert(target.id.as_str());
            }
            step("recover.mended");
        }
        self.remove_strays()?;
        step("recover.cleared");
        for op in &unfinished {
            // What its plan says is done when its process answers.
            if op.target.as_ref().is_some_and(|id| silent.contains(id.as_str())) {
                continue;
            }
            // Before the entry is closed: should we die meanwhile, the next start has to do it.
            self.recover_in_place(op, &mut notes)?;
            let half_made = plan_of(&op.plan).half_made;
            // With a catalog of an earlier time it may have been finished since.
            let left = |half: &HalfMade| match old_copy {
                true => Some(format!("{} may be of a clone that was not finished", half.path().display())),
                false => half.remove_after_crash(),
            };
            notes.extend(half_made.iter().filter_map(left));
            notes.push(format!("{} {} was under way and has been rolled back", op.kind, op.subject));
            self.catalog.write(|tx| OpRow::close(tx, &op.id, OpState::Failed, Some(ENDED)))?;
            step("recover.closed");
        }
        if old_copy {
            // What was due then may have been done since.
            self.catalog.write(AtPowerOff::end_all)?;
        }
        for row in self.catalog.read(AtPowerOff::due)? {
            notes.push(power_off::note(&row));
        }
        for row in self.to_autostart()? {
            notes.push(format!("{} starts with the daemon (autostart)", row.name));
        }
        Ok(notes)
    }

    /// With a catalog that is a copy of an earlier time: a machine that was suspended then may have gone on since, and its memory does
    /// not belong to its disks any more.
    fn give_up_suspended(&self, notes: &mut Vec<String>) -> Result<()> {
        let targets = self.catalog.read(|tx| TargetRow::all(tx, true))?;
        for target in targets.iter().filter(|target| target.suspended.is_some()) {
            self.catalog.write(|tx| TargetRow::set_process(tx, &target.id, Power::LostPower, None))?;
            notes.push(format!(
                "{} was suspended when the copy of the catalog was made: its disks may have been written to since, so the memory \
                 that was kept is given up",
                target.name
            ));
        }
        Ok(())
    }

    /// Loads the machine that a goto in place had ended.
    fn recover_in_place(&self, op: &OpRow, notes: &mut Vec<String>) -> Result<()> {
        let (Some(point), Some(target)) = (plan_of(&op.plan).brought_back_by, &op.target) else {
            return Ok(());
        };
        let found =
            self.catalog.read(|tx| Ok((TargetRow::by_id(tx, target)?, SnapshotRow::by_id(tx, &point)?)));
        let (row, point) = match found {
            Ok(found) => found,
            Err(error) => {
                notes.push(format!("what {} {} had ended cannot be found: {error}", op.kind, op.subject));
                return Ok(());
            }
        };
        if row.process.is_some() || point.removed.is_some() {
            return Ok(());
        }
        let cx = Context::new();
        let brought = self.bring_back(&cx, target, &point.id, &GotoPlan::default());
        notes.extend(cx.warnings());
        if let Err(error) = brought {
            let name = point.full_name();
            notes.push(format!(
                "{} is off: `spinney goto {name}` brings it back as it was ({error})",
                row.name
            ));
        }
        Ok(())
    }

    /// Ends the process that an unfinished goto had started, unless it became the machine's.
    fn end_stray(&self, op: &OpRow, targets: &[TargetRow]) {
        let Some(new) = plan_of(&op.plan).new else { return };
        let kept = targets.iter().any(|t| t.process.as_ref() == Some(&new));
        if !kept
            && new.boot == boot_id()
            && let Some(process) = qemu::process::Process::find(new.id)
        {
            process.kill();
        }
    }

    /// False if its process is there and does not answer.
    fn recover_target(
        &self,
        target: &TargetRow,
        plan: Option<Plan>,
        notes: &mut Vec<String>,
    ) -> Result<bool> {
        let Some(row) = &target.process else { return Ok(true) };
        let name = &target.name;
        let running = match self.adopt(row) {
            Adopted::Running(running) => running,
            Adopted::Silent(_, error) => {
                notes.push(format!("the QEMU of {name} does not answer: {error}"));
                return Ok(false);
            }
            Adopted::Gone => {
                let power = self.power_after(row);
                if planted(Fault::RollBackOverlay) && plan.is_some() {
                    self.roll_back_overlays(&target.id)?;
                }
                self.catalog.write(|tx| TargetRow::set_ended(tx, &target.id, power))?;
                if power == Power::LostPower {
                    notes.push(format!(
                        "{name} lost its power; `spinney start {name}` boots it, `spinney back {name}` goes to its newest snapshot"
                    ));
                }
                return Ok(true);
            }
        };
        if let Err(error) = self.mend_running(target, &running, plan) {
            notes.push(format!("{name} runs, but could not be put in order: {error}"));
        }
        self.enlist(&target.id, running.into());
        Ok(true)
    }

    /// Puts in order a machine whose process did not answer at the start and does now. The caller holds the target's lock.
    pub(crate) fn recover_late(&self, target: &TargetRow, running: &Running) -> Result<()> {
        let op = self.catalog.read(|tx| {
            Ok(OpRow::unfinished(tx)?.into_iter().rfind(|op| op.target.as_ref() == Some(&target.id)))
        })?;
        self.mend_running(target, running, op.as_ref().map(|op| plan_of(&op.plan)))?;
        let Some(op) = op else { return Ok(()) };
        self.catalog.write(|tx| OpRow::close(tx, &op.id, OpState::Failed, Some(ENDED)))
    }

    /// Frees the guest and takes back overlays that it does not write to.
    fn mend_running(&self, target: &TargetRow, running: &Running, plan: Option<Plan>) -> Result<()> {
        let was_running = plan.as_ref().map_or(target.power == Power::Running, |plan| plan.was_running);
        let freed = free_guest(running, was_running);
        let _ = std::fs::remove_file(running.run.device_state());
        self.mend_settings(target, running);
        if plan.is_some_and(|plan| plan.was_paused) {
            // It ran only to hear the power button.
            running.qmp.execute("stop", serde_json::json!({}))?;
        }
        let here = self.catalog.read(|tx| {
            let disks = TargetRow::disks(tx, &target.id)?;
            disks
                .into_iter()
                .map(|(disk, id)| Ok((disk, LayerRow::by_id(tx, &id)?)))
                .collect::<Result<Vec<_>>>()
        })?;
        for (disk, layer) in here {
            if let Some(below) = layer.below.clone() {
                self.take_back_overlay(&target.id, running, &disk, &layer, &below)?;
            }
        }
        freed
    }

    /// The planted fault: a take that failed takes its overlays away, whatever the guest wrote to them.
    fn roll_back_overlays(&self, target: &str) -> Result<()> {
        self.catalog.write(|tx| {
            for (disk, layer) in TargetRow::disks(tx, target)? {
                if let Some(below) = LayerRow::by_id(tx, &layer)?.below {
                    TargetRow::set_disk(tx, target, &disk, &below)?;
                    LayerRow::purge(tx, &layer)?;
                }
            }
            Ok(())
        })
    }

    /// Brings what can be changed on a running machine to what the catalog says.
    fn mend_settings(&self, target: &TargetRow, running: &Running) {
        let mended = self.apply_settings(target, running, false);
        if let Err(error) = mended.and_then(|()| put_missing_cards(target, running)) {
            tracing::warn!(%error, target = target.name, "a running machine is not as its settings say");
        }
    }

    /// Ends every QEMU whose run folder no machine has: the old one of a goto that was cut short after its commit, or one that was
    /// started and never written down.
    fn end_unrecorded(&self, targets: &[TargetRow]) {
        for run in self.unrecorded_runs(targets) {
            let pid = String::from_utf8(read_of_others(&run.join("pid"))).ok();
            let pid = pid.and_then(|text| text.trim().parse::<u32>().ok());
            let Some(pid) = pid else { continue };
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let folder = run.as_os_str().as_encoded_bytes();
            if line.windows(folder.len()).any(|part| part == folder)
                && let Ok(process) = qemu::process::Process::open(pid)
            {
                // To its very end: it has ports and locks that a successor needs.
                process.kill();
            }
        }
    }

    fn unrecorded_runs(&self, targets: &[TargetRow]) -> Vec<PathBuf> {
        let runs: HashSet<&str> =
            targets.iter().filter_map(|t| t.process.as_ref()).map(|p| p.run.as_str()).collect();
        let entries = fs::read_dir(self.state().join("run")).into_iter().flatten().flatten();
        entries
            .filter(|entry| !entry.file_name().to_str().is_some_and(|name| runs.contains(name)))
            .map(|entry| entry.path())
            .collect()
    }

    /// Removes files that no record speaks of.
    fn remove_strays(&self) -> Result<()> {
        let (layers, targets) =
            self.catalog.read(|tx| Ok((LayerRow::all(tx)?, TargetRow::all(tx, true)?)))?;
        // An old copy of the catalog does not know all that was there: what it does not know is moved, not removed.
        let keep = self.catalog.is_old_copy()?;
        let groups = self.groups.all();
        for group in &groups {
            let ours = layers.iter().filter(|layer| layer.group == group.row.id && !layer.is_users());
            let files: HashSet<&str> = ours.map(|layer| layer.file.as_str()).collect();
            let lost = keep.then(|| group.folder.join("lost"));
            clear(&group.layers_folder(), &|name| files.contains(name), lost.as_deref())?;
        }
        let lost = keep.then(|| self.state().join("lost"));
        let known = |name: &str| groups.iter().any(|group| group.row.id == name);
        clear(&self.state().join("groups"), &known, lost.as_deref())?;
        let there = groups.iter().map(|group| group.row.id.clone()).collect();
        self.view_folders_but(&there).iter().for_each(|group| self.remove_view(group));
        for run in self.unrecorded_runs(&targets) {
            let _ = fs::remove_dir_all(run);
        }
        Ok(())
    }
}

/// Takes away what is in a folder and is not known: moved to the folder `lost` if there is to be one, else removed.
fn clear(folder: &Path, known: &dyn Fn(&str) -> bool, lost: Option<&Path>) -> Result<()> {
    let failed = |path: &Path, what: &str, error: std::io::Error| {
        Error::new(Code::Failed, format!("{} cannot be {what}", path.display())).because(error)
    };
    lost.map_or(Ok(()), make_folder)?;
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(known) {
            continue;
        }
        let path = entry.path();
        match lost {
            Some(lost) => {
                let moved = fs::rename(&path, lost.join(entry.file_name()));
                moved.map_err(|error| failed(&path, "moved", error))?;
            }
            None if entry.file_type().is_ok_and(|kind| kind.is_dir()) => drop(fs::remove_dir_all(&path)),
            None => remove_file(&path),
        }
    }
    Ok(())
}

fn plan_of(plan: &Value) -> Plan {
    serde_json::from_value(plan.clone()).unwrap_or_else(|error| {
        tracing::warn!(%plan, %error, "a plan in the journal cannot be read");
        Plan::default()
    })
}
