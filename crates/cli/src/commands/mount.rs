//! `mount`: every snapshot as a folder of plain files.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use server::Problem;
use server::api::MountRequest;
use server::client::Method;
use server::snapshots::{Code, Mounted};

use crate::errors::misuse;
use crate::session::Session;

/// Show every snapshot as a folder of plain files
///
/// MACHINE/SNAPSHOT/ has `ram`, `device-state`, `disk0.raw`, `snapshot.json`, and `screen.png` where there was a screen: read-only, read
/// from the store when they are read, and always as they were. What is taken later appears by itself, what is removed goes. To be rid of
/// DIR remove it: it is a link. It is empty while nothing is mounted, until the next `spinney mount`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  spinney mount                              prints where
  spinney mount ~/snapshots                  makes that a link to it
  strings -n 12 ~/snapshots/web/before/ram | grep password
  mount -o ro,loop,noload ~/snapshots/web/before/disk0.raw /mnt
  cmp ~/snapshots/web/a/disk0.raw ~/snapshots/web/b/disk0.raw")]
pub(crate) struct Args {
    /// Made a link to it: a path where there is nothing yet, or an empty folder
    #[arg(value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    dir: Option<PathBuf>,
    /// Group whose snapshots are meant
    #[arg(long, value_name = "GROUP")]
    group: Option<String>,
}

pub(crate) fn run(session: &Session, args: Args) -> Result<(), Problem> {
    let dir = args.dir.as_deref().map(free_place).transpose()?;
    let mut mounted: Mounted =
        session.change(Method::POST, "/v1/mount", &MountRequest { group: args.group })?;
    if let Some(dir) = dir {
        link(&mounted.path, &dir)?;
        mounted.path = dir;
    }
    if session.out.json {
        session.document("spinney.mount/1", &mounted);
    } else {
        session.out.line(mounted.path.display());
    }
    Ok(())
}

/// A path at which there can be a link.
fn free_place(dir: &Path) -> Result<PathBuf, Problem> {
    let dir = std::path::absolute(dir)
        .map_err(|error| misuse("the folder has no absolute path").because(&error))?;
    let is_ours = fs::read_link(&dir).is_ok_and(|to| to.ends_with("mnt"));
    let empty = || fs::read_dir(&dir).is_ok_and(|mut entries| entries.next().is_none());
    match fs::symlink_metadata(&dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(dir),
        Ok(_) if is_ours || empty() => Ok(dir),
        _ => Err(Problem::new(Code::Refused, format!("there is something at {}", dir.display()))
            .hint("give a path where there is nothing yet, or an empty folder")),
    }
}

fn link(to: &Path, dir: &Path) -> Result<(), Problem> {
    // What is there is an older link of ours, or an empty folder.
    let _ = fs::remove_file(dir).or_else(|_| fs::remove_dir(dir));
    symlink(to, dir).map_err(|error| {
        Problem::new(Code::Failed, format!("{} cannot be made", dir.display())).because(&error)
    })
}
