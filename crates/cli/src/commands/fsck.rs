//! `fsck`: read everything back and compare.

use server::Problem;
use server::api::FsckRequest;
use server::client::Method;
use server::snapshots::{Code, FsckReport};

use crate::output::{Output, Style, count};
use crate::session::Session;

/// Read everything that is stored and compare it with its names
///
/// Damage is listed with the snapshots that it touches, and the exit code is 6. A repair saves what is good in damaged packs, puts
/// these aside (nothing is deleted), and marks the snapshots that it could not mend.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  spinney fsck\n  spinney fsck --repair")]
pub(crate) struct Args {
    /// Mend what can be mended first
    #[arg(long)]
    repair: bool,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let body = FsckRequest { repair: args.repair };
    let report: FsckReport = session.change(Method::POST, "/v1/fsck", &body)?;
    if session.out.json {
        session.document("spinney.fsck/1", &report);
    } else {
        print(session.out, &report);
    }
    match report.damage.len() as u64 {
        0 => Ok(()),
        n if args.repair => {
            Err(Problem::new(Code::Damaged, format!("{} could not be mended", count(n, "thing"))).hint(REST))
        }
        n => Err(Problem::new(Code::Damaged, format!("{} damaged", count(n, "thing")))
            .hint(if report.mendable { MENDABLE } else { REST })),
    }
}

const MENDABLE: &str =
    "snapshots that are not named are whole; `spinney fsck --repair` mends what can be mended";
const REST: &str = "snapshots that are not named are whole; of the others `spinney goto SNAPSHOT --off` brings the disks, if these are \
                    whole, and docs/failures.md says what else there is";

fn print(out: Output, report: &FsckReport) {
    for mended in &report.mended {
        out.line(mended);
    }
    for damage in &report.damage {
        out.line(format_args!("{}: {}", out.paint(Style::Bad, &damage.what), damage.problem));
        for snapshot in &damage.snapshots {
            out.line(format_args!("  touches {snapshot}"));
        }
    }
    out.line(format_args!(
        "read {}, {}, {}, {}",
        count(report.packs, "pack"),
        count(report.pages, "page"),
        count(report.layers, "disk layer"),
        count(report.snapshots, "snapshot")
    ));
    if report.damage.is_empty() {
        out.line(out.paint(Style::Good, "all is whole"));
    }
}
