//! The steps: what is done through the command line, and what it means in the model.

use std::time::Instant;

use serde_json::Value;

use super::check::{rewrite_scratch, write_mark};
use super::model::{Inverse, Moment, Power};
use super::{Card, Violation, Walk};
use crate::guest::Mix;

/// MiB a second that the disk's writer writes.
const DISK_RATE: u64 = 16;
/// Name of a fork.
const FORK: &str = "fork";

impl Walk {
    pub(super) fn step(&mut self, card: Card) -> Result<(), Violation> {
        match card {
            Card::TakeStopCopy => self.take_running(" --mode stop-copy", "stop-copy"),
            Card::TakePreCopy => self.take_running(" --mode pre-copy", "pre-copy"),
            Card::TakeLive => {
                self.need(Power::Running)?;
                let mode = self.live_or_other()?;
                self.take(&format!(" --mode {mode}"), mode)
            }
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
            Card::Fork => self.fork(),
            Card::Rm => self.rm(),
            Card::RmTree => self.rm_tree(),
            Card::RmMachine => self.rm_machine(),
            Card::Edit => self.edit(),
            Card::Rename => self.rename(),
            Card::Expire => self.expire(),
            Card::Regroup => self.regroup(),
            Card::Protect => self.protect(),
            Card::Unprotect => self.unprotect(),
            Card::ProtectMachine => self.protect_machine(),
            Card::Gc => {
                self.spinney.ok("gc --now")?;
                self.model.collect();
                Ok(())
            }
            Card::Undo => self.undo(),
            Card::KillDaemon => {
                self.spinney.kill_daemon();
                Ok(())
            }
            Card::KillView => {
                // Nobody can do anything about the death of both.
                if !self.spinney.views().1.is_empty() {
                    self.spinney.kill_views();
                }
                Ok(())
            }
            Card::View => {
                self.mapped = !self.mapped;
                self.spinney.set_view(self.mapped);
                self.say(if self.mapped { " on" } else { " off" });
                Ok(())
            }
            Card::Cut => {
                self.need(Power::Running)?;
                self.spinney.ok(&format!("kill {}", self.name))?;
                self.model.here = self.model.now().off();
                // An entry may have been synced and not counted yet.
                self.model.here.log.high += 1;
                Ok(())
            }
            Card::TakeWhileWriting => {
                self.need(Power::Running)?;
                if self.model.here.life.as_ref().is_some_and(|life| life.disk_rate == 0) {
                    self.act(Card::DiskWriter)?;
                }
                // Clean in the page cache at the snapshot, another on the disk afterwards.
                rewrite_scratch(&mut self.guest()?, 0)?;
                let mode = if self.random.below(2) == 0 { self.live_or_other()? } else { "pre-copy" };
                self.take(&format!(" --mode {mode}"), mode)?;
                rewrite_scratch(&mut self.guest()?, 8)?;
                self.touch()?;
                self.back()
            }
            Card::LogStep | Card::LogRate | Card::Mutate | Card::Fill | Card::Writer | Card::DiskWriter => {
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
                self.spinney.ok(&format!("stop {}", self.name))?;
                self.model.here = self.model.now().off();
                return Ok(());
            }
            (Power::Off, _) => {
                self.model.since = Instant::now();
                self.spinney.ok(&format!("start {}", self.name))?;
                self.model.here.power = Power::Running;
                self.check_guest()?;
            }
            (Power::Paused, _) => {
                self.spinney.ok(&format!("resume {}", self.name))?;
                self.model.here.power = Power::Running;
            }
            (Power::Running, _) => {}
        }
        if power == Power::Paused {
            self.spinney.ok(&format!("pause {}", self.name))?;
            self.model.here.power = Power::Paused;
        }
        Ok(())
    }

    fn take_running(&mut self, words: &str, mode: &str) -> Result<(), Violation> {
        self.need(Power::Running)?;
        self.take(words, mode)
    }

    /// `live`, or the mode of a guest that cannot be taken so: that of one whose memory is mapped is refused.
    fn live_or_other(&mut self) -> Result<&'static str, Violation> {
        let mapped = self.spinney.is_mapped(&self.name)?;
        if mapped {
            self.refused(&format!("take {} x --mode live", self.name), 5, "is mapped from the snapshot")?;
        }
        let mode = match (mapped, self.random.below(2)) {
            (false, _) => "live",
            (true, 0) => "stop-copy",
            (true, _) => "pre-copy",
        };
        self.say(&format!(" {mode}"));
        Ok(mode)
    }

    /// Takes here as it is. `mode` is what the result must name, if that is certain.
    pub(super) fn take(&mut self, words: &str, mode: &str) -> Result<(), Violation> {
        self.number += 1;
        let name = format!("s{}", self.number);
        let taken = self.spinney.ok(&format!("take {} {name}{words}", self.name))?;
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
    pub(super) fn adopt(&mut self, snapshot: &Value) -> Result<(), Violation> {
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

    /// A fork is what was taken, and runs beside the machine.
    fn fork(&mut self) -> Result<(), Violation> {
        let Some(&of) = self.random.pick(&self.model.named(false)) else {
            return self.take("", "");
        };
        let name = self.model.nodes[of].name.clone();
        self.say(&format!(" of {name}"));
        let begun = Instant::now();
        self.spinney.ok(&format!("fork {}@{name} {FORK}", self.name))?;
        let log = self.spinney.ok("op log -n 1")?;
        let own =
            (self.name.clone(), self.model.here.clone(), self.model.parent, self.model.since, self.loaded);
        FORK.clone_into(&mut self.name);
        self.stand_at(of, Power::Running, begun);
        let checked = self.check_guest();
        (self.name, self.model.here, self.model.parent, self.model.since, self.loaded) = own;
        checked?;
        self.spinney.ok(&format!("kill {FORK}"))?;
        self.spinney.ok(&format!("undo {}", log["operations"][0]["id"].as_str().unwrap_or_default()))?;
        Ok(())
    }

    pub(super) fn back(&mut self) -> Result<(), Violation> {
        let Some(to) = self.model.visible(self.model.parent) else { return self.take("", "") };
        let before = (self.model.now(), Instant::now());
        let report = self.spinney.ok(&format!("back {}", self.name))?;
        self.arrive(to, &report, "", before)
    }

    /// Goes to a snapshot; `words` stand behind its address.
    pub(super) fn goto(&mut self, to: usize, words: &str) -> Result<(), Violation> {
        let name = self.model.nodes[to].name.clone();
        if let Some(last) = self.history.last_mut() {
            last.push_str(&format!(" to {name}"));
        }
        let begun = Instant::now();
        let report = self.spinney.ok(&format!("goto {}@{name}{words}", self.name))?;
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

    pub(super) fn stand_at(&mut self, to: usize, power: Power, begun: Instant) {
        let recorded = self.model.nodes[to].moment.clone();
        self.model.here = if power == Power::Off { recorded.off() } else { Moment { power, ..recorded } };
        self.model.parent = Some(to);
        self.model.since = begun;
        self.loaded = true;
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
            Card::DiskWriter => {
                life.disk_rate = if life.disk_rate == 0 { DISK_RATE } else { 0 };
                guest.disk_write(life.disk_rate)?;
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

pub(super) fn id_of(snapshot: &Value) -> Result<&str, Violation> {
    snapshot["id"].as_str().ok_or_else(|| Violation::Wrong(format!("no id: {snapshot}")))
}
