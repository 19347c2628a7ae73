//! The chains of a machine that runs are kept short: the layers deep below its disks are exchanged for the flat file that they have settled
//! into, without the guest noticing.
//!
//! ```text
//!   active overlay ─▶ l-C ─▶ l-B ─▶ l-A ...        blockdev-reopen of l-C with backing v-B        active overlay ─▶ l-C ─▶ v-B
//! ```
//! Both show the same bytes, so it does not matter when it is done, or whether it is done at all. The images' headers go on naming what
//! they were made over; every start gives the backing explicitly.

use std::collections::HashSet;

use qemu::command::Layer;
use serde_json::{Value, json};

use crate::catalog::{LayerRow, TargetRow};
use crate::context::Context;
use crate::disks::{OPEN_LIMIT, SHALLOW};
use crate::engine::Engine;
use crate::error::Result;
use crate::fault::{Fault, planted, step};
use crate::running::Running;

impl Engine {
    /// Shortens the chains of a machine that runs, for the holder of its lock, before another layer comes on top. What is not done for
    /// want of a view is no reason for anything to fail.
    pub(crate) fn shorten(&self, cx: &Context, target: &TargetRow, running: &Running) -> Result<()> {
        let disks = self.catalog.read(|tx| TargetRow::disks(tx, &target.id))?;
        let mut nodes = None;
        for (disk, top) in &disks {
            let chain = self.catalog.read(|tx| LayerRow::chain(tx, top))?;
            if chain.len() <= SHALLOW {
                continue;
            }
            let nodes = match &nodes {
                Some(nodes) => nodes,
                None => {
                    // What is below the top here may be written to: an overlay that could not be taken back lies over it.
                    self.check_active(target, running)?;
                    nodes.insert(open_nodes(running)?)
                }
            };
            let open = |row: &&LayerRow| nodes.contains(&format!("l-{}", row.id));
            let mut layers: Vec<&LayerRow> = chain.iter().filter(open).collect();
            if layers.len() <= SHALLOW {
                continue;
            }
            let mut fresh = Vec::new();
            // Before it is too much, somebody has to wait.
            if layers.len() + 2 > OPEN_LIMIT && self.can_view().is_ok() {
                self.settle_below(cx, target, &[(disk.clone(), top.clone())])?;
                fresh = self.catalog.read(|tx| LayerRow::chain(tx, top))?;
                layers = fresh.iter().filter(open).collect();
            }
            if let Err(error) = self.shorten_chain(running, &layers, nodes) {
                tracing::warn!(target = target.name, disk, %error, causes = ?error.causes(), "a chain stays long");
            }
            drop(fresh);
        }
        Ok(())
    }

    /// `layers` are those that QEMU has open, base first.
    fn shorten_chain(&self, running: &Running, layers: &[&LayerRow], nodes: &HashSet<String>) -> Result<()> {
        // The one above it is given another backing.
        let below_top = layers.len().saturating_sub(1);
        let Some(last) = layers.iter().take(below_top).rposition(|row| row.settled.is_some()) else {
            return Ok(());
        };
        let (Some(settled), Some(above)) = (layers.get(last), layers.get(last + 1)) else { return Ok(()) };
        let Some(flat) = self.flat_spec(settled) else { return Ok(()) };
        if last == 0 || planted(Fault::NeverShorten) {
            return Ok(());
        }
        let direct = self.direct_io(&above.group);
        running.qmp.execute("blockdev-add", flat.blockdev(None, false, direct))?;
        let is_active = last + 2 == layers.len();
        let options = self.layer_spec(above).reopened(&flat.node(), is_active, direct);
        let reopened = running.qmp.execute("blockdev-reopen", json!({ "options": [options] }));
        if let Err(error) = reopened {
            let _ = running.qmp.execute("blockdev-del", json!({ "node-name": flat.node() }));
            return Err(error.into());
        }
        step("shorten.reopened");
        // From the top down: each is the backing of the one above it.
        let flat_before = nodes.iter().filter(|node| node.starts_with("v-") && **node != flat.node());
        let old = layers.iter().take(last + 1).rev().map(|row| Layer::node(&self.layer_spec(row)));
        for node in old.chain(flat_before.cloned()) {
            // Those of other disks are in use, and stay.
            if let Err(error) = running.qmp.execute("blockdev-del", json!({ "node-name": node })) {
                tracing::debug!(node, %error, "a node stays");
            }
        }
        Ok(())
    }
}

/// Names of all block nodes that QEMU has.
fn open_nodes(running: &Running) -> Result<HashSet<String>> {
    let nodes = running.qmp.execute("query-named-block-nodes", json!({ "flat": true }))?;
    let name = |node: &Value| node.get("node-name")?.as_str().map(str::to_owned);
    Ok(nodes.as_array().into_iter().flatten().filter_map(name).collect())
}
