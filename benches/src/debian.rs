//! A machine with Debian's guest (`scripts/debian-guest.sh`), which has its system on a disk.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, Result, system};
use crate::machine::{monitor, monitor_args, run_folder, write_memory};
use crate::spinney::{Done, Spinney};

/// Memory of the guest.
pub(crate) const MIB: u64 = 768;
/// How long it may take to boot and to read all of /usr: some 40 s on two idle emulated cores.
const PATIENCE: Duration = Duration::from_secs(600);
/// What it says on its serial port then.
const READY: &str = "debian-guest: ready";

const NAME: &str = "debian";

/// A machine that runs, its page cache warm.
pub(crate) struct DebianMachine<'a> {
    spinney: &'a Spinney<'a>,
    /// The image that its disk began as.
    pub(crate) image: PathBuf,
    /// From the start to its being ready.
    pub(crate) boot: Duration,
}

impl<'a> DebianMachine<'a> {
    /// Makes and boots the machine, and waits until it is ready.
    ///
    /// # Errors
    /// The guest was not built, or it does not get ready.
    pub(crate) fn boot(spinney: &'a Spinney<'a>) -> Result<Self> {
        let folder = spinney.bench.debian.as_ref().ok_or_else(|| {
            Error::Unavailable("Debian's guest is not built (scripts/debian-guest.sh)".into())
        })?;
        let image = folder.join("disk.img");
        let cmdline = folder.join("cmdline");
        let cmdline = std::fs::read_to_string(&cmdline).map_err(system("read", &cmdline))?;
        let text = |path: &Path| path.display().to_string();
        let (memory, disk) = (format!("{MIB}M"), text(&image));
        let (kernel, initrd) = (text(&folder.join("vmlinuz")), text(&folder.join("initrd.img")));
        let mut args = vec!["create", NAME, "--memory", &memory, "--network", "none", "--disk", &disk];
        args.extend(["--kernel", &kernel, "--initrd", &initrd, "--append", cmdline.trim()]);
        let monitor = monitor_args();
        args.extend(monitor.iter().map(String::as_str));
        spinney.run(&args)?;
        let began = Instant::now();
        spinney.run(&["start", NAME])?;
        wait_for_ready(spinney, &run_folder(spinney, NAME)?.join("console"))?;
        Ok(Self { spinney, image, boot: began.elapsed() })
    }

    /// Takes a snapshot in the default mode.
    pub(crate) fn take(&self) -> Result<Done> {
        self.spinney.run(&["take", NAME])
    }

    /// Has the guest stand still, and writes its memory to a new file.
    pub(crate) fn memory_to(&self, path: &Path) -> Result<()> {
        self.spinney.run(&["pause", NAME])?;
        write_memory(&monitor(&run_folder(self.spinney, NAME)?)?, path, MIB)
    }
}

/// Reads the console until the guest says that it is ready.
fn wait_for_ready(spinney: &Spinney<'_>, console: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut stream = UnixStream::connect(console).map_err(system("connect to", console))?;
    stream.set_read_timeout(Some(Duration::from_millis(500))).map_err(system("set up", console))?;
    let mut said = String::new();
    let mut buffer = [0; 4096];
    while !said.contains(READY) {
        spinney.bench.check()?;
        match stream.read(&mut buffer) {
            Ok(0) => return Err(Error::Lacks("Debian guest: it ended")),
            Ok(length) => said.push_str(&String::from_utf8_lossy(buffer.get(..length).unwrap_or_default())),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(system("read", console)(error)),
        }
        if Instant::now() >= deadline {
            let words = said.lines().last().unwrap_or("nothing").to_owned();
            return Err(Error::Tool {
                command: "Debian's guest".into(),
                words: format!("not ready: {words}"),
            });
        }
    }
    Ok(())
}
