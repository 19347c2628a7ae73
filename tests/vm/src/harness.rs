//! Spinney as a user has it: the executable, a state folder of its own, and what the commands say.
//!
//! Everything goes through `spinney --json`. Only two things are done behind its back: the daemon is found and killed, as
//! a crash would, and at the end nothing that belongs to the state folder is left running.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use thiserror::Error;

use crate::guest::guest_port_args;
use crate::loop_disk::LoopDisk;

/// How long a command may take. `stop` waits up to a minute by itself.
const LIMIT: Duration = Duration::from_secs(120);
/// How long nothing is stored when nothing more will be.
const QUIET: Duration = Duration::from_millis(900);
/// How often a process is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A command that did not do what it was asked for.
#[derive(Debug, Error)]
#[error("`spinney {command}` ended with {code:?}: {stderr}")]
pub struct Failed {
    /// The words behind `spinney --json`.
    pub command: String,
    /// Exit code; none if a signal or the time-out ended it.
    pub code: Option<i32>,
    /// What it wrote to stderr.
    pub stderr: String,
}

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    /// The words behind `spinney --json`.
    pub command: String,
    /// Exit code; none if a signal or the time-out ended it.
    pub code: Option<i32>,
    /// The document on stdout; null if there was none.
    pub document: Value,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Ended {
    /// The document, if the command did what it was asked for.
    pub fn done(self) -> Result<Value, Failed> {
        if self.code == Some(0) {
            return Ok(self.document);
        }
        // The events of long work say nothing that the problem does not.
        let problem = self.problem();
        let mut stderr = if problem.is_null() { self.stderr } else { problem.to_string() };
        if let Some(damage) = self.document.get("damage") {
            stderr = format!("{stderr}: {damage}");
        }
        Err(Failed { command: self.command, code: self.code, stderr })
    }

    /// The problem document on stderr; null if there was none. Events of long work stand before it.
    pub fn problem(&self) -> Value {
        let documents = self.stderr.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        documents.into_iter().find(|value| value["schema"] == "spinney.error/1").unwrap_or_default()
    }
}

/// A state folder with its daemon and machines, gone when the value is.
#[derive(Debug)]
pub struct Spinney {
    /// Where the state folder lies, if the power is to be cut. Unmounted before the folder is removed.
    disk: Option<LoopDisk>,
    folder: TempDir,
    program: PathBuf,
    variables: Vec<(String, String)>,
    /// How often the power was cut.
    boots: u32,
}

impl Spinney {
    /// A new state folder. Nothing runs until the first command.
    ///
    /// # Panics
    /// There is no executable to test.
    pub fn new() -> Self {
        Self::with(&[])
    }

    /// The same with environment variables, for the daemon too.
    ///
    /// # Panics
    /// There is no executable to test.
    pub fn with(variables: &[(&str, &str)]) -> Self {
        Self::at(&std::env::temp_dir(), variables)
    }

    /// The same below another folder than the system's for temporary files.
    ///
    /// # Panics
    /// There is no executable to test.
    pub fn at(parent: &Path, variables: &[(&str, &str)]) -> Self {
        // Unix sockets lie in the state folder, and their paths are short.
        let folder = tempfile::Builder::new().prefix("sp-").tempdir_in(parent).expect("a temporary folder");
        let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Self { disk: None, folder, program: program(), variables: variables.collect(), boots: 0 }
    }

    /// A new state folder on a disk of its own, whose power can be cut. The error says why there can be none on this host.
    ///
    /// # Panics
    /// There is no executable to test.
    pub fn on_a_disk() -> Result<Self, String> {
        let mut spinney = Self::new();
        spinney.disk = Some(LoopDisk::mount(spinney.folder(), &spinney.state())?);
        Ok(spinney)
    }

    /// Cuts the power of the host: what was not synced is gone, and so is every process. The next command starts the daemon of
    /// the next boot.
    ///
    /// # Panics
    /// The state folder lies on no disk of its own.
    pub fn cut_power(&mut self) {
        let disk = self.disk.as_ref().expect("a disk of its own");
        self.unmount_views();
        disk.cut();
        self.kill_all();
        disk.boot();
        self.boots += 1;
        self.set("SPINNEY_BOOT", &format!("boot-{}", self.boots));
    }

    /// The state folder.
    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// A place for files of the test's own.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Adds or changes an environment variable of the commands and daemons to come.
    pub fn set(&mut self, name: &str, value: &str) {
        self.variables.retain(|(known, _)| known != name);
        self.variables.push((name.to_owned(), value.to_owned()));
    }

    /// Runs `spinney --json WORDS` to its end.
    pub fn run<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Ended {
        let words: Vec<_> = words.into_iter().map(|word| word.as_ref().to_owned()).collect();
        let command = words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
        let mut child = self.begin(&words);
        let deadline = Instant::now() + LIMIT;
        // Read beside the waiting: a full pipe would stop the command.
        let stdout = drain(child.stdout.take());
        let stderr = drain(child.stderr.take());
        let code = loop {
            match child.try_wait().expect("the command's end") {
                Some(status) => break status.code(),
                None if Instant::now() < deadline => thread::sleep(LOOK_EVERY),
                None => {
                    let _ = (child.kill(), child.wait());
                    break None;
                }
            }
        };
        let text = |thread: thread::JoinHandle<String>| thread.join().unwrap_or_default();
        let (stdout, stderr) = (text(stdout), text(stderr));
        Ended { command, code, document: serde_json::from_str(&stdout).unwrap_or_default(), stderr }
    }

    /// Runs a command that must succeed; words are split at spaces.
    pub fn ok(&self, words: &str) -> Result<Value, Failed> {
        self.run(words.split(' ')).done()
    }

    /// Starts a command and leaves it to itself.
    pub fn begin<S: AsRef<OsStr>>(&self, words: &[S]) -> Child {
        let mut command = self.command();
        command.arg("--json").args(words).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("spinney")
    }

    /// Runs a command as people do, without `--json`; what it wrote to stdout and stderr.
    pub fn plain(&self, words: &[&str]) -> (String, String) {
        let output = self.command().args(words).output().expect("spinney");
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        (text(output.stdout), text(output.stderr))
    }

    /// Runs a command as people do on a terminal, and types something; what the terminal shows.
    pub fn on_terminal(&self, words: &str, typed: &str) -> String {
        let line = format!("{} {words}", self.program.display());
        let plain = self.command();
        let mut command = Command::new("script");
        command.args(["-qec", &line, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        for (name, value) in plain.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let mut child = command.spawn().expect("script (util-linux)");
        // Whoever is not asked does not read it.
        let _ = child.stdin.take().map(|mut stdin| stdin.write_all(typed.as_bytes()));
        let output = child.wait_with_output().expect("the command's end");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn command(&self) -> Command {
        // A shell's background jobs have SIGINT ignored, and so would this: Ctrl-C is to be heard wherever the tests run.
        let mut command = Command::new("env");
        command
            .arg("--default-signal=INT")
            .arg(&self.program)
            .env("SPINNEY_STATE", self.state())
            .env("SPINNEY_ACCEL", "tcg")
            .env_remove("SPINNEY_FAULT")
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        command
    }

    /// Creates a machine that is the test guest, off. `mib` is its memory.
    pub fn create_guest(&self, name: &str, mib: u64) -> Result<Value, Failed> {
        self.create_guest_with(name, mib, &[])
    }

    /// The same, with more words for QEMU.
    pub fn create_guest_with(&self, name: &str, mib: u64, qemu: &[&str]) -> Result<Value, Failed> {
        self.run(guest_words(name, mib, qemu, &cache().join("guest"))).done()
    }

    /// The same, of whose memory there are no snapshots: it may have disks that QEMU does not migrate.
    pub fn create_guest_without_memory(&self, name: &str, mib: u64) -> Result<Value, Failed> {
        let mut words = guest_words(name, mib, &[], &cache().join("guest"));
        words.push("--no-memory".to_owned());
        self.run(words).done()
    }

    /// The same, with a card.
    pub fn create_networked_guest(&self, name: &str, mib: u64) -> Result<Value, Failed> {
        let words = guest_words(name, mib, &[], &cache().join("guest")).into_iter();
        self.run(words.map(|word| if word == "none" { "user".to_owned() } else { word })).done()
    }

    /// The same, with a card, and the guest agent in it.
    pub fn create_guest_with_agent(&self, name: &str, mib: u64) -> Result<Value, Failed> {
        let plain = cache().join("guest/initrd.img").display().to_string();
        let words = guest_words(name, mib, &[], &cache().join("guest")).into_iter().map(|word| match word {
            word if word == "none" => "user".to_owned(),
            word if word == plain => agent_initrd().display().to_string(),
            word => word,
        });
        self.run(words).done()
    }

    /// The same as one of a group, with the guest's files from a folder of the test's own.
    pub fn create_guest_in(
        &self,
        group: Option<&str>,
        name: &str,
        mib: u64,
        files: &Path,
    ) -> Result<Value, Failed> {
        let mut words = guest_words(name, mib, &[], files);
        words.extend(group.into_iter().flat_map(|group| ["--group".to_owned(), group.to_owned()]));
        self.run(words).done()
    }

    /// The socket of the test guest's port, if the machine has a process.
    pub fn port(&self, name: &str) -> Result<Option<PathBuf>, Failed> {
        let machine = self.ok(&format!("show {name}"))?;
        let console = machine["console"].as_str().map(Path::new);
        Ok(console.and_then(|path| Some(path.parent()?.join("test"))))
    }

    /// The daemon's process id, if it runs.
    pub fn daemon(&self) -> Option<u32> {
        self.processes().into_iter().find(|(_, words)| words.iter().any(|w| w == "serve")).map(|(pid, _)| pid)
    }

    /// The warden's process id, if one runs.
    pub fn warden(&self) -> Option<u32> {
        let warden = |words: &[String]| words.iter().any(|word| word == "warden");
        self.processes().into_iter().find(|(_, words)| warden(words)).map(|(pid, _)| pid)
    }

    /// The processes of views: those who serve, and those who stand by for them.
    pub fn views(&self) -> (Vec<u32>, Vec<u32>) {
        let view = |words: &[String]| words.get(1).is_some_and(|word| word == "view");
        let all = self.processes().into_iter().filter(|(_, words)| view(words)).map(|(pid, _)| pid);
        let all: Vec<u32> = all.collect();
        let parent = |pid: u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let rest = stat.rsplit_once(')').map(|(_, rest)| rest.to_owned()).unwrap_or_default();
            rest.split_whitespace().nth(1).and_then(|pid| pid.parse::<u32>().ok())
        };
        all.iter().partition(|pid| !parent(**pid).is_some_and(|parent| all.contains(&parent)))
    }

    /// Kills whoever serves views, as a crash would. False if nobody does.
    pub fn kill_views(&self) -> bool {
        let (serving, _) = self.views();
        serving.iter().for_each(|pid| kill(*pid));
        !serving.is_empty()
    }

    /// Whether QEMU has a machine's memory mapped from a view.
    pub fn is_mapped(&self, name: &str) -> Result<bool, Failed> {
        let Some(pid) = self.ok(&format!("show {name}"))?["pid"].as_u64() else { return Ok(false) };
        Ok(fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default().contains("/.ram/"))
    }

    /// Whether memory can be mapped on this host, and is to be.
    pub fn can_map(&self) -> Result<bool, Failed> {
        let doctor = self.ok("doctor")?;
        let mut checks = doctor["checks"].as_array().into_iter().flatten();
        Ok(checks.any(|check| check["name"] == "instant restore" && check["level"] == "good"))
    }

    /// Whether memory that is brought back is mapped from now on, or loaded. The next command starts a daemon that knows it.
    pub fn set_view(&mut self, mapped: bool) {
        self.set("SPINNEY_VIEW", if mapped { "on" } else { "off" });
        self.kill_daemon();
    }

    /// Kills the daemon as a crash would, and waits until it is gone. False if none ran.
    pub fn kill_daemon(&self) -> bool {
        let Some(pid) = self.daemon() else { return false };
        kill(pid);
        true
    }

    /// Paths of the disk layers in the state folder.
    pub fn layers(&self) -> Vec<PathBuf> {
        self.in_groups("layers")
    }

    /// Files in a folder of every group.
    fn in_groups(&self, folder: &str) -> Vec<PathBuf> {
        let groups = entries(&self.state().join("groups"));
        let mut files: Vec<PathBuf> =
            groups.into_iter().flat_map(|group| entries(&group.join(folder))).collect();
        files.sort();
        files
    }

    /// Files in the folders of packs.
    pub fn pack_files(&self) -> Vec<PathBuf> {
        self.in_groups("pages/packs")
    }

    /// Packs that have pages of their own: not those that name the blocks of a disk layer (`docs/formats/pages.md`, "Header").
    pub fn packs(&self) -> Vec<PathBuf> {
        let mut packs = self.pack_files();
        packs.retain(|path| {
            let mut body = [0; 4];
            let read = fs::File::open(path).and_then(|file| file.read_exact_at(&mut body, 56));
            read.is_err() || body != [2, 0, 0, 0]
        });
        packs
    }

    /// Waits until every layer that nobody writes to any more is known to its group's page store, and has settled: nothing is stored by
    /// itself for a while.
    ///
    /// # Errors
    /// It takes longer than a minute.
    pub fn settle(&self) -> Result<(), String> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            let du = self.ok("du").map_err(|failed| failed.to_string())?;
            let groups = du["groups"].as_array().cloned().unwrap_or_default();
            let packs = self.pack_files();
            thread::sleep(Duration::from_millis(100));
            if groups.iter().all(|group| group["frozen_bytes"] == group["known_bytes"]) {
                thread::sleep(QUIET);
                if packs == self.pack_files() {
                    return Ok(());
                }
            }
        }
        Err("layers are not looked through after a minute".into())
    }

    /// Process ids of the machines.
    pub fn machines(&self) -> Vec<u32> {
        let machine = |words: &[String]| words.first().is_some_and(|word| word.contains("qemu-system"));
        self.processes().into_iter().filter(|(_, words)| machine(words)).map(|(pid, _)| pid).collect()
    }

    /// The folders of processes, one for each machine that runs.
    pub fn runs(&self) -> Vec<PathBuf> {
        entries(&self.state().join("run"))
    }

    /// The files that a process has open.
    pub fn open_files(&self, pid: u32) -> Vec<PathBuf> {
        let links = entries(Path::new(&format!("/proc/{pid}/fd")));
        links.into_iter().filter_map(|link| fs::read_link(link).ok()).collect()
    }

    /// The last lines of the daemon's log, for messages of failed tests.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(self.state().join("daemon.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines.iter().skip(lines.len().saturating_sub(15)).copied().collect::<Vec<_>>().join("\n")
    }

    /// Every process whose command line names our state folder, which nobody else knows.
    fn processes(&self) -> Vec<(u32, Vec<String>)> {
        let state = self.state().display().to_string();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let pid = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
            let Some(pid) = pid.filter(|pid| *pid != std::process::id()) else { continue };
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            if line.contains(&state) {
                found.push((pid, line.split('\0').map(str::to_owned).collect()));
            }
        }
        found
    }
}

impl Spinney {
    /// Kills everybody, whoever takes over or is started meanwhile.
    fn kill_all(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let all = self.processes();
            if all.is_empty() || Instant::now() > deadline {
                return;
            }
            // Stopped first: the death of one has others do something. All at once: a QEMU that waits for a page ends with whoever serves it.
            for signal in [Signal::STOP, Signal::KILL] {
                for id in all.iter().filter_map(|(pid, _)| Pid::from_raw(i32::try_from(*pid).ok()?)) {
                    let _ = kill_process(id, signal);
                }
            }
            all.into_iter().for_each(|(pid, _)| kill(pid));
        }
    }

    /// Unmounts what the snapshot file system has left, whose processes are gone.
    fn unmount_views(&self) {
        for entry in fs::read_dir(self.state().join("views")).into_iter().flatten().flatten() {
            let _ = rustix::mount::unmount(entry.path().join("mnt"), rustix::mount::UnmountFlags::DETACH);
        }
    }
}

impl Default for Spinney {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Spinney {
    fn drop(&mut self) {
        self.kill_all();
        self.unmount_views();
        if thread::panicking() {
            eprintln!("the end of daemon.log:\n{}", self.log());
        }
    }
}

/// The words that create a machine that is the test guest, whose files are in a folder.
fn guest_words(name: &str, mib: u64, qemu: &[&str], guest: &Path) -> Vec<String> {
    let file = |name: &str| guest.join(name).display().to_string();
    let append = fs::read_to_string(guest.join("cmdline")).expect("the test guest (`make guest` makes it)");
    let mut words = ["create", name, "--network", "none", "--memory"].map(str::to_owned).to_vec();
    words.push(format!("{mib}M"));
    let files = [("--kernel", "vmlinuz"), ("--initrd", "initrd.img"), ("--disk", "data.img")];
    words.extend(files.iter().flat_map(|(option, name)| [(*option).to_owned(), file(name)]));
    // Freed memory is zeros, so that a page that is not zero is one that somebody may look at.
    words.extend(["--append".to_owned(), format!("{} init_on_free=1", append.trim())]);
    // In the run folder, so that the QEMU that a goto starts beside the old one has a socket of its own.
    let port = guest_port_args(Path::new("{run}/test"));
    let more = qemu.iter().map(|word| (*word).to_owned());
    words.extend(port.into_iter().chain(more).map(|word| format!("--qemu-arg={word}")));
    words
}

/// Runs a tool of the host; its output, whatever it ended with.
pub fn tool<S: AsRef<OsStr>>(program: &str, words: impl IntoIterator<Item = S>) -> Output {
    let output = Command::new(program).args(words).stdin(Stdio::null()).output();
    output.unwrap_or_else(|error| panic!("{program} (`make setup` installs it): {error}"))
}

/// Folder with what `make guest` and `make old-qemu` made.
pub fn cache() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    std::env::var_os("SPINNEY_CACHE").map_or_else(|| root.join(".cache"), PathBuf::from)
}

/// The test guest's initrd with QEMU's guest agent, which answers on the port `org.qemu.guest_agent.0`.
pub fn agent_initrd() -> PathBuf {
    cache().join("guest/initrd-agent.img")
}

/// Kills a process of ours and waits until it is gone.
pub fn kill(pid: u32) {
    let Some(id) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return };
    if kill_process(id, Signal::KILL).is_err() {
        return;
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_gone(pid) && Instant::now() < deadline {
        thread::sleep(LOOK_EVERY);
    }
}

/// True of a process that has ended: a zombie whose parent has not looked yet is gone enough, once all its threads are.
pub fn is_gone(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    state.is_none_or(|state| matches!(state, 'Z' | 'X')) && threads <= 1
}

/// What lies in a folder; nothing if there is none.
fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What came until it broke is what there is.
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// The executable under test: `SPINNEY_BIN`, or what cargo built beside this test.
fn program() -> PathBuf {
    let named = std::env::var_os("SPINNEY_BIN").map(PathBuf::from);
    let beside = || Some(std::env::current_exe().ok()?.parent()?.parent()?.join("spinney"));
    let path = named.or_else(beside).unwrap_or_default();
    assert!(
        path.is_file(),
        "there is no executable to test at {}: `make test` builds it (cargo build -p spinney --features faults), or name \
         one with SPINNEY_BIN",
        path.display()
    );
    path
}
