//! Changing a machine's settings.
//!
//! What a running machine can be given, it gets at once: a disc, ports, autostart, what is done at its power-off. Memory, CPUs, disks, boot
//! order and screen are what its snapshots' device state is made for, so they change only while it is off. Either all that was asked for
//! is done, or nothing.

use qemu::image::takes_direct_io;
use serde_json::json;

use crate::catalog::{OpRow, SnapshotRow, TargetRow};
use crate::check::{check_changed, check_disk, existing_file};
use crate::config::{CdDrive, MachineConfig, SetOptions};
use crate::context::Context;
use crate::disks::allocated;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::forwards::{check_ports, set_ports};
use crate::new_disks::NewDisks;
use crate::running::{Running, check_ever_fits};
use crate::types::{Machine, Power};

impl Engine {
    /// Changes settings of a machine; what is left out stays.
    pub fn set(&self, cx: &Context, target: &str, mut options: SetOptions) -> Result<Machine> {
        for disk in &mut options.add_disks {
            disk.id.clear();
            check_disk(disk)?;
        }
        if let Some(image) = options.cdrom.as_mut().and_then(|drive| drive.image.as_mut()) {
            *image = existing_file("disc", image)?;
        }
        let (row, _guard) = self.lock_target(cx, target, "set")?;
        let (power, running) = self.look(&row)?;
        let config = changed(&row, &options)?;
        self.check_readable_by_owner(&*self.group_of(&row)?, &config)?;
        if config.memory != row.config.memory {
            check_ever_fits(&row.name, config.memory)?;
        }
        if !matches!(power, Power::Off | Power::LostPower) {
            can_change_now(&row, power, &config)?;
        }
        let added = &config.disks[row.config.disks.len() - options.rm_disks.len()..];
        let disks = self.plan_new_disks(&row.group, added)?;
        cx.check()?;
        self.journaled(cx, "set", &row.name, Some(&row.id), &json!({}), || {
            self.make_new_disks(&disks)?;
            let after = TargetRow { config, ..row.clone() };
            let done = match &running {
                // A disc that is named is put in, though the file that was there had the same name.
                Some(running) => self.change_running(cx, &row, &after, running, options.cdrom.is_some()),
                None => self.write_settings(cx, &after, &options.rm_disks, &disks),
            };
            if done.is_err() {
                self.remove_new_disks(&disks);
            }
            done
        })?;
        self.machine_by_id(&row.id)
    }

    /// What `set` with these `rm_disks` would throw away, in words; none if nothing is lost.
    pub fn set_plan(&self, target: &str, rm_disks: &[String]) -> Result<Option<String>> {
        if rm_disks.is_empty() {
            return Ok(None);
        }
        let (name, layers) = self.catalog.read(|tx| {
            let row = TargetRow::by_name(tx, target)?;
            for id in rm_disks {
                known_disk(&row, id)?;
            }
            let mut disks = TargetRow::disks(tx, &row.id)?;
            disks.retain(|(disk, _)| rm_disks.contains(disk));
            // What only a snapshot keeps that was removed goes with it.
            let parent = SnapshotRow::visible(tx, row.parent.as_deref())?;
            Ok((row.name, Self::layers_since(tx, &disks, parent.as_deref())?))
        })?;
        let bytes: u64 = layers.iter().map(|layer| allocated(&self.layer_file(layer))).sum();
        let disks = rm_disks.join(", ");
        let written = bytes.div_ceil(1024);
        Ok(Some(format!(
            "{disks} of {name}, with what was written to it since the last snapshot ({written} KiB)"
        )))
    }

    /// Brings what can be changed on a running machine to what its settings say; a disc that is in is opened `again`.
    pub(crate) fn apply_settings(&self, row: &TargetRow, running: &Running, again: bool) -> Result<()> {
        if let Some(drive) = &row.config.cdrom {
            insert(running, drive, again)?;
        }
        if row.config.networks.is_empty() {
            return Ok(());
        }
        set_ports(&running.qmp, &row.name, &row.config.forwards)
    }

    fn change_running(
        &self,
        cx: &Context,
        before: &TargetRow,
        after: &TargetRow,
        running: &Running,
        again: bool,
    ) -> Result<()> {
        check_ports(&after.name, &after.config.forwards, &before.config.forwards)?;
        let done = self
            .apply_settings(after, running, again)
            .and_then(|()| self.write_settings(cx, after, &[], &NewDisks::default()));
        if done.is_err()
            && let Err(error) = self.apply_settings(before, running, false)
        {
            tracing::error!(%error, target = before.name, "its settings could not be taken back");
        }
        done
    }

    fn write_settings(&self, cx: &Context, row: &TargetRow, gone: &[String], new: &NewDisks) -> Result<()> {
        self.catalog.write(|tx| {
            for disk in gone {
                TargetRow::remove_disk(tx, &row.id, disk)?;
            }
            new.insert(tx, &row.id)?;
            TargetRow::set_config(tx, &row.id, &row.config)?;
            OpRow::finish(tx, &cx.id, None)
        })
    }
}

/// The settings as they will be. New disks stand at the end.
fn changed(row: &TargetRow, options: &SetOptions) -> Result<MachineConfig> {
    let mut config = row.config.clone();
    for id in &options.rm_disks {
        known_disk(row, id)?;
        if options.rm_disks.iter().filter(|other| *other == id).count() > 1 {
            return Err(Error::new(Code::Usage, format!("the disk {id} cannot go twice")));
        }
    }
    config.disks.retain(|disk| !options.rm_disks.contains(&disk.id));
    config.disks.extend(options.add_disks.iter().cloned());
    config.number_disks();
    config.memory = options.memory.unwrap_or(config.memory);
    config.cpus = options.cpus.unwrap_or(config.cpus);
    config.cdrom = options.cdrom.clone().or(config.cdrom);
    config.forwards = options.forwards.clone().unwrap_or(config.forwards);
    config.autostart = options.autostart.unwrap_or(config.autostart);
    config.on_poweroff = options.on_poweroff.unwrap_or(config.on_poweroff);
    config.boot = options.boot.or(config.boot);
    config.display = options.display.unwrap_or(config.display);
    check_changed(&mut config)?;
    Ok(config)
}

fn known_disk(row: &TargetRow, id: &str) -> Result<()> {
    let ids: Vec<&str> = row.config.disks.iter().map(|disk| disk.id.as_str()).collect();
    if ids.contains(&id) {
        return Ok(());
    }
    let error = Error::new(Code::NotFound, format!("{} has no disk {id:?}", row.name));
    Err(if ids.is_empty() { error } else { error.hint(format!("its disks are {}", ids.join(", "))) })
}

/// Refuses what a machine with a state cannot be given.
fn can_change_now(row: &TargetRow, power: Power, wanted: &MachineConfig) -> Result<()> {
    let now = &row.config;
    let fixed = [
        ("memory", now.memory != wanted.memory),
        ("number of CPUs", now.cpus != wanted.cpus),
        ("set of disks", now.disks != wanted.disks),
        ("boot order", now.boot != wanted.boot),
        ("display", now.display != wanted.display),
        // The state that is kept knows which disc is in.
        ("disc", power == Power::Suspended && other_disc(now, wanted)),
    ];
    let name = &row.name;
    let (state, hint) = match power {
        Power::Suspended => {
            ("suspended", format!("`spinney start {name}` goes on where it was; then `spinney stop {name}`"))
        }
        _ => ("on", format!("`spinney stop {name}` first")),
    };
    let sentence = match fixed.iter().find(|(_, changes)| *changes) {
        Some((what, _)) => format!("the {what} of {name} cannot change while it is {state}"),
        None if now.cdrom.is_none() && wanted.cdrom.is_some() => {
            format!("{name} has no CD drive, and can be given one only while it is off")
        }
        None => return Ok(()),
    };
    Err(Error::new(Code::Refused, sentence).hint(hint))
}

/// A disc in place of another one; one whose file is gone may be taken out, and put back.
fn other_disc(now: &MachineConfig, wanted: &MachineConfig) -> bool {
    let image = |config: &MachineConfig| config.cdrom.as_ref().and_then(|drive| drive.image.clone());
    match (image(now), image(wanted)) {
        (Some(now), Some(wanted)) => now != wanted,
        _ => false,
    }
}

fn insert(running: &Running, drive: &CdDrive, again: bool) -> Result<()> {
    let image = drive.image.as_deref();
    let direct = image.is_some_and(takes_direct_io);
    qemu::disc::change(&running.qmp, image, direct, again).map_err(|error| match image {
        Some(image) => Error::new(Code::Failed, format!("{} cannot be put into the drive", image.display()))
            .because(error),
        None => Error::new(Code::Failed, "the disc cannot be taken out").because(error),
    })
}
