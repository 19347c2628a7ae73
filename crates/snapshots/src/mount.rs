//! `mount`: every snapshot of a group as a folder of plain files, for people.
//!
//! The group's view has them from its beginning; here it is told their names. From the first `mount` on they are kept up to date: after
//! every operation, and when a disk has settled, what has changed is listed. A snapshot whose disks have not settled has no files for
//! them yet.

use std::collections::HashMap;
use std::path::PathBuf;

use snapfs::list::{Content, Listed, ListedFile};
use snapfs::view::View;

use crate::catalog::{LayerRow, SnapshotRow};
use crate::context::Context;
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::fault::step;
use crate::groups::OpenGroup;
use crate::id::random_number;
use crate::tree::view;
use crate::types::Mounted;

/// In a view's folder: its snapshots are listed.
const SHOWN: &str = "shown";

/// What is listed in a view, to tell what has changed.
pub(crate) type Listing = HashMap<String, Listed>;

impl Engine {
    /// Has the snapshots of a group shown as folders of plain files. Returns where.
    pub fn mount(&self, cx: &Context, group: Option<&str>) -> Result<Mounted> {
        let group = self.named_group(group)?;
        let view = self.view_of(&group)?;
        {
            // A layer that is hashed may not be about to go.
            let _alone = self.housekeep(cx)?;
            step("mount.begun");
            cx.phase("settling disks", 0);
            let settled = self.hash_layers(&group, &|| cx.check().is_ok());
            settled.and_then(|()| self.settle_layers(&group, &|| cx.check().is_ok()))?;
        }
        cx.check()?;
        let mark = view.folder().join(SHOWN);
        std::fs::write(&mark, "").map_err(|error| {
            Error::new(Code::Failed, format!("{} cannot be written", mark.display())).because(error)
        })?;
        self.list_in(&group, &view)?;
        Ok(Mounted { path: view.mount_point().to_owned(), group: group.row.name.clone() })
    }

    /// Lists what has changed in the views that are shown. What fails is told and tried again with the next change.
    pub(crate) fn list_changes(&self) {
        for group in self.groups.all() {
            if !self.view_folder(&group.row.id).join(SHOWN).exists() {
                continue;
            }
            // After the daemon's end it may have to be opened again.
            let listed = self.view_of(&group).and_then(|view| self.list_in(&group, &view));
            if let Err(error) = listed {
                tracing::warn!(group = group.row.name, %error, causes = ?error.causes(), "snapshots are not listed");
            }
        }
    }

    fn list_in(&self, group: &OpenGroup, view: &View) -> Result<()> {
        let all = self.listed(group)?;
        self.views.with_listing(&group.row.id, |before| {
            let changed: Vec<Listed> =
                all.values().filter(|one| before.get(&one.id) != Some(one)).cloned().collect();
            let gone: Vec<String> = before.keys().filter(|id| !all.contains_key(*id)).cloned().collect();
            if !changed.is_empty() || !gone.is_empty() {
                let again = || (random_number(), all.values().cloned().collect());
                view.list(&changed, &gone, again).map_err(|error| {
                    Error::new(Code::Failed, "the list of snapshots cannot be written").because(error)
                })?;
            }
            *before = all;
            Ok(())
        })
    }

    /// The snapshots of a group as people see them.
    fn listed(&self, group: &OpenGroup) -> Result<Listing> {
        self.catalog.read(|tx| {
            let mut all = Listing::new();
            let removed: Vec<String> = crate::catalog::TargetRow::of_group(tx, &group.row.id)?
                .into_iter()
                .filter(|target| target.removed.is_some())
                .map(|target| target.id)
                .collect();
            for row in SnapshotRow::of_group(tx, &group.row.id)? {
                if row.removed.is_some() || row.undo_point || removed.contains(&row.target) {
                    continue;
                }
                let shown = serde_json::to_string_pretty(&view(tx, &row)?).unwrap_or_default();
                let mut files = vec![file("snapshot.json", Content::Text(shown + "\n"))];
                if let Some(memory) = &row.memory {
                    let ram = memory.blocks.iter().find(|(name, _)| name == qemu::command::RAM_ID);
                    if let Some((_, root)) = ram {
                        files.push(file("ram", Content::Map { root: *root, bytes: row.config.memory }));
                    }
                    files.push(file(
                        "device-state",
                        Content::Map { root: memory.state, bytes: memory.state_bytes },
                    ));
                    if let Some((root, bytes)) = memory.screen {
                        files.push(file("screen.png", Content::Map { root, bytes }));
                    }
                }
                for (disk, layer) in SnapshotRow::disks(tx, &row.id)? {
                    let layer = LayerRow::by_id(tx, &layer)?;
                    if let Some(root) = layer.settled {
                        files.push(file(&format!("{disk}.raw"), Content::Map { root, bytes: layer.size }));
                    }
                }
                let one = Listed {
                    id: row.id.clone(),
                    target: row.target_name,
                    name: row.name,
                    time: row.created.as_second(),
                    files,
                };
                all.insert(row.id, one);
            }
            Ok(all)
        })
    }
}

fn file(name: &str, content: Content) -> ListedFile {
    ListedFile { name: name.into(), content }
}

/// The screen of a machine, as a picture; none if it has none, or it cannot be had: nothing depends on it.
pub(crate) fn screen(running: &crate::running::Running) -> Option<Vec<u8>> {
    let path: PathBuf = running.run.screen();
    let arguments = serde_json::json!({ "filename": path, "format": "png" });
    let made = running.qmp.execute("screendump", arguments);
    let made = made.inspect_err(|error| tracing::debug!(%error, "no picture of the screen")).ok();
    let bytes = made.map(|_| crate::owner::read_of_others(&path));
    let _ = std::fs::remove_file(&path);
    bytes.filter(|bytes| bytes.starts_with(b"\x89PNG") && bytes.len() < 64 << 20)
}
