//! `fork`: copies of a machine that run, of a snapshot or of here, one or many at once, all or none.
//!
//! ```text
//!   1  lock the source; look at names, memory and room for all of them
//!   2  find the state: a snapshot's; of here, as in a take: the disks are frozen, the memory is taken, the source runs on
//!   3  for each: overlays over the disks, a QEMU that maps the memory and stands still
//!   4  catalog, one transaction: all of them exist, with a snapshot `start` each that is the state; journal: "done"
//!   5  all of them run; what is to be new of their identity becomes so
//! ```
//! Until 4 nothing speaks of what 3 made: whatever fails, is cancelled or dies leaves nothing of any of them. The snapshot `start` costs a
//! row: `back` brings a fork to its beginning, and the state stays for as long as a fork needs it, whatever becomes of the source.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use qemu::save::settle;
use rusqlite::Transaction;
use serde_json::json;

use crate::address;
use crate::catalog::{Act, Facts, Memory, OpRow, SnapshotRow, TargetRow, Things, now};
use crate::clone::{below, of_its_own};
use crate::config::MachineConfig;
use crate::context::Context;
use crate::create::name_taken;
use crate::disks::{GOTO_DEPTH_LIMIT, NewOverlay};
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::step;
use crate::id::{new_id, new_mac};
use crate::identity::renew;
use crate::name::check_name;
use crate::pins::Pins;
use crate::running::{Running, check_memory_for_forks};
use crate::swap::with_way_out;
use crate::take::{micros, point_here_at};
use crate::types::{Fork, ForkOptions, Forked, Identity, IdentityItem, ItemState, Mode, Power};

/// Most forks at once: more is a mistake.
const MOST: u32 = 1000;
/// QEMUs that are started side by side.
const SIDE_BY_SIDE: usize = 4;
/// What a fork's first snapshot is called.
const START: &str = "start";

/// What is forked.
struct Origin<'a> {
    /// Its address in full.
    name: String,
    config: MachineConfig,
    machine: String,
    facts: Facts,
    memory: Option<Memory>,
    /// Disk and layer; nobody writes to these layers any more.
    disks: Vec<(String, String)>,
    /// Of a state that was taken for this: its pages, until the catalog speaks of them.
    hold: Option<pages::Hold>,
    pause_us: Option<u64>,
    /// Keeps the disks.
    _pins: Pins<'a>,
}

/// A fork on its way.
struct Coming {
    row: TargetRow,
    overlays: Vec<NewOverlay>,
    read_only: Vec<(String, String)>,
    running: Option<Running>,
}

impl Engine {
    /// Makes machines that run, copies of a snapshot or of here: all of them, or none.
    pub fn fork(&self, cx: &Context, address: &str, options: &ForkOptions) -> Result<Forked> {
        let began = Instant::now();
        if options.count == 0 || options.count > MOST {
            return Err(Error::new(
                Code::Usage,
                format!("{} forks: between 1 and {MOST} are made at once", options.count),
            ));
        }
        let (target, snapshot) = address::split(address);
        let (row, guard) = self.lock_target(cx, target, "fork")?;
        let names = self.fork_names(&row.name, snapshot.is_some(), options)?;
        let subject = format!("{address} {}", names.join(" "));
        guard.about(&subject);
        let stored = match snapshot {
            Some(_) => Some(self.catalog.read(|tx| Ok(address::resolve(tx, address)?.1))?),
            None => None,
        };
        self.check_forks(&row, stored.as_ref(), options)?;
        let ids: Vec<String> = names.iter().map(|_| new_id()).collect();
        let first = ids.first().map(String::as_str);
        let (forks, from, source_pause_us, took_us) =
            self.journaled(cx, "fork", &subject, first, &json!({}), || {
                let origin = match stored {
                    Some(snapshot) => self.origin_snapshot(cx, &row, snapshot)?,
                    None => self.origin_here(cx, &row)?,
                };
                step("fork.origin");
                let coming = self.make_forks(cx, &row, &origin, ids.iter().zip(&names), options)?;
                let forks = self.keep_forks(cx, &origin, coming)?;
                Ok((forks, origin.name.clone(), origin.pause_us, micros(began)))
            })?;
        // They run, and are the user's: he need not wait for the source.
        drop(guard);
        let forks = self.introduce(cx, forks, options.identity)?;
        Ok(Forked { from, forks, source_pause_us, took_us })
    }

    /// Their names, all free.
    fn fork_names(&self, source: &str, of_snapshot: bool, options: &ForkOptions) -> Result<Vec<String>> {
        let numbered = |base: &str, number: u32| format!("{base}-{number}");
        let taken = |name: &str| self.catalog.read(|tx| TargetRow::name_taken(tx, name));
        let names = match &options.name {
            Some(name) if options.count == 1 => vec![name.clone()],
            Some(base) => (1..=options.count).map(|number| numbered(base, number)).collect(),
            // The first numbers that are free.
            None => {
                let base = if options.throw_away && of_snapshot {
                    format!("{source}-peek")
                } else {
                    source.to_owned()
                };
                let (mut names, mut number) = (Vec::new(), 0);
                while names.len() < options.count as usize {
                    number += 1;
                    let name = numbered(&base, number);
                    if !taken(&name)? {
                        names.push(name);
                    }
                }
                names
            }
        };
        for name in &names {
            check_name("machine", name)?;
            if taken(name)? {
                return Err(name_taken(name));
            }
        }
        Ok(names)
    }

    /// Refuses what could not be done for all of them, before anything is.
    fn check_forks(
        &self,
        row: &TargetRow,
        snapshot: Option<&SnapshotRow>,
        options: &ForkOptions,
    ) -> Result<()> {
        let (power, running) = self.look(row)?;
        let (config, memory) = match snapshot {
            Some(snapshot) => (&snapshot.config, snapshot.memory.is_some()),
            None => (&row.config, running.is_some() || power == Power::Suspended),
        };
        if snapshot.is_none() && running.is_some() && !row.config.memory_snapshots {
            let name = &row.name;
            return Err(Error::new(
                Code::Precondition,
                format!("{name} was made with --no-memory: what is in its memory cannot be copied"),
            )
            .hint(format!(
                "`spinney clone {name} NEW` makes a machine of its disks, which `spinney start` boots"
            )));
        }
        if snapshot.is_none() {
            self.check_not_full(row, running.as_deref())?;
        }
        check_memory_for_forks(options.count, config.memory, memory && self.can_map(row))?;
        self.check_room(config.disks.len().saturating_mul(options.count as usize + 1))
    }

    /// Step 2 of a snapshot.
    fn origin_snapshot(&self, cx: &Context, row: &TargetRow, snapshot: SnapshotRow) -> Result<Origin<'_>> {
        if let Some(memory) = &snapshot.memory {
            let checked = self.check_if_damaged(cx, &snapshot, &*self.store_of(row)?, memory);
            checked.map_err(|error| with_its_disks(error, &snapshot.full_name()))?;
        }
        let (disks, pins) = self.catalog.read(|tx| {
            let disks = SnapshotRow::disks(tx, &snapshot.id)?;
            self.check_chains(tx, &row.name, &disks)?;
            let pins = self.pins.pin_disks(&disks);
            Ok((disks, pins))
        })?;
        Ok(Origin {
            name: snapshot.full_name(),
            config: snapshot.config,
            machine: snapshot.machine,
            facts: snapshot.facts,
            memory: snapshot.memory,
            disks,
            hold: None,
            pause_us: None,
            _pins: pins,
        })
    }

    /// Step 2 of here.
    fn origin_here(&self, cx: &Context, row: &TargetRow) -> Result<Origin<'_>> {
        let (power, running) = self.look(row)?;
        let (disks, pins) = self.catalog.read(|tx| {
            let disks = TargetRow::disks(tx, &row.id)?;
            self.check_chains(tx, &row.name, &disks)?;
            let pins = self.pins.pin_disks(&disks);
            Ok((disks, pins))
        })?;
        let mut origin = Origin {
            name: row.name.clone(),
            config: row.config.clone(),
            machine: row.machine.clone(),
            facts: Facts::of_nothing(Mode::Off, Power::Off),
            memory: None,
            disks,
            hold: None,
            pause_us: None,
            _pins: pins,
        };
        match (running, power) {
            (Some(running), _) => {
                let taken = self.capture_for_forks(cx, row, power, &running)?;
                let (snapshot, hold) = taken.into_parts();
                origin.pause_us = snapshot.facts.pause_us;
                (origin.facts, origin.memory, origin.hold) = (snapshot.facts, snapshot.memory, Some(hold));
            }
            (None, Power::Suspended) => {
                self.freeze_unless_empty(row, &mut origin.disks)?;
                origin.facts = Facts::of_nothing(Mode::Suspended, Power::Running);
                origin.memory = row.suspended.as_ref().map(|kept| kept.memory.clone());
            }
            (None, _) => self.freeze_unless_empty(row, &mut origin.disks)?,
        }
        Ok(origin)
    }

    /// Freezes what a machine without a process has written; if that is nothing, what lies below is as good.
    fn freeze_unless_empty(&self, row: &TargetRow, disks: &mut Vec<(String, String)>) -> Result<()> {
        if self.nothing_written(disks)? {
            *disks = self.catalog.read(|tx| below(tx, disks))?;
            return Ok(());
        }
        self.freeze(row, None, GOTO_DEPTH_LIMIT)
    }

    /// Step 3: all of them, or none.
    fn make_forks<'a>(
        &self,
        cx: &Context,
        source: &TargetRow,
        origin: &Origin<'_>,
        named: impl Iterator<Item = (&'a String, &'a String)>,
        options: &ForkOptions,
    ) -> Result<Vec<Coming>> {
        let mut rows = Vec::new();
        for (number, (id, name)) in named.enumerate() {
            // What is left out is said once.
            let quiet = Context::new();
            let config =
                of_its_own(if number == 0 { cx } else { &quiet }, &origin.name, &origin.config, name);
            let group = (source.group.as_str(), source.group_name.as_str());
            let mut row = TargetRow::new(id.clone(), name, group, &origin.machine, config);
            if options.identity != Identity::Renew {
                row.macs = source.macs.iter().take(row.config.networks.len()).cloned().collect();
                row.macs.resize_with(row.config.networks.len(), new_mac);
            }
            if options.identity == Identity::Keep {
                row.uuid.clone_from(&source.uuid);
            }
            row.throw_away = options.throw_away;
            rows.push(row);
        }
        cx.phase("starting", rows.len() as u64);
        let (next, made) = (AtomicUsize::new(0), Mutex::new((Vec::new(), None)));
        let work = || {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(row) = rows.get(number) else { return };
                if made.lock().unwrap_or_else(PoisonError::into_inner).1.is_some() {
                    return;
                }
                let fork = self.make_fork(cx, row.clone(), origin);
                let mut made = made.lock().unwrap_or_else(PoisonError::into_inner);
                match fork {
                    Ok(fork) => made.0.push((number, fork)),
                    Err(error) => drop(made.1.get_or_insert(error)),
                }
                cx.advance(1);
            }
        };
        thread::scope(|scope| {
            let cores = thread::available_parallelism().map_or(1, |cores| cores.get().min(SIDE_BY_SIDE));
            for _ in 1..cores.min(rows.len()) {
                let _ = thread::Builder::new().name("fork".into()).spawn_scoped(scope, work);
            }
            work();
        });
        let (mut forks, failed) = made.into_inner().unwrap_or_else(PoisonError::into_inner);
        forks.sort_by_key(|(number, _)| *number);
        let forks: Vec<Coming> = forks.into_iter().map(|(_, fork)| fork).collect();
        match failed.or_else(|| cx.check().err()) {
            None => Ok(forks),
            Some(error) => {
                self.give_up_forks(forks);
                Err(error)
            }
        }
    }

    fn make_fork(&self, cx: &Context, row: TargetRow, origin: &Origin<'_>) -> Result<Coming> {
        cx.check()?;
        let (overlays, read_only) = self.catalog.read(|tx| {
            let overlays = self.plan_overlays(tx, &origin.name, &origin.disks, GOTO_DEPTH_LIMIT)?;
            Ok((overlays, Self::read_only_disks(tx, &origin.disks)?))
        })?;
        self.make_overlays(&overlays)?;
        let mut fork = Coming { row, overlays, read_only, running: None };
        step("fork.overlays");
        match self.start_fork(cx, &fork, origin) {
            Ok(running) => {
                fork.running = Some(running);
                Ok(fork)
            }
            Err(error) => {
                self.give_up_forks(vec![fork]);
                Err(error)
            }
        }
    }

    /// Its QEMU, with its state, standing still.
    fn start_fork(&self, cx: &Context, fork: &Coming, origin: &Origin<'_>) -> Result<Running> {
        let row = &fork.row;
        let disks = self.specs_over(&row.name, &fork.read_only, &fork.overlays)?;
        let running = self.launch_for(row, &row.config, &row.machine, &disks, origin.memory.as_ref())?;
        step("fork.started");
        let loaded = match &origin.memory {
            Some(memory) => {
                // Those that could be mapped and were not need more than they were counted with.
                let room = match running.row.ram {
                    None => check_memory_for_forks(1, row.config.memory, false),
                    Some(_) => Ok(()),
                };
                let store = room.and_then(|()| self.store_of(row));
                store.and_then(|store| self.load_memory(cx, row, &origin.name, &store, memory, &running))
            }
            None => Ok(()),
        };
        match loaded {
            Ok(()) => Ok(running),
            Err(error) => {
                running.give_up();
                Err(with_its_disks(error, &origin.name))
            }
        }
    }

    /// Nothing is left of them.
    fn give_up_forks(&self, forks: Vec<Coming>) {
        for fork in forks {
            fork.running.iter().for_each(Running::give_up);
            self.remove_overlays(&fork.overlays);
        }
    }

    /// Steps 4 and the first of 5.
    fn keep_forks(
        &self,
        cx: &Context,
        origin: &Origin<'_>,
        forks: Vec<Coming>,
    ) -> Result<Vec<(TargetRow, bool)>> {
        let write = |tx: &Transaction<'_>| {
            if let Some(hold) = &origin.hold {
                hold.check()?;
            }
            for fork in &forks {
                if TargetRow::name_taken(tx, &fork.row.name)? {
                    return Err(name_taken(&fork.row.name));
                }
                write_fork(tx, origin, fork)?;
            }
            let made = Things::machines(forks.iter().map(|fork| fork.row.id.clone()));
            OpRow::finish(tx, &cx.id, Some(Act::Remove(made)))
        };
        let alive = |fork: &Coming| fork.running.as_ref().is_some_and(|running| running.process.is_alive());
        let written = cx.check().and_then(|()| match forks.iter().find(|fork| !alive(fork)) {
            Some(gone) => Err(Error::new(Code::Failed, format!("the QEMU of {} has ended", gone.row.name))),
            None => self.catalog.write(|tx| write(tx)),
        });
        step("fork.written");
        if let Err(error) = written {
            self.give_up_forks(forks);
            return Err(error);
        }
        let mut kept = Vec::new();
        for fork in forks {
            let Some(running) = fork.running.map(Arc::new) else { continue };
            self.running_map().insert(fork.row.id.clone(), Arc::clone(&running));
            self.ends.ring();
            if let Err(error) = settle(&running.qmp, "running") {
                tracing::error!(%error, target = fork.row.name, "a fork does not run");
                cx.warn(format!("{} does not run: {error}", fork.row.name));
            }
            kept.push((fork.row, origin.memory.is_none()));
        }
        step("fork.runs");
        Ok(kept)
    }

    /// The rest of step 5.
    fn introduce(
        &self,
        cx: &Context,
        forks: Vec<(TargetRow, bool)>,
        identity: Identity,
    ) -> Result<Vec<Fork>> {
        cx.phase("telling the guests", 0);
        let identities: Vec<Vec<IdentityItem>> = thread::scope(|scope| {
            let asked: Vec<_> = forks
                .iter()
                .map(|(row, booted)| {
                    let running = self.running_map().get(&row.id).cloned();
                    scope.spawn(move || running.map(|running| renew(row, &running, identity, *booted)))
                })
                .collect();
            asked.into_iter().map(|asked| asked.join().ok().flatten().unwrap_or_default()).collect()
        });
        let mut out = Vec::new();
        let mut warned = false;
        for ((row, _), identity) in forks.into_iter().zip(identities) {
            let repeats = identity
                .iter()
                .find(|item| item.what == "random numbers" && item.state != ItemState::Renewed);
            if let Some(item) = repeats.filter(|_| !std::mem::replace(&mut warned, true)) {
                cx.warn(format!("random numbers may repeat: {}", item.why.as_deref().unwrap_or_default()));
            }
            out.push(Fork { machine: self.machine_by_id(&row.id)?, identity });
        }
        Ok(out)
    }
}

fn with_its_disks(error: Error, origin: &str) -> Error {
    with_way_out(error, format!("`spinney clone {origin} NEW` makes a machine of its disks"))
}

/// A fork's rows.
fn write_fork(tx: &Transaction<'_>, origin: &Origin<'_>, fork: &Coming) -> Result<()> {
    let row = &fork.row;
    row.insert(tx)?;
    for (disk, layer) in &fork.read_only {
        TargetRow::set_disk(tx, &row.id, disk, layer)?;
    }
    point_here_at(tx, &row.id, &fork.overlays)?;
    let start = SnapshotRow {
        id: new_id(),
        target: row.id.clone(),
        target_name: row.name.clone(),
        parent: None,
        name: START.into(),
        note: format!("forked from {}", origin.name),
        created: now(),
        undo_point: false,
        keep: false,
        protected: false,
        machine: origin.machine.clone(),
        config: row.config.clone(),
        facts: origin.facts.clone(),
        memory: origin.memory.clone(),
        removed: None,
    };
    start.insert(tx, &origin.disks)?;
    TargetRow::set_parent(tx, &row.id, Some(&start.id))?;
    TargetRow::set_process(tx, &row.id, Power::Running, fork.running.as_ref().map(|running| &running.row))
}
