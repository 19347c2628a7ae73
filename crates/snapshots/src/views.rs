//! The groups' views in the snapshot file system: one for each group, opened at the first need and kept by processes of its own, so that
//! guests whose memory is mapped from it do not depend on the daemon.
//!
//! Where there can be none (an old kernel, no FUSE, no right to mount) everything works without: memory is loaded before the guest runs.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pages::{MapRoot, PAGE_SIZE};
use qemu::binary::Version;
use qemu::command::RAM_ID;
use rustix::fs::{Advice, fadvise};
use snapfs::MapFile;
use snapfs::held::{HeldRead, read_report};
use snapfs::view::{Setup, View};

use crate::catalog::{Memory, TargetRow};
use crate::engine::Engine;
use crate::error::{Code, Error, Result};
use crate::groups::{OpenGroup, host_user};
use crate::id::random_number;
use crate::mount::Listing;
use crate::running::Running;

/// The first QEMU that maps a file privately without asking for the right to write to it.
const QEMU: Version = Version::at(8, 2);

/// Bytes of a memory that are read before they are touched.
const AHEAD: u64 = 64 << 20;

/// How long a load may go on while something of the memory cannot be read that it may be waiting for.
const LOAD_LIMIT: Duration = Duration::from_secs(2);
/// How often that is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The views that are open, by group.
#[derive(Debug, Default)]
pub(crate) struct Views {
    open: Mutex<HashMap<String, Arc<View>>>,
    /// Held while a group's view is asked or opened: its owner's process may take its time, and no other group is to wait for that.
    opening: Mutex<HashMap<String, Arc<Mutex<()>>>>,
    listings: Mutex<HashMap<String, Listing>>,
}

/// The memory of a snapshot as a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RamImage {
    pub(crate) path: PathBuf,
    pub(crate) root: MapRoot,
}

impl Views {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<View>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn opening(&self, group: &str) -> Arc<Mutex<()>> {
        let mut opening = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(opening.entry(group.to_owned()).or_default())
    }

    /// A group's view, if it is open.
    pub(crate) fn get(&self, group: &str) -> Option<Arc<View>> {
        self.lock().get(group).cloned()
    }

    /// What is listed in a group's view, for whoever lists.
    pub(crate) fn with_listing<T>(&self, group: &str, list: impl FnOnce(&mut Listing) -> T) -> T {
        let mut listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
        list(listings.entry(group.to_owned()).or_default())
    }
}

impl Engine {
    /// The folder of a group's view.
    pub(crate) fn view_folder(&self, group: &str) -> PathBuf {
        self.state().join("views").join(group)
    }

    /// Whether there can be views at all.
    ///
    /// # Errors
    /// What is lacking.
    pub(crate) fn can_view(&self) -> Result<()> {
        if self.settings.warden.is_none() {
            return Err(Error::new(Code::Precondition, "there is no executable to serve views with"));
        }
        let lacks = |lacks: snapfs::mount::Lacks| Error::new(Code::Precondition, lacks.to_string());
        snapfs::mount::supported().map_err(lacks)
    }

    /// The view of a group, which answers.
    ///
    /// # Errors
    /// There can be none, or the system refuses.
    pub(crate) fn view_of(&self, group: &OpenGroup) -> Result<Arc<View>> {
        let failed = |error: snapfs::view::ViewError| {
            let lacks = matches!(error, snapfs::view::ViewError::Lacks(_));
            let code = if lacks { Code::Precondition } else { Code::Failed };
            Error::new(code, "the snapshot file system cannot be had").because(error)
        };
        // Two who need it first are not to make two.
        let opening = self.views.opening(&group.row.id);
        let _one = opening.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(view) = self.views.get(&group.row.id).filter(|view| view.answers()) {
            return Ok(view);
        }
        let Some(executable) = &self.settings.warden else {
            return Err(Error::new(Code::Precondition, "there is no executable to serve views with"));
        };
        let setup = Setup {
            executable: executable.clone(),
            folder: self.view_folder(&group.row.id),
            at: None,
            store: group.folder.join("pages"),
            owner: host_user(group.row.owner),
        };
        group.store()?;
        let view = View::open(&setup, random_number(), &[]).map_err(failed)?;
        tracing::info!(group = group.row.name, mount = %view.mount_point().display(), "a view is open");
        let view = Arc::new(view);
        // It begins with an empty list.
        self.views.with_listing(&group.row.id, Listing::clear);
        self.views.lock().insert(group.row.id.clone(), Arc::clone(&view));
        Ok(view)
    }

    /// True if memory of a target's group can be mapped on this host.
    pub(crate) fn can_map(&self, target: &TargetRow) -> bool {
        self.tools().is_ok_and(|tools| tools.qemu.version >= QEMU)
            && self.group_of(target).and_then(|group| self.view_of(&group)).is_ok()
    }

    /// The file of a memory's RAM, to be mapped; none where that cannot be.
    pub(crate) fn ram_image(&self, target: &TargetRow, memory: &Memory) -> Option<RamImage> {
        let (_, root) = memory.blocks.iter().find(|(name, _)| name == RAM_ID)?;
        if self.tools().ok()?.qemu.version < QEMU {
            return None;
        }
        let view = self.group_of(target).and_then(|group| self.view_of(&group));
        let view = view
            .inspect_err(|error| {
                tracing::info!(target = target.name, %error, causes = ?error.causes(), "memory is loaded, not mapped");
            })
            .ok()?;
        Some(RamImage { path: view.ram(&MapFile::of(*root)), root: *root })
    }

    /// What a machine waits for whose memory is mapped, if it waits for something that cannot be read. Nobody is asked who may not answer.
    pub(crate) fn why_held(&self, target: &TargetRow) -> Option<String> {
        self.why_read_is_held(target, target.process.as_ref()?.ram?)
    }

    /// What of a memory somebody waits for that cannot be read, if there is something.
    fn why_read_is_held(&self, target: &TargetRow, root: MapRoot) -> Option<String> {
        let report = File::open(self.view_folder(&target.group).join("held")).ok()?;
        let held: Vec<HeldRead> = read_report(&report);
        let own: Vec<&HeldRead> = held.iter().filter(|read| read.file.root == root).collect();
        let mut pages: Vec<u64> = own.iter().flat_map(|read| read.pages.iter().copied()).collect();
        pages.sort_unstable();
        pages.dedup();
        let first = pages.first()?;
        let more = if pages.len() > 1 { format!(" and {} more", pages.len() - 1) } else { String::new() };
        Some(format!("page {first}{more} of its memory cannot be read: {}", own.first()?.why))
    }

    /// Ends a QEMU that is being loaded if it waits for a page that cannot be read, and says why: it would wait for a repair, and whoever
    /// wants it loaded still has what he had before. `over` is closed when it is loaded, or has failed for another reason.
    pub(crate) fn end_load_that_is_held(
        &self,
        target: &TargetRow,
        new: &Running,
        over: &Receiver<()>,
    ) -> Option<String> {
        let root = new.row.ram?;
        let mut since = None;
        while over.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
            let Some(why) = self.why_read_is_held(target, root) else {
                since = None;
                continue;
            };
            // It may be another machine that waits, of the same memory: then this one is loaded at once.
            if since.get_or_insert_with(Instant::now).elapsed() > LOAD_LIMIT {
                tracing::error!(target = target.name, why, "a machine that is being loaded waits");
                new.process.kill();
                return Some(why);
            }
        }
        None
    }

    /// Has what was new in a memory read ahead: it is what the guest worked with last. In a thread of its own, and only as long as that
    /// is not much; it is no harm if it is not done.
    pub(crate) fn fetch_ahead(&self, target: &TargetRow, root: MapRoot, before: Option<&Memory>) {
        let ram =
            |memory: &Memory| memory.blocks.iter().find(|(name, _)| name == RAM_ID).map(|(_, root)| *root);
        let Some(before) = before.and_then(ram) else { return };
        let view = self.views.get(&target.group);
        let (Ok(store), Some(view)) = (self.store_of(target), view) else { return };
        let path = view.ram(&MapFile::of(root));
        let fetch = move || -> Option<()> {
            let mut ranges = Vec::new();
            let mut left = AHEAD;
            let compared = store.differences(&root, &before, &mut |range| {
                left = left.saturating_sub((range.end - range.start) * PAGE_SIZE as u64);
                ranges.push(range);
                left > 0
            });
            compared.ok()?;
            let file = File::open(&path).ok()?;
            for range in ranges {
                let bytes = NonZeroU64::new((range.end - range.start) * PAGE_SIZE as u64);
                let _ = fadvise(&file, range.start * PAGE_SIZE as u64, bytes, Advice::WillNeed);
            }
            Some(())
        };
        let _ = thread::Builder::new().name("fetch-ahead".into()).spawn(fetch);
    }

    /// Ends the view of a group that is gone.
    pub(crate) fn remove_view(&self, group: &str) {
        let folder = self.view_folder(group);
        if self.end_view(group)
            && let Err(error) = fs::remove_dir_all(&folder)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(folder = %folder.display(), %error, "what is left of a view stays");
        }
    }

    /// Ends the view of a group, also one that an earlier daemon has opened. False if it stays.
    fn end_view(&self, group: &str) -> bool {
        drop(self.views.lock().remove(group));
        View::clear(&self.view_folder(group))
    }

    /// Groups whose views have a folder, those apart that are named.
    pub(crate) fn view_folders_but(&self, these: &HashSet<String>) -> Vec<String> {
        let all = fs::read_dir(self.state().join("views")).into_iter().flatten().flatten();
        let names = all.filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| !these.contains(name)).collect()
    }

    /// The daemon ends in order: views that no machine needs end, too.
    pub(crate) fn close_views(&self) {
        let needed = self.catalog.read(|tx| {
            let targets = TargetRow::all(tx, true)?;
            // It may have memory mapped from there, or disks open.
            Ok(targets.into_iter().filter(|t| t.process.is_some()).map(|t| t.group))
        });
        if let Ok(needed) = needed {
            for group in self.view_folders_but(&needed.collect()) {
                self.end_view(&group);
            }
        }
    }
}
