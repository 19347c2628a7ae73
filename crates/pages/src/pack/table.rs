//! The packs that a store has, by their number in this process, and their open files.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Layout;
use crate::disk::{Disk, DiskFile};
use crate::error::{Error, Result};
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering, RwLock, lock, read, write};

/// A sealed pack.
pub(crate) struct Pack {
    /// Number in this process; never used twice.
    pub(crate) number: u32,
    pub(crate) path: PathBuf,
    pub(crate) layout: Layout,
    /// The file that has the pages: the pack's own, or the image whose blocks they are.
    body_path: PathBuf,
    /// When a session last relied on it: at its commit, or at a de-duplication hit in it. See [`crate::gc`].
    touched: AtomicU64,
    /// The collector has decided to delete it; nobody may rely on it any more.
    retired: AtomicBool,
    /// All its names are in the index, or were moved elsewhere.
    published: AtomicBool,
    /// The image is not what it was when it was hashed: no session relies on it any more.
    suspect: AtomicBool,
}

impl Pack {
    pub(crate) fn name(&self) -> String {
        self.layout.id.file_name()
    }

    /// The file that its pages are in, for people.
    pub(crate) fn in_words(&self) -> String {
        match self.layout.image() {
            Some(_) => format!("the image {}", self.body_path.display()),
            None => format!("pack {}", self.name()),
        }
    }

    pub(crate) fn touch(&self, now: u64) {
        self.touched.fetch_max(now, Ordering::Relaxed);
    }

    pub(crate) fn touched(&self) -> u64 {
        self.touched.load(Ordering::Relaxed)
    }

    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
    }

    pub(crate) fn publish(&self) {
        self.published.store(true, Ordering::Release);
    }

    pub(crate) fn is_published(&self) -> bool {
        self.published.load(Ordering::Acquire)
    }

    pub(crate) fn suspect(&self) {
        self.suspect.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_suspect(&self) -> bool {
        self.suspect.load(Ordering::Relaxed)
    }

    /// A session may rely on it.
    pub(crate) fn is_usable(&self) -> bool {
        !self.retired.load(Ordering::Relaxed) && !self.is_suspect()
    }
}

/// Files held open at most, of packs and of images each.
const OPEN_FILES: usize = 64;

/// All packs in use at one moment, by number. Those set aside as damaged are not among them.
#[derive(Clone, Default)]
pub(crate) struct View(Arc<Vec<Option<Arc<Pack>>>>);

impl View {
    pub(crate) fn get(&self, number: u32) -> Option<&Arc<Pack>> {
        self.0.get(number as usize)?.as_ref()
    }

    /// All of them, oldest number first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Pack>> {
        self.0.iter().flatten()
    }
}

/// All packs in use.
pub(crate) struct Packs {
    disk: Arc<dyn Disk>,
    list: RwLock<View>,
    open: Mutex<OpenFiles>,
    open_bodies: Mutex<OpenFiles>,
}

#[derive(Default)]
struct OpenFiles {
    clock: u64,
    files: HashMap<u32, (Arc<dyn DiskFile>, u64)>,
}

impl Packs {
    pub(crate) fn new(disk: Arc<dyn Disk>) -> Self {
        Self { disk, list: RwLock::default(), open: Mutex::default(), open_bodies: Mutex::default() }
    }

    /// Adds a pack of a store in `folder`.
    pub(crate) fn add(&self, folder: &Path, path: PathBuf, layout: Layout, now: u64) -> Arc<Pack> {
        let body_path = layout.image().map_or_else(|| path.clone(), |image| image.file(folder));
        let mut list = write(&self.list);
        let pack = Arc::new(Pack {
            number: list.0.len() as u32,
            path,
            layout,
            body_path,
            touched: AtomicU64::new(now),
            retired: AtomicBool::new(false),
            published: AtomicBool::new(false),
            suspect: AtomicBool::new(false),
        });
        Arc::make_mut(&mut list.0).push(Some(pack.clone()));
        pack
    }

    /// The packs as they are now.
    pub(crate) fn view(&self) -> View {
        read(&self.list).clone()
    }

    pub(crate) fn get(&self, number: u32) -> Option<Arc<Pack>> {
        read(&self.list).get(number).cloned()
    }

    /// All packs, oldest number first.
    pub(crate) fn all(&self) -> Vec<Arc<Pack>> {
        read(&self.list).iter().cloned().collect()
    }

    /// Takes a pack out of the table; its file is the caller's business.
    pub(crate) fn forget(&self, number: u32) {
        if let Some(slot) = Arc::make_mut(&mut write(&self.list).0).get_mut(number as usize) {
            *slot = None;
        }
        self.let_go(number);
    }

    /// Closes what is open of a pack, so that it is opened anew: another file may have its name by now, and an open one may be stale.
    pub(crate) fn let_go(&self, number: u32) {
        lock(&self.open).files.remove(&number);
        lock(&self.open_bodies).files.remove(&number);
    }

    /// The pack's file, opened if need be. Stays readable for its holder when the pack is deleted.
    pub(crate) fn file(&self, pack: &Pack) -> Result<Arc<dyn DiskFile>> {
        self.open(&self.open, pack.number, &pack.path)
    }

    /// The file that has the pack's pages, likewise.
    pub(crate) fn body(&self, pack: &Pack) -> Result<Arc<dyn DiskFile>> {
        match pack.layout.image() {
            None => self.file(pack),
            Some(_) => self.open(&self.open_bodies, pack.number, &pack.body_path),
        }
    }

    fn open(&self, open: &Mutex<OpenFiles>, number: u32, path: &Path) -> Result<Arc<dyn DiskFile>> {
        {
            let mut open = lock(open);
            open.clock += 1;
            let now = open.clock;
            if let Some((file, used)) = open.files.get_mut(&number) {
                *used = now;
                return Ok(file.clone());
            }
        }
        let file = self.disk.open(path).map_err(Error::io("open", path))?;
        let mut open = lock(open);
        if open.files.len() >= OPEN_FILES {
            let oldest = open.files.iter().min_by_key(|(_, (_, used))| *used).map(|(number, _)| *number);
            oldest.and_then(|number| open.files.remove(&number));
        }
        let now = open.clock;
        open.files.insert(number, (file.clone(), now));
        Ok(file)
    }
}

impl Pack {
    /// The file that has the pages.
    pub(crate) fn body_path(&self) -> &Path {
        &self.body_path
    }
}
