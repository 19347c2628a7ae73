//! The steps: what is done through the command line, and what it means in the model.

use std::time::Instant;

use serde_json::Value;

use super::check::write_mark;
use super::model::{Inverse, Moment, Power};
use super::{Card, NAME, Violation, Walk};
use crate::guest::Mix;

/// So many snapshots stay when others are removed.
const ENOUGH: usize = 3;

impl Walk {
    pub(super) fn step(&mut self, card: Card) -> Result<(), Violation> {
        match card {
            Card::TakeStopCopy => self.take_running(" --mode stop-copy", "stop-copy"),
            Card::TakePreCopy => self.take_running(" --mode pre-copy", "pre-copy"),
            Card::TakeDiskOnly => self.take_running(" --disk-only", "disk-only"),
            Card::TakePaused => {
                self.need(Power::Paused)?;
                self.take(" --mode stop-copy", "stop-copy")
            }
            Card::TakeOff => {
                self.need(Power::Off)?;
                self.take("", "off")
            }
            Card::Goto(words) => self.goto_any(words),
            Card::Back => self.back(),
            Card::Branch => {
                self.goto_any("")?;
                self.check()?;
                self.touch()?;
                self.take("", "")
            }
            Card::Rm => self.rm(),
            Card::Gc => {
                self.spinney.ok("gc --now")?;
                // What was removed cannot come back any more.
                let nodes = &self.model.nodes;
                self.model.undo.retain(|_, inverse| match *inverse {
                    Inverse::Take(index, _) | Inverse::Rm(index) | Inverse::Goto(index) => {
                        !nodes[index].removed
                    }
                });
                Ok(())
            }
            Card::Undo => self.undo(),
            Card::KillDaemon => {
                self.spinney.kill_daemon();
                Ok(())
            }
            Card::Cut => {
                self.need(Power::Running)?;
                self.spinney.ok(&format!("kill {NAME}"))?;
                self.model.here = self.model.now().off();
                // An entry may have been synced and not counted yet.
                self.model.here.log.high += 1;
                Ok(())
            }
            Card::LogStep | Card::LogRate | Card::Mutate | Card::Fill | Card::Writer => {
                self.need(Power::Running)?;
                self.act(card)
            }
        }
    }

    /// Brings the machine to a power state, in a random way where there are several.
    pub(super) fn need(&mut self, power: Power) -> Result<(), Violation> {
        let now = self.model.here.power;
        if now == power {
            return Ok(());
        }
        self.history.push(format!("({} to {})", now.word(), power.word()));
        match (now, power) {
            (Power::Running | Power::Paused, Power::Off) => {
                self.spinney.ok(&format!("stop {NAME}"))?;
                self.model.here = self.model.now().off();
                return Ok(());
            }
            (Power::Off, _) => {
                self.model.since = Instant::now();
                self.spinney.ok(&format!("start {NAME}"))?;
                self.model.here.power = Power::Running;
                self.check_guest()?;
            }
            (Power::Paused, _) => {
                self.spinney.ok(&format!("resume {NAME}"))?;
                self.model.here.power = Power::Running;
            }
            (Power::Running, _) => {}
        }
        if power == Power::Paused {
            self.spinney.ok(&format!("pause {NAME}"))?;
            self.model.here.power = Power::Paused;
        }
        Ok(())
    }

    fn take_running(&mut self, words: &str, mode: &str) -> Result<(), Violation> {
        self.need(Power::Running)?;
        self.take(words, mode)
    }

    /// Takes here as it is. `mode` is what the result must name, if that is certain.
    pub(super) fn take(&mut self, words: &str, mode: &str) -> Result<(), Violation> {
        self.number += 1;
        let name = format!("s{}", self.number);
        let taken = self.spinney.ok(&format!("take {NAME} {name}{words}"))?;
        let moment = if taken["mode"] == "disk-only" { self.model.now().off() } else { self.model.now() };
        let power = moment.power.word();
        if taken["name"] != name.as_str()
            || taken["power"] != power
            || !mode.is_empty() && taken["mode"] != mode
        {
            return Err(Violation::Wrong(format!("{name} should be {power} by {mode}: {taken}")));
        }
        let index = self.model.add(id_of(&taken)?, &name, false, moment);
        let inverse = Inverse::Take(index, self.model.parent);
        self.model.parent = Some(index);
        self.remember("take", inverse)
    }

    /// Takes over a snapshot of here that was taken by somebody else, running.
    pub fn adopt(&mut self, snapshot: &Value) -> Result<(), Violation> {
        let name = snapshot["name"].as_str().unwrap_or_default();
        let moment = self.model.now();
        let index = self.model.add(id_of(snapshot)?, name, false, moment);
        let inverse = Inverse::Take(index, self.model.parent);
        self.model.parent = Some(index);
        self.remember("take", inverse)
    }

    fn goto_any(&mut self, words: &str) -> Result<(), Violation> {
        let undo_points = self.random.below(6) == 0;
        let Some(&to) = self.random.pick(&self.model.named(undo_points)) else {
            return self.take("", "");
        };
        self.goto(to, words)
    }

    fn back(&mut self) -> Result<(), Violation> {
        let Some(to) = self.model.visible(self.model.parent) else { return self.take("", "") };
        let before = (self.model.now(), Instant::now());
        let report = self.spinney.ok(&format!("back {NAME}"))?;
        self.arrive(to, &report, "", before)
    }

    /// Goes to a snapshot; `words` stand behind its address.
    pub(super) fn goto(&mut self, to: usize, words: &str) -> Result<(), Violation> {
        let name = self.model.nodes[to].name.clone();
        if let Some(last) = self.history.last_mut() {
            last.push_str(&format!(" to {name}"));
        }
        let begun = Instant::now();
        let report = self.spinney.ok(&format!("goto {NAME}@{name}{words}"))?;
        // The old guest may run on until the new one is loaded, and all of that is in the undo point.
        self.arrive(to, &report, words, (self.model.now(), begun))
    }

    /// Puts the model where a goto went. `before` is what was left, and when the goto began.
    fn arrive(
        &mut self,
        to: usize,
        report: &Value,
        words: &str,
        (left, begun): (Moment, Instant),
    ) -> Result<(), Violation> {
        let undo_point = &report["undo_point"];
        if words.contains("--discard") != undo_point.is_null() {
            return Err(Violation::Wrong(format!("an undo point, or none, against our wish: {report}")));
        }
        let recorded = self.model.nodes[to].moment.clone();
        let power = [("--off", Power::Off), ("--paused", Power::Paused), ("--running", Power::Running)];
        let power =
            power.into_iter().find(|(word, _)| words.contains(word)).map_or(recorded.power, |(_, p)| p);
        if report["snapshot"]["id"] != self.model.nodes[to].id.as_str() || report["power"] != power.word() {
            return Err(Violation::Wrong(format!("goto went somewhere else: {report}")));
        }
        let mut inverse = None;
        if !undo_point.is_null() {
            let name = undo_point["name"].as_str().unwrap_or_default();
            inverse = Some(Inverse::Goto(self.model.add(id_of(undo_point)?, name, true, left)));
        }
        self.stand_at(to, power, begun);
        match inverse {
            Some(inverse) => self.remember("goto", inverse),
            None => Ok(()),
        }
    }

    fn stand_at(&mut self, to: usize, power: Power, begun: Instant) {
        let recorded = self.model.nodes[to].moment.clone();
        self.model.here = if power == Power::Off { recorded.off() } else { Moment { power, ..recorded } };
        self.model.parent = Some(to);
        self.model.since = begun;
    }

    fn rm(&mut self) -> Result<(), Violation> {
        let named = self.model.named(false);
        let Some(&index) = self.random.pick(&named).filter(|_| named.len() > ENOUGH) else {
            return self.take("", "");
        };
        let name = self.model.nodes[index].name.clone();
        self.spinney.ok(&format!("rm {NAME}@{name}"))?;
        self.model.nodes[index].removed = true;
        self.remember("rm", Inverse::Rm(index))
    }

    fn undo(&mut self) -> Result<(), Violation> {
        let log = self.spinney.ok("op log -n 1000")?;
        let newest = log["operations"].as_array().into_iter().flatten().find(|op| op["undoable"] == true);
        let Some(op) = newest else { return Ok(()) };
        let id = op["id"].as_str().unwrap_or_default();
        let Some(inverse) = self.model.undo.remove(id) else {
            return Err(Violation::Wrong(format!("nobody knows how {op} could be undone")));
        };
        if let Some(last) = self.history.last_mut() {
            last.push_str(&format!(" {} {}", op["kind"], op["subject"]));
        }
        let begun = Instant::now();
        self.spinney.ok("undo")?;
        match inverse {
            Inverse::Take(index, parent) => {
                self.model.nodes[index].removed = true;
                if self.model.parent == Some(index) {
                    self.model.parent = parent;
                }
            }
            Inverse::Rm(index) => self.model.nodes[index].removed = false,
            Inverse::Goto(to) => {
                let left = self.model.now();
                let tree = self.spinney.ok(&format!("tree {NAME}"))?;
                let known = |s: &&Value| self.model.nodes.iter().all(|node| s["id"] != node.id.as_str());
                let new = tree["snapshots"].as_array().into_iter().flatten().find(known);
                let Some(new) = new.filter(|s| s["undo_point"] == true) else {
                    return Err(Violation::Wrong(format!("undo of a goto kept no undo point: {tree}")));
                };
                let name = new["name"].as_str().unwrap_or_default();
                self.model.add(id_of(new)?, name, true, left);
                let power = self.model.nodes[to].moment.power;
                self.stand_at(to, power, begun);
            }
        }
        Ok(())
    }

    /// Notes how the operation that was just done is taken back.
    fn remember(&mut self, kind: &str, inverse: Inverse) -> Result<(), Violation> {
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

    /// Changes something, on disk and in memory if it runs.
    pub(super) fn touch(&mut self) -> Result<(), Violation> {
        if self.model.here.power != Power::Running {
            return Ok(());
        }
        self.act(Card::LogStep)?;
        self.act(Card::Mutate)
    }

    /// Has the guest do something.
    fn act(&mut self, card: Card) -> Result<(), Violation> {
        let mut guest = self.guest()?;
        let number = self.random.below(1000) + 1;
        let Some(life) = &mut self.model.here.life else {
            return Err(Violation::Wrong("a guest that was not looked at yet".to_owned()));
        };
        match card {
            Card::LogStep => {
                let last = guest.log_step(number % 20 + 1)?;
                self.marks += 1;
                write_mark(&mut guest, self.marks)?;
                self.model.here.mark = self.marks;
                self.model.here.log.low += number % 20 + 1;
                self.model.here.log.high = self.model.here.log.high.max(last);
            }
            Card::LogRate if life.log_rate == 0 => {
                guest.log_start(100)?;
                life.log_rate = 100;
            }
            Card::LogRate => {
                self.model.here.log = super::Range::exactly(guest.log_stop()?);
                life.log_rate = 0;
            }
            Card::Mutate => {
                guest.mutate(number, number)?;
                life.hash = guest.hash()?;
            }
            Card::Fill => {
                guest.fill(self.fill, Mix { seed: number, ..Mix::default() })?;
                life.hash = guest.hash()?;
            }
            Card::Writer if life.writing => {
                guest.writer_stop()?;
                life.writing = false;
                life.steps = guest.writer_check()?.steps;
            }
            _ => {
                guest.writer_start(2000, 2048)?;
                (life.writing, life.steps) = (true, 0);
            }
        }
        Ok(())
    }
}

fn id_of(snapshot: &Value) -> Result<&str, Violation> {
    snapshot["id"].as_str().ok_or_else(|| Violation::Wrong(format!("no id: {snapshot}")))
}
