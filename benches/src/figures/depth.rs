//! Does it matter for a restore how deep in the tree a snapshot lies?
//!
//! One machine, a thousand snapshots in a row, each with 16 KiB of the disk written anew, somewhere else each time: as many layers lie
//! over each other. When the background has gone through the disks, it goes to the last and to the first of them by turns, without an
//! undo point, each time from the start of the command to the first answer of the guest. Then the guest reads what was written from
//! its disk, past its page cache: 16 MiB that come from one layer there, from all of them here.
//!
//! If a chain may not be so deep, the question is asked of the deepest there is, and the depth stands beside each run.

use super::ms;
use crate::disk;
use crate::error::{Error, Result};
use crate::machine::{Machine, mixed};
use crate::report::{Better, Figure, Run};
use crate::settings::Bench;
use crate::spinney::Spinney;
use crate::stats::Summary::Median;

/// The quickest to durable, of a small guest.
const MODE: Option<&str> = Some("stop-copy");
const DEPTH: u64 = 1_000;
const ROUNDS: u64 = 11;
const GUEST_MIB: u64 = 128;
const FILLED_MIB: u64 = 16;
/// The file that is written to, piece by piece, and the pieces, in KiB.
const FILE: &str = "/data/pieces";
const PIECE_KIB: u64 = 16;

/// `restore.depth_1000.vs_depth_1`, `restore.depth_1000.disk_read.vs_depth_1`.
pub(super) fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    let spinney = Spinney::start(bench, &bench.disk)?;
    let mut machine = Machine::boot(&spinney, GUEST_MIB)?;
    machine.fill(FILLED_MIB, mixed(1))?;
    let wanted = bench.count(DEPTH, 40);
    // All of the file, so that what comes later is written where it lies already.
    shell(&mut machine, &format!("dd if=/dev/urandom of={FILE} bs={PIECE_KIB}k count={wanted} && sync"))?;
    machine.take_named("first")?;
    let mut depth = 1;
    let mut last = "first".to_owned();
    while depth < wanted {
        let piece = format!("of={FILE} bs={PIECE_KIB}k count=1 seek={depth} conv=notrunc,fsync");
        shell(&mut machine, &format!("dd if=/dev/urandom {piece}"))?;
        match machine.take(MODE) {
            Ok(done) => last = done.word("name")?.to_owned(),
            Err(Error::Spinney { words, .. }) if words.contains("layers deep") => {
                println!("        no deeper than {depth}: {words}");
                break;
            }
            Err(error) => return Err(error),
        }
        depth += 1;
    }
    spinney.wait_for_background()?;
    let (mut restores, mut reads) = (Vec::new(), Vec::new());
    for round in 0..=bench.count(ROUNDS, 3) {
        let before = if round % 2 == 0 { Some(restore(&mut machine, "first")?) } else { None };
        let deep = restore(&mut machine, &last)?;
        let shallow = before.map_or_else(|| restore(&mut machine, "first"), Ok)?;
        if round == 0 {
            continue;
        }
        restores.push(
            Run::new(deep.answered / shallow.answered)
                .beside("depth", depth as f64)
                .beside("deep_ms", deep.answered)
                .beside("first_ms", shallow.answered)
                .beside("deep_command_ms", deep.command)
                .beside("first_command_ms", shallow.command)
                .beside("deep_layers_open", deep.layers_open)
                .beside("first_layers_open", shallow.layers_open),
        );
        reads.push(
            Run::new(deep.read / shallow.read)
                .beside("depth", depth as f64)
                .beside("deep_ms", deep.read)
                .beside("first_ms", shallow.read),
        );
    }
    let id = "restore.depth_1000";
    Ok(vec![
        Figure::new(format!("{id}.vs_depth_1"), "", Better::Lower, Median, restores)?.target(1.1),
        Figure::new(format!("{id}.disk_read.vs_depth_1"), "", Better::Lower, Median, reads)?,
    ])
}

/// What it took to go to a snapshot, in milliseconds.
struct Restored {
    answered: f64,
    command: f64,
    read: f64,
    layers_open: f64,
}

fn restore(machine: &mut Machine<'_>, snapshot: &str) -> Result<Restored> {
    disk::settle(machine.spinney.state())?;
    let (done, _, answered) = machine.goto_timed(snapshot)?;
    let began = std::time::Instant::now();
    shell(machine, &format!("dd if={FILE} of=/dev/null bs=1M iflag=direct"))?;
    let read = ms(began.elapsed());
    Ok(Restored {
        answered: ms(answered),
        command: ms(done.wall),
        read,
        layers_open: machine.layers_open()? as f64,
    })
}

/// Runs a command in the guest, which must succeed.
fn shell(machine: &mut Machine<'_>, command: &str) -> Result<()> {
    match machine.guest.cmd(command)? {
        (0, _) => Ok(()),
        (_, words) => Err(Error::Tool { command: command.to_owned(), words }),
    }
}
