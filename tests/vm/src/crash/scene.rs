//! A machine in a known state, before and after every blow.

use std::collections::HashMap;
use std::net::TcpListener;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use super::act::{Act, Stage};
use super::blow::Victim;
use super::view::View;
use super::{Row, Stroke};
use crate::guest::{Guest, Mix};
use crate::harness::{Failed, Spinney};
use crate::small_disk::SmallDisk;
use crate::walk::Violation;

/// The snapshot that everything begins with.
pub(super) const BASE: &str = "s1";
/// MiB of the machine: the kernel of the test guest is large.
const MIB: u64 = 128;
/// MiB that the guest fills.
const FILL: u64 = 8;
/// Synced entries a second that the guest adds to its log by itself.
const LOG_RATE: u64 = 20;
/// How long a guest may take to answer; it may be booting on a busy host.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a machine knows at an instant.
#[derive(Clone, Debug, Default)]
pub(super) struct Moment {
    pub(super) running: bool,
    pub(super) nonce: String,
    pub(super) hash: u64,
    /// Entries of the log that are known to be synced.
    pub(super) log: u64,
}

/// A machine with its tree, and what is known of both.
#[derive(Debug)]
pub struct Scene {
    /// Where the machine lives.
    pub spinney: Spinney,
    /// What was done.
    pub strokes: Vec<Stroke>,
    /// The disk that it lies on, if that is to become full.
    pub(super) disk: Option<SmallDisk>,
    pub(super) stage: Stage,
    pub(super) number: u64,
    pub(super) here: Moment,
    /// Snapshots, by name.
    pub(super) known: HashMap<String, Moment>,
    /// The undo point that an act begins with.
    pub(super) kept: Option<String>,
    /// The tree between two acts.
    pub(super) canon: View,
    /// Memory that is brought back is mapped, not loaded ...
    mapped: bool,
    /// ... if this host can do that.
    can_map: bool,
}

impl Scene {
    /// Makes the machine.
    pub fn begin(spinney: Spinney, stage: Stage) -> Result<Self, Violation> {
        Self::make(spinney, stage, None)
    }

    /// Makes the machine on a disk that is to become full.
    pub fn begin_on(disk: SmallDisk, stage: Stage) -> Result<Self, Violation> {
        Self::make(Spinney::at(&disk.path(), &[]), stage, Some(disk))
    }

    fn make(mut spinney: Spinney, stage: Stage, disk: Option<SmallDisk>) -> Result<Self, Violation> {
        let words = words_file(&spinney).display().to_string();
        spinney.set("SPINNEY_CRASH", &format!("@{words}"));
        let mut scene = Self {
            spinney,
            strokes: Vec::new(),
            disk,
            stage,
            number: 0,
            here: Moment::default(),
            known: HashMap::new(),
            kept: None,
            canon: View::default(),
            mapped: true,
            can_map: false,
        };
        scene.can_map = scene.spinney.can_map()?;
        if !scene.can_map {
            eprintln!("memory is loaded: this host maps none");
        }
        match stage {
            Stage::Cold => scene.make_cold()?,
            Stage::Guest => scene.make_guest(&[])?,
            Stage::GuestWithPort => {
                let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
                let port = free.map_err(|error| Violation::Wrong(error.to_string()))?.port();
                let forward = format!("user,id=fwd,hostfwd=tcp:127.0.0.1:{port}-:22");
                scene.make_guest(&["-netdev", &forward, "-device", "virtio-net-pci,netdev=fwd"])?;
            }
        }
        scene.canon = View::read(&scene.spinney)?.0;
        let folder = scene.clones_folder();
        std::fs::create_dir_all(&folder).map_err(|error| Violation::Wrong(format!("{folder}: {error}")))?;
        Ok(scene)
    }

    /// Where the files of full clones are to be.
    pub(super) fn clones_folder(&self) -> String {
        self.spinney.folder().join("clones").display().to_string()
    }

    /// Strikes every step of these rows; `all` also those that `make test` leaves to the soak. `SPINNEY_CRASH_ACTS=Clone,CloneTo` strikes
    /// those of these acts alone.
    pub fn play(&mut self, rows: &[Row], victim: Victim, all: bool) -> Result<(), Violation> {
        let stage = self.stage;
        let only = std::env::var("SPINNEY_CRASH_ACTS").ok();
        let wanted = |row: &&Row| {
            let act = format!("{:?}", row.act);
            only.as_ref().is_none_or(|only| only.split(',').any(|name| name == act))
        };
        for row in rows.iter().filter(|row| row.act.stage() == stage).filter(wanted) {
            let more = if all { row.more } else { &[] };
            for step in row.steps.iter().chain(more) {
                if victim.strikes_at(row.act, step) {
                    self.strike(row.act, step, victim)?;
                }
            }
        }
        Ok(())
    }

    /// Does one act, kills somebody at one of its steps, and checks everything. The error names the three.
    pub fn strike(&mut self, act: Act, step: &str, victim: Victim) -> Result<(), Violation> {
        let struck = self.reset(!act.loads()).and_then(|()| {
            let plan = act.prepare(self)?;
            self.blow_and_check(act, &plan, step, victim)
        });
        let happened =
            struck.map_err(|error| Violation::Wrong(format!("{act:?}, {victim:?} at {step}: {error}")))?;
        let victim = format!("{victim:?}");
        self.strokes.push(Stroke { act: format!("{act:?}"), victim, step: step.to_owned(), happened });
        Ok(())
    }

    /// Everything is whole, and nothing is left when the machine is removed.
    pub fn end(&mut self) -> Result<(), Violation> {
        self.reset(true)?;
        let m = self.machine();
        if self.stage != Stage::Cold {
            // As after any power cut: it boots, and its disk has what it had.
            self.ok(&format!("kill {m}"))?;
            self.ok(&format!("start {m}"))?;
            let log = self.guest()?.log_check()?;
            if !log.valid || log.mem < self.here.log {
                return Err(Violation::Wrong(format!(
                    "a guest with {} entries booted with {log:?}",
                    self.here.log
                )));
            }
            self.ok(&format!("kill {m}"))?;
        }
        self.ok(&format!("rm {m} --yes"))?;
        self.ok("gc --now")?;
        let left = self.spinney.layers();
        if left.is_empty() { Ok(()) } else { Err(Violation::Wrong(format!("gc left {left:?}"))) }
    }

    /// Runs a command that must succeed.
    pub(super) fn ok(&self, words: &str) -> Result<Value, Failed> {
        self.spinney.ok(words)
    }

    /// The machine's name.
    pub(super) fn machine(&self) -> String {
        if self.canon.machine.is_empty() { "web".to_owned() } else { self.canon.machine.clone() }
    }

    /// A connection to the guest.
    pub(super) fn guest(&self) -> Result<Guest, Violation> {
        self.guest_of(&self.machine())
    }

    pub(super) fn guest_of(&self, machine: &str) -> Result<Guest, Violation> {
        let port = self.spinney.port(machine)?;
        let port = port.ok_or_else(|| Violation::Wrong(format!("{machine} should have a process")))?;
        Ok(Guest::connect(&port, PATIENCE)?)
    }

    /// What the guest says of itself.
    pub(super) fn moment(&self) -> Result<Moment, Violation> {
        self.moment_of(&self.machine())
    }

    pub(super) fn moment_of(&self, machine: &str) -> Result<Moment, Violation> {
        let mut guest = self.guest_of(machine)?;
        let (nonce, hash, log) = (guest.nonce()?, guest.hash()?, guest.log_check()?);
        if !log.ok {
            return Err(Violation::Wrong(format!("memory and disk are of two instants: {log:?}")));
        }
        Ok(Moment { running: true, nonce, hash, log: log.mem })
    }

    /// Changes the guest's memory and disk.
    pub(super) fn touch(&mut self, pages: u64) -> Result<(), Violation> {
        let mut guest = self.guest()?;
        guest.mutate(self.number + 1, pages)?;
        guest.log_step(2)?;
        drop(guest);
        self.here = self.moment()?;
        Ok(())
    }

    /// The state that every act begins with: nothing in the tree but what belongs there, the guest changed since, its memory `mapped` or
    /// loaded.
    fn reset(&mut self, mapped: bool) -> Result<(), Violation> {
        if self.stage == Stage::Cold {
            if View::read(&self.spinney)?.0 != self.canon {
                self.make_cold()?;
            }
            return Ok(());
        }
        if self.mapped != mapped {
            self.spinney.set_view(mapped);
            self.mapped = mapped;
        }
        let m = self.machine();
        self.ok(&format!("goto {m}@{BASE} --discard --yes"))?;
        if self.spinney.is_mapped(&m)? != (mapped && self.can_map) {
            return Err(Violation::Wrong(format!("its memory is to be mapped: {mapped}")));
        }
        let (view, points) = View::read(&self.spinney)?;
        for name in
            view.names().into_iter().filter(|name| *name != BASE).chain(points.iter().map(String::as_str))
        {
            self.ok(&format!("rm {m}@{name}"))?;
        }
        self.known.retain(|name, _| name == BASE);
        self.kept = None;
        self.number += 1;
        self.check_guest(&self.known[BASE].clone())?;
        self.touch(200)
    }

    /// The undo point that a goto has just kept is the guest as it was before.
    pub(super) fn keep_undo_point(&mut self) -> Result<(), Violation> {
        let (_, points) = View::read(&self.spinney)?;
        let point = points.first().cloned().ok_or_else(|| Violation::Wrong("no undo point".to_owned()))?;
        self.known.insert(point.clone(), self.here.clone());
        self.kept = Some(point);
        self.touch(100)
    }

    /// Snapshots of which two are removed: a pack goes, of another half is dead, and layers go.
    pub(super) fn make_garbage(&mut self) -> Result<(), Violation> {
        let m = self.machine();
        let fill = Mix { seed: 100 + self.number, unique: 80, dup: 0, disk: 0, zero: 20 };
        self.guest()?.fill(FILL, fill)?;
        self.ok(&format!("take {m} ga --mode stop-copy"))?;
        self.touch(1500)?;
        self.ok(&format!("take {m} gb --mode stop-copy"))?;
        self.known.insert("gb".to_owned(), self.here.clone());
        self.touch(700)?;
        self.ok(&format!("take {m} gc --mode stop-copy"))?;
        self.ok(&format!("goto {m}@gb --discard --yes"))?;
        self.ok(&format!("rm {m}@ga"))?;
        self.ok(&format!("rm {m}@gc"))?;
        self.touch(100)
    }

    fn make_cold(&mut self) -> Result<(), Violation> {
        for machine in self.ok("ls")?["machines"].as_array().into_iter().flatten() {
            self.ok(&format!("rm {} --yes", machine["name"].as_str().unwrap_or_default()))?;
        }
        self.ok("create web --memory 64M --network none --disk 64M")?;
        ["c1", "c2", "c3"].iter().try_for_each(|name| self.ok(&format!("take web {name}")).map(drop))?;
        Ok(())
    }

    fn make_guest(&mut self, qemu: &[&str]) -> Result<(), Violation> {
        self.spinney.create_guest_with("web", MIB, qemu)?;
        self.ok("start web")?;
        let mut guest = self.guest()?;
        guest.fill(FILL, Mix::default())?;
        guest.log_step(5)?;
        if self.disk.is_none() {
            guest.log_start(LOG_RATE)?;
        }
        drop(guest);
        self.here = self.moment()?;
        self.ok(&format!("take web {BASE} --mode stop-copy"))?;
        self.known.insert(BASE.to_owned(), self.here.clone());
        Ok(())
    }
}

/// The file that tells the daemon at which step what is to happen.
pub(super) fn words_file(spinney: &Spinney) -> PathBuf {
    spinney.folder().join("blows")
}
