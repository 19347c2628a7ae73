//! What of a tree is compared: names, what hangs where, and what here comes from.

use std::fmt;

use serde_json::Value;

use crate::harness::Spinney;
use crate::walk::Violation;

/// The name that stands for any undo point.
pub(super) const UNDO_POINT: &str = "(undo point)";

/// A machine and its tree; all empty if there is no machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct View {
    pub(super) machine: String,
    pub(super) here: String,
    /// Each with its parent's name, in order.
    pub(super) snapshots: Vec<(String, String)>,
    /// Names of machines that were made of it.
    pub(super) clones: Vec<String>,
}

impl View {
    /// The tree of the machine, and the names of its undo points. Clones come after it by their names.
    pub(super) fn read(spinney: &Spinney) -> Result<(Self, Vec<String>), Violation> {
        let machines = spinney.ok("ls")?;
        let names = machines["machines"].as_array().into_iter().flatten();
        let mut names = names.filter_map(|machine| machine["name"].as_str().map(str::to_owned));
        let Some(name) = names.next() else { return Ok((Self::default(), Vec::new())) };
        let clones = names.collect();
        let tree = spinney.ok(&format!("tree {name}"))?;
        let list = tree["snapshots"].as_array().cloned().unwrap_or_default();
        let shown = |snapshot: &Value| match &snapshot["undo_point"] {
            Value::Bool(true) => UNDO_POINT.to_owned(),
            _ => snapshot["name"].as_str().unwrap_or_default().to_owned(),
        };
        let by_id =
            |id: &Value| list.iter().find(|snapshot| snapshot["id"] == *id).map(shown).unwrap_or_default();
        let mut view = Self { machine: name, here: by_id(&tree["here"]), snapshots: Vec::new(), clones };
        view.snapshots = list.iter().map(|snapshot| (shown(snapshot), by_id(&snapshot["parent"]))).collect();
        view.snapshots.sort();
        let points = list.iter().filter(|snapshot| snapshot["undo_point"] == true);
        let points = points.filter_map(|point| point["name"].as_str().map(str::to_owned)).collect();
        Ok((view, points))
    }

    /// With one snapshot more, a child of what here comes from.
    pub(super) fn with(mut self, name: &str) -> Self {
        self.snapshots.push((name.to_owned(), self.here.clone()));
        self.snapshots.sort();
        self
    }

    /// With a clone of it.
    pub(super) fn with_clone(mut self, name: &str) -> Self {
        self.clones.push(name.to_owned());
        self
    }

    /// The same, seen from there.
    pub(super) fn at(mut self, here: &str) -> Self {
        here.clone_into(&mut self.here);
        self
    }

    /// Without a snapshot; what hung on it hangs on its parent.
    pub(super) fn without(mut self, name: &str) -> Self {
        let parent =
            self.snapshots.iter().find(|(own, _)| own == name).map_or("", |(_, parent)| parent).to_owned();
        self.snapshots.retain(|(own, _)| own != name);
        for (_, above) in &mut self.snapshots {
            if above == name {
                above.clone_from(&parent);
            }
        }
        if self.here == name {
            self.here = parent;
        }
        self.snapshots.sort();
        self
    }

    /// With another name for a snapshot.
    pub(super) fn renamed(mut self, from: &str, to: &str) -> Self {
        for name in self.snapshots.iter_mut().flat_map(|(own, above)| [own, above]).chain([&mut self.here]) {
            if name == from {
                to.clone_into(name);
            }
        }
        self.snapshots.sort();
        self
    }

    /// Names of the snapshots that are no undo points.
    pub(super) fn names(&self) -> Vec<&str> {
        self.snapshots.iter().map(|(name, _)| name.as_str()).filter(|name| *name != UNDO_POINT).collect()
    }
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, here from {:?}:", self.machine, self.here)?;
        self.snapshots.iter().try_for_each(|(name, parent)| write!(f, " {name} on {parent:?}"))?;
        self.clones.iter().try_for_each(|name| write!(f, ", clone {name}"))
    }
}
