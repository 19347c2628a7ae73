//! What the collector does not take the index's word for. The index says nothing that the packs do not say, so an error in it must cost
//! time and nothing else; but a page that it has forgotten, or has in the wrong place, would look dead here.

use std::collections::HashMap;

use crate::error::{Error, Kind, Result};
use crate::map::Forest;
use crate::pack::{PackId, Place, read_footer};
use crate::store::Inner;
use crate::{Fingerprint, MapRoot};

/// Readings of the maps: each may find nodes below those that the one before has found.
const ROUNDS: usize = 12;

impl Inner {
    /// The maps of all roots, after everything in them that any pack has was found.
    pub(super) fn forest_surely(&self, roots: &[MapRoot]) -> Result<Forest> {
        self.doubt_index()?;
        let mut forest = Forest::read(self, roots)?;
        for _ in 0..ROUNDS {
            if self.find_lost(&forest)? == 0 {
                break;
            }
            forest = Forest::read(self, roots)?;
        }
        Ok(forest)
    }

    /// Sees to it that the index is what was written.
    fn doubt_index(&self) -> Result<()> {
        let packs = self.packs.all();
        let damaged = self.index.doubt(|id: PackId| {
            let Some(pack) = packs.iter().find(|pack| pack.layout.id == id) else { return Ok(()) };
            let entries = self.packs.file(pack).and_then(|file| {
                read_footer(&*file, &pack.layout)
                    .map_err(|problem| Error::DamagedPack { pack: pack.name(), problem })
            });
            entries.map(|entries| self.enter(pack, &entries))
        })?;
        if damaged > 0 {
            // A session may have been told that a page is there which is not, or is in another pack than the one that it holds.
            self.clock.lose();
        }
        Ok(())
    }

    /// Looks for what the index lacks in the packs' footers. Returns how much was found.
    fn find_lost(&self, forest: &Forest) -> Result<usize> {
        let nodes = forest.nodes().iter().map(|node| (Kind::Node, node.name));
        let unknown = nodes.filter(|(_, name)| self.index.get(name).is_none());
        let missing = forest.missing.iter().map(|missing| (missing.kind, missing.name));
        let mut lost: HashMap<Fingerprint, Kind> =
            missing.chain(unknown).map(|(kind, name)| (name.fingerprint(), kind)).collect();
        lost.retain(|name, _| self.index.get(&name.padded()).is_none());
        if lost.is_empty() {
            return Ok(0);
        }
        let mut found = Vec::new();
        for pack in self.packs.all() {
            let Some((pack, file)) = self.open_pack(pack.number)? else { continue };
            // What a footer that cannot be read has is what may be missing.
            let footer = read_footer(&*file, &pack.layout)
                .map_err(|problem| Error::DamagedPack { pack: pack.name(), problem })?;
            for entry in footer {
                if lost.get(&entry.name) == Some(&entry.kind()) {
                    lost.remove(&entry.name);
                    found.push((entry.name, Place { pack: pack.number, at: entry.at }));
                }
            }
        }
        if !found.is_empty() {
            tracing::warn!(names = found.len(), "the index did not know what is in the packs");
            self.index.set(&found);
            self.clock.lose();
        }
        Ok(found.len())
    }
}
