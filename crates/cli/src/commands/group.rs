//! `group create`, `ls`, `show`, `rm`: circles of trust.

use clap_complete::ArgValueCompleter;
use jiff::Timestamp;
use serde_json::json;
use server::Problem;
use server::api::CreateGroupRequest;
use server::client::{Method, path};
use server::snapshots::{Group, GroupRemovePlan};

use super::show::{Rows, moment, page};
use crate::complete;
use crate::output::{bytes, count};
use crate::session::Session;

/// Make, list, show or remove groups
///
/// A group is a circle of trust: machines of one group share what is stored of them, machines of two never do. Each has a key of its
/// own that only its owner can read. Where spinney runs as root, QEMU runs as the owner of its machine's group.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make a group
    #[command(after_help = "\
Examples:
  spinney group create work
  spinney create web --group work --disk debian.qcow2
  sudo spinney group create alice --owner alice      its machines run as alice")]
    Create {
        /// Name of the group
        name: String,
        /// User that it belongs to, by name or id; only root can name another
        #[arg(long, value_name = "USER|UID")]
        owner: Option<String>,
    },
    /// List groups
    #[command(after_help = "Example:\n  spinney group ls")]
    Ls,
    /// Show all that is known of a group
    #[command(after_help = "Example:\n  spinney group show work")]
    Show {
        /// Group
        #[arg(add = ArgValueCompleter::new(complete::groups))]
        name: String,
    },
    /// Remove a group that no machine belongs to, with what is stored in it
    ///
    /// A machine that was removed belongs to it for as long as undo keeps it; `spinney gc --now` gives that up.
    #[command(
        after_help = "Examples:\n  spinney group rm work\n  spinney group rm work --yes    without a question"
    )]
    Rm {
        /// Group
        #[arg(add = ArgValueCompleter::new(complete::groups))]
        name: String,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
}

pub(crate) fn run(session: &Session, args: Args) -> Result<(), Problem> {
    match args.command {
        Command::Create { name, owner } => create(session, name, owner),
        Command::Ls => ls(session),
        Command::Show { name } => show(session, &name),
        Command::Rm { name, yes } => rm(session, &name, yes),
    }
}

fn create(session: &Session, name: String, owner: Option<String>) -> Result<(), Problem> {
    let request = CreateGroupRequest { name, owner };
    let group: Group = session.change(Method::POST, "/v1/groups", &request)?;
    if session.out.json {
        session.document("spinney.group/1", &group);
    } else {
        session.out.line(format_args!("created the group {}, owned by {}", group.name, owner_of(&group)));
    }
    Ok(())
}

fn ls(session: &Session) -> Result<(), Problem> {
    let groups: Vec<Group> = session.get("/v1/groups")?;
    if session.out.json {
        session.document("spinney.groups/1", &json!({ "groups": groups }));
        return Ok(());
    }
    session.out.table(&table(&groups));
    groups.iter().filter_map(unusable).for_each(|words| session.out.warning(words));
    Ok(())
}

fn table(groups: &[Group]) -> Vec<Vec<String>> {
    let mut rows = vec![["NAME", "OWNER", "MACHINES", "STORED"].map(str::to_owned).to_vec()];
    for group in groups {
        let machines = group.targets.len().to_string();
        rows.push(vec![group.name.clone(), owner_of(group), machines, bytes(group.bytes)]);
    }
    rows
}

fn show(session: &Session, name: &str) -> Result<(), Problem> {
    let group: Group = session.get(&path(&["groups", name])?)?;
    if session.out.json {
        session.document("spinney.group/1", &group);
        return Ok(());
    }
    page(session, &of_group(&group, Timestamp::now()));
    Ok(())
}

fn of_group(group: &Group, now: Timestamp) -> Rows {
    let mut rows = vec![("group", group.name.clone()), ("id", group.id.clone()), ("owner", owner_of(group))];
    let mut add = |name, value: Option<String>| rows.extend(value.map(|value| (name, value)));
    add("unusable", group.problem.clone());
    add("created", Some(moment(now, group.created)));
    add(
        "machines",
        Some(if group.targets.is_empty() { "none".to_owned() } else { group.targets.join(", ") }),
    );
    add("kept by undo", (group.removed > 0).then(|| count(group.removed, "removed machine")));
    add("stored", Some(bytes(group.bytes)));
    add("folder", Some(group.folder.display().to_string()));
    rows
}

fn rm(session: &Session, name: &str, yes: bool) -> Result<(), Problem> {
    let place = path(&["groups", name])?;
    let client = session.client()?;
    let plan: GroupRemovePlan = client.ask(Method::DELETE, &format!("{place}?dry_run=true"), None::<&()>)?;
    if plan.needs_confirmation {
        let mut goes = vec![
            format!("goes: the group {}", plan.group),
            format!("{} that are stored in it go at once, and nothing takes that back", bytes(plan.bytes)),
        ];
        goes.extend(plan.ends_undo_of.iter().map(|operation| format!("no longer to be undone: {operation}")));
        session.confirm(&goes, "Remove?", yes)?;
    }
    let done: GroupRemovePlan = session.operate(&client, Method::DELETE, &place, None::<&()>)?;
    if session.out.json {
        session.document("spinney.group-rm/1", &done);
    } else {
        session.out.line(match done.bytes {
            0 => format!("removed the group {}: nothing was stored in it", done.group),
            freed => format!("removed the group {}: {} freed", done.group, bytes(freed)),
        });
        for operation in &done.ends_undo_of {
            session.out.line(format_args!("no longer to be undone: {operation}"));
        }
    }
    Ok(())
}

fn owner_of(group: &Group) -> String {
    group.owner_name.clone().unwrap_or_else(|| group.owner.to_string())
}

/// What people should know of a group that cannot be used.
fn unusable(group: &Group) -> Option<String> {
    group.problem.as_ref().map(|why| format!("the group {} cannot be used: {why}", group.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(name: &str) -> Group {
        Group {
            id: "0123456789abcdef".into(),
            name: name.into(),
            owner: 1000,
            owner_name: Some("alice".into()),
            created: Timestamp::from_second(1_800_000_000).unwrap(),
            targets: vec!["web".into(), "db".into()],
            removed: 1,
            folder: "/s/groups/0123456789abcdef".into(),
            bytes: 40 << 20,
            problem: None,
        }
    }

    #[test]
    fn groups_are_listed_with_owner_and_size() {
        let unknown = Group { owner_name: None, targets: vec![], bytes: 0, ..group("default") };
        let lines = crate::output::columns(&table(&[unknown, group("work")]), None).join("\n");
        insta::assert_snapshot!(lines);
    }

    #[test]
    fn a_group_shows_what_is_known_of_it() {
        let now = Timestamp::from_second(1_800_000_060).unwrap();
        let broken = Group { problem: Some("its key is gone: /s/key".into()), ..group("work") };
        let rows = of_group(&broken, now);
        let lines: String = rows.iter().map(|(name, value)| format!("{name}: {value}\n")).collect();
        insta::assert_snapshot!(lines);
        insta::assert_snapshot!(unusable(&broken).unwrap());
    }
}
