//! `gc`: free what nothing needs.

use server::Problem;
use server::api::GcRequest;
use server::client::Method;
use server::snapshots::GcReport;

use crate::output::{bytes, count};
use crate::session::Session;

/// Free what nothing needs
///
/// What undo still needs stays, unless --now: then the operations that can no longer be undone are named.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  spinney gc --dry-run\n  spinney gc --now")]
pub(crate) struct Args {
    /// Free what only undo needs, too
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
    let verb = if report.dry_run { "would free" } else { "freed" };
    let (packs, layers) = (count(report.packs, "pack"), count(report.layers, "disk layer"));
    session.out.line(format_args!("{verb} {}: {packs}, {layers}", bytes(report.bytes)));
    for operation in &report.ends_undo_of {
        session.out.line(format_args!("no longer to be undone: {operation}"));
    }
    Ok(())
}
