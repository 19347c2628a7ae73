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
    let rest = if report.damage.iter().all(|damage| damage.users_file) { YOURS } else { REST };
    match report.damage.len() as u64 {
        0 => Ok(()),
        n if args.repair => {
            Err(Problem::new(Code::Damaged, format!("{} could not be mended", count(n, "thing"))).hint(rest))
        }
        n => Err(Problem::new(Code::Damaged, format!("{} damaged", count(n, "thing")))
            .hint(if report.mendable { MENDABLE } else { rest })),
    }
}

const YOURS: &str = "these files are yours: put them back as they were, and all is whole again; snapshots that are not named are whole now";

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
    looked_at(report).into_iter().for_each(|line| out.line(line));
    if report.damage.is_empty() {
        out.line(out.paint(Style::Good, "all is whole"));
    }
}

/// What was read: in all, and by groups if there are several.
fn looked_at(report: &FsckReport) -> Vec<String> {
    let read = |packs, pages, layers, snapshots| {
        let (packs, pages) = (count(packs, "pack"), count(pages, "page"));
        format!("{packs}, {pages}, {}, {}", count(layers, "disk layer"), count(snapshots, "snapshot"))
    };
    let all = read(report.packs, report.pages, report.layers, report.snapshots);
    let mut lines = vec![format!("read {all}")];
    for group in report.groups.iter().filter(|_| report.groups.len() > 1) {
        let own = read(group.packs, group.pages, group.layers, group.snapshots);
        let damaged = if group.damage == 0 { String::new() } else { format!("; {} damaged", group.damage) };
        lines.push(format!("  group {}: {own}{damaged}", group.group));
    }
    lines
}

#[cfg(test)]
mod tests {
    use server::snapshots::GroupFsck;

    use super::*;

    #[test]
    fn several_groups_have_a_line_each() {
        let work =
            GroupFsck { group: "work".into(), packs: 1, pages: 700, layers: 2, snapshots: 1, damage: 1 };
        let groups = vec![GroupFsck { group: "default".into(), ..GroupFsck::default() }, work];
        let report =
            FsckReport { packs: 1, pages: 700, layers: 2, snapshots: 1, groups, ..FsckReport::default() };
        insta::assert_snapshot!(looked_at(&report).join("\n"));
    }
}
