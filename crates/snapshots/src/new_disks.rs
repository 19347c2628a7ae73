//! The layers of new disks: planned, made, and written down with the machine that they belong to.

use std::fs;
use std::path::{Path, PathBuf};

use qemu::command::{Disk, UEFI_DISK};
use qemu::firmware::{UefiFiles, find_uefi};
use qemu::image::ImageError;
use rusqlite::Transaction;

use crate::catalog::{LayerRow, TargetRow};
use crate::config::{DiskConfig, DiskSource, Firmware, MachineConfig};
use crate::disks::{remove_file, stamp};
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::id::new_id;

/// A disk that is about to be made.
#[derive(Debug)]
struct NewDisk {
    id: String,
    /// What it writes to; for a read-only disk the user's image.
    top: LayerRow,
    made: Made,
}

/// How its top comes to be.
#[derive(Debug)]
enum Made {
    /// An empty image.
    Empty,
    /// An overlay over a user's image.
    Over(Box<LayerRow>),
    /// A copy of a raw image.
    CopyOf(PathBuf),
    /// It is the user's image itself.
    AsItIs,
}

/// The disks of a new machine, or new ones of an old machine.
#[derive(Debug, Default)]
pub(crate) struct NewDisks(Vec<NewDisk>);

impl NewDisks {
    /// True if there is an image of somebody else's among them.
    pub(crate) fn has_images(&self) -> bool {
        self.0.iter().any(|disk| matches!(disk.made, Made::Over(_) | Made::AsItIs))
    }

    /// Writes them down as disks of a machine's.
    pub(crate) fn insert(&self, tx: &Transaction<'_>, target: &str) -> Result<()> {
        for disk in &self.0 {
            if let Made::Over(base) = &disk.made {
                base.insert(tx)?;
            }
            disk.top.insert(tx)?;
            TargetRow::set_disk(tx, target, &disk.id, &disk.top.id)?;
        }
        Ok(())
    }
}

impl Engine {
    /// Looks at what the disks are to be made of.
    pub(crate) fn plan_new_disks(&self, group: &str, disks: &[DiskConfig]) -> Result<NewDisks> {
        let plan = |disk: &DiskConfig| {
            let (top, made) = match &disk.source {
                DiskSource::Size(bytes) => (new_layer(group, *bytes), Made::Empty),
                DiskSource::File(path) if disk.read_only => (self.base_layer(group, path)?, Made::AsItIs),
                DiskSource::File(path) => {
                    let base = self.base_layer(group, path)?;
                    let top = new_layer(group, base.size);
                    (LayerRow { below: Some(base.id.clone()), depth: 2, ..top }, Made::Over(Box::new(base)))
                }
            };
            Ok(NewDisk { id: disk.id.clone(), top, made })
        };
        Ok(NewDisks(disks.iter().map(plan).collect::<Result<_>>()?))
    }

    /// The same for all that a new machine writes to: UEFI's variables are a disk like the others.
    pub(crate) fn plan_machine_disks(&self, group: &str, config: &MachineConfig) -> Result<NewDisks> {
        let mut disks = self.plan_new_disks(group, &config.disks)?;
        if config.firmware == Firmware::Uefi {
            let template = uefi_files()?.variables;
            let size = stamp(&template).map_err(|e| cannot_look_at(&template, e))?.bytes;
            let top = new_layer(group, size);
            disks.0.push(NewDisk { id: UEFI_DISK.into(), top, made: Made::CopyOf(template) });
        }
        Ok(disks)
    }

    /// A layer that is a user's own image.
    fn base_layer(&self, group: &str, path: &Path) -> Result<LayerRow> {
        let state = fs::canonicalize(self.state()).unwrap_or_default();
        if path.starts_with(&state) {
            return Err(Error::new(
                Code::Refused,
                format!("{} belongs to Spinney: it changes and goes with its machine", path.display()),
            )
            .hint("copy it out of the state folder first: qemu-img convert -O qcow2 IT NEW"));
        }
        let info = self.img()?.info(path).map_err(|e| image_error(path, e))?;
        if info.virtual_size == 0 {
            return Err(Error::new(Code::Usage, format!("{} is empty: it cannot be a disk", path.display()))
                .hint("a size in its place, such as --disk 10G, makes a new empty disk"));
        }
        let seen = stamp(path).map_err(|e| cannot_look_at(path, e))?;
        if let Some(below) = info.backing {
            return Err(Error::new(
                Code::Precondition,
                format!("{} is itself an overlay over {}", path.display(), below.display()),
            )
            .hint("flatten it first: qemu-img convert -O qcow2 OVERLAY NEW"));
        }
        let layer = new_layer(group, info.virtual_size);
        Ok(LayerRow { file: text(path)?, format: info.format, stamp: Some(seen), ..layer })
    }

    /// Makes their files, durable. On an error none is left.
    pub(crate) fn make_new_disks(&self, disks: &NewDisks) -> Result<()> {
        let img = self.img()?;
        self.check_room(disks.0.len())?;
        let make = |disk: &NewDisk| {
            let file = self.layer_file(&disk.top);
            match &disk.made {
                Made::Empty => img.create(&file, disk.top.size, None)?,
                Made::Over(base) => {
                    img.create(&file, disk.top.size, Some((&self.layer_file(base), &base.format)))?;
                }
                Made::CopyOf(source) => img.import(source, &file)?,
                Made::AsItIs => return Ok(()),
            }
            self.groups.by_id(&disk.top.group)?.gives(&file)
        };
        disks.0.iter().try_for_each(make).inspect_err(|_: &Error| self.remove_new_disks(disks))
    }

    /// Removes the files of disks that the catalog does not speak of.
    pub(crate) fn remove_new_disks(&self, disks: &NewDisks) {
        for disk in disks.0.iter().filter(|disk| !matches!(disk.made, Made::AsItIs)) {
            remove_file(&self.layer_file(&disk.top));
        }
    }

    /// What QEMU is told of them.
    pub(crate) fn new_disk_specs(&self, disks: &NewDisks) -> Vec<Disk> {
        let spec = |disk: &NewDisk| {
            let mut chain = Vec::new();
            if let Made::Over(base) = &disk.made {
                chain.push(base.as_ref().clone());
            }
            chain.push(disk.top.clone());
            self.disk_spec(&disk.id, &chain)
        };
        disks.0.iter().map(spec).collect()
    }
}

/// UEFI's files on this host.
pub(crate) fn uefi_files() -> Result<UefiFiles> {
    find_uefi().ok_or_else(|| {
        Error::new(Code::Precondition, "there is no UEFI firmware (OVMF) on this host")
            .hint("install it (Debian: apt install ovmf)")
    })
}

/// The lowest layer of a disk, in a file of our own.
pub(crate) fn new_layer(group: &str, size: u64) -> LayerRow {
    let id = new_id();
    LayerRow {
        file: format!("{id}.qcow2"),
        id,
        group: group.to_owned(),
        format: "qcow2".into(),
        size,
        below: None,
        depth: 1,
        stamp: None,
        settled: None,
        retired: Vec::new(),
    }
}

fn text(path: &Path) -> Result<String> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| Error::new(Code::Usage, format!("the path {} is not UTF-8", path.display())))
}

fn cannot_look_at(path: &Path, error: std::io::Error) -> Error {
    Error::new(Code::NotFound, format!("{} cannot be looked at", path.display())).because(error)
}

pub(crate) fn image_error(path: &Path, error: ImageError) -> Error {
    match error {
        in_use @ ImageError::InUse { .. } => {
            Error::new(Code::Refused, format!("{} is in use by another process", path.display()))
                .because(in_use)
                .hint("end the program that has it open for writing (another virtual machine?)")
        }
        other => {
            Error::new(Code::Failed, format!("{} cannot be used as a disk", path.display())).because(other)
        }
    }
}
