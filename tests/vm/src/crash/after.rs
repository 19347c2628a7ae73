//! The checks after a blow.

use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::act::{Act, CLONE, Plan, Stage};
use super::blow::Victim;
use super::on_disk::log_on_disk;
use super::scene::{BASE, Moment, Scene};
use super::view::View;
use crate::harness::{Ended, tool};
use crate::walk::Violation;

/// How soon a guest ticks that nobody has a reason to hold.
const SOON: Duration = Duration::from_secs(5);

/// How long what is due may take.
const PATIENCE: Duration = Duration::from_secs(30);

fn wrong<T>(text: String) -> Result<T, Violation> {
    Err(Violation::Wrong(text))
}

impl Scene {
    /// All checks; true if the act had happened. `taken` is the guest when the act began, [`Scene::here`] knows of what it has
    /// synced since.
    pub(super) fn after(
        &mut self,
        act: Act,
        plan: &Plan,
        victim: Victim,
        ended: &Ended,
        layers: &[PathBuf],
        taken: &Moment,
    ) -> Result<bool, Violation> {
        if act.is_due() {
            self.wait_for_what_is_due()?;
        }
        // The first command starts the daemon, if it is gone.
        let (view, points) = View::read(&self.spinney)?;
        let happened = self.outcome(plan, victim, ended)?;
        let expected = if happened { &plan.new } else { &plan.old };
        if view != *expected {
            return wrong(format!("happened: {happened}; the tree is {view}; it should be {expected}"));
        }
        let fsck = self.ok("fsck")?;
        if fsck["damage"].as_array().is_none_or(|damage| !damage.is_empty()) {
            return wrong(format!("fsck found {}", fsck["damage"]));
        }
        if act.clones() {
            self.check_clone(act, victim, happened, taken)?;
        }
        if self.stage == Stage::Cold {
            self.check_cold(&view)?;
            return Ok(happened);
        }
        if !happened {
            self.check_leftovers(act, layers)?;
        }
        self.check_here(act, victim, happened)?;
        let m = self.machine();
        // What is new, and what the act was about.
        let mut there: Vec<(String, Moment)> = Vec::new();
        for name in view.names().into_iter().map(str::to_owned).chain(points) {
            let known = self.known.get(&name).cloned();
            let moment = match act.takes() {
                true => Moment { running: !act.leaves_memory_out(), ..taken.clone() },
                // It was off when that was kept.
                false => Moment { running: act != Act::StopBack && self.here.running, ..self.here.clone() },
            };
            if name != BASE && (known.is_none() || plan.also.as_ref() == Some(&name)) {
                there.push((name, known.unwrap_or(moment)));
            }
        }
        for (name, moment) in there {
            self.ok(&format!("goto {m}@{name} --discard --yes"))?;
            let checked = if moment.running { self.check_guest(&moment) } else { self.check_disk(&moment) };
            checked.map_err(|error| Violation::Wrong(format!("gone to {name}: {error}")))?;
        }
        Ok(happened)
    }

    /// The next daemon does it beside its first commands.
    fn wait_for_what_is_due(&self) -> Result<(), Violation> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let machine = self.ok(&format!("show {}", self.machine()))?;
            if machine["power"] != "off" {
                return Ok(());
            }
            if Instant::now() > deadline {
                return wrong(format!("it is off, and what is due is not done: {machine}"));
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// Whether the journal says that it happened; and that the command said the same.
    fn outcome(&self, plan: &Plan, victim: Victim, ended: &Ended) -> Result<bool, Violation> {
        let log = self.ok("op log -n 20")?;
        let entry = log["operations"].as_array().into_iter().flatten().find(|op| op["kind"] == plan.kind);
        let state = entry.map(|op| op["state"].clone()).unwrap_or_default();
        let happened = state == "done";
        if !happened && state != "failed" && state != "cancelled" {
            return wrong(format!("the journal's entry should be closed: {entry:?}"));
        }
        let problem = ended.problem();
        if ended.code == Some(0) && !happened {
            return wrong(format!("the command said that it was done, and it was not: {}", ended.document));
        }
        if victim == Victim::Room && !matches!(ended.code, Some(0 | 7)) {
            return wrong(format!("it should have had no room: {:?} {}", ended.code, ended.stderr));
        }
        if victim == Victim::View && ended.code != Some(0) {
            return wrong(format!("somebody else took over, and yet: {:?} {}", ended.code, ended.stderr));
        }
        if victim.spares_the_daemon() && ended.code != Some(0) {
            let other = matches!(victim, Victim::Warden | Victim::Room) || problem["code"] == "interrupted";
            let about_qemu = other || problem.to_string().contains("QEMU");
            if problem["detail"].as_str().is_none_or(str::is_empty) || !about_qemu {
                return wrong(format!("no clear error: {:?} {}", ended.code, ended.stderr));
            }
            if happened {
                return wrong(format!("it was done, and the command said {problem}"));
            }
        }
        Ok(happened)
    }

    /// Here: the guest ticks and knows what it knew; or it is off, and its disk has what was synced.
    fn check_here(&mut self, act: Act, victim: Victim, happened: bool) -> Result<(), Violation> {
        let m = self.machine();
        let machine = self.ok(&format!("show {m}"))?;
        let power = machine["power"].as_str().unwrap_or_default();
        let (machines, runs) = (self.spinney.machines(), self.spinney.runs());
        let one = usize::from(power == "running");
        if machines.len() != one || runs.len() > 1 {
            return wrong(format!("a machine that is {power} has {machines:?} and {runs:?}"));
        }
        let expected = match &self.kept {
            _ if !act.goes() || !happened => self.here.clone(),
            Some(point) => self.known[point].clone(),
            None => Moment { running: act != Act::GotoToOff, ..self.known[BASE].clone() },
        };
        if act.switches() {
            if power == "running" {
                self.ok(&format!("kill {m}"))?;
            }
            return self.check_disk(&expected);
        }
        match power {
            "suspended" if matches!(act, Act::Suspend | Act::Wake | Act::Regroup | Act::StopBack) => {
                self.ok(&format!("start {m}"))?;
                self.check_guest(&expected)
            }
            "running" if expected.running => self.check_guest(&expected),
            "off" | "lost_power" if !expected.running || victim.ends_the_machine() => {
                self.check_disk(&expected)
            }
            _ => wrong(format!("the machine is {power}; it should know {expected:?}")),
        }
    }

    /// What was taken back leaves no layers, but the overlay that here writes to since.
    fn check_leftovers(&self, act: Act, before: &[PathBuf]) -> Result<(), Violation> {
        let after = self.spinney.layers();
        let left: Vec<_> = after.iter().filter(|layer| !before.contains(layer)).collect();
        let gone: Vec<_> = before.iter().filter(|layer| !after.contains(layer)).collect();
        let may_stay = usize::from(
            act.takes() || act.is_in_place() || matches!(act, Act::TakeCancelled | Act::Clone | Act::Fork),
        );
        if left.len() > may_stay || !gone.is_empty() && act != Act::Gc {
            return wrong(format!("what was taken back took {gone:?} away and left {left:?}"));
        }
        Ok(())
    }

    /// A clone has what was synced, a fork runs with the memory of the other; one that was not made left nothing. It goes again, for the
    /// next act.
    fn check_clone(&self, act: Act, victim: Victim, happened: bool, taken: &Moment) -> Result<(), Violation> {
        let folder = self.clones_folder();
        let files = std::fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let files: Vec<PathBuf> = files.collect();
        if files.len() != usize::from(happened && act == Act::CloneTo) {
            return wrong(format!("happened: {happened}; there are {files:?}"));
        }
        for file in &files {
            let looked = tool("qemu-img", ["check", "-q", "-f", "qcow2", &file.display().to_string()]);
            if !looked.status.success() {
                return wrong(format!("{}: {looked:?}", file.display()));
            }
        }
        if !happened {
            return Ok(());
        }
        if act == Act::Fork {
            self.check_fork(victim, taken)?;
        }
        if self.stage != Stage::Cold {
            let found = log_on_disk(&self.spinney, CLONE)?;
            if found < taken.log {
                return wrong(format!("the clone has {found} entries of the log; {} were synced", taken.log));
            }
        }
        self.ok(&format!("rm {CLONE} --yes"))?;
        self.ok("gc --now")?;
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).map_err(|error| Violation::Wrong(format!("{folder}: {error}")))
    }

    /// A fork runs, and knows what the other knew; with the power it has lost its memory. It is off afterwards.
    fn check_fork(&self, victim: Victim, taken: &Moment) -> Result<(), Violation> {
        let power = self.ok(&format!("show {CLONE}"))?["power"].clone();
        if power == "running" {
            self.check_guest_of(CLONE, taken)?;
            self.ok(&format!("kill {CLONE}")).map(drop)?;
        } else if victim != Victim::Power {
            return wrong(format!("the fork is {power}"));
        }
        Ok(())
    }

    /// A guest that runs, is the one that it should be, and has its memory and its disk.
    pub(super) fn check_guest(&self, expected: &Moment) -> Result<(), Violation> {
        self.check_guest_of(&self.machine(), expected)
    }

    fn check_guest_of(&self, machine: &str, expected: &Moment) -> Result<(), Violation> {
        let found = self.moment_of(machine)?;
        if found.nonce != expected.nonce || found.hash != expected.hash || found.log < expected.log {
            return wrong(format!("the guest is {found:?}, not {expected:?}"));
        }
        let mut guest = self.guest_of(machine)?;
        let deadline = Instant::now() + SOON;
        let first = guest.counter()?;
        while guest.counter()? <= first {
            if Instant::now() > deadline {
                return wrong(format!("the guest's counter stands still at {first}"));
            }
        }
        Ok(())
    }

    /// A machine that is off, and whose disk has every entry that was synced.
    fn check_disk(&self, expected: &Moment) -> Result<(), Violation> {
        let found = log_on_disk(&self.spinney, &self.machine())?;
        if found < expected.log {
            return wrong(format!("the disk has {found} entries of the log; {} were synced", expected.log));
        }
        Ok(())
    }

    /// A machine that never ran: every snapshot can be gone to.
    fn check_cold(&mut self, view: &View) -> Result<(), Violation> {
        if view.machine.is_empty() {
            self.ok("undo")?;
            let (back, _) = View::read(&self.spinney)?;
            return if back == self.canon { Ok(()) } else { wrong(format!("undo brought back {back}")) };
        }
        for name in view.names() {
            self.ok(&format!("goto {}@{name} --discard --yes", view.machine))?;
        }
        Ok(())
    }
}
