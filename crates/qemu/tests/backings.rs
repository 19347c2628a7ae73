//! Which way of saving works on which kind of guest memory: the table of `docs/decisions/0009-live-take.md`, every cell of it, on a
//! real QEMU whose firmware finds nothing to boot and runs.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use qemu::binary::Qemu;
use qemu::live::Live;
use qemu::migration::{PAGE_SIZE, RamBlock, Sink, SinkError};
use qemu::process::Process;
use qemu::qmp::Qmp;
use qemu::save::{self, CopyMode, SaveError, run_state};

const MEBIBYTES: u64 = 64;

/// Counts the pages of the block `ram0`.
#[derive(Default)]
struct Counter {
    blocks: Vec<RamBlock>,
    pages: u64,
}

impl Counter {
    fn count(&mut self, block: usize) -> Result<(), SinkError> {
        self.pages += u64::from(self.blocks[block].name == "ram0");
        Ok(())
    }
}

impl Sink for Counter {
    fn blocks(&mut self, blocks: &[RamBlock]) -> Result<(), SinkError> {
        self.blocks = blocks.to_vec();
        Ok(())
    }

    fn page(&mut self, block: usize, _: u64, _: &[u8; PAGE_SIZE]) -> Result<(), SinkError> {
        self.count(block)
    }

    fn zero(&mut self, block: usize, _: u64) -> Result<(), SinkError> {
        self.count(block)
    }
}

#[derive(Clone, Copy, Debug)]
enum Source {
    StopCopy,
    PreCopy,
    Live,
}

struct Machine {
    process: Process,
    qmp: Qmp,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.process.kill();
    }
}

fn boot(folder: &Path, backing: &str) -> Machine {
    let qemu = Qemu::find(None).expect("QEMU");
    let monitor = folder.join("qmp");
    let object = format!("{backing},id=ram0,size={MEBIBYTES}M");
    let args = [
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-machine",
        "pc,accel=tcg,memory-backend=ram0",
    ];
    let mut args: Vec<String> = args.map(str::to_owned).to_vec();
    args.extend(["-m".into(), format!("{MEBIBYTES}M"), "-object".into(), object]);
    args.extend(["-qmp".into(), format!("unix:{},server=on,wait=off", monitor.display())]);
    let process = Process::spawn(&qemu.path, &args, &folder.join("log")).expect("a process");
    let qmp = Qmp::connect(&monitor, false, Duration::from_secs(20)).expect("a monitor");
    Machine { process, qmp }
}

fn save(machine: &Machine, source: Source) -> Result<u64, SaveError> {
    let (qmp, mut sink, cancel) = (&machine.qmp, Counter::default(), AtomicBool::new(false));
    let copy = |mode, sink: &mut Counter| {
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
        let folder = tempfile::tempdir().unwrap();
        let machine = boot(folder.path(), &backing);
        // By turns, so that each is seen to leave the machine fit for the next.
        for source in [Source::Live, Source::StopCopy, Source::Live, Source::PreCopy, Source::Live] {
            let saved = save(&machine, source);
            println!("{source:?} on {name}: {saved:?}");
            match (saved, source) {
                (Ok(pages), Source::StopCopy | Source::PreCopy) => assert!(pages >= MEBIBYTES << 8),
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
