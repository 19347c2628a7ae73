//! The disks of a clone: what they are made of, and the copy of a whole chain into one file that lies over nothing.

use std::io;
use std::path::{Path, PathBuf};

use rusqlite::Transaction;
use serde_json::json;

use crate::catalog::{LayerRow, OpRow, TargetRow};
use crate::clone::{ClonePlan, Original};
use crate::config::{DiskConfig, DiskSource, MachineConfig};
use crate::context::Context;
use crate::disks::{NewOverlay, remove_file};
use crate::engine::Engine;
use crate::error::{Code, Error, MAKE_ROOM, Result};
use crate::fault::step;
use crate::half_made::HalfMade;
use crate::new_disks::{NewDisks, new_layer};
use crate::owner::May;
use crate::take::point_here_at;

/// The disks of a clone before the catalog speaks of them.
#[derive(Default)]
pub(crate) struct CloneDisks {
    /// Over the source's layers.
    pub(crate) overlays: Vec<NewOverlay>,
    /// Disks that are a user's image as it is, with their layers.
    pub(crate) read_only: Vec<(String, String)>,
    /// Layers that lie over nothing.
    pub(crate) layers: Vec<(String, LayerRow)>,
    /// Files in a folder of the user's ...
    pub(crate) images: Vec<HalfMade>,
    /// ... and the disks over them.
    pub(crate) over: NewDisks,
}

/// A chain that is to be copied.
pub(crate) struct Chain {
    disk: String,
    top: LayerRow,
    /// Bytes that a copy of it takes.
    bytes: u64,
}

/// Where the chains of a full clone go.
pub(crate) struct Copies {
    to_images: Vec<(Chain, PathBuf)>,
    to_layers: Vec<Chain>,
}

impl CloneDisks {
    /// Writes them down as the disks of a machine.
    pub(crate) fn insert(&self, tx: &Transaction<'_>, target: &str) -> Result<()> {
        point_here_at(tx, target, &self.overlays)?;
        self.over.insert(tx, target)?;
        for (disk, layer) in &self.layers {
            layer.insert(tx)?;
            TargetRow::set_disk(tx, target, disk, &layer.id)?;
        }
        self.read_only.iter().try_for_each(|(disk, layer)| TargetRow::set_disk(tx, target, disk, layer))
    }

    /// Those of its files that are the user's.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        self.images.iter().map(|image| image.path().to_owned()).collect()
    }
}

impl Engine {
    /// Removes files that the catalog does not speak of.
    pub(crate) fn remove_clone_disks(&self, disks: &CloneDisks) {
        self.remove_overlays(&disks.overlays);
        self.remove_new_disks(&disks.over);
        disks.layers.iter().for_each(|(_, layer)| remove_file(&self.layer_file(layer)));
        disks.images.iter().for_each(HalfMade::remove);
    }

    /// What a full clone of these disks copies, and where to; refused if it has no room, or a file is there already. What is no disk of
    /// the settings (UEFI's variables) is a layer in any case: as an image it would be of no use to anybody.
    pub(crate) fn plan_copies(
        &self,
        name: &str,
        group: &str,
        config: &MachineConfig,
        disks: &[(String, String)],
        dir: Option<&Path>,
    ) -> Result<Copies> {
        let tops = self.catalog.read(|tx| {
            let tops = disks.iter().map(|(disk, top)| Ok((disk.clone(), LayerRow::by_id(tx, top)?)));
            tops.collect::<Result<Vec<_>>>()
        })?;
        let mut copies = Copies { to_images: Vec::new(), to_layers: Vec::new() };
        let group = self.groups.by_id(group)?;
        for (disk, top) in tops.into_iter().filter(|(_, top)| !top.is_users()) {
            let bytes = self.img_of(&group)?.measure(&self.layer_file(&top), &top.format)?;
            let is_disk = config.disks.iter().any(|known| known.id == disk);
            let image = dir.filter(|_| is_disk).map(|dir| dir.join(format!("{name}-{disk}.qcow2")));
            let chain = Chain { disk, top, bytes };
            match image {
                Some(image) => copies.to_images.push((chain, image)),
                None => copies.to_layers.push(chain),
            }
        }
        if let Some((_, there)) = copies.to_images.iter().find(|(_, image)| image.symlink_metadata().is_ok())
        {
            return Err(cannot_be_made(there, io::ErrorKind::AlreadyExists.into()));
        }
        let sum = |chains: &mut dyn Iterator<Item = &Chain>| chains.map(|chain| chain.bytes).sum();
        let what = format!("making {name}");
        self.check_room_for_copy(&group.layers_folder(), &what, sum(&mut copies.to_layers.iter()))?;
        if let Some(dir) = dir {
            self.check_room_for_copy(dir, &what, sum(&mut copies.to_images.iter().map(|(chain, _)| chain)))?;
            if let Some(owner) = group.runs_as().filter(|owner| !owner.may(May::Pass, dir)) {
                let who = owner.label();
                return Err(Error::new(Code::NotPermitted, format!("{who} cannot get to {}", dir.display()))
                    .because(format!("machines of the group {} run as {who}", group.row.name))
                    .hint("let others through the folders above it (chmod o+x), or choose another folder"));
            }
        }
        Ok(copies)
    }

    /// Copies all of it; `config` is what the clone's settings become. On an error nothing is left.
    pub(crate) fn full_disks(
        &self,
        cx: &Context,
        original: &Original<'_>,
        copies: &Copies,
        config: &mut MachineConfig,
    ) -> Result<CloneDisks> {
        let mut disks = CloneDisks {
            read_only: self.catalog.read(|tx| Self::read_only_disks(tx, &original.disks))?,
            ..CloneDisks::default()
        };
        match self.make_copies(cx, original, copies, config, &mut disks) {
            Ok(()) => Ok(disks),
            Err(error) => {
                self.remove_clone_disks(&disks);
                Err(error)
            }
        }
    }

    fn make_copies(
        &self,
        cx: &Context,
        original: &Original<'_>,
        copies: &Copies,
        config: &mut MachineConfig,
        disks: &mut CloneDisks,
    ) -> Result<()> {
        let group = self.groups.by_id(&original.group)?;
        // Before the first of them comes to be, and once more when it can be told which files they are: nobody looks through that folder at
        // the next start.
        disks.images = copies.to_images.iter().map(|(_, image)| HalfMade::at(image)).collect();
        self.write_half_made(cx, &disks.images)?;
        for image in &mut disks.images {
            image.make().map_err(|error| cannot_be_made(image.path(), error))?;
            group.gives(image.path())?;
        }
        self.write_half_made(cx, &disks.images)?;
        step("clone.begun");
        let images = copies.to_images.iter().map(|(chain, _)| chain);
        cx.phase("copying disks", copies.to_layers.iter().chain(images).map(|chain| chain.bytes).sum());
        for chain in &copies.to_layers {
            let layer = new_layer(&original.group, chain.top.size);
            let file = self.layer_file(&layer);
            disks.layers.push((chain.disk.clone(), layer));
            HalfMade::at(&file).make().map_err(|error| cannot_be_made(&file, error))?;
            group.gives(&file)?;
            self.copy_chain(cx, &original.group, chain, &file)?;
            step("clone.copied");
            if let Some(disk) = config.disks.iter_mut().find(|disk| disk.id == chain.disk) {
                disk.source = DiskSource::Size(chain.top.size);
            }
        }
        let mut given: Vec<DiskConfig> = Vec::new();
        for (chain, image) in &copies.to_images {
            self.copy_chain(cx, &original.group, chain, image)?;
            step("clone.copied");
            if let Some(disk) = config.disks.iter_mut().find(|disk| disk.id == chain.disk) {
                disk.source = DiskSource::File(image.clone());
                given.push(disk.clone());
            }
        }
        // A base image that somebody has written to meanwhile is in the copy in part.
        self.catalog.read(|tx| self.check_chains(tx, &original.name, &original.disks))?;
        self.check_readable_by_owner(&group, config)?;
        disks.over = self.plan_new_disks(&original.group, &given)?;
        self.make_new_disks(&disks.over)
    }

    fn write_half_made(&self, cx: &Context, images: &[HalfMade]) -> Result<()> {
        let plan = ClonePlan { half_made: images.to_vec() };
        self.catalog.write(|tx| OpRow::set_plan(tx, &cx.id, &json!(plan)))
    }

    /// Copies what a chain shows into a file that is there. Who runs it is the group's owner, if that is not us: he could have written
    /// another name into the header of a layer that is his.
    fn copy_chain(&self, cx: &Context, group: &str, chain: &Chain, to: &Path) -> Result<()> {
        let folder = to.parent().unwrap_or(to);
        let img = self.img_of(&*self.groups.by_id(group)?)?;
        let (from, mut told, mut full) = (self.layer_file(&chain.top), 0, false);
        let copied = img.flatten(&from, &chain.top.format, to, &mut |percent| {
            let done = chain.bytes / 100 * u64::from(percent);
            cx.advance(done.saturating_sub(told));
            told = told.max(done);
            full = self.room_for_copies(folder) == 0;
            !full && cx.check().is_ok()
        });
        cx.check()?;
        let sentence = || format!("{} cannot be copied to {}", chain.disk, to.display());
        match copied {
            Err(_) if full => Err(Error::new(Code::NoSpace, sentence())
                .because("what is left on that disk is for running machines and the catalog")
                .hint(MAKE_ROOM)),
            copied => copied.map_err(|error| Error::new(Code::Failed, sentence()).because(error)),
        }
    }
}

fn cannot_be_made(path: &Path, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::AlreadyExists => {
            Error::new(Code::Refused, format!("there already is a file {}", path.display()))
                .hint("choose another folder or another name")
        }
        io::ErrorKind::PermissionDenied => {
            Error::new(Code::NotPermitted, format!("{} cannot be made", path.display())).because(error)
        }
        _ => Error::new(Code::Failed, format!("{} cannot be made", path.display())).because(error),
    }
}
