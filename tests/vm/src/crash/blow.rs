//! Who is killed, and how.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::act::{Act, Plan, Stage};
use super::scene::{Scene, words_file};
use crate::guest::Guest;
use crate::harness::{Spinney, kill};
use crate::small_disk::SmallDisk;
use crate::walk::Violation;

/// How soon a guest ticks whose daemon is gone.
const DEAD: Duration = Duration::from_secs(6);
/// How soon a guest ticks whose daemon is stopped: two seconds without a sign of life, and what it takes to mend.
const STOPPED: Duration = Duration::from_secs(10);
/// How long the guest may take to add an entry to its log at a step: it may stand still there.
const QUICK: Duration = Duration::from_millis(250);
/// How soon a step is reached.
const REACHED: Duration = Duration::from_secs(60);

/// Who is killed at a step, as by `kill -9`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The daemon.
    Daemon,
    /// Nobody: the daemon is stopped, as by SIGSTOP, until the guest ticks.
    Stopped,
    /// The daemon, and the next one at this step of its recovery.
    Successor(&'static str),
    /// The warden.
    Warden,
    /// The warden; then the daemon is stopped, once there is another warden.
    WardenThenDaemon,
    /// Daemon and warden at once.
    Both,
    /// QEMU: the old one, where there are two.
    Qemu,
    /// The new QEMU of a goto.
    Incoming,
    /// Whoever serves the memory that is mapped, as often as somebody takes over.
    View,
    /// All of them, and what was not synced.
    Power,
    /// Nobody: the disk has no room from then on, until the command has ended.
    Room,
    /// The daemon, with a disk that has no room either for the next one, until that has put in order what it can.
    RoomThenDaemon,
}

impl Victim {
    /// Whether there is anything to be learnt of this blow at this step.
    pub fn strikes_at(self, act: Act, step: &str) -> bool {
        let guest = act.stage() != Stage::Cold;
        match self {
            Victim::Daemon | Victim::Power => true,
            // Nothing has no room that is taken back for another reason, or whose command is done before.
            Victim::Room => act != Act::TakeCancelled && !act.is_due(),
            Victim::Successor(_) | Victim::RoomThenDaemon => false,
            Victim::View => guest && !act.loads(),
            // No guest stands still there.
            Victim::Warden | Victim::Stopped | Victim::Both | Victim::WardenThenDaemon if act.is_due() => {
                false
            }
            Victim::Warden | Victim::Stopped => guest && !act.switches(),
            Victim::Both => act.takes() || act.goes(),
            Victim::WardenThenDaemon => {
                let held = matches!(step, "take.read" | "take.switched" | "goto.still" | "goto.held");
                // Where nothing of the guest's memory is taken nobody waits.
                held && guest && !act.leaves_memory_out()
            }
            // Where there is one.
            Victim::Qemu => {
                let none = match act {
                    Act::Start => step == "journal.begun",
                    Act::GotoFromOff => step == "goto.overlays",
                    Act::GotoToOff => step == "goto.ended",
                    Act::Suspend => step == "suspend.ended",
                    Act::Wake | Act::Regroup | Act::StopBack => true,
                    _ => matches!(step, "stop.ended" | "kill.ended" | "goto.alone"),
                };
                guest && !none
            }
            Victim::Incoming => {
                let both = [
                    "goto.started",
                    "goto.noted",
                    "goto.memory",
                    "goto.loaded",
                    "goto.still",
                    "goto.held",
                    "goto.decided",
                ];
                let goes = matches!(act, Act::Goto | Act::GotoLoaded | Act::GotoDiscard | Act::UndoGoto);
                goes && both.contains(&step) || matches!(step, "wake.loaded" | "fork.started")
            }
        }
    }

    /// The daemon lives on, and answers for the act itself.
    pub(super) fn spares_the_daemon(self) -> bool {
        matches!(self, Victim::Warden | Victim::Qemu | Victim::Incoming | Victim::View | Victim::Room)
    }

    /// The machine may be off afterwards.
    pub(super) fn ends_the_machine(self) -> bool {
        matches!(self, Victim::Qemu | Victim::Incoming | Victim::Power)
    }
}

impl Scene {
    /// Does the act, deals the blow, checks. True if the act had happened.
    pub(super) fn blow_and_check(
        &mut self,
        act: Act,
        plan: &Plan,
        step: &str,
        victim: Victim,
    ) -> Result<bool, Violation> {
        let old = self.spinney.machines();
        let layers = self.spinney.layers();
        let taken = self.here.clone();
        let marker = self.spinney.folder().join(format!("at-{}", self.number));
        let how = match victim {
            Victim::Daemon | Victim::Successor(_) => "kill",
            Victim::Stopped => "stop",
            _ => "wait",
        };
        let mut words = format!("{step} {how} {}\n", marker.display());
        if let Victim::Successor(then) = victim {
            words.push_str(&format!("{then} kill {}-then\n", marker.display()));
        }
        if act == Act::TakeCancelled {
            words.push_str(&format!("take.memory wait {}-first\n", marker.display()));
        }
        self.say(&words)?;
        if self.disk.is_some() && self.spinney.port(&self.machine())?.is_some() {
            // Nothing of its own is on its way to the disk: a guest without room stands still, which is another test's.
            self.guest()?.sync()?;
        }
        let mut command = self.spinney.under_way(&plan.words);
        let deadline = Instant::now() + REACHED;
        if act == Act::TakeCancelled {
            let first = marker.with_file_name(format!("at-{}-first", self.number));
            while !first.exists() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(2));
            }
            command.interrupt();
            // Until the daemon has heard it.
            thread::sleep(Duration::from_millis(300));
            let _ = fs::remove_file(first);
        }
        // A daemon that has died is no longer asked: the marker is there for good.
        while !marker.exists() {
            if Instant::now() > deadline || command.has_ended() && !act.comes_later() {
                let ended = command.end();
                return Err(Violation::Wrong(format!(
                    "the step was not reached: {:?} {}",
                    ended.code, ended.stderr
                )));
            }
            thread::sleep(Duration::from_millis(2));
        }
        let struck = self.deal(victim, act, &marker, &old);
        if struck.is_err() {
            // Whoever waits there still would wait for ever.
            let _ = self.release(&marker);
        }
        let ended = command.end();
        self.disk.iter().for_each(SmallDisk::empty);
        if let Victim::Successor(_) = victim {
            // Whoever started it, the next daemon dies on its way; the one after that does not.
            let deadline = Instant::now() + REACHED;
            let then = marker.with_file_name(format!("at-{}-then", self.number));
            while !then.exists() && Instant::now() < deadline {
                let _ = self.ok("ls");
            }
            if !then.exists() {
                return Err(Violation::Wrong("recovery did not come to its step".to_owned()));
            }
        }
        self.say("")?;
        struck?;
        let happened = self.after(act, plan, victim, &ended, &layers, &taken)?;
        if happened && victim == Victim::Incoming && step != "goto.decided" {
            return Err(Violation::Wrong("a machine was given up for one that was gone already".to_owned()));
        }
        Ok(happened)
    }

    fn deal(&mut self, victim: Victim, act: Act, marker: &Path, old: &[u32]) -> Result<(), Violation> {
        let daemon = self.spinney.daemon();
        if !matches!(victim, Victim::Daemon | Victim::Stopped | Victim::Successor(_)) && self.disk.is_none() {
            self.sample();
        }
        // Without any new command.
        let has_guest = self.here.running && self.stage != Stage::Cold;
        let away = act.switches()
            || matches!(act, Act::GotoToOff | Act::Suspend | Act::Wake | Act::Regroup | Act::StopBack);
        let ticks = has_guest && !away;
        match victim {
            Victim::Daemon if ticks => ticks_somewhere(&self.spinney, DEAD)?,
            Victim::Stopped => {
                let ticked = if ticks { ticks_somewhere(&self.spinney, STOPPED) } else { Ok(()) };
                // One that was ended meanwhile does not hear it.
                daemon.into_iter().for_each(|pid| signal(pid, Signal::CONT));
                ticked?;
            }
            Victim::Daemon | Victim::Successor(_) => {}
            Victim::Warden => {
                self.spinney.warden().into_iter().for_each(kill);
                self.release(marker)?;
            }
            Victim::WardenThenDaemon => self.stop_after_warden(marker)?,
            Victim::Both => {
                // In one go: whichever was first, the other must not have the time to notice.
                let both = [self.spinney.daemon(), self.spinney.warden()];
                both.iter().flatten().for_each(|pid| signal(*pid, Signal::STOP));
                both.into_iter().flatten().for_each(kill);
            }
            Victim::Qemu => {
                let machines = self.spinney.machines();
                let still: Vec<u32> = machines.iter().copied().filter(|pid| old.contains(pid)).collect();
                (if still.is_empty() { machines } else { still }).into_iter().for_each(kill);
                self.release(marker)?;
            }
            Victim::Incoming => {
                let new = self.spinney.machines().into_iter().filter(|pid| !old.contains(pid));
                new.for_each(kill);
                self.release(marker)?;
            }
            Victim::View => {
                for _ in 0..3 {
                    if !self.spinney.kill_views() {
                        return Err(Violation::Wrong("nobody serves".to_owned()));
                    }
                    // Nobody can do anything about the death of both.
                    let deadline = Instant::now() + DEAD;
                    while self.spinney.views().1.is_empty() && Instant::now() < deadline {
                        thread::sleep(Duration::from_millis(2));
                    }
                }
                self.release(marker)?;
            }
            Victim::Power => self.spinney.cut_power(),
            Victim::RoomThenDaemon => {
                self.disk.iter().for_each(SmallDisk::fill);
                daemon.into_iter().for_each(kill);
                self.ok("ls")?;
            }
            Victim::Room => {
                self.disk.iter().for_each(SmallDisk::fill);
                self.release(marker)?;
            }
        }
        Ok(())
    }

    /// The warden dies, and the daemon is stopped when there is another: what is armed must be armed there.
    fn stop_after_warden(&self, marker: &Path) -> Result<(), Violation> {
        let first = self.spinney.warden();
        first.into_iter().for_each(kill);
        let deadline = Instant::now() + Duration::from_secs(2);
        while self.spinney.warden().is_none_or(|pid| Some(pid) == first) {
            if Instant::now() > deadline {
                return Err(Violation::Wrong("the warden was not replaced".to_owned()));
            }
            thread::sleep(Duration::from_millis(5));
        }
        // It has to connect to the guest's monitor first.
        thread::sleep(Duration::from_millis(300));
        let daemon = self.spinney.daemon().unwrap_or_default();
        signal(daemon, Signal::STOP);
        // A goto from a machine that was off is taken back to that.
        let ticked = if self.here.running { ticks_somewhere(&self.spinney, STOPPED) } else { Ok(()) };
        // One that was ended meanwhile does not hear it.
        signal(daemon, Signal::CONT);
        self.release(marker)?;
        ticked
    }

    /// Adds entries to the log of a guest that runs on, and notes that they are synced.
    fn sample(&mut self) {
        for run in self.spinney.runs() {
            let Ok(mut guest) = Guest::connect(&run.join("test"), QUICK) else { continue };
            guest.set_timeout(QUICK);
            // A machine that is being booted, or one that was gone back to, has another.
            if guest.nonce().is_ok_and(|nonce| nonce == self.here.nonce)
                && guest.hash().is_ok_and(|hash| hash == self.here.hash)
                && let Ok(last) = guest.log_step(2)
            {
                self.here.log = self.here.log.max(last);
            }
        }
    }

    fn say(&self, words: &str) -> Result<(), Violation> {
        let file = words_file(&self.spinney);
        // By another name first: a daemon reads it at every step.
        let new = file.with_extension("new");
        let said = fs::write(&new, words).and_then(|()| fs::rename(&new, &file));
        said.map_err(|error| Violation::Wrong(format!("{}: {error}", file.display())))
    }

    /// The act goes on.
    fn release(&self, marker: &Path) -> Result<(), Violation> {
        self.say("")?;
        fs::remove_file(marker).map_err(|error| Violation::Wrong(format!("{}: {error}", marker.display())))
    }
}

/// Waits until a guest's counter moves, whichever process it is in, without a question to the daemon.
pub fn ticks_somewhere(spinney: &Spinney, limit: Duration) -> Result<(), Violation> {
    let deadline = Instant::now() + limit;
    let moment = Duration::from_millis(500);
    while Instant::now() < deadline {
        for run in spinney.runs() {
            let Ok(mut guest) = Guest::connect(&run.join("test"), moment) else { continue };
            guest.set_timeout(moment);
            let Ok(first) = guest.counter() else { continue };
            thread::sleep(Duration::from_millis(50));
            if guest.counter().is_ok_and(|now| now > first) {
                return Ok(());
            }
        }
    }
    Err(Violation::Wrong(format!("no guest ticked within {limit:?}")))
}

fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let _ = pid.map(|pid| kill_process(pid, signal));
}
