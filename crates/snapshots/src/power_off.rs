//! What is done with a machine when it is powered off, as its settings say (`on_poweroff`): it goes back, a snapshot of it is taken,
//! somebody is asked, or nothing.
//!
//! ```text
//!   1  the process ends: the guest powers itself off, or `stop`, or `kill`
//!   2  catalog, one transaction: the machine is off, and something is due       if we die before, the next start does this
//!   3  an operation of its own: `power-off goto` or `power-off take`
//!      the transaction in which it happens says too that nothing is due         if we die before, the next start does this
//! ```
//! So it is done once, whoever dies. A machine that lost its power never gets to 2; nor does one whose process ends for something else (a
//! goto, `suspend`): that is in the catalog before the process ends, or the process is out of the map.
//!
//! `stop` and `kill` see to 3 before they answer. When a guest powers itself off, a thread of the daemon hears of the end of the process and has
//! it done, at once or when the machine is worked on no longer; the same thread does what an earlier daemon has left. A command that comes in
//! between sees to it first ([`Engine::settle_power_off`]), so that what it finds does not depend on who was quicker.
//!
//! What fails is told and not tried again: the machine stays off as it was, and `show` says why. It says so too of a machine about which
//! somebody is to be asked, until he has answered ([`Engine::answer_power_off`]).
//!
//! Whatever else is to follow a power-off (a machine that goes when it stops) is one more arm of [`Engine::carry_out`], with a kind of its
//! own, and a transaction that calls [`AtPowerOff::end`].

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use qemu::ends::{Awaited, Ends};
use qemu::process::Process;
use rusqlite::Transaction;
use serde_json::json;

use crate::catalog::{AtPowerOff, OpRow, SnapshotRow, TargetRow};
use crate::clone::below;
use crate::config::{MachineConfig, OnPowerOff};
use crate::context::Context;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::step;
use crate::goto::Purpose;
use crate::running::Running;
use crate::take::Entry;
use crate::types::{Power, PoweredOff, TakeOptions};

/// Going back, in the journal.
pub(crate) const GOTO: &str = "power-off goto";
/// Taking a snapshot, in the journal.
pub(crate) const TAKE: &str = "power-off take";
/// Throwing a machine away that was made to be, in the journal.
pub(crate) const THROW_AWAY: &str = "throw away";
/// All that follows a power-off and can be taken back, in the journal.
pub(crate) const KINDS: [&str; 2] = [GOTO, TAKE];
/// What a machine is busy with meanwhile.
const BUSY_WITH: &str = "power-off";

/// The note of a snapshot that is taken then.
const NOTE: &str = "taken at power-off";
/// It is looked at least so often, though somebody rings whenever there is something to see.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// When a machine that was worked on is looked at again.
const BUSY: Duration = Duration::from_millis(200);
/// When it is looked again after something that should not fail.
const TROUBLE: Duration = Duration::from_secs(2);

/// What there is to do, and to wait for.
#[derive(Debug, Default)]
pub struct Watch {
    /// Id and name of machines that were powered off: [`Engine::see_to_power_off`].
    pub due: Vec<(String, String)>,
    /// Processes that run.
    pub processes: Vec<Awaited>,
    /// How long there is nothing more to do if none of them ends.
    pub limit: Duration,
}

impl Watch {
    fn again_after(&mut self, time: Duration) {
        self.limit = self.limit.min(time);
    }
}

impl Engine {
    /// Where the ends of processes are waited for.
    pub fn ends(&self) -> Arc<Ends> {
        Arc::clone(&self.ends)
    }

    /// Writes down which processes have ended by themselves. Returns what is to be done with their machines, and what to wait for then.
    pub fn look_for_ends(&self) -> Watch {
        let mut watch = Watch { limit: LOOK_EVERY, ..Watch::default() };
        let looked = self.watch_processes(&mut watch).and_then(|()| self.watch_due(&mut watch));
        if let Err(error) = looked {
            tracing::warn!(%error, causes = ?error.causes(), "it cannot be seen what was powered off");
            watch.again_after(TROUBLE);
        }
        watch
    }

    /// A throw-away machine that has stopped goes, with all that it had, and is not kept for undo. One with something that is not to be
    /// removed stays, and is like any other from then on.
    fn throw_away(&self, cx: &Context, row: &TargetRow) -> Result<()> {
        if let Some(wanted) = self.catalog.read(|tx| wanted(tx, row))? {
            self.catalog.write(|tx| TargetRow::set_lasting(tx, &row.id))?;
            cx.warn(format!("{} is not thrown away: {wanted}", row.name));
            return self.carry_out_if_due(cx, &row.id, false);
        }
        self.journaled(cx, THROW_AWAY, &row.name, Some(&row.id), &json!({}), || {
            self.catalog.write(|tx| {
                AtPowerOff::end(tx, &row.id)?;
                let long_ago = Some(Timestamp::UNIX_EPOCH);
                let snapshots = SnapshotRow::of_target(tx, &row.id)?;
                for snapshot in &snapshots {
                    SnapshotRow::set_removed(tx, &snapshot.id, long_ago)?;
                }
                TargetRow::set_removed(tx, &row.id, long_ago)?;
                // What was done with it has gone with it.
                let its = snapshots.iter().map(|snapshot| &snapshot.id).chain([&row.id]);
                for op in OpRow::needing(tx, its)? {
                    OpRow::forget_undo(tx, &op.id)?;
                }
                OpRow::finish(tx, &cx.id, None)
            })
        })?;
        step("throw-away.written");
        Ok(())
    }

    fn watch_due(&self, watch: &mut Watch) -> Result<()> {
        let spent = self.catalog.read(|tx| TargetRow::all(tx, false))?.into_iter().filter(is_spent);
        for row in self.catalog.read(AtPowerOff::due)?.into_iter().chain(spent) {
            // Whoever works with it sees to it himself, or it is for the next look.
            match self.locks.busy_with(&row.id) {
                Some(_) => watch.again_after(BUSY),
                None => watch.due.push((row.id, row.name)),
            }
        }
        Ok(())
    }

    fn watch_processes(&self, watch: &mut Watch) -> Result<()> {
        for row in self.catalog.read(|tx| TargetRow::all(tx, false))? {
            let Some(process) = &row.process else { continue };
            let running = self.running_map().get(&row.id).cloned();
            // One that does not answer is in no map, and ends like any other.
            let awaited = match running {
                Some(running) => running.process.is_alive().then(|| running.process.awaited()),
                None => Process::find(process.id).map(|process| process.awaited()),
            };
            match awaited {
                Some(Ok(process)) => watch.processes.push(process),
                Some(Err(error)) => {
                    tracing::warn!(target = row.name, %error, "the end of a process cannot be waited for");
                    watch.again_after(TROUBLE);
                }
                None => match self.note_end(&row.id) {
                    Ok(true) => {}
                    Ok(false) => watch.again_after(BUSY),
                    Err(error) => {
                        tracing::warn!(target = row.name, %error, "the end of a process cannot be written down");
                        watch.again_after(TROUBLE);
                    }
                },
            }
        }
        Ok(())
    }

    /// Writes down that a machine's process has ended. False if the machine is worked on: then that is for whoever does.
    fn note_end(&self, id: &str) -> Result<bool> {
        let Some(_guard) = self.locks.try_acquire(id, BUSY_WITH) else { return Ok(false) };
        let row = self.catalog.read(|tx| TargetRow::by_id(tx, id))?;
        self.look(&self.find_again(row, false)?)?;
        Ok(true)
    }

    /// Does with a machine that was powered off, by its id, what its settings say, if that is still due.
    pub fn see_to_power_off(&self, cx: &Context, id: &str) -> Result<PoweredOff> {
        let _guard = self.locks.acquire(id, BUSY_WITH, cx)?;
        self.after_power_off(cx, id, false)
    }

    /// The same for the holder of the target's lock. `asked`: somebody has powered it off.
    pub(crate) fn after_power_off(&self, cx: &Context, id: &str, asked: bool) -> Result<PoweredOff> {
        self.carry_out_if_due(cx, id, asked)?;
        Ok(PoweredOff { machine: self.machine_by_id(id)?, then: self.operation(&cx.id).ok() })
    }

    /// For the holder of a target's lock, before anything else is done to it: what is due comes first. Returns the machine as it is then.
    pub(crate) fn settle_power_off(&self, cx: &Context, row: TargetRow) -> Result<TargetRow> {
        let has_ended = |running: &Arc<Running>| !running.process.is_alive();
        if self.running_map().get(&row.id).is_some_and(has_ended) {
            // Nobody has noticed yet.
            self.look(&row)?;
        }
        // Whoever gives up what he came for does not mean this.
        self.carry_out_if_due(&cx.another().uncancelled(), &row.id, false)?;
        let row = self.catalog.read(|tx| TargetRow::by_id(tx, &row.id))?;
        match row.throw_away && row.removed.is_some() {
            true => Err(Error::new(Code::NotFound, format!("{} has stopped, and so is gone", row.name))),
            false => Ok(row),
        }
    }

    /// Says what is to be done with a machine that was powered off and left as it is.
    pub fn answer_power_off(&self, cx: &Context, target: &str, then: OnPowerOff) -> Result<PoweredOff> {
        if then == OnPowerOff::Ask {
            return Err(Error::new(Code::Usage, "what is to be done is not to be asked again"));
        }
        let (row, _guard) = self.lock_target(cx, target, BUSY_WITH)?;
        let left = self.catalog.read(|tx| AtPowerOff::of(tx, &row.id))?;
        if !matches!(left, Some(AtPowerOff::Left(_))) {
            return Err(Error::new(
                Code::Refused,
                format!("nothing is to be decided about {target} any more"),
            ));
        }
        self.carry_out(cx, &row, then, true)?;
        Ok(PoweredOff { machine: self.machine_by_id(&row.id)?, then: self.operation(&cx.id).ok() })
    }

    /// What is due, if anything is. If it fails, that is told, and nothing is due any more.
    fn carry_out_if_due(&self, cx: &Context, id: &str, asked: bool) -> Result<()> {
        let (row, due) = self.catalog.read(|tx| Ok((TargetRow::by_id(tx, id)?, AtPowerOff::of(tx, id)?)))?;
        if is_spent(&row) {
            return self.throw_away(cx, &row);
        }
        if due != Some(AtPowerOff::Due) {
            return Ok(());
        }
        step("power-off.due");
        let Err(error) = self.carry_out(cx, &row, row.config.on_poweroff, asked) else { return Ok(()) };
        tracing::warn!(target = row.name, %error, causes = ?error.causes(), "what is due at a power-off has failed");
        let why = error.to_string();
        // It may have failed after it had happened.
        if self.catalog.write(|tx| AtPowerOff::leave(tx, id, &why))? {
            let hint = error.hint_text().map(|hint| format!(" ({hint})")).unwrap_or_default();
            cx.warn(format!("{} is off, and left as it is: {error}{hint}", row.name));
        }
        Ok(())
    }

    /// Step 3, for a machine that is off and locked.
    fn carry_out(&self, cx: &Context, row: &TargetRow, what: OnPowerOff, asked: bool) -> Result<()> {
        match what {
            OnPowerOff::Nothing | OnPowerOff::Ask => self.catalog.write(|tx| AtPowerOff::end(tx, &row.id)),
            OnPowerOff::Back => self.go_back(cx, row, asked),
            OnPowerOff::Take => {
                let options = TakeOptions { note: NOTE.into(), ..TakeOptions::default() };
                let entry = Entry { kind: TAKE, asked, about: &|_| {} };
                self.take_locked(cx, &entry, row, options).map(drop)
            }
        }
    }

    /// The machine becomes what it was at the snapshot that here comes from: suspended in its memory if it has one, else off.
    fn go_back(&self, cx: &Context, row: &TargetRow, asked: bool) -> Result<()> {
        let snapshot = self.parent_of_here(row)?;
        let nothing_new = self.is_as_it_was(row, &snapshot)?;
        let wanted = if snapshot.memory.is_some() { Power::Suspended } else { Power::Off };
        if nothing_new && wanted == Power::Off {
            return self.catalog.write(|tx| AtPowerOff::end(tx, &row.id));
        }
        // Or a machine that was told so after the snapshot was taken would go back once.
        let on_poweroff = row.config.on_poweroff;
        let config = MachineConfig { on_poweroff, ..snapshot.config.clone() };
        let purpose = Purpose { kind: GOTO, subject: snapshot.full_name(), undoes: None, asked };
        self.goto_locked(cx, &purpose, row, &SnapshotRow { config, ..snapshot }, wanted, nothing_new)
            .map(drop)
    }

    /// True if going there would lose nothing: the disks hold nothing that they did not hold at the snapshot, and the settings are the same.
    fn is_as_it_was(&self, row: &TargetRow, snapshot: &SnapshotRow) -> Result<bool> {
        let config = MachineConfig { on_poweroff: snapshot.config.on_poweroff, ..row.config.clone() };
        let (here, under, there) = self.catalog.read(|tx| {
            let here = TargetRow::disks(tx, &row.id)?;
            Ok((here.clone(), below(tx, &here)?, SnapshotRow::disks(tx, &snapshot.id)?))
        })?;
        Ok(config == snapshot.config && under == there && self.nothing_written(&here)?)
    }
}

/// True of a throw-away machine that has stopped.
fn is_spent(row: &TargetRow) -> bool {
    row.throw_away && row.removed.is_none() && matches!(row.power, Power::Off | Power::LostPower)
}

/// What of a machine somebody has said that it is not to go, if there is something.
fn wanted(tx: &Transaction<'_>, row: &TargetRow) -> Result<Option<String>> {
    if row.protected {
        return Ok(Some("it is protected".into()));
    }
    let snapshots = SnapshotRow::of_target(tx, &row.id)?;
    let kept = snapshots.iter().filter(|snapshot| snapshot.removed.is_none());
    let mut wanted = kept.filter(|snapshot| snapshot.protected || snapshot.keep).map(|snapshot| {
        let how = if snapshot.protected { "protected" } else { "kept" };
        format!("{} is {how}", snapshot.full_name())
    });
    Ok(wanted.next_back())
}

/// For people who start the daemon.
pub(crate) fn note(row: &TargetRow) -> String {
    let what = match row.config.on_poweroff {
        OnPowerOff::Back => "it goes back",
        OnPowerOff::Take => "a snapshot of it is taken",
        OnPowerOff::Nothing | OnPowerOff::Ask => "nothing is done",
    };
    format!("{} was powered off: {what} now (on_poweroff)", row.name)
}

/// True if an entry of the journal followed a power-off that somebody asked for.
pub(crate) fn is_asked_for(op: &OpRow) -> bool {
    KINDS.contains(&op.kind.as_str()) && op.plan.get("asked") == Some(&true.into())
}
