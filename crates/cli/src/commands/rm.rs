//! `rm`: a name goes at once; what nothing needs any more comes back later.

use std::collections::HashSet;

use clap_complete::ArgValueCompleter;
use server::Problem;
use server::client::{Client, Method, path, with_query};
use server::snapshots::{Code, RemovePlan, Tree};

use crate::draw::power;
use crate::output::{bytes, count};
use crate::session::Session;
use crate::{address, complete};

/// Names that a question lists.
const LISTED: usize = 10;
/// Holders of what stays that are named.
const NEEDED_BY: usize = 3;

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
    #[arg(value_name = "TARGET[@SNAP]", add = ArgValueCompleter::new(complete::addresses))]
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
    let plan: RemovePlan = client.ask(Method::DELETE, &format!("{place}&dry_run=true"), None::<&()>)?;
    let undo_points = undo_points(&client, &args.address, &plan)?;
    if plan.needs_confirmation {
        session.confirm(&question(&plan, &undo_points), "Remove?", args.yes)?;
    }
    let done: RemovePlan = session.operate(&client, Method::DELETE, &place, None::<&()>)?;
    if session.out.json {
        session.document("spinney.rm/1", &done);
    } else {
        session.out.line(result(&done, &undo_points));
        session.out.note("`spinney undo` takes it back");
    }
    Ok(())
}

/// Which of those that go are undo points. Asked only where more than the snapshot that was named goes.
fn undo_points(client: &Client, text: &str, plan: &RemovePlan) -> Result<HashSet<String>, Problem> {
    if !plan.needs_confirmation {
        return Ok(HashSet::new());
    }
    let target = text.split_once('@').map_or(text, |(target, _)| target);
    let tree: Tree = client.get(&path(&["targets", target, "tree"])?)?;
    if let (Some(name), Some(_)) = (&plan.machine, tree.machine.pid) {
        // The daemon refuses as well; before the question is the time to say so.
        return Err(Problem::new(Code::Refused, format!("{name} is {}", power(tree.machine.power)))
            .hint(format!("`spinney stop {name}` or `spinney kill {name}` first")));
    }
    let points = tree.snapshots.into_iter().filter(|snapshot| snapshot.undo_point);
    Ok(points.map(|point| format!("{}@{}", point.target, point.name)).collect())
}

/// The plan in words: what goes, what comes back, what stays and why.
fn question(plan: &RemovePlan, undo_points: &HashSet<String>) -> Vec<String> {
    let mut lines = vec![format!("goes: {}", what(plan, undo_points))];
    let (names, folded): (Vec<&String>, usize) = {
        let named = || plan.snapshots.iter().filter(|name| !undo_points.contains(*name));
        (named().take(LISTED).collect(), named().count().saturating_sub(LISTED))
    };
    lines.extend(names.into_iter().map(|name| format!("  {name}")));
    if folded > 0 {
        lines.push(format!("  and {folded} more"));
    }
    lines.push(bytes_in_words(plan));
    lines
}

/// What was done, in one line.
fn result(plan: &RemovePlan, undo_points: &HashSet<String>) -> String {
    format!("removed {}: {}", what(plan, undo_points), bytes_in_words(plan))
}

/// `web@old`, `3 snapshots and 1 undo point`, `machine web with 3 snapshots`.
fn what(plan: &RemovePlan, undo_points: &HashSet<String>) -> String {
    let undo = plan.snapshots.iter().filter(|name| undo_points.contains(*name)).count();
    let snapshots = plan.snapshots.len() - undo;
    let parts = [(snapshots, "snapshot"), (undo, "undo point")];
    let parts = parts.into_iter().filter(|(n, _)| *n > 0).map(|(n, one)| count(n as u64, one));
    let parts = parts.collect::<Vec<_>>().join(" and ");
    match (&plan.machine, plan.snapshots.as_slice()) {
        (Some(machine), []) => format!("machine {machine}"),
        (Some(machine), _) => format!("machine {machine} with {parts}"),
        (None, [one]) => one.clone(),
        (None, _) => parts,
    }
}

fn bytes_in_words(plan: &RemovePlan) -> String {
    let back = match plan.reclaimable_bytes {
        0 => "it held no space of its own".to_owned(),
        freed => format!("up to {} are freed when undo needs them no longer", bytes(freed)),
    };
    if plan.kept_bytes == 0 {
        return back;
    }
    let needed = plan.kept_by.iter().take(NEEDED_BY).map(String::as_str).collect::<Vec<_>>().join(", ");
    let more = match plan.kept_by.len().saturating_sub(NEEDED_BY) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("{back}, {} stay for {needed}{more}", bytes(plan.kept_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(machine: bool, snapshots: &[&str]) -> RemovePlan {
        RemovePlan {
            snapshots: snapshots.iter().map(|name| (*name).to_owned()).collect(),
            machine: machine.then(|| "web".into()),
            reclaimable_bytes: 40 << 20,
            kept_bytes: 0,
            kept_by: vec![],
            needs_confirmation: true,
        }
    }

    #[test]
    fn the_plan_says_what_stays_and_why() {
        let plan = RemovePlan {
            kept_bytes: 1 << 30,
            kept_by: ["here", "web@a", "web@b", "web@c"].map(str::to_owned).into(),
            ..plan(false, &["web@old", "web@undo-1", "web@older"])
        };
        let undo = HashSet::from(["web@undo-1".to_owned(), "web@undo-2".to_owned()]);
        insta::assert_snapshot!(question(&plan, &undo).join("\n"), @r"
        goes: 2 snapshots and 1 undo point
          web@old
          web@older
        up to 40 MiB are freed when undo needs them no longer, 1 GiB stay for here, web@a, web@b and 1 more
        ");
        insta::assert_snapshot!(result(&plan, &undo), @"removed 2 snapshots and 1 undo point: up to 40 MiB are freed when undo needs them no longer, 1 GiB stay for here, web@a, web@b and 1 more");
    }

    #[test]
    fn one_line_tells_the_result() {
        let none = HashSet::new();
        insta::assert_snapshot!(result(&plan(false, &["web@old"]), &none), @"removed web@old: up to 40 MiB are freed when undo needs them no longer");
        let nothing = RemovePlan { reclaimable_bytes: 0, ..plan(true, &[]) };
        insta::assert_snapshot!(result(&nothing, &none), @"removed machine web: it held no space of its own");
    }

    #[test]
    fn a_long_list_is_folded() {
        let names: Vec<String> = (1..=30).map(|n| format!("web@snap-{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let lines = question(&plan(true, &names), &HashSet::new());
        assert_eq!(lines.len(), LISTED + 3);
        assert_eq!(lines.get(LISTED + 1).unwrap(), "  and 20 more");
    }
}
