//! Guests that QEMU has stopped because a write of theirs found no room on the host.
//!
//! Such a guest has lost nothing: QEMU keeps the write and repeats it when the guest goes on. So it is shown as paused, with the
//! reason, and goes on by itself when there is room again ([decision 12](../../../docs/decisions/0012-full-disk.md)).

use std::time::Duration;

use qemu::save::run_state;
use serde_json::{Value, json};

use crate::catalog::TargetRow;
use crate::engine::Engine;
use crate::error::{Code, Error, MAKE_ROOM, Result};
use crate::room::free;
use crate::running::Running;
use crate::types::Power;

/// QEMU's word for a guest that stands still because of its disk.
const IO_ERROR: &str = "io-error";
/// Room that there has to be before a guest goes on by itself: enough that it is not stopped by its next few writes.
const ENOUGH: u64 = 32 << 20;
/// How long looking may take.
const LOOK_LIMIT: Duration = Duration::from_secs(2);

impl Engine {
    /// Why QEMU has stopped this guest, in words; none if it has not, or if it was we who did.
    pub(crate) fn why_stopped(&self, running: &Running) -> Option<String> {
        let answer = running.qmp.execute_within("query-status", json!({}), LOOK_LIMIT).ok()?;
        if answer.get("status").and_then(Value::as_str) != Some(IO_ERROR) {
            return None;
        }
        Some(match full_disks(running).as_slice() {
            [] => "a write to its disk failed on the host".to_owned(),
            disks => format!("{} has no room on the host", disks.join(", ")),
        })
    }

    /// Fails if the guest stands still for want of room: nothing can be taken of it that would be worth having.
    pub(crate) fn check_not_full(&self, row: &TargetRow, running: Option<&Running>) -> Result<()> {
        match running.and_then(|running| self.why_stopped(running)) {
            None => Ok(()),
            Some(why) => Err(stands_still(&row.name, why)),
        }
    }

    /// Refuses to let a guest go on that would be stopped again at once, before the journal is written to.
    pub(crate) fn check_can_go_on(&self, row: &TargetRow, running: &Running) -> Result<()> {
        match self.why_stopped(running) {
            Some(why) => self.check_room(0).map_err(|error| stands_still(&row.name, why).because(error)),
            None => Ok(()),
        }
    }

    /// Lets every guest go on that was stopped for want of room and has some now. Called every now and then.
    pub fn let_full_disks_go_on(&self) {
        let all: Vec<_> =
            self.running_map().iter().map(|(id, running)| (id.clone(), running.clone())).collect();
        for (id, running) in all {
            if !matches!(run_state(&running.qmp).as_deref(), Ok(IO_ERROR)) {
                continue;
            }
            let room = free(self.state()).unwrap_or(0);
            if room < ENOUGH + self.catalog.reserve_lacks() {
                continue;
            }
            // Whoever is at work with it sees to it himself.
            let Some(_guard) = self.locks.try_acquire(&id, "resume") else { continue };
            // Somebody may have paused it, before or meanwhile; and room helps only one that lacks room.
            let paused = self.catalog.read(|tx| Ok(TargetRow::by_id(tx, &id)?.power == Power::Paused));
            let still = matches!(run_state(&running.qmp).as_deref(), Ok(IO_ERROR));
            if paused.unwrap_or(true) || !still || full_disks(&running).is_empty() {
                continue;
            }
            let went = running.qmp.execute("cont", json!({}));
            tracing::warn!(
                run = running.row.run,
                room,
                ok = went.is_ok(),
                "a guest that had no room goes on"
            );
        }
    }
}

/// Disks whose last write found no room.
fn full_disks(running: &Running) -> Vec<String> {
    let devices = running.qmp.execute_within("query-block", json!({}), LOOK_LIMIT).unwrap_or_default();
    let full = |device: &Value| {
        let path = device.get("qdev")?.as_str()?;
        let nospace = device.get("io-status").and_then(Value::as_str) == Some("nospace");
        let disk = path.split('/').find(|part| part.starts_with("disk")).unwrap_or(path);
        nospace.then(|| disk.to_owned())
    };
    devices.as_array().into_iter().flatten().filter_map(full).collect()
}

fn stands_still(name: &str, why: String) -> Error {
    Error::new(Code::NoSpace, format!("{name} stands still: {why}"))
        .hint(format!("{MAKE_ROOM}. The guest has lost nothing, and goes on by itself when there is room"))
}
