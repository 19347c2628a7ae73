//! The command line of a machine: everything explicit, so that the same line makes the same machine years later.
//!
//! - A versioned machine type, an explicit memory backend id (it is the RAM block's name in the stream), a device id and
//!   a bus address for everything that is in the stream.
//! - Every layer of a disk is a node of its own with a name made from the layer's id. The catalog says what lies over
//!   what; the images' headers are not asked.
//! - Two monitors. The second is for whoever must be heard when the first does not answer.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::accel::Accel;
use crate::disc;

/// Id of the memory backend, and so the name of the RAM block in every stream.
pub const RAM_ID: &str = "ram0";

/// One file of a disk's chain.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Id, at most 24 characters; the node is called `l-ID`, or `v-ID` if it is flat.
    pub id: String,
    /// It is what a layer and all below it show, in one file that others have in their page cache.
    pub flat: bool,
    /// The file.
    pub file: PathBuf,
    /// Its format.
    pub format: String,
}

/// A disk: its layers from the base up; the last one is written to.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Device id and serial number: "disk0".
    pub id: String,
    /// The chain, base first, never empty.
    pub layers: Vec<Layer>,
    /// Its place on the bus, from 0: below [`MAX_DISKS`], and the same for as long as there is the disk.
    pub place: usize,
    /// The guest cannot write to it, and neither does anybody else.
    pub read_only: bool,
}

/// A CD drive.
#[derive(Clone, Debug)]
pub struct CdDrive {
    /// The image in it; none if it is empty.
    pub image: Option<PathBuf>,
    /// Read it past the host's page cache.
    pub direct: bool,
}

/// UEFI in place of the BIOS.
#[derive(Clone, Debug)]
pub struct Uefi {
    /// The firmware, never written.
    pub code: PathBuf,
    /// The variable store, its layers from the base up; the last one is written to.
    pub variables: Vec<Layer>,
}

/// What firmware tries first. After it come disks and then the CD drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootFirst {
    /// The CD drive.
    Cd,
    /// The first disk.
    Disk,
    /// The first card.
    Net,
}

/// A network card.
#[derive(Clone, Debug)]
pub struct Card {
    /// Device id: "net0".
    pub id: String,
    /// MAC address.
    pub mac: String,
}

/// Everything that QEMU must be told.
#[derive(Clone, Debug)]
pub struct MachineSpec {
    /// Name shown in the process list.
    pub name: String,
    /// Versioned machine type.
    pub machine: String,
    /// Accelerator.
    pub accel: Accel,
    /// Bytes of memory.
    pub memory: u64,
    /// A file with what is in it, of the same length, which is mapped privately: nobody writes to it. QEMU 8.2 and later.
    pub memory_image: Option<PathBuf>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// UUID.
    pub uuid: String,
    /// VM generation id: differs for every life of a machine, so that a guest knows that it was copied or went back.
    pub generation: String,
    /// Disks.
    pub disks: Vec<Disk>,
    /// CD drive.
    pub cdrom: Option<CdDrive>,
    /// What is booted from first.
    pub boot: BootFirst,
    /// UEFI; else the BIOS.
    pub uefi: Option<Uefi>,
    /// A graphics card, with its screen on a VNC socket.
    pub vnc: bool,
    /// Cards on QEMU's user-mode network.
    pub cards: Vec<Card>,
    /// A port for the guest agent, with its socket in the run folder.
    pub guest_agent: bool,
    /// Linux kernel, initial file system, command line.
    pub kernel: Option<(PathBuf, Option<PathBuf>, Option<String>)>,
    /// Refuse devices that cannot be migrated.
    pub only_migratable: bool,
    /// Open disks past the host's page cache.
    pub direct: bool,
    /// Wait for an incoming stream; else boot.
    pub incoming: bool,
    /// Start with the CPUs standing still.
    pub stopped: bool,
    /// Words of the user's own.
    pub extra: Vec<String>,
}

/// The sockets of a process, in its run folder.
#[derive(Clone, Debug)]
pub struct RunFolder(pub PathBuf);

impl RunFolder {
    /// The monitor of the daemon.
    pub fn monitor(&self) -> PathBuf {
        self.0.join("qmp")
    }

    /// The second monitor, with out-of-band execution.
    pub fn second_monitor(&self) -> PathBuf {
        self.0.join("oob")
    }

    /// Where QEMU leaves the state of its devices for a moment.
    pub fn device_state(&self) -> PathBuf {
        self.0.join("device-state")
    }

    /// Where QEMU leaves a picture of the screen for a moment.
    pub fn screen(&self) -> PathBuf {
        self.0.join("screen.png")
    }

    /// The serial console.
    pub fn console(&self) -> PathBuf {
        self.0.join("console")
    }

    /// The guest agent's port, if there is one.
    pub fn agent(&self) -> PathBuf {
        self.0.join("agent")
    }

    /// The screen, if there is one.
    pub fn vnc(&self) -> PathBuf {
        self.0.join("vnc")
    }

    /// Holds the process id; QEMU removes it when it ends in an orderly way, and only then.
    pub fn pid_file(&self) -> PathBuf {
        self.0.join("pid")
    }

    /// QEMU's own messages.
    pub fn log(&self) -> PathBuf {
        self.0.join("qemu.log")
    }
}

impl Layer {
    /// Name of its node.
    pub fn node(&self) -> String {
        let kind = if self.flat { 'v' } else { 'l' };
        format!("{kind}-{}", self.id)
    }

    /// Name of the node of its file.
    fn file_node(&self) -> String {
        let kind = if self.flat { 'w' } else { 'f' };
        format!("{kind}-{}", self.id)
    }

    /// Options for `blockdev-reopen`, which takes all of them again: over `backing` from now on.
    pub fn reopened(&self, backing: &str, writable: bool, direct: bool) -> Value {
        let mut node = self.blockdev(Some(backing), writable, direct);
        if let Some(map) = node.as_object_mut() {
            map.insert("file".into(), self.file_node().into());
        }
        node
    }

    /// Options for `-blockdev` and `blockdev-add`. `backing` is the node below, `None` for a layer that is to be put over
    /// one that runs, or that has none.
    pub fn blockdev(&self, backing: Option<&str>, writable: bool, direct: bool) -> Value {
        let cache = json!({ "direct": direct && !self.flat, "no-flush": false });
        let mut node = json!({
            "driver": self.format,
            "node-name": self.node(),
            "read-only": !writable,
            "cache": cache,
            "discard": "unmap",
            "file": {
                "driver": "file",
                "node-name": self.file_node(),
                "filename": self.file,
                "read-only": !writable,
                "cache": cache,
                "discard": "unmap",
            },
        });
        // An explicit null keeps QEMU from following the image's own header.
        if self.format == "qcow2"
            && let Some(map) = node.as_object_mut()
        {
            map.insert("backing".into(), backing.map_or(Value::Null, Value::from));
        }
        node
    }
}

impl MachineSpec {
    /// The arguments, for a process whose sockets are in `run`.
    pub fn arguments(&self, run: &RunFolder) -> Vec<String> {
        let mut args = Arguments(Vec::new());
        args.pair("-name", format!("guest={0},debug-threads=on", comma(&self.name)));
        args.word("-nodefaults");
        args.word("-no-user-config");
        args.pair("-pidfile", run.pid_file().display());
        args.pair("-display", "none");
        args.pair("-vga", "none");
        if self.vnc {
            args.pair("-device", "VGA,id=video0,addr=0x02");
            args.pair("-vnc", format!("unix:{}", comma(&run.vnc().to_string_lossy())));
        }
        let mebibytes = self.memory >> 20;
        let backend = match &self.memory_image {
            None => format!("memory-backend-ram,id={RAM_ID},size={}", self.memory),
            Some(image) => format!(
                "memory-backend-file,id={RAM_ID},size={},mem-path={},share=off,readonly=on,rom=off",
                self.memory,
                comma(&image.to_string_lossy())
            ),
        };
        args.pair("-object", backend);
        args.pair("-m", format!("{mebibytes}M"));
        let mut machine = format!("{},accel={},memory-backend={RAM_ID}", self.machine, self.accel);
        if let Some(uefi) = &self.uefi {
            let variables = self.chain(&mut args, &uefi.variables, true);
            args.pair("-blockdev", uefi.blockdev());
            machine += &format!(",pflash0={CODE_NODE},pflash1={variables}");
        }
        args.pair("-machine", machine);
        args.pair("-cpu", "max");
        args.pair("-smp", self.cpus.to_string());
        args.pair("-uuid", &self.uuid);
        args.pair("-device", format!("vmgenid,id=genid,guid={}", self.generation));
        for (name, path) in [("qmp0", run.monitor()), ("qmp1", run.second_monitor())] {
            args.socket(name, &path);
            args.pair("-mon", format!("chardev={name},mode=control"));
        }
        args.socket("serial0", &run.console());
        args.pair("-serial", "chardev:serial0");
        args.pair("-device", "virtio-rng-pci,id=rng0,addr=0x1d");
        if self.guest_agent {
            args.pair("-device", "virtio-serial-pci,id=agent,addr=0x1e,max_ports=2");
            args.socket("agent0", &run.agent());
            args.pair(
                "-device",
                format!("virtserialport,id=agent0,bus=agent.0,nr=1,chardev=agent0,name={AGENT_PORT}"),
            );
        }
        self.disk_arguments(&mut args);
        self.cd_arguments(&mut args);
        for (index, card) in self.cards.iter().enumerate() {
            args.pair("-netdev", format!("user,id={}", card.id));
            let slot = card_slot(index);
            // Its boot ROM would be in every snapshot: it has one only to boot from.
            let rom =
                if self.boots_from_net() && index == 0 { self.boot_index(0) } else { ",romfile=".into() };
            let address = format!("mac={},addr={slot:#x}{rom}", card.mac);
            args.pair("-device", format!("virtio-net-pci,id={0},netdev={0},{address}", card.id));
        }
        if let Some((kernel, initrd, append)) = &self.kernel {
            args.pair("-kernel", kernel.display());
            if let Some(initrd) = initrd {
                args.pair("-initrd", initrd.display());
            }
            if let Some(append) = append {
                args.pair("-append", append);
            }
        }
        if self.only_migratable {
            args.word("-only-migratable");
        }
        if self.incoming {
            args.pair("-incoming", "defer");
        }
        if self.stopped {
            args.word("-S");
        }
        let folder = run.0.to_string_lossy();
        args.0.extend(self.extra.iter().map(|word| word.replace("{run}", &folder)));
        args.0
    }

    /// Names the nodes of a chain; returns the name of its top.
    fn chain(&self, args: &mut Arguments, layers: &[Layer], writable: bool) -> String {
        let mut below: Option<String> = None;
        for (depth, layer) in layers.iter().enumerate() {
            let top = depth + 1 == layers.len();
            args.pair("-blockdev", layer.blockdev(below.as_deref(), top && writable, self.direct));
            below = Some(layer.node());
        }
        below.unwrap_or_default()
    }

    fn disk_arguments(&self, args: &mut Arguments) {
        for (index, disk) in self.disks.iter().enumerate() {
            let drive = self.chain(args, &disk.layers, !disk.read_only);
            let slot = 0x08 + disk.place;
            let boot = self.boot_index(index + usize::from(self.boot != BootFirst::Disk));
            let address = format!("drive={drive},addr={slot:#x}{boot}");
            // A full disk of the host's is no error of the guest's: it stands still until there is room.
            args.pair(
                "-device",
                format!("virtio-blk-pci,id={0},serial={0},{address},werror=enospc", disk.id),
            );
        }
    }

    fn cd_arguments(&self, args: &mut Arguments) {
        let Some(drive) = &self.cdrom else { return };
        let mut disc = String::new();
        if let Some(image) = &drive.image {
            args.pair("-blockdev", disc::blockdev(disc::FIRST_NODE, image, drive.direct));
            disc = format!(",drive={}", disc::FIRST_NODE);
        }
        let after_disks = self.disks.len() + usize::from(self.boots_from_net());
        let boot = self.boot_index(if self.boot == BootFirst::Cd { 0 } else { after_disks });
        args.pair("-device", format!("ide-cd,id={},bus=ide.1,unit=0{disc}{boot}", disc::DRIVE));
    }

    fn boots_from_net(&self) -> bool {
        self.boot == BootFirst::Net
    }

    /// A device's place in the order in which firmware tries them. A kernel that is booted directly has QEMU's first place for
    /// itself.
    fn boot_index(&self, index: usize) -> String {
        if self.kernel.is_some() { String::new() } else { format!(",bootindex={index}") }
    }
}

impl Uefi {
    fn blockdev(&self) -> Value {
        let file = json!({ "driver": "file", "filename": self.code, "read-only": true });
        json!({ "driver": "raw", "node-name": CODE_NODE, "read-only": true, "file": file })
    }
}

/// The PCI slot of a card by its number.
fn card_slot(index: usize) -> usize {
    0x18 + index
}

/// What `device_add` is told of a card that takes the place of one that was there.
pub fn replaced_card(index: usize, card: &Card) -> Value {
    let slot = format!("{:#x}", card_slot(index));
    json!({ "driver": "virtio-net-pci", "id": card.id, "netdev": card.id, "mac": card.mac, "addr": slot, "romfile": "" })
}

/// The name by which the guest agent finds its port.
const AGENT_PORT: &str = "org.qemu.guest_agent.0";

/// Node of the UEFI firmware.
const CODE_NODE: &str = "uefi-code";

/// Id of the disk that is UEFI's variable store.
pub const UEFI_DISK: &str = "uefi";

/// What QEMU calls the device of a disk: its id, or a part of its path.
pub fn device_of(disk: &str) -> &str {
    if disk == UEFI_DISK { "system.flash1" } else { disk }
}

/// Most disks that a machine can have: the PCI slots 0x08 to 0x17.
pub const MAX_DISKS: usize = 16;
/// Most cards: the PCI slots 0x18 to 0x1c.
pub const MAX_CARDS: usize = 5;

struct Arguments(Vec<String>);

impl Arguments {
    fn word(&mut self, word: &str) {
        self.0.push(word.to_owned());
    }

    fn pair(&mut self, option: &str, value: impl ToString) {
        self.0.extend([option.to_owned(), value.to_string()]);
    }

    fn socket(&mut self, id: &str, path: &Path) {
        self.pair(
            "-chardev",
            format!("socket,id={id},path={},server=on,wait=off", comma(&path.to_string_lossy())),
        );
    }
}

/// QEMU's option syntax doubles a comma that belongs to a value.
fn comma(text: &str) -> String {
    text.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> MachineSpec {
        let layer = |id: &str, format: &str| Layer {
            id: id.into(),
            flat: false,
            file: format!("/layers/{id}").into(),
            format: format.into(),
        };
        MachineSpec {
            name: "web,1".into(),
            machine: "pc-i440fx-10.0".into(),
            accel: Accel::Tcg,
            memory: 512 << 20,
            memory_image: None,
            cpus: 2,
            uuid: "u".into(),
            generation: "g".into(),
            disks: vec![Disk {
                id: "disk0".into(),
                layers: vec![layer("a", "raw"), layer("b", "qcow2")],
                place: 0,
                read_only: false,
            }],
            cdrom: None,
            boot: BootFirst::Disk,
            uefi: None,
            vnc: false,
            cards: vec![Card { id: "net0".into(), mac: "52:54:00:00:00:01".into() }],
            guest_agent: false,
            kernel: None,
            only_migratable: true,
            direct: true,
            incoming: true,
            stopped: true,
            extra: vec!["-chardev".into(), "null,id={run}/x".into()],
        }
    }

    fn nodes(spec: &MachineSpec) -> Vec<Value> {
        let args = spec.arguments(&RunFolder("/run".into()));
        args.iter()
            .zip(args.iter().skip(1))
            .filter(|(option, _)| *option == "-blockdev")
            .map(|(_, value)| serde_json::from_str(value).unwrap())
            .collect()
    }

    fn devices(spec: &MachineSpec) -> Vec<String> {
        let args = spec.arguments(&RunFolder("/run".into()));
        let device = |(option, value): (&String, &String)| (option == "-device").then(|| value.clone());
        args.iter().zip(args.iter().skip(1)).filter_map(device).collect()
    }

    #[test]
    fn a_read_only_disk_is_nowhere_opened_for_writing_and_keeps_its_place() {
        let mut spec = spec();
        spec.disks.push(Disk {
            id: "disk5".into(),
            layers: vec![Layer { id: "c".into(), flat: false, file: "/c.img".into(), format: "raw".into() }],
            place: 5,
            read_only: true,
        });
        let node = nodes(&spec).pop().unwrap();
        assert_eq!((&node["read-only"], &node["file"]["read-only"]), (&json!(true), &json!(true)));
        assert_eq!(node["cache"]["direct"], true);
        assert!(devices(&spec).iter().any(|d| d.contains("id=disk5,serial=disk5,drive=l-c,addr=0xd")));
    }

    #[test]
    fn what_is_booted_from_first_has_the_first_place() {
        let order = |boot: BootFirst| {
            let cdrom = Some(CdDrive { image: Some("/cd.iso".into()), direct: true });
            let devices = devices(&MachineSpec { boot, cdrom, ..spec() });
            let place = |device: &str| {
                let words = devices.iter().find(|d| d.contains(device)).unwrap().split(',');
                words.filter_map(|w| w.strip_prefix("bootindex=")).next().map(str::to_owned)
            };
            ["virtio-blk", "ide-cd", "virtio-net"].map(place)
        };
        let places = |words: [&str; 3]| words.map(|w| (w != "-").then(|| w.to_owned()));
        assert_eq!(order(BootFirst::Disk), places(["0", "1", "-"]));
        assert_eq!(order(BootFirst::Cd), places(["1", "0", "-"]));
        assert_eq!(order(BootFirst::Net), places(["1", "2", "0"]));
    }

    #[test]
    fn the_chain_is_spelt_out_and_only_its_top_is_written() {
        let args = spec().arguments(&RunFolder("/run".into()));
        let nodes = nodes(&spec());
        assert_eq!(nodes.len(), 2);
        assert_eq!((&nodes[0]["read-only"], nodes[0].get("backing")), (&json!(true), None));
        assert_eq!((&nodes[1]["read-only"], &nodes[1]["backing"]), (&json!(false), &json!("l-a")));
        assert!(args.iter().any(|a| a.starts_with("virtio-blk-pci,id=disk0,serial=disk0,drive=l-b")));
    }

    #[test]
    fn names_cannot_smuggle_options_and_run_is_filled_in() {
        let args = spec().arguments(&RunFolder("/run".into()));
        assert!(args.contains(&"guest=web,,1,debug-threads=on".to_owned()));
        assert!(args.contains(&"null,id=/run/x".to_owned()));
    }
}
