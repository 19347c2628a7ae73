//! Suspending a machine and going on with it.
//!
//! ```text
//!   suspend:  memory into the page store, the guest standing still      if we die, the guest goes on
//!             catalog, one transaction: no process, this memory; journal: "done"
//!             QEMU ends                                                 if we die before, recovery ends it
//!   start:    a new QEMU loads the memory, standing still               if we die, it is suspended as before
//!             catalog, one transaction: this process, no memory kept; journal: "done"
//!             the guest runs                                            if we die before, recovery lets it run
//! ```
//! Disks stay what they are: nobody writes to them between the two transactions, so the memory needs no layers of its own. It is
//! consumed by the transaction that makes the new process the machine's: from then on the disks run ahead of it.

use std::sync::Arc;

use qemu::save::settle;
use serde_json::json;

use crate::catalog::{OpRow, Suspended, TargetRow};
use crate::context::Context;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::step;
use crate::forwards::check_ports;
use crate::let_go::{STILL_LIMIT, too_late};
use crate::running::check_host_memory;
use crate::swap::{GotoPlan, Standby, rescue_if_lost, with_way_out};
use crate::types::{Machine, Power};

impl Engine {
    /// Keeps a machine's memory on the disk and ends its process.
    pub fn suspend(&self, cx: &Context, target: &str) -> Result<Machine> {
        let (row, _guard) = self.lock_target(cx, target, "suspend")?;
        let running = self.needs_process(&row)?;
        let name = &row.name;
        if !row.config.memory_snapshots {
            return Err(Error::new(
                Code::Precondition,
                format!("{name} was made with --no-memory: its memory cannot be kept"),
            )
            .hint(format!("`spinney stop {name}` turns it off")));
        }
        self.check_room_for_pages(0)?;
        self.check_not_full(&row, Some(&running))?;
        // Its process is all that still has these disks as they were: without it the machine could not be started again.
        self.catalog.read(|tx| self.check_chains(tx, name, &TargetRow::disks(tx, &row.id)?))?;
        let was = self.look(&row)?.0;
        let plan = GotoPlan { was_running: was == Power::Running, ..GotoPlan::default() };
        self.journaled(cx, "suspend", name, Some(&row.id), &json!(plan), || {
            // If it comes to nothing, the guest goes on.
            let standby = Standby { new: None, old: Some(&running), was_running: was == Power::Running };
            let mut point = self.capture_still(cx, &row, was, Some(&running), name.clone())?;
            step("suspend.memory");
            let none = || Error::new(Code::Failed, "the machine has no memory to keep");
            let memory = point.row.memory.clone().ok_or_else(none)?;
            let still = point.still.take();
            let kept = &point;
            let decide = || {
                cx.check()?;
                self.catalog.write(|tx| {
                    kept.check()?;
                    TargetRow::set_suspended(tx, &row.id, &memory)?;
                    OpRow::finish(tx, &cx.id, None)
                })?;
                step("suspend.written");
                drop(standby.disarm());
                self.replace_process(&row.id, &running);
                step("suspend.ended");
                Ok(())
            };
            match still {
                // It was paused, and stays so by itself.
                None => decide(),
                Some(still) => {
                    still.hold(STILL_LIMIT).map_err(too_late)?;
                    let decided = still.during(STILL_LIMIT, decide);
                    rescue_if_lost(&still, decided.is_err(), Some(&running));
                    decided
                }
            }
        })?;
        self.machine_by_id(&row.id)
    }

    /// Goes on with a machine that is suspended.
    pub(crate) fn wake(&self, cx: &Context, row: &TargetRow) -> Result<Machine> {
        let Suspended { memory } = row.suspended.as_ref().ok_or_else(|| {
            Error::new(
                Code::Damaged,
                format!("{} is suspended and its memory is not in the catalog", row.name),
            )
            .hint(format!("`spinney kill {}` turns it off: its disks are whole", row.name))
        })?;
        let plan = json!(GotoPlan::default());
        self.journaled(cx, "start", &row.name, Some(&row.id), &plan, || {
            let store = self.store_of(row)?;
            let disks = self.here_specs(row)?;
            check_host_memory(row.config.memory, 0)?;
            check_ports(&row.name, &row.config.forwards, &[])?;
            cx.phase("starting", 0);
            let new = self.launch_for(row, &row.config, &row.machine, &disks, Some(memory))?;
            let process = new.row.clone();
            // If it comes to nothing, the new process ends.
            let standby = Standby { new: Some(new), old: None, was_running: false };
            let still = standby.new.as_ref().map(|new| {
                let plan = GotoPlan { new: Some(process.clone()), ..GotoPlan::default() };
                self.catalog.write(|tx| OpRow::set_plan(tx, &cx.id, &json!(plan)))?;
                self.load_memory(cx, row, &row.name, store.as_ref(), memory, new).map_err(|error| {
                    let off =
                        format!("`spinney kill {}` turns it off: its disks are another matter", row.name);
                    with_way_out(error, off)
                })?;
                self.open_ports(row, new)?;
                step("wake.loaded");
                // Not to run on by itself: until the commit the disks belong to the memory that is kept.
                self.arm(new, false)
            });
            let Some(still) = still.transpose()? else { return Ok(()) };
            still.hold(STILL_LIMIT).map_err(too_late)?;
            still.during(STILL_LIMIT, || {
                cx.check()?;
                // The memory that is kept is not given up for a machine that is gone already.
                if standby.new.as_ref().is_none_or(|new| !new.process.is_alive()) {
                    let sentence = format!("the QEMU that {} was loaded into has ended", row.name);
                    return Err(
                        Error::new(Code::Failed, sentence).hint("it is suspended as before: try again")
                    );
                }
                self.catalog.write(|tx| {
                    TargetRow::set_process(tx, &row.id, Power::Running, Some(&process))?;
                    OpRow::finish(tx, &cx.id, None)
                })?;
                step("wake.decided");
                if let Some(new) = standby.disarm().map(Arc::new) {
                    self.enlist(&row.id, Arc::clone(&new));
                    if let Err(error) = settle(&new.qmp, "running") {
                        tracing::error!(%error, target = row.name, "the machine is back and does not run");
                        let sentence = format!("{} is back, and does not go on", row.name);
                        return Err(Error::new(Code::Failed, sentence).because(error));
                    }
                }
                Ok(())
            })
        })?;
        self.machine_by_id(&row.id)
    }

    /// Gives up the memory of a suspended machine: it is off.
    pub(crate) fn drop_suspended(&self, cx: &Context, row: &TargetRow) -> Result<Machine> {
        self.journaled(cx, "kill", &row.name, Some(&row.id), &json!({}), || {
            self.catalog.write(|tx| {
                // It was off already.
                TargetRow::set_process(tx, &row.id, Power::Off, None)?;
                OpRow::finish(tx, &cx.id, None)
            })
        })?;
        self.machine_by_id(&row.id)
    }
}
