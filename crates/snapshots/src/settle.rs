//! Frozen disk layers settle: what a disk shows through a layer and all below it becomes one page map, whose pages are blocks of the
//! layers' files. Nothing is copied. From then on the disk can be read as one flat file of the snapshot file system, however deep the chain
//! is (`docs/decisions/0023-settled-disks.md`).
//!
//! ```text
//!   1  the layer's blocks have names in the page store (`hash_layers.rs`), and what lies below it has settled
//!   2  where it has data of its own, its pages take the place of those below; compressed clusters are written to a pack
//!   3  pages durable, then the catalog: the layer has settled
//! ```
//! Until then its file is the truth; from then on either is. The file goes when nothing lies over it any more, as before: what a map still
//! needs of it is moved to a pack first (`collect.rs`).

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use pages::{LEAF_PAGES, MapRoot, PAGE_SIZE, PageHash, PageStore, Purpose, Session};
use qemu::image::{Content, Stretch};
use rusqlite::Transaction;

use crate::catalog::{LayerRow, TargetRow};
use crate::context::Context;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted, step};
use crate::groups::OpenGroup;
use crate::hash_layers::{frozen, origin};

const PAGE: u64 = PAGE_SIZE as u64;
/// Pages read and named at a time: 1 MiB.
const RUN: u64 = 256;
/// Bytes of compressed clusters that are unpacked at a time.
const UNPACK: u64 = 64 << 20;

/// The leaves of a map that have changed: the names of their pages, by number.
type Leaves = BTreeMap<u64, Box<[PageHash; LEAF_PAGES]>>;

impl Engine {
    /// Settles the frozen layers of a group that can be, lower ones first. `go_on` may wait, and stops it by returning false.
    pub(crate) fn settle_layers(&self, group: &OpenGroup, go_on: &dyn Fn() -> bool) -> Result<()> {
        let open = self.catalog.read(|tx| {
            let mut layers = frozen(tx, &group.row.id)?;
            layers.retain(|layer| layer.settled.is_none());
            Ok(layers)
        })?;
        for layer in open {
            if !go_on() {
                break;
            }
            match self.settle_layer(group, &layer.id, go_on) {
                Err(error) if error.code() == Code::NoSpace => return Err(error),
                Err(error) => tracing::debug!(layer = layer.id, %error, "a layer does not settle"),
                Ok(_) => {}
            }
        }
        Ok(())
    }

    /// Sees to it that these disks can be read from few files: what lies deep below them settles now, for whoever cannot wait for the
    /// background. The top layers may still be written to, and stay.
    pub(crate) fn settle_below(
        &self,
        cx: &Context,
        target: &TargetRow,
        disks: &[(String, String)],
    ) -> Result<()> {
        if self.can_view().is_err() {
            return Ok(());
        }
        let group = self.group_of(target)?;
        for (disk, top) in disks {
            let chain = self.catalog.read(|tx| LayerRow::chain(tx, top))?;
            let open = chain.iter().rev().take_while(|layer| layer.settled.is_none()).count();
            if open <= DEEP {
                continue;
            }
            cx.phase("settling disks", 0);
            let (_, below) = chain.split_last().unwrap_or((&chain[0], &[]));
            for layer in below.iter().filter(|layer| layer.settled.is_none()) {
                if !self.settle_layer(&group, &layer.id, &|| cx.check().is_ok())? {
                    tracing::warn!(target = target.name, disk, layer = layer.id, "a layer does not settle");
                    break;
                }
                cx.check()?;
            }
        }
        Ok(())
    }

    /// Settles one layer. False if it cannot, because what lies below has not.
    pub(crate) fn settle_layer(&self, group: &OpenGroup, id: &str, go_on: &dyn Fn() -> bool) -> Result<bool> {
        let store = group.store()?;
        let chain = self.catalog.read(|tx| LayerRow::chain(tx, id))?;
        let Some((layer, lower)) = chain.split_last() else { return Ok(false) };
        if layer.settled.is_some() {
            return Ok(true);
        }
        let pages = layer.size.div_ceil(PAGE);
        let base = match lower.last().map(|below| below.settled) {
            None => MapRoot { node: PageHash::ZERO, pages },
            Some(Some(base)) if base.pages == pages => base,
            Some(_) => return Ok(false),
        };
        let _pins = self.pins.pin(chain.iter().map(|layer| layer.id.clone()));
        if !self.hash_layer(store, layer, go_on)? {
            return Ok(false);
        }
        let images = chain.iter().filter(|layer| layer.is_users()).map(LayerRow::image_label).collect();
        let hold = store.hold();
        let session = store.begin_for(&Purpose { origin: origin(&layer.id), images })?;
        let Some(leaves) = self.own_leaves(store.as_ref(), session.as_ref(), layer, &base, go_on)? else {
            return Ok(false);
        };
        let mut named = Vec::with_capacity(leaves.len());
        for (number, names) in leaves {
            let count = (pages - number * LEAF_PAGES as u64).min(LEAF_PAGES as u64) as usize;
            let mut leaf = PageHash::ZERO;
            session.put_leaves(&names[..count], std::slice::from_mut(&mut leaf))?;
            named.push((number, leaf));
        }
        let root = session.put_map_changed(&base, &named)?;
        session.commit()?;
        step("settle.stored");
        self.catalog.write(|tx| {
            hold.check()?;
            // It may be gone by now, or be another base.
            let now = LayerRow::chain(tx, id)?;
            match now.iter().zip(&chain).all(|(now, then)| now.id == then.id && now.stamp == then.stamp) {
                true => LayerRow::set_settled(tx, id, &root),
                false => Err(Error::new(Code::Failed, "what lies below has changed meanwhile")),
            }
        })?;
        step("settle.written");
        Ok(true)
    }

    /// The leaves in which a layer differs from what lies below. None if it was stopped.
    fn own_leaves(
        &self,
        store: &dyn PageStore,
        session: &dyn Session,
        layer: &LayerRow,
        base: &MapRoot,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Option<Leaves>> {
        let path = self.layer_file(layer);
        let failed = |error: std::io::Error| {
            Error::new(Code::Failed, format!("the layer {} cannot be read", path.display())).because(error)
        };
        let file = File::open(&path).map_err(failed)?;
        let stretches = match layer.format.as_str() {
            "raw" => vec![Stretch { start: 0, bytes: layer.size, content: Content::At(0) }],
            format => self.img()?.layout(&path, format)?,
        };
        let mut own = Own { store, session, base, leaves: Leaves::new() };
        for stretch in stretches {
            let end = (stretch.start + stretch.bytes).min(layer.size);
            if !stretch.start.is_multiple_of(PAGE) {
                return Err(Error::new(
                    Code::Failed,
                    format!("{} has clusters smaller than a page", path.display()),
                ));
            }
            let mut at = stretch.start;
            while at < end {
                if !go_on() {
                    return Ok(None);
                }
                let bytes = (end - at).min(RUN * PAGE);
                match stretch.content {
                    Content::Zero => own.set(at, &vec![0; bytes as usize])?,
                    Content::At(offset) => {
                        let from = offset + (at - stretch.start);
                        own.set(at, &read(&file, from, bytes).map_err(failed)?)?;
                    }
                    Content::Packed => {
                        let bytes = (end - at).min(UNPACK);
                        self.unpack(layer, &path, at, bytes, &mut own)?;
                        at += bytes;
                        continue;
                    }
                }
                at += bytes;
            }
        }
        Ok(Some(own.leaves))
    }

    /// Compressed clusters, through a file that is gone at once.
    fn unpack(&self, layer: &LayerRow, path: &Path, start: u64, bytes: u64, own: &mut Own<'_>) -> Result<()> {
        let folder = self.layers_folder(&layer.group);
        self.check_room_for_copy(&folder, "unpacking compressed clusters", bytes)?;
        let unpacked = self.img()?.unpack(
            path,
            &layer.format,
            start,
            bytes,
            &folder.join(format!("{}.unpacked", layer.id)),
        )?;
        let failed = |error| Error::new(Code::Failed, "unpacked clusters cannot be read").because(error);
        let mut at = 0;
        while at < bytes {
            let part = (bytes - at).min(RUN * PAGE);
            own.set(start + at, &read(&unpacked, at, part).map_err(failed)?)?;
            at += part;
        }
        Ok(())
    }
}

/// Layers that may lie above a settled one before it is worth a wait to settle more.
const DEEP: usize = 16;

/// What a layer has of its own.
struct Own<'a> {
    store: &'a dyn PageStore,
    session: &'a dyn Session,
    base: &'a MapRoot,
    leaves: Leaves,
}

impl Own<'_> {
    /// Its pages from byte `start` on are these bytes.
    fn set(&mut self, start: u64, bytes: &[u8]) -> Result<()> {
        let mut padded = Vec::new();
        let bytes = match bytes.len().is_multiple_of(PAGE_SIZE) {
            true => bytes,
            false => {
                padded.extend_from_slice(bytes);
                padded.resize(bytes.len().next_multiple_of(PAGE_SIZE), 0);
                &padded
            }
        };
        let mut names = vec![PageHash::ZERO; bytes.len() / PAGE_SIZE];
        self.session.put(bytes, &mut names)?;
        if planted(Fault::UnsettledZero) {
            names.fill(PageHash::ZERO);
        }
        for (page, name) in (start / PAGE..).zip(names) {
            let (leaf, place) = (page / LEAF_PAGES as u64, (page % LEAF_PAGES as u64) as usize);
            let names = match self.leaves.entry(leaf) {
                std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
                std::collections::btree_map::Entry::Vacant(new) => {
                    let mut below = Box::new([PageHash::ZERO; LEAF_PAGES]);
                    let first = leaf * LEAF_PAGES as u64;
                    let count = (self.base.pages - first).min(LEAF_PAGES as u64) as usize;
                    self.store.map_range(self.base, first, &mut below[..count])?;
                    new.insert(below)
                }
            };
            names[place] = name;
        }
        Ok(())
    }
}

/// Bytes of a file; behind its end are zeros.
fn read(file: &File, offset: u64, bytes: u64) -> std::io::Result<Vec<u8>> {
    let mut buffer = vec![0; bytes as usize];
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(buffer)
}

/// The page maps of a group's settled layers.
pub(crate) fn settled_roots(tx: &Transaction<'_>, group: &str) -> Result<Vec<MapRoot>> {
    let layers = LayerRow::of_group(tx, group)?;
    Ok(layers.into_iter().flat_map(|layer| layer.retired.into_iter().chain(layer.settled)).collect())
}
