//! What Spinney is compared with: restic, borg and zstd, as `scripts/bench-setup.sh` installs them.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::disk;
use crate::error::{Error, Result, system};

/// What a tool made of the files.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stored {
    /// What that takes on the disk.
    pub(crate) bytes: u64,
    /// How long storing took, not synced.
    pub(crate) took: Duration,
}

/// A new repository of restic's, with the files in one backup. It is made in `folder` and removed again.
pub(crate) fn restic(folder: &Path, files: &[PathBuf], compression: &str) -> Result<Stored> {
    let work = work(folder)?;
    let repository = work.path().join("repository");
    let restic = || {
        let mut command = Command::new("restic");
        command.args(["--quiet", "--no-cache", "--compression", compression, "--repo"]).arg(&repository);
        command.env("RESTIC_PASSWORD", "bench");
        command
    };
    run(restic().args(["init", "--repository-version", "2"]))?;
    let took = run(restic().arg("backup").args(files))?;
    stored(&repository, took)
}

/// A new repository of borg's, with the files in one archive. It is made in `folder` and removed again.
pub(crate) fn borg(folder: &Path, files: &[PathBuf], options: &[&str]) -> Result<Stored> {
    let work = work(folder)?;
    let repository = work.path().join("repository");
    let borg = |verb: &str| {
        let mut command = Command::new("borg");
        command.arg(verb).env("BORG_BASE_DIR", work.path().join("base"));
        command.env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
        command
    };
    run(borg("init").args(["--encryption", "none"]).arg(&repository))?;
    let archive = format!("{}::images", repository.display());
    let took = run(borg("create").args(options).arg(archive).args(files))?;
    stored(&repository, took)
}

/// One stream of zstd's over all files. It is made in `folder` and removed again.
pub(crate) fn zstd(folder: &Path, files: &[PathBuf], options: &[&str]) -> Result<Stored> {
    let work = work(folder)?;
    let path = work.path().join("stream");
    let out = File::create_new(&path).map_err(system("make", &path))?;
    let mut command = Command::new("zstd");
    command.args(["-q", "-c"]).args(options).stdin(Stdio::piped()).stdout(out).stderr(Stdio::piped());
    let began = Instant::now();
    let mut child = command.spawn().map_err(|error| missing(&command, error))?;
    // If it ends early it closes the pipe; why, it says itself.
    let fed = match child.stdin.take() {
        Some(mut pipe) => files.iter().try_for_each(|file| {
            let mut from = File::open(file).map_err(system("open", file))?;
            io::copy(&mut from, &mut pipe).map(drop).map_err(system("compress", file))
        }),
        None => Err(Error::Lacks("pipe")),
    };
    let output = child.wait_with_output().map_err(|error| missing(&command, error))?;
    check(&command, &output)?;
    fed?;
    let took = began.elapsed();
    stored(&path, took)
}

fn work(folder: &Path) -> Result<TempDir> {
    tempfile::Builder::new().prefix("tool-").tempdir_in(folder).map_err(system("make a folder in", folder))
}

fn stored(path: &Path, took: Duration) -> Result<Stored> {
    // Until they are written back, files take no blocks.
    disk::settle(path)?;
    Ok(Stored { bytes: disk::allocated(path), took })
}

fn run(command: &mut Command) -> Result<Duration> {
    let began = Instant::now();
    let output = command.stdin(Stdio::null()).output().map_err(|error| missing(command, error))?;
    check(command, &output)?;
    Ok(began.elapsed())
}

fn check(command: &Command, output: &Output) -> Result<()> {
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let words = said.lines().last().unwrap_or("nothing").to_owned();
    Err(Error::Tool { command: format!("{command:?}"), words })
}

fn missing(command: &Command, error: io::Error) -> Error {
    let program = command.get_program();
    match error.kind() {
        io::ErrorKind::NotFound => {
            Error::Unavailable(format!("{} is not installed (scripts/bench-setup.sh)", program.display()))
        }
        _ => system("run", Path::new(program))(error),
    }
}
