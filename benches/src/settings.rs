//! What the run works with: executables, the test guest, folders, and how much of it is wanted.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use qemu::accel::{self, Accel};
use qemu::binary::Qemu;

use crate::error::{Error, Result, system};
use crate::memory_images::MemoryImages;
use crate::memory_watch::Peaks;

/// Everything that figures share.
#[derive(Debug)]
pub(crate) struct Bench {
    /// `spinney`.
    pub(crate) spinney: PathBuf,
    /// The QEMU that it uses.
    pub(crate) qemu: Qemu,
    /// Its accelerator, for a QEMU of our own.
    pub(crate) accel: Accel,
    /// The folder with the test guest's kernel, initramfs, disk and command line.
    pub(crate) guest: PathBuf,
    /// The folder with Debian's guest, if it was built.
    pub(crate) debian: Option<PathBuf>,
    /// A folder on a disk, for state folders.
    pub(crate) disk: PathBuf,
    /// A folder in memory, if there is one.
    pub(crate) tmpfs: Option<PathBuf>,
    /// A short run for development: fewer runs, a smaller tree, no results written.
    pub(crate) quick: bool,
    /// Memory of every daemon that ran.
    pub(crate) peaks: Arc<Peaks>,
    /// Memory of guests in files, once something has asked for it.
    pub(crate) images: OnceLock<MemoryImages>,
    /// A folder that keeps them from one run to the next.
    pub(crate) keep_images: Option<PathBuf>,
    interrupted: Arc<AtomicBool>,
}

impl Bench {
    /// From the environment: `SPINNEY_BIN`, `SPINNEY_QEMU`, `SPINNEY_ACCEL`, `SPINNEY_CACHE`, `SPINNEY_BENCH_DIR` (state folders;
    /// a disk, and a short path), `SPINNEY_BENCH_IMAGES`, `SPINNEY_BENCH_QUICK=1`.
    pub(crate) fn from_environment() -> Result<Self> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let path = |name: &str, otherwise: PathBuf| variable(name).map_or(otherwise, PathBuf::from);
        let spinney = path("SPINNEY_BIN", root.join("target/release/spinney"));
        let spinney = spinney.canonicalize().map_err(system("find the executable", &spinney))?;
        let cache = path("SPINNEY_CACHE", root.join(".cache"));
        let debian = cache.join("debian").canonicalize().ok().filter(|folder| folder.join("stamp").exists());
        let guest = cache.join("guest");
        let guest = guest.canonicalize().map_err(system("find the test guest (`make guest`)", &guest))?;
        let qemu = Qemu::find(variable("SPINNEY_QEMU").map(PathBuf::from).as_deref())?;
        let word = variable("SPINNEY_ACCEL").and_then(|word| Accel::parse(&word.to_string_lossy()));
        let accel = word.unwrap_or_else(|| accel::probe(&qemu).0);
        let tmpfs = PathBuf::from("/dev/shm");
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&interrupted))
                .map_err(system("listen to signals in", Path::new(".")))?;
        }
        Ok(Self {
            spinney,
            qemu,
            accel,
            guest,
            debian,
            disk: path("SPINNEY_BENCH_DIR", "/var/tmp".into()),
            tmpfs: tmpfs.is_dir().then_some(tmpfs),
            quick: variable("SPINNEY_BENCH_QUICK").is_some_and(|value| value != "0"),
            peaks: Arc::default(),
            images: OnceLock::new(),
            keep_images: variable("SPINNEY_BENCH_IMAGES").map(PathBuf::from),
            interrupted,
        })
    }

    /// `full` runs, or `quick` of them in a short run.
    pub(crate) fn count(&self, full: u64, quick: u64) -> u64 {
        if self.quick { quick } else { full }
    }

    /// The test guest's kernel command line.
    pub(crate) fn cmdline(&self) -> Result<String> {
        let path = self.guest.join("cmdline");
        let text = std::fs::read_to_string(&path).map_err(system("read", &path))?;
        Ok(text.trim().to_owned())
    }

    /// Bytes of the test guest's disk.
    pub(crate) fn disk_bytes(&self) -> Result<u64> {
        let path = self.guest.join("data.img");
        Ok(std::fs::metadata(&path).map_err(system("read", &path))?.len())
    }

    /// Fails if the host has less than so much memory to give.
    pub(crate) fn needs_memory(&self, mib: u64) -> Result<()> {
        let path = Path::new("/proc/meminfo");
        let text = std::fs::read_to_string(path).map_err(system("read", path))?;
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
        let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        match kib.ok_or(Error::Lacks("available memory"))? >> 10 {
            available if available < mib => Err(Error::Unavailable(format!(
                "it takes {mib} MiB of memory, and this host has {available} MiB to give"
            ))),
            _ => Ok(()),
        }
    }

    /// Fails once the run was told to end; what unwinds ends its machines.
    pub(crate) fn check(&self) -> Result<()> {
        if self.interrupted.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }
}
