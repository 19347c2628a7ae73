//! `clone`: another machine with the disks of a snapshot, or of here. It is off, and has an identity of its own: whatever becomes of
//! either, the other does not notice.
//!
//! ```text
//!   1  find the disks: a snapshot's; of here, what is written to now is frozen, and the source goes on over it, as in a disk-only take,
//!      unless nothing was written since that was last done
//!   2  linked: overlays over them.  full: each chain copied into one file that lies over nothing
//!   3  catalog, one transaction: the clone exists, with its disks; journal: "done"
//! ```
//! Until 3 nothing speaks of the files of 2: whatever fails or dies leaves the source as it was, and they are removed at once, or by the
//! next start. What 1 froze stays frozen: an empty overlay is transparent. The layers that are copied are pinned meanwhile, so that the
//! source can be worked on, removed and collected while it is being cloned.
//!
//! Without a folder of the user's, the files of a full clone lie among the layers of its group. In such a folder they are images like any
//! other, and the clone lies over them as if they had been given to `create`.

use std::path::{Path, PathBuf};

use rusqlite::Transaction;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::address;
use crate::catalog::{Act, GroupRow, LayerRow, OpRow, SnapshotRow, TargetRow, Things, no_group};
use crate::config::{MachineConfig, OnPowerOff};
use crate::context::Context;
use crate::create::name_taken;
use crate::disks::{DEPTH_LIMIT, GOTO_DEPTH_LIMIT};
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted, step};
use crate::flat_copy::{CloneDisks, Copies};
use crate::half_made::HalfMade;
use crate::id::new_id;
use crate::name::check_name;
use crate::pins::Pins;
use crate::running::Running;
use crate::switch::switch_disks;
use crate::take::point_here_at;
use crate::types::{CloneOptions, Cloned, Power};

/// What recovery has to know of a clone.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct ClonePlan {
    /// Files in a folder of the user's that go unless it gets to its end.
    pub(crate) half_made: Vec<HalfMade>,
}

/// What is asked for.
struct Wants<'a> {
    name: &'a str,
    full: bool,
    dir: Option<&'a Path>,
}

/// What is cloned.
pub(crate) struct Original<'a> {
    /// Its address in full.
    pub(crate) name: String,
    pub(crate) config: MachineConfig,
    machine: String,
    pub(crate) group: String,
    group_name: String,
    /// Disk and layer; nobody writes to these layers any more.
    pub(crate) disks: Vec<(String, String)>,
    /// What a full clone copies of them.
    copies: Option<Copies>,
    /// Keeps them and what they lie over.
    _pins: Pins<'a>,
}

impl Engine {
    /// Makes a machine that is off of a snapshot's disks, or of those of here as they are now. The source may run on.
    pub fn clone_target(&self, cx: &Context, address: &str, options: &CloneOptions) -> Result<Cloned> {
        let CloneOptions { name, full, dir } = options;
        check_name("machine", name)?;
        let dir = dir.as_deref().map(|dir| chosen_folder(self.state(), dir, *full)).transpose()?;
        let free = |tx: &Transaction<'_>| match TargetRow::name_taken(tx, name)? {
            true => Err(name_taken(name)),
            false => Ok(()),
        };
        self.catalog.read(free)?;
        let wants = Wants { name, full: *full, dir: dir.as_deref() };
        // Before anything is begun: what is not there leaves no entry in the journal.
        self.catalog.read(|tx| match address::split(address) {
            (target, None) => TargetRow::by_name(tx, target).map(drop),
            _ if self.waits_for_take(tx, address) => Ok(()),
            _ => address::resolve(tx, address).map(drop),
        })?;
        let (id, subject) = (new_id(), format!("{address} {name}"));
        self.journaled(cx, "clone", &subject, Some(&id), &json!(ClonePlan::default()), || {
            let original = self.original(cx, address, &wants)?;
            let mut config = of_its_own(cx, &original.name, &original.config, name);
            let disks = match &original.copies {
                None => self.linked_disks(&original)?,
                Some(copies) => self.full_disks(cx, &original, copies, &mut config)?,
            };
            step("clone.made");
            let group = (original.group.as_str(), original.group_name.as_str());
            let clone = TargetRow::new(id.clone(), name, group, &original.machine, config);
            let written = cx.check().and_then(|()| {
                self.catalog.write(|tx| {
                    free(tx)?;
                    // It may have been removed meanwhile.
                    GroupRow::by_id(tx, &clone.group).map_err(|_| no_group(&clone.group_name))?;
                    clone.insert(tx)?;
                    disks.insert(tx, &clone.id)?;
                    let made = Things::machines([clone.id.clone()]);
                    OpRow::finish(tx, &cx.id, Some(Act::Remove(made)))
                })
            });
            step("clone.written");
            match written {
                Ok(()) => Ok(Cloned { machine: self.machine_by_id(&id)?, files: disks.files() }),
                Err(error) => {
                    self.remove_clone_disks(&disks);
                    Err(error)
                }
            }
        })
    }

    /// Step 1.
    fn original(&self, cx: &Context, address: &str, wants: &Wants<'_>) -> Result<Original<'_>> {
        let target = match address::split(address) {
            (target, None) => return self.original_here(cx, target, wants),
            (target, Some(_)) => target,
        };
        let turn = match self.catalog.read(|tx| Ok(self.waits_for_take(tx, address)))? {
            true => Some(self.lock_target(cx, target, "clone")?),
            false => None,
        };
        let mut original = self.original_snapshot(address)?;
        drop(turn);
        original.copies = self.copies(wants, &original.group, &original.config, &original.disks)?;
        Ok(original)
    }

    /// What is copied, if anything is.
    fn copies(
        &self,
        wants: &Wants<'_>,
        group: &str,
        config: &MachineConfig,
        disks: &[(String, String)],
    ) -> Result<Option<Copies>> {
        wants.full.then(|| self.plan_copies(wants.name, group, config, disks, wants.dir)).transpose()
    }

    /// True if an address means a snapshot that is on its way to the disk, or may mean another one when that is there.
    fn waits_for_take(&self, tx: &Transaction<'_>, address: &str) -> bool {
        let (target, Some(rest)) = address::split(address) else { return false };
        let saving = TargetRow::by_name(tx, target).ok().and_then(|row| self.saving.of(&row.id));
        let counted = rest.is_empty() || rest.starts_with(['~', '{']);
        saving.is_some() && counted || self.saving.by_address(tx, address).is_some()
    }

    fn original_snapshot(&self, address: &str) -> Result<Original<'_>> {
        self.catalog.read(|tx| {
            let (target, snapshot) = address::resolve(tx, address)?;
            let disks = SnapshotRow::disks(tx, &snapshot.id)?;
            self.check_chains(tx, &target.name, &disks)?;
            Ok(Original {
                name: snapshot.full_name(),
                _pins: self.pins.pin_disks(&disks),
                config: snapshot.config,
                machine: snapshot.machine,
                group: target.group,
                group_name: target.group_name,
                disks,
                copies: None,
            })
        })
    }

    /// What here's disks hold is frozen, and the machine goes on over it.
    fn original_here(&self, cx: &Context, target: &str, wants: &Wants<'_>) -> Result<Original<'_>> {
        let (row, _guard) = self.lock_target(cx, target, "clone")?;
        let (power, running) = self.look(&row)?;
        self.check_not_full(&row, running.as_deref())?;
        let (mut disks, pins) = self.catalog.read(|tx| {
            let disks = TargetRow::disks(tx, &row.id)?;
            self.check_chains(tx, &row.name, &disks)?;
            let pins = self.pins.pin_disks(&disks);
            Ok((disks, pins))
        })?;
        // What the machine writes to is what is cloned once it is frozen. What holds nothing is left to it.
        let unused = running.is_none() && self.nothing_written(&disks)?;
        if unused {
            disks = self.catalog.read(|tx| below(tx, &disks))?;
        }
        // Whatever refuses it does so before the source's chain gets longer.
        let copies = self.copies(wants, &row.group, &row.config, &disks)?;
        cx.check()?;
        if running.is_some() || power == Power::Suspended {
            cx.warn(format!(
                "what is in the memory of {} is not in the clone: its disks are as after a power cut",
                row.name
            ));
        }
        if !unused && !planted(Fault::CloneOverLive) {
            // A full clone is the way out of a chain that is as deep as may be.
            let limit = if wants.full { GOTO_DEPTH_LIMIT } else { DEPTH_LIMIT };
            self.freeze(&row, running.as_deref(), limit)?;
        }
        Ok(Original {
            _pins: pins,
            name: row.name,
            config: row.config,
            machine: row.machine,
            group: row.group,
            group_name: row.group_name,
            disks,
            copies,
        })
    }

    /// Puts new overlays over the disks of a machine that goes on as it is.
    pub(crate) fn freeze(&self, row: &TargetRow, running: Option<&Running>, limit: u32) -> Result<()> {
        let overlays = self.catalog.read(|tx| {
            let disks = TargetRow::disks(tx, &row.id)?;
            self.plan_overlays(tx, &row.name, &disks, limit).map_err(flat_instead)
        })?;
        if running.is_none() {
            // A process that was killed leaves what it wrote in the page cache.
            self.sync_layers(&self.catalog.read(|tx| TargetRow::disks(tx, &row.id))?)?;
        }
        self.make_overlays(&overlays)?;
        step("clone.overlays");
        let Some(running) = running else {
            let written = self.catalog.write(|tx| point_here_at(tx, &row.id, &overlays));
            return written.inspect_err(|_| self.remove_overlays(&overlays));
        };
        self.announce_overlays(row, running, &overlays)?;
        let switched = switch_disks(running, &overlays);
        step("clone.switched");
        switched.inspect_err(|_| self.take_back_overlays(&row.id, running, &overlays))
    }

    /// True if the layers that these disks write to are over others, and hold nothing: they are as they were made.
    pub(crate) fn nothing_written(&self, disks: &[(String, String)]) -> Result<bool> {
        for (_, layer) in disks {
            let row = self.catalog.read(|tx| LayerRow::by_id(tx, layer))?;
            let empty = || match row.below {
                Some(_) => {
                    let img = self.img_of(&*self.groups.by_id(&row.group)?)?;
                    Ok(img.is_empty_overlay(&self.layer_file(&row))?)
                }
                None => Ok::<_, Error>(false),
            };
            if !row.is_users() && !empty()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Step 2 of a linked clone.
    fn linked_disks(&self, original: &Original<'_>) -> Result<CloneDisks> {
        self.check_room(original.disks.len())?;
        let (overlays, read_only) = self.catalog.read(|tx| {
            // One that could never be taken is of no use.
            let overlays = self.plan_overlays(tx, &original.name, &original.disks, DEPTH_LIMIT - 1);
            Ok((overlays.map_err(flat_instead)?, Self::read_only_disks(tx, &original.disks)?))
        })?;
        self.make_overlays(&overlays)?;
        Ok(CloneDisks { overlays, read_only, ..CloneDisks::default() })
    }
}

fn flat_instead(error: Error) -> Error {
    match error.code() {
        Code::Refused => error.hint("with --full the clone lies over nothing"),
        _ => error,
    }
}

/// The layers right below those of these disks; a read-only disk is its own.
pub(crate) fn below(tx: &Transaction<'_>, disks: &[(String, String)]) -> Result<Vec<(String, String)>> {
    let mut out = Vec::new();
    for (disk, layer) in disks {
        let row = LayerRow::by_id(tx, layer)?;
        out.push((disk.clone(), row.below.filter(|_| row.stamp.is_none()).unwrap_or(row.id)));
    }
    Ok(out)
}

/// The settings of a clone: what two machines cannot both have is left out, and said.
pub(crate) fn of_its_own(cx: &Context, source: &str, config: &MachineConfig, name: &str) -> MachineConfig {
    let mut config = config.clone();
    config.autostart = false;
    config.on_poweroff = OnPowerOff::Nothing;
    let forwards = std::mem::take(&mut config.forwards);
    if let Some(first) = forwards.first() {
        cx.warn(format!(
            "{name} has none of the forwards of {}: a port leads into one machine; `spinney set {name} --forward OTHER:{}` gives it one",
            source, first.guest
        ));
    }
    config
}

/// A folder for the files of a full clone.
fn chosen_folder(state: &Path, dir: &Path, full: bool) -> Result<PathBuf> {
    if !full {
        return Err(Error::new(Code::Usage, "a linked clone has no files of its own to put into a folder")
            .hint("--full copies the disks"));
    }
    let folder = dir.canonicalize().map_err(|error| {
        Error::new(Code::NotFound, format!("there is no folder {}", dir.display()))
            .because(error)
            .hint(format!("`mkdir -p {}` makes one", dir.display()))
    })?;
    if !folder.is_dir() {
        return Err(Error::new(Code::Usage, format!("{} is not a folder", dir.display())));
    }
    if folder.to_str().is_none() {
        return Err(Error::new(Code::Usage, format!("the path {} is not UTF-8", folder.display())));
    }
    if state.canonicalize().is_ok_and(|state| folder.starts_with(state)) {
        return Err(Error::new(Code::Refused, format!("{} belongs to Spinney", folder.display()))
            .hint("without --dir the files of a clone are kept there anyway"));
    }
    Ok(folder)
}
