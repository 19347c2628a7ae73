//! The tree of a target's snapshots as people see it.

use crate::catalog::{Catalog, LayerRow, SnapshotRow, TargetRow};
use crate::engine::Engine;
use crate::error::Result;
use crate::types::{Snapshot, SnapshotState, Tree};

impl Engine {
    /// A target's snapshots, parents before children, and where it stands.
    pub fn tree(&self, target: &str) -> Result<Tree> {
        let (row, mut snapshots, here) = self.catalog.read(|tx| {
            let row = TargetRow::by_name(tx, target)?;
            let all = SnapshotRow::of_target(tx, &row.id)?;
            let here = SnapshotRow::visible(tx, row.parent.as_deref())?;
            let mut out = Vec::new();
            for snapshot in all.iter().filter(|s| s.removed.is_none()) {
                out.push(view(tx, snapshot)?);
            }
            Ok((row, out, here))
        })?;
        let mut here = here;
        if let Some(saving) = self.saving.of(&row.id).filter(|new| snapshots.iter().all(|s| s.id != new.id)) {
            here = Some(saving.id.clone());
            snapshots.push(saving);
        }
        order(&mut snapshots);
        Ok(Tree { machine: self.machine_view(row)?, snapshots, here })
    }

    /// One snapshot, by any form of address.
    pub fn snapshot(&self, address: &str) -> Result<Snapshot> {
        self.catalog.read(|tx| {
            let found = crate::address::resolve(tx, address);
            if let Some(saving) = self.saving.by_address(tx, address) {
                return Ok(saving);
            }
            view(tx, &found?.1)
        })
    }
}

/// A row as callers get it.
pub(crate) fn view(tx: &rusqlite::Transaction<'_>, row: &SnapshotRow) -> Result<Snapshot> {
    let mut depth = 0;
    for (_, layer) in SnapshotRow::disks(tx, &row.id)? {
        depth = depth.max(LayerRow::by_id(tx, &layer)?.depth);
    }
    let damaged = SnapshotRow::damage(tx, &row.id)?.is_some();
    view_at(tx, row, depth, if damaged { SnapshotState::Damaged } else { SnapshotState::Ready })
}

/// A row that need not be in the catalog, with the depth of its disks.
pub(crate) fn view_at(
    tx: &rusqlite::Transaction<'_>,
    row: &SnapshotRow,
    depth: u32,
    state: SnapshotState,
) -> Result<Snapshot> {
    let facts = &row.facts;
    Ok(Snapshot {
        id: row.id.clone(),
        target: row.target_name.clone(),
        name: row.name.clone(),
        state,
        note: row.note.clone(),
        parent: SnapshotRow::visible(tx, row.parent.as_deref())?,
        created: row.created,
        undo_point: row.undo_point,
        power: facts.power,
        mode: facts.mode,
        pause_us: facts.pause_us,
        took_us: facts.took_us,
        memory_bytes: facts.memory_bytes,
        stored_bytes: facts.saved.bytes_written,
        disk_bytes: facts.disk_bytes,
        saved: facts.saved,
        keep: row.keep,
        expires: SnapshotRow::expires(tx, &row.id)?,
        protected: row.protected,
        depth,
        config: row.config.clone(),
    })
}

/// View of one snapshot by id.
pub(crate) fn view_by_id(catalog: &Catalog, id: &str) -> Result<Snapshot> {
    catalog.read(|tx| {
        let row = SnapshotRow::by_id(tx, id)?;
        view(tx, &row)
    })
}

/// Parents before children, siblings in the order in which they came.
fn order(snapshots: &mut Vec<Snapshot>) {
    use std::collections::HashMap;
    let mut children: HashMap<Option<String>, Vec<Snapshot>> = HashMap::new();
    for snapshot in snapshots.drain(..) {
        children.entry(snapshot.parent.clone()).or_default().push(snapshot);
    }
    let mut open: Vec<Snapshot> = children.remove(&None).unwrap_or_default();
    open.reverse();
    while let Some(next) = open.pop() {
        let mut below = children.remove(&Some(next.id.clone())).unwrap_or_default();
        below.reverse();
        snapshots.push(next);
        open.append(&mut below);
    }
}
