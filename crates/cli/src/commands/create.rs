//! `create`: a machine, from options or from a file.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use clap_complete::{ArgValueCompleter, PathCompleter};
use serde::Deserialize;
use server::Problem;
use server::api::CreateRequest;
use server::client::Method;
use server::snapshots::{
    Boot, Code, DiskConfig, DiskSource, Display, Firmware, Machine, MachineConfig, OnPowerOff,
};

use super::set::{drive, forwards};
use crate::complete;
use crate::errors::misuse;
use crate::output::{bytes, count};
use crate::session::Session;
use crate::size::{looks_like_size, parse_size};

/// Create a machine
///
/// A disk is a file, over which the machine writes to a layer of its own (the file itself is never written and never
/// removed), or a size such as 10G for an empty one. A file whose name looks like a size is written ./10G. With `,ro` behind a file
/// the guest reads the file itself and cannot write: no layer, and nothing of it in snapshots.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  spinney create web --memory 1G --disk debian.qcow2
  spinney create db --memory 2G --cpus 2 --disk debian.qcow2 --disk 20G
  spinney create web --disk debian.qcow2 --forward 2222:22      ssh -p 2222 localhost
  spinney create new --disk 20G --cdrom debian.iso --boot cd --display vnc
  spinney create tiny --kernel vmlinuz --initrd initrd.img --append console=ttyS0 --network none
  spinney create web --disk debian.qcow2 --qemu-arg=-device --qemu-arg=virtio-rng-pci
  spinney create db --group work --disk debian.qcow2            shares nothing with other groups
  spinney create --file machine.toml

machine.toml:
  name = \"web\"
  memory = \"1G\"
  cpus = 2
  disks = [\"debian.qcow2\", \"20G\"]        # relative to this file
  networks = [\"user\"]
  forwards = [\"2222:22\"]
  # cdrom = \"debian.iso\", boot = \"cd\", firmware = \"uefi\", display = \"vnc\", autostart = true
  # on_poweroff = \"back\"
  # group = \"work\"
  # kernel, initrd, append, memory_snapshots = false, qemu_args = [\"-device\", \"virtio-rng-pci\"]")]
pub(crate) struct Args {
    /// Name of the machine
    #[arg(required_unless_present = "file")]
    name: Option<String>,
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_size)]
    memory: u64,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    cpus: u32,
    /// A disk; may be given several times
    #[arg(long = "disk", value_name = "FILE[,ro]|SIZE", value_parser = parse_disk, add = ArgValueCompleter::new(PathCompleter::file()))]
    disks: Vec<DiskConfig>,
    /// A CD drive with this in it
    #[arg(long, value_name = "ISO|none", add = ArgValueCompleter::new(PathCompleter::file()))]
    cdrom: Option<PathBuf>,
    /// What it boots from first [default: disk]
    #[arg(long, value_name = "cd|disk|net")]
    boot: Option<BootWord>,
    /// Firmware
    #[arg(long, value_name = "bios|uefi", default_value = "bios")]
    firmware: FirmwareWord,
    /// Linux kernel to boot without a boot loader
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial file system of the kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Command line of the kernel
    #[arg(long, value_name = "TEXT", requires = "kernel", allow_hyphen_values = true)]
    append: Option<String>,
    /// Network of a card; may be given several times [default: user]
    #[arg(long = "network", value_name = "user|none", value_parser = ["user", "none"])]
    networks: Vec<String>,
    /// A port of the host that leads into the guest; may be given several times. HOST is a port of 127.0.0.1, or ADDRESS:PORT
    #[arg(long = "forward", value_name = "[tcp|udp:]HOST:GUEST")]
    forwards: Vec<String>,
    /// Where its screen is seen: nowhere, or through VNC on a Unix socket that `show` names
    #[arg(long, value_name = "none|vnc", default_value = "none")]
    display: DisplayWord,
    /// Group that it belongs to [default: default]
    #[arg(long, add = ArgValueCompleter::new(complete::groups))]
    group: Option<String>,
    /// Start it with the daemon after the host was restarted
    #[arg(long)]
    autostart: bool,
    /// What is done with it when it is powered off, by its guest, `stop` or `kill`
    #[arg(long = "on-poweroff", value_name = "nothing|back|take|ask", default_value = "nothing")]
    on_poweroff: PowerOffWord,
    /// Allow devices that cannot be saved; snapshots are then taken off or --disk-only
    #[arg(long)]
    no_memory: bool,
    /// One word for QEMU's command line, as it is; may be given several times
    #[arg(long = "qemu-arg", value_name = "WORD", allow_hyphen_values = true)]
    qemu_args: Vec<String>,
    /// Read the machine from a file instead
    #[arg(long, value_name = "FILE", conflicts_with_all = ["memory", "cpus", "disks", "kernel", "initrd", "append", "networks", "no_memory", "qemu_args",
        "cdrom", "boot", "firmware", "forwards", "display", "autostart", "on_poweroff", "group"])]
    file: Option<PathBuf>,
}

pub(crate) fn run(session: &Session, args: Args) -> Result<(), Problem> {
    let request = match &args.file {
        Some(file) => from_file(file, args.name)?,
        None => from_options(args)?,
    };
    let machine: Machine = session.change(Method::POST, "/v1/targets", &request)?;
    if session.out.json {
        session.document("spinney.machine/1", &machine);
    } else {
        let config = &machine.config;
        session.out.line(format_args!(
            "created {}: {}, {}, {}",
            machine.name,
            bytes(config.memory),
            count(config.cpus.into(), "CPU"),
            count(config.disks.len() as u64, "disk")
        ));
    }
    Ok(())
}

fn from_options(args: Args) -> Result<CreateRequest, Problem> {
    let here = std::env::current_dir()
        .map_err(|error| Problem::new(Code::Failed, "there is no current folder").because(&error))?;
    let config = MachineConfig {
        memory: args.memory,
        cpus: args.cpus,
        disks: args.disks,
        cdrom: args.cdrom.map(|path| drive(&path, &here)),
        boot: args.boot.map(Boot::from),
        firmware: args.firmware.into(),
        forwards: forwards(&args.forwards)?,
        display: args.display.into(),
        autostart: args.autostart,
        on_poweroff: args.on_poweroff.into(),
        kernel: args.kernel,
        initrd: args.initrd,
        append: args.append,
        networks: args.networks,
        memory_snapshots: !args.no_memory,
        guest_agent: true,
        qemu_args: args.qemu_args,
    };
    let group = args.group;
    Ok(CreateRequest { group, ..request(args.name.unwrap_or_default(), config, &here)? })
}

/// `machine.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MachineFile {
    name: Option<String>,
    #[serde(default = "one_gigabyte")]
    memory: String,
    #[serde(default = "one")]
    cpus: u32,
    #[serde(default)]
    disks: Vec<String>,
    cdrom: Option<PathBuf>,
    boot: Option<Boot>,
    #[serde(default)]
    firmware: Firmware,
    #[serde(default)]
    forwards: Vec<String>,
    #[serde(default)]
    display: Display,
    #[serde(default)]
    autostart: bool,
    #[serde(default)]
    on_poweroff: OnPowerOff,
    group: Option<String>,
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    append: Option<String>,
    #[serde(default)]
    networks: Vec<String>,
    #[serde(default = "yes")]
    memory_snapshots: bool,
    #[serde(default)]
    qemu_args: Vec<String>,
}

fn one_gigabyte() -> String {
    "1G".to_owned()
}

fn one() -> u32 {
    1
}

fn yes() -> bool {
    true
}

/// Reads a machine; a name on the command line comes before the file's.
fn from_file(path: &Path, name: Option<String>) -> Result<CreateRequest, Problem> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Problem::new(Code::NotFound, format!("there is no file {shown}")),
        ErrorKind::PermissionDenied => {
            Problem::new(Code::NotPermitted, format!("cannot read {shown}")).because(&error)
        }
        _ => misuse(format!("cannot read {shown}")).because(&error),
    })?;
    let file: MachineFile =
        toml::from_str(&text).map_err(|error| misuse(format!("{shown} is not a machine")).because(&error))?;
    let wrong = |what: &str, why: String| {
        let mut problem = misuse(format!("{shown}: {what}"));
        problem.cause.push(why);
        problem
    };
    let name = name
        .or(file.name)
        .ok_or_else(|| misuse(format!("{shown} has no name")).hint("add name = \"...\""))?;
    let disk = |text: &String| parse_disk(text).map_err(|why| wrong(&format!("disk {text:?}"), why));
    let folder = std::path::absolute(path).ok().and_then(|path| path.parent().map(Path::to_owned));
    let folder = folder.unwrap_or_default();
    let config = MachineConfig {
        cdrom: file.cdrom.map(|path| drive(&path, &folder)),
        boot: file.boot,
        firmware: file.firmware,
        forwards: forwards(&file.forwards)?,
        display: file.display,
        autostart: file.autostart,
        on_poweroff: file.on_poweroff,
        memory: parse_size(&file.memory).map_err(|why| wrong(&format!("memory {:?}", file.memory), why))?,
        cpus: file.cpus,
        disks: file.disks.iter().map(disk).collect::<Result<_, _>>()?,
        kernel: file.kernel,
        initrd: file.initrd,
        append: file.append,
        networks: file.networks,
        memory_snapshots: file.memory_snapshots,
        guest_agent: true,
        qemu_args: file.qemu_args,
    };
    Ok(CreateRequest { group: file.group, ..request(name, config, &folder)? })
}

/// Makes paths absolute (the daemon has another folder) and settles the networks.
fn request(name: String, mut config: MachineConfig, folder: &Path) -> Result<CreateRequest, Problem> {
    for disk in &mut config.disks {
        if let DiskSource::File(path) = &mut disk.source {
            *path = folder.join(&*path);
        }
    }
    for path in [&mut config.kernel, &mut config.initrd].into_iter().flatten() {
        *path = folder.join(&*path);
    }
    config.networks = match config.networks.as_slice() {
        [] => vec!["user".to_owned()],
        [one] if one == "none" => Vec::new(),
        several if several.iter().any(|network| network == "none") => {
            return Err(misuse("a network and none at the same time"));
        }
        several => several.to_vec(),
    };
    Ok(CreateRequest { name, config, group: None })
}

pub(super) fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    if looks_like_size(text) {
        return parse_size(text).map(|size| DiskSource::Size(size).into());
    }
    let (file, read_only) = text.strip_suffix(",ro").map_or((text, false), |file| (file, true));
    if file.is_empty() {
        return Err("it is empty".to_owned());
    }
    if read_only && looks_like_size(file) {
        return Err("an empty disk cannot be read-only; a file of that name is written ./NAME,ro".to_owned());
    }
    Ok(DiskConfig { read_only, ..DiskSource::File(PathBuf::from(file)).into() })
}

/// Words for `--boot`.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum BootWord {
    Cd,
    Disk,
    Net,
}

impl From<BootWord> for Boot {
    fn from(word: BootWord) -> Self {
        match word {
            BootWord::Cd => Self::Cd,
            BootWord::Disk => Self::Disk,
            BootWord::Net => Self::Net,
        }
    }
}

/// Words for `--firmware`.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum FirmwareWord {
    Bios,
    Uefi,
}

impl From<FirmwareWord> for Firmware {
    fn from(word: FirmwareWord) -> Self {
        match word {
            FirmwareWord::Bios => Self::Bios,
            FirmwareWord::Uefi => Self::Uefi,
        }
    }
}

/// Words for `--display`.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum DisplayWord {
    None,
    Vnc,
}

impl From<DisplayWord> for Display {
    fn from(word: DisplayWord) -> Self {
        match word {
            DisplayWord::None => Self::None,
            DisplayWord::Vnc => Self::Vnc,
        }
    }
}

/// Words for `--on-poweroff`.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum PowerOffWord {
    /// It stays off
    Nothing,
    /// It goes back to the snapshot that it comes from; if that has memory, it is suspended there
    Back,
    /// A snapshot of it is taken
    Take,
    /// `stop` and `kill` ask, on a terminal; else it stays off
    Ask,
}

impl From<PowerOffWord> for OnPowerOff {
    fn from(word: PowerOffWord) -> Self {
        match word {
            PowerOffWord::Nothing => Self::Nothing,
            PowerOffWord::Back => Self::Back,
            PowerOffWord::Take => Self::Take,
            PowerOffWord::Ask => Self::Ask,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> Result<CreateRequest, Problem> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machine.toml");
        std::fs::write(&path, text).unwrap();
        from_file(&path, None)
    }

    #[test]
    fn a_file_gives_sizes_and_paths_relative_to_itself() {
        let request =
            file("name = 'web'\non_poweroff = 'back'\nmemory = '512M'\ndisks = ['a.img', '/b.img', '10G']")
                .unwrap();
        assert_eq!((request.name.as_str(), request.config.memory), ("web", 512 << 20));
        assert_eq!(request.config.networks, ["user"]);
        assert_eq!(request.config.on_poweroff, OnPowerOff::Back);
        let sources: Vec<&DiskSource> = request.config.disks.iter().map(|disk| &disk.source).collect();
        match sources.as_slice() {
            [DiskSource::File(a), DiskSource::File(b), DiskSource::Size(size)] => {
                assert!(a.is_absolute() && a.ends_with("a.img"));
                assert_eq!((b.as_path(), *size), (Path::new("/b.img"), 10 << 30));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_not_found() {
        let problem = from_file(Path::new("/nowhere/machine.toml"), None).unwrap_err();
        assert_eq!(
            (problem.code, problem.detail.as_str()),
            (Code::NotFound, "there is no file /nowhere/machine.toml")
        );
    }

    #[test]
    fn mistakes_in_a_file_are_named() {
        for (text, words) in [
            ("memory = '1G'", "no name"),
            ("name = 'a'\nmemory = '16E'", "memory \"16E\""),
            ("name = 'a'\nmemry = '1G'", "memry"),
            ("name = 'a'\ndisks = ['0G']", "disk \"0G\""),
            ("name = 'a'\ndisks = ['1G,ro']", "read-only"),
            ("name = 'a'\nforwards = ['22']", "HOST:GUEST"),
            ("name = 'a'\nboot = 'floppy'", "floppy"),
            ("name = 'a'\non_poweroff = 'explode'", "explode"),
            ("name = 'a'\nnetworks = ['user', 'none']", "none"),
        ] {
            let problem = file(text).unwrap_err();
            assert_eq!(problem.code, Code::Usage);
            assert!(format!("{problem:?}").replace("\\\"", "\"").contains(words), "{words}: {problem:?}");
        }
    }
}
