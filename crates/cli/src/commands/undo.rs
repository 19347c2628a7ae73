//! `undo`: take an operation back.

use server::Problem;
use server::api::UndoRequest;
use server::client::Method;
use server::snapshots::Undone;

use crate::session::Session;

/// Take an operation back
///
/// A take, goto, rm, edit, clone, fork or expiry, or what was done at a power-off: the last one of the machine that was worked on last, the last one of a
/// machine, or the one whose id `spinney op log` shows. Asked again it goes further back. An undo is one more operation of the log, and can be undone by its id.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  spinney undo\n  spinney undo web\n  spinney undo 3f2a8c01d2e4b596")]
pub(crate) struct Args {
    /// Operation or machine [default: the machine that was worked on last]
    #[arg(value_name = "ID|MACHINE")]
    id: Option<String>,
}

pub(crate) fn run(session: &Session, args: Args) -> Result<(), Problem> {
    let undone: Undone = session.change(Method::POST, "/v1/undo", &UndoRequest { id: args.id })?;
    if session.out.json {
        session.document("spinney.undo/2", &undone);
        return Ok(());
    }
    session.out.line(format_args!(
        "{}: {}",
        if undone.redone { "did again" } else { "undid" },
        undone.operation
    ));
    if let Some(id) = undone.again {
        session.out.note(format_args!("`spinney undo {id}` does it again"));
    }
    Ok(())
}
