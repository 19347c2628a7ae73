//! `op log`, `op cancel`: operations, done and under way.

use jiff::Timestamp;
use serde_json::json;
use server::Problem;
use server::client::{Method, path};
use server::operations::OperationView;
use server::snapshots::{Code, OpState, Operation};

use crate::interrupts::{can_be_undone, named};
use crate::output::{Output, Style, ago, plain};
use crate::session::Session;

/// Show or cancel operations
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List what was done, newest first
    #[command(after_help = "Example:\n  spinney op log -n 5")]
    Log {
        /// Entries at most
        #[arg(short = 'n', long, default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..))]
        limit: u16,
    },
    /// Have an operation that is under way rolled back
    #[command(after_help = "Example:\n  spinney op cancel 3f2a8c01d2e4b596")]
    Cancel {
        /// Operation
        id: String,
    },
}

pub(crate) fn run(session: &Session, args: Args) -> Result<(), Problem> {
    match args.command {
        Command::Log { limit } => log(session, limit),
        Command::Cancel { id } => cancel(session, &id),
    }
}

fn log(session: &Session, limit: u16) -> Result<(), Problem> {
    let operations: Vec<Operation> =
        session.client()?.get_with("/v1/operations", &[("limit", &limit.to_string())])?;
    if session.out.json {
        session.document("spinney.operations/1", &json!({ "operations": operations }));
        return Ok(());
    }
    if operations.is_empty() {
        session.out.note("nothing was done yet");
        return Ok(());
    }
    let (now, out) = (Timestamp::now(), session.out);
    let mut rows = vec![["ID", "WHEN", "WHAT", "UNDO", "STATE"].map(str::to_owned).to_vec()];
    for operation in operations {
        let state = match &operation.error {
            Some(error) => format!("{}: {}", word(operation.state), plain(error)),
            None => word(operation.state).to_owned(),
        };
        // The beginning of an id is as good.
        let id = if out.narrow() { operation.id.chars().take(8).collect() } else { operation.id };
        let undo = if operation.undoable { "possible" } else { "" };
        let mut what = named(&operation.kind, &operation.subject);
        if !operation.changed.is_empty() {
            what = format!("{what} ({})", operation.changed.join(", "));
        }
        rows.push(vec![id, ago(now, operation.started), what, undo.to_owned(), state]);
    }
    session.out.table(&rows);
    Ok(())
}

fn cancel(session: &Session, id: &str) -> Result<(), Problem> {
    let client = session.client()?;
    let mut view: OperationView = client.ask(Method::DELETE, &path(&["operations", id])?, None::<&()>)?;
    if view.state != OpState::Running {
        let sentence = format!("{} {} has ended: {}", view.kind, view.subject, word(view.state));
        let problem = Problem::new(Code::Refused, sentence);
        return Err(match (view.state, can_be_undone(&view.kind)) {
            (OpState::Done, true) => problem.hint(format!("`spinney undo {}` takes it back", view.id)),
            _ => problem,
        });
    }
    while view.state == OpState::Running {
        view = client.get_with(&path(&["operations", &view.id])?, &[("wait", "30")])?;
    }
    print_end(session.out, &view);
    Ok(())
}

fn print_end(out: Output, view: &OperationView) {
    if out.json {
        out.document("spinney.operation/1", view);
        return;
    }
    let style = if view.state == OpState::Cancelled { Style::Good } else { Style::Warning };
    out.line(out.paint(style, format_args!("{} {}: {}", view.kind, view.subject, word(view.state))));
}

fn word(state: OpState) -> &'static str {
    match state {
        OpState::Running => "running",
        OpState::Done => "done",
        OpState::Failed => "failed",
        OpState::Cancelled => "cancelled",
        OpState::Undone => "undone",
    }
}
