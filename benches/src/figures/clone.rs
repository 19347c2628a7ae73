//! What a clone costs: a linked one, whatever the size of its disk, and a full one beside `cp` of the same bytes.
//!
//! `cp` and clone by turns, as often one first as the other. Before each the background has nothing left to do: it looks through the file
//! of a full clone, which is as much to read as was copied, and would slow down whoever comes next.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;

use super::ms;
use crate::disk;
use crate::error::{Error, Result, system};
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::spinney::Spinney;
use crate::stats::Summary::Median;

/// MiB of the disks.
const SMALL: u64 = 64;
const LARGE: u64 = 1024;
/// An even number: each comes first as often.
const ROUNDS: u64 = 10;

/// `clone.linked.ms`, `clone.full.vs_cp`.
pub(super) fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let spinney = Spinney::start(bench, &bench.disk)?;
    let folder = tempfile::Builder::new().prefix("clones-").tempdir_in(&bench.disk);
    let folder = folder.map_err(system("make a folder in", &bench.disk))?;
    for (name, mib) in [("small", SMALL), ("large", bench.count(LARGE, 128))] {
        let image = folder.path().join(name);
        unlike(&image, mib)?;
        let image = image.display().to_string();
        spinney.run(&["create", name, "--memory", "64M", "--network", "none", "--disk", &image])?;
        spinney.run(&["take", name, "one"])?;
    }
    let mut linked = Vec::new();
    let mut full = Vec::new();
    for round in 0..bench.count(ROUNDS, 2) {
        bench.check()?;
        let clone = |name: &str| -> Result<f64> {
            quiet(&spinney)?;
            let done = spinney.run(&["clone", &format!("{name}@one"), &format!("{name}-{round}")])?;
            Ok(ms(done.wall))
        };
        let (small, large) = (clone("small")?, clone("large")?);
        linked.push(Run::new(large).beside("small_ms", small));
        // Who comes first changes: the other's writes may still occupy the disk.
        let copied = if round % 2 == 0 { Some(copy(&spinney, folder.path())?) } else { None };
        quiet(&spinney)?;
        let name = format!("full-{round}");
        let done = spinney.run(&[
            "clone",
            "large@one",
            &name,
            "--full",
            "--dir",
            &folder.path().display().to_string(),
        ])?;
        let cloned = done.wall.as_secs_f64();
        // Before it is gone: what has been opened is read to its end.
        spinney.wait_for_background()?;
        spinney.run(&["rm", &name, "--yes"])?;
        let file = folder.path().join(format!("{name}-disk0.qcow2"));
        fs::remove_file(&file).map_err(system("remove", &file))?;
        let copied = copied.map_or_else(|| copy(&spinney, folder.path()), Ok)?;
        full.push(Run::new(copied / cloned).beside("cp_s", copied).beside("clone_s", cloned));
    }
    Ok(vec![
        Figure::new("clone.linked.ms", "ms", Better::Lower, Median, linked)?.target(200.0),
        Figure::new("clone.full.vs_cp", "", Better::Higher, Median, full)?.target(0.9),
    ])
}

/// Waits until nothing is done in the background, nor written back.
fn quiet(spinney: &Spinney<'_>) -> Result<()> {
    spinney.wait_for_background()?;
    disk::settle(spinney.state())
}

/// Seconds of `cp` of the large image, synced, as a clone is.
fn copy(spinney: &Spinney<'_>, folder: &Path) -> Result<f64> {
    quiet(spinney)?;
    let to = folder.join("copy");
    let began = Instant::now();
    let mut cp = std::process::Command::new("cp");
    // A reflink would copy nothing.
    let status = cp
        .arg("--reflink=never")
        .arg(folder.join("large"))
        .arg(&to)
        .status()
        .map_err(system("run", Path::new("cp")))?;
    if !status.success() {
        return Err(Error::Tool { command: "cp".into(), words: status.to_string() });
    }
    File::open(&to).and_then(|file| file.sync_all()).map_err(system("sync", &to))?;
    let took = began.elapsed().as_secs_f64();
    fs::remove_file(&to).map_err(system("remove", &to))?;
    Ok(took)
}

/// A file of bytes that nothing makes smaller.
fn unlike(path: &Path, mib: u64) -> Result<()> {
    let make = || -> io::Result<()> {
        let mut file = File::create_new(path)?;
        let mut random = blake3::Hasher::new().finalize_xof();
        let mut bytes = vec![0; 1 << 20];
        for _ in 0..mib {
            random.fill(&mut bytes);
            file.write_all(&bytes)?;
        }
        file.sync_all()
    };
    make().map_err(system("make", path))
}
