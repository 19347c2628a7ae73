//! Machines that start with the daemon (docs/decisions/0011-machines.md says which and why).

use std::fs;

use crate::catalog::TargetRow;
use crate::context::Context;
use crate::engine::Engine;
use crate::error::Result;
use crate::running::boot_id;
use crate::types::Power;
use crate::undo_point::brought_back_by;

/// File in the state folder with the host's boot id when machines were last started.
const BOOT_FILE: &str = "boot";

impl Engine {
    /// Machines that are to start now: those that lost their power, and after a restart of the host all that are not on.
    pub(crate) fn to_autostart(&self) -> Result<Vec<TargetRow>> {
        let known = fs::read_to_string(self.state().join(BOOT_FILE)).unwrap_or_default();
        let restarted = known.trim() != boot_id();
        let due = |row: &TargetRow| {
            let was_on = row.power == Power::LostPower;
            row.config.autostart && row.process.is_none() && (was_on || restarted)
        };
        let rows = self.catalog.read(|tx| TargetRow::all(tx, false))?;
        rows.into_iter().filter(due).filter_map(|row| self.is_let(row).transpose()).collect()
    }

    /// The machine, unless it is one that an undo point would bring back as it was: booted, it would not be that any more.
    fn is_let(&self, row: TargetRow) -> Result<Option<TargetRow>> {
        let back = self.catalog.read(|tx| brought_back_by(tx, &row.id))?;
        Ok((row.power != Power::LostPower || back.is_none()).then_some(row))
    }

    fn still_due(&self, row: &TargetRow) -> Result<bool> {
        let now = self.catalog.read(|tx| TargetRow::by_id(tx, &row.id))?;
        Ok(now.power == row.power
            && now.parent == row.parent
            && now.process.is_none()
            && now.config.autostart)
    }

    /// Starts the machines that are to start with the daemon. Not before that is done is the host's restart seen to: should we die
    /// meanwhile, the next daemon goes on.
    pub fn autostart(&self) {
        let due = self.to_autostart().unwrap_or_else(|error| {
            tracing::error!(%error, "autostart");
            Vec::new()
        });
        for row in due {
            // Somebody may have been quicker.
            if !self.still_due(&row).unwrap_or(false) {
                continue;
            }
            match self.start(&Context::new(), &row.name) {
                Ok(_) => tracing::info!(machine = row.name, "autostart"),
                Err(error) => {
                    tracing::warn!(machine = row.name, %error, causes = ?error.causes(), "no autostart");
                }
            }
        }
        if let Err(error) = fs::write(self.state().join(BOOT_FILE), boot_id()) {
            tracing::warn!(%error, "the host's boot id cannot be written down");
        }
    }
}
