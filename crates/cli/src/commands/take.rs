//! `take`: a snapshot of where a machine stands.

use std::time::Duration;

use clap::ValueEnum;
use clap_complete::ArgValueCompleter;
use jiff::Timestamp;
use server::Problem;
use server::client::{Method, Until};
use server::snapshots::{Mode, Snapshot, SnapshotState, TakeOptions};

use super::show::mode;
use crate::draw::state;
use crate::output::{bytes, expires, span};
use crate::session::Session;
use crate::size::{parse_duration, parse_expiry};
use crate::{address, complete};

/// Take a snapshot
///
/// The machine may run, be paused or off; that state is recorded and comes back with `goto`. Returns when the snapshot
/// is durable, and says for how long the guest stood still.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  spinney take web                                     named snap-1, snap-2, ...
  spinney take web before-upgrade -m \"all is well\"
  spinney take web --max-pause 50ms --no-wait          back at once; `tree` shows it as saving
  spinney take web --expire 7d                         gone in a week, unless `edit` says otherwise
  spinney take web --disk-only")]
pub(crate) struct Args {
    /// Machine
    #[arg(add = ArgValueCompleter::new(complete::targets))]
    target: String,
    /// Name of the snapshot [default: snap-N]
    name: Option<String>,
    /// Note
    #[arg(short, long = "message", value_name = "TEXT", default_value = "", hide_default_value = true)]
    message: String,
    /// How memory is copied [default: the one with the least pause]
    #[arg(long, value_name = "MODE")]
    mode: Option<CopyMode>,
    /// Leave memory out
    #[arg(long, conflicts_with = "mode")]
    disk_only: bool,
    /// Let nothing but rm, or an undo of this take, remove it
    #[arg(long)]
    keep: bool,
    /// Remove it by itself after this time, as rm would: 30s, 10m, 2h, 7d, 4w
    #[arg(long, value_name = "TIME", value_parser = parse_expiry, conflicts_with = "keep")]
    expire: Option<u64>,
    /// Roll back rather than let the guest stand still for longer than this
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    max_pause: Option<Duration>,
    /// Return when the guest runs on; the snapshot is `saving` until it is durable
    #[arg(long)]
    no_wait: bool,
}

/// Modes that can be asked for.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum CopyMode {
    /// Paused throughout
    StopCopy,
    /// Copied in rounds while the machine runs, paused for the last
    PreCopy,
    /// Paused for the instant, copied while the machine runs on
    Live,
}

pub(crate) fn run(session: &Session, args: Args) -> Result<(), Problem> {
    let path = format!("{}/take", address::target(&args.target)?);
    let mode = args.mode.map(|mode| match mode {
        CopyMode::StopCopy => Mode::StopCopy,
        CopyMode::PreCopy => Mode::PreCopy,
        CopyMode::Live => Mode::Live,
    });
    let options = TakeOptions {
        name: args.name,
        note: args.message,
        mode,
        disk_only: args.disk_only,
        keep: args.keep,
        expire_seconds: args.expire,
        max_pause_us: args.max_pause.map(|limit| u64::try_from(limit.as_micros()).unwrap_or(u64::MAX)),
    };
    let until = if args.no_wait { Until::Result } else { Until::Ended };
    let snapshot: Snapshot =
        session.operate_until(until, &session.client()?, Method::POST, &path, Some(&options))?;
    if session.out.json {
        session.document("spinney.snapshot/1", &snapshot);
    } else {
        session.out.line(line(&snapshot, Timestamp::now()));
    }
    Ok(())
}

/// `web@snap-1  running, 512 MiB → 38.2 MiB stored, paused 212 ms (stop-copy), durable in 480 ms`;
/// `web@snap-2  off (disk only), 0 B stored, durable in 59 ms`
fn line(s: &Snapshot, now: Timestamp) -> String {
    let mut stored = bytes(s.stored_bytes);
    if s.disk_bytes > 0 {
        stored = format!("{stored} + {} of disk", bytes(s.disk_bytes));
    }
    let size = match s.memory_bytes {
        0 => format!("{stored} stored"),
        memory => format!("{} → {stored} stored", bytes(memory)),
    };
    // Without memory there is no way in which it was copied.
    let pause = match (s.pause_us, s.mode) {
        (Some(us), _) => format!(", paused {} ({})", span(us), mode(s.mode)),
        (None, Mode::Off | Mode::DiskOnly) => String::new(),
        (None, _) => format!(", {}", mode(s.mode)),
    };
    let expires = s.expires.map(|then| format!(", {}", expires(now, then))).unwrap_or_default();
    let (address, state) = (format_args!("{}@{}", s.target, s.name), state(s));
    match s.state {
        SnapshotState::Ready | SnapshotState::Damaged => {
            format!("{address}  {state}, {size}{pause}, durable in {}{expires}", span(s.took_us))
        }
        SnapshotState::Saving => {
            format!(
                "{address}  {state}{pause}, saving{expires}; `spinney tree {}` shows when it is durable",
                s.target
            )
        }
    }
}
