//! Rows of groups. There always is one called "default".

use jiff::Timestamp;
use rusqlite::{Row, Transaction, params};

use super::{now, one, time_column};
use crate::error::{Code, Error, Result};

/// Name of the group that is there from the first start on.
pub(crate) const DEFAULT_GROUP: &str = "default";

/// A group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GroupRow {
    pub(crate) id: String,
    pub(crate) name: String,
    /// User id of its owner.
    pub(crate) owner: u32,
    pub(crate) created: Timestamp,
}

impl GroupRow {
    fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get("id")?,
            name: row.get("name")?,
            owner: row.get("owner")?,
            created: time_column(row, "created")?,
        })
    }

    /// True for the one that is there from the first start on.
    pub(crate) fn is_default(&self) -> bool {
        self.name == DEFAULT_GROUP
    }

    /// All groups, the default one first, then by name.
    pub(crate) fn all(tx: &Transaction<'_>) -> Result<Vec<Self>> {
        let mut query = tx.prepare("SELECT * FROM groups ORDER BY name <> ?1, name")?;
        let rows = query.query_map([DEFAULT_GROUP], Self::from_row)?.collect::<rusqlite::Result<_>>()?;
        Ok(rows)
    }

    /// The group of that id.
    pub(crate) fn by_id(tx: &Transaction<'_>, id: &str) -> Result<Self> {
        let found = one(tx.query_row("SELECT * FROM groups WHERE id = ?1", [id], Self::from_row))?;
        found.ok_or_else(|| Error::new(Code::NotFound, format!("there is no group with the id {id}")))
    }

    /// Writes a new one.
    pub(crate) fn insert(&self, tx: &Transaction<'_>) -> Result<()> {
        let taken = "SELECT count(*) FROM groups WHERE name = ?1";
        if tx.query_row(taken, [&self.name], |row| row.get::<_, i64>(0))? > 0 {
            return Err(Error::new(Code::Refused, format!("there already is a group called {}", self.name))
                .hint("choose another name; `spinney group ls` lists the groups"));
        }
        tx.execute(
            "INSERT INTO groups (id, name, owner, created) VALUES (?1, ?2, ?3, ?4)",
            params![self.id, self.name, self.owner, self.created.as_millisecond()],
        )?;
        Ok(())
    }

    /// Forgets it for good, with what is left of its layers; no target may belong to it any more.
    pub(crate) fn purge(tx: &Transaction<'_>, id: &str) -> Result<()> {
        tx.execute("DELETE FROM layers WHERE grp = ?1", [id])?;
        tx.execute("DELETE FROM groups WHERE id = ?1", [id])?;
        Ok(())
    }
}

pub(crate) fn no_group(name: &str) -> Error {
    Error::new(Code::NotFound, format!("there is no group called {name:?}"))
        .hint("`spinney group ls` lists the groups")
}

impl super::Catalog {
    /// All groups. The default one is made at the first call, with this id and owner.
    pub(crate) fn groups(&self, id: &str, owner: u32) -> Result<Vec<GroupRow>> {
        self.write(|tx| {
            let all = GroupRow::all(tx)?;
            if all.iter().any(GroupRow::is_default) {
                return Ok(all);
            }
            GroupRow { id: id.to_owned(), name: DEFAULT_GROUP.into(), owner, created: now() }.insert(tx)?;
            GroupRow::all(tx)
        })
    }
}
