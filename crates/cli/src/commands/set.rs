//! `set`: another setting.

use std::path::{Path, PathBuf};

use clap::ArgGroup;
use clap_complete::{ArgValueCompleter, PathCompleter};
use server::Problem;
use server::api::DiscardPlan;
use server::client::Method;
use server::snapshots::{
    Boot, CdDrive, Code, DiskConfig, DiskSource, Display, Forward, Machine, OnPowerOff, SetOptions,
};

use super::create::{BootWord, DisplayWord, PowerOffWord, parse_disk};
use crate::errors::misuse;
use crate::session::Session;
use crate::size::parse_size;
use crate::{address, complete};

/// Change a machine's settings
///
/// Disc, forwards, autostart and what is done at power-off change at once, also while the machine runs; for all else it has to be off.
/// Settings belong to a snapshot as memory and disks do, and come back with `goto`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  spinney set web --memory 2G --cpus 2
  spinney set web --add-disk 20G
  spinney set web --rm-disk disk1           snapshots that have it keep it
  spinney set web --cdrom debian.iso        --cdrom none takes the disc out
  spinney set web --forward 2222:22         all there are from now on; --forward none closes them
  spinney set web --autostart=false
  spinney set web --on-poweroff back        whenever it is powered off, it goes back to its snapshot")]
#[command(group(ArgGroup::new("changes").required(true).multiple(true)
    .args(["memory", "cpus", "add_disks", "rm_disks", "cdrom", "forwards", "autostart", "on_poweroff", "boot", "display"])))]
pub(crate) struct Args {
    /// Machine
    #[arg(add = ArgValueCompleter::new(complete::targets))]
    target: String,
    /// Guest memory
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// Virtual CPUs
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    cpus: Option<u32>,
    /// One more disk; may be given several times
    #[arg(long = "add-disk", value_name = "FILE|SIZE", value_parser = parse_disk, add = ArgValueCompleter::new(PathCompleter::file()))]
    add_disks: Vec<DiskConfig>,
    /// A disk that goes, by its id (`disk1`); may be given several times
    #[arg(long = "rm-disk", value_name = "ID")]
    rm_disks: Vec<String>,
    /// What is in the CD drive
    #[arg(long, value_name = "ISO|none", add = ArgValueCompleter::new(PathCompleter::file()))]
    cdrom: Option<PathBuf>,
    /// A port of the host that leads into the guest; may be given several times, and replaces all that were there
    #[arg(long = "forward", value_name = "[tcp|udp:]HOST:GUEST|none")]
    forwards: Vec<String>,
    /// Start it with the daemon after the host was restarted, or with =false no longer
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    autostart: Option<bool>,
    /// What is done with it when it is powered off, by its guest, `stop` or `kill`
    #[arg(long = "on-poweroff", value_name = "nothing|back|take|ask")]
    on_poweroff: Option<PowerOffWord>,
    /// What it boots from first
    #[arg(long, value_name = "cd|disk|net")]
    boot: Option<BootWord>,
    /// Where its screen is seen
    #[arg(long, value_name = "none|vnc")]
    display: Option<DisplayWord>,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

pub(crate) fn run(session: &Session, args: Args) -> Result<(), Problem> {
    let here = std::env::current_dir()
        .map_err(|error| Problem::new(Code::Failed, "there is no current folder").because(&error))?;
    let mut add_disks = args.add_disks;
    for disk in &mut add_disks {
        if let DiskSource::File(path) = &mut disk.source {
            *path = here.join(&*path);
        }
    }
    let options = SetOptions {
        memory: args.memory,
        cpus: args.cpus,
        add_disks,
        rm_disks: args.rm_disks,
        cdrom: args.cdrom.map(|path| drive(&path, &here)),
        forwards: (!args.forwards.is_empty()).then(|| forwards(&args.forwards)).transpose()?,
        autostart: args.autostart,
        on_poweroff: args.on_poweroff.map(OnPowerOff::from),
        boot: args.boot.map(Boot::from),
        display: args.display.map(Display::from),
    };
    let path = format!("{}/set", address::target(&args.target)?);
    let client = session.client()?;
    let plan: DiscardPlan = client.ask(Method::POST, &format!("{path}?dry_run=true"), Some(&options))?;
    if let Some(lost) = plan.discards {
        session.confirm(&[format!("goes: {lost}")], "Remove?", args.yes)?;
    }
    let machine: Machine = session.operate(&client, Method::POST, &path, Some(&options))?;
    if session.out.json {
        session.document("spinney.machine/1", &machine);
    } else {
        session.out.line(format_args!("{} is set", machine.name));
    }
    Ok(())
}

/// A drive with this in it; `none` is nothing, and a file of that name is `./none`.
pub(super) fn drive(path: &Path, folder: &Path) -> CdDrive {
    CdDrive { image: (path != Path::new("none")).then(|| folder.join(path)) }
}

/// Forwards as they are typed; `none` alone is none.
pub(super) fn forwards(words: &[String]) -> Result<Vec<Forward>, Problem> {
    if matches!(words, [one] if one == "none") {
        return Ok(Vec::new());
    }
    let read = |word: &String| {
        word.parse::<Forward>().map_err(|why| {
            let mut problem = misuse(format!("{word:?} is no forward"));
            problem.cause.push(why);
            problem
        })
    };
    words.iter().map(read).collect()
}
