//! The engine: one state folder, opened by one process. The verbs are in files of their own (`take.rs`, `goto.rs`, ...);
//! here is what they share.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use qemu::accel::{self, Accel};
use qemu::binary::Qemu;
use qemu::ends::Ends;
use qemu::image::QemuImg;
use serde_json::Value;
use warden::Keeper;

use crate::catalog::{Catalog, OpRow};
use crate::context::Context;
use crate::error::{Code, Error, Result};
use crate::expire::Alarm;
use crate::fault::{self, Fault, planted, step};
use crate::groups::Groups;
use crate::id::new_id;
use crate::locks::TargetLocks;
use crate::owner::make_folder;
use crate::pins::PinnedLayers;
use crate::running::Running;
use crate::saving::Saving;
use crate::types::OpState;
use crate::views::Views;

/// Where the state is and which QEMU to use.
#[derive(Clone, Debug)]
pub struct Settings {
    /// State folder.
    pub state: PathBuf,
    /// QEMU's executable; looked for on PATH if none.
    pub qemu: Option<PathBuf>,
    /// qemu-img; looked for beside QEMU and on PATH if none.
    pub qemu_img: Option<PathBuf>,
    /// "kvm" or "tcg"; probed if none.
    pub accel: Option<String>,
    /// The executable whose subcommand `warden` keeps deadlines; without one nobody does.
    pub warden: Option<PathBuf>,
}

/// QEMU as it was found on this host.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    pub(crate) qemu: Qemu,
    pub(crate) accel: Accel,
}

/// One state folder, opened by one process.
#[derive(Debug)]
pub struct Engine {
    pub(crate) settings: Settings,
    pub(crate) catalog: Catalog,
    /// What machines belong to, with their pages.
    pub(crate) groups: Groups,
    /// Machines that have a process, by target id.
    pub(crate) running: Mutex<HashMap<String, Arc<Running>>>,
    pub(crate) locks: TargetLocks,
    /// Snapshots on their way to the disk.
    pub(crate) saving: Saving,
    /// Layers that are being copied.
    pub(crate) pins: PinnedLayers,
    /// Groups' page stores as files.
    pub(crate) views: Views,
    /// Deadlines of guests that stand still on our behalf.
    pub(crate) keeper: Keeper,
    tools: Mutex<Option<Tools>>,
    img: Mutex<Option<QemuImg>>,
    /// Held while something goes through everything that is stored: the collector, `fsck`.
    pub(crate) housekeeping: Mutex<()>,
    /// How many wait for it: what is done in the background makes way.
    wanted: AtomicUsize,
    /// Operations that have ended: each may have left something to tend.
    ended: AtomicUsize,
    /// Rung by each of them too: a snapshot may expire earlier now.
    pub(crate) alarm: Arc<Alarm>,
    /// Rung when there is another process to wait for, or another machine that was powered off.
    pub(crate) ends: Arc<Ends>,
    /// Held for as long as the state folder is ours.
    _lock: File,
}

impl Engine {
    /// Locks and opens the state folder, finds running machines, finishes or rolls back what was under way. The strings are
    /// notes for people on what was found.
    pub fn open(settings: Settings) -> Result<(Arc<Self>, Vec<String>)> {
        fault::plant();
        make_folder(&settings.state)?;
        let lock = lock_folder(&settings.state)?;
        for folder in ["run", "groups", "views"] {
            make_folder(&settings.state.join(folder))?;
        }
        let catalog = Catalog::open(&settings.state.join("catalog.db"))?;
        let groups = catalog.groups(&new_id(), rustix::process::geteuid().as_raw())?;
        let groups = Groups::open(&settings.state, groups)?;
        let keeper = match &settings.warden {
            Some(executable) if !planted(Fault::NoWarden) => {
                Keeper::new(executable, &settings.state, &settings.state.join("daemon.log"))
            }
            _ => Keeper::none(),
        };
        let ends = Ends::new().map_err(|error| {
            Error::new(Code::Failed, "the ends of processes cannot be waited for").because(error)
        })?;
        let engine = Self {
            settings,
            keeper,
            catalog,
            groups,
            running: Mutex::default(),
            locks: TargetLocks::default(),
            saving: Saving::default(),
            pins: PinnedLayers::default(),
            views: Views::default(),
            tools: Mutex::default(),
            img: Mutex::default(),
            housekeeping: Mutex::default(),
            wanted: AtomicUsize::new(0),
            ended: AtomicUsize::new(0),
            alarm: Arc::default(),
            ends: Arc::new(ends),
            _lock: lock,
        };
        let old_copy = engine.catalog.is_old_copy()?;
        let mut notes = engine.recover()?;
        engine.trust_layers()?;
        for group in engine.groups.all() {
            notes.extend(
                group.problem().map(|why| format!("the group {} cannot be used: {why}", group.row.name)),
            );
        }
        if old_copy {
            engine.catalog.adopt_copy()?;
            notes.push(
                "the catalog is a copy from an earlier time: disk layers that it does not know are in the folder `lost` of \
                 their group"
                    .into(),
            );
        }
        engine.keep_copy_of_catalog();
        if let Err(error) = engine.catalog.write(crate::catalog::last_jump) {
            // On a disk that is full to its last byte there still is much that can be done.
            tracing::warn!(%error, causes = ?error.causes(), "the clock is not looked at");
        }
        Ok((Arc::new(engine), notes))
    }

    /// Leaves a copy of the catalog for the day on which it is damaged.
    pub fn keep_copy_of_catalog(&self) {
        if let Err(error) = self.catalog.keep_copy() {
            tracing::warn!(%error, causes = ?error.causes(), "no copy of the catalog");
        }
    }

    /// The daemon ends in order: nobody has to watch over it any more.
    pub fn close(&self) {
        self.close_views();
        self.keeper.close();
    }

    /// The state folder.
    pub fn state(&self) -> &Path {
        &self.settings.state
    }

    pub(crate) fn running_map(&self) -> MutexGuard<'_, HashMap<String, Arc<Running>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the right to go through everything that is stored.
    pub(crate) fn housekeep(&self, cx: &Context) -> Result<MutexGuard<'_, ()>> {
        let _wanted = Wanted::new(&self.wanted);
        loop {
            match self.housekeeping.try_lock() {
                Ok(guard) => return Ok(guard),
                Err(TryLockError::Poisoned(guard)) => return Ok(guard.into_inner()),
                Err(TryLockError::WouldBlock) => {}
            }
            cx.phase("waiting for gc or fsck", 0);
            cx.check()?;
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }

    /// How many operations have ended so far.
    pub fn operations_ended(&self) -> usize {
        self.ended.load(Ordering::Relaxed)
    }

    /// Somebody waits for what is done in the background.
    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) > 0
    }

    /// QEMU and the accelerator, found once.
    pub(crate) fn tools(&self) -> Result<Tools> {
        let mut tools = self.tools.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tools) = &*tools {
            return Ok(tools.clone());
        }
        let found = find_tools(&self.settings)?;
        *tools = Some(found.clone());
        Ok(found)
    }

    /// qemu-img alone, found once: enough for whatever does not start a machine.
    pub(crate) fn img(&self) -> Result<QemuImg> {
        let mut img = self.img.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(img) = &*img {
            return Ok(img.clone());
        }
        let settings = &self.settings;
        let found = QemuImg::find(settings.qemu_img.as_deref(), settings.qemu.as_deref());
        let found = found.map_err(|error| {
            Error::new(Code::Precondition, "there is no qemu-img to make disks with")
                .because(error)
                .hint("install it (Debian: apt install qemu-utils), or name it with SPINNEY_QEMU_IMG")
        })?;
        *img = Some(found.clone());
        Ok(found)
    }

    /// Runs `body` between the journal's entries. `body` writes the end itself, in the transaction that makes its result
    /// exist ([`OpRow::finish`]); if it fails it must have rolled back what it did.
    pub(crate) fn journaled<T>(
        &self,
        cx: &Context,
        kind: &str,
        subject: &str,
        target: Option<&str>,
        plan: &Value,
        body: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        self.catalog.write(|tx| OpRow::begin(tx, &cx.id, kind, subject, target, plan))?;
        step("journal.begun");
        let open = OpenEntry { engine: self, id: &cx.id };
        let result = body();
        std::mem::forget(open);
        self.ended.fetch_add(1, Ordering::Relaxed);
        self.alarm.ring();
        if result.is_ok() {
            self.list_changes();
        }
        if let Err(error) = &result {
            let state = if error.code() == Code::Interrupted { OpState::Cancelled } else { OpState::Failed };
            let words = error.to_string();
            let closed = self.catalog.write(|tx| OpRow::close(tx, &cx.id, state, Some(&words)));
            if let Err(second) = closed {
                // The journal's entry stays open; the next start closes it.
                tracing::error!(operation = cx.id, error = %second, "the end of an operation could not be journalled");
            }
        }
        result
    }
}

/// Counts who waits, until dropped.
struct Wanted<'a>(&'a AtomicUsize);

impl<'a> Wanted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Wanted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An entry of the journal whose body is at work. Dropped by a panic it is closed: nobody else will.
struct OpenEntry<'a> {
    engine: &'a Engine,
    id: &'a str,
}

impl Drop for OpenEntry<'_> {
    fn drop(&mut self) {
        let words = "a mistake in Spinney; daemon.log has it";
        let closed = self.engine.catalog.write(|tx| OpRow::close(tx, self.id, OpState::Failed, Some(words)));
        if let Err(error) = closed {
            tracing::error!(operation = self.id, %error, "the end of an operation could not be journalled");
        }
    }
}

/// QEMU and the accelerator, as the settings have them or as they are found.
pub(crate) fn find_tools(settings: &Settings) -> Result<Tools> {
    let qemu = Qemu::find(settings.qemu.as_deref()).map_err(|error| {
        Error::new(Code::Precondition, "there is no QEMU to run machines with")
            .because(error)
            .hint("install it (Debian: apt install qemu-system-x86), or name it with SPINNEY_QEMU; see `spinney doctor`")
    })?;
    let accel = match settings.accel.as_deref() {
        None => accel::probe(&qemu).0,
        Some(word) => Accel::parse(word).ok_or_else(|| {
            Error::new(Code::Usage, format!("{word:?} is not an accelerator")).hint("write kvm or tcg")
        })?,
    };
    Ok(Tools { qemu, accel })
}

fn lock_folder(state: &Path) -> Result<File> {
    let path = state.join("lock");
    let io = |error: std::io::Error| {
        Error::new(Code::NotPermitted, format!("{} cannot be locked", path.display())).because(error)
    };
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(io)?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::new(
            Code::Refused,
            format!("another Spinney uses the state folder {}", state.display()),
        )
        .hint("there is one daemon for a state folder; `spinney ls` talks to it")),
        Err(error) => Err(io(error.into())),
    }
}

impl From<pages::Error> for Error {
    fn from(error: pages::Error) -> Self {
        let (code, words) = if error.is_no_space() {
            (Code::NoSpace, "there is no room for pages in the page store")
        } else if error.is_damage() {
            (Code::Damaged, "pages in the page store are damaged or gone")
        } else if matches!(error, pages::Error::Forgotten) {
            (Code::Failed, "a repair has changed the page store meanwhile: do it again")
        } else {
            (Code::Failed, "the page store failed")
        };
        let damaged = code == Code::Damaged;
        let error = Self::new(code, words).because(error);
        match damaged {
            true => error.hint("`spinney fsck` says which snapshots that touches; `spinney fsck --repair` mends what can be mended"),
            false => error,
        }
    }
}

impl From<qemu::image::ImageError> for Error {
    fn from(error: qemu::image::ImageError) -> Self {
        let code = match &error {
            qemu::image::ImageError::InUse { .. } => Code::Refused,
            _ => Code::Failed,
        };
        Self::new(code, "a disk image cannot be made or used").because(error)
    }
}

impl From<qemu::qmp::QmpError> for Error {
    fn from(error: qemu::qmp::QmpError) -> Self {
        let (code, words) = match &error {
            qemu::qmp::QmpError::TimedOut { .. } => (Code::TimedOut, "QEMU does not answer"),
            qemu::qmp::QmpError::Closed { .. } => (Code::Failed, "QEMU ended"),
            _ => (Code::Failed, "QEMU did not do what it was asked for"),
        };
        Self::new(code, words).because(error)
    }
}
