//! Takes and gotos that are cut short: either they have happened, or nothing has.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::model::Inverse;
use super::steps::id_of;
use super::{Violation, Walk};
use crate::harness::Ended;
use crate::underway::Underway;

/// How soon a guest must tick after what befell the daemon or the command.
pub const SOON: Duration = Duration::from_secs(2);

/// A blow to a command under way; it has the socket of the port of the guest that ran when it began.
pub type Blow<'a> = dyn FnMut(&Walk, &mut Underway, &Path) -> Result<(), Violation> + 'a;

impl Walk {
    /// Begins `take` or `goto` with these words behind it and deals it the blow. `to` is where a goto goes. Afterwards the
    /// guest runs, the tree is the old or the new one, and nothing is left of what was not finished. True if it has happened.
    pub fn cut_short(
        &mut self,
        words: &str,
        to: Option<usize>,
        blow: &mut Blow<'_>,
    ) -> Result<(bool, Ended), Violation> {
        self.history.push(words.to_owned());
        let layers = self.spinney.layers();
        let port = self.port()?;
        let begun = Instant::now();
        let mut command = self.spinney.under_way(words);
        let struck = blow(self, &mut command, &port);
        let ended = command.end();
        struck?;
        // This starts the daemon again, if it was killed.
        let tree = self.spinney.ok(&format!("tree {}", self.name))?;
        let unknown = |s: &&Value| self.model.nodes.iter().all(|node| s["id"] != node.id.as_str());
        let new = tree["snapshots"].as_array().into_iter().flatten().find(unknown);
        match (new, to) {
            (None, _) => self.check_leftovers(&layers, to.is_some())?,
            (Some(new), None) => self.adopt(new)?,
            (Some(new), Some(to)) => self.adopt_goto(new, to, begun)?,
        }
        self.say(if new.is_some() { ": happened" } else { ": taken back" });
        self.check_processes()?;
        self.ticks_within(&self.port()?, SOON)?;
        self.check()?;
        Ok((new.is_some(), ended))
    }

    fn port(&self) -> Result<PathBuf, Violation> {
        let port = self.spinney.port(&self.name)?;
        port.ok_or_else(|| Violation::Wrong("the machine should have a process".to_owned()))
    }

    /// Takes over a goto of a running machine that somebody else saw the end of.
    fn adopt_goto(&mut self, point: &Value, to: usize, begun: Instant) -> Result<(), Violation> {
        if point["undo_point"] != true {
            return Err(Violation::Wrong(format!("a goto left a snapshot: {point}")));
        }
        let left = self.model.now();
        let name = point["name"].as_str().unwrap_or_default();
        let index = self.model.add(id_of(point)?, name, true, left);
        let power = self.model.nodes[to].moment.power;
        self.stand_at(to, power, begun);
        self.remember("goto", Inverse::Goto(index))
    }

    /// What was rolled back leaves no layers. An overlay that a take put over the disks in the last instant stays, in use.
    fn check_leftovers(&self, before: &[PathBuf], goto: bool) -> Result<(), Violation> {
        let before: HashSet<&PathBuf> = before.iter().collect();
        let after = self.spinney.layers();
        let now: HashSet<&PathBuf> = after.iter().collect();
        let gone: Vec<_> = before.difference(&now).collect();
        let in_use: HashSet<PathBuf> =
            self.spinney.machines().into_iter().flat_map(|pid| self.spinney.open_files(pid)).collect();
        let left: Vec<_> = now.difference(&before).filter(|path| goto || !in_use.contains(**path)).collect();
        if gone.is_empty() && left.is_empty() {
            return Ok(());
        }
        Err(Violation::Wrong(format!("what was rolled back took {gone:?} away and left {left:?}")))
    }

    /// One machine that runs has one process and one run folder.
    fn check_processes(&self) -> Result<(), Violation> {
        let (machines, runs) = (self.spinney.machines(), self.spinney.runs());
        if machines.len() == 1 && runs.len() == 1 {
            return Ok(());
        }
        Err(Violation::Wrong(format!(
            "one machine has the processes {machines:?} and the run folders {runs:?}"
        )))
    }
}
