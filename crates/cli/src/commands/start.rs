//! `start`: a process for a machine.

use clap_complete::ArgValueCompleter;
use serde_json::json;
use server::Problem;
use server::client::Method;
use server::snapshots::Machine;

use super::ls::lost_in_goto;
use crate::session::Session;
use crate::{address, complete};

/// Start a machine
///
/// One that is suspended goes on where it was. Of one that is protected a throw-away fork is started, which is gone when it stops: so a
/// protected machine is a template.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  spinney start web")]
pub(crate) struct Args {
    /// Machine
    #[arg(add = ArgValueCompleter::new(complete::targets))]
    target: String,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let place = address::target(&args.target)?;
    let client = session.client()?;
    let before: Machine = client.get(&place)?;
    if let Some(point) = &before.brought_back_by {
        session.out.warning(lost_in_goto(&before.name, point));
    }
    let machine: Machine =
        session.operate(&client, Method::POST, &format!("{place}/start"), Some(&json!({})))?;
    if session.out.json {
        session.document("spinney.machine/1", &machine);
    } else if machine.name != before.name {
        let (fork, template) = (&machine.name, &before.name);
        session.out.line(format_args!("{fork} runs, a throw-away fork of {template}, which is protected"));
        session.out.note(format_args!(
            "it is gone when it stops; `spinney unprotect {template}` makes {template} itself start"
        ));
    } else {
        session.out.line(format_args!("{} runs", machine.name));
    }
    Ok(())
}
