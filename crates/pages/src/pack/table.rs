//! The packs that a store has, by their number in this process, and their open files.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use super::Layout;
use crate::disk::{Disk, DiskFile};
use crate::error::{Error, Result};
use crate::sync::{lock, read, write};

/// A sealed pack.
pub(crate) struct Pack {
    /// Number in this process; never used twice.
    pub(crate) number: u32,
    pub(crate) path: PathBuf,
    pub(crate) layout: Layout,
    /// When a session last relied on it: at its commit, or at a de-duplication hit in it. See [`crate::gc`].
    touched: AtomicU64,
    /// The collector has decided to delete it; nobody may rely on it any more.
    retired: AtomicBool,
}

impl Pack {
    pub(crate) fn name(&self) -> String {
        self.layout.id.file_name()
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

    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
    }
}

/// Files held open at most.
const OPEN_FILES: usize = 64;

/// All packs in use. Those set aside as damaged are not among them.
pub(crate) struct Packs {
    disk: Arc<dyn Disk>,
    list: RwLock<Vec<Option<Arc<Pack>>>>,
    open: Mutex<OpenFiles>,
}

#[derive(Default)]
struct OpenFiles {
    clock: u64,
    files: HashMap<u32, (Arc<dyn DiskFile>, u64)>,
}

impl Packs {
    pub(crate) fn new(disk: Arc<dyn Disk>) -> Self {
        Self { disk, list: RwLock::default(), open: Mutex::default() }
    }

    pub(crate) fn add(&self, path: PathBuf, layout: Layout, now: u64) -> Arc<Pack> {
        let mut list = write(&self.list);
        let pack = Arc::new(Pack {
            number: list.len() as u32,
            path,
            layout,
            touched: AtomicU64::new(now),
            retired: AtomicBool::new(false),
        });
        list.push(Some(pack.clone()));
        pack
    }

    pub(crate) fn get(&self, number: u32) -> Option<Arc<Pack>> {
        read(&self.list).get(number as usize).cloned().flatten()
    }

    /// All packs, oldest number first.
    pub(crate) fn all(&self) -> Vec<Arc<Pack>> {
        read(&self.list).iter().flatten().cloned().collect()
    }

    /// Takes a pack out of the table; its file is the caller's business.
    pub(crate) fn forget(&self, number: u32) {
        if let Some(slot) = write(&self.list).get_mut(number as usize) {
            *slot = None;
        }
        lock(&self.open).files.remove(&number);
    }

    /// The pack's file, opened if need be. Stays readable for its holder when the pack is deleted.
    pub(crate) fn file(&self, pack: &Pack) -> Result<Arc<dyn DiskFile>> {
        {
            let mut open = lock(&self.open);
            open.clock += 1;
            let now = open.clock;
            if let Some((file, used)) = open.files.get_mut(&pack.number) {
                *used = now;
                return Ok(file.clone());
            }
        }
        let file = self.disk.open(&pack.path).map_err(Error::io("open", &pack.path))?;
        let mut open = lock(&self.open);
        if open.files.len() >= OPEN_FILES {
            let oldest = open.files.iter().min_by_key(|(_, (_, used))| *used).map(|(number, _)| *number);
            oldest.and_then(|number| open.files.remove(&number));
        }
        let now = open.clock;
        open.files.insert(pack.number, (file.clone(), now));
        Ok(file)
    }
}
