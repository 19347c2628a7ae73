//! The catalog: which targets, snapshots, layers and operations exist. A SQLite database with full synchronisation.
//!
//! What is in the catalog exists; what is not, does not, whatever lies on the disk. Every change of state is one
//! transaction here, made after the files that it speaks of are durable. The tables are in `schema.sql`.

mod clock;
mod damaged;
mod expiry;
mod groups;
mod journal;
mod layers;
mod power_off;
mod reserve;
mod snapshots;
mod targets;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, Transaction};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::MachineConfig;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted};

pub(crate) use clock::last_jump;
pub(crate) use expiry::{Expiring, Expiry};
pub(crate) use groups::{DEFAULT_GROUP, GroupRow, no_group};
pub(crate) use journal::{Act, OpRow, Things, Until};
pub(crate) use layers::{BaseStamp, LayerRow};
pub(crate) use power_off::AtPowerOff;
pub(crate) use snapshots::{Facts, Memory, SnapshotRow};
pub(crate) use targets::{ProcessRow, Suspended, TargetRow};

use reserve::Reserve;

const SCHEMA: &str = include_str!("schema.sql");
/// `PRAGMA user_version` of this schema. A catalog with a higher one was written by a later Spinney, and is refused.
const VERSION: i64 = 3;
/// What makes a catalog of each earlier version, from 1 on, one of the next.
const UPGRADES: [&str; 2] = [
    "ALTER TABLE targets ADD COLUMN suspended TEXT",
    "ALTER TABLE layers ADD COLUMN settled TEXT; ALTER TABLE layers ADD COLUMN retired TEXT",
];
/// `PRAGMA application_id` of a copy.
const IS_COPY: i64 = 0x5350_4350;

/// The open catalog.
#[derive(Debug)]
pub(crate) struct Catalog {
    path: PathBuf,
    connection: Mutex<Connection>,
    reserve: Reserve,
    /// What had been changed when the last copy was made.
    copied: Mutex<Option<u64>>,
}

impl Catalog {
    /// Opens the database at `path`, making it if it is not there.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let reserve = Reserve::beside(path);
        let connection = match connect(path) {
            Err(error) if is_full(&error) && reserve.give_up() => connect(path)?,
            Err(error) if error.code() == Code::Damaged => {
                return Err(error.hint(format!(
                    "nothing was changed. {} is an earlier copy: docs/failures.md says how to go on with it",
                    copy_of(path).display()
                )));
            }
            other => other?,
        };
        reserve.keep();
        Ok(Self {
            path: path.to_owned(),
            connection: Mutex::new(connection),
            reserve,
            copied: Mutex::default(),
        })
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

    /// Runs `body` and makes what it changed durable; an error changes nothing. On a full disk the reserve is given up and `body`
    /// runs once more.
    pub(crate) fn write<T>(&self, mut body: impl FnMut(&Transaction<'_>) -> Result<T>) -> Result<T> {
        let mut connection = self.lock();
        let mut once = || {
            let transaction = connection.transaction()?;
            let value = body(&transaction)?;
            transaction.commit()?;
            Ok(value)
        };
        match once() {
            Err(error) if is_full(&error) && self.reserve.give_up() => once(),
            Ok(value) => {
                self.reserve.keep();
                Ok(value)
            }
            other => other,
        }
    }

    /// Leaves a copy of the whole catalog beside it, in place of the last one, if it is whole and has changed since that. Nobody has to
    /// wait for it.
    pub(crate) fn keep_copy(&self) -> Result<()> {
        let changes = self.lock().total_changes();
        let copy = copy_of(&self.path);
        if *self.copied.lock().unwrap_or_else(PoisonError::into_inner) == Some(changes) && copy.exists() {
            return Ok(());
        }
        let half = self.path.with_extension("db.copy.tmp");
        let made = self.make_copy(&copy, &half);
        match &made {
            Ok(()) => *self.copied.lock().unwrap_or_else(PoisonError::into_inner) = Some(changes),
            // Half a copy would take room for nothing.
            Err(_) => drop(std::fs::remove_file(&half)),
        }
        made
    }

    fn make_copy(&self, copy: &Path, half: &Path) -> Result<()> {
        let io = |error: std::io::Error| {
            Error::new(Code::Failed, format!("the copy of the catalog {} cannot be made", copy.display()))
                .because(error)
        };
        match std::fs::remove_file(half) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error)),
            _ => {}
        }
        // The last of a disk is for others.
        let folder = self.path.parent().unwrap_or(Path::new("."));
        let bytes = |path: &Path| std::fs::metadata(path).map_or(0, |meta| meta.len());
        let least = bytes(&self.path) + bytes(&self.path.with_extension("db-wal")) + self.reserve_lacks();
        let least = least + pages::left_to_others(folder).map_err(io)?;
        if crate::room::free(folder).map_err(io)? < least {
            return Err(Error::new(Code::NoSpace, "there is no room for a copy of the catalog"));
        }
        // A connection of its own: others work on meanwhile.
        let reader = Connection::open_with_flags(&self.path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        // Better an old copy than one of something damaged.
        if let Some(problem) = problems(&reader)?.first() {
            return Err(damaged(&self.path).because(problem.as_str()));
        }
        // Another file may lie there by now.
        let version: i64 = reader.pragma_query_value(None, "user_version", |row| row.get(0))?;
        if version != VERSION {
            return Err(damaged(&self.path).because(format!("its version is {version}")));
        }
        // Empty and ours alone: others may be let through the folder.
        let mut options = std::fs::File::options();
        std::os::unix::fs::OpenOptionsExt::mode(options.write(true).create_new(true), 0o600);
        options.open(half).map_err(io)?;
        reader.execute("VACUUM INTO ?1", [half.to_string_lossy()])?;
        // Whoever opens it in place of the catalog must know that it is older than what lies on the disk.
        let marked = Connection::open(half)?;
        marked.pragma_update(None, "application_id", IS_COPY)?;
        drop(marked);
        std::fs::File::open(half).and_then(|file| file.sync_all()).map_err(io)?;
        std::fs::rename(half, copy).map_err(io)?;
        std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(io)
    }

    /// True if this catalog is a copy that was put back, and is older than what lies beside it.
    pub(crate) fn is_old_copy(&self) -> Result<bool> {
        Ok(self.lock().pragma_query_value(None, "application_id", |row| row.get::<_, i64>(0))? == IS_COPY)
    }

    /// From now on it is the catalog.
    pub(crate) fn adopt_copy(&self) -> Result<()> {
        Ok(self.lock().pragma_update(None, "application_id", 0)?)
    }

    /// Bytes that have to stay free for the catalog.
    pub(crate) fn reserve_lacks(&self) -> u64 {
        self.reserve.lacks()
    }

    /// Makes room with what is kept for the catalog; false if nothing is.
    pub(crate) fn give_up_reserve(&self) -> bool {
        self.reserve.give_up()
    }

    /// SQLite's own check of the file; what it finds, line by line.
    pub(crate) fn check(&self) -> Result<Vec<String>> {
        problems(&self.lock())
    }
}

fn problems(connection: &Connection) -> Result<Vec<String>> {
    let mut query = connection.prepare("PRAGMA integrity_check(20)")?;
    let lines: Vec<String> = query.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    Ok(lines.into_iter().filter(|line| line != "ok").collect())
}

fn damaged(path: &Path) -> Error {
    Error::new(Code::Damaged, format!("the catalog {} is damaged", path.display()))
}

/// Connects to the database, sees that it is whole, and makes its tables if it is new.
fn connect(path: &Path) -> Result<Connection> {
    let broken = |error: rusqlite::Error| {
        Error::new(class(&error), format!("the catalog {} cannot be opened", path.display())).because(error)
    };
    let mut connection = Connection::open(path).map_err(broken)?;
    connection.busy_timeout(Duration::from_secs(5)).map_err(broken)?;
    // Before anything is written to it.
    let problem: String =
        connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(broken)?;
    if problem != "ok" {
        return Err(damaged(path).because(problem));
    }
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
        0 if copy_of(path).exists() => {
            return Err(Error::new(
                Code::Damaged,
                format!("the catalog {} is gone or empty", path.display()),
            ));
        }
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
                format!("the catalog {} has version {newer}; this Spinney knows {VERSION}", path.display()),
            )
            .hint("use the Spinney that wrote it, or a later one"));
        }
    }
    // Tables that an older Spinney does without.
    connection.execute_batch(include_str!("additions.sql")).map_err(broken)?;
    Ok(connection)
}

fn class(error: &rusqlite::Error) -> Code {
    match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => Code::NoSpace,
        Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => Code::Damaged,
        _ => Code::Failed,
    }
}

/// Where the copy of a catalog lies.
fn copy_of(path: &Path) -> PathBuf {
    path.with_extension("db.copy")
}

/// True if it was the catalog itself that had no room; another full disk is not helped by the reserve.
fn is_full(error: &Error) -> bool {
    let cause = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<rusqlite::Error>());
    cause.is_some_and(|cause| class(cause) == Code::NoSpace || may_be_full(cause))
}

/// SQLite calls some of what a full disk or a quota does an error of input and output.
fn may_be_full(error: &rusqlite::Error) -> bool {
    use rusqlite::ffi::{SQLITE_IOERR_FSYNC, SQLITE_IOERR_SHMSIZE, SQLITE_IOERR_WRITE};
    let codes = [SQLITE_IOERR_SHMSIZE, SQLITE_IOERR_WRITE, SQLITE_IOERR_FSYNC];
    error.sqlite_error().is_some_and(|error| codes.contains(&error.extended_code))
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        Self::new(class(&error), "the catalog cannot be read or written").because(error)
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
    let now = Timestamp::now().as_millisecond() + 1000 * crate::fault::clock_is_off_by();
    Timestamp::from_millisecond(now).unwrap_or(Timestamp::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first version's tables, as far as the upgrades touch them.
    const FIRST: &str = "CREATE TABLE targets (id TEXT PRIMARY KEY, power TEXT NOT NULL) STRICT;
        CREATE TABLE layers (id TEXT PRIMARY KEY) STRICT;
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

    #[test]
    fn a_copy_is_made_anew_when_something_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.db");
        let catalog = Catalog::open(&path).unwrap();
        let groups = || {
            let copy = Connection::open(copy_of(&path)).unwrap();
            copy.query_row("SELECT count(*) FROM groups", [], |row| row.get::<_, i64>(0)).unwrap()
        };
        catalog.keep_copy().unwrap();
        assert_eq!(groups(), 0);
        catalog.write(|tx| Ok(tx.execute("INSERT INTO groups VALUES ('a', 'a', 0, 0)", [])?)).unwrap();
        catalog.keep_copy().unwrap();
        assert_eq!(groups(), 1);
        let made = || std::fs::metadata(copy_of(&path)).unwrap().modified().unwrap();
        let before = made();
        catalog.keep_copy().unwrap();
        assert_eq!(made(), before, "nothing has changed");
        std::fs::remove_file(copy_of(&path)).unwrap();
        catalog.keep_copy().unwrap();
        assert_eq!(groups(), 1, "it was gone");
        // Somebody has put an empty file in its place.
        std::fs::remove_file(&path).unwrap();
        std::fs::File::create(&path).unwrap();
        catalog.write(|tx| Ok(tx.execute("INSERT INTO groups VALUES ('b', 'b', 0, 0)", [])?)).unwrap();
        assert_eq!(catalog.keep_copy().unwrap_err().code(), Code::Damaged);
        assert_eq!(groups(), 1);
    }
}
