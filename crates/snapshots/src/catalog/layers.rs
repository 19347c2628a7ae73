//! Rows of disk layers. Who lies over whom is only known here.

use pages::MapRoot;
use rusqlite::{Row, Transaction, params};
use serde::{Deserialize, Serialize};

use super::{one, optional_json, to_json};
use crate::error::{Code, Error, Result};

/// What a user's own image looked like when it was last seen, so that a change behind our back is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BaseStamp {
    pub(crate) bytes: u64,
    pub(crate) mtime_ns: i128,
}

/// A layer: a qcow2 file of ours, or a user's image at the bottom of a chain (`stamp` is set).
#[derive(Clone, Debug)]
pub(crate) struct LayerRow {
    pub(crate) id: String,
    pub(crate) group: String,
    /// File name in the group's `layers` folder; for a user's image its absolute path.
    pub(crate) file: String,
    pub(crate) format: String,
    /// Bytes that the guest sees.
    pub(crate) size: u64,
    pub(crate) below: Option<String>,
    /// Layers in the chain, itself included.
    pub(crate) depth: u32,
    pub(crate) stamp: Option<BaseStamp>,
    /// What a disk shows through it and all below, once that is in the page store.
    pub(crate) settled: Option<MapRoot>,
    /// What it had settled into before. A process that runs may read it still.
    pub(crate) retired: Vec<MapRoot>,
}

/// The layer `?1` and all that lie over it, for what follows.
const ABOVE: &str = "WITH RECURSIVE above (id) AS (
    SELECT ?1 UNION SELECT l.id FROM layers l JOIN above a ON l.below = a.id
)";

/// What had settled so far is retired.
const RETIRE: &str = "UPDATE layers SET settled = NULL,
    retired = CASE WHEN settled IS NULL THEN retired ELSE json_insert(coalesce(retired, '[]'), '$[#]', json(settled)) END";

impl LayerRow {
    fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get("id")?,
            group: row.get("grp")?,
            file: row.get("file")?,
            format: row.get("format")?,
            size: row.get("size")?,
            below: row.get("below")?,
            depth: row.get("depth")?,
            stamp: optional_json(row, "stamp")?,
            settled: optional_json(row, "settled")?,
            retired: optional_json(row, "retired")?.unwrap_or_default(),
        })
    }

    /// True if it is a user's own image. As a disk's only layer it makes that disk read-only.
    pub(crate) fn is_users(&self) -> bool {
        self.stamp.is_some()
    }

    /// What the page store calls the file: its id; a user's image by its path and what it looked like, since all machines of a group that
    /// lie over it have the same.
    pub(crate) fn image_label(&self) -> String {
        match &self.stamp {
            None => self.id.clone(),
            Some(stamp) => format!("{}#{}.{}", self.file, stamp.bytes, stamp.mtime_ns),
        }
    }

    /// Writes a new one.
    pub(crate) fn insert(&self, tx: &Transaction<'_>) -> Result<()> {
        tx.execute(
            "INSERT INTO layers (id, grp, file, format, size, below, depth, stamp)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            params![
                self.id,
                self.group,
                self.file,
                self.format,
                self.size,
                self.below,
                self.depth,
                self.stamp.as_ref().map(to_json).transpose()?,
            ],
        )?;
        Ok(())
    }

    /// One layer.
    pub(crate) fn by_id(tx: &Transaction<'_>, id: &str) -> Result<Self> {
        let mut query = tx.prepare_cached("SELECT * FROM layers WHERE id = ?1")?;
        one(query.query_row([id], Self::from_row))?.ok_or_else(|| lacks(id))
    }

    /// A layer and what lies below it, base first.
    pub(crate) fn chain(tx: &Transaction<'_>, id: &str) -> Result<Vec<Self>> {
        Self::down(tx, id, false)
    }

    /// A layer and what lies below it, base first, down to the highest that has settled: its map is what all below it show. If none has, all
    /// of them.
    pub(crate) fn down_to_settled(tx: &Transaction<'_>, id: &str) -> Result<Vec<Self>> {
        Self::down(tx, id, true)
    }

    fn down(tx: &Transaction<'_>, id: &str, to_settled: bool) -> Result<Vec<Self>> {
        // Of a catalog in disorder the depths keep it from going round.
        let mut query = tx.prepare_cached(
            "WITH RECURSIVE down AS (
                 SELECT * FROM layers WHERE id = ?1
                 UNION ALL
                 SELECT l.* FROM down d JOIN layers l ON l.id = d.below AND l.depth < d.depth
                  WHERE NOT ?2 OR d.settled IS NULL
             ) SELECT * FROM down",
        )?;
        let rows = query.query_map(params![id, to_settled], Self::from_row)?;
        let mut rows: Vec<Self> = rows.collect::<rusqlite::Result<_>>()?;
        rows.reverse();
        let lowest = rows.first().ok_or_else(|| lacks(id))?;
        match &lowest.below {
            // Cut short, it would be opened as if there had been nothing below.
            Some(below) if !to_settled || lowest.settled.is_none() => Err(broken(below)),
            _ => Ok(rows),
        }
    }

    /// The layer that this one lies over, if it lies over one.
    pub(crate) fn next_below(&self, tx: &Transaction<'_>) -> Result<Option<Self>> {
        let Some(below) = &self.below else { return Ok(None) };
        // Of a catalog in disorder the depths keep it from going round.
        let row = Self::by_id(tx, below)?;
        if row.depth < self.depth { Ok(Some(row)) } else { Err(broken(below)) }
    }

    /// The lowest layer of a chain. Those between are passed, not read.
    pub(crate) fn base(tx: &Transaction<'_>, id: &str) -> Result<Self> {
        let mut query = tx.prepare_cached(
            "WITH RECURSIVE down (row, below, depth) AS (
                 SELECT rowid, below, depth FROM layers WHERE id = ?1
                 UNION ALL
                 SELECT l.rowid, l.below, l.depth FROM down d JOIN layers l ON l.id = d.below AND l.depth < d.depth
             ) SELECT l.* FROM down d JOIN layers l ON l.rowid = d.row WHERE d.below IS NULL",
        )?;
        one(query.query_row([id], Self::from_row))?.ok_or_else(|| lacks(id))
    }

    /// All layers.
    pub(crate) fn all(tx: &Transaction<'_>) -> Result<Vec<Self>> {
        let mut query = tx.prepare("SELECT * FROM layers ORDER BY depth")?;
        let rows = query.query_map([], Self::from_row)?.collect::<rusqlite::Result<_>>()?;
        Ok(rows)
    }

    /// All layers of a group.
    pub(crate) fn of_group(tx: &Transaction<'_>, group: &str) -> Result<Vec<Self>> {
        let mut query = tx.prepare("SELECT * FROM layers WHERE grp = ?1 ORDER BY depth")?;
        let rows = query.query_map([group], Self::from_row)?.collect::<rusqlite::Result<_>>()?;
        Ok(rows)
    }

    /// True if a snapshot has it, or something over it.
    pub(crate) fn has_snapshot(tx: &Transaction<'_>, id: &str) -> Result<bool> {
        let found = tx.query_row(
            &format!("{ABOVE} SELECT EXISTS (SELECT 1 FROM above a JOIN snapshot_disks d ON d.layer = a.id)"),
            [id],
            |row| row.get(0),
        )?;
        Ok(found)
    }

    /// Writes what a user's image looks like now. What was settled over it may not be what it was.
    pub(crate) fn set_stamp(tx: &Transaction<'_>, id: &str, stamp: &BaseStamp) -> Result<()> {
        tx.execute("UPDATE layers SET stamp = ?2 WHERE id = ?1", params![id, to_json(stamp)?])?;
        tx.execute(&format!("{ABOVE} {RETIRE} WHERE id IN (SELECT id FROM above)"), [id])?;
        Ok(())
    }

    /// Nothing needs its map any more, nor one that it had.
    pub(crate) fn set_unsettled(tx: &Transaction<'_>, id: &str) -> Result<()> {
        tx.execute("UPDATE layers SET settled = NULL, retired = NULL WHERE id = ?1", [id])?;
        Ok(())
    }

    /// Nobody reads what it had settled into before.
    pub(crate) fn forget_retired(tx: &Transaction<'_>, id: &str) -> Result<()> {
        tx.execute("UPDATE layers SET retired = NULL WHERE id = ?1", [id])?;
        Ok(())
    }

    /// It has settled. The map is durable.
    pub(crate) fn set_settled(tx: &Transaction<'_>, id: &str, map: &MapRoot) -> Result<()> {
        tx.execute("UPDATE layers SET settled = ?2 WHERE id = ?1", params![id, to_json(map)?])?;
        Ok(())
    }

    /// It is written to again: it has yet to settle.
    pub(crate) fn thaw(tx: &Transaction<'_>, id: &str) -> Result<()> {
        tx.execute(&format!("{RETIRE} WHERE id = ?1"), [id])?;
        Ok(())
    }

    /// The layers of a group have yet to settle, again: their maps may lack something.
    pub(crate) fn unsettle(tx: &Transaction<'_>, group: &str) -> Result<()> {
        tx.execute(&format!("{RETIRE} WHERE grp = ?1"), [group])?;
        Ok(())
    }

    /// Forgets a layer that nothing refers to any more.
    pub(crate) fn purge(tx: &Transaction<'_>, id: &str) -> Result<()> {
        tx.execute("DELETE FROM layers WHERE id = ?1", [id])?;
        Ok(())
    }
}

/// A chain goes on with a layer that is not there, or is there and no less deep.
fn broken(id: &str) -> Error {
    Error::new(Code::Damaged, format!("the catalog has no layer {id} where a chain goes on with it"))
}

fn lacks(id: &str) -> Error {
    Error::new(Code::Damaged, format!("the catalog has no layer {id}"))
}
