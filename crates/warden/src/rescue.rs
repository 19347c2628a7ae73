//! Letting a guest go on whose daemon does not.

use std::thread;
use std::time::Duration;

use qemu::qmp::{Qmp, QmpError};
use qemu::save::{SaveError, settle};
use serde_json::json;

use crate::protocol::Watch;

/// How long QEMU may take to let us in on its second monitor, and again to greet us, before a guest stands still. It serves one client: the
/// warden of a daemon that died may still be at it, on a busy host for seconds.
pub(crate) const ARMING_LIMIT: Duration = Duration::from_secs(5);
/// The same for a guest that may stand still by now: then it is tried again.
pub(crate) const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// How often it is tried.
const ATTEMPTS: u32 = 5;
/// How long what has to be quick may take.
const QUICK: Duration = Duration::from_secs(1);

/// The second monitor of a guest.
pub(crate) fn connect(watch: &Watch, limit: Duration) -> Result<Qmp, QmpError> {
    Qmp::connect(&watch.monitor, true, limit)
}

/// Breaks the machine's migration off, if there is one, and sees to it that the guest is as it was before.
///
/// `yank` first, out of band: it shuts the migration's socket from QEMU's monitor thread. In a machine whose main loop waits for
/// a reader that reads no more everything else would wait behind it, the greeting of a new connection too.
///
/// A host that is too busy for QEMU to answer in time is asked again.
pub(crate) fn rescue(watch: &Watch, monitor: Option<Qmp>) -> Result<(), SaveError> {
    let mut done = monitor
        .map_or_else(|| connect(watch, CONNECT_LIMIT), Ok)
        .map_err(Into::into)
        .and_then(|qmp| release(watch, &qmp));
    for _ in 1..ATTEMPTS {
        let Err(error) = &done else { break };
        tracing::warn!(%error, monitor = %watch.monitor.display(), "once more");
        thread::sleep(QUICK);
        done = connect(watch, CONNECT_LIMIT).map_err(Into::into).and_then(|qmp| release(watch, &qmp));
    }
    done
}

fn release(watch: &Watch, qmp: &Qmp) -> Result<(), SaveError> {
    let migration = json!({ "instances": [{ "type": "migration" }] });
    // Refused when there is no migration: then there is nothing to break off.
    tolerate(qmp.execute_oob("yank", migration, QUICK))?;
    tolerate(qmp.execute_within("migrate_cancel", json!({}), QUICK))?;
    if watch.running {
        // Behind a `stop` that QEMU is still at, settling could come too early.
        tolerate(qmp.execute_within("cont", json!({}), QUICK))?;
    }
    settle(qmp, if watch.running { "running" } else { "paused" })
}

/// A refusal or a late answer is no reason to give up; a monitor that is gone is.
fn tolerate<T>(result: Result<T, QmpError>) -> Result<(), QmpError> {
    match result {
        Err(error @ (QmpError::Closed { .. } | QmpError::Send { .. })) => Err(error),
        _ => Ok(()),
    }
}
