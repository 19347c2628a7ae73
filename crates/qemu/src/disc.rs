//! The disc in a machine's CD drive, changed while it runs.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::qmp::{Qmp, QmpError};

/// Id of the drive.
pub const DRIVE: &str = "cd0";
/// Node of the disc that a machine starts with; a change takes turns with [`SECOND_NODE`].
pub(crate) const FIRST_NODE: &str = "cd0-a";
const SECOND_NODE: &str = "cd0-b";

/// Options for `-blockdev` and `blockdev-add`.
pub(crate) fn blockdev(node: &str, image: &Path, direct: bool) -> Value {
    let cache = json!({ "direct": direct, "no-flush": false });
    let file = json!({ "driver": "file", "filename": image, "read-only": true, "cache": cache });
    json!({ "driver": "raw", "node-name": node, "read-only": true, "cache": cache, "file": file })
}

/// The node and the image in the drive; none if it is empty, or if there is no drive.
fn inserted(qmp: &Qmp) -> Result<Option<(String, PathBuf)>, QmpError> {
    let devices = qmp.execute("query-block", json!({}))?;
    let disc = devices.as_array().into_iter().flatten().find_map(|device| {
        let path = device.get("qdev")?.as_str()?;
        let ours = path.split('/').any(|part| part == DRIVE);
        let inserted = device.get("inserted").filter(|_| ours)?;
        let file = inserted.get("image")?.get("filename")?.as_str()?;
        Some((inserted.get("node-name")?.as_str()?.to_owned(), PathBuf::from(file)))
    });
    Ok(disc)
}

/// Has this image in the drive, or none, as if somebody had pressed the button: a lock of the guest's does not keep it. An image
/// that is in the drive already is left alone, unless it is to be opened `again`: there may be another file by that name now. If the
/// new one cannot be opened the old one stays.
pub fn change(qmp: &Qmp, image: Option<&Path>, direct: bool, again: bool) -> Result<(), QmpError> {
    let old = inserted(qmp)?;
    let same = old.as_ref().map(|(_, file)| file.as_path()) == image;
    if same && !(again && image.is_some()) {
        return Ok(());
    }
    let node = match &old {
        Some((node, _)) if node == FIRST_NODE => SECOND_NODE,
        _ => FIRST_NODE,
    };
    if let Some(image) = image {
        qmp.execute("blockdev-add", blockdev(node, image, direct))?;
    }
    let changed = exchange(qmp, old.as_ref().map(|(node, _)| node.as_str()), image.map(|_| node));
    if changed.is_err() && image.is_some() {
        let _ = qmp.execute("blockdev-del", json!({ "node-name": node }));
    }
    changed
}

fn exchange(qmp: &Qmp, old: Option<&str>, new: Option<&str>) -> Result<(), QmpError> {
    // Without `force` QEMU only asks the guest, and says so with an error.
    qmp.execute("blockdev-open-tray", json!({ "id": DRIVE, "force": true }))?;
    if let Some(old) = old {
        qmp.execute("blockdev-remove-medium", json!({ "id": DRIVE }))?;
        qmp.execute("blockdev-del", json!({ "node-name": old }))?;
    }
    if let Some(new) = new {
        qmp.execute("blockdev-insert-medium", json!({ "id": DRIVE, "node-name": new }))?;
    }
    qmp.execute("blockdev-close-tray", json!({ "id": DRIVE })).map(drop)
}
