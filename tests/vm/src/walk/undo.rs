//! `undo`, and what the model has to know for it.

use std::time::Instant;

use serde_json::Value;

use super::model::{Inverse, Power};
use super::steps::id_of;
use super::{Violation, Walk};

impl Walk {
    /// Takes the newest operation back that is not an undo itself.
    pub(super) fn undo(&mut self) -> Result<(), Violation> {
        let log = self.spinney.ok("op log -n 1000")?;
        // Undos are passed over; to undo one would be to do again what it took back.
        let newest = |op: &&Value| op["undoable"] == true && op["kind"] != "undo";
        let Some(op) = log["operations"].as_array().into_iter().flatten().find(newest) else { return Ok(()) };
        let id = op["id"].as_str().unwrap_or_default();
        let Some(inverse) = self.model.undo.remove(id) else {
            return Err(Violation::Wrong(format!("nobody knows how {op} could be undone")));
        };
        self.say(&format!(" {} {}", op["kind"], op["subject"]));
        if let Inverse::Take(index, _) = inverse
            && self.model.nodes[index].protected
        {
            self.refused(&format!("undo {id}"), 4, "protected")?;
            self.unprotect_one(index)?;
        }
        if let Inverse::Regroup = inverse {
            self.need(Power::Off)?;
        }
        let begun = Instant::now();
        // By its id: without one `undo` does not pass a goto that threw something away.
        self.spinney.ok(&format!("undo {id}"))?;
        match inverse {
            Inverse::Take(index, parent) => {
                self.model.nodes[index].removed = true;
                if self.model.parent == Some(index) {
                    self.model.parent = parent;
                }
            }
            Inverse::Rm(indices) => indices.into_iter().for_each(|i| self.model.nodes[i].removed = false),
            Inverse::Edit(index, name, note) => {
                let node = &mut self.model.nodes[index];
                (node.name, node.note) = (name, note);
            }
            // What expired is removed, and that is an operation of its own.
            Inverse::Expiry(_) => {}
            Inverse::Rename(name) => self.name = name,
            Inverse::Regroup => self.elsewhere = !self.elsewhere,
            Inverse::Goto(to) => self.undid_goto(to, begun)?,
        }
        Ok(())
    }

    /// Puts the model back to an undo point; what was left is a new one.
    fn undid_goto(&mut self, to: usize, begun: Instant) -> Result<(), Violation> {
        let left = self.model.now();
        let tree = self.spinney.ok(&format!("tree {}", self.name))?;
        let unknown = |s: &&Value| self.model.nodes.iter().all(|node| s["id"] != node.id.as_str());
        let new = tree["snapshots"].as_array().into_iter().flatten().find(unknown);
        let Some(new) = new.filter(|s| s["undo_point"] == true) else {
            return Err(Violation::Wrong(format!("undo of a goto kept no undo point: {tree}")));
        };
        let name = new["name"].as_str().unwrap_or_default();
        self.model.add(id_of(new)?, name, true, left);
        let power = self.model.nodes[to].moment.power;
        self.stand_at(to, power, begun);
        // An undo point is here as it was, and so here hangs where it hung.
        self.model.parent = self.model.nodes[to].parent;
        Ok(())
    }

    /// Notes how the operation that was just done is taken back.
    pub(super) fn remember(&mut self, kind: &str, inverse: Inverse) -> Result<(), Violation> {
        let log = self.spinney.ok("op log -n 1")?;
        let op = &log["operations"][0];
        if op["kind"] != kind || op["undoable"] != true {
            return Err(Violation::Wrong(format!(
                "the log's newest entry should be an undoable {kind}: {op}"
            )));
        }
        self.model.undo.insert(op["id"].as_str().unwrap_or_default().to_owned(), inverse);
        Ok(())
    }
}
