//! `gc`: free what nothing needs.

use server::Problem;
use server::api::GcRequest;
use server::client::Method;
use server::snapshots::GcReport;

use crate::output::{bytes, count};
use crate::session::Session;

/// Free what nothing needs
///
/// What undo still needs stays, unless --now: then the operations that can no longer be undone are named, and pages that are not
/// compressed yet are. That happens by itself to what nobody has touched for ten minutes.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  spinney gc --dry-run\n  spinney gc --now")]
pub(crate) struct Args {
    /// Free what only undo needs, too, and compress at once
    #[arg(long)]
    now: bool,
    /// Only say what would be freed
    #[arg(short = 'n', long)]
    dry_run: bool,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let body = GcRequest { now: args.now, dry_run: args.dry_run };
    let report: GcReport = session.change(Method::POST, "/v1/gc", &body)?;
    if session.out.json {
        session.document("spinney.gc/1", &report);
        return Ok(());
    }
    summary(&report).into_iter().for_each(|line| session.out.line(line));
    for operation in &report.ends_undo_of {
        session.out.line(format_args!("no longer to be undone: {operation}"));
    }
    Ok(())
}

/// What was freed: in all, and by groups if there are several.
fn summary(report: &GcReport) -> Vec<String> {
    let verb = if report.dry_run { "would free" } else { "freed" };
    let part = |freed, packs, layers| {
        format!("{}: {}, {}", bytes(freed), count(packs, "pack"), count(layers, "disk layer"))
    };
    let mut lines = vec![format!("{verb} {}", part(report.bytes, report.packs, report.layers))];
    let compressed: u64 = report.groups.iter().map(|group| group.compressed).sum();
    let away: u64 = report.groups.iter().map(|group| group.compressed_away).sum();
    if compressed > 0 {
        let packs = count(compressed, "pack");
        lines.push(match report.dry_run {
            true => {
                format!("would compress {packs}: what that frees comes on top, and is seen when it is done")
            }
            false => format!("{} of that by compressing {packs}", bytes(away)),
        });
    }
    for group in report.groups.iter().filter(|group| report.groups.len() > 1 || group.problem.is_some()) {
        let did = part(group.bytes, group.packs, group.layers);
        lines.push(match &group.problem {
            Some(why) => format!("  group {}: left alone: {why}", group.group),
            None => format!("  group {}: {did}", group.group),
        });
    }
    lines
}

#[cfg(test)]
mod tests {
    use server::snapshots::GroupGc;

    use super::*;

    #[test]
    fn several_groups_have_a_line_each() {
        let work =
            GroupGc { group: "work".into(), packs: 2, layers: 1, bytes: 3 << 20, ..GroupGc::default() };
        let broken =
            GroupGc { problem: Some("its key is gone".into()), group: "old".into(), ..GroupGc::default() };
        let groups = vec![GroupGc { group: "default".into(), ..GroupGc::default() }, work.clone(), broken];
        let report = GcReport { packs: 2, layers: 1, bytes: 3 << 20, groups, ..GcReport::default() };
        insta::assert_snapshot!(summary(&report).join("\n"));
        let alone = GcReport { dry_run: true, groups: vec![work], ..report };
        assert_eq!(summary(&alone), ["would free 3 MiB: 2 packs, 1 disk layer"]);
    }
}
