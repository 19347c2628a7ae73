//! `rm`: a name goes at once; what nothing needs any more comes back later.

use clap_complete::ArgValueCompleter;
use server::Problem;
use server::client::{Client, Method, with_query};
use server::snapshots::RemovePlan;

use crate::output::{bytes, count};
use crate::session::Session;
use crate::{address, complete};

/// Remove a snapshot, or a machine with all its snapshots
///
/// Other snapshots and the machine itself are never touched by the removal of a snapshot, whichever it is: what they
/// need stays. `spinney undo` takes a removal back until `gc` has freed the space.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  spinney rm web@before-upgrade
  spinney rm web@experiment --tree     with everything below it
  spinney rm web --yes                 the machine, without a question")]
pub(crate) struct Args {
    /// Machine or snapshot
    #[arg(add = ArgValueCompleter::new(complete::addresses))]
    address: String,
    /// Everything below it too
    #[arg(long)]
    tree: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    let tree = if args.tree { "true" } else { "false" };
    let place = with_query(&address::resource(&args.address)?, &[("tree", tree)]);
    let client = session.client()?;
    let plan = plan(&client, &place)?;
    if plan.needs_confirmation {
        if !session.out.json {
            for line in words(&plan, "goes", "come back") {
                session.out.note(line);
            }
        }
        session.confirm("Remove?", args.yes)?;
    }
    let started = client.ask(Method::DELETE, &place, None::<&()>)?;
    let done: RemovePlan = session.follow(&client, started)?;
    if session.out.json {
        session.out.document("spinney.rm/1", &done);
        return Ok(());
    }
    for line in words(&done, "removed", "come back through gc once undo no longer needs them") {
        session.out.line(line);
    }
    Ok(())
}

fn plan(client: &Client, place: &str) -> Result<RemovePlan, Problem> {
    client.ask(Method::DELETE, &format!("{place}&dry_run=true"), None::<&()>)
}

/// The plan in words: what goes, what comes back, what stays and why.
fn words(plan: &RemovePlan, gone: &str, freed: &str) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(machine) = &plan.machine {
        let snapshots = count(plan.snapshots.len() as u64, "snapshot");
        lines.push(format!("{gone}: machine {machine} with {snapshots}"));
    }
    for snapshot in &plan.snapshots {
        lines.push(format!("{gone}: {snapshot}"));
    }
    lines.push(format!("{} {freed}", bytes(plan.reclaimable_bytes)));
    if plan.kept_bytes > 0 {
        lines.push(format!("{} stay, needed by {}", bytes(plan.kept_bytes), plan.kept_by.join(", ")));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_says_what_stays_and_why() {
        let plan = RemovePlan {
            snapshots: vec!["web@old".into(), "web@older".into()],
            machine: None,
            reclaimable_bytes: 40 << 20,
            kept_bytes: 1 << 30,
            kept_by: vec!["here".into(), "web@after".into()],
            needs_confirmation: true,
        };
        insta::assert_snapshot!(words(&plan, "goes", "come back").join("\n"), @r"
        goes: web@old
        goes: web@older
        40 MiB come back
        1 GiB stay, needed by here, web@after
        ");
    }
}
