//! Frozen disk layers become known to the page store, in the background: most of a guest's memory is a copy of its disk, and what is there
//! need not be stored again (`docs/decisions/0016-memory-on-disk.md`).
//!
//! A layer is frozen when nothing writes to it any more: a snapshot has it, or it is a user's own image. The
//! store names its blocks and leaves the file alone. A user's image is *private*: only machines that lie over it have pages on it, so nobody
//! comes to depend on a file that he did not depend on already. A layer of ours goes only when the collector has moved what is needed of
//! it (`collect.rs`).

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::TryLockError;

use pages::{Extent, NewImage, Origin, PAGE_SIZE, Purpose};
use rusqlite::Transaction;

use crate::catalog::{LayerRow, SnapshotRow, TargetRow};
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::groups::OpenGroup;

impl Engine {
    /// Names the blocks of all frozen layers of a group that its store does not know yet. `go_on` may wait, and stops it by returning
    /// false.
    pub(crate) fn hash_layers(&self, group: &OpenGroup, go_on: &dyn Fn() -> bool) -> Result<()> {
        let store = group.store()?;
        let known: HashSet<String> =
            store.images().into_iter().filter(|image| image.whole).map(|image| image.label).collect();
        let mut frozen = self.catalog.read(|tx| frozen(tx, &group.row.id))?;
        frozen.retain(|layer| !known.contains(&layer.image_label()));
        // The machines over a user's image have a row each for it.
        let mut seen = HashSet::new();
        frozen.retain(|layer| seen.insert(layer.image_label()));
        for layer in frozen {
            if !go_on() {
                break;
            }
            // What it is now; and nobody takes it away meanwhile.
            let found = self.catalog.read(|tx| {
                let layer = LayerRow::by_id(tx, &layer.id)?;
                let pin = self.pins.pin([layer.id.clone()]);
                Ok((layer, pin))
            });
            match found.and_then(|(layer, _pin)| self.hash_layer(group, &layer, go_on)) {
                Ok(_) => {}
                Err(error) if error.code() == Code::NoSpace => return Err(error),
                // It may be gone by now, or a user's image that is not to be had: then nothing is left on it.
                Err(error) => tracing::debug!(layer = layer.id, %error, "a layer is not hashed"),
            }
        }
        Ok(())
    }

    /// Names the blocks of one layer for a group. True if all of them are known in the end. Where `qemu-img` speaks of another file than the
    /// layer's own, blocks of no use are named, and nothing wrong: a block is called by what it is.
    pub(crate) fn hash_layer(
        &self,
        group: &OpenGroup,
        layer: &LayerRow,
        go_on: &dyn Fn() -> bool,
    ) -> Result<bool> {
        let frozen = self.open_frozen(group, layer)?;
        let data = match layer.format.as_str() {
            "raw" => vec![Extent { offset: 0, bytes: u64::MAX }],
            format => {
                let found = self.img_of(group)?.data(frozen.path(), format, frozen.file())?;
                found.into_iter().map(|data| Extent { offset: data.offset, bytes: data.bytes }).collect()
            }
        };
        let is_users = layer.is_users();
        let path = match is_users {
            true => frozen.path().to_owned(),
            false => PathBuf::from("../layers").join(&layer.file),
        };
        let stamp = frozen.stamp();
        let seen = Some((stamp.bytes, stamp.mtime_ns));
        let image = NewImage { label: layer.image_label(), path, private: is_users, seen, data };
        Ok(group.store()?.add_image(&image, &|_, _| go_on())?)
    }

    /// Has every store rely on no other layers than those that the catalog knows: an older copy of it may have been put back.
    pub(crate) fn trust_layers(&self) -> Result<()> {
        for group in self.groups.all() {
            let Ok(store) = group.store() else { continue };
            let rows = self.catalog.read(|tx| LayerRow::of_group(tx, &group.row.id))?;
            store.trust_images(&rows.iter().map(LayerRow::image_label).collect());
        }
        Ok(())
    }

    /// What a session is for that stores a machine's memory.
    pub(crate) fn purpose(&self, target: &TargetRow) -> Result<Purpose> {
        let bases = self.catalog.read(|tx| Self::bases(tx, &TargetRow::disks(tx, &target.id)?))?;
        let images = bases.iter().map(LayerRow::image_label).collect();
        Ok(Purpose { origin: origin(&target.id), images })
    }

    /// How far the layers of a group are known to its store: bytes of all frozen ones, and of those that are known.
    pub(crate) fn hashed_layers(&self, group: &OpenGroup) -> Result<(u64, u64)> {
        let images = group.store().map(|store| store.images()).unwrap_or_default();
        let known: HashMap<String, bool> =
            images.into_iter().map(|image| (image.label, image.whole)).collect();
        let frozen = self.catalog.read(|tx| frozen(tx, &group.row.id))?;
        let mut files: HashMap<String, u64> = HashMap::new();
        for layer in frozen {
            files.insert(layer.image_label(), crate::disks::allocated(&self.layer_file(&layer)));
        }
        let done = files.iter().filter(|(label, _)| known.get(*label) == Some(&true)).map(|(_, bytes)| bytes);
        Ok((files.values().sum(), done.sum()))
    }

    /// Does in the background what makes later takes smaller and faster: layers are hashed, the index is put into files, cold packs are
    /// compressed. It stops for whatever anybody waits for. False if something is left to do.
    pub fn tend(&self, compress: bool, ended: &dyn Fn() -> bool) -> bool {
        // A layer that is hashed may not be about to go.
        let _alone = match self.housekeeping.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(guard)) => guard.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        let go_on = || {
            while self.locks.any() && !ended() && !self.is_wanted() {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            !ended() && !self.is_wanted()
        };
        for group in self.groups.all() {
            let Ok(store) = group.store() else { continue };
            // First what the index has in memory: the others may wait for hours.
            let folded = if store.wants_folding() { store.fold().map_err(Error::from) } else { Ok(()) };
            let tended = folded
                .and_then(|()| self.hash_layers(&group, &go_on))
                .and_then(|()| self.settle_layers(&group, &go_on))
                .and_then(|()| if compress { self.compress_cold(&group, &go_on) } else { Ok(()) });
            match tended {
                Err(error) if error.code() != Code::Interrupted => {
                    tracing::warn!(group = group.row.name, %error, causes = ?error.causes(), "tending the page store");
                }
                _ => {}
            }
            if !go_on() {
                return false;
            }
        }
        self.list_changes();
        true
    }

    fn compress_cold(&self, group: &OpenGroup, go_on: &dyn Fn() -> bool) -> Result<()> {
        let store = group.store()?;
        let mut plan = store.plan_gc_with(|| {
            Ok::<_, Error>(pages::GcRequest {
                roots: self.live_roots(&group.row.id)?,
                compress: Some(pages::Cold { age: crate::collect::COLD, level: crate::collect::LEVEL }),
                ..pages::GcRequest::default()
            })
        })?;
        // What is dead is for `gc`, which says so in the journal.
        plan.delete.clear();
        plan.rewrite.clear();
        store.run_gc(&plan, &|_, _| go_on())?;
        Ok(())
    }
}

/// A machine's number among those who bring pages.
pub(crate) fn origin(target: &str) -> Origin {
    let mut number = [0; 16];
    number.iter_mut().zip(target.bytes()).for_each(|(to, from)| *to = from);
    Origin(number)
}

/// The layers of a group that nobody writes to any more: users' images, and what a snapshot has. That something lies over a layer is not
/// enough: a take that is taken back takes its overlay away, and the guest goes on writing to what was below.
pub(crate) fn frozen(tx: &Transaction<'_>, group: &str) -> Result<Vec<LayerRow>> {
    let mut layers = LayerRow::of_group(tx, group)?;
    let below: HashMap<String, Option<String>> =
        layers.iter().map(|layer| (layer.id.clone(), layer.below.clone())).collect();
    let mut still: HashSet<String> = HashSet::new();
    for snapshot in SnapshotRow::of_group(tx, group)? {
        for (_, top) in SnapshotRow::disks(tx, &snapshot.id)? {
            let mut at = Some(top);
            while let Some(layer) = at.filter(|layer| !still.contains(layer)) {
                at = below.get(&layer).cloned().flatten();
                still.insert(layer);
            }
        }
    }
    layers.retain(|layer| layer.is_users() || still.contains(&layer.id));
    layers.retain(is_large);
    Ok(layers)
}

/// The same of one layer: whether it is among [`frozen`].
pub(crate) fn is_frozen(tx: &Transaction<'_>, layer: &LayerRow) -> Result<bool> {
    Ok(is_large(layer) && (layer.is_users() || LayerRow::has_snapshot(tx, &layer.id)?))
}

fn is_large(layer: &LayerRow) -> bool {
    layer.size >= PAGE_SIZE as u64
}
