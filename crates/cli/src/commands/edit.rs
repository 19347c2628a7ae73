//! `edit`: another name, another note, another group.

use std::time::Duration;

use clap::ArgGroup;
use clap_complete::ArgValueCompleter;
use jiff::Timestamp;
use server::Problem;
use server::client::Method;
use server::snapshots::{Edit, Edited};

use crate::output::expires;
use crate::session::Session;
use crate::size::parse_expiry_or_never;
use crate::{address, complete};

/// Change a name, a note, whether and how long it is kept, or the group
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  spinney edit web --name www
  spinney edit web@snap-1 --name before-upgrade -m \"all is well\"
  spinney edit web@snap-1 --keep=false
  spinney edit web@snap-1 --expire 7d         gone in a week
  spinney edit web --group work               copied there with all its snapshots")]
#[command(group(ArgGroup::new("changes").required(true).multiple(true).args(["name", "message", "keep", "expire", "accept_disks", "group"])))]
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
    /// Let nothing but rm remove it, or with =false anything. Takes an expiry away
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    keep: Option<bool>,
    /// Remove it by itself after this time from now, as rm would (30s, 10m, 2h, 7d, 4w); or never
    #[arg(long, value_name = "TIME|never", value_parser = parse_expiry_or_never)]
    expire: Option<u64>,
    /// Take the image files under a machine's disks as they are now, after one was touched or copied back
    #[arg(long)]
    accept_disks: bool,
    /// Group that the machine is to belong to. All that is stored of it, snapshots and all, is copied there; it has to be off or
    /// suspended
    #[arg(long, conflicts_with_all = ["name", "message", "keep", "expire", "accept_disks"], add = ArgValueCompleter::new(complete::groups))]
    group: Option<String>,
}

pub(crate) fn run(session: &Session, args: Args) -> Result<(), Problem> {
    let has_name = args.name.is_some();
    let group = args.group.clone();
    let edit = Edit {
        name: args.name,
        note: args.message,
        keep: args.keep,
        expire_seconds: args.expire,
        accept_disks: args.accept_disks,
        group: args.group,
    };
    let edited: Edited = session.change(Method::PATCH, &address::resource(&args.address)?, &edit)?;
    if session.out.json {
        session.document("spinney.edit/1", &edited);
    } else {
        session.out.line(match group {
            _ if !edited.changed => format!("{} is so already: nothing was changed", edited.address),
            Some(group) => format!("{} belongs to the group {group} now", edited.address),
            None if has_name => format!("{} is now {}", args.address, edited.address),
            None => format!("changed {}", edited.address),
        });
        match args.expire {
            Some(0) => session.out.note("it does not expire"),
            Some(seconds) => {
                let now = Timestamp::now();
                let then = now.checked_add(Duration::from_secs(seconds)).unwrap_or(Timestamp::MAX);
                session.out.note(format_args!("it {}", expires(now, then)));
            }
            None => {}
        }
    }
    Ok(())
}
