//! Whether the host's clock has jumped: what is kept for some days must not go because somebody set the clock.

use std::fs;

use jiff::Timestamp;
use rusqlite::{Transaction, params};

use super::{now, one};
use crate::error::Result;
use crate::fault::{Fault, planted};
use crate::running::boot_id;

/// Clocks that drift apart by more between two looks have not drifted: one was set.
const JUMP_MS: i64 = 10 * 60 * 1000;
/// A host that was off for longer may as well have a clock that is wrong: nobody can tell. A weekend is shorter.
const OFF_MS: i64 = 6 * 24 * 3600 * 1000;

/// Looks at the clocks and remembers what they say. Returns when the host's clock was last seen to jump, by its own new time; none
/// if it never was. Ages are to be trusted only as far as they lie behind that.
pub(crate) fn last_jump(tx: &Transaction<'_>) -> Result<Option<Timestamp>> {
    let (wall, uptime, boot) = (now().as_millisecond(), uptime(), boot_id());
    type Row = (i64, i64, String, Option<i64>);
    let sql = "SELECT wall, uptime, boot, jumped FROM clock";
    let seen: Option<Row> =
        one(tx.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))))?;
    let jumped = match seen {
        None => None,
        Some((then, then_up, ref then_boot, _)) if *then_boot == boot => {
            let off = (wall - then).saturating_sub(uptime - then_up);
            (off.abs() > JUMP_MS).then_some(wall)
        }
        Some((then, _, _, _)) => {
            // From the last look to this boot.
            let off = wall - uptime - then;
            (wall < then || off > OFF_MS).then_some(wall)
        }
    }
    .or(seen.as_ref().and_then(|(_, _, _, jumped)| *jumped))
    .filter(|_| !planted(Fault::TrustClock));
    tx.execute(
        "INSERT INTO clock (one, wall, uptime, boot, jumped) VALUES (1, ?1, ?2, ?3, ?4)
         ON CONFLICT (one) DO UPDATE SET wall = ?1, uptime = ?2, boot = ?3, jumped = ?4",
        params![wall, uptime, boot, jumped],
    )?;
    Ok(jumped.map(|at| Timestamp::from_millisecond(at).unwrap_or(Timestamp::MAX)))
}

/// When the clock was last seen to jump, as last looked at, in milliseconds.
pub(crate) fn known_jump(tx: &Transaction<'_>) -> Result<Option<i64>> {
    Ok(one(tx.query_row("SELECT jumped FROM clock", [], |row| row.get(0)))?.flatten())
}

/// Milliseconds since the host's boot, sleep included. Nobody can set it.
fn uptime() -> i64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = text.split(' ').next().and_then(|word| word.parse::<f64>().ok()).unwrap_or(0.0);
    (seconds * 1000.0) as i64
}
