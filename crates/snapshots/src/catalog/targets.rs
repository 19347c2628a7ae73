//! Rows of targets, and the disks of here.

use jiff::Timestamp;
use pages::MapRoot;
use qemu::process::ProcessId;
use rusqlite::{Row, Transaction, params};
use serde::{Deserialize, Serialize};

use super::{AtPowerOff, Memory, config_column, json_column, now, one, optional_json, time_column, to_json};
use crate::config::MachineConfig;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted};
use crate::id::{new_mac, new_uuid};
use crate::types::Power;

/// The QEMU that runs a machine, as it is found again after a restart of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessRow {
    /// Process.
    pub(crate) id: ProcessId,
    /// Name of its run folder below `run/`.
    pub(crate) run: String,
    /// Accelerator.
    pub(crate) accel: String,
    /// QEMU's version.
    pub(crate) version: String,
    /// The kernel's boot id at its start.
    pub(crate) boot: String,
    /// What its RAM was when it was started, if that is mapped from the snapshot file system: what the guest has not written to since is
    /// read from there when it is touched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ram: Option<MapRoot>,
}

impl ProcessRow {
    /// True if a paused guest stays paused through a migration that fails: QEMU 8.1 and later.
    pub(crate) fn keeps_paused(&self) -> bool {
        let mut numbers = self.version.split('.').map(|n| n.parse::<u32>().unwrap_or(0));
        (numbers.next(), numbers.next()) >= (Some(8), Some(1))
    }
}

/// The memory of a suspended machine, which belongs to its disks as they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Suspended {
    pub(crate) memory: Memory,
}

/// A target.
#[derive(Clone, Debug)]
pub(crate) struct TargetRow {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) group: String,
    pub(crate) group_name: String,
    pub(crate) config: MachineConfig,
    /// Versioned machine type that it was made with.
    pub(crate) machine: String,
    pub(crate) uuid: String,
    pub(crate) macs: Vec<String>,
    pub(crate) parent: Option<String>,
    pub(crate) power: Power,
    pub(crate) process: Option<ProcessRow>,
    /// Set exactly when the power state is [`Power::Suspended`].
    pub(crate) suspended: Option<Suspended>,
    pub(crate) protected: bool,
    /// It is removed when it stops.
    pub(crate) throw_away: bool,
    pub(crate) created: Timestamp,
    pub(crate) removed: Option<i64>,
}

const SELECT: &str = "SELECT t.*, g.name AS group_name, \
     EXISTS (SELECT 1 FROM throw_away a WHERE a.target = t.id) AS throw_away \
     FROM targets t JOIN groups g ON g.id = t.grp";

impl TargetRow {
    /// A machine that is new: off, with an identity of its own. `group` is its group's id and name.
    pub(crate) fn new(
        id: String,
        name: &str,
        group: (&str, &str),
        machine: &str,
        config: MachineConfig,
    ) -> Self {
        Self {
            id,
            name: name.to_owned(),
            group: group.0.to_owned(),
            group_name: group.1.to_owned(),
            machine: machine.to_owned(),
            uuid: new_uuid(),
            macs: config.networks.iter().map(|_| new_mac()).collect(),
            parent: None,
            power: Power::Off,
            process: None,
            suspended: None,
            protected: false,
            throw_away: false,
            created: now(),
            removed: None,
            config,
        }
    }

    fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get("id")?,
            name: row.get("name")?,
            group: row.get("grp")?,
            group_name: row.get("group_name")?,
            config: config_column(row)?,
            machine: row.get("machine")?,
            uuid: row.get("uuid")?,
            macs: json_column(row, "macs")?,
            parent: row.get("parent")?,
            power: json_column(row, "power")?,
            process: optional_json(row, "process")?,
            suspended: optional_json(row, "suspended")?,
            protected: row.get("protected")?,
            throw_away: row.get("throw_away")?,
            created: time_column(row, "created")?,
            removed: row.get("removed")?,
        })
    }

    /// The target of that name that has not been removed.
    pub(crate) fn by_name(tx: &Transaction<'_>, name: &str) -> Result<Self> {
        let sql = format!("{SELECT} WHERE t.name = ?1 AND t.removed IS NULL");
        one(tx.query_row(&sql, [name], Self::from_row))?.ok_or_else(|| {
            Error::new(Code::NotFound, format!("there is no machine called {name:?}"))
                .hint("`spinney ls` lists the machines")
        })
    }

    /// The target of that id, removed or not.
    pub(crate) fn by_id(tx: &Transaction<'_>, id: &str) -> Result<Self> {
        let sql = format!("{SELECT} WHERE t.id = ?1");
        one(tx.query_row(&sql, [id], Self::from_row))?
            .ok_or_else(|| Error::new(Code::NotFound, format!("there is no machine with the id {id}")))
    }

    /// All targets, by name; removed ones only if asked.
    pub(crate) fn all(tx: &Transaction<'_>, removed: bool) -> Result<Vec<Self>> {
        let filter = if removed { "" } else { "WHERE t.removed IS NULL" };
        let mut query = tx.prepare(&format!("{SELECT} {filter} ORDER BY t.name, t.created"))?;
        let rows = query.query_map([], Self::from_row)?.collect::<rusqlite::Result<_>>()?;
        Ok(rows)
    }

    /// All targets of a group, by name, removed ones included.
    pub(crate) fn of_group(tx: &Transaction<'_>, group: &str) -> Result<Vec<Self>> {
        let mut query = tx.prepare(&format!("{SELECT} WHERE t.grp = ?1 ORDER BY t.name, t.created"))?;
        let rows = query.query_map([group], Self::from_row)?.collect::<rusqlite::Result<_>>()?;
        Ok(rows)
    }

    /// True if the name is taken.
    pub(crate) fn name_taken(tx: &Transaction<'_>, name: &str) -> Result<bool> {
        let sql = "SELECT count(*) FROM targets WHERE name = ?1 AND removed IS NULL";
        Ok(tx.query_row(sql, [name], |row| row.get::<_, i64>(0))? > 0)
    }

    /// Writes a new one.
    pub(crate) fn insert(&self, tx: &Transaction<'_>) -> Result<()> {
        tx.execute(
            "INSERT INTO targets (id, name, grp, config, machine, uuid, macs, parent, power, created)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
            params![
                self.id,
                self.name,
                self.group,
                to_json(&self.config)?,
                self.machine,
                self.uuid,
                to_json(&self.macs)?,
                self.parent,
                to_json(&self.power)?,
                self.created.as_millisecond(),
            ],
        )?;
        if self.throw_away {
            tx.execute("INSERT INTO throw_away (target) VALUES (?1)", [&self.id])?;
        }
        Ok(())
    }

    /// Sets power state and process. What was suspended is consumed, or dropped; what was due at a power-off is due no longer.
    pub(crate) fn set_process(
        tx: &Transaction<'_>,
        id: &str,
        power: Power,
        process: Option<&ProcessRow>,
    ) -> Result<()> {
        tx.execute(
            "UPDATE targets SET power = ?2, process = ?3, suspended = NULL WHERE id = ?1",
            params![id, to_json(&power)?, process.map(to_json).transpose()?],
        )?;
        AtPowerOff::end(tx, id)
    }

    /// Has no process any more and this memory to go on from.
    pub(crate) fn set_suspended(tx: &Transaction<'_>, id: &str, memory: &Memory) -> Result<()> {
        let suspended = Suspended { memory: memory.clone() };
        tx.execute(
            "UPDATE targets SET power = ?2, process = NULL, suspended = ?3 WHERE id = ?1",
            params![id, to_json(&Power::Suspended)?, to_json(&suspended)?],
        )?;
        AtPowerOff::end(tx, id)
    }

    /// Every page map that here needs: the memory that is kept, and what a process may still touch.
    pub(crate) fn roots(&self) -> impl Iterator<Item = MapRoot> + '_ {
        let kept = self.suspended.iter().flat_map(|suspended| suspended.memory.roots());
        let touched = self.process.iter().filter_map(|process| process.ram);
        kept.chain(touched.filter(|_| !planted(Fault::ForgetMapped)))
    }

    /// It is thrown away no more.
    pub(crate) fn set_lasting(tx: &Transaction<'_>, id: &str) -> Result<()> {
        tx.execute("DELETE FROM throw_away WHERE target = ?1", [id])?;
        Ok(())
    }

    /// Sets which snapshot here comes from, and the settings that came with it.
    pub(crate) fn set_parent(tx: &Transaction<'_>, id: &str, parent: Option<&str>) -> Result<()> {
        tx.execute("UPDATE targets SET parent = ?2 WHERE id = ?1", params![id, parent])?;
        Ok(())
    }

    /// Sets the settings.
    pub(crate) fn set_config(tx: &Transaction<'_>, id: &str, config: &MachineConfig) -> Result<()> {
        tx.execute("UPDATE targets SET config = ?2 WHERE id = ?1", params![id, to_json(config)?])?;
        Ok(())
    }

    /// Makes it, and with it its snapshots, another group's. Their layers and memory must be that group's too.
    pub(crate) fn set_group(tx: &Transaction<'_>, id: &str, group: &str) -> Result<()> {
        tx.execute("UPDATE targets SET grp = ?2 WHERE id = ?1", params![id, group])?;
        Ok(())
    }

    /// Renames it.
    pub(crate) fn set_name(tx: &Transaction<'_>, id: &str, name: &str) -> Result<()> {
        tx.execute("UPDATE targets SET name = ?2 WHERE id = ?1", params![id, name])?;
        Ok(())
    }

    /// Protects it, or no longer.
    pub(crate) fn set_protected(tx: &Transaction<'_>, id: &str, protected: bool) -> Result<()> {
        tx.execute("UPDATE targets SET protected = ?2 WHERE id = ?1", params![id, protected])?;
        Ok(())
    }

    /// Takes its name away at this time, or gives it back.
    pub(crate) fn set_removed(tx: &Transaction<'_>, id: &str, removed: Option<Timestamp>) -> Result<()> {
        let at = removed.map(Timestamp::as_millisecond);
        tx.execute("UPDATE targets SET removed = ?2 WHERE id = ?1", params![id, at])?;
        Ok(())
    }

    /// The next number for a name that nobody chose.
    pub(crate) fn next_number(tx: &Transaction<'_>, id: &str) -> Result<i64> {
        tx.execute("UPDATE targets SET counter = counter + 1 WHERE id = ?1", [id])?;
        Ok(tx.query_row("SELECT counter FROM targets WHERE id = ?1", [id], |row| row.get(0))?)
    }

    /// Its disks now: disk id and layer id, in order of the disks.
    pub(crate) fn disks(tx: &Transaction<'_>, id: &str) -> Result<Vec<(String, String)>> {
        // "disk10" comes after "disk9".
        let mut query =
            tx.prepare("SELECT disk, layer FROM here_disks WHERE target = ?1 ORDER BY length(disk), disk")?;
        let rows = query.query_map([id], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// Sets the layer that one of its disks writes to.
    pub(crate) fn set_disk(tx: &Transaction<'_>, id: &str, disk: &str, layer: &str) -> Result<()> {
        tx.execute(
            "INSERT INTO here_disks (target, disk, layer) VALUES (?1, ?2, ?3)
             ON CONFLICT (target, disk) DO UPDATE SET layer = excluded.layer",
            params![id, disk, layer],
        )?;
        Ok(())
    }

    /// Takes a disk away. Its layers stay for as long as a snapshot needs them.
    pub(crate) fn remove_disk(tx: &Transaction<'_>, id: &str, disk: &str) -> Result<()> {
        tx.execute("DELETE FROM here_disks WHERE target = ?1 AND disk = ?2", [id, disk])?;
        Ok(())
    }

    /// Forgets it for good; its snapshots must be gone.
    pub(crate) fn purge(tx: &Transaction<'_>, id: &str) -> Result<()> {
        tx.execute("DELETE FROM here_disks WHERE target = ?1", [id])?;
        AtPowerOff::end(tx, id)?;
        Self::set_lasting(tx, id)?;
        tx.execute("DELETE FROM targets WHERE id = ?1", [id])?;
        Ok(())
    }
}
