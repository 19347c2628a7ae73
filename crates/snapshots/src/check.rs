//! Settings as they are asked for: what can be checked without making anything.

use std::fs;
use std::path::{Path, PathBuf};

use qemu::command::{MAX_CARDS, MAX_DISKS};

use crate::config::{Boot, DiskConfig, DiskSource, Forward, MachineConfig};
use crate::error::{Code, Error, Result};

/// Less than this and no firmware starts.
const MEMORY_MIN: u64 = 16 << 20;
/// 4 TiB: more than any host this will run on.
const MEMORY_MAX: u64 = 4 << 40;
const CPUS_MAX: u32 = 255;
const DISK_MIN: u64 = 64 << 10;
/// 8 EiB is where QEMU's own arithmetic ends; a qcow2 file of ours ends far below.
const DISK_MAX: u64 = 64 << 40;
const QEMU_ARGS_MAX: usize = 256;
const FORWARDS_MAX: usize = 256;

fn usage<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::new(Code::Usage, message))
}

/// Checks settings for a new machine and makes paths absolute.
pub(crate) fn check_config(config: &mut MachineConfig) -> Result<()> {
    let args = &config.qemu_args;
    if args.len() > QEMU_ARGS_MAX || args.iter().any(|a| a.len() > 4096 || a.contains('\0')) {
        return usage(format!("at most {QEMU_ARGS_MAX} --qemu-arg words of at most 4096 bytes each"));
    }
    if config.kernel.is_none() && (config.initrd.is_some() || config.append.is_some()) {
        return usage("--initrd and --append need --kernel");
    }
    if config.networks.len() > MAX_CARDS {
        return usage(format!("{} network cards: a machine has at most {MAX_CARDS}", config.networks.len()));
    }
    if let Some(other) = config.networks.iter().find(|n| *n != "user") {
        return usage(format!("there is no network called {other:?}; \"user\" is the only one for now"));
    }
    for disk in &mut config.disks {
        disk.id.clear();
        check_disk(disk)?;
    }
    config.number_disks();
    for (what, file) in [("kernel", &mut config.kernel), ("initrd", &mut config.initrd)] {
        if let Some(path) = file {
            *path = existing_file(what, path)?;
        }
    }
    check_changed(config)
}

/// Checks what `set` can change, and what that has to do with the rest.
pub(crate) fn check_changed(config: &mut MachineConfig) -> Result<()> {
    if config.memory < MEMORY_MIN || config.memory > MEMORY_MAX {
        return usage(format!("{} of memory: a machine has between 16 MiB and 4 TiB", size(config.memory)));
    }
    // Whole mebibytes: QEMU's -m, and 2 MiB of map leaves, come out even.
    config.memory = config.memory.next_multiple_of(1 << 20);
    if config.cpus == 0 || config.cpus > CPUS_MAX {
        return usage(format!("{} CPUs: a machine has between 1 and {CPUS_MAX}", config.cpus));
    }
    if config.disks.len() > MAX_DISKS {
        return usage(format!("{} disks: a machine has at most {MAX_DISKS}", config.disks.len()));
    }
    check_forwards(&config.forwards, !config.networks.is_empty())?;
    check_boot(config)
}

/// Checks a disk and makes its path absolute.
pub(crate) fn check_disk(disk: &mut DiskConfig) -> Result<()> {
    match &mut disk.source {
        DiskSource::File(path) => *path = existing_file("disk", path)?,
        DiskSource::Size(_) if disk.read_only => {
            return usage("an empty disk that cannot be written to has no use: a read-only disk is a FILE");
        }
        DiskSource::Size(bytes) if *bytes < DISK_MIN || *bytes > DISK_MAX => {
            return usage(format!("a disk of {}: a disk has between 64 KiB and 64 TiB", size(*bytes)));
        }
        // Whole sectors of the largest kind that guests see.
        DiskSource::Size(bytes) => *bytes = bytes.next_multiple_of(4096),
    }
    Ok(())
}

fn check_forwards(forwards: &[Forward], has_card: bool) -> Result<()> {
    if forwards.len() > FORWARDS_MAX {
        return usage(format!("{} forwards: a machine has at most {FORWARDS_MAX}", forwards.len()));
    }
    if let Some(first) = forwards.first().filter(|_| !has_card) {
        return Err(Error::new(Code::Usage, format!("the forward {first} leads to no network card"))
            .hint("a forward goes through a card on the network \"user\""));
    }
    for (index, forward) in forwards.iter().enumerate() {
        if forward.host == 0 || forward.guest == 0 {
            return usage(format!("the forward {forward}: ports are numbers from 1 to 65535"));
        }
        // All addresses of the host include each.
        let same_port = |other: &&Forward| {
            let same_address = other.address == forward.address
                || other.address.is_unspecified()
                || forward.address.is_unspecified();
            other.host == forward.host && other.protocol == forward.protocol && same_address
        };
        if let Some(other) = forwards.iter().take(index).find(same_port) {
            return usage(format!("the forwards {other} and {forward} use the same port of the host"));
        }
    }
    Ok(())
}

fn check_boot(config: &MachineConfig) -> Result<()> {
    let Some(boot) = config.boot else { return Ok(()) };
    if config.kernel.is_some() {
        return Err(Error::new(Code::Usage, "a kernel that is booted directly leaves nothing to --boot"));
    }
    let (there, what, hint) = match boot {
        Boot::Cd => (config.cdrom.is_some(), "cd: it has no CD drive", "--cdrom ISO gives it one"),
        Boot::Disk => (!config.disks.is_empty(), "disk: it has no disk", "--disk gives it one"),
        Boot::Net => {
            (!config.networks.is_empty(), "net: it has no network card", "--network user gives it one")
        }
    };
    if there {
        return Ok(());
    }
    Err(Error::new(Code::Usage, format!("the machine cannot boot from {what}")).hint(hint))
}

/// A size as people write it, in the largest unit that leaves it whole.
pub(crate) fn size(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut whole = bytes;
    let mut units = units.into_iter();
    let mut unit = units.next().unwrap_or_default();
    while whole > 0 && whole.is_multiple_of(1024) {
        let Some(next) = units.next() else { break };
        (whole, unit) = (whole / 1024, next);
    }
    format!("{whole} {unit}")
}

/// A file that is there and can be read, by its absolute path.
pub(crate) fn existing_file(what: &str, path: &Path) -> Result<PathBuf> {
    let missing = |error: std::io::Error| {
        let code = match error.kind() {
            std::io::ErrorKind::NotFound => Code::NotFound,
            std::io::ErrorKind::PermissionDenied => Code::NotPermitted,
            _ => Code::Failed,
        };
        let missing =
            Error::new(code, format!("the {what} {} cannot be opened", path.display())).because(error);
        if what == "disk" && code == Code::NotFound {
            return missing
                .hint("--disk takes a file that is there, or a size for a new empty disk, such as 10G");
        }
        missing
    };
    let path = fs::canonicalize(path).map_err(missing)?;
    let file = fs::File::open(&path).map_err(missing)?;
    if !file.metadata().map_err(missing)?.is_file() {
        return Err(Error::new(Code::Usage, format!("the {what} {} is not a file", path.display())));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> MachineConfig {
        MachineConfig::bare(64 << 20)
    }

    #[test]
    fn sizes_out_of_bounds_are_usage_errors() {
        for memory in [0, 1 << 20, 1 << 60] {
            let mut bad = MachineConfig { memory, ..config() };
            assert_eq!(check_config(&mut bad).unwrap_err().code(), Code::Usage, "{memory}");
        }
        for size in [0, 1, 1 << 60, u64::MAX] {
            let mut bad = MachineConfig { disks: vec![DiskSource::Size(size).into()], ..config() };
            assert_eq!(check_config(&mut bad).unwrap_err().code(), Code::Usage, "{size}");
        }
        let mut odd = MachineConfig { disks: vec![DiskSource::Size(100_001).into()], ..config() };
        check_config(&mut odd).unwrap();
        assert_eq!((odd.disks[0].id.as_str(), &odd.disks[0].source), ("disk0", &DiskSource::Size(102_400)));
    }

    #[test]
    fn sizes_are_said_as_people_write_them() {
        let said = [0, 1000, 8 << 20, 1000 << 30, 1536 << 20, 4 << 40, u64::MAX].map(size);
        assert_eq!(
            said,
            ["0 bytes", "1000 bytes", "8 MiB", "1000 GiB", "1536 MiB", "4 TiB", "18446744073709551615 bytes"]
        );
    }

    #[test]
    fn a_folder_is_no_disk_and_a_missing_file_is_not_found() {
        let folder = MachineConfig { disks: vec![DiskSource::File("/".into()).into()], ..config() };
        assert_eq!(check_config(&mut folder.clone()).unwrap_err().code(), Code::Usage);
        let gone = MachineConfig { disks: vec![DiskSource::File("/no/such/file".into()).into()], ..config() };
        let error = check_config(&mut gone.clone()).unwrap_err();
        assert_eq!(error.code(), Code::NotFound);
        assert!(error.to_string().contains("/no/such/file"), "{error}");
    }

    #[test]
    fn what_does_not_go_together_is_named() {
        let forwards = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>();
        let networks = vec!["user".to_owned()];
        let same = || MachineConfig { networks: networks.clone(), ..config() };
        for (mut bad, words) in [
            (MachineConfig { forwards: forwards(&["2222:22"]), ..config() }, "tcp:127.0.0.1:2222:22"),
            (MachineConfig { forwards: forwards(&["80:8", "80:9"]), ..same() }, "127.0.0.1:80:9"),
            (MachineConfig { forwards: forwards(&["80:8", "0.0.0.0:80:9"]), ..same() }, "0.0.0.0:80:9"),
            (MachineConfig { boot: Some(Boot::Cd), ..config() }, "CD drive"),
            (MachineConfig { boot: Some(Boot::Disk), ..config() }, "no disk"),
            (MachineConfig { boot: Some(Boot::Net), ..config() }, "network card"),
            (
                MachineConfig {
                    disks: vec![DiskConfig { read_only: true, ..DiskSource::Size(1 << 20).into() }],
                    ..config()
                },
                "FILE",
            ),
        ] {
            let error = check_config(&mut bad).unwrap_err();
            assert_eq!(error.code(), Code::Usage);
            assert!(error.to_string().contains(words), "{words}: {error}");
        }
        let mut good =
            MachineConfig { forwards: forwards(&["80:8", "udp:80:8", "127.0.0.2:80:8"]), ..same() };
        check_config(&mut good).unwrap();
    }
}
