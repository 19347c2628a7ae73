//! The fingerprint index: from a name to its place, in sixteen shards by the first bits of the name.
//!
//! It is asked in batches and answers by value, so a shard's owner may one day be elsewhere. It is rebuilt from the packs'
//! footers at open and lies only in memory: losing it costs nothing but time. A name takes 40 bytes in a vector and 6 to 11 in a
//! hash table of positions: under 52 bytes a page, or 13 MB for each GiB of different pages.

use std::sync::RwLock;

use hashbrown::HashTable;

use crate::PageHash;
use crate::segments::Segments;
use crate::sync::{read, write};

/// Where a page or node lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Place {
    /// Number of the pack in this process (see [`crate::pack::Packs`]).
    pub(crate) pack: u32,
    /// Offset in the pack in units of eight bytes.
    pub(crate) at: u32,
}

impl Place {
    /// Offset in the pack in bytes.
    pub(crate) fn offset(self) -> u64 {
        u64::from(self.at) * 8
    }
}

/// Names and their places, unsharded: one shard of the index, or one session's own pages.
#[derive(Default)]
pub(crate) struct Table {
    positions: HashTable<u32>,
    entries: Segments<(PageHash, Place)>,
}

/// Names are hashes already. The first eight bytes choose the shard; the second eight serve the table.
fn hash(name: &PageHash) -> u64 {
    let (_, tail) = name.0.split_at(8);
    tail.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

impl Table {
    pub(crate) fn get(&self, name: &PageHash) -> Option<Place> {
        let at = self.positions.find(hash(name), |&i| self.is_at(i, name))?;
        self.entries.get(*at as usize).map(|(_, place)| *place)
    }

    /// Sets the place of a name, new or known.
    pub(crate) fn set(&mut self, name: PageHash, place: Place) {
        let known = self.positions.find(hash(&name), |&i| self.is_at(i, &name)).copied();
        if let Some(entry) = known.and_then(|i| self.entries.get_mut(i as usize)) {
            entry.1 = place;
            return;
        }
        let Ok(at) = u32::try_from(self.entries.len()) else {
            return; // 4 billion names in a shard: those beyond are stored again, never lost
        };
        self.entries.push((name, place));
        let entries = &self.entries;
        self.positions
            .insert_unique(hash(&name), at, |&i| entries.get(i as usize).map_or(0, |(name, _)| hash(name)));
    }

    /// Forgets a name if it lies in `pack`.
    pub(crate) fn remove(&mut self, name: &PageHash, pack: u32) {
        if self.get(name).is_none_or(|place| place.pack != pack) {
            return;
        }
        let entries = &self.entries;
        let is_it = |&i: &u32| entries.get(i as usize).is_some_and(|(n, _)| n == name);
        let Ok(entry) = self.positions.find_entry(hash(name), is_it) else { return };
        let (at, _) = entry.remove();
        self.entries.swap_remove(at as usize);
        // The last entry moved into the gap.
        let old = self.entries.len() as u32;
        if let Some((moved, _)) = self.entries.get(at as usize)
            && let Some(position) = self.positions.find_mut(hash(moved), |&i| i == old)
        {
            *position = at;
        }
    }

    /// Forgets every name whose place fails the test.
    fn retain(&mut self, keep: &dyn Fn(Place) -> bool) {
        let gone: Vec<_> = self.entries.iter().filter(|(_, place)| !keep(*place)).copied().collect();
        gone.iter().for_each(|(name, place)| self.remove(name, place.pack));
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &(PageHash, Place)> {
        self.entries.iter()
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    fn is_at(&self, i: u32, name: &PageHash) -> bool {
        self.entries.get(i as usize).is_some_and(|(n, _)| n == name)
    }
}

const SHARDS: usize = 16;

/// All names of one kind that a store holds.
#[derive(Default)]
pub(crate) struct Index {
    shards: [RwLock<Table>; SHARDS],
}

/// The shard that owns a name.
fn shard(name: &PageHash) -> usize {
    let [first, ..] = name.0;
    usize::from(first >> 4)
}

impl Index {
    /// Calls `found` with the position and place of each name that is known. The zero page never is.
    pub(crate) fn lookup(&self, names: &[PageHash], mut found: impl FnMut(usize, Place)) {
        let shards = self.shards.each_ref().map(read);
        for (i, name) in names.iter().enumerate() {
            if let Some(place) = shards.get(shard(name)).and_then(|shard| shard.get(name)) {
                found(i, place);
            }
        }
    }

    pub(crate) fn get(&self, name: &PageHash) -> Option<Place> {
        read(self.shards.get(shard(name))?).get(name)
    }

    /// Sets places; each shard is locked once for a batch.
    pub(crate) fn set(&self, batch: &[(PageHash, Place)]) {
        self.each_shard(batch, |(name, _)| name, |table, (name, place)| table.set(*name, *place));
    }

    /// Moves names that lie in `pack` to another place; names that lie elsewhere by now stay there.
    pub(crate) fn switch(&self, pack: u32, batch: &[(PageHash, Place)]) {
        self.each_shard(
            batch,
            |(name, _)| name,
            |table, (name, place)| {
                if table.get(name).is_some_and(|old| old.pack == pack) {
                    table.set(*name, *place);
                }
            },
        );
    }

    /// Forgets names that lie in `pack`.
    pub(crate) fn remove(&self, pack: u32, names: &[PageHash]) {
        self.each_shard(names, |name| name, |table, name| table.remove(name, pack));
    }

    /// Forgets all names whose place fails the test.
    pub(crate) fn retain(&self, keep: impl Fn(Place) -> bool) {
        self.shards.iter().for_each(|shard| write(shard).retain(&keep));
    }

    /// All names that lie in a pack, with their places.
    pub(crate) fn in_pack(&self, pack: u32) -> Vec<(PageHash, Place)> {
        let mut own = Vec::new();
        for shard in &self.shards {
            own.extend(read(shard).iter().filter(|(_, place)| place.pack == pack).copied());
        }
        own
    }

    /// Number of names.
    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| read(shard).len()).sum()
    }

    fn each_shard<T>(
        &self,
        batch: &[T],
        name: impl Fn(&T) -> &PageHash,
        mut act: impl FnMut(&mut Table, &T),
    ) {
        for (number, table) in self.shards.iter().enumerate() {
            let mut own = batch.iter().filter(|item| shard(name(item)) == number).peekable();
            if own.peek().is_some() {
                let mut table = write(table);
                own.for_each(|item| act(&mut table, item));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn name(n: u64) -> PageHash {
        PageHash(*blake3::hash(&n.to_le_bytes()).as_bytes())
    }

    #[test]
    fn behaves_like_a_map() {
        let (mut table, mut model) = (Table::default(), HashMap::new());
        for step in 0..20_000u64 {
            let key = step.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54;
            if step % 3 == 0 {
                table.remove(&name(key), 1);
                model.remove(&key);
            } else {
                let place = Place { pack: 1, at: step as u32 };
                table.set(name(key), place);
                model.insert(key, place);
            }
        }
        assert_eq!(table.len(), model.len());
        for key in 0..1024 {
            assert_eq!(table.get(&name(key)), model.get(&key).copied());
        }
    }

    #[test]
    fn removes_only_from_the_named_pack() {
        let index = Index::default();
        index.set(&[(name(1), Place { pack: 3, at: 8 }), (name(2), Place { pack: 4, at: 8 })]);
        index.remove(4, &[name(1), name(2)]);
        index.switch(4, &[(name(1), Place { pack: 9, at: 8 })]);
        assert_eq!(index.get(&name(1)), Some(Place { pack: 3, at: 8 }));
        assert_eq!(index.get(&name(2)), None);
        index.retain(|place| place.pack != 3);
        assert_eq!(index.len(), 0);
    }
}
