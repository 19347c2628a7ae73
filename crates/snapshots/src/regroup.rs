//! `edit TARGET --group G`: all that is stored of a machine is copied into another group, which it belongs to from then on.
//!
//! ```text
//!   1  lock the target, which has no process; look at what it has: snapshots (those that undo keeps too), memory, layers
//!   2  pages: read from the one store, checked, put into the other under that group's names; maps made anew; durable
//!   3  layers: copied under new names, each over its new lower one; files, then the folder, durable
//!   4  catalog, one transaction: layers, snapshots, disks, memory and the target are the other group's; journal: "done"
//! ```
//! Until 4 nothing but files and pages has come to be that nobody speaks of: whatever fails or dies leaves the machine as it was, and
//! the next start, or `gc`, clears them away. After 4 what the old group stored of it is garbage there.
//!
//! Nothing is ever re-labelled: the other group's key names every page anew, and no file is in two groups.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use pages::{LEAF_PAGES, MapRoot, PAGE_SIZE, PageHash, PageStore, Session, Store};
use rusqlite::Transaction;
use serde_json::json;

use crate::catalog::{Act, GroupRow, LayerRow, Memory, OpRow, SnapshotRow, TargetRow, no_group};
use crate::context::Context;
use crate::copy_file::copy_file;
use crate::disks::{allocated, remove_file};
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::step;
use crate::groups::{OpenGroup, sync_folder};
use crate::id::new_id;
use crate::memory::memory_bytes;
use crate::types::{Edited, Power};

/// On whose behalf, for the journal.
pub(crate) struct Purpose<'a> {
    pub(crate) kind: &'a str,
    pub(crate) subject: String,
    /// The operation that it takes back.
    pub(crate) undoes: Option<&'a OpRow>,
}

/// All that is stored of a target.
struct Belongings {
    snapshots: Vec<(SnapshotRow, Vec<(String, String)>)>,
    here: Vec<(String, String)>,
    /// Layers under any of them, lower ones first.
    layers: Vec<LayerRow>,
}

impl Belongings {
    fn read(tx: &Transaction<'_>, target: &TargetRow) -> Result<Self> {
        let mut snapshots = Vec::new();
        for snapshot in SnapshotRow::of_target(tx, &target.id)? {
            let disks = SnapshotRow::disks(tx, &snapshot.id)?;
            snapshots.push((snapshot, disks));
        }
        let here = TargetRow::disks(tx, &target.id)?;
        let (mut known, mut layers) = (HashSet::new(), Vec::new());
        for (_, top) in snapshots.iter().flat_map(|(_, disks)| disks).chain(&here) {
            if known.contains(top) {
                continue;
            }
            let chain = LayerRow::chain(tx, top)?;
            layers.extend(chain.into_iter().filter(|layer| known.insert(layer.id.clone())));
        }
        layers.sort_by_key(|layer| layer.depth);
        Ok(Self { snapshots, here, layers })
    }
}

/// Where everything is that was copied, by where it was.
#[derive(Default)]
struct Copies {
    roots: HashMap<MapRoot, MapRoot>,
    layers: Vec<(String, LayerRow)>,
}

impl Copies {
    fn memory(&self, memory: &Memory) -> Result<Memory> {
        let lost = || Error::new(Code::Failed, "a page map was not copied");
        let at = |root: &MapRoot| self.roots.get(root).copied().ok_or_else(lost);
        let mut blocks = Vec::new();
        for (name, root) in &memory.blocks {
            blocks.push((name.clone(), at(root)?));
        }
        let screen = memory.screen.map(|(root, bytes)| Ok::<_, Error>((at(&root)?, bytes))).transpose()?;
        Ok(Memory { blocks, state: at(&memory.state)?, state_bytes: memory.state_bytes, screen })
    }

    fn layer(&self, id: &str) -> Result<&LayerRow> {
        let found = self.layers.iter().find(|(old, _)| old == id);
        found.map(|(_, new)| new).ok_or_else(|| Error::new(Code::Failed, "a disk layer was not copied"))
    }

    fn disks(&self, disks: &[(String, String)]) -> Result<Vec<(String, String)>> {
        disks.iter().map(|(disk, layer)| Ok((disk.clone(), self.layer(layer)?.id.clone()))).collect()
    }
}

impl Engine {
    /// Copies a machine that has no process, with all its snapshots, into another group. Undoing it copies it back.
    pub(crate) fn edit_group(&self, cx: &Context, target: &str, group: &str) -> Result<Edited> {
        let (row, _guard) = self.lock_target(cx, target, "edit")?;
        let group = self.groups.by_name(group)?;
        let purpose = Purpose { kind: "edit", subject: row.name.clone(), undoes: None };
        self.regroup(cx, &purpose, &row, &group)?;
        Ok(Edited { address: row.name, changed: true })
    }

    /// All steps, for a target that is locked.
    pub(crate) fn regroup(
        &self,
        cx: &Context,
        purpose: &Purpose<'_>,
        row: &TargetRow,
        to: &OpenGroup,
    ) -> Result<()> {
        let name = &row.name;
        if row.group == to.row.id {
            return Err(Error::new(
                Code::Refused,
                format!("{name} belongs to the group {} already", to.row.name),
            ));
        }
        if !matches!(self.look(row)?.0, Power::Off | Power::LostPower | Power::Suspended) {
            return Err(Error::new(
                Code::Refused,
                format!("{name} has a process: it cannot change its group"),
            )
            .hint(format!("`spinney suspend {name}` keeps its memory, `spinney stop {name}` turns it off")));
        }
        let (old, new) = (self.store_of(row)?, to.store()?);
        let has = self.catalog.read(|tx| Belongings::read(tx, row))?;
        self.check_readable_by_owner(to, &row.config)?;
        self.check_room_for_all(row, &has, &old)?;
        self.journaled(cx, purpose.kind, &purpose.subject, Some(&row.id), &json!({}), || {
            let hold = new.hold();
            let images = self.name_images(cx, to, &has.layers);
            let origin = crate::hash_layers::origin(&row.id);
            let purpose_of_pages = pages::Purpose { origin, images };
            let mut copies = Copies {
                roots: copy_memories(cx, row, &has, &old, new, &purpose_of_pages)?,
                layers: Vec::new(),
            };
            let copied = self.copy_layers(cx, to, &has.layers, &mut copies.layers).and_then(|()| {
                cx.check()?;
                self.catalog.write(|tx| {
                    hold.check()?;
                    // It may have been removed meanwhile.
                    GroupRow::by_id(tx, &to.row.id).map_err(|_| no_group(&to.row.name))?;
                    point_at_copies(tx, row, &has, &copies, &to.row.id)?;
                    let back = Act::Regroup { target: row.id.clone(), group: row.group.clone() };
                    match purpose.undoes {
                        Some(undone) => undone.taken_back(tx, &cx.id, Some(back)),
                        None => OpRow::finish(tx, &cx.id, Some(back)),
                    }
                })
            });
            if copied.is_err() {
                for (_, layer) in copies.layers.iter().filter(|(_, layer)| !layer.is_users()) {
                    remove_file(&self.layer_file(layer));
                }
            }
            copied
        })?;
        step("regroup.written");
        Ok(())
    }

    /// Has the other group's store know the users' images under these layers, so that memory which is on them stays there. Returns what it
    /// calls them. One that cannot be had costs the space of its pages and nothing else.
    fn name_images(&self, cx: &Context, to: &OpenGroup, layers: &[LayerRow]) -> Vec<String> {
        cx.phase("looking through disk images", 0);
        let users = || layers.iter().filter(|layer| layer.is_users());
        for layer in users() {
            if let Err(error) = self.hash_layer(to, layer, &|| cx.check().is_ok()) {
                tracing::debug!(image = layer.file, %error, "an image is not hashed");
            }
        }
        users().map(LayerRow::image_label).collect()
    }

    /// Whoever has to copy all of it needs as much room again: what the other group has already nobody knows before its pages are named.
    fn check_room_for_all(&self, row: &TargetRow, has: &Belongings, old: &Store) -> Result<()> {
        self.check_room_for_pages(has.layers.len())?;
        let ours = has.layers.iter().filter(|layer| !layer.is_users());
        let layers: u64 = ours.map(|layer| allocated(&self.layer_file(layer))).sum();
        let roots: Vec<MapRoot> = has.memories(row).flat_map(|(_, memory)| memory.roots()).collect();
        let need = layers + old.freed_by(&roots, &[])?;
        self.check_room_for_copy(self.state(), &format!("copying {}", row.name), need)
    }

    /// Step 3. On an error, those that were made are in `copies`.
    fn copy_layers(
        &self,
        cx: &Context,
        to: &OpenGroup,
        layers: &[LayerRow],
        copies: &mut Vec<(String, LayerRow)>,
    ) -> Result<()> {
        let ours = layers.iter().filter(|layer| !layer.is_users());
        let bytes = ours.map(|layer| std::fs::metadata(self.layer_file(layer)).map_or(0, |meta| meta.len()));
        cx.phase("copying disk layers", bytes.sum());
        for layer in layers {
            let below = match &layer.below {
                None => None,
                Some(below) => {
                    let found = copies.iter().find(|(old, _)| old == below).map(|(_, new)| new.clone());
                    Some(found.ok_or_else(|| Error::new(Code::Damaged, "a disk layer lacks the one below"))?)
                }
            };
            let id = new_id();
            let new = LayerRow {
                file: if layer.is_users() { layer.file.clone() } else { format!("{id}.qcow2") },
                below: below.as_ref().map(|below| below.id.clone()),
                group: to.row.id.clone(),
                id,
                // Its map is of the other group.
                settled: None,
                retired: Vec::new(),
                ..layer.clone()
            };
            if !layer.is_users() {
                let (from, file) = (self.layer_file(layer), self.layer_file(&new));
                copies.push((layer.id.clone(), new));
                self.copy_layer(cx, to, &from, &file, below.as_ref())?;
                step("regroup.layer");
            } else {
                copies.push((layer.id.clone(), new));
            }
        }
        sync_folder(&to.layers_folder())?;
        step("regroup.copied");
        Ok(())
    }

    fn copy_layer(
        &self,
        cx: &Context,
        to: &OpenGroup,
        from: &Path,
        file: &Path,
        below: Option<&LayerRow>,
    ) -> Result<()> {
        let failed = |error: Stopped| match error {
            Stopped::ByCaller(error) => error,
            Stopped::Io(error) => {
                Error::new(Code::Failed, format!("the disk layer {} cannot be copied", from.display()))
                    .because(error)
            }
        };
        copy_file(from, file, &mut |bytes| {
            cx.advance(bytes);
            cx.check().map_err(Stopped::ByCaller)
        })
        .map_err(failed)?;
        if let Some(below) = below.filter(|below| !below.is_users()) {
            self.img()?.rename_backing(file, Path::new(&below.file), &below.format)?;
        }
        to.gives(file)
    }
}

/// Why copying a file ended.
enum Stopped {
    Io(std::io::Error),
    ByCaller(Error),
}

impl From<std::io::Error> for Stopped {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

impl Belongings {
    /// Every memory, with the name of whom it belongs to.
    fn memories<'a>(&'a self, target: &'a TargetRow) -> impl Iterator<Item = (String, &'a Memory)> {
        let of_snapshots =
            self.snapshots.iter().filter_map(|(row, _)| Some((row.full_name(), row.memory.as_ref()?)));
        let here = target.suspended.iter().map(|kept| (target.name.clone(), &kept.memory));
        of_snapshots.chain(here)
    }
}

/// Step 2.
fn copy_memories(
    cx: &Context,
    row: &TargetRow,
    has: &Belongings,
    from: &Store,
    to: &Store,
    purpose: &pages::Purpose,
) -> Result<HashMap<MapRoot, MapRoot>> {
    let mut roots = HashMap::new();
    if has.memories(row).next().is_none() {
        return Ok(roots);
    }
    cx.phase("copying memory", has.memories(row).map(|(_, memory)| memory_bytes(memory.roots())).sum());
    let session = to.begin_for(purpose)?;
    let mut copier = Copier { cx, from, session: session.as_ref(), leaves: HashMap::new() };
    for (name, memory) in has.memories(row) {
        for root in memory.roots() {
            if roots.contains_key(&root) {
                cx.advance(root.pages * PAGE_SIZE as u64);
                continue;
            }
            let copied = copier.map(&root).map_err(|error| match error.code() {
                Code::Damaged => Error::new(Code::Damaged, format!("{name} cannot be copied: its memory is damaged"))
                    .because(error)
                    .hint(format!("`spinney fsck --repair` mends what can be mended; `spinney rm {name}` and `spinney gc --now` give it up")),
                _ => error,
            })?;
            roots.insert(root, copied);
            step("regroup.memory");
        }
    }
    session.commit()?;
    step("regroup.stored");
    Ok(roots)
}

/// Copies page maps from one store into a session of another. A leaf is read once, however many maps it is in.
struct Copier<'a> {
    cx: &'a Context,
    from: &'a Store,
    session: &'a dyn Session,
    /// Leaves by the names of their pages in the one store: their names in the other.
    leaves: HashMap<Box<[PageHash]>, PageHash>,
}

impl Copier<'_> {
    fn map(&mut self, root: &MapRoot) -> Result<MapRoot> {
        let mut leaves = Vec::new();
        let mut page = 0;
        let mut names = [PageHash::ZERO; LEAF_PAGES];
        while page < root.pages {
            let count = usize::try_from(root.pages - page).unwrap_or(LEAF_PAGES).min(LEAF_PAGES);
            let names = names.get_mut(..count).unwrap_or_default();
            self.from.map_range(root, page, names)?;
            leaves.push(self.leaf(names)?);
            page += count as u64;
            self.cx.check()?;
            self.cx.advance((count * PAGE_SIZE) as u64);
        }
        Ok(self.session.put_map_over(&leaves, root.pages)?)
    }

    fn leaf(&mut self, names: &[PageHash]) -> Result<PageHash> {
        if names.iter().all(|name| *name == PageHash::ZERO) {
            return Ok(PageHash::ZERO);
        }
        if let Some(known) = self.leaves.get(names) {
            return Ok(*known);
        }
        let mut copied = Vec::with_capacity(names.len());
        for run in names.chunk_by(|a, b| (*a == PageHash::ZERO) == (*b == PageHash::ZERO)) {
            let mut own = vec![PageHash::ZERO; run.len()];
            if run.first() != Some(&PageHash::ZERO) {
                let mut bytes = vec![0; run.len() * PAGE_SIZE];
                // Each page is compared with its name on the way.
                self.from.read(run, &mut bytes)?;
                self.session.put(&bytes, &mut own)?;
            }
            copied.append(&mut own);
        }
        let mut leaf = PageHash::ZERO;
        self.session.put_leaves(&copied, std::slice::from_mut(&mut leaf))?;
        self.leaves.insert(names.into(), leaf);
        Ok(leaf)
    }
}

/// Step 4.
fn point_at_copies(
    tx: &Transaction<'_>,
    row: &TargetRow,
    has: &Belongings,
    copies: &Copies,
    group: &str,
) -> Result<()> {
    for (_, layer) in &copies.layers {
        layer.insert(tx)?;
    }
    for (snapshot, disks) in &has.snapshots {
        let memory = snapshot.memory.as_ref().map(|memory| copies.memory(memory)).transpose()?;
        SnapshotRow::set_places(tx, &snapshot.id, memory.as_ref(), &copies.disks(disks)?)?;
    }
    for (disk, layer) in copies.disks(&has.here)? {
        TargetRow::set_disk(tx, &row.id, &disk, &layer)?;
    }
    if let Some(kept) = &row.suspended {
        TargetRow::set_suspended(tx, &row.id, &copies.memory(&kept.memory)?)?;
    }
    TargetRow::set_group(tx, &row.id, group)
}
