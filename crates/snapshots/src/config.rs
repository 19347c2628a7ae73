//! A machine's settings: what `create` makes and `set` changes. They are in the catalog as JSON, with the machine and with every
//! snapshot of it, so a field that is new has a default that stands for what machines were before it.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Where a disk's content comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum DiskSource {
    /// An existing image; never written, never removed.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    File(PathBuf),
    /// A new empty disk of so many bytes.
    Size(u64),
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct DiskConfig {
    /// `disk0`, `disk1`, ...; kept when other disks go. The first that is free if left out.
    #[serde(default)]
    pub id: String,
    /// What it is made of.
    #[serde(flatten)]
    pub source: DiskSource,
    /// The guest reads the image itself, and cannot write.
    #[serde(default)]
    pub read_only: bool,
}

impl From<DiskSource> for DiskConfig {
    fn from(source: DiskSource) -> Self {
        Self { id: String::new(), source, read_only: false }
    }
}

/// A CD drive.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct CdDrive {
    /// The image in it; none if it is empty.
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    #[serde(default)]
    pub image: Option<PathBuf>,
}

/// What a machine boots from first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Boot {
    /// The disc in its CD drive.
    Cd,
    /// Its first disk.
    Disk,
    /// The network (PXE).
    Net,
}

/// Where a machine's screen is seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Display {
    /// It has no graphics card.
    #[default]
    None,
    /// Through VNC, on a Unix socket.
    Vnc,
}

/// What is done with a machine when it is powered off: by its guest, by `stop` or by `kill`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum OnPowerOff {
    /// Nothing.
    #[default]
    Nothing,
    /// It goes back to the snapshot that here comes from.
    Back,
    /// A snapshot of it is taken.
    Take,
    /// Whoever has powered it off is asked.
    Ask,
}

impl fmt::Display for OnPowerOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "nothing",
            Self::Back => "back",
            Self::Take => "take",
            Self::Ask => "ask",
        })
    }
}

/// What a machine starts with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Firmware {
    /// `SeaBIOS`.
    #[default]
    Bios,
    /// OVMF, with a variable store that is a disk of the machine's.
    Uefi,
}

/// A protocol whose ports can be forwarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A port of the host that leads to one of the guest, through its first card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Forward {
    /// Protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// Address of the host.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    #[serde(default = "localhost")]
    pub address: Ipv4Addr,
    /// Port of the host.
    pub host: u16,
    /// Port of the guest.
    pub guest: u16,
}

fn localhost() -> Ipv4Addr {
    Ipv4Addr::LOCALHOST
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}:{}", self.protocol, self.address, self.host, self.guest)
    }
}

impl std::str::FromStr for Forward {
    type Err = String;

    /// `[tcp|udp:][ADDRESS:]HOST:GUEST`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (protocol, rest) = match text.split_once(':') {
            Some(("tcp", rest)) => (Protocol::Tcp, rest),
            Some(("udp", rest)) => (Protocol::Udp, rest),
            _ => (Protocol::Tcp, text),
        };
        let words: Vec<&str> = rest.split(':').collect();
        let (address, host, guest) = match words.as_slice() {
            [host, guest] => (None, host, guest),
            [address, host, guest] => (Some(address), host, guest),
            _ => return Err("write [tcp|udp:][ADDRESS:]HOST:GUEST, such as 2222:22".to_owned()),
        };
        let port = |word: &str| match word.parse::<u16>() {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(format!("{word:?} is no port: ports are numbers from 1 to 65535")),
        };
        let address = match address {
            None => localhost(),
            Some(word) => {
                word.parse().map_err(|_| format!("{word:?} is no IPv4 address, such as 127.0.0.1"))?
            }
        };
        Ok(Self { protocol, address, host: port(host)?, guest: port(guest)? })
    }
}

/// What `create` makes. Also stored in the catalog as the machine's settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct MachineConfig {
    /// Bytes of guest memory.
    pub memory: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Disks.
    pub disks: Vec<DiskConfig>,
    /// CD drive, if it has one.
    #[serde(default)]
    pub cdrom: Option<CdDrive>,
    /// What it boots from first; disks if left out.
    #[serde(default)]
    pub boot: Option<Boot>,
    /// Firmware.
    #[serde(default)]
    pub firmware: Firmware,
    /// Linux kernel to boot directly.
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub kernel: Option<PathBuf>,
    /// Its initial file system.
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub append: Option<String>,
    /// `user` for QEMU's user-mode network; each gives one card. Empty: no network.
    pub networks: Vec<String>,
    /// Ports of the host that lead into the guest.
    #[serde(default)]
    pub forwards: Vec<Forward>,
    /// Screen.
    #[serde(default)]
    pub display: Display,
    /// Started with the daemon after the host was, or when it lost its power.
    #[serde(default)]
    pub autostart: bool,
    /// What is done with it when it is powered off.
    #[serde(default)]
    pub on_poweroff: OnPowerOff,
    /// False: the machine may have devices that cannot be migrated, and is taken `disk_only` or off.
    pub memory_snapshots: bool,
    /// A port for the QEMU guest agent, which can tell a guest that it was copied. Machines that are made get one.
    #[serde(default)]
    pub guest_agent: bool,
    /// Words handed to QEMU as they are; `{run}` becomes the run folder of the process.
    pub qemu_args: Vec<String>,
}

impl MachineConfig {
    /// A machine of so much memory, with one CPU and nothing else.
    pub fn bare(memory: u64) -> Self {
        Self {
            memory,
            cpus: 1,
            disks: Vec::new(),
            cdrom: None,
            boot: None,
            firmware: Firmware::Bios,
            kernel: None,
            initrd: None,
            append: None,
            networks: Vec::new(),
            forwards: Vec::new(),
            display: Display::None,
            autostart: false,
            on_poweroff: OnPowerOff::Nothing,
            memory_snapshots: true,
            guest_agent: false,
            qemu_args: Vec::new(),
        }
    }

    /// Gives every disk that has none the first id that is free. Settings that were stored before disks had ids get those that
    /// the disks had by their place.
    pub(crate) fn number_disks(&mut self) {
        for index in 0..self.disks.len() {
            let free = (0..).map(disk_id).find(|id| self.disks.iter().all(|disk| disk.id != *id));
            if let Some(disk) = self.disks.get_mut(index).filter(|disk| disk.id.is_empty()) {
                disk.id = free.unwrap_or_default();
            }
        }
    }
}

/// `disk0`, `disk1`, ...
pub(crate) fn disk_id(number: usize) -> String {
    format!("disk{number}")
}

/// What `set` changes; what is left out stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(default, deny_unknown_fields)]
pub struct SetOptions {
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// More disks.
    pub add_disks: Vec<DiskConfig>,
    /// Ids of disks that go.
    pub rm_disks: Vec<String>,
    /// A CD drive with this in it, or with nothing.
    pub cdrom: Option<CdDrive>,
    /// All forwards from now on.
    pub forwards: Option<Vec<Forward>>,
    /// Autostart.
    pub autostart: Option<bool>,
    /// What is done with it when it is powered off.
    pub on_poweroff: Option<OnPowerOff>,
    /// What it boots from first.
    pub boot: Option<Boot>,
    /// Screen.
    pub display: Option<Display>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_a_catalog_before_disks_had_ids_are_read() {
        let old = r#"{"memory":67108864,"cpus":1,"disks":[{"file":"/a.img"},{"size":4096}],"kernel":null,"initrd":null,
            "append":null,"networks":["user"],"memory_snapshots":true,"qemu_args":[]}"#;
        let mut config: MachineConfig = serde_json::from_str(old).unwrap();
        config.number_disks();
        let ids: Vec<&str> = config.disks.iter().map(|disk| disk.id.as_str()).collect();
        assert_eq!(ids, ["disk0", "disk1"]);
        assert_eq!(config.disks[1].source, DiskSource::Size(4096));
        assert_eq!((config.firmware, config.boot, config.autostart), (Firmware::Bios, None, false));
        assert_eq!(config.on_poweroff, OnPowerOff::Nothing);
        let again: MachineConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn a_new_disk_takes_the_first_id_that_is_free_and_moves_no_other() {
        let disk = |id: &str| DiskConfig { id: id.into(), ..DiskSource::Size(4096).into() };
        let mut config = MachineConfig::bare(1 << 26);
        config.disks = vec![disk("disk0"), disk("disk2"), disk(""), disk("")];
        config.number_disks();
        let ids: Vec<&str> = config.disks.iter().map(|disk| disk.id.as_str()).collect();
        assert_eq!(ids, ["disk0", "disk2", "disk1", "disk3"]);
    }

    #[test]
    fn forwards_are_read_and_mistakes_in_them_named() {
        let read = |text: &str| text.parse::<Forward>().map(|forward| forward.to_string());
        assert_eq!(read("2222:22").unwrap(), "tcp:127.0.0.1:2222:22");
        assert_eq!(read("udp:53:53").unwrap(), "udp:127.0.0.1:53:53");
        assert_eq!(read("tcp:0.0.0.0:80:8080").unwrap(), "tcp:0.0.0.0:80:8080");
        for (text, words) in [
            ("", "HOST:GUEST"),
            ("22", "HOST:GUEST"),
            ("1:2:3:4", "HOST:GUEST"),
            ("0:22", "\"0\""),
            ("70000:22", "70000"),
            ("2222:ssh", "ssh"),
            ("sctp:1:2", "sctp"),
            ("localhost:1:2", "localhost"),
        ] {
            let said = text.parse::<Forward>().unwrap_err();
            assert!(said.contains(words), "{text}: {said}");
        }
    }
}
