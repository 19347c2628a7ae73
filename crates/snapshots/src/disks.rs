//! Disk layers as files: where they are, what QEMU is told of them, new overlays over them.
//!
//! Layers only ever get something put over them. A new overlay is durable (file, then folder) before the catalog speaks
//! of it, and from the moment the catalog calls it here's disk every start uses it, whatever becomes of the take or goto
//! that made it: empty, it is transparent.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use qemu::command::{Disk, Layer};
use rusqlite::Transaction;
use snapfs::MapFile;

use crate::catalog::{BaseStamp, LayerRow, SnapshotRow, TargetRow};
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted};
use crate::id::new_id;
use crate::new_disks::image_error;

/// Most layers of a disk that a QEMU has open: every one is a descriptor, start time and pause of its machine. Below them is one file, which
/// is what all others show, once they have settled.
pub(crate) const OPEN_LIMIT: usize = 32;
/// Chains of so many layers are opened as they are.
pub(crate) const SHALLOW: usize = 8;

/// Deepest chain where disks cannot be read through the snapshot file system.
pub(crate) const DEPTH_LIMIT: u32 = 200;

/// Deepest chain that a goto makes: what was kept at the limit can be gone to.
pub(crate) const GOTO_DEPTH_LIMIT: u32 = DEPTH_LIMIT + 50;

/// An overlay that is about to be made over the layer of a disk.
#[derive(Clone, Debug)]
pub(crate) struct NewOverlay {
    pub(crate) disk: String,
    pub(crate) row: LayerRow,
    /// The layer that it lies over.
    pub(crate) below: LayerRow,
}

impl Engine {
    /// A layer's file.
    pub(crate) fn layer_file(&self, row: &LayerRow) -> PathBuf {
        self.layers_folder(&row.group).join(&row.file)
    }

    /// What QEMU is told of a machine's disks, by what is opened of their chains. The view is asked, which may take its time: not within a
    /// transaction.
    pub(crate) fn disk_specs(&self, machine: &str, disks: &[(String, Vec<LayerRow>)]) -> Result<Vec<Disk>> {
        let spec = |(disk, opened): &(String, Vec<LayerRow>)| {
            let layers = self.open_specs(machine, disk, opened)?;
            Ok(Disk { layers, ..self.disk_spec(disk, opened) })
        };
        disks.iter().map(spec).collect()
    }

    /// What is opened of the chains of disks, base first.
    pub(crate) fn opened(
        tx: &Transaction<'_>,
        disks: &[(String, String)],
    ) -> Result<Vec<(String, Vec<LayerRow>)>> {
        disks.iter().map(|(disk, top)| Ok((disk.clone(), opened(tx, top)?))).collect()
    }

    /// A disk by its chain, base first, every layer of which is opened.
    pub(crate) fn disk_spec(&self, id: &str, chain: &[LayerRow]) -> Disk {
        Disk {
            id: id.to_owned(),
            layers: chain.iter().map(|row| self.layer_spec(row)).collect(),
            // UEFI's variables have none.
            place: id.strip_prefix("disk").and_then(|number| number.parse().ok()).unwrap_or(0),
            read_only: chain.last().is_some_and(LayerRow::is_users),
        }
    }

    /// What QEMU is told of a machine's disks that nobody writes to, and of new overlays over others.
    pub(crate) fn specs_over(
        &self,
        machine: &str,
        read_only: &[(String, String)],
        overlays: &[NewOverlay],
    ) -> Result<Vec<Disk>> {
        let below: Vec<_> = overlays.iter().map(|new| (new.disk.clone(), new.below.id.clone())).collect();
        let (read_only, below) =
            self.catalog.read(|tx| Ok((Self::opened(tx, read_only)?, Self::opened(tx, &below)?)))?;
        let mut disks = self.disk_specs(machine, &read_only)?;
        for (mut disk, new) in self.disk_specs(machine, &below)?.into_iter().zip(overlays) {
            disk.layers.push(self.layer_spec(&new.row));
            disk.read_only = false;
            disks.push(disk);
        }
        disks.sort_by_key(|disk| disk.place);
        Ok(disks)
    }

    pub(crate) fn layer_spec(&self, row: &LayerRow) -> Layer {
        Layer { id: row.id.clone(), flat: false, file: self.layer_file(row), format: row.format.clone() }
    }

    /// The files of a disk, base first: what has settled of a deep chain is one flat file.
    fn open_specs(&self, machine: &str, disk: &str, opened: &[LayerRow]) -> Result<Vec<Layer>> {
        let specs = |rows: &[LayerRow]| rows.iter().map(|row| self.layer_spec(row)).collect::<Vec<_>>();
        let Some((settled, above)) = split_settled(opened) else { return Ok(specs(opened)) };
        if let Some(flat) = self.flat_spec(settled) {
            return Ok([vec![flat], specs(above)].concat());
        }
        // Nobody has looked at what was to be read through the view.
        let below = self.catalog.read(|tx| LayerRow::chain(tx, &settled.id))?;
        below.iter().try_for_each(|row| self.check_layer(machine, disk, row))?;
        Ok([specs(&below), specs(above)].concat())
    }

    /// A settled layer with all below it, as a file of the group's view; none if there is no view.
    pub(crate) fn flat_spec(&self, row: &LayerRow) -> Option<Layer> {
        let root = row.settled?;
        let view = self.groups.by_id(&row.group).and_then(|group| self.view_of(&group));
        let view =
            view.inspect_err(|error| tracing::debug!(%error, "disks are opened layer by layer")).ok()?;
        let file = view.disk(&MapFile { root, bytes: row.size });
        Some(Layer { id: row.id.clone(), flat: true, file, format: "raw".into() })
    }

    /// Sees to it that every file of the chains is there and that no user's image changed behind our back.
    pub(crate) fn check_chains(
        &self,
        tx: &Transaction<'_>,
        machine: &str,
        disks: &[(String, String)],
    ) -> Result<()> {
        for (disk, top) in disks {
            let opened = opened(tx, top)?;
            // What is read through the view is compared with its name, page by page; where there is none, `open_specs` looks. Only a user
            // may have changed what is his.
            let looked_at = match split_settled(&opened) {
                None => &opened,
                Some((_, above)) => {
                    let base = LayerRow::base(tx, top)?;
                    if base.is_users() {
                        self.check_layer(machine, disk, &base)?;
                    }
                    above
                }
            };
            looked_at.iter().try_for_each(|row| self.check_layer(machine, disk, row))?;
        }
        Ok(())
    }

    fn check_layer(&self, machine: &str, disk: &str, row: &LayerRow) -> Result<()> {
        let path = self.layer_file(row);
        let found = stamp(&path).map_err(|error| {
            let what = if row.stamp.is_some() { "the image under" } else { "a layer of" };
            Error::new(Code::Damaged, format!("{what} {disk} of {machine} is missing: {}", path.display()))
                .because(error)
                .hint("put the file back where it was: nothing else is lost")
        })?;
        if row.stamp.is_none() && row.format == "qcow2" {
            let cut = qemu::qcow2::is_cut(&path).map_err(|error| {
                Error::new(
                    Code::Failed,
                    format!("a layer of {disk} of {machine} cannot be read: {}", path.display()),
                )
                .because(error)
            })?;
            if let Some(lacks) = cut {
                return Err(Error::new(
                    Code::Damaged,
                    format!(
                        "a layer of {disk} of {machine} is cut off, it lacks {lacks}: {}",
                        path.display()
                    ),
                )
                .hint("put the file back as it was: nothing else is lost"));
            }
        }
        if let Some(known) = row.stamp
            && known != found
        {
            return Err(Error::new(Code::Damaged, format!("{} was changed behind our back", path.display()))
                .because(match (known.bytes, found.bytes) {
                    (before, now) if before == now => "it was written to; its size is the same".to_owned(),
                    (before, now) => format!("it had {before} bytes when it was last looked at, and has {now} now"),
                })
                .hint(format!(
                    "put it back as it was: disks made over it are only right together with it. If its content is the same, \
                     `spinney edit {machine} --accept-disks` takes it as it is now"
                )));
        }
        Ok(())
    }

    /// The users' images under these layers.
    pub(crate) fn bases(tx: &Transaction<'_>, disks: &[(String, String)]) -> Result<Vec<LayerRow>> {
        let (mut bases, mut seen) = (Vec::new(), HashSet::new());
        for (_, top) in disks {
            let base = LayerRow::base(tx, top)?;
            if base.is_users() && seen.insert(base.id.clone()) {
                bases.push(base);
            }
        }
        Ok(bases)
    }

    /// What a user's image is like now, if that is not how it was when it was last looked at; one that cannot be what it was is refused.
    /// Takes its time: nobody is to wait for the catalog meanwhile.
    pub(crate) fn changed_base(&self, row: &LayerRow) -> Result<Option<BaseStamp>> {
        let path = self.layer_file(row);
        let found = stamp(&path).map_err(|error| {
            Error::new(Code::Damaged, format!("the image is missing: {}", path.display()))
                .because(error)
                .hint("put the file back where it was: nothing else is lost")
        })?;
        if row.stamp == Some(found) {
            return Ok(None);
        }
        self.check_size(row, &path, found.bytes)?;
        Ok(Some(found))
    }

    /// Whatever lies over an image of another size is wrong.
    fn check_size(&self, row: &LayerRow, path: &Path, bytes: u64) -> Result<()> {
        let another = || {
            Error::new(Code::Refused, format!("{} is not the image that it was", path.display()))
                .hint("put the right file there: what was written over it is only right together with it")
        };
        // Any file can be read as raw, and QEMU fills its last sector up.
        let mut size = bytes.next_multiple_of(512);
        if row.format != "raw" {
            let info = self.img()?.info(path).map_err(|error| image_error(path, error))?;
            if info.format != row.format {
                return Err(another().because(format!("it was {}, and is {}", row.format, info.format)));
            }
            size = info.virtual_size;
        }
        if size != row.size {
            return Err(
                another().because(format!("a guest saw {} bytes of it, and would see {size} now", row.size))
            );
        }
        Ok(())
    }

    /// The layers of ours under these disks that the snapshot `parent` does not have: what was written since.
    pub(crate) fn layers_since(
        tx: &Transaction<'_>,
        disks: &[(String, String)],
        parent: Option<&str>,
    ) -> Result<Vec<LayerRow>> {
        let before = parent.map_or(Ok(Vec::new()), |parent| SnapshotRow::disks(tx, parent))?;
        let mut since = Vec::new();
        for (disk, top) in disks {
            let its = before.iter().find(|(known, _)| known == disk).map(|(_, top)| top.as_str());
            since.extend(above_what_is_shared(tx, top, its)?);
        }
        since.retain(|layer| !layer.is_users());
        // A clone lies over layers that others wrote to.
        if parent.is_none() && since.len() > disks.len() {
            let others = Self::reached_by_others(tx, disks)?;
            since.retain(|layer| !others.contains(&layer.id));
        }
        Ok(since)
    }

    /// The layers of all snapshots, and of all machines but the one with these disks.
    fn reached_by_others(tx: &Transaction<'_>, disks: &[(String, String)]) -> Result<HashSet<String>> {
        let mut tops = Vec::new();
        for snapshot in SnapshotRow::all(tx)? {
            tops.extend(SnapshotRow::disks(tx, &snapshot.id)?);
        }
        for target in TargetRow::all(tx, true)? {
            let here = TargetRow::disks(tx, &target.id)?;
            tops.extend(here.into_iter().filter(|disk| !disks.contains(disk)));
        }
        let mut reached = HashSet::new();
        for (_, top) in tops {
            let mut at = Some(top);
            while let Some(id) = at.filter(|id| reached.insert(id.clone())) {
                at = LayerRow::by_id(tx, &id)?.below;
            }
        }
        Ok(reached)
    }

    /// Rows for one overlay over the layer of each disk that is written to. Fails if a chain is as deep as may be.
    pub(crate) fn plan_overlays(
        &self,
        tx: &Transaction<'_>,
        what: &str,
        disks: &[(String, String)],
        limit: u32,
    ) -> Result<Vec<NewOverlay>> {
        let mut overlays = Vec::new();
        for (disk, layer) in disks {
            let below = LayerRow::by_id(tx, layer)?;
            if below.is_users() {
                continue;
            }
            if below.depth >= limit {
                self.check_depth(tx, what, disk, &below)?;
            }
            let id = new_id();
            let row = LayerRow {
                file: format!("{id}.qcow2"),
                id,
                group: below.group.clone(),
                format: "qcow2".into(),
                size: below.size,
                below: Some(below.id.clone()),
                depth: below.depth + 1,
                stamp: None,
                settled: None,
                retired: Vec::new(),
            };
            overlays.push(NewOverlay { disk: disk.clone(), row, below });
        }
        Ok(overlays)
    }

    /// A chain may be as deep as it likes where what lies deep below is read from one file.
    fn check_depth(&self, tx: &Transaction<'_>, what: &str, disk: &str, top: &LayerRow) -> Result<()> {
        let open = LayerRow::down_to_settled(tx, &top.id)?;
        let open = open.iter().filter(|row| row.settled.is_none()).count();
        let refused = |why: String| {
            Err(Error::new(Code::Refused, format!("{disk} of {what} is {} layers deep", top.depth))
                .because(why))
        };
        match self.can_view() {
            Ok(()) if open <= DEPTH_LIMIT as usize => Ok(()),
            Ok(()) => refused(format!("{open} of them have not settled yet, and {DEPTH_LIMIT} is the most"))
                .map_err(|error: Error| error.hint("wait a moment: that is done in the background")),
            Err(lacks) => {
                refused(format!("{DEPTH_LIMIT} is the most without the snapshot file system: {lacks}"))
                    .map_err(|error| error.hint("go back to an earlier snapshot and branch from there"))
            }
        }
    }

    /// Makes the files of planned overlays, durable. On an error none is left.
    pub(crate) fn make_overlays(&self, overlays: &[NewOverlay]) -> Result<()> {
        let img = self.img()?;
        self.check_room(overlays.len())?;
        let made = overlays.iter().try_for_each(|new| {
            // Ours are named relative to their folder, so that the state folder can be moved.
            let backing = if new.below.stamp.is_some() {
                self.layer_file(&new.below)
            } else {
                PathBuf::from(&new.below.file)
            };
            let file = self.layer_file(&new.row);
            img.create(&file, new.row.size, Some((&backing, &new.below.format)))?;
            self.groups.by_id(&new.row.group)?.gives(&file)
        });
        made.inspect_err(|_: &Error| self.remove_overlays(overlays))?;
        if planted(Fault::OverlayUnsynced) {
            overlays.iter().for_each(|new| rewrite_unsynced(&self.layer_file(&new.row)));
        }
        Ok(())
    }

    /// Makes what lies in layers durable that a process without a clean end has written to.
    pub(crate) fn sync_layers(&self, disks: &[(String, String)]) -> Result<()> {
        for (disk, layer) in disks {
            let row = self.catalog.read(|tx| LayerRow::by_id(tx, layer))?;
            let path = self.layer_file(&row);
            let synced = fs::File::open(&path).and_then(|file| file.sync_all());
            synced.map_err(|error| {
                Error::new(Code::Failed, format!("{disk} cannot be made durable: {}", path.display()))
                    .because(error)
            })?;
        }
        Ok(())
    }

    /// Removes the files of overlays that the catalog does not speak of.
    pub(crate) fn remove_overlays(&self, overlays: &[NewOverlay]) {
        for new in overlays {
            remove_file(&self.layer_file(&new.row));
        }
    }

    /// Those of these disks that are a user's image as it is: read-only ones.
    pub(crate) fn read_only_disks(
        tx: &Transaction<'_>,
        disks: &[(String, String)],
    ) -> Result<Vec<(String, String)>> {
        let mut found = Vec::new();
        for (disk, layer) in disks {
            if LayerRow::by_id(tx, layer)?.is_users() {
                found.push((disk.clone(), layer.clone()));
            }
        }
        Ok(found)
    }

    /// True if the file system of a group's layers takes reads and writes past the page cache.
    pub(crate) fn direct_io(&self, group: &str) -> bool {
        let path = self.layers_folder(group).join(format!(".direct-{}", new_id()));
        let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::RDWR | rustix::fs::OFlags::DIRECT;
        let opened = rustix::fs::open(&path, flags, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR);
        let _ = fs::remove_file(&path);
        opened.is_ok()
    }
}

/// The layers of one chain, from its top down, that another one does not have.
fn above_what_is_shared(tx: &Transaction<'_>, top: &str, other: Option<&str>) -> Result<Vec<LayerRow>> {
    let mut at = Some(LayerRow::by_id(tx, top)?);
    let mut other = other.map(|id| LayerRow::by_id(tx, id)).transpose()?;
    let mut above = Vec::new();
    while let Some(row) = at {
        // A layer is as deep in every chain that it is in.
        while let Some(deeper) = other.take_if(|other| other.depth > row.depth) {
            other = deeper.next_below(tx)?;
        }
        if other.as_ref().is_some_and(|other| other.id == row.id) {
            break;
        }
        at = row.next_below(tx)?;
        above.push(row);
    }
    Ok(above)
}

/// The layers of a disk that are looked at and opened, base first: all of a shallow chain; of a deep one those down to the highest that has
/// settled, in whose place one flat file is opened.
fn opened(tx: &Transaction<'_>, top: &str) -> Result<Vec<LayerRow>> {
    let open = LayerRow::down_to_settled(tx, top)?;
    if is_deep(&open) { Ok(open) } else { LayerRow::chain(tx, top) }
}

/// The settled layer of a deep chain, and those above it, of what is opened.
fn split_settled(opened: &[LayerRow]) -> Option<(&LayerRow, &[LayerRow])> {
    opened.split_first().filter(|(lowest, _)| lowest.settled.is_some() && is_deep(opened))
}

fn is_deep(opened: &[LayerRow]) -> bool {
    opened.last().is_some_and(|top| top.depth as usize > SHALLOW)
}

/// Removes a file that may already be gone.
pub(crate) fn remove_file(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "a file that is no longer needed cannot be removed");
    }
}

/// The planted fault: the file as a tool that does not sync would have left it.
fn rewrite_unsynced(path: &Path) {
    let bytes = fs::read(path).unwrap_or_default();
    let _ = fs::remove_file(path);
    let _ = fs::write(path, bytes);
}

/// What a file looks like now.
pub(crate) fn stamp(path: &Path) -> std::io::Result<BaseStamp> {
    Ok(stamp_of(&fs::metadata(path)?))
}

/// What a file looked like by what the system said of it.
pub(crate) fn stamp_of(meta: &fs::Metadata) -> BaseStamp {
    let mtime_ns = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
    BaseStamp { bytes: meta.len(), mtime_ns }
}

/// Bytes that a file takes on the disk; 0 if it is not there.
pub(crate) fn allocated(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |meta| meta.blocks() * 512)
}

#[cfg(test)]
mod tests;
