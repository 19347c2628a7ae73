//! Letting a guest go on whose daemon does not.

use std::time::Duration;

use qemu::qmp::{Qmp, QmpError};
use qemu::save::{SaveError, settle};
use serde_json::json;

use crate::protocol::Watch;

/// How long QEMU may take to greet us on its second monitor.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// How long what has to be quick may take.
const QUICK: Duration = Duration::from_secs(1);

/// Breaks the machine's migration off, if there is one, and sees to it that the guest is as it was before.
///
/// `yank` first, out of band: it shuts the migration's socket from QEMU's monitor thread. In a machine whose main loop waits for
/// a reader that reads no more everything else would wait behind it.
pub(crate) fn rescue(watch: &Watch) -> Result<(), SaveError> {
    let qmp = Qmp::connect(&watch.monitor, true, CONNECT_LIMIT)?;
    let migration = json!({ "instances": [{ "type": "migration" }] });
    // Refused when there is no migration: then there is nothing to break off.
    tolerate(qmp.execute_oob("yank", migration, QUICK))?;
    tolerate(qmp.execute_within("migrate_cancel", json!({}), QUICK))?;
    settle(&qmp, if watch.running { "running" } else { "paused" })
}

/// A refusal or a late answer is no reason to give up; a monitor that is gone is.
fn tolerate<T>(result: Result<T, QmpError>) -> Result<(), QmpError> {
    match result {
        Err(error @ (QmpError::Closed { .. } | QmpError::Send { .. })) => Err(error),
        _ => Ok(()),
    }
}
