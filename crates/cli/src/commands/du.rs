//! `du`: who needs how many bytes.

use clap_complete::ArgValueCompleter;
use server::Problem;
use server::snapshots::Du;

use crate::output::{Output, bytes};
use crate::session::Session;
use crate::{address, complete};

/// Show space: exclusive, shared, reclaimable
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  spinney du
  spinney du web --without web@old,web@older    what dropping these would free")]
pub(crate) struct Args {
    /// Machine [default: all]
    #[arg(add = ArgValueCompleter::new(complete::targets))]
    target: Option<String>,
    /// How much would come back without these snapshots
    #[arg(long, value_name = "TARGET@SNAP", value_delimiter = ',', add = ArgValueCompleter::new(complete::snapshots))]
    without: Vec<String>,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let without = args
        .without
        .iter()
        // `du web --without old` means web@old.
        .map(|name| match &args.target {
            Some(target) if !address::is_snapshot(name) => format!("{target}@{name}"),
            _ => name.clone(),
        })
        .collect::<Vec<_>>()
        .join(",");
    let mut query = Vec::new();
    if let Some(target) = &args.target {
        query.push(("target", target.as_str()));
    }
    if !without.is_empty() {
        query.push(("without", without.as_str()));
    }
    let du: Du = session.client()?.get_with("/v1/du", &query)?;
    if session.out.json {
        session.document("spinney.du/1", &du);
    } else {
        print(session.out, &du);
    }
    Ok(())
}

fn print(out: Output, du: &Du) {
    let mut rows = vec![["SNAPSHOT", "EXCLUSIVE", "SHARED", ""].map(str::to_owned).to_vec()];
    for row in &du.rows {
        let name = if row.name.is_empty() {
            format!("{} (here)", row.target)
        } else {
            format!("{}@{}", row.target, row.name)
        };
        let kind = if row.undo_point { "undo point" } else { "" };
        rows.push(vec![name, bytes(row.exclusive), bytes(row.shared), kind.to_owned()]);
    }
    if !du.rows.is_empty() {
        out.table(&rows);
        out.line("");
    }
    out.line(format_args!("page store       {}", bytes(du.store_bytes)));
    out.line(format_args!("disk layers      {}", bytes(du.disk_bytes)));
    out.line(format_args!("gc would free    {}", bytes(du.reclaimable)));
    out.line(format_args!("pinned by undo   {}", bytes(du.pinned_by_undo)));
    let causes = saved([du.saved.zero, du.saved.same, du.saved.earlier, du.saved.new]);
    out.line(format_args!("memory saved     {causes}"));
    if let Some(without) = du.without {
        out.line(format_args!("without these    {} come back", bytes(without)));
    }
}

/// Memory saved, by cause: pages that were zero, equal to another, known before, new.
pub(super) fn saved([zero, same, earlier, new]: [u64; 4]) -> String {
    let size = |pages: u64| bytes(pages.saturating_mul(4096));
    format!(
        "{} zero, {} equal to another, {} known before, {} new",
        size(zero),
        size(same),
        size(earlier),
        size(new)
    )
}
