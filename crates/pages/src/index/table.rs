//! Names and places in memory: one shard of the index, or one session's own.

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use crate::Fingerprint;
use crate::pack::Place;
use crate::segments::Segments;

/// A hash table of positions into a growing list: 24 bytes a name, and 5 to 11 for its position.
#[derive(Default)]
pub(crate) struct Table {
    positions: HashTable<u32>,
    entries: Segments<(Fingerprint, Place)>,
}

/// Names are hashes already. The first eight bytes choose shard and bucket; the second eight serve the table.
fn hash(name: Fingerprint) -> u64 {
    let [.., a, b, c, d, e, f, g, h] = name.0;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

impl Table {
    pub(crate) fn get(&self, name: Fingerprint) -> Option<Place> {
        let at = self.positions.find(hash(name), |&i| self.is_at(i, name))?;
        self.entries.get(*at as usize).map(|(_, place)| *place)
    }

    /// Sets the place of a name, new or known.
    pub(crate) fn set(&mut self, name: Fingerprint, place: Place) {
        let entries = &self.entries;
        let name_at = |&i: &u32| entries.get(i as usize).map(|(name, _)| *name);
        let is_it = |i: &u32| name_at(i) == Some(name);
        match self.positions.entry(hash(name), is_it, |i| name_at(i).map_or(0, hash)) {
            Entry::Occupied(known) => {
                let known = *known.get();
                if let Some(entry) = self.entries.get_mut(known as usize) {
                    entry.1 = place;
                }
            }
            Entry::Vacant(gap) => {
                // 4 billion names in a shard: those beyond are stored again, never lost.
                let Ok(at) = u32::try_from(self.entries.len()) else { return };
                gap.insert(at);
                self.entries.push((name, place));
            }
        }
    }

    /// Forgets a name.
    pub(crate) fn remove(&mut self, name: Fingerprint) {
        let entries = &self.entries;
        let is_it = |&i: &u32| entries.get(i as usize).is_some_and(|(n, _)| *n == name);
        let Ok(entry) = self.positions.find_entry(hash(name), is_it) else { return };
        let (at, _) = entry.remove();
        self.entries.swap_remove(at as usize);
        // The last entry moved into the gap.
        let old = self.entries.len() as u32;
        if let Some((moved, _)) = self.entries.get(at as usize)
            && let Some(position) = self.positions.find_mut(hash(*moved), |&i| i == old)
        {
            *position = at;
        }
    }

    /// Forgets every name whose place fails the test.
    pub(crate) fn retain(&mut self, keep: &dyn Fn(Place) -> bool) {
        let gone: Vec<_> =
            self.entries.iter().filter(|(_, place)| !keep(*place)).map(|(name, _)| *name).collect();
        gone.into_iter().for_each(|name| self.remove(name));
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &(Fingerprint, Place)> {
        self.entries.iter()
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Gives back what many names that are gone have taken.
    pub(crate) fn shrink(&mut self) {
        let entries = &self.entries;
        self.positions
            .shrink_to(entries.len() * 2, |&i| entries.get(i as usize).map_or(0, |(name, _)| hash(*name)));
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.positions.allocation_size() + self.entries.len() * size_of::<(Fingerprint, Place)>()
    }

    fn is_at(&self, i: u32, name: Fingerprint) -> bool {
        self.entries.get(i as usize).is_some_and(|(n, _)| *n == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::At;
    use std::collections::HashMap;

    fn name(n: u64) -> Fingerprint {
        crate::PageHash(*blake3::hash(&n.to_le_bytes()).as_bytes()).fingerprint()
    }

    #[test]
    fn behaves_like_a_map() {
        let (mut table, mut model) = (Table::default(), HashMap::new());
        for step in 0..20_000u64 {
            let key = step.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54;
            if step % 3 == 0 {
                table.remove(name(key));
                model.remove(&key);
            } else {
                let place = Place { pack: 1, at: At::page(step as u32) };
                table.set(name(key), place);
                model.insert(key, place);
            }
            if step % 5_000 == 0 {
                table.shrink();
            }
        }
        assert_eq!(table.len(), model.len());
        for key in 0..1024 {
            assert_eq!(table.get(name(key)), model.get(&key).copied());
        }
        table.retain(&|place| place.at > At::page(10_000));
        model.retain(|_, place| place.at > At::page(10_000));
        assert_eq!(table.len(), model.len());
    }
}
