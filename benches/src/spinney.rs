//! Spinney as its users have it: the executable, with a daemon and a state folder of its own.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use snapfs::mount::{is_mounted, unmount};
use tempfile::TempDir;

use crate::error::{Error, Result, system};
use crate::memory_watch::MemoryWatch;
use crate::settings::Bench;

/// How long the daemon may take to listen, and to end.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long what is done in the background may take.
const BACKGROUND_PATIENCE: Duration = Duration::from_secs(600);
/// For so long a daemon is looked at that may be at rest: longer than it waits before it begins something.
const AT_REST: Duration = Duration::from_millis(600);

/// What a command printed, and how long it took from its start to its end as its caller saw it.
#[derive(Debug)]
pub(crate) struct Done {
    /// The document of `--json`.
    pub(crate) document: Value,
    /// From before the process was started to its end.
    pub(crate) wall: Duration,
}

impl Done {
    /// A number of the document.
    pub(crate) fn number(&self, key: &'static str) -> Result<f64> {
        self.document.get(key).and_then(Value::as_f64).ok_or(Error::Lacks(key))
    }

    /// A word of the document.
    pub(crate) fn word(&self, key: &'static str) -> Result<&str> {
        self.document.get(key).and_then(Value::as_str).ok_or(Error::Lacks(key))
    }
}

/// A state folder with its daemon. Dropped, machines and daemon are ended and the folder is removed.
#[derive(Debug)]
pub(crate) struct Spinney<'a> {
    /// What the run works with.
    pub(crate) bench: &'a Bench,
    folder: TempDir,
    daemon: Child,
    watch: Option<MemoryWatch>,
}

impl<'a> Spinney<'a> {
    /// Starts a daemon for a new state folder in `place`.
    pub(crate) fn start(bench: &'a Bench, place: &Path) -> Result<Self> {
        bench.check()?;
        let made = tempfile::Builder::new().prefix("spinney-bench-").tempdir_in(place);
        let folder = made.map_err(system("make a folder in", place))?;
        let daemon = begin(bench, folder.path())?;
        let watch = MemoryWatch::start(daemon.id(), bench.peaks.clone());
        let mut spinney = Self { bench, folder, daemon, watch: Some(watch) };
        spinney.wait()?;
        Ok(spinney)
    }

    /// Ends the daemon in order, and with it what it served that no machine needs.
    pub(crate) fn stop_daemon(&mut self) -> Result<()> {
        self.watch.take();
        let pid = i32::try_from(self.daemon.id()).ok().and_then(Pid::from_raw);
        let _ = pid.map(|pid| kill_process(pid, Signal::TERM));
        let deadline = Instant::now() + PATIENCE;
        while matches!(self.daemon.try_wait(), Ok(None)) {
            if Instant::now() >= deadline {
                return Err(Error::Lacks("end of the daemon"));
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Starts the next one after that.
    pub(crate) fn start_daemon(&mut self) -> Result<()> {
        self.daemon = begin(self.bench, self.state())?;
        self.watch = Some(MemoryWatch::start(self.daemon.id(), self.bench.peaks.clone()));
        self.wait()
    }

    fn wait(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.state().join("spinney.sock").exists() {
            let ended = matches!(self.daemon.try_wait(), Ok(Some(_)));
            if ended || Instant::now() >= deadline {
                let words = fs::read_to_string(self.state().join("out")).unwrap_or_default();
                return Err(Error::Spinney { command: "serve".into(), words });
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// The state folder.
    pub(crate) fn state(&self) -> &Path {
        self.folder.path()
    }

    /// Runs a command to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Result<Done> {
        self.bench.check()?;
        let mut command = Command::new(&self.bench.spinney);
        command.arg("--state").arg(self.state()).arg("--json").args(args).stdin(Stdio::null());
        let began = Instant::now();
        let output = command.output().map_err(system("run", &self.bench.spinney))?;
        let wall = began.elapsed();
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let words = said.lines().last().unwrap_or("nothing").to_owned();
            return Err(Error::Spinney { command: args.join(" "), words });
        }
        let document = serde_json::from_slice(&output.stdout).map_err(|_| Error::Lacks("JSON document"))?;
        Ok(Done { document, wall })
    }

    /// The run folders of machines that have a process.
    pub(crate) fn run_folders(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.state().join("run")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    /// Where views of the snapshot file system are mounted at this moment.
    pub(crate) fn views(&self) -> Vec<PathBuf> {
        let folders = fs::read_dir(self.state().join("views")).into_iter().flatten().flatten();
        folders.map(|entry| entry.path().join("mnt")).filter(|at| is_mounted(at)).collect()
    }

    /// The daemon's process, and those of views.
    pub(crate) fn servers(&self) -> Vec<u32> {
        let state = self.state().display().to_string();
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let serves = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
            words.iter().any(|word| word == "serve" || word == "view")
                && words.iter().any(|word| word.starts_with(&state))
        };
        pids.filter(serves).collect()
    }

    /// Waits until nothing is done in the background any more: every disk layer that is frozen is known, and the daemon is at rest, who
    /// settles layers and puts its index into files after that.
    pub(crate) fn wait_for_background(&self) -> Result<()> {
        let deadline = Instant::now() + BACKGROUND_PATIENCE;
        while !(self.layers_are_known()? && self.is_at_rest()?) {
            if Instant::now() >= deadline {
                return Err(Error::Lacks("daemon that comes to rest"));
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    fn layers_are_known(&self) -> Result<bool> {
        let du = self.run(&["du"])?.document;
        let groups = du.get("groups").and_then(Value::as_array).ok_or(Error::Lacks("groups"))?;
        let bytes = |group: &Value, key: &str| group.get(key).and_then(Value::as_u64);
        Ok(groups.iter().all(|group| {
            let frozen = bytes(group, "frozen_bytes");
            frozen.is_some() && frozen == bytes(group, "known_bytes")
        }))
    }

    /// Whether the daemon does next to nothing for a moment, and not for want of a processor, which others get before its background.
    fn is_at_rest(&self) -> Result<bool> {
        let before = processor_time(self.daemon.id())?;
        thread::sleep(AT_REST);
        let after = processor_time(self.daemon.id())?;
        let (had, waited) =
            (after.had.saturating_sub(before.had), after.waited.saturating_sub(before.waited));
        Ok(had < AT_REST / 50 && waited < AT_REST / 2)
    }

    /// Bytes that page store and catalog take.
    pub(crate) fn stored(&self) -> Result<u64> {
        crate::disk::settle(self.state())?;
        let entries =
            |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
        let catalog = entries(self.state()).filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("catalog.db"))
        });
        let pages = entries(&self.state().join("groups")).map(|group| group.join("pages"));
        Ok(catalog.chain(pages).map(|path| crate::disk::allocated(&path)).sum())
    }
}

impl Drop for Spinney<'_> {
    fn drop(&mut self) {
        self.watch.take();
        for run in self.run_folders() {
            kill_owner(&run);
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        // A goto that was under way may have started another one meanwhile.
        for run in self.run_folders() {
            kill_owner(&run);
        }
        // Whoever serves ends with it, and the folder can go.
        for view in self.views() {
            let _ = unmount(&view);
        }
    }
}

/// Time of a process's threads.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ProcessorTime {
    /// On a processor.
    pub(crate) had: Duration,
    /// For want of one.
    pub(crate) waited: Duration,
}

/// What the threads of a process that work have had of the processors so far.
pub(crate) fn processor_time(pid: u32) -> Result<ProcessorTime> {
    let folder = PathBuf::from(format!("/proc/{pid}/task"));
    let mut sum = ProcessorTime::default();
    for task in fs::read_dir(&folder).map_err(system("list", &folder))?.flatten() {
        // One that has just ended counts no more.
        let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        let mut numbers = text.split(' ').map(|word| Duration::from_nanos(word.parse().unwrap_or(0)));
        sum.had += numbers.next().unwrap_or_default();
        sum.waited += numbers.next().unwrap_or_default();
    }
    Ok(sum)
}

/// Starts a daemon for a state folder.
fn begin(bench: &Bench, state: &Path) -> Result<Child> {
    let log = state.join("out");
    let log = File::options().create(true).append(true).open(&log).map_err(system("make", &log))?;
    Command::new(&bench.spinney)
        .arg("--state")
        .arg(state)
        .arg("serve")
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(system("open the log in", state))?)
        .stderr(log)
        // Ctrl-C is for us: what is dropped then ends it.
        .process_group(0)
        .spawn()
        .map_err(system("start", &bench.spinney))
}

/// Kills the QEMU of a run folder: the process that its pid file names, if the folder is on its command line.
fn kill_owner(run: &Path) {
    let text = fs::read_to_string(run.join("pid")).unwrap_or_default();
    let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) else { return };
    let words = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    if String::from_utf8_lossy(&words).contains(&*run.to_string_lossy()) {
        let _ = kill_process(pid, Signal::KILL);
    }
}
