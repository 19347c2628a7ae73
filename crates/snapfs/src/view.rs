//! The daemon's side of a view: it mounts and starts one, finds one again that outlived its daemon, lists what there is, and ends it.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, fchown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use pages::{HostUser, OpenFolders};

use crate::MapFile;
use crate::handover::{Descriptors, Start, send_start};
use crate::held::{HeldRead, read_report};
use crate::list::{ListWriter, Listed};
use crate::mount::{self, Lacks, is_mounted, mount, unmount};

/// How long a view may take to answer a simple question.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Why there is no view.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ViewError {
    /// This host cannot have one.
    #[error(transparent)]
    Lacks(#[from] Lacks),
    /// The system refused something.
    #[error("{act} {path}")]
    Io {
        /// What was being done, as a verb.
        act: &'static str,
        /// To what.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// The page store cannot be listed.
    #[error(transparent)]
    Store(#[from] pages::Error),
    /// It was started and does not answer.
    #[error("the view at {path} does not answer")]
    Silent {
        /// Where it is mounted.
        path: PathBuf,
    },
}

/// What a view is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    /// This executable, whose subcommand `view` serves.
    pub executable: PathBuf,
    /// A folder of its own, for what it needs beside the mount. Made if it is not there.
    pub folder: PathBuf,
    /// Where it is mounted, if not in that folder: a folder that is there.
    pub at: Option<PathBuf>,
    /// Folder of the page store.
    pub store: PathBuf,
    /// Who it is for, if that is not whoever runs us. Only root can act for others.
    pub owner: Option<HostUser>,
}

/// A view that is served.
#[derive(Debug)]
pub struct View {
    mount: PathBuf,
    folder: PathBuf,
    list: Mutex<Option<ListWriter>>,
    report: File,
}

impl View {
    /// The view of this set-up: the one that is there if it answers, else a new one. `mark` is a random number.
    ///
    /// # Errors
    /// This host cannot have one; the system refuses.
    pub fn open(setup: &Setup, mark: u64, listed: &[Listed]) -> Result<Self, ViewError> {
        mount::supported()?;
        let Setup { folder, .. } = setup;
        make_folder(folder).map_err(io_error("make", folder))?;
        let at = setup.at.clone().unwrap_or_else(|| folder.join("mnt"));
        let found = is_mounted(&at);
        let answers = match found.then(|| ask(&at)) {
            None => false,
            Some(Answer::Given) => true,
            // Whoever has something of it mapped goes on being served, and is shown.
            Some(Answer::None) => return Err(ViewError::Silent { path: at }),
            Some(Answer::Nobody) => {
                tracing::warn!(mount = %at.display(), "nobody serves what is mounted here");
                unmount(&at).map_err(io_error("unmount", &at))?;
                false
            }
        };
        if !answers {
            // Those of a view that was unmounted are still its own, if somebody has something of it mapped.
            for name in ["list", "held", "known"] {
                let _ = fs::remove_file(folder.join(name));
            }
        }
        let (list, report) = (open_file(setup, "list")?, open_file(setup, "held")?);
        let begin = |file: &File| {
            file.try_clone()
                .and_then(|file| ListWriter::begin(file, mark, listed))
                .map_err(io_error("write", folder))
        };
        let writer = begin(&list)?;
        if !answers {
            start(setup, &at, list, &report)?;
        }
        let list = Mutex::new(Some(writer));
        Ok(Self { mount: at, folder: folder.clone(), list, report })
    }

    /// Ends what a set-up may have left that nobody wants any more: whoever has something of it mapped keeps that. False if it stays
    /// mounted.
    pub fn clear(folder: &Path) -> bool {
        let at = folder.join("mnt");
        let unmounted = if is_mounted(&at) { unmount(&at) } else { Ok(()) };
        unmounted
            .inspect_err(|error| tracing::warn!(mount = %at.display(), %error, "it stays mounted"))
            .is_ok()
    }

    /// Where it is mounted.
    pub fn mount_point(&self) -> &Path {
        &self.mount
    }

    /// The folder that it has for itself.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The file of a memory.
    pub fn ram(&self, file: &MapFile) -> PathBuf {
        self.mount.join(".ram").join(file.file_name())
    }

    /// The file of a disk.
    pub fn disk(&self, file: &MapFile) -> PathBuf {
        self.mount.join(".disk").join(file.file_name())
    }

    /// Lists what has changed: snapshots in the form that they have now, and ids of those that are gone. `all` is asked, with a random
    /// number, when the list has to be begun anew.
    ///
    /// # Errors
    /// The list cannot be written: people see what there was.
    pub fn list(
        &self,
        now: &[Listed],
        gone: &[String],
        all: impl FnOnce() -> (u64, Vec<Listed>),
    ) -> io::Result<()> {
        let mut list = self.lock();
        let Some(writer) = list.as_mut() else { return Ok(()) };
        writer.add(now, gone)?;
        if writer.is_mostly_void() {
            let (mark, all) = all();
            let file = list.take().map(ListWriter::into_file);
            *list = file.map(|file| ListWriter::begin(file, mark, &all)).transpose()?;
        }
        Ok(())
    }

    /// Ids of what is listed.
    pub fn listed(&self) -> Vec<String> {
        self.lock().iter().flat_map(ListWriter::ids).map(str::to_owned).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Option<ListWriter>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads that wait for a page that cannot be read.
    pub fn held(&self) -> Vec<HeldRead> {
        read_report(&self.report)
    }

    /// True if it answers, within some seconds.
    pub fn answers(&self) -> bool {
        is_mounted(&self.mount) && ask(&self.mount) == Answer::Given
    }

    /// Unmounts it. Whoever has something of it mapped keeps that, and whoever serves it stays until nobody has.
    ///
    /// # Errors
    /// The system refuses.
    pub fn end(&self) -> io::Result<()> {
        unmount(&self.mount)
    }
}

fn io_error(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ViewError {
    let path = path.to_owned();
    move |source| ViewError::Io { act, path, source }
}

/// Makes a folder through which its owner gets to what is his.
fn make_folder(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o711).create(folder)?;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o711))
}

/// A file that is there, or is made, for us and whom it is for.
fn open_file(setup: &Setup, name: &str) -> Result<File, ViewError> {
    use std::os::unix::fs::OpenOptionsExt;
    let path = setup.folder.join(name);
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    if name == "known" {
        options.append(true);
    }
    let file = options.open(&path).map_err(io_error("open", &path))?;
    if let Some(HostUser { uid, gid }) = setup.owner {
        fchown(&file, Some(uid), Some(gid)).map_err(io_error("give away", &path))?;
    }
    Ok(file)
}

/// Mounts, and starts whoever serves.
fn start(setup: &Setup, at: &Path, list: File, report: &File) -> Result<(), ViewError> {
    let Setup { executable, folder, store, owner, .. } = setup;
    if setup.at.is_none() {
        make_folder(at).map_err(io_error("make", at))?;
    }
    let OpenFolders { packs, index } = OpenFolders::of(store)?;
    let us = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let (uid, gid) = owner.map_or(us, |owner| (owner.uid, owner.gid));
    let fuse = mount(at, uid, gid).map_err(io_error("mount a view at", at))?;
    let report = report.try_clone().map_err(io_error("open", folder))?;
    let known = open_file(setup, "known")?;
    let (list, report, known) = (list.into(), report.into(), known.into());
    let descriptors = Descriptors { fuse: fuse.into(), packs, index, list, report, known };
    let started =
        spawn(executable, folder, *owner, &descriptors, store).map_err(io_error("start", executable));
    // From here on those who serve have the only descriptors: if they end, so does what is mounted.
    drop(descriptors);
    let serving = started.and_then(|()| match ask(at) {
        Answer::Given => Ok(()),
        Answer::None | Answer::Nobody => Err(ViewError::Silent { path: at.to_owned() }),
    });
    if serving.is_err() {
        let _ = unmount(at);
    }
    serving
}

fn spawn(
    executable: &Path,
    folder: &Path,
    owner: Option<HostUser>,
    descriptors: &Descriptors,
    store: &Path,
) -> io::Result<()> {
    let (ours, theirs) = UnixStream::pair()?;
    let log = File::options().create(true).append(true).open(folder.join("log"))?;
    let mut command = Command::new(executable);
    command
        .arg0("spinney")
        .arg("view")
        .arg(folder)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(log)
        .current_dir("/")
        .process_group(0);
    if let Some(HostUser { uid, gid }) = owner {
        // With a user id std gives up all other groups, if we are root.
        command.gid(gid).uid(uid);
    }
    let mut child = command.spawn()?;
    let start = Start { store: store.to_owned(), folder: folder.to_owned(), serve: true, deaths: 0 };
    let sent = send_start(&ours, &start, descriptors);
    if sent.is_err() {
        let _ = child.kill();
    }
    thread::Builder::new().name("view".into()).spawn(move || child.wait())?;
    sent
}

/// What came of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Given,
    /// None in time.
    None,
    /// Nobody is there any more who could give one.
    Nobody,
}

/// Mount points where a question has not been answered yet.
static ASKED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn asked() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    ASKED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Asks what is mounted there, and waits some seconds for an answer. In a thread of its own: a question that nobody answers cannot be taken
/// back, and so there is no second one while the first waits.
fn ask(at: &Path) -> Answer {
    if !asked().insert(at.to_owned()) {
        return Answer::None;
    }
    let (tell, told) = channel();
    let place = at.to_owned();
    let question = move || {
        let said = fs::symlink_metadata(place.join(".ram"));
        asked().remove(&place);
        let _ = tell.send(said.map(drop));
    };
    if thread::Builder::new().name("ask-view".into()).spawn(question).is_err() {
        asked().remove(at);
        return Answer::None;
    }
    match told.recv_timeout(ANSWER_LIMIT) {
        Ok(Ok(())) => Answer::Given,
        // The connection to the kernel has ended.
        Ok(Err(_)) => Answer::Nobody,
        Err(_) => Answer::None,
    }
}
