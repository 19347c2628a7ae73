//! `clone`: another machine, off, with the disks of this one.

use std::path::PathBuf;
use std::time::Instant;

use clap_complete::ArgValueCompleter;
use server::Problem;
use server::client::Method;
use server::snapshots::{CloneOptions, Cloned};

use crate::errors::misuse;
use crate::output::{micros, span};
use crate::session::Session;
use crate::{address, complete};

/// Make another machine of a machine, or of a snapshot
///
/// It is off, and has a UUID and MAC addresses of its own; the source is not touched, and may run on. A linked clone lies over the
/// source's disks, costs next to nothing and keeps what it needs of them, whatever is removed. A full one is a copy.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  spinney clone web@before-upgrade www           linked: in a moment, whatever its size
  spinney clone web www                          of the disks of web as they are now
  spinney clone web@base www --full --dir /vms   /vms/www-disk0.qcow2, which needs nothing else")]
pub(crate) struct Args {
    /// Machine, as it is now, or snapshot
    #[arg(value_name = "TARGET[@SNAP]", add = ArgValueCompleter::new(complete::addresses))]
    address: String,
    /// Name of the new machine
    #[arg(value_name = "NEW")]
    name: String,
    /// Over the source's disks [default]
    #[arg(long, conflicts_with = "full")]
    linked: bool,
    /// Copy the disks
    #[arg(long)]
    full: bool,
    /// Folder for the copies: images that can be used without Spinney
    #[arg(long, value_name = "DIR", requires = "full", value_hint = clap::ValueHint::DirPath)]
    dir: Option<PathBuf>,
}

pub(crate) fn run(session: &Session, args: Args) -> Result<(), Problem> {
    let absolute = |dir| {
        std::path::absolute(dir).map_err(|error| misuse("the folder has no absolute path").because(&error))
    };
    let dir = args.dir.map(absolute).transpose()?;
    let options = CloneOptions { name: args.name, full: args.full, dir };
    let place = address::verb(&args.address, "clone")?;
    let began = Instant::now();
    let cloned: Cloned = session.change(Method::POST, &place, &options)?;
    let took_us = micros(began);
    if session.out.json {
        session.document("spinney.clone/1", &cloned);
        return Ok(());
    }
    let how = if args.full { "a copy" } else { "linked" };
    let name = &cloned.machine.name;
    session.out.line(format_args!(
        "{name} is a clone of {} ({how}), made in {}",
        args.address,
        span(took_us)
    ));
    cloned.files.iter().for_each(|file| session.out.line(format_args!("  {}", file.display())));
    if !cloned.files.is_empty() {
        session.out.note(format_args!(
            "{name} lies over these files, which are yours: `spinney rm {name}` leaves them"
        ));
    }
    session.out.note(format_args!("`spinney start {name}` boots it"));
    Ok(())
}
