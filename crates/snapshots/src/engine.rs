//! The engine: everything that can be asked of a state folder. (Signatures; being filled in.)

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use crate::*;

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
}

/// How far an operation is; read by others while it runs.
#[derive(Debug, Default)]
pub struct Progress {
    /// Units done.
    pub done: AtomicU64,
    /// Units in all; 0 if unknown.
    pub total: AtomicU64,
    /// What is being done ("saving memory").
    pub phase: std::sync::Mutex<String>,
}

/// The caller's side of one operation: its id in the journal, its progress, its cancel flag.
#[derive(Clone, Debug)]
pub struct Context {
    /// Id under which it is journalled, 16 hex digits.
    pub id: String,
    /// Progress.
    pub progress: Arc<Progress>,
    /// Set by whoever wants it rolled back.
    pub cancel: Arc<AtomicBool>,
}

impl Context {
    /// A context with a fresh random id.
    pub fn new() -> Self {
        todo!()
    }
}

/// One state folder, opened by one process.
#[derive(Debug)]
pub struct Engine {}

#[allow(missing_docs, unused_variables)]
impl Engine {
    /// Locks and opens the state folder, finds running machines, finishes or rolls back what was under way. The strings are
    /// notes for people on what was found.
    pub fn open(settings: Settings) -> Result<(Arc<Self>, Vec<String>)> {
        todo!()
    }

    pub fn create(&self, cx: &Context, name: &str, config: MachineConfig) -> Result<Machine> {
        todo!()
    }
    pub fn start(&self, cx: &Context, target: &str) -> Result<Machine> {
        todo!()
    }
    pub fn stop(&self, cx: &Context, target: &str, timeout: Duration, kill: bool) -> Result<Machine> {
        todo!()
    }
    pub fn kill(&self, cx: &Context, target: &str) -> Result<Machine> {
        todo!()
    }
    pub fn pause(&self, cx: &Context, target: &str) -> Result<Machine> {
        todo!()
    }
    pub fn resume(&self, cx: &Context, target: &str) -> Result<Machine> {
        todo!()
    }
    pub fn list(&self) -> Result<Vec<Machine>> {
        todo!()
    }
    pub fn machine(&self, target: &str) -> Result<Machine> {
        todo!()
    }
    /// `address` is `TARGET@...` in any form of the contract.
    pub fn snapshot(&self, address: &str) -> Result<Snapshot> {
        todo!()
    }
    pub fn tree(&self, target: &str) -> Result<Tree> {
        todo!()
    }

    pub fn take(&self, cx: &Context, target: &str, options: TakeOptions) -> Result<Snapshot> {
        todo!()
    }
    pub fn goto(&self, cx: &Context, address: &str, power: GotoPower, discard: bool) -> Result<GotoReport> {
        todo!()
    }
    pub fn back(&self, cx: &Context, target: &str) -> Result<GotoReport> {
        todo!()
    }
    /// What `goto --discard` of this target would throw away, in words; none if nothing.
    pub fn discard_plan(&self, target: &str) -> Result<Option<String>> {
        todo!()
    }
    /// `address` is a target or a snapshot. Returns its new full name.
    pub fn edit(&self, cx: &Context, address: &str, edit: Edit) -> Result<String> {
        todo!()
    }
    pub fn protect(&self, cx: &Context, address: &str, protected: bool) -> Result<()> {
        todo!()
    }
    pub fn rm_plan(&self, address: &str, whole_tree: bool) -> Result<RemovePlan> {
        todo!()
    }
    pub fn rm(&self, cx: &Context, address: &str, whole_tree: bool) -> Result<RemovePlan> {
        todo!()
    }
    pub fn du(&self, target: Option<&str>, without: &[String]) -> Result<Du> {
        todo!()
    }
    pub fn gc(&self, cx: &Context, now: bool, dry_run: bool) -> Result<GcReport> {
        todo!()
    }
    pub fn fsck(&self, cx: &Context) -> Result<FsckReport> {
        todo!()
    }
    pub fn operations(&self, limit: usize) -> Result<Vec<Operation>> {
        todo!()
    }
    /// Takes back operation `id`, or the last one that can be. Returns a sentence on what was done.
    pub fn undo(&self, cx: &Context, id: Option<&str>) -> Result<String> {
        todo!()
    }
    /// Usable without a state folder.
    pub fn doctor(settings: &Settings) -> Vec<Check> {
        todo!()
    }
    pub fn state(&self) -> &Path {
        todo!()
    }
}
