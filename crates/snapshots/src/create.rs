//! Making a machine.

use std::fs;
use std::path::{Path, PathBuf};

use qemu::command::{Disk, MAX_CARDS, MAX_DISKS};
use serde_json::json;

use crate::catalog::{LayerRow, OpRow, TargetRow, now};
use crate::context::Context;
use crate::disks::{NewOverlay, stamp};
use crate::engine::{Engine, Tools};
use crate::error::{Code, Error, Result};
use crate::id::{new_id, new_mac, new_uuid};
use crate::name::check_name;
use crate::running::{Begin, check_ever_fits};
use crate::types::{DiskSource, Machine, MachineConfig, Power};

/// Less than this and no firmware starts.
const MEMORY_MIN: u64 = 16 << 20;
/// 4 TiB: more than any host this will run on.
const MEMORY_MAX: u64 = 4 << 40;
const CPUS_MAX: u32 = 255;
const DISK_MIN: u64 = 64 << 10;
/// 8 EiB is where QEMU's own arithmetic ends; a qcow2 file of ours ends far below.
const DISK_MAX: u64 = 64 << 40;
const QEMU_ARGS_MAX: usize = 256;

/// The layers of a new machine's disks: images at the bottom, new files over them.
#[derive(Debug, Default)]
struct NewDisks {
    bases: Vec<LayerRow>,
    overlays: Vec<NewOverlay>,
    empty: Vec<(String, LayerRow)>,
}

impl Engine {
    /// Makes a machine that is off. On an error nothing of it is left.
    pub fn create(&self, cx: &Context, name: &str, mut config: MachineConfig) -> Result<Machine> {
        check_name("machine", name)?;
        check_config(&mut config)?;
        check_ever_fits(name, config.memory)?;
        let Tools { qemu, .. } = self.tools()?;
        if self.catalog.read(|tx| TargetRow::name_taken(tx, name))? {
            return Err(name_taken(name));
        }
        let target = TargetRow {
            id: new_id(),
            name: name.to_owned(),
            group: self.group.clone(),
            group_name: String::new(),
            machine: qemu.machine.clone(),
            uuid: new_uuid(),
            macs: config.networks.iter().map(|_| new_mac()).collect(),
            parent: None,
            power: Power::Off,
            process: None,
            protected: false,
            created: now(),
            removed: None,
            config,
        };
        let disks = self.plan_new_disks(&target)?;
        cx.check()?;
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
                target.insert(tx)?;
                disks.bases.iter().try_for_each(|row| row.insert(tx))?;
                let tops = disks.overlays.iter().map(|new| (&new.disk, &new.row));
                for (disk, row) in tops.chain(disks.empty.iter().map(|(disk, row)| (disk, row))) {
                    row.insert(tx)?;
                    TargetRow::set_disk(tx, &target.id, disk, &row.id)?;
                }
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
        if target.config.qemu_args.is_empty() && disks.bases.is_empty() {
            return Ok(());
        }
        let over_base = |new: &NewOverlay| Disk {
            id: new.disk.clone(),
            layers: vec![self.layer_spec(&new.below), self.layer_spec(&new.row)],
        };
        let specs = disks.overlays.iter().map(over_base).collect();
        let config = MachineConfig { kernel: None, ..target.config.clone() };
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

    fn plan_new_disks(&self, target: &TargetRow) -> Result<NewDisks> {
        let mut disks = NewDisks::default();
        for (index, source) in target.config.disks.iter().enumerate() {
            let disk = format!("disk{index}");
            match source {
                DiskSource::Size(bytes) => {
                    disks.empty.push((disk, new_layer(target, *bytes)));
                }
                DiskSource::File(path) => {
                    let state = fs::canonicalize(self.state()).unwrap_or_default();
                    if path.starts_with(&state) {
                        return Err(Error::new(
                            Code::Refused,
                            format!(
                                "{} belongs to Spinney: it changes and goes with its machine",
                                path.display()
                            ),
                        )
                        .hint("copy it out of the state folder first: qemu-img convert -O qcow2 IT NEW"));
                    }
                    let info = self.img()?.info(path).map_err(|e| image_error(path, e))?;
                    if info.virtual_size == 0 {
                        return Err(Error::new(
                            Code::Usage,
                            format!("{} is empty: it cannot be a disk", path.display()),
                        )
                        .hint("a size in its place, such as --disk 10G, makes a new empty disk"));
                    }
                    let seen = stamp(path).map_err(|e| {
                        Error::new(Code::NotFound, format!("{} cannot be looked at", path.display()))
                            .because(e)
                    })?;
                    if let Some(below) = info.backing {
                        return Err(Error::new(
                            Code::Precondition,
                            format!("{} is itself an overlay over {}", path.display(), below.display()),
                        )
                        .hint("flatten it first: qemu-img convert -O qcow2 OVERLAY NEW"));
                    }
                    let top = new_layer(target, info.virtual_size);
                    let base = LayerRow {
                        id: new_id(),
                        file: text(path)?,
                        format: info.format,
                        stamp: Some(seen),
                        ..top.clone()
                    };
                    let top = LayerRow { below: Some(base.id.clone()), depth: 2, ..top };
                    disks.overlays.push(NewOverlay { disk, row: top, below: base.clone() });
                    disks.bases.push(base);
                }
            }
        }
        Ok(disks)
    }

    fn make_new_disks(&self, disks: &NewDisks) -> Result<()> {
        let img = self.img()?;
        let made = disks
            .empty
            .iter()
            .try_for_each(|(_, row)| img.create(&self.layer_file(row), row.size, None))
            .map_err(Error::from)
            .and_then(|()| self.make_overlays(&disks.overlays));
        if made.is_err() {
            self.remove_new_disks(disks);
        }
        made
    }

    fn remove_new_disks(&self, disks: &NewDisks) {
        self.remove_overlays(&disks.overlays);
        for (_, row) in &disks.empty {
            crate::disks::remove_file(&self.layer_file(row));
        }
    }
}

/// The lowest layer of a disk, in a file of our own.
fn new_layer(target: &TargetRow, size: u64) -> LayerRow {
    let id = new_id();
    LayerRow {
        file: format!("{id}.qcow2"),
        id,
        group: target.group.clone(),
        format: "qcow2".into(),
        size,
        below: None,
        depth: 1,
        stamp: None,
    }
}

pub(crate) fn name_taken(name: &str) -> Error {
    Error::new(Code::Refused, format!("there already is a machine called {name}"))
        .hint("choose another name, or remove that one with `spinney rm`")
}

fn text(path: &Path) -> Result<String> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| Error::new(Code::Usage, format!("the path {} is not UTF-8", path.display())))
}

fn image_error(path: &Path, error: qemu::image::ImageError) -> Error {
    match error {
        in_use @ qemu::image::ImageError::InUse { .. } => {
            Error::new(Code::Refused, format!("{} is in use by another process", path.display()))
                .because(in_use)
                .hint("end the program that has it open for writing (another virtual machine?)")
        }
        other => {
            Error::new(Code::Failed, format!("{} cannot be used as a disk", path.display())).because(other)
        }
    }
}

/// Checks what can be checked without making anything, and makes paths absolute.
fn check_config(config: &mut MachineConfig) -> Result<()> {
    let usage = |message: String| Err(Error::new(Code::Usage, message));
    if config.memory < MEMORY_MIN || config.memory > MEMORY_MAX {
        return usage(format!("{} of memory: a machine has between 16 MiB and 4 TiB", size(config.memory)));
    }
    // Whole mebibytes: QEMU's -m, and 2 MiB of map leaves, come out even.
    config.memory = config.memory.next_multiple_of(1 << 20);
    if config.cpus == 0 || config.cpus > CPUS_MAX {
        return usage(format!("{} CPUs: a machine has between 1 and {CPUS_MAX}", config.cpus));
    }
    if config.disks.len() > MAX_DISKS {
        return usage(format!("{} disks: a machine has at most {MAX_DISKS}", config.disks.len()));
    }
    if config.networks.len() > MAX_CARDS {
        return usage(format!("{} network cards: a machine has at most {MAX_CARDS}", config.networks.len()));
    }
    if let Some(other) = config.networks.iter().find(|n| *n != "user") {
        return usage(format!("there is no network called {other:?}; \"user\" is the only one for now"));
    }
    let args = &config.qemu_args;
    if args.len() > QEMU_ARGS_MAX || args.iter().any(|a| a.len() > 4096 || a.contains('\0')) {
        return usage(format!("at most {QEMU_ARGS_MAX} --qemu-arg words of at most 4096 bytes each"));
    }
    if config.kernel.is_none() && (config.initrd.is_some() || config.append.is_some()) {
        return usage("--initrd and --append need --kernel".to_owned());
    }
    for source in &mut config.disks {
        match source {
            DiskSource::File(path) => *path = existing_file("disk", path)?,
            DiskSource::Size(bytes) if *bytes < DISK_MIN || *bytes > DISK_MAX => {
                return usage(format!("a disk of {}: a disk has between 64 KiB and 64 TiB", size(*bytes)));
            }
            // Whole sectors of the largest kind that guests see.
            DiskSource::Size(bytes) => *bytes = bytes.next_multiple_of(4096),
        }
    }
    for (what, file) in [("kernel", &mut config.kernel), ("initrd", &mut config.initrd)] {
        if let Some(path) = file {
            *path = existing_file(what, path)?;
        }
    }
    Ok(())
}

/// A size as people write it, in the largest unit that leaves it whole.
pub(crate) fn size(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut whole = bytes;
    let mut units = units.into_iter();
    let mut unit = units.next().unwrap_or_default();
    while whole > 0 && whole.is_multiple_of(1024) {
        let Some(next) = units.next() else { break };
        (whole, unit) = (whole / 1024, next);
    }
    format!("{whole} {unit}")
}

fn existing_file(what: &str, path: &Path) -> Result<PathBuf> {
    let missing = |error: std::io::Error| {
        let code = match error.kind() {
            std::io::ErrorKind::NotFound => Code::NotFound,
            std::io::ErrorKind::PermissionDenied => Code::NotPermitted,
            _ => Code::Failed,
        };
        let missing =
            Error::new(code, format!("the {what} {} cannot be opened", path.display())).because(error);
        if what == "disk" && code == Code::NotFound {
            return missing
                .hint("--disk takes a file that is there, or a size for a new empty disk, such as 10G");
        }
        missing
    };
    let path = fs::canonicalize(path).map_err(missing)?;
    let file = fs::File::open(&path).map_err(missing)?;
    if !file.metadata().map_err(missing)?.is_file() {
        return Err(Error::new(Code::Usage, format!("the {what} {} is not a file", path.display())));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> MachineConfig {
        MachineConfig {
            memory: 64 << 20,
            cpus: 1,
            disks: Vec::new(),
            kernel: None,
            initrd: None,
            append: None,
            networks: Vec::new(),
            memory_snapshots: true,
            qemu_args: Vec::new(),
        }
    }

    #[test]
    fn sizes_out_of_bounds_are_usage_errors() {
        for memory in [0, 1 << 20, 1 << 60] {
            let mut bad = MachineConfig { memory, ..config() };
            assert_eq!(check_config(&mut bad).unwrap_err().code(), Code::Usage, "{memory}");
        }
        for size in [0, 1, 1 << 60, u64::MAX] {
            let mut bad = MachineConfig { disks: vec![DiskSource::Size(size)], ..config() };
            assert_eq!(check_config(&mut bad).unwrap_err().code(), Code::Usage, "{size}");
        }
        let mut odd = MachineConfig { disks: vec![DiskSource::Size(100_001)], ..config() };
        check_config(&mut odd).unwrap();
        assert_eq!(odd.disks, [DiskSource::Size(102_400)]);
    }

    #[test]
    fn sizes_are_said_as_people_write_them() {
        let said = [0, 1000, 8 << 20, 1000 << 30, 1536 << 20, 4 << 40, u64::MAX].map(size);
        assert_eq!(
            said,
            ["0 bytes", "1000 bytes", "8 MiB", "1000 GiB", "1536 MiB", "4 TiB", "18446744073709551615 bytes"]
        );
    }

    #[test]
    fn a_folder_is_no_disk_and_a_missing_file_is_not_found() {
        let folder = MachineConfig { disks: vec![DiskSource::File("/".into())], ..config() };
        assert_eq!(check_config(&mut folder.clone()).unwrap_err().code(), Code::Usage);
        let gone = MachineConfig { disks: vec![DiskSource::File("/no/such/file".into())], ..config() };
        let error = check_config(&mut gone.clone()).unwrap_err();
        assert_eq!(error.code(), Code::NotFound);
        assert!(error.to_string().contains("/no/such/file"), "{error}");
    }
}
