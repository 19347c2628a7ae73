//! Which way of saving works on which kind of guest memory: the table of `docs/decisions/0009-live-take.md`, every cell of it, on a
//! real QEMU whose firmware finds nothing to boot and runs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use qemu::binary::Qemu;
use qemu::live::Live;
use qemu::migration::{PAGE_SIZE, RamBlock, Sink, SinkError};
use qemu::outside::{self, Outside, StillMemory};
use qemu::process::Process;
use qemu::qmp::Qmp;
use qemu::save::{self, CallbackError, CopyMode, SaveError, SavedState, run_state};
use tempfile::TempDir;

const MEBIBYTES: u64 = 64;
/// Old enough for every QEMU, and no alias: it stands in the state.
const MACHINE: &str = "pc-i440fx-7.2";

/// All memory of a machine, block by block.
#[derive(Default)]
struct Memory {
    names: Vec<String>,
    blocks: BTreeMap<String, Vec<u8>>,
    /// Pages of the block `ram0` that came.
    pages: u64,
}

impl Memory {
    fn put(&mut self, block: usize, offset: u64, bytes: &[u8]) -> Result<(), SinkError> {
        let name = &self.names[block];
        self.pages += u64::from(name == "ram0");
        self.blocks.get_mut(name).unwrap()[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn read(&mut self, memory: &StillMemory<'_>) -> Result<(), CallbackError> {
        self.blocks(memory.blocks())?;
        let (mut bytes, mut there) = (Vec::new(), Vec::new());
        for (number, block) in memory.blocks().iter().enumerate() {
            // An odd number, so that runs end within what is there and what is not.
            for from in (0..block.length / PAGE_SIZE as u64).step_by(77) {
                let count = 77.min((block.length / PAGE_SIZE as u64 - from) as usize);
                memory.read(number, from, count, &mut bytes, &mut there)?;
                assert_eq!(there.len(), count);
                let mut pages = bytes.chunks(PAGE_SIZE);
                for (page, _) in (from..).zip(&there).filter(|(_, there)| **there) {
                    self.put(number, page * PAGE_SIZE as u64, pages.next().unwrap())?;
                }
                assert_eq!(pages.next(), None);
            }
        }
        Ok(())
    }
}

impl Sink for Memory {
    fn blocks(&mut self, blocks: &[RamBlock]) -> Result<(), SinkError> {
        self.names = blocks.iter().map(|block| block.name.clone()).collect();
        self.blocks = blocks.iter().map(|b| (b.name.clone(), vec![0; b.length as usize])).collect();
        Ok(())
    }

    fn page(&mut self, block: usize, offset: u64, bytes: &[u8; PAGE_SIZE]) -> Result<(), SinkError> {
        self.put(block, offset, bytes)
    }

    fn zero(&mut self, block: usize, offset: u64) -> Result<(), SinkError> {
        self.put(block, offset, &[0; PAGE_SIZE])
    }
}

#[derive(Clone, Copy, Debug)]
enum Source {
    StopCopy,
    PreCopy,
    Live,
    Outside,
}

struct Machine {
    process: Process,
    qmp: Qmp,
    folder: TempDir,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.process.kill();
    }
}

fn boot(backing: &str, more: &[&str]) -> Machine {
    let qemu = Qemu::find(None).expect("QEMU");
    let folder = tempfile::tempdir().unwrap();
    let monitor = folder.path().join("qmp");
    let object = format!("{backing},id=ram0,size={MEBIBYTES}M");
    let mut args: Vec<String> =
        ["-nodefaults", "-no-user-config", "-display", "none"].map(str::to_owned).to_vec();
    args.extend(["-machine".into(), format!("{MACHINE},accel=tcg,memory-backend=ram0")]);
    args.extend(["-m".into(), format!("{MEBIBYTES}M"), "-object".into(), object]);
    args.extend(more.iter().map(|word| (*word).to_owned()));
    args.extend(["-qmp".into(), format!("unix:{},server=on,wait=off", monitor.display())]);
    let process = Process::spawn(&qemu.path, &args, &folder.path().join("log")).expect("a process");
    let qmp = Qmp::connect(&monitor, false, Duration::from_secs(20)).expect("a monitor");
    Machine { process, qmp, folder }
}

/// Saves a machine from outside; `at_end` is called while it stands still.
fn save_from_outside(
    machine: &Machine,
    memory: &mut Memory,
    at_end: &mut dyn FnMut() -> Result<(), CallbackError>,
) -> Result<SavedState, SaveError> {
    let scratch = machine.folder.path().join("device-state");
    let outside = Outside {
        qmp: &machine.qmp,
        process: machine.process.id(),
        mapped: false,
        stays: false,
        machine: MACHINE,
        scratch: &scratch,
        max_pause: None,
        cancel: &AtomicBool::new(false),
        confirm: &|| Ok(()),
        read: &mut |still| memory.read(still),
        at_end,
    };
    let saved = outside.save();
    assert!(!scratch.exists());
    saved
}

fn save(machine: &Machine, source: Source) -> Result<u64, SaveError> {
    let (qmp, mut sink, cancel) = (&machine.qmp, Memory::default(), AtomicBool::new(false));
    let copy = |mode, sink: &mut Memory| {
        save::read(qmp, mode, None, sink, &cancel, &|| {})?.go_on(&mut || Ok(())).map(drop)
    };
    match source {
        Source::StopCopy => copy(CopyMode::StopCopy, &mut sink)?,
        Source::PreCopy => copy(CopyMode::PreCopy, &mut sink)?,
        Source::Live => {
            let process = machine.process.id();
            let (at_stop, runs_on) = (&mut || Ok(()), &mut |_| {});
            let live = Live {
                qmp,
                process,
                max_pause: None,
                cancel: &cancel,
                progress: &|| {},
                confirm: &|| Ok(()),
                at_stop,
                runs_on,
            };
            live.save(&mut sink).map(drop)?;
        }
        Source::Outside => save_from_outside(machine, &mut sink, &mut || Ok(())).map(drop)?,
    }
    Ok(sink.pages)
}

#[test]
fn every_source_on_every_backing() {
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = |folder: &Path| -> PathBuf { folder.join("ram") };
    let backings = [
        ("anonymous", "memory-backend-ram".to_owned(), true),
        ("private memfd", "memory-backend-memfd,share=off".to_owned(), true),
        (
            "private file on tmpfs",
            format!("memory-backend-file,mem-path={},share=off", file(memory.path()).display()),
            true,
        ),
        (
            "private file on a disk",
            format!("memory-backend-file,mem-path={},share=off", file(disk.path()).display()),
            false,
        ),
    ];
    for (name, backing, live) in backings {
        let machine = boot(&backing, &[]);
        // By turns, so that each is seen to leave the machine fit for the next.
        use Source::{Live, Outside, PreCopy, StopCopy};
        for source in [Live, StopCopy, Outside, Live, Outside, PreCopy, Live] {
            let saved = save(&machine, source);
            println!("{source:?} on {name}: {saved:?}");
            match (saved, source) {
                (Ok(pages), Source::StopCopy | Source::PreCopy) => assert!(pages >= MEBIBYTES << 8),
                // Of memory that no file lies under, what was never touched is left out.
                (Ok(pages), Source::Outside) => {
                    let every = pages == MEBIBYTES << 8;
                    assert!(every || name == "anonymous" && pages > 100, "{name}: {pages}");
                }
                (Ok(pages), Source::Live) => assert!(live && pages == MEBIBYTES << 8, "{name}: {pages}"),
                (Err(SaveError::NotLive { reason }), Source::Live) => {
                    assert!(!live && reason.contains("memory"), "{name}: {reason}");
                }
                (Err(error), _) => panic!("{source:?} on {name}: {error}"),
            }
            assert_eq!(run_state(&machine.qmp).unwrap(), "running", "{source:?} on {name}");
        }
    }
}

/// What is read from outside is what QEMU itself sends at that instant: block by block, page by page, device by device.
#[test]
fn outside_and_stream_agree() {
    let devices = [
        &[][..],
        &["-device", "VGA"],
        &["-device", "virtio-vga", "-device", "qemu-xhci", "-device", "usb-tablet"],
        &["-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n", "-device", "virtio-rng-pci"],
        &["-netdev", "user,id=n", "-device", "e1000,netdev=n,romfile=", "-smp", "3"],
    ];
    for more in devices {
        let machine = boot("memory-backend-ram", more);
        std::thread::sleep(Duration::from_millis(700));
        let (mut read, mut sent) = (Memory::default(), Memory::default());
        let mut streamed = None;
        let mut stream = || {
            let cancel = AtomicBool::new(false);
            let held = save::read(&machine.qmp, CopyMode::StopCopy, None, &mut sent, &cancel, &|| {})?;
            streamed = Some(held.go_on(&mut || Ok(()))?.finished.state);
            assert_eq!(run_state(&machine.qmp)?, "paused");
            Ok(())
        };
        let state = save_from_outside(&machine, &mut read, &mut stream).unwrap().finished.state;
        assert_eq!(run_state(&machine.qmp).unwrap(), "running");
        let streamed = streamed.unwrap();
        assert_eq!(state.header, streamed.header);
        let names = |memory: &Memory| memory.blocks.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&read), names(&sent));
        for (name, bytes) in &read.blocks {
            assert!(*bytes == sent.blocks[name], "{name} of {more:?}");
        }
        assert_eq!(state.tail.bytes().len(), streamed.tail.bytes().len());
        for section in streamed.tail.sections().iter().filter(|section| section.name != "globalstate") {
            let range = section.range.clone();
            assert!(
                state.tail.bytes()[range.clone()] == streamed.tail.bytes()[range],
                "{section:?} of {more:?}"
            );
        }
    }
}

/// Nobody can say whether memory that two machines share belongs to the state of one.
#[test]
fn a_block_that_is_not_known_is_not_read_from_outside() {
    let shared = tempfile::tempdir_in("/dev/shm").unwrap();
    let object = format!("memory-backend-file,id=m,share=on,size=1M,mem-path={}/m", shared.path().display());
    let machine = boot("memory-backend-ram", &["-object", &object, "-device", "ivshmem-plain,memdev=m"]);
    match outside::check(&machine.qmp, machine.process.id(), false) {
        Err(SaveError::NotOutside { reason }) => assert!(reason.contains("block"), "{reason}"),
        other => panic!("{other:?}"),
    }
    let machine = boot("memory-backend-ram", &[]);
    outside::check(&machine.qmp, machine.process.id(), false).unwrap();
}
