//! Frozen disk layers settle: what a disk shows through a layer and all below it becomes one page map, whose pages are blocks of the
//! layers' files. Nothing is copied. From then on the disk can be read as one flat file of the snapshot file system, however deep the chain
//! is (`docs/decisions/0023-settled-disks.md`).
//!
//! ```text
//!   1  the layer's blocks have names in the page store (`hash_layers.rs`), and what lies below it has settled
//!   2  where it has data of its own, its pages take the place of those below; what does not lie in its file as it is, QEMU reads, and it is
//!      written to a pack: compressed clusters, and images whose data is in other files
//!   3  pages durable, then the catalog: the layer has settled
//! ```
//! Until then its file is the truth; from then on either is. The file goes when nothing lies over it any more, as before: what a map still
//! needs of it is moved to a pack first (`collect.rs`).

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;

use pages::{LEAF_PAGES, MapRoot, PAGE_SIZE, PageHash, PageStore, Purpose, Session};
use qemu::image::{Content, Stretch};
use rusqlite::Transaction;

use crate::catalog::{LayerRow, TargetRow};
use crate::context::Context;
use crate::disks::remove_file;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted, step};
use crate::frozen_file::{FrozenFile, read};
use crate::groups::OpenGroup;
use crate::hash_layers::{frozen, is_frozen, origin};

const PAGE: u64 = PAGE_SIZE as u64;
/// Pages read and named at a time: 1 MiB.
const RUN: u64 = 256;
/// Bytes that QEMU unpacks at a time.
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
            let mut open = self.catalog.read(|tx| LayerRow::down_to_settled(tx, top))?;
            open.retain(|layer| layer.settled.is_none());
            if open.len() <= DEEP {
                continue;
            }
            cx.phase("settling disks", 0);
            open.pop();
            for layer in open {
                let settled = self.settle_layer(&group, &layer.id, &|| cx.check().is_ok());
                cx.check()?;
                match settled {
                    Ok(true) => continue,
                    Ok(false) => tracing::warn!(
                        target = target.name,
                        disk,
                        layer = layer.id,
                        "a layer does not settle"
                    ),
                    Err(error) if error.code() == Code::NoSpace => return Err(error),
                    // The chain is longer than it might be, and that is all.
                    Err(error) => {
                        tracing::warn!(target = target.name, disk, layer = layer.id, %error, causes = ?error.causes(), "a layer does not settle");
                    }
                }
                break;
            }
        }
        Ok(())
    }

    /// Settles one layer. False if it cannot, because what lies below has not, or because it may be written to.
    pub(crate) fn settle_layer(&self, group: &OpenGroup, id: &str, go_on: &dyn Fn() -> bool) -> Result<bool> {
        let store = group.store()?;
        let (chain, is_still, _pins) = self.catalog.read(|tx| {
            let chain = LayerRow::chain(tx, id)?;
            let is_still = chain.last().map_or(Ok(false), |layer| is_frozen(tx, layer))?;
            let pins = self.pins.pin([id.to_owned()]);
            Ok((chain, is_still, pins))
        })?;
        let Some((layer, lower)) = chain.split_last().filter(|_| is_still) else { return Ok(false) };
        if layer.settled.is_some() {
            return Ok(true);
        }
        let pages = layer.size.div_ceil(PAGE);
        let base = match lower.last().map(|below| below.settled) {
            None => MapRoot { node: PageHash::ZERO, pages },
            Some(Some(base)) if base.pages == pages => base,
            Some(_) => return Ok(false),
        };
        if !self.hash_layer(group, layer, go_on)? {
            return Ok(false);
        }
        let images = chain.iter().filter(|layer| layer.is_users()).map(LayerRow::image_label).collect();
        let hold = store.hold();
        let session = store.begin_for(&Purpose { origin: origin(&layer.id), images })?;
        let own =
            Own { store: store.as_ref(), session: session.as_ref(), base: &base, leaves: Leaves::new() };
        let Some(leaves) = self.own_leaves(group, layer, lower.is_empty(), own, go_on)? else {
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
            if !now.last().map_or(Ok(false), |layer| is_frozen(tx, layer))? {
                return Err(Error::new(Code::Failed, "no snapshot has it any more"));
            }
            match now.iter().zip(&chain).all(|(now, then)| now.id == then.id && now.stamp == then.stamp) {
                true => LayerRow::set_settled(tx, id, &root),
                false => Err(Error::new(Code::Failed, "what lies below has changed meanwhile")),
            }
        })?;
        step("settle.written");
        Ok(true)
    }

    /// The leaves in which a layer differs from what lies below, if anything does. None if it was stopped.
    fn own_leaves(
        &self,
        group: &OpenGroup,
        layer: &LayerRow,
        is_lowest: bool,
        mut own: Own<'_>,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Option<Leaves>> {
        let frozen = self.open_frozen(group, layer)?;
        let stretches = match layer.format.as_str() {
            "raw" => vec![Stretch { start: 0, bytes: layer.size, content: Content::At(0) }],
            format => self.img_of(group)?.layout(frozen.path(), format, frozen.file())?,
        };
        let stretches = whole_pages(stretches, layer.size, is_lowest).ok_or_else(|| {
            Error::new(Code::Failed, format!("{} has clusters smaller than a page", frozen.path().display()))
        })?;
        for stretch in stretches {
            let end = stretch.start + stretch.bytes;
            let mut at = stretch.start;
            while at < end {
                if !go_on() {
                    return Ok(None);
                }
                let bytes = match stretch.content {
                    Content::Packed => (end - at).min(UNPACK),
                    _ => (end - at).min(RUN * PAGE),
                };
                match stretch.content {
                    Content::Zero => own.set(at, &vec![0; bytes as usize])?,
                    Content::At(offset) => {
                        own.set(at, &frozen.read(offset + (at - stretch.start), bytes)?)?;
                    }
                    Content::Packed => self.unpack(group, layer, &frozen, at, bytes, &mut own)?,
                }
                at += bytes;
            }
        }
        frozen.check_unchanged()?;
        Ok(Some(own.leaves))
    }

    /// What QEMU reads there, through a file that is gone at once.
    fn unpack(
        &self,
        group: &OpenGroup,
        layer: &LayerRow,
        frozen: &FrozenFile,
        start: u64,
        bytes: u64,
        own: &mut Own<'_>,
    ) -> Result<()> {
        let folder = self.layers_folder(&layer.group);
        self.check_room_for_copy(&folder, "unpacking a disk image", bytes)?;
        let failed = |error| Error::new(Code::Failed, "unpacked clusters cannot be read").because(error);
        let path = folder.join(format!("{}.unpacked", layer.id));
        // One that a crash has left.
        remove_file(&path);
        let unpacked = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let unpacked = unpacked.and_then(|file| file.set_len(bytes).map(|()| file)).map_err(failed)?;
        let done = group.gives(&path).and_then(|()| {
            Ok(self.img_of(group)?.unpack(frozen.path(), &layer.format, start, bytes, &path)?)
        });
        remove_file(&path);
        done?;
        let mut at = 0;
        while at < bytes {
            let part = (bytes - at).min(RUN * PAGE);
            own.set(start + at, &read(&unpacked, at, part).map_err(failed)?)?;
            at += part;
        }
        Ok(())
    }
}

/// The same stretches in whole pages, up to the disk's end. A page of which a stretch has a part is QEMU's to read, which knows what the rest
/// shows; none if there is such a page and the layer is not the lowest: the rest may be what lies below.
fn whole_pages(stretches: Vec<Stretch>, size: u64, is_lowest: bool) -> Option<Vec<Stretch>> {
    let mut whole: Vec<Stretch> = Vec::new();
    let mut add = |start: u64, end: u64, content| {
        match whole.last_mut() {
            // Each one costs a process.
            Some(last)
                if content == Content::Packed
                    && last.content == content
                    && last.start + last.bytes >= start =>
            {
                last.bytes = last.bytes.max(end - last.start);
            }
            _ if start < end => whole.push(Stretch { start, bytes: end - start, content }),
            _ => {}
        }
    };
    for Stretch { start, bytes, content } in stretches {
        let end = start.saturating_add(bytes).min(size);
        let (first, last) = (start / PAGE * PAGE, end.next_multiple_of(PAGE).min(size));
        if start >= end {
            continue;
        }
        match content {
            _ if (start, end) == (first, last) => add(start, end, content),
            _ if !is_lowest => return None,
            // There is nothing else below it.
            Content::Zero => {}
            Content::At(_) | Content::Packed => add(first, last, Content::Packed),
        }
    }
    Some(whole)
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

/// The page maps of a group's settled layers.
pub(crate) fn settled_roots(tx: &Transaction<'_>, group: &str) -> Result<Vec<MapRoot>> {
    let layers = LayerRow::of_group(tx, group)?;
    Ok(layers.into_iter().flat_map(|layer| layer.retired.into_iter().chain(layer.settled)).collect())
}

#[cfg(test)]
mod tests;
