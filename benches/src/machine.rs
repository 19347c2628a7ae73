//! A machine with the test guest, driven through `spinney` and the guest's port.

use std::path::{Path, PathBuf};
use std::time::Duration;

use qemu::qmp::Qmp;
use serde_json::{Value, json};
use vm_tests::guest::{Guest, Mix, guest_port_args};

use crate::error::{Error, Result};
use crate::spinney::{Done, Spinney};
use crate::watched::{self, Watched};

/// How long a guest may take to boot or to answer: an emulated one on two busy cores is slow.
pub(crate) const SOON: Duration = Duration::from_secs(120);
/// Guest memory of the figures about memory.
pub(crate) const LARGE_MIB: u64 = 1024;
/// How much of it is filled: 600 MB.
pub(crate) const FILLED_MIB: u64 = 572;

/// Our monitor's socket in a machine's run folder.
pub(crate) const MONITOR: &str = "bench";

/// The mix of the figures: 40 % unique, 20 % there eight times, 40 % copies of blocks of the guest's disk.
pub(crate) fn mixed(seed: u64) -> Mix {
    Mix { unique: 40, dup: 20, disk: 40, zero: 0, seed }
}

/// Nothing that could be shared.
pub(crate) fn unique(seed: u64) -> Mix {
    Mix { unique: 100, dup: 0, disk: 0, zero: 0, seed }
}

/// A machine that runs.
pub(crate) struct Machine<'a> {
    /// Where it lives.
    pub(crate) spinney: &'a Spinney<'a>,
    /// Its guest.
    pub(crate) guest: Guest,
    name: &'static str,
}

impl<'a> Machine<'a> {
    /// Makes and boots a machine with `mib` MiB of memory, and waits for its guest.
    pub(crate) fn boot(spinney: &'a Spinney<'a>, mib: u64) -> Result<Self> {
        let name = "vm";
        let memory = format!("{mib}M");
        let guest = &spinney.bench.guest;
        let file = |file: &str| guest.join(file).display().to_string();
        let (disk, kernel, initrd) = (file("data.img"), file("vmlinuz"), file("initrd.img"));
        let append = spinney.bench.cmdline()?;
        let mut args = vec!["create", name, "--memory", &memory, "--network", "none", "--disk", &disk];
        args.extend(["--kernel", &kernel, "--initrd", &initrd, "--append", &append]);
        let port = guest_port_args("{run}/port".as_ref());
        let mut port: Vec<String> = port.iter().map(|word| format!("--qemu-arg={word}")).collect();
        port.extend(monitor_args());
        args.extend(port.iter().map(String::as_str));
        spinney.run(&args)?;
        spinney.run(&["start", name])?;
        let run = run_folder(spinney, name)?;
        let guest = Guest::connect(&run.join("port"), SOON)?;
        Ok(Self { spinney, guest, name })
    }

    /// Fills memory; it is at rest afterwards.
    pub(crate) fn fill(&mut self, mib: u64, mix: Mix) -> Result<()> {
        self.guest.set_timeout(SOON);
        self.guest.fill(mib, mix)?;
        std::thread::sleep(Duration::from_millis(500));
        Ok(())
    }

    /// The folder of its QEMU's sockets.
    pub(crate) fn run_folder(&self) -> Result<PathBuf> {
        run_folder(self.spinney, self.name)
    }

    /// The monitor of its QEMU that the daemon does not use.
    pub(crate) fn second_monitor(&self) -> Result<Qmp> {
        monitor(&self.run_folder()?)
    }

    /// Has the guest stand still, and writes its memory to a new file.
    pub(crate) fn memory_to(&self, path: &Path, mib: u64) -> Result<()> {
        self.spinney.run(&["pause", self.name])?;
        write_memory(&self.second_monitor()?, path, mib)
    }

    /// Takes a snapshot in a mode, or in the default one.
    pub(crate) fn take(&self, mode: Option<&str>) -> Result<Done> {
        match mode {
            Some(mode) => self.spinney.run(&["take", self.name, "--mode", mode]),
            None => self.spinney.run(&["take", self.name]),
        }
    }

    /// Takes a snapshot with a name.
    pub(crate) fn take_named(&self, snapshot: &str) -> Result<Done> {
        self.spinney.run(&["take", self.name, snapshot])
    }

    /// Goes to a snapshot, keeping an undo point or not, and connects to the guest again.
    pub(crate) fn goto(&mut self, snapshot: &str, discard: bool) -> Result<Done> {
        let address = format!("{}@{snapshot}", self.name);
        let mut args = vec!["goto", &address];
        if discard {
            args.extend(["--discard", "--yes"]);
        }
        let done = self.spinney.run(&args)?;
        self.guest = Guest::connect(&self.run_folder()?.join("port"), SOON)?;
        Ok(done)
    }

    /// Goes to a snapshot without an undo point, watched from outside; how long the new guest took to answer once its CPUs ran.
    pub(crate) fn goto_watched(&mut self, snapshot: &str) -> Result<(Done, Duration)> {
        let (done, running, answered) = self.goto_timed(snapshot)?;
        Ok((done, answered.saturating_sub(running)))
    }

    /// The same; from the command's start until the new guest's CPUs ran, and until it answered.
    pub(crate) fn goto_timed(&mut self, snapshot: &str) -> Result<(Done, Duration, Duration)> {
        let address = format!("{}@{snapshot}", self.name);
        let Watched { done, running, answered, guest, .. } =
            watched::run(self.spinney, &["goto", &address, "--discard", "--yes"])?;
        self.guest = guest;
        Ok((done, running, answered))
    }

    /// Files that its QEMU has open for its disks.
    pub(crate) fn layers_open(&self) -> Result<usize> {
        let nodes = self.second_monitor()?.execute("query-named-block-nodes", json!({ "flat": true }))?;
        let nodes = nodes.as_array().ok_or(Error::Lacks("block nodes"))?;
        Ok(nodes.iter().filter(|node| node.get("drv").and_then(Value::as_str) == Some("file")).count())
    }

    /// Cuts its power: it is off, and what was taken of it stays.
    pub(crate) fn kill(self) -> Result<()> {
        self.spinney.run(&["kill", self.name]).map(drop)
    }
}

/// Arguments of `create` for a monitor of our own: of Spinney's two the daemon has one, and the warden needs the other.
pub(crate) fn monitor_args() -> [String; 2] {
    ["-qmp", &format!("unix:{{run}}/{MONITOR},server=on,wait=off")].map(|word| format!("--qemu-arg={word}"))
}

/// That monitor of the machine with this run folder.
pub(crate) fn monitor(run: &Path) -> Result<Qmp> {
    Ok(Qmp::connect(&run.join(MONITOR), false, Duration::from_secs(5))?)
}

/// Writes the memory of a machine that stands still, up to the hole below 4 GiB, to a file.
pub(crate) fn write_memory(monitor: &Qmp, path: &Path, mib: u64) -> Result<()> {
    let file = path.display().to_string();
    monitor.execute_within("pmemsave", json!({ "val": 0, "size": mib << 20, "filename": file }), SOON)?;
    Ok(())
}

/// The folder of a machine's sockets.
pub(crate) fn run_folder(spinney: &Spinney<'_>, name: &str) -> Result<PathBuf> {
    let shown = spinney.run(&["show", name])?;
    let console = shown.document.get("console").and_then(Value::as_str).ok_or(Error::Lacks("console"))?;
    PathBuf::from(console).parent().map(ToOwned::to_owned).ok_or(Error::Lacks("run folder"))
}
