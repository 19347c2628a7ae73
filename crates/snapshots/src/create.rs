//! Making a machine.

use serde_json::json;

use crate::catalog::{GroupRow, OpRow, TargetRow, no_group};
use crate::check::{check_config, existing_file};
use crate::config::{Firmware, MachineConfig};
use crate::context::Context;
use crate::engine::{Engine, Tools};
use crate::error::{Code, Error, Result};
use crate::id::new_id;
use crate::name::check_name;
use crate::new_disks::NewDisks;
use crate::running::{Begin, check_ever_fits};
use crate::types::Machine;

impl Engine {
    /// Makes a machine of the default group that is off. On an error nothing of it is left.
    pub fn create(&self, cx: &Context, name: &str, config: MachineConfig) -> Result<Machine> {
        self.create_in(cx, None, name, config)
    }

    /// The same for a machine of the group of this name.
    pub fn create_in(
        &self,
        cx: &Context,
        group: Option<&str>,
        name: &str,
        mut config: MachineConfig,
    ) -> Result<Machine> {
        check_name("machine", name)?;
        let group = self.named_group(group)?;
        group.store()?;
        check_config(&mut config)?;
        config.guest_agent = true;
        check_ever_fits(name, config.memory)?;
        if let Some(image) = config.cdrom.as_mut().and_then(|drive| drive.image.as_mut()) {
            *image = existing_file("disc", image)?;
        }
        self.check_readable_by_owner(&group, &config)?;
        let Tools { qemu, .. } = self.tools()?;
        if self.catalog.read(|tx| TargetRow::name_taken(tx, name))? {
            return Err(name_taken(name));
        }
        let target = TargetRow::new(new_id(), name, (&group.row.id, &group.row.name), &qemu.machine, config);
        let disks = self.plan_machine_disks(&target.group, &target.config)?;
        cx.check()?;
        self.check_room(target.config.disks.len())?;
        self.journaled(cx, "create", name, Some(&target.id), &json!({}), || {
            self.make_new_disks(&disks)?;
            if let Err(error) = self.try_out(&target, &disks) {
                self.remove_new_disks(&disks);
                return Err(error);
            }
            let written = self.catalog.write(|tx| {
                if TargetRow::name_taken(tx, name)? {
                    return Err(name_taken(name));
                }
                // It may have been removed meanwhile.
                GroupRow::by_id(tx, &target.group).map_err(|_| no_group(&target.group_name))?;
                target.insert(tx)?;
                disks.insert(tx, &target.id)?;
                OpRow::finish(tx, &cx.id, None)
            });
            if written.is_err() {
                self.remove_new_disks(&disks);
            }
            written
        })?;
        self.machine(name)
    }

    /// Starts QEMU once with everything that is the user's, without running anything: an image that somebody else writes to, a
    /// device that cannot be migrated are found out now, and not at the first start or take.
    fn try_out(&self, target: &TargetRow, disks: &NewDisks) -> Result<()> {
        let config = &target.config;
        let plain = config.qemu_args.is_empty() && config.cdrom.is_none() && config.boot.is_none();
        if plain && config.firmware == Firmware::Bios && !disks.has_images() {
            return Ok(());
        }
        let config = MachineConfig { kernel: None, ..config.clone() };
        let specs = self.new_disk_specs(disks);
        let tried = self.launch(target, &config, &target.machine, specs, Begin::BootPaused)?;
        let blocked = tried.qmp.execute("query-migrate", json!({}));
        self.end_process(&target.id, &tried);
        let reasons = blocked?.get("blocked-reasons").cloned().unwrap_or_default();
        let reasons: Vec<&str> =
            reasons.as_array().into_iter().flatten().filter_map(|r| r.as_str()).collect();
        if reasons.is_empty() || !target.config.memory_snapshots {
            return Ok(());
        }
        let name = &target.name;
        Err(Error::new(Code::Precondition, format!("{name} has a device that cannot be snapshotted"))
            .because(reasons.join("; "))
            .hint("leave the device out, or make the machine with --no-memory and take it off or with --disk-only"))
    }
}

pub(crate) fn name_taken(name: &str) -> Error {
    Error::new(Code::Refused, format!("there already is a machine called {name}"))
        .hint("choose another name, or remove that one with `spinney rm`")
}
