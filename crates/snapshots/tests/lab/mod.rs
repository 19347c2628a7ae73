//! A state folder with machines that are off: everything but memory, in milliseconds a step. Needs QEMU and qemu-img installed
//! (`make setup`); no guest runs.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use snapshots::{Code, Context, DiskSource, Engine, GotoPower, MachineConfig, Settings, TakeOptions};

pub(crate) struct Lab {
    pub(crate) engine: Option<Arc<Engine>>,
    pub(crate) dir: tempfile::TempDir,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let mut lab = Self { engine: None, dir: tempfile::tempdir().unwrap() };
        lab.open();
        lab
    }

    pub(crate) fn open(&mut self) -> Vec<String> {
        self.engine = None;
        let state = self.dir.path().join("s");
        let settings =
            Settings { state, qemu: None, qemu_img: None, accel: Some("tcg".into()), warden: None };
        // A child that another test is starting has the lock's file open until its exec.
        let mut tries = 0;
        let (engine, notes) = loop {
            match Engine::open(settings.clone()) {
                Err(error) if error.code() == Code::Refused && tries < 100 => tries += 1,
                opened => break opened.unwrap(),
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        };
        self.engine = Some(engine);
        notes
    }

    pub(crate) fn engine(&self) -> &Engine {
        self.engine.as_ref().unwrap()
    }

    pub(crate) fn create(&self, name: &str, disks: Vec<DiskSource>) {
        self.engine().create(&Context::new(), name, config(disks)).unwrap();
    }

    pub(crate) fn take(&self, name: &str) {
        let options = TakeOptions { name: Some(name.into()), ..TakeOptions::default() };
        self.engine().take(&Context::new(), "m", options).unwrap();
    }

    pub(crate) fn goto(&self, name: &str, discard: bool) {
        self.engine().goto(&Context::new(), &format!("m@{name}"), GotoPower::Recorded, discard).unwrap();
    }

    /// Writes a word to the first disk of here, as a guest would.
    pub(crate) fn write(&self, offset: u64, byte: u8) {
        self.write_to("m", offset, byte);
    }

    /// The same on another machine.
    pub(crate) fn write_to(&self, machine: &str, offset: u64, byte: u8) {
        qemu_io(&self.here_of(machine), &format!("write -P {byte} {offset} 4096"));
    }

    /// True if the first disk of here holds this byte there.
    pub(crate) fn holds(&self, offset: u64, byte: u8) -> bool {
        self.holds_in("m", offset, byte)
    }

    /// The same on another machine.
    pub(crate) fn holds_in(&self, machine: &str, offset: u64, byte: u8) -> bool {
        // A machine that runs may have it too.
        let output = Command::new("qemu-io")
            .args(["-r", "-U", "-f", "qcow2", "-c", &format!("read -P {byte} {offset} 4096")])
            .arg(self.here_of(machine))
            .output()
            .unwrap();
        assert!(output.status.code().is_some_and(|code| code <= 1), "{output:?}");
        !String::from_utf8_lossy(&output.stdout).contains("verification failed")
    }

    /// The layer that the first disk of `m` writes to, as the catalog has it: the clock of files is too coarse to tell the newest.
    pub(crate) fn here(&self) -> PathBuf {
        self.here_of("m")
    }

    /// The same of another machine.
    pub(crate) fn here_of(&self, machine: &str) -> PathBuf {
        let catalog = rusqlite::Connection::open(self.dir.path().join("s/catalog.db")).unwrap();
        let query = "SELECT layers.file FROM targets JOIN here_disks ON here_disks.target = targets.id
             JOIN layers ON layers.id = here_disks.layer
             WHERE targets.name = ?1 AND targets.removed IS NULL AND here_disks.disk = 'disk0'";
        let file: String = catalog.query_row(query, [machine], |row| row.get(0)).unwrap();
        let mut all = layers(self.dir.path()).into_iter();
        all.find(|path| path.ends_with(&file)).unwrap()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        let tree = self.engine().tree("m").unwrap();
        tree.snapshots.iter().filter(|s| !s.undo_point).map(|s| s.name.clone()).collect()
    }

    pub(crate) fn code(&self, result: snapshots::Result<impl std::fmt::Debug>) -> Code {
        result.unwrap_err().code()
    }
}

impl Drop for Lab {
    /// No process outlives its folder.
    fn drop(&mut self) {
        let Some(engine) = &self.engine else { return };
        for machine in engine.list().unwrap_or_default() {
            if machine.pid.is_some() {
                let _ = engine.kill(&Context::new(), &machine.name);
            }
        }
    }
}

pub(crate) fn config(disks: Vec<DiskSource>) -> MachineConfig {
    MachineConfig { disks: disks.into_iter().map(Into::into).collect(), ..MachineConfig::bare(64 << 20) }
}

pub(crate) fn layers(dir: &Path) -> Vec<PathBuf> {
    let groups = std::fs::read_dir(dir.join("s/groups")).unwrap();
    let folders = groups.map(|g| g.unwrap().path().join("layers"));
    folders.flat_map(|f| std::fs::read_dir(f).unwrap()).map(|e| e.unwrap().path()).collect()
}

/// Ends a process as a crash would.
pub(crate) fn kill_process(pid: u32) {
    let process = qemu::process::Process::open(pid).unwrap();
    process.kill();
}

pub(crate) fn qemu_io(image: &Path, command: &str) {
    let status = Command::new("qemu-io").args(["-f", "qcow2", "-c", command]).arg(image).output().unwrap();
    assert!(status.status.success(), "{status:?}");
}

pub(crate) const DISK: DiskSource = DiskSource::Size(16 << 20);
