//! `edit`: another name, another note.

use clap::ArgGroup;
use clap_complete::ArgValueCompleter;
use server::Problem;
use server::api::Renamed;
use server::client::Method;
use server::snapshots::Edit;

use crate::session::Session;
use crate::{address, complete};

/// Change a name, a note, or whether it is kept
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  spinney edit web --name www
  spinney edit web@snap-1 --name before-upgrade -m \"all is well\"
  spinney edit web@snap-1 --keep=false")]
#[command(group(ArgGroup::new("changes").required(true).multiple(true).args(["name", "message", "keep", "accept_disks"])))]
pub(crate) struct Args {
    /// Machine or snapshot
    #[arg(value_name = "TARGET[@SNAP]", add = ArgValueCompleter::new(complete::addresses))]
    address: String,
    /// New name
    #[arg(long)]
    name: Option<String>,
    /// New note
    #[arg(short, long = "message", value_name = "TEXT")]
    message: Option<String>,
    /// Let nothing but rm remove it, or with =false anything
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    keep: Option<bool>,
    /// Take the image files under a machine's disks as they are now, after one was touched or copied back
    #[arg(long)]
    accept_disks: bool,
}

pub(crate) fn run(session: &Session, args: Args) -> Result<(), Problem> {
    let has_name = args.name.is_some();
    let edit = Edit { name: args.name, note: args.message, keep: args.keep, accept_disks: args.accept_disks };
    let renamed: Renamed = session.change(Method::PATCH, &address::resource(&args.address)?, &edit)?;
    if session.out.json {
        session.document("spinney.edit/1", &renamed);
    } else {
        match has_name {
            true => session.out.line(format_args!("{} is now {}", args.address, renamed.address)),
            false => session.out.line(format_args!("changed {}", renamed.address)),
        }
    }
    Ok(())
}
