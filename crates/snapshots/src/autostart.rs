//! Machines that start with the daemon (docs/decisions/0011-machines.md says which and why).

use std::fs;

use crate::catalog::TargetRow;
use crate::context::Context;
use crate::engine::Engine;
use crate::error::Result;
use crate::running::boot_id;
use crate::types::Power;

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
        Ok(rows.into_iter().filter(due).collect())
    }

    /// Starts the machines that are to start with the daemon. Not before that is done is the host's restart seen to: should we die
    /// meanwhile, the next daemon goes on.
    pub fn autostart(&self) {
        let due = self.to_autostart().unwrap_or_else(|error| {
            tracing::error!(%error, "autostart");
            Vec::new()
        });
        for row in due {
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
