//! Who needs how many bytes: of page packs and of disk layers.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use pages::{MapRoot, Saved, Store};

use crate::address;
use crate::catalog::{LayerRow, SnapshotRow, TargetRow};
use crate::disks::allocated;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::groups::OpenGroup;
use crate::types::{Du, DuRow, GroupSpace};

/// Those who need what `rm` leaves: after so many it is enough to say that there are more.
const NAMES_SHOWN: usize = 8;

/// Something that keeps data alive.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Holder {
    /// A snapshot, by id.
    Snapshot(String),
    /// The present state of a target, by its id.
    Here(String),
}

/// A holder with what it holds.
#[derive(Debug)]
struct Entry {
    holder: Holder,
    target: String,
    /// Snapshot's name; empty for here.
    name: String,
    undo_point: bool,
    /// Removed then (milliseconds since 1970), and held only by the undo log.
    removed: Option<i64>,
    roots: Vec<MapRoot>,
    /// The highest layer of each disk, by its number in [`Ledger::layers`].
    tops: Vec<usize>,
    saved: Saved,
}

/// A disk layer.
#[derive(Debug)]
struct Layer {
    /// Number of the one below.
    below: Option<usize>,
    /// What its file takes, if it is ours.
    bytes: Option<u64>,
    /// The page map of a settled one.
    settled: Option<MapRoot>,
}

/// All holders of a group, and its layers. Nothing of any other group is looked at. Chains are walked and never written out: together
/// those of a thousand snapshots in a row have half a million layers.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// The group's pages; none if they cannot be reached, and then they count nothing.
    store: Option<Arc<Store>>,
    entries: Vec<Entry>,
    layers: Vec<Layer>,
}

impl Ledger {
    /// Reads the catalog and looks at the layers' files.
    pub(crate) fn read(engine: &Engine, group: &OpenGroup) -> Result<Self> {
        let id = &group.row.id;
        let (entries, mut layers, rows) = engine.catalog.read(|tx| {
            let rows = LayerRow::of_group(tx, id)?;
            let numbers: HashMap<&str, usize> = rows.iter().map(|row| row.id.as_str()).zip(0..).collect();
            let layer = |(number, row): (usize, &LayerRow)| {
                let below = row.below.as_deref().and_then(|below| numbers.get(below).copied());
                // They come in order of depth: of a catalog in disorder no chain goes round.
                Layer { below: below.filter(|below| *below < number), bytes: None, settled: row.settled }
            };
            let layers: Vec<Layer> = rows.iter().enumerate().map(layer).collect();
            let tops = |disks: Vec<(String, String)>| -> Vec<usize> {
                disks.iter().filter_map(|(_, top)| numbers.get(top.as_str()).copied()).collect()
            };
            // What lies over one that has settled holds its map; the maps below it share nearly all of its pages.
            let maps = |tops: &[usize]| {
                let top = |top: &usize| chain(&layers, *top).find_map(|number| layers[number].settled);
                tops.iter().filter_map(top).collect::<Vec<_>>()
            };
            let mut entries = Vec::new();
            for row in SnapshotRow::of_group(tx, id)? {
                let tops = tops(SnapshotRow::disks(tx, &row.id)?);
                let memory = row.memory.iter().flat_map(|m| m.roots());
                entries.push(Entry {
                    target: row.target_name.clone(),
                    name: row.name.clone(),
                    undo_point: row.undo_point,
                    removed: row.removed,
                    roots: memory.chain(maps(&tops)).collect(),
                    tops,
                    saved: row.facts.saved,
                    holder: Holder::Snapshot(row.id),
                });
            }
            for row in TargetRow::of_group(tx, id)? {
                let tops = tops(TargetRow::disks(tx, &row.id)?);
                entries.push(Entry {
                    roots: row.roots().chain(maps(&tops)).collect(),
                    tops,
                    holder: Holder::Here(row.id),
                    target: row.name,
                    name: String::new(),
                    undo_point: false,
                    removed: row.removed,
                    saved: Saved::default(),
                });
            }
            Ok((entries, layers, rows))
        })?;
        for (layer, row) in layers.iter_mut().zip(&rows).filter(|(_, row)| row.stamp.is_none()) {
            layer.bytes = Some(allocated(&engine.layer_file(row)));
        }
        Ok(Self { store: group.store().ok().cloned(), entries, layers })
    }

    /// Bytes of pages that nothing would need any more if `dropped` went and `kept` stayed.
    fn freed_by(&self, dropped: &[MapRoot], kept: &[MapRoot]) -> Result<u64> {
        Ok(self.store.as_ref().map_or(Ok(0), |store| store.freed_by(dropped, kept))?)
    }

    /// Bytes of these layers.
    fn bytes<'a>(&self, layers: impl Iterator<Item = &'a usize>) -> u64 {
        layers.filter_map(|number| self.layers.get(*number)?.bytes).sum()
    }

    /// The layers of a holder's disks, by number.
    fn chains(&self, entry: &Entry) -> impl Iterator<Item = usize> {
        entry.tops.iter().flat_map(|top| chain(&self.layers, *top))
    }

    /// The layers that some holders have.
    fn layers_of<'a>(&self, entries: impl IntoIterator<Item = &'a Entry>) -> HashSet<usize> {
        let mut layers = HashSet::new();
        for top in entries.into_iter().flat_map(|entry| &entry.tops) {
            // What lies below one that is known is known.
            chain(&self.layers, *top).take_while(|number| layers.insert(*number)).for_each(drop);
        }
        layers
    }

    /// Bytes of all layers.
    pub(crate) fn layers_total(&self) -> u64 {
        self.layers.iter().filter_map(|layer| layer.bytes).sum()
    }

    /// When things were removed that are still there, in order.
    pub(crate) fn removals(&self) -> Vec<i64> {
        let mut times: Vec<i64> = self.entries.iter().filter_map(|e| e.removed).collect();
        times.sort_unstable();
        times.dedup();
        times
    }

    /// Bytes that only what was removed after this time needs.
    pub(crate) fn pinned_by_undo(&self, after: i64) -> Result<u64> {
        let (pinned, needed): (Vec<&Entry>, Vec<&Entry>) = self
            .entries
            .iter()
            .filter(|e| e.removed.is_none_or(|at| at > after))
            .partition(|e| e.removed.is_some());
        if pinned.is_empty() {
            return Ok(0);
        }
        let (theirs, others) =
            (self.layers_of(pinned.iter().copied()), self.layers_of(needed.iter().copied()));
        let pages = self.freed_by(&roots(&pinned), &roots(&needed))?;
        Ok(pages + self.bytes(theirs.difference(&others)))
    }

    /// Bytes that nothing would need any more if `gone` went; bytes of theirs that stay; and who needs those.
    pub(crate) fn without(&self, gone: &dyn Fn(&Holder) -> bool) -> Result<(u64, u64, Vec<String>)> {
        let (going, staying): (Vec<&Entry>, Vec<&Entry>) =
            self.entries.iter().filter(|e| e.removed.is_none()).partition(|e| gone(&e.holder));
        let (their_roots, other_roots) = (roots(&going), roots(&staying));
        let freed_pages = self.freed_by(&their_roots, &other_roots)?;
        let all_pages = self.freed_by(&their_roots, &[])?;
        let (theirs, others) =
            (self.layers_of(going.iter().copied()), self.layers_of(staying.iter().copied()));
        let freed = freed_pages + self.bytes(theirs.difference(&others));
        let kept = all_pages - freed_pages.min(all_pages) + self.bytes(theirs.intersection(&others));
        let kept_by = if kept == 0 { Vec::new() } else { self.needing(&theirs, &their_roots, &staying)? };
        Ok((freed, kept, kept_by))
    }

    /// Names of those who need a layer of `layers` or a page of `roots`.
    fn needing(&self, layers: &HashSet<usize>, roots: &[MapRoot], staying: &[&Entry]) -> Result<Vec<String>> {
        let all = self.freed_by(roots, &[])?;
        let mut names = Vec::new();
        for entry in staying {
            let is_ours =
                |number: &usize| self.layers.get(*number).is_some_and(|layer| layer.bytes.is_some());
            let disk = self.chains(entry).any(|number| layers.contains(&number) && is_ours(&number));
            if disk || (!roots.is_empty() && self.freed_by(roots, &entry.roots)? < all) {
                names.push(match entry.name.as_str() {
                    "" => format!("{} (here)", entry.target),
                    name => format!("{}@{name}", entry.target),
                });
            }
            if names.len() > NAMES_SHOWN {
                names.truncate(NAMES_SHOWN);
                names.push("others".into());
                break;
            }
        }
        Ok(names)
    }
}

impl Engine {
    /// Space by snapshot, of one target or of all; of its own group alone, or of all. `without` asks what dropping these snapshots
    /// would free.
    pub fn du(&self, target: Option<&str>, without: &[String]) -> Result<Du> {
        let groups = match target {
            Some(name) => {
                self.machine(name)?;
                let row = self.catalog.read(|tx| TargetRow::by_name(tx, name))?;
                let group = self.group_of(&row)?;
                group.store()?;
                vec![group]
            }
            None => self.groups.all(),
        };
        let mut dropped = HashSet::new();
        for address in without {
            let address = match (address.contains('@'), target) {
                (false, Some(target)) => format!("{target}@{address}"),
                _ => address.clone(),
            };
            let (row, snapshot) = self.catalog.read(|tx| address::resolve(tx, &address))?;
            if !groups.iter().any(|group| group.row.id == row.group) {
                return Err(Error::new(
                    Code::Usage,
                    format!(
                        "{address} belongs to the group {}, and shares nothing with this one",
                        row.group_name
                    ),
                )
                .hint("ask for it by itself, or without a machine: `spinney du --without ...`"));
            }
            dropped.insert(Holder::Snapshot(snapshot.id));
        }
        let mut du = Du { without: (!dropped.is_empty()).then_some(0), ..Du::default() };
        for group in groups {
            self.add_space(&mut du, &group, target, &dropped)?;
        }
        Ok(du)
    }

    /// Adds what one group takes.
    fn add_space(
        &self,
        du: &mut Du,
        group: &OpenGroup,
        target: Option<&str>,
        dropped: &HashSet<Holder>,
    ) -> Result<()> {
        let ledger = Ledger::read(self, group)?;
        let live: Vec<&Entry> = ledger.entries.iter().filter(|e| e.removed.is_none()).collect();
        let shown = |e: &&&Entry| target.is_none_or(|name| e.target == name);

        let pages = ledger.page_usage(&live)?;
        let mut users = vec![0_u32; ledger.layers.len()];
        live.iter().flat_map(|e| ledger.chains(e)).for_each(|layer| users[layer] += 1);
        let mut saved = Saved::default();
        for (entry, (exclusive, shared)) in live.iter().zip(pages).filter(|(e, _)| shown(e)) {
            let (own, others): (Vec<usize>, Vec<usize>) =
                ledger.chains(entry).partition(|layer| users[*layer] == 1);
            du.rows.push(DuRow {
                group: group.row.name.clone(),
                target: entry.target.clone(),
                name: entry.name.clone(),
                undo_point: entry.undo_point,
                exclusive: exclusive + ledger.bytes(own.iter()),
                shared: shared + ledger.bytes(others.iter()),
            });
            add(&mut saved, &entry.saved);
        }
        let pinned = ledger.layers_of(&ledger.entries);
        let maps = pinned.iter().filter_map(|number| ledger.layers[*number].settled);
        let memories = ledger.entries.iter().flat_map(|e| e.roots.iter().copied());
        let all_roots: Vec<MapRoot> = memories.chain(maps).collect();
        let unneeded: Vec<usize> =
            (0..ledger.layers.len()).filter(|number| !pinned.contains(number)).collect();
        let (dead, allocated) = match &ledger.store {
            Some(store) => (
                store.estimate_gc(&pages::GcRequest { roots: all_roots, ..Default::default() })?.freed_bytes,
                store.allocated()?,
            ),
            None => (0, pages::Allocated::default()),
        };
        if let Some(without) = &mut du.without {
            *without += ledger.without(&|holder| dropped.contains(holder))?.0;
        }
        let (frozen_bytes, known_bytes) = self.hashed_layers(group)?;
        let space = GroupSpace {
            group: group.row.name.clone(),
            store_bytes: allocated.total(),
            set_aside_bytes: allocated.set_aside,
            disk_bytes: ledger.layers_total(),
            reclaimable: ledger.bytes(unneeded.iter()) + dead,
            pinned_by_undo: ledger.pinned_by_undo(i64::MIN)?,
            saved,
            frozen_bytes,
            known_bytes,
            problem: group.problem().map(str::to_owned),
        };
        du.store_bytes += space.store_bytes;
        du.disk_bytes += space.disk_bytes;
        du.reclaimable += space.reclaimable;
        du.pinned_by_undo += space.pinned_by_undo;
        add(&mut du.saved, &space.saved);
        du.groups.push(space);
        Ok(())
    }
}

impl Ledger {
    /// Exclusive and shared bytes of pages of each entry.
    fn page_usage(&self, entries: &[&Entry]) -> Result<Vec<(u64, u64)>> {
        let Some(store) = &self.store else { return Ok(vec![(0, 0); entries.len()]) };
        let roots: Vec<MapRoot> = entries.iter().flat_map(|e| e.roots.iter().copied()).collect();
        let mut usage = store.usage(&roots)?.into_iter();
        let of_entry = |entry: &&Entry| {
            usage
                .by_ref()
                .take(entry.roots.len())
                .fold((0, 0), |(own, shared), u| (own + u.exclusive, shared + u.shared))
        };
        Ok(entries.iter().map(of_entry).collect())
    }
}

fn roots(entries: &[&Entry]) -> Vec<MapRoot> {
    entries.iter().flat_map(|e| e.roots.iter().copied()).collect()
}

/// A layer and those below it, by number, highest first.
fn chain(layers: &[Layer], top: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(top), |number| layers.get(*number)?.below)
}

fn add(to: &mut Saved, more: &Saved) {
    to.zero += more.zero;
    to.same += more.same;
    to.earlier += more.earlier;
    to.other += more.other;
    to.disk += more.disk;
    to.new += more.new;
    to.bytes_written += more.bytes_written;
}
