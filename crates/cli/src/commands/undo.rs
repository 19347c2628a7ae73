//! `undo`: take an operation back.

use server::Problem;
use server::api::{UndoReport, UndoRequest};
use server::client::Method;

use crate::session::Session;

/// Take an operation back
///
/// The last one that can be, or the one whose id `spinney op log` shows. It is one more operation of the log.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  spinney undo\n  spinney undo 3f2a8c01d2e4b596")]
pub(crate) struct Args {
    /// Operation [default: the last that can be taken back]
    id: Option<String>,
}

pub(crate) fn run(session: &Session, args: Args) -> Result<(), Problem> {
    let report: UndoReport = session.change(Method::POST, "/v1/undo", &UndoRequest { id: args.id })?;
    if session.out.json {
        session.out.document("spinney.undo/1", &report);
    } else {
        session.out.line(report.done);
    }
    Ok(())
}
