//! `fsck`: read everything back and compare.

use server::Problem;
use server::client::Method;
use server::snapshots::{Code, FsckReport};

use crate::output::{Output, Style, count};
use crate::session::Session;

/// Read everything that is stored and compare it with its names
///
/// Damage is listed with the snapshots that it touches, and the exit code is 6.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  spinney fsck")]
pub(crate) struct Args {}

pub(crate) fn run(session: &Session, _: &Args) -> Result<(), Problem> {
    let report: FsckReport = session.change(Method::POST, "/v1/fsck", &serde_json::json!({}))?;
    if session.out.json {
        session.out.document("spinney.fsck/1", &report);
    } else {
        print(session.out, &report);
    }
    match report.damage.len() as u64 {
        0 => Ok(()),
        n => Err(Problem::new(Code::Damaged, format!("{} damaged", count(n, "thing")))
            .hint("snapshots that are not named are whole")),
    }
}

fn print(out: Output, report: &FsckReport) {
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
