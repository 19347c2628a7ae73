//! Power: start, stop, kill, pause, resume; and what `ls` and `show` say of a machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use qemu::command::Disk;
use serde_json::json;

use crate::catalog::{AtPowerOff, OpRow, SnapshotRow, TargetRow};
use crate::config::Display;
use crate::context::Context;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::step;
use crate::forwards::{check_ports, set_ports};
use crate::running::{Begin, Running, check_host_memory};
use crate::types::{ForkOptions, Identity, Machine, Power, PoweredOff};
use crate::undo_point::brought_back_by;

/// Nobody waits longer for a guest to power off.
const LONGEST_STOP: Duration = Duration::from_secs(365 * 86_400);

/// What can be done with a machine whose group's store cannot be used: its guest is not to suffer, and it can be given up. None of it waits
/// for what is due at a power-off.
const DO_WITHOUT_STORE: &[&str] = &["stop", "kill", "pause", "resume", "protect", "unprotect", "rm"];

impl Engine {
    /// All machines, by name.
    pub fn list(&self) -> Result<Vec<Machine>> {
        let rows = self.catalog.read(|tx| TargetRow::all(tx, false))?;
        rows.into_iter().map(|row| self.machine_view(row)).collect()
    }

    /// One machine.
    pub fn machine(&self, target: &str) -> Result<Machine> {
        let (name, snapshot) = crate::address::split(target);
        if snapshot.is_some() {
            return Err(Error::new(
                Code::Usage,
                format!("{target:?} is the address of a snapshot, not a machine"),
            ));
        }
        self.machine_view(self.catalog.read(|tx| TargetRow::by_name(tx, name))?)
    }

    /// A row as callers get it.
    pub(crate) fn machine_view(&self, row: TargetRow) -> Result<Machine> {
        let (power, running) = self.look(&row)?;
        let (parent, snapshots, brought_back_by, at_power_off) = self.catalog.read(|tx| {
            let parent = SnapshotRow::visible(tx, row.parent.as_deref())?;
            let parent = parent.map(|id| SnapshotRow::by_id(tx, &id)).transpose()?;
            let lost = power == Power::LostPower;
            let back = if lost { brought_back_by(tx, &row.id)? } else { None };
            let snapshots = SnapshotRow::count(tx, &row.id)?;
            let at_power_off = AtPowerOff::of(tx, &row.id)?;
            Ok((parent.map(|s| s.name), snapshots, back.map(|s| s.full_name()), at_power_off))
        })?;
        let busy = self.locks.busy_with(&row.id).map(str::to_owned);
        let vnc = row.config.display == Display::Vnc;
        let held_because = self.why_held(&row);
        let stopped = running.as_deref().filter(|_| power == Power::Paused);
        Ok(Machine {
            id: row.id,
            name: row.name,
            power,
            stopped_because: stopped.and_then(|running| self.why_stopped(running)),
            held_because,
            group_problem: self.groups.by_id(&row.group)?.problem().map(str::to_owned),
            group: row.group_name,
            config: row.config,
            uuid: row.uuid,
            macs: row.macs,
            parent,
            snapshots,
            protected: row.protected,
            throw_away: row.throw_away,
            created: row.created,
            pid: running.as_ref().map(|r| r.process.id().pid),
            brought_back_by,
            left_at_power_off: at_power_off.and_then(AtPowerOff::why),
            console: running.as_ref().map(|r| r.run.console()),
            vnc: running.as_ref().filter(|_| vnc).map(|r| r.run.vnc()),
            busy,
            accel: running.as_ref().map(|r| r.row.accel.clone()),
            qemu: running.as_ref().map(|r| r.row.version.clone()),
        })
    }

    /// A target by name, locked for one operation.
    pub(crate) fn lock_target(
        &self,
        cx: &Context,
        name: &str,
        kind: &'static str,
    ) -> Result<(TargetRow, crate::locks::TargetGuard<'_>)> {
        let (name, snapshot) = crate::address::split(name);
        if snapshot.is_some() {
            return Err(Error::new(Code::Usage, format!("{kind} takes a machine, not a snapshot"))
                .hint(format!("write `spinney {kind} {name}`")));
        }
        loop {
            let id = self.catalog.read(|tx| TargetRow::by_name(tx, name))?.id;
            let guard = self.locks.acquire(&id, kind, cx)?;
            // Read again: whoever held the lock may have changed it, and even its name.
            let row = self.catalog.read(|tx| TargetRow::by_name(tx, name))?;
            if row.id == id {
                if !DO_WITHOUT_STORE.contains(&kind) {
                    self.group_of(&row)?.store()?;
                }
                let row = self.find_again(row, kind == "kill")?;
                let waits = !DO_WITHOUT_STORE.contains(&kind);
                return Ok((if waits { self.settle_power_off(cx, row)? } else { row }, guard));
            }
        }
    }

    /// A machine as it is now, by its row.
    pub(crate) fn machine_by_id(&self, id: &str) -> Result<Machine> {
        self.machine_view(self.catalog.read(|tx| TargetRow::by_id(tx, id))?)
    }

    /// Boots a machine that is off, or goes on with one that is suspended.
    pub fn start(&self, cx: &Context, target: &str) -> Result<Machine> {
        let (mut row, guard) = self.lock_target(cx, target, "start")?;
        if self.look(&row)?.1.is_none() {
            // It may have ended in this very moment.
            row = self.settle_power_off(cx, row)?;
        }
        match self.look(&row)? {
            // A template: what is done to the copy is not done to it.
            (Power::Off | Power::LostPower | Power::Suspended, _) if row.protected => {
                drop(guard);
                let options =
                    ForkOptions { name: None, count: 1, identity: Identity::Isolate, throw_away: true };
                let forked = self.fork(cx, target, &options)?;
                let fork = forked.forks.into_iter().next();
                return fork
                    .map(|fork| fork.machine)
                    .ok_or_else(|| Error::new(Code::Failed, "there is no fork"));
            }
            (Power::Off | Power::LostPower, _) => {}
            (Power::Suspended, _) => {
                self.check_room(0)?;
                return self.wake(cx, &row);
            }
            (Power::Running, _) => {
                return Err(Error::new(Code::Refused, format!("{target} is running already")));
            }
            (Power::Paused, _) => {
                return Err(Error::new(Code::Refused, format!("{target} is paused, not off"))
                    .hint(format!("`spinney resume {target}` lets it run on")));
            }
        }
        self.check_room(0)?;
        cx.phase("starting", 0);
        self.journaled(cx, "start", target, Some(&row.id), &json!({}), || {
            self.boot(&row, Begin::Boot)?;
            step("start.kept");
            self.catalog.write(|tx| OpRow::finish(tx, &cx.id, None))
        })?;
        drop(guard);
        self.machine_by_id(&row.id)
    }

    /// Starts the process of a machine that is off and writes it down.
    pub(crate) fn boot(&self, row: &TargetRow, begin: Begin<'_>) -> Result<Arc<Running>> {
        let disks = self.here_specs(row)?;
        check_host_memory(row.config.memory, 0)?;
        check_ports(&row.name, &row.config.forwards, &[])?;
        let running = self.launch(row, &row.config, &row.machine, disks, begin)?;
        step("start.launched");
        if let Err(error) = self.open_ports(row, &running) {
            self.end_process(&row.id, &running);
            return Err(error);
        }
        let power = if begin == Begin::Boot { Power::Running } else { Power::Paused };
        self.keep_process(row, running, power)
    }

    /// Opens the ports that lead into a machine.
    pub(crate) fn open_ports(&self, row: &TargetRow, running: &Running) -> Result<()> {
        if row.config.forwards.is_empty() {
            return Ok(());
        }
        set_ports(&running.qmp, &row.name, &row.config.forwards)
    }

    /// What QEMU is told of the disks of here, after a look at their files.
    pub(crate) fn here_specs(&self, row: &TargetRow) -> Result<Vec<Disk>> {
        let opened = self.catalog.read(|tx| {
            let disks = TargetRow::disks(tx, &row.id)?;
            self.check_chains(tx, &row.name, &disks)?;
            Self::opened(tx, &disks)
        })?;
        self.disk_specs(&row.name, &opened)
    }

    /// Writes a process down and puts it where commands find it. If that fails, it is ended.
    pub(crate) fn keep_process(
        &self,
        row: &TargetRow,
        running: Running,
        power: Power,
    ) -> Result<Arc<Running>> {
        let kept = self.catalog.write(|tx| TargetRow::set_process(tx, &row.id, power, Some(&running.row)));
        if let Err(error) = kept {
            self.end_process(&row.id, &running);
            return Err(error);
        }
        let running = Arc::new(running);
        self.enlist(&row.id, Arc::clone(&running));
        Ok(running)
    }

    fn write_off(&self, cx: &Context, row: &TargetRow) -> Result<()> {
        self.catalog.write(|tx| {
            TargetRow::set_ended(tx, &row.id, Power::Off)?;
            OpRow::finish(tx, &cx.id, None)
        })
    }

    /// Presses the power button and waits for the guest to power off. Fails with [`Code::TimedOut`] if it does not, unless
    /// `kill` allows to cut the power then.
    pub fn stop(&self, cx: &Context, target: &str, timeout: Duration, kill: bool) -> Result<PoweredOff> {
        let (row, _guard) = self.lock_target(cx, target, "stop")?;
        let running = self.needs_process(&row)?;
        // One that its full disk has stopped goes on to hear the button, and is not stopped by us afterwards.
        let full = self.why_stopped(&running).is_some();
        let was_paused = !full && self.look(&row)?.0 == Power::Paused;
        let plan = json!({ "was_paused": was_paused });
        self.journaled(cx, "stop", target, Some(&row.id), &plan, || {
            cx.phase("waiting for the guest to power off", 0);
            if was_paused || full {
                running.qmp.execute("cont", json!({}))?;
            }
            let pressed = press_and_wait(cx, &running, target, timeout, kill);
            if pressed.is_err() && was_paused {
                running.qmp.execute("stop", json!({}))?;
            }
            pressed?;
            self.end_process(&row.id, &running);
            step("stop.ended");
            self.write_off(cx, &row)
        })?;
        self.after_power_off(&cx.another(), &row.id, true)
    }

    /// Cuts the power. Of a suspended machine the memory that is kept goes.
    pub fn kill(&self, cx: &Context, target: &str) -> Result<PoweredOff> {
        let (row, _guard) = self.lock_target(cx, target, "kill")?;
        if self.look(&row)?.0 == Power::Suspended {
            return Ok(PoweredOff { machine: self.drop_suspended(cx, &row)?, then: None });
        }
        let running = self.needs_process(&row)?;
        self.journaled(cx, "kill", target, Some(&row.id), &json!({}), || {
            self.end_process(&row.id, &running);
            step("kill.ended");
            self.write_off(cx, &row)
        })?;
        self.after_power_off(&cx.another(), &row.id, true)
    }

    /// Lets the guest's CPUs stand still.
    pub fn pause(&self, cx: &Context, target: &str) -> Result<Machine> {
        self.set_running(cx, target, "pause", "stop", Power::Paused)
    }

    /// Lets a paused guest run on.
    pub fn resume(&self, cx: &Context, target: &str) -> Result<Machine> {
        self.set_running(cx, target, "resume", "cont", Power::Running)
    }

    fn set_running(
        &self,
        cx: &Context,
        target: &str,
        kind: &'static str,
        command: &str,
        power: Power,
    ) -> Result<Machine> {
        let (row, _guard) = self.lock_target(cx, target, kind)?;
        let running = self.needs_process(&row)?;
        // A guest that its full disk has stopped can be paused too: then it does not go on by itself.
        let held_back = power == Power::Paused && row.power != power && self.why_stopped(&running).is_some();
        if self.look(&row)?.0 == power && !held_back {
            let state = if power == Power::Paused { "paused" } else { "running" };
            return Err(Error::new(Code::Refused, format!("{target} is {state} already")));
        }
        if power == Power::Running {
            self.check_can_go_on(&row, &running)?;
        }
        self.journaled(cx, kind, target, Some(&row.id), &json!({}), || {
            running.qmp.execute(command, json!({}))?;
            self.catalog.write(|tx| {
                if TargetRow::by_id(tx, &row.id)?.process.as_ref() != Some(&running.row) {
                    return Err(Error::new(Code::Failed, format!("{target} ended meanwhile")));
                }
                TargetRow::set_process(tx, &row.id, power, Some(&running.row))?;
                OpRow::finish(tx, &cx.id, None)
            })
        })?;
        self.machine_by_id(&row.id)
    }

    pub(crate) fn needs_process(&self, row: &TargetRow) -> Result<Arc<Running>> {
        let (power, running) = self.look(row)?;
        let name = &row.name;
        running.ok_or_else(|| match power {
            Power::Suspended => Error::new(Code::Refused, format!("{name} is suspended")).hint(format!(
                "`spinney start {name}` goes on where it was; `spinney kill {name}` gives that up"
            )),
            _ => Error::new(Code::Refused, format!("{name} is off"))
                .hint(format!("`spinney start {name}` starts it")),
        })
    }
}

/// Presses the power button until the process has ended, or until it may be ended.
fn press_and_wait(
    cx: &Context,
    running: &Running,
    target: &str,
    timeout: Duration,
    kill: bool,
) -> Result<()> {
    let deadline = Instant::now() + timeout.min(LONGEST_STOP);
    let mut pressed = Instant::now();
    running.qmp.execute("system_powerdown", json!({}))?;
    while !running.process.wait(Duration::from_millis(50)) {
        cx.check()?;
        if Instant::now() >= deadline {
            if kill {
                return Ok(());
            }
            let seconds = timeout.as_secs();
            let message = format!(
                "{target} did not power off within {seconds} s; it was asked to, and may still do so"
            );
            return Err(
                Error::new(Code::TimedOut, message).hint(format!("`spinney kill {target}` cuts its power"))
            );
        }
        // A guest that was just booting had nobody at the button yet.
        if pressed.elapsed() > Duration::from_secs(5) {
            pressed = Instant::now();
            running.qmp.execute("system_powerdown", json!({})).ok();
        }
    }
    Ok(())
}
