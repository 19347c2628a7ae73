//! The steps that change names and what they mean, and nothing of what is stored: `rm`, `edit`, `protect`, `unprotect`.

use std::thread;
use std::time::{Duration, Instant};

use super::model::{Inverse, Power};
use super::{NAME, SOON, Violation, Walk};

/// Seconds until a snapshot is to expire: longer than the next command can take.
const EXPIRY: u64 = 5;
/// The other group.
const OTHER_GROUP: &str = "other";
/// So many snapshots stay when others are removed.
const ENOUGH: usize = 3;
/// The machine's other name.
const OTHER_NAME: &str = "www";
/// Exit code of what is refused.
const REFUSED: i32 = 4;
/// Exit code of what is not there.
const NOT_FOUND: i32 = 3;

impl Walk {
    pub(super) fn rm(&mut self) -> Result<(), Violation> {
        let named = self.model.named(false);
        let Some(&index) = self.random.pick(&named).filter(|_| named.len() > ENOUGH) else {
            return self.take("", "");
        };
        self.remove(index, "", vec![index])
    }

    /// Removes a snapshot with all below it, undo points too, but never nearly everything.
    pub(super) fn rm_tree(&mut self) -> Result<(), Violation> {
        let named = self.model.named(false);
        let real = |subtree: &[usize]| subtree.iter().filter(|&&i| !self.model.nodes[i].undo_point).count();
        let trees = named.iter().map(|&top| (top, self.model.subtree(top)));
        let trees: Vec<_> = trees.filter(|(_, tree)| real(tree) + ENOUGH <= named.len()).collect();
        let larger: Vec<_> = trees.iter().filter(|(_, tree)| tree.len() > 1).cloned().collect();
        let trees = if larger.is_empty() { trees } else { larger };
        let Some((top, tree)) = self.random.pick(&trees).cloned() else {
            return self.take("", "");
        };
        self.remove(top, " --tree --yes", tree)
    }

    /// `rm` of a snapshot, which takes `all` away unless one of them is protected.
    fn remove(&mut self, top: usize, words: &str, all: Vec<usize>) -> Result<(), Violation> {
        let name = self.model.nodes[top].name.clone();
        let command = format!("rm {}@{name}{words}", self.name);
        let guarded = all.iter().any(|&index| self.model.nodes[index].protected);
        self.say(&format!(
            " {name}, {} in all{}",
            all.len(),
            if guarded { ", one of them protected" } else { "" }
        ));
        if guarded {
            return self.refused(&command, REFUSED, "protected");
        }
        let removed = self.spinney.ok(&command)?;
        if removed["snapshots"].as_array().map(Vec::len) != Some(all.len()) {
            return Err(Violation::Wrong(format!("{command} should take {} away: {removed}", all.len())));
        }
        for &index in &all {
            self.model.nodes[index].removed = true;
        }
        self.remember("rm", Inverse::Rm(all))
    }

    /// Removes the machine, sees that it is gone, and has it back.
    pub(super) fn rm_machine(&mut self) -> Result<(), Violation> {
        self.need(Power::Off)?;
        let command = format!("rm {} --yes", self.name);
        if self.model.named(true).iter().any(|&index| self.model.nodes[index].protected) {
            self.say(", of which a snapshot is protected");
            return self.refused(&command, REFUSED, "protected");
        }
        self.spinney.ok(&command)?;
        self.refused(&format!("tree {}", self.name), NOT_FOUND, &self.name)?;
        self.spinney.ok("undo").map(drop)?;
        Ok(())
    }

    pub(super) fn edit(&mut self) -> Result<(), Violation> {
        let Some(&index) = self.random.pick(&self.model.named(false)) else {
            return self.take("", "");
        };
        self.number += 1;
        let name = format!("e{}", self.number);
        let note = format!("note-{}", self.number);
        let node = &mut self.model.nodes[index];
        let old = std::mem::replace(&mut node.name, name.clone());
        let old_note = std::mem::replace(&mut node.note, note.clone());
        self.say(&format!(" {old} to {name}"));
        self.spinney.ok(&format!("edit {}@{old} --name {name} -m {note}", self.name))?;
        self.refused(&format!("show {}@{old}", self.name), NOT_FOUND, &old)?;
        self.remember("edit", Inverse::Edit(index, old, old_note))
    }

    pub(super) fn rename(&mut self) -> Result<(), Violation> {
        let new = if self.name == NAME { OTHER_NAME } else { NAME };
        self.spinney.ok(&format!("edit {} --name {new}", self.name))?;
        let old = std::mem::replace(&mut self.name, new.to_owned());
        self.refused(&format!("show {old}"), NOT_FOUND, &old)?;
        self.remember("edit", Inverse::Rename(old))
    }

    /// A snapshot goes by itself, as by `rm`. What has expired once and is brought back stays.
    pub(super) fn expire(&mut self) -> Result<(), Violation> {
        let named = self.model.named(false);
        let free = |index: &usize| !self.model.nodes[*index].protected;
        let open: Vec<usize> = named.iter().copied().filter(free).collect();
        let Some(&index) = self.random.pick(&open).filter(|_| named.len() > ENOUGH) else {
            return self.take("", "");
        };
        let address = format!("{}@{}", self.name, self.model.nodes[index].name);
        self.say(&format!(" {address}"));
        self.spinney.ok(&format!("edit {address} --expire {EXPIRY}s"))?;
        self.remember("edit", Inverse::Expiry(index))?;
        let deadline = Instant::now() + Duration::from_secs(EXPIRY) + SOON;
        while self.spinney.run(["show", &address]).code == Some(0) {
            if Instant::now() > deadline {
                return Err(Violation::Wrong(format!("{address} should have expired")));
            }
            thread::sleep(Duration::from_millis(50));
        }
        self.model.nodes[index].removed = true;
        self.remember("expire", Inverse::Rm(vec![index]))
    }

    /// All that is stored of the machine is copied to another group, or back.
    pub(super) fn regroup(&mut self) -> Result<(), Violation> {
        self.need(Power::Off)?;
        if self.spinney.run(["group", "show", OTHER_GROUP]).code == Some(NOT_FOUND) {
            self.spinney.ok(&format!("group create {OTHER_GROUP}"))?;
        }
        let to = if self.elsewhere { "default" } else { OTHER_GROUP };
        self.say(&format!(" to {to}"));
        self.spinney.ok(&format!("edit {} --group {to}", self.name))?;
        self.elsewhere = !self.elsewhere;
        self.remember("edit", Inverse::Regroup)
    }

    pub(super) fn protect(&mut self) -> Result<(), Violation> {
        let free = |index: &usize| !self.model.nodes[*index].protected;
        let open: Vec<usize> = self.model.named(true).into_iter().filter(free).collect();
        let Some(&index) = self.random.pick(&open) else { return Ok(()) };
        let name = self.model.nodes[index].name.clone();
        self.say(&format!(" {name}"));
        self.spinney.ok(&format!("protect {}@{name}", self.name))?;
        self.model.nodes[index].protected = true;
        self.refused(&format!("rm {}@{name}", self.name), REFUSED, "protected")
    }

    pub(super) fn unprotect(&mut self) -> Result<(), Violation> {
        let kept = |index: &usize| self.model.nodes[*index].protected;
        let kept: Vec<usize> = self.model.named(true).into_iter().filter(kept).collect();
        let Some(&index) = self.random.pick(&kept) else { return Ok(()) };
        self.unprotect_one(index)
    }

    pub(super) fn unprotect_one(&mut self, index: usize) -> Result<(), Violation> {
        let node = &mut self.model.nodes[index];
        node.protected = false;
        let name = node.name.clone();
        self.say(&format!(" unprotect {name}"));
        self.spinney.ok(&format!("unprotect {}@{name}", self.name))?;
        Ok(())
    }

    pub(super) fn unprotect_all(&mut self) -> Result<(), Violation> {
        let named = self.model.named(true).into_iter();
        let kept: Vec<usize> = named.filter(|&index| self.model.nodes[index].protected).collect();
        kept.into_iter().try_for_each(|index| self.unprotect_one(index))
    }

    /// A running machine is refused too, in other words.
    pub(super) fn protect_machine(&mut self) -> Result<(), Violation> {
        self.spinney.ok(&format!("protect {}", self.name))?;
        self.refused(&format!("rm {} --yes", self.name), REFUSED, "protected")?;
        self.spinney.ok(&format!("unprotect {}", self.name))?;
        Ok(())
    }

    /// A command that must be refused with this exit code, in words that have `why` among them.
    pub(super) fn refused(&self, command: &str, code: i32, why: &str) -> Result<(), Violation> {
        let ended = self.spinney.run(command.split(' '));
        let problem = ended.problem().to_string();
        if ended.code == Some(code) && problem.contains(why) {
            return Ok(());
        }
        Err(Violation::Wrong(format!(
            "`{command}` should be refused with {code} for {why:?}: {:?} {} {problem}",
            ended.code, ended.document
        )))
    }

    /// Adds words to the history's last entry.
    pub(super) fn say(&mut self, words: &str) {
        if let Some(last) = self.history.last_mut() {
            last.push_str(words);
        }
    }
}
