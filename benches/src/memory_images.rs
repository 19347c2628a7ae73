//! The memory of several guests in files: made once in a run, by whoever asks first, and used by all figures about the
//! page store, which compare what it makes of them with what others make of them.
//!
//! Separately booted from one kernel and initramfs, each with a UUID of its own, at rest: they have in common what
//! machines of one kind have in common, and nothing was put there to be found.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use crate::error::{Error, Result, system};
use crate::machine::Machine;
use crate::settings::Bench;
use crate::spinney::Spinney;

/// How many guests.
const GUESTS: usize = 8;
/// Memory of each.
const GUEST_MIB: u64 = 256;
/// From a guest's first answer until it has come to rest.
const REST: Duration = Duration::from_secs(1);

/// The files, and the folder that goes with the last user.
#[derive(Debug)]
pub(crate) struct MemoryImages {
    _folder: Option<TempDir>,
    paths: Vec<PathBuf>,
}

/// The memory of eight guests of 256 MiB, a file each, in the order of their boots.
///
/// # Errors
/// A guest does not boot, or the disk is full. Asked again, it tries again.
pub(crate) fn eight(bench: &Bench) -> Result<&[PathBuf]> {
    if bench.images.get().is_none() {
        // Nobody else can have set it meanwhile: one figure is measured at a time.
        let _ = bench.images.set(make(bench)?);
    }
    bench.images.get().map(|images| images.paths.as_slice()).ok_or(Error::Lacks("memory images"))
}

fn make(bench: &Bench) -> Result<MemoryImages> {
    if let Some(folder) = &bench.keep_images {
        return kept(bench, folder);
    }
    let folder = tempfile::Builder::new().prefix("spinney-bench-images-").tempdir_in(&bench.disk);
    let folder = folder.map_err(system("make a folder in", &bench.disk))?;
    let paths = paths(folder.path());
    paths.iter().try_for_each(|path| boot_and_write(bench, path))?;
    Ok(MemoryImages { _folder: Some(folder), paths })
}

/// Those of an earlier run, and those that it lacks.
fn kept(bench: &Bench, folder: &Path) -> Result<MemoryImages> {
    let paths = paths(folder);
    fs::create_dir_all(folder).map_err(system("make", folder))?;
    for path in paths.iter().filter(|path| !path.exists()) {
        let unfinished = path.with_extension("unfinished");
        boot_and_write(bench, &unfinished)?;
        fs::rename(&unfinished, path).map_err(system("rename", &unfinished))?;
    }
    Ok(MemoryImages { _folder: None, paths })
}

fn paths(folder: &Path) -> Vec<PathBuf> {
    (1..=GUESTS).map(|number| folder.join(format!("guest{number}.memory"))).collect()
}

fn boot_and_write(bench: &Bench, path: &Path) -> Result<()> {
    let spinney = Spinney::start(bench, &bench.disk)?;
    let machine = Machine::boot(&spinney, GUEST_MIB)?;
    thread::sleep(REST);
    machine.memory_to(path, GUEST_MIB)
}
