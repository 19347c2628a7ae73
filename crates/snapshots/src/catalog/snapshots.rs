//! Rows of snapshots.

use jiff::Timestamp;
use pages::{MapRoot, Saved};
use rusqlite::{Row, Transaction, params};
use serde::{Deserialize, Serialize};

use super::{config_column, json_column, one, optional_json, time_column, to_json};
use crate::config::MachineConfig;
use crate::error::{Code, Error, Result};
use crate::types::{Mode, Power};

/// Where a snapshot's memory is in the page store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Memory {
    /// RAM blocks: name in the stream, and page map.
    pub(crate) blocks: Vec<(String, MapRoot)>,
    /// The device state, as an image of its own.
    pub(crate) state: MapRoot,
    /// Its length in bytes.
    pub(crate) state_bytes: u64,
    /// A picture of the screen (PNG) and its length in bytes, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) screen: Option<(MapRoot, u64)>,
}

impl Memory {
    /// Every map that must live for this memory to live.
    pub(crate) fn roots(&self) -> impl Iterator<Item = MapRoot> + '_ {
        let screen = self.screen.iter().map(|(root, _)| *root);
        self.blocks.iter().map(|(_, root)| *root).chain([self.state]).chain(screen)
    }
}

/// What was measured and recorded when it was taken; never changes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Facts {
    pub(crate) power: Power,
    pub(crate) mode: Mode,
    pub(crate) pause_us: Option<u64>,
    pub(crate) took_us: u64,
    pub(crate) memory_bytes: u64,
    /// Allocated bytes of the layers that it has and its parent has not.
    #[serde(default)]
    pub(crate) disk_bytes: u64,
    pub(crate) saved: Saved,
}

impl Facts {
    /// Of a state that nothing was measured of.
    pub(crate) fn of_nothing(mode: Mode, power: Power) -> Self {
        Self {
            power,
            mode,
            pause_us: None,
            took_us: 0,
            memory_bytes: 0,
            disk_bytes: 0,
            saved: Saved::default(),
        }
    }
}

/// A snapshot.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotRow {
    pub(crate) id: String,
    pub(crate) target: String,
    pub(crate) target_name: String,
    pub(crate) parent: Option<String>,
    pub(crate) name: String,
    pub(crate) note: String,
    pub(crate) created: Timestamp,
    pub(crate) undo_point: bool,
    pub(crate) keep: bool,
    pub(crate) protected: bool,
    /// Versioned machine type.
    pub(crate) machine: String,
    pub(crate) config: MachineConfig,
    pub(crate) memory: Option<Memory>,
    pub(crate) facts: Facts,
    pub(crate) removed: Option<i64>,
}

const SELECT: &str = "SELECT s.*, t.name AS target_name FROM snapshots s JOIN targets t ON t.id = s.target";

impl SnapshotRow {
    fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get("id")?,
            target: row.get("target")?,
            target_name: row.get("target_name")?,
            parent: row.get("parent")?,
            name: row.get("name")?,
            note: row.get("note")?,
            created: time_column(row, "created")?,
            undo_point: row.get("undo_point")?,
            keep: row.get("keep")?,
            protected: row.get("protected")?,
            machine: row.get("machine")?,
            config: config_column(row)?,
            memory: optional_json(row, "memory")?,
            facts: json_column(row, "facts")?,
            removed: row.get("removed")?,
        })
    }

    /// `web@before`.
    pub(crate) fn full_name(&self) -> String {
        format!("{}@{}", self.target_name, self.name)
    }

    /// One snapshot, removed or not.
    pub(crate) fn by_id(tx: &Transaction<'_>, id: &str) -> Result<Self> {
        let sql = format!("{SELECT} WHERE s.id = ?1");
        one(tx.query_row(&sql, [id], Self::from_row))?
            .ok_or_else(|| Error::new(Code::NotFound, format!("there is no snapshot with the id {id}")))
    }

    /// The snapshots of a target in the order in which they came, which no clock can upset; removed ones included.
    pub(crate) fn of_target(tx: &Transaction<'_>, target: &str) -> Result<Vec<Self>> {
        let mut query = tx.prepare(&format!("{SELECT} WHERE s.target = ?1 ORDER BY s.rowid"))?;
        let rows = query.query_map([target], Self::from_row)?.collect::<rusqlite::Result<_>>()?;
        Ok(rows)
    }

    /// All snapshots of all targets, removed ones included.
    pub(crate) fn all(tx: &Transaction<'_>) -> Result<Vec<Self>> {
        let mut query = tx.prepare(&format!("{SELECT} ORDER BY s.rowid"))?;
        let rows = query.query_map([], Self::from_row)?.collect::<rusqlite::Result<_>>()?;
        Ok(rows)
    }

    /// All snapshots of all targets of a group, removed ones included.
    pub(crate) fn of_group(tx: &Transaction<'_>, group: &str) -> Result<Vec<Self>> {
        let mut query = tx.prepare(&format!("{SELECT} WHERE t.grp = ?1 ORDER BY s.rowid"))?;
        let rows = query.query_map([group], Self::from_row)?.collect::<rusqlite::Result<_>>()?;
        Ok(rows)
    }

    /// The snapshot of a target with this name, unless it was removed.
    pub(crate) fn by_name(tx: &Transaction<'_>, target: &str, name: &str) -> Result<Option<Self>> {
        let sql = format!("{SELECT} WHERE s.target = ?1 AND s.name = ?2 AND s.removed IS NULL");
        one(tx.query_row(&sql, [target, name], Self::from_row))
    }

    /// Id of the nearest ancestor that has not been removed, starting with `id` itself.
    pub(crate) fn visible(tx: &Transaction<'_>, id: Option<&str>) -> Result<Option<String>> {
        one(tx.query_row(
            "WITH RECURSIVE up (id, parent, removed) AS (
                 SELECT id, parent, removed FROM snapshots WHERE id = ?1
                 UNION
                 SELECT s.id, s.parent, s.removed FROM snapshots s JOIN up ON s.id = up.parent
                  WHERE up.removed NOT NULL
             ) SELECT id FROM up WHERE removed IS NULL",
            [id],
            |row| row.get(0),
        ))
    }

    /// The undo points of a target, oldest first; removed ones included.
    pub(crate) fn undo_points(tx: &Transaction<'_>, target: &str) -> Result<Vec<Self>> {
        let sql = format!("{SELECT} WHERE s.target = ?1 AND s.undo_point = 1 ORDER BY s.rowid");
        let mut query = tx.prepare(&sql)?;
        let rows = query.query_map([target], Self::from_row)?.collect::<rusqlite::Result<_>>()?;
        Ok(rows)
    }

    /// How many snapshots of a target people see.
    pub(crate) fn count(tx: &Transaction<'_>, target: &str) -> Result<u64> {
        let sql = "SELECT count(*) FROM snapshots WHERE target = ?1 AND removed IS NULL AND undo_point = 0";
        Ok(tx.query_row(sql, [target], |row| row.get(0))?)
    }

    /// True if a snapshot of the target has this name.
    pub(crate) fn name_taken(tx: &Transaction<'_>, target: &str, name: &str) -> Result<bool> {
        let sql = "SELECT count(*) FROM snapshots WHERE target = ?1 AND name = ?2 AND removed IS NULL";
        Ok(tx.query_row(sql, [target, name], |row| row.get::<_, i64>(0))? > 0)
    }

    /// Writes a new one with the layers of its disks.
    pub(crate) fn insert(&self, tx: &Transaction<'_>, disks: &[(String, String)]) -> Result<()> {
        tx.execute(
            "INSERT INTO snapshots
                 (id, target, parent, name, note, created, undo_point, keep, machine, config, memory, facts)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
            params![
                self.id,
                self.target,
                self.parent,
                self.name,
                self.note,
                self.created.as_millisecond(),
                self.undo_point,
                self.keep,
                self.machine,
                to_json(&self.config)?,
                self.memory.as_ref().map(to_json).transpose()?,
                to_json(&self.facts)?,
            ],
        )?;
        for (disk, layer) in disks {
            tx.execute(
                "INSERT INTO snapshot_disks (snapshot, disk, layer) VALUES (?1, ?2, ?3)",
                params![self.id, disk, layer],
            )?;
        }
        Ok(())
    }

    /// Its disks: disk id and layer id.
    pub(crate) fn disks(tx: &Transaction<'_>, id: &str) -> Result<Vec<(String, String)>> {
        let mut query = tx.prepare(
            "SELECT disk, layer FROM snapshot_disks WHERE snapshot = ?1 ORDER BY length(disk), disk",
        )?;
        let rows = query.query_map([id], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// Its memory and the layers of its disks are elsewhere from now on; what they hold is the same.
    pub(crate) fn set_places(
        tx: &Transaction<'_>,
        id: &str,
        memory: Option<&Memory>,
        disks: &[(String, String)],
    ) -> Result<()> {
        tx.execute(
            "UPDATE snapshots SET memory = ?2 WHERE id = ?1",
            params![id, memory.map(to_json).transpose()?],
        )?;
        for (disk, layer) in disks {
            tx.execute(
                "UPDATE snapshot_disks SET layer = ?3 WHERE snapshot = ?1 AND disk = ?2",
                params![id, disk, layer],
            )?;
        }
        Ok(())
    }

    /// Makes an ordinary snapshot of an undo point.
    pub(crate) fn promote(tx: &Transaction<'_>, id: &str) -> Result<()> {
        tx.execute("UPDATE snapshots SET undo_point = 0 WHERE id = ?1", [id])?;
        Ok(())
    }

    /// Changes name, note and keep.
    pub(crate) fn set_text(tx: &Transaction<'_>, id: &str, name: &str, note: &str, keep: bool) -> Result<()> {
        tx.execute(
            "UPDATE snapshots SET name = ?2, note = ?3, keep = ?4 WHERE id = ?1",
            params![id, name, note, keep],
        )?;
        Ok(())
    }

    /// Protects it, or no longer.
    pub(crate) fn set_protected(tx: &Transaction<'_>, id: &str, protected: bool) -> Result<()> {
        tx.execute("UPDATE snapshots SET protected = ?2 WHERE id = ?1", params![id, protected])?;
        Ok(())
    }

    /// Takes its name away at this time, or gives it back.
    pub(crate) fn set_removed(tx: &Transaction<'_>, id: &str, removed: Option<Timestamp>) -> Result<()> {
        let at = removed.map(Timestamp::as_millisecond);
        tx.execute("UPDATE snapshots SET removed = ?2 WHERE id = ?1", params![id, at])?;
        Ok(())
    }

    /// Forgets it for good. Its children, and here, become its parent's.
    pub(crate) fn purge(tx: &Transaction<'_>, id: &str) -> Result<()> {
        tx.execute(
            "UPDATE snapshots SET parent = (SELECT parent FROM snapshots WHERE id = ?1) WHERE parent = ?1",
            [id],
        )?;
        tx.execute(
            "UPDATE targets SET parent = (SELECT parent FROM snapshots WHERE id = ?1) WHERE parent = ?1",
            [id],
        )?;
        tx.execute("DELETE FROM snapshot_disks WHERE snapshot = ?1", [id])?;
        tx.execute("DELETE FROM damaged WHERE snapshot = ?1", [id])?;
        Self::set_expiry(tx, id, None)?;
        tx.execute("DELETE FROM snapshots WHERE id = ?1", [id])?;
        Ok(())
    }
}
