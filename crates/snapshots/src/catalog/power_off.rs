//! What is still to be done with machines that were powered off, or why it was not done.

use rusqlite::{Transaction, params};

use super::{TargetRow, one, to_json};
use crate::config::OnPowerOff;
use crate::error::Result;
use crate::types::Power;

/// Why nothing is done with a machine whose settings say `ask`.
const NOBODY_ASKED: &str = "nobody has said what is to be done with it";

/// What became of that which a machine's settings say of its power-off. There is nothing of it when that is done, or something else
/// has happened to the machine's power.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AtPowerOff {
    /// It is still to be done.
    Due,
    /// The machine was left as it is, and why.
    Left(String),
}

impl AtPowerOff {
    /// Why the machine was left as it is, if it was.
    pub(crate) fn why(self) -> Option<String> {
        match self {
            Self::Due => None,
            Self::Left(why) => Some(why),
        }
    }

    /// That of one machine.
    pub(crate) fn of(tx: &Transaction<'_>, target: &str) -> Result<Option<Self>> {
        // A Spinney that does not know the table may have started it since.
        let sql = "SELECT p.why FROM powered_off p JOIN targets t ON t.id = p.target
                    WHERE p.target = ?1 AND t.power = ?2";
        let off = to_json(&Power::Off)?;
        let why = one(tx.query_row(sql, params![target, off], |row| row.get::<_, Option<String>>(0)))?;
        Ok(why.map(|why| why.map_or(Self::Due, Self::Left)))
    }

    /// Machines with something to be done.
    pub(crate) fn due(tx: &Transaction<'_>) -> Result<Vec<TargetRow>> {
        let mut query = tx.prepare(
            "SELECT p.target FROM powered_off p JOIN targets t ON t.id = p.target
              WHERE p.why IS NULL AND t.removed IS NULL AND t.power = ?1 ORDER BY t.name",
        )?;
        let ids = query.query_map([to_json(&Power::Off)?], |row| row.get::<_, String>(0))?;
        let ids = ids.collect::<rusqlite::Result<Vec<_>>>()?;
        ids.iter().map(|id| TargetRow::by_id(tx, id)).collect()
    }

    /// Writes that what was due is not done, and why. False if nothing was.
    pub(crate) fn leave(tx: &Transaction<'_>, target: &str, why: &str) -> Result<bool> {
        let sql = "UPDATE powered_off SET why = ?2 WHERE target = ?1 AND why IS NULL";
        Ok(tx.execute(sql, [target, why])? > 0)
    }

    /// It is done, or no longer to be done.
    pub(crate) fn end(tx: &Transaction<'_>, target: &str) -> Result<()> {
        tx.execute("DELETE FROM powered_off WHERE target = ?1", [target])?;
        Ok(())
    }

    /// The same for all machines.
    pub(crate) fn end_all(tx: &Transaction<'_>) -> Result<()> {
        tx.execute("DELETE FROM powered_off", [])?;
        Ok(())
    }

    /// A snapshot of the machine has been taken: that is what was due if it is `ours`, and else it was left long enough.
    pub(crate) fn taken(tx: &Transaction<'_>, target: &str, ours: bool) -> Result<()> {
        let sql = "DELETE FROM powered_off WHERE target = ?1 AND (why IS NOT NULL OR ?2)";
        tx.execute(sql, params![target, ours])?;
        Ok(())
    }

    fn write(tx: &Transaction<'_>, target: &str, why: Option<&str>) -> Result<()> {
        tx.execute(
            "INSERT INTO powered_off (target, why) VALUES (?1, ?2)
             ON CONFLICT (target) DO UPDATE SET why = excluded.why",
            params![target, why],
        )?;
        Ok(())
    }
}

impl TargetRow {
    /// Has no process any more: it has ended, and not for something else of ours. If it was powered off, what its settings say of that
    /// is due from now on.
    pub(crate) fn set_ended(tx: &Transaction<'_>, id: &str, power: Power) -> Result<()> {
        Self::set_process(tx, id, power, None)?;
        if power != Power::Off {
            return Ok(());
        }
        match Self::by_id(tx, id)?.config.on_poweroff {
            OnPowerOff::Nothing => Ok(()),
            OnPowerOff::Ask => AtPowerOff::write(tx, id, Some(NOBODY_ASKED)),
            OnPowerOff::Back | OnPowerOff::Take => AtPowerOff::write(tx, id, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Catalog, DEFAULT_GROUP};
    use super::*;
    use crate::config::MachineConfig;

    /// A catalog with a machine of this setting.
    fn machine(folder: &tempfile::TempDir, on_poweroff: OnPowerOff) -> (Catalog, String) {
        let catalog = Catalog::open(&folder.path().join("catalog.db")).unwrap();
        let group = catalog.groups("0", 0).unwrap().remove(0);
        let config = MachineConfig { on_poweroff, ..MachineConfig::bare(64 << 20) };
        let row = TargetRow::new("m".into(), "m", (&group.id, DEFAULT_GROUP), "pc", config);
        catalog.write(|tx| row.insert(tx)).unwrap();
        (catalog, row.id)
    }

    fn after(on_poweroff: OnPowerOff, power: Power) -> Option<AtPowerOff> {
        let folder = tempfile::tempdir().unwrap();
        let (catalog, id) = machine(&folder, on_poweroff);
        catalog.write(|tx| TargetRow::set_ended(tx, &id, power)).unwrap();
        catalog.read(|tx| AtPowerOff::of(tx, &id)).unwrap()
    }

    #[test]
    fn only_what_was_powered_off_has_something_due() {
        assert_eq!(after(OnPowerOff::Nothing, Power::Off), None);
        assert_eq!(after(OnPowerOff::Back, Power::Off), Some(AtPowerOff::Due));
        assert_eq!(after(OnPowerOff::Take, Power::Off), Some(AtPowerOff::Due));
        assert_eq!(after(OnPowerOff::Ask, Power::Off), Some(AtPowerOff::Left(NOBODY_ASKED.into())));
        for word in [OnPowerOff::Back, OnPowerOff::Take, OnPowerOff::Ask] {
            assert_eq!(after(word, Power::LostPower), None, "{word}");
        }
    }

    #[test]
    fn it_is_due_until_it_is_done_or_left_or_the_power_changes() {
        let folder = tempfile::tempdir().unwrap();
        let (catalog, id) = machine(&folder, OnPowerOff::Take);
        let due = || catalog.read(AtPowerOff::due).unwrap().len();
        let off = || catalog.write(|tx| TargetRow::set_ended(tx, &id, Power::Off)).unwrap();
        assert_eq!(due(), 0);
        off();
        assert_eq!(due(), 1);
        let leave = |why| catalog.write(|tx| AtPowerOff::leave(tx, &id, why)).unwrap();
        assert!(leave("no room") && !leave("again"));
        assert_eq!(due(), 0);
        assert_eq!(
            catalog.read(|tx| AtPowerOff::of(tx, &id)).unwrap(),
            Some(AtPowerOff::Left("no room".into()))
        );
        off();
        catalog.write(|tx| AtPowerOff::end(tx, &id)).unwrap();
        assert_eq!(due(), 0);
        off();
        catalog.write(|tx| TargetRow::set_process(tx, &id, Power::LostPower, None)).unwrap();
        assert_eq!(catalog.read(|tx| AtPowerOff::of(tx, &id)).unwrap(), None);
        off();
        catalog.write(|tx| TargetRow::set_removed(tx, &id, Some(super::super::now()))).unwrap();
        assert_eq!(due(), 0, "what was removed is left alone");
    }
}
