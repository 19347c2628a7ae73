//! The catalog: which targets, snapshots, layers and operations exist. A SQLite database with full synchronisation.
//!
//! What is in the catalog exists; what is not, does not, whatever lies on the disk. Every change of state is one
//! transaction here, made after the files that it speaks of are durable. The tables are in `schema.sql`.

mod journal;
mod layers;
mod snapshots;
mod targets;

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, Transaction};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::MachineConfig;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted};

pub(crate) use journal::{Act, OpRow, Things};
pub(crate) use layers::{BaseStamp, LayerRow};
pub(crate) use snapshots::{Facts, Memory, SnapshotRow};
pub(crate) use targets::{ProcessRow, Suspended, TargetRow};

const SCHEMA: &str = include_str!("schema.sql");
/// `PRAGMA user_version` of this schema. A catalog with a higher one was written by a later Spinney, and is refused.
const VERSION: i64 = 2;
/// What makes a catalog of each earlier version, from 1 on, one of the next.
const UPGRADES: [&str; 1] = ["ALTER TABLE targets ADD COLUMN suspended TEXT"];

/// The open catalog.
#[derive(Debug)]
pub(crate) struct Catalog {
    connection: Mutex<Connection>,
}

impl Catalog {
    /// Opens the database at `path`, making it if it is not there.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let broken = |error: rusqlite::Error| {
            Error::new(Code::Damaged, format!("the catalog {} cannot be opened", path.display()))
                .because(error)
        };
        let mut connection = Connection::open(path).map_err(broken)?;
        connection.busy_timeout(Duration::from_secs(5)).map_err(broken)?;
        connection
            .execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;")
            .map_err(broken)?;
        if planted(Fault::CatalogUnsynced) {
            connection.execute_batch("PRAGMA synchronous = OFF").map_err(broken)?;
        }
        let version: i64 =
            connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(broken)?;
        match version {
            VERSION => {}
            0 => {
                let transaction = connection.transaction().map_err(broken)?;
                transaction.execute_batch(SCHEMA).map_err(broken)?;
                transaction.pragma_update(None, "user_version", VERSION).map_err(broken)?;
                transaction.commit().map_err(broken)?;
            }
            older @ 1..VERSION => {
                let transaction = connection.transaction().map_err(broken)?;
                let first = usize::try_from(older - 1).unwrap_or_default();
                for upgrade in UPGRADES.iter().skip(first) {
                    transaction.execute_batch(upgrade).map_err(broken)?;
                }
                transaction.pragma_update(None, "user_version", VERSION).map_err(broken)?;
                transaction.commit().map_err(broken)?;
            }
            newer => {
                return Err(Error::new(
                    Code::Precondition,
                    format!(
                        "the catalog {} has version {newer}; this Spinney knows {VERSION}",
                        path.display()
                    ),
                )
                .hint("use the Spinney that wrote it, or a later one"));
            }
        }
        Ok(Self { connection: Mutex::new(connection) })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `body` on one consistent view.
    pub(crate) fn read<T>(&self, body: impl FnOnce(&Transaction<'_>) -> Result<T>) -> Result<T> {
        let mut connection = self.lock();
        let transaction = connection.transaction()?;
        body(&transaction)
    }

    /// Runs `body` and makes what it changed durable; an error changes nothing.
    pub(crate) fn write<T>(&self, body: impl FnOnce(&Transaction<'_>) -> Result<T>) -> Result<T> {
        let mut connection = self.lock();
        let transaction = connection.transaction()?;
        let value = body(&transaction)?;
        transaction.commit()?;
        Ok(value)
    }

    /// SQLite's own check of the file; what it finds, line by line.
    pub(crate) fn check(&self) -> Result<Vec<String>> {
        let connection = self.lock();
        let mut query = connection.prepare("PRAGMA integrity_check(20)")?;
        let lines: Vec<String> = query.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
        Ok(lines.into_iter().filter(|line| line != "ok").collect())
    }
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        let code = match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DiskFull) => Code::NoSpace,
            Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => Code::Damaged,
            _ => Code::Failed,
        };
        Self::new(code, "the catalog cannot be read or written").because(error)
    }
}

/// One row or none.
fn one<T>(result: rusqlite::Result<T>) -> Result<Option<T>> {
    Ok(result.optional()?)
}

/// A column that holds JSON.
fn json_column<T: DeserializeOwned>(row: &Row<'_>, name: &str) -> rusqlite::Result<T> {
    let text: String = row.get(name)?;
    serde_json::from_str(&text).map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, Box::new(error))
    })
}

/// Settings, whatever version wrote them.
fn config_column(row: &Row<'_>) -> rusqlite::Result<MachineConfig> {
    let mut config: MachineConfig = json_column(row, "config")?;
    config.number_disks();
    Ok(config)
}

fn optional_json<T: DeserializeOwned>(row: &Row<'_>, name: &str) -> rusqlite::Result<Option<T>> {
    match row.get::<_, Option<String>>(name)? {
        None => Ok(None),
        Some(_) => json_column(row, name).map(Some),
    }
}

fn to_json<T: Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value)
        .map_err(|error| Error::new(Code::Failed, "a catalog entry cannot be written down").because(error))
}

/// Times are stored as milliseconds since 1970.
fn time_column(row: &Row<'_>, name: &str) -> rusqlite::Result<Timestamp> {
    let millis: i64 = row.get(name)?;
    Ok(Timestamp::from_millisecond(millis).unwrap_or(Timestamp::UNIX_EPOCH))
}

pub(crate) fn now() -> Timestamp {
    let now = Timestamp::now().as_millisecond();
    Timestamp::from_millisecond(now).unwrap_or(Timestamp::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first version's tables, as far as the upgrades touch them.
    const FIRST: &str = "CREATE TABLE targets (id TEXT PRIMARY KEY, power TEXT NOT NULL) STRICT;
        INSERT INTO targets VALUES ('a', '\"off\"'); PRAGMA user_version = 1;";

    #[test]
    fn a_catalog_of_the_first_version_is_upgraded_and_a_later_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.db");
        Connection::open(&path).unwrap().execute_batch(FIRST).unwrap();
        let catalog = Catalog::open(&path).unwrap();
        let row: (String, Option<String>) = catalog
            .read(|tx| {
                let sql = "SELECT power, suspended FROM targets";
                Ok(tx.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?)
            })
            .unwrap();
        assert_eq!(row, ("\"off\"".to_owned(), None));
        drop(catalog);
        Catalog::open(&path).expect("it has this version now");
        Connection::open(&path).unwrap().pragma_update(None, "user_version", VERSION + 1).unwrap();
        assert_eq!(Catalog::open(&path).unwrap_err().code(), Code::Precondition);
    }
}
