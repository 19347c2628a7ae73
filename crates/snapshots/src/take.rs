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
//! streams (`qemu/src/live.rs`). In a stop-copy it stands still for 4 as well, which needs no stream (`qemu/src/outside.rs`). Steps 3 to 7
//! are in `capture.rs`, what the disks do in `switch.rs`.
//!
//! A failure before the switch takes 3 back, as long as it is certain that QEMU did not switch. After it disks only roll forward: the
//! guest has written to the overlays, so they stay, with or without a snapshot. A machine that is off skips 4 to 7.

use std::time::{Duration, Instant};

use qemu::live;
use qemu::save::SaveError;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::capture::Unwritten;
use crate::catalog::{Act, AtPowerOff, Expiry, OpRow, SnapshotRow, TargetRow, Things};
use crate::config::Firmware;
use crate::context::Context;
use crate::disks::{DEPTH_LIMIT, NewOverlay};
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::expire::{check_expiry, kept_does_not_expire};
use crate::fault::step;
use crate::let_go::save_error;
use crate::name::{check_note, check_snapshot_name};
use crate::power_off;
use crate::running::Running;
use crate::tree::view_by_id;
use crate::types::{Mode, Power, Snapshot, TakeOptions};

/// What recovery has to know of a take.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct TakePlan {
    /// The guest ran when the take began.
    pub(crate) was_running: bool,
    /// Somebody asked for it.
    #[serde(default)]
    pub(crate) asked: bool,
}

/// On whose behalf a take happens, for the journal.
pub(crate) struct Entry<'a> {
    pub(crate) kind: &'a str,
    /// Somebody asked for it, if only by what he asked for before.
    pub(crate) asked: bool,
    /// Hears what the snapshot is called.
    pub(crate) about: &'a dyn Fn(&str),
}

/// What a take is to make.
pub(crate) struct TakeJob<'a> {
    pub(crate) target: &'a TargetRow,
    pub(crate) name: String,
    pub(crate) note: String,
    pub(crate) keep: bool,
    /// How long it stays, if it is to go by itself.
    pub(crate) expire: Option<Duration>,
    pub(crate) undo_point: bool,
    pub(crate) mode: Mode,
    pub(crate) power: Power,
    /// How long the guest may stand still.
    pub(crate) max_pause: Option<Duration>,
    /// The guest stands still afterwards, until it is replaced or let go.
    pub(crate) stands_still: bool,
    /// It is what was due when the machine was powered off.
    pub(crate) at_power_off: bool,
}

impl Engine {
    /// Takes a snapshot of a machine as it is: running, paused or off. Returns when it is durable.
    pub fn take(&self, cx: &Context, target: &str, options: TakeOptions) -> Result<Snapshot> {
        check_note(&options.note)?;
        if let Some(name) = &options.name {
            check_snapshot_name(name)?;
        }
        let expire = options.expire_seconds.map(check_expiry).transpose()?;
        if options.keep && expire.is_some() {
            return Err(kept_does_not_expire());
        }
        let (row, guard) = self.lock_target(cx, target, "take")?;
        let entry = Entry { kind: "take", asked: true, about: &|subject| guard.about(subject) };
        self.take_locked(cx, &entry, &row, options)
    }

    /// The same of a target that is locked.
    pub(crate) fn take_locked(
        &self,
        cx: &Context,
        entry: &Entry<'_>,
        row: &TargetRow,
        options: TakeOptions,
    ) -> Result<Snapshot> {
        let expire = options.expire_seconds.map(check_expiry).transpose()?;
        let (power, running) = self.look(row)?;
        self.check_not_full(row, running.as_deref())?;
        let mode = choose_mode(row, power, running.as_deref(), &options)?;
        if matches!(mode, Mode::Off | Mode::DiskOnly | Mode::Suspended) {
            self.check_room(row.config.disks.len())?;
        } else {
            self.check_room_for_pages(row.config.disks.len())?;
        }
        let name = self.choose_name(row, options.name)?;
        if row.throw_away && !options.keep {
            let machine = &row.name;
            cx.warn(format!("{machine}@{name} goes with {machine} when that stops, unless one of them is kept or protected"));
        }
        let power = if mode == Mode::DiskOnly { Power::Off } else { settled(power) };
        let job = TakeJob {
            target: row,
            name,
            note: options.note,
            keep: options.keep,
            expire,
            undo_point: false,
            mode,
            power,
            max_pause: options.max_pause_us.map(Duration::from_micros),
            stands_still: false,
            at_power_off: entry.kind == power_off::TAKE,
        };
        let subject = format!("{}@{}", row.name, job.name);
        (entry.about)(&subject);
        self.warn_of_disks(cx, row)?;
        let was_running = power == Power::Running;
        let plan = json!(TakePlan { was_running, asked: entry.asked });
        let id = self.journaled(cx, entry.kind, &subject, Some(&row.id), &plan, || {
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
        match running {
            Some(running) => self.shorten(cx, target, running)?,
            // Whoever starts it next is not to wait for that.
            None => self.settle_below(cx, target, &frozen)?,
        }
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
                snapshot.check()?;
                if running.is_none() {
                    point_here_at(tx, &target.id, &overlays)?;
                }
                row.insert(tx, &frozen)?;
                if let Some(after) = job.expire {
                    SnapshotRow::set_expiry(tx, &row.id, Some(&Expiry::begin(tx, after)?))?;
                }
                TargetRow::set_parent(tx, &target.id, Some(&row.id))?;
                AtPowerOff::taken(tx, &target.id, job.at_power_off)?;
                let made = Things { snapshots: vec![row.id.clone()], ..Things::default() };
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

    /// Here as it is, for copies of it: the disks are frozen, and the machine goes on over them. No snapshot of it is kept.
    pub(crate) fn capture_for_forks(
        &self,
        cx: &Context,
        row: &TargetRow,
        power: Power,
        running: &Running,
    ) -> Result<Unwritten<'_>> {
        let mode = choose_mode(row, power, Some(running), &TakeOptions::default())?;
        self.check_room_for_pages(row.config.disks.len())?;
        let job = TakeJob {
            target: row,
            name: "fork".into(),
            note: String::new(),
            keep: false,
            expire: None,
            undo_point: false,
            mode,
            power,
            max_pause: None,
            stands_still: false,
            at_power_off: false,
        };
        let overlays = self.catalog.read(|tx| {
            let frozen = TargetRow::disks(tx, &row.id)?;
            self.plan_overlays(tx, &row.name, &frozen, DEPTH_LIMIT)
        })?;
        self.shorten(cx, row, running)?;
        let began = Instant::now();
        self.make_overlays(&overlays)?;
        self.capture(cx, &job, Some(running), &overlays, began)
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
        let Some(running) = running else { return Ok(()) };
        if running.row.ram.is_some() {
            let reason = "its memory is mapped from the snapshot that it was brought back from".into();
            return Err(SaveError::NotLive { reason });
        }
        live::check(&running.qmp)
    };
    match options.mode {
        None => match live() {
            Ok(()) => Ok(Mode::Live),
            Err(SaveError::NotLive { reason }) => {
                let mode = running.map_or(Mode::PreCopy, without_live);
                tracing::info!(machine = name, reason, ?mode, "no live take");
                Ok(mode)
            }
            Err(error) => Err(save_error(error)),
        },
        Some(Mode::Live) => live().map(|()| Mode::Live).map_err(save_error),
        Some(mode @ (Mode::PreCopy | Mode::StopCopy)) => Ok(mode),
        Some(mode) => Err(Error::new(Code::Usage, format!("{mode:?} is not a mode that can be asked for"))),
    }
}

/// The mode with the least pause of those that are not live. Of a machine whose memory is mapped only what it has written since it was
/// brought back is read while it stands still.
fn without_live(running: &Running) -> Mode {
    match (running.row.ram, running.process.own_memory()) {
        (Some(_), Some(bytes)) if bytes <= STILL_BYTES => Mode::StopCopy,
        _ => Mode::PreCopy,
    }
}

/// Memory that is read faster while the guest stands still than a pre-copy takes for its end: some 50 ms (`docs/decisions/0022-view.md`).
const STILL_BYTES: u64 = 256 << 20;

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
