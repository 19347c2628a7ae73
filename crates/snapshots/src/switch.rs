//! The disks of a running machine: which layer each writes to, and going over to overlays in one step of QEMU's.

use qemu::command::device_of;
use serde_json::json;

use crate::catalog::{LayerRow, TargetRow};
use crate::disks::NewOverlay;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::{Fault, planted, step};
use crate::running::Running;
use crate::take::point_here_at;

impl Engine {
    /// Sees to it that every disk's device writes to the layer that the catalog calls here's. An overlay over any other would
    /// belong to nothing.
    pub(crate) fn check_active(&self, target: &TargetRow, running: &Running) -> Result<()> {
        // This would find that fault before the checks inside the guest can, and it is them that the fault is for.
        if planted(Fault::SwitchNoDisk) {
            return Ok(());
        }
        for (disk, layer) in self.catalog.read(|tx| TargetRow::disks(tx, &target.id))? {
            let active = active_node(running, &disk)?;
            if active.is_some_and(|node| node != format!("l-{layer}")) {
                return Err(Error::new(
                    Code::Failed,
                    format!("{disk} of {} writes to another layer than the catalog says", target.name),
                )
                .hint("`spinney serve --stop`: the next command starts a daemon that puts it in order"));
            }
        }
        Ok(())
    }

    /// Opens overlays in QEMU, and has every start use them from now on: all is ready for the switch. On an error nothing of them is left.
    pub(crate) fn announce_overlays(
        &self,
        target: &TargetRow,
        running: &Running,
        overlays: &[NewOverlay],
    ) -> Result<()> {
        self.check_active(target, running).inspect_err(|_| self.remove_overlays(overlays))?;
        let announced = self.add_overlay_nodes(running, overlays).and_then(|()| {
            step("take.opened");
            self.catalog.write(|tx| point_here_at(tx, &target.id, overlays))
        });
        announced.inspect_err(|_| self.take_back_overlays(&target.id, running, overlays))?;
        step("take.announced");
        Ok(())
    }

    /// Opens the overlays in QEMU, not yet in use.
    pub(crate) fn add_overlay_nodes(&self, running: &Running, overlays: &[NewOverlay]) -> Result<()> {
        let Some(first) = overlays.first() else { return Ok(()) };
        let direct = self.direct_io(&first.row.group);
        for new in overlays {
            running.qmp.execute("blockdev-add", self.layer_spec(&new.row).blockdev(None, true, direct))?;
        }
        Ok(())
    }

    /// Undoes step 3 if QEMU still writes to the layers below; else leaves everything: empty overlays harm nothing.
    pub(crate) fn take_back_overlays(&self, target: &str, running: &Running, overlays: &[NewOverlay]) {
        if planted(Fault::LeaveOverlays) {
            return;
        }
        for new in overlays {
            if let Err(error) = self.take_back_overlay(target, running, &new.disk, &new.row, &new.below.id) {
                tracing::warn!(%error, disk = new.disk, "an overlay of a take that was rolled back stays in use");
            }
        }
    }

    /// Takes one overlay back, unless the guest writes to it.
    pub(crate) fn take_back_overlay(
        &self,
        target: &str,
        running: &Running,
        disk: &str,
        overlay: &LayerRow,
        below: &str,
    ) -> Result<()> {
        let node = format!("l-{}", overlay.id);
        // Only where the guest writes to the layer below: with a catalog that is a copy of an earlier time, it may be further on.
        if active_node(running, disk)?.is_none_or(|active| active != format!("l-{below}")) {
            return Ok(());
        }
        self.catalog.write(|tx| {
            let here = TargetRow::disks(tx, target)?;
            if here.iter().any(|(d, layer)| d == disk && *layer == overlay.id) {
                TargetRow::set_disk(tx, target, disk, below)?;
                // Were it settled, a start would read it as it was then.
                LayerRow::thaw(tx, below)?;
                LayerRow::purge(tx, &overlay.id)?;
            }
            Ok(())
        })?;
        step("take.taken-back");
        let _ = running.qmp.execute("blockdev-del", json!({ "node-name": node }));
        crate::disks::remove_file(&self.layer_file(overlay));
        Ok(())
    }
}

/// Puts all overlays over their layers in one transaction of QEMU's: all disks or none.
pub(crate) fn switch_disks(running: &Running, overlays: &[NewOverlay]) -> Result<()> {
    if overlays.is_empty() || planted(Fault::SwitchNoDisk) {
        return Ok(());
    }
    let actions: Vec<_> = overlays
        .iter()
        .map(|new| {
            let data =
                json!({ "node": format!("l-{}", new.below.id), "overlay": format!("l-{}", new.row.id) });
            json!({ "type": "blockdev-snapshot", "data": data })
        })
        .collect();
    running.qmp.execute("transaction", json!({ "actions": actions }))?;
    Ok(())
}

/// The node that a disk's device writes to.
fn active_node(running: &Running, disk: &str) -> Result<Option<String>> {
    let devices = running.qmp.execute("query-block", json!({}))?;
    let node = devices.as_array().into_iter().flatten().find_map(|device| {
        let path = device.get("qdev")?.as_str()?;
        let ours = path.split('/').any(|part| part == device_of(disk));
        ours.then(|| device.get("inserted")?.get("node-name")?.as_str().map(str::to_owned)).flatten()
    });
    Ok(node)
}
