//! `tree`: where a machine stands among its snapshots.

use clap_complete::ArgValueCompleter;
use jiff::Timestamp;
use serde_json::json;
use server::Problem;
use server::snapshots::{Machine, Tree};

use crate::draw::draw;
use crate::output::Style;
use crate::session::Session;
use crate::{address, complete};

/// Draw the tree of snapshots, "here" marked
///
/// Behind each name: when it was taken, the state that comes back, the bytes that it added, for how long the guest stood
/// still, its note.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  spinney tree         all machines\n  spinney tree web --all")]
pub(crate) struct Args {
    /// Machine [default: all]
    #[arg(add = ArgValueCompleter::new(complete::targets))]
    target: Option<String>,
    /// Show undo points too
    #[arg(long)]
    all: bool,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let client = session.client()?;
    let targets = match &args.target {
        Some(target) => vec![target.clone()],
        None => client.get::<Vec<Machine>>("/v1/targets")?.into_iter().map(|machine| machine.name).collect(),
    };
    let mut trees = Vec::new();
    for target in &targets {
        trees.push(client.get::<Tree>(&format!("{}/tree", address::target(target)?))?);
    }
    if session.out.json {
        match (&args.target, trees.first()) {
            (Some(_), Some(tree)) => session.document("spinney.tree/1", tree),
            _ => session.document("spinney.trees/1", &json!({ "trees": trees })),
        }
        return Ok(());
    }
    if trees.is_empty() {
        session.out.note("no machines; `spinney create --help` tells how to make one");
    }
    for (n, tree) in trees.iter().enumerate() {
        if n > 0 {
            session.out.line("");
        }
        for line in draw(tree, Timestamp::now(), args.all, session.out.width) {
            if line.contains('●') {
                session.out.line(session.out.paint(Style::Good, line));
            } else {
                session.out.line(line);
            }
        }
    }
    Ok(())
}
