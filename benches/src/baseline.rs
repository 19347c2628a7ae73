//! What QEMU does by itself, on a machine of the same shape.
//!
//! Without its default speed limit, and with an fsync, which QEMU never does: both sides are timed from the command to
//! durable.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use qemu::binary::Version;
use qemu::command::{BootFirst, Disk, Layer, MachineSpec, RunFolder};
use qemu::image::QemuImg;
use qemu::process::Process;
use qemu::qmp::Qmp;
use serde_json::{Value, json};
use tempfile::TempDir;
use vm_tests::guest::{Guest, guest_port_args};

use crate::error::{Error, Result, system};
use crate::machine::SOON;
use crate::settings::Bench;

/// Between two looks at a migration; one takes QEMU some 0.1 ms.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Pauses the guest, saves it to a file that did not exist, syncs the file; how long that took. The guest runs again
/// afterwards, and the file is gone.
pub(crate) fn migrate_to_file(qmp: &Qmp, version: Version, folder: &Path) -> Result<Duration> {
    let path = folder.join("baseline-state");
    capabilities(qmp, &[])?;
    let began = Instant::now();
    qmp.execute("stop", json!({}))?;
    save_to(qmp, version, &path)?;
    File::open(&path).and_then(|file| file.sync_all()).map_err(system("sync", &path))?;
    let took = began.elapsed();
    qmp.execute("cont", json!({}))?;
    fs::remove_file(&path).map_err(system("remove", &path))?;
    Ok(took)
}

/// Switches the named capabilities on and every other one off.
fn capabilities(qmp: &Qmp, wanted: &[&str]) -> Result<()> {
    let known = qmp.execute("query-migrate-capabilities", json!({}))?;
    let names = known.as_array().into_iter().flatten();
    let list: Vec<Value> = names
        .filter_map(|entry| {
            let name = entry.get("capability")?.as_str()?;
            let state = wanted.contains(&name);
            (entry.get("state")?.as_bool()? != state).then(|| json!({ "capability": name, "state": state }))
        })
        .collect();
    if !list.is_empty() {
        qmp.execute("migrate-set-capabilities", json!({ "capabilities": list }))?;
    }
    Ok(())
}

fn save_to(qmp: &Qmp, version: Version, path: &Path) -> Result<()> {
    qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 }))?;
    let uri = match version >= Version::at(8, 2) {
        true => format!("file:{}", path.display()),
        false => format!("exec:cat > {}", path.display()),
    };
    qmp.execute("migrate", json!({ "uri": uri }))?;
    wait(qmp)
}

fn wait(qmp: &Qmp) -> Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let answer = qmp.execute("query-migrate", json!({}))?;
        let status = answer.get("status").and_then(Value::as_str).unwrap_or("none");
        match status {
            "completed" => return Ok(()),
            "failed" | "cancelled" => return Err(Error::Migration(answer.to_string())),
            _ if Instant::now() >= deadline => return Err(Error::Migration(format!("it is still {status}"))),
            _ => thread::sleep(LOOK_EVERY),
        }
    }
}

/// A QEMU of our own, with the command line that Spinney would give it. Ended when dropped.
pub(crate) struct OwnQemu<'a> {
    bench: &'a Bench,
    folder: TempDir,
    process: Process,
    qmp: Qmp,
    /// Its guest.
    pub(crate) guest: Guest,
    starts: u32,
}

impl<'a> OwnQemu<'a> {
    /// Boots a machine with `mib` MiB of memory and waits for its guest.
    ///
    /// # Errors
    /// This QEMU has no mapped-ram, or does not start.
    pub(crate) fn boot(bench: &'a Bench, mib: u64, place: &Path) -> Result<Self> {
        if bench.qemu.version < Version::at(9, 0) {
            let version = bench.qemu.version;
            return Err(Error::Unavailable(format!("QEMU {version} has no mapped-ram (9.0 and later)")));
        }
        let folder = tempfile::Builder::new()
            .prefix("spinney-bench-")
            .tempdir_in(place)
            .map_err(system("make a folder in", place))?;
        let img = QemuImg::find(None, Some(&bench.qemu.path))?;
        let overlay = folder.path().join("base.qcow2");
        img.create(&overlay, bench.disk_bytes()?, Some((&bench.guest.join("data.img"), "raw")))?;
        let (process, qmp, run) =
            spawn(bench, mib, folder.path(), "boot", &["data.img", "base.qcow2"], false)?;
        let guest = connect(&process, &run)?;
        Ok(Self { bench, folder, process, qmp, guest, starts: 0 })
    }

    /// Saves the machine as mapped-ram into a file, for [`OwnQemu::load`]; it stands still afterwards.
    pub(crate) fn save(&mut self) -> Result<()> {
        self.qmp.execute("stop", json!({}))?;
        capabilities(&self.qmp, &["mapped-ram"])?;
        save_to(&self.qmp, self.bench.qemu.version, &self.file())
    }

    /// Kills the process: what [`OwnQemu::load`] takes does not have its end in it then.
    pub(crate) fn end(&self) {
        self.process.kill();
    }

    /// What the run works with.
    pub(crate) fn bench(&self) -> &'a Bench {
        self.bench
    }

    /// The folder with what was saved, and its disk.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Kills the process and loads the file into a new one; from the kill to the guest's first answer.
    pub(crate) fn load(&mut self, mib: u64) -> Result<Duration> {
        self.starts += 1;
        let name = format!("load{}", self.starts);
        let layer = format!("{name}.qcow2");
        let img = QemuImg::find(None, Some(&self.bench.qemu.path))?;
        // Made beforehand, as Spinney makes its overlay before it ends the old process.
        let below = Some((Path::new("base.qcow2"), "qcow2"));
        img.create(&self.folder.path().join(&layer), self.bench.disk_bytes()?, below)?;
        let began = Instant::now();
        self.process.kill();
        let layers = ["data.img", "base.qcow2", layer.as_str()];
        let (process, qmp, run) = spawn(self.bench, mib, self.folder.path(), &name, &layers, true)?;
        (self.process, self.qmp) = (process, qmp);
        capabilities(&self.qmp, &["mapped-ram"])?;
        self.qmp.execute("migrate-incoming", json!({ "uri": format!("file:{}", self.file().display()) }))?;
        wait(&self.qmp)?;
        self.qmp.execute("cont", json!({}))?;
        self.guest = connect(&self.process, &run)?;
        Ok(began.elapsed())
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("mapped-ram")
    }
}

impl Drop for OwnQemu<'_> {
    fn drop(&mut self) {
        self.process.kill();
    }
}

/// Starts QEMU on a chain of layers in `folder` (`data.img` is the test guest's).
fn spawn(
    bench: &Bench,
    mib: u64,
    folder: &Path,
    name: &str,
    layers: &[&str],
    incoming: bool,
) -> Result<(Process, Qmp, RunFolder)> {
    let run = RunFolder(folder.join(name));
    fs::create_dir(&run.0).map_err(system("make", &run.0))?;
    let layer = |(index, file): (usize, &&str)| match index {
        0 => Layer { id: "0".into(), flat: false, file: bench.guest.join(file), format: "raw".into() },
        n => Layer { id: n.to_string(), flat: false, file: folder.join(file), format: "qcow2".into() },
    };
    let guest = |file: &str| bench.guest.join(file);
    let spec = MachineSpec {
        name: "baseline".into(),
        machine: bench.qemu.machine.clone(),
        accel: bench.accel,
        memory: mib << 20,
        memory_image: None,
        cpus: 1,
        uuid: "5914e700-0000-4000-8000-00000000000b".into(),
        generation: "5914e700-0000-4000-8000-00000000000c".into(),
        disks: vec![Disk {
            id: "disk0".into(),
            layers: layers.iter().enumerate().map(layer).collect(),
            place: 0,
            read_only: false,
        }],
        cdrom: None,
        boot: BootFirst::Disk,
        uefi: None,
        vnc: false,
        cards: Vec::new(),
        guest_agent: false,
        kernel: Some((guest("vmlinuz"), Some(guest("initrd.img")), Some(bench.cmdline()?))),
        only_migratable: true,
        direct: true,
        incoming,
        stopped: incoming,
        extra: guest_port_args("{run}/port".as_ref()),
    };
    let process = Process::spawn(&bench.qemu.path, &spec.arguments(&run), &run.log())
        .map_err(system("start", &bench.qemu.path))?;
    match Qmp::connect(&run.monitor(), false, Duration::from_secs(20)) {
        Ok(qmp) => Ok((process, qmp, run)),
        Err(error) => {
            process.kill();
            Err(error.into())
        }
    }
}

fn connect(process: &Process, run: &RunFolder) -> Result<Guest> {
    let connected = Guest::connect(&run.0.join("port"), SOON);
    if connected.is_err() {
        process.kill();
    }
    Ok(connected?)
}
