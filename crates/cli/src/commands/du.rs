//! `du`: who needs how many bytes.

use clap_complete::ArgValueCompleter;
use server::Problem;
use server::snapshots::{Code, Du, GroupSpace, Saved};

use crate::output::{Output, Style, bytes};
use crate::session::Session;
use crate::{address, complete};

/// Show space: exclusive, shared, reclaimable
///
/// Group by group: nothing is shared across groups. Of one machine, what its own group holds.
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
    if args.without.iter().any(String::is_empty) {
        return Err(Problem::new(Code::Usage, "--without needs the name of a snapshot"));
    }
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
    // One where nothing is stored has nothing to say.
    let says = |group: &&GroupSpace| {
        let stored = group.store_bytes + group.disk_bytes > 0 || group.problem.is_some();
        stored || du.rows.iter().any(|row| row.group == group.group)
    };
    let mut groups: Vec<&GroupSpace> = du.groups.iter().filter(says).collect();
    if groups.is_empty() {
        groups.extend(du.groups.first());
    }
    for (n, group) in groups.into_iter().enumerate() {
        // One group alone needs no head.
        if du.groups.len() > 1 {
            let between = if n == 0 { "" } else { "\n" };
            out.line(format_args!(
                "{between}{}",
                out.paint(Style::Bold, format_args!("group {}", group.group))
            ));
        }
        let rows = rows(du, &group.group);
        if rows.len() > 1 {
            out.table(&rows);
            out.line("");
        }
        totals(group).into_iter().for_each(|line| out.line(line));
    }
    if let Some(without) = du.without {
        if du.groups.len() > 1 {
            out.line("");
        }
        out.line(format_args!("without these    {} come back", bytes(without)));
    }
}

/// The snapshots of a group, with a head.
fn rows(du: &Du, group: &str) -> Vec<Vec<String>> {
    let mut rows = vec![["SNAPSHOT", "EXCLUSIVE", "SHARED", ""].map(str::to_owned).to_vec()];
    for row in du.rows.iter().filter(|row| row.group == group) {
        let name = if row.name.is_empty() {
            format!("{} (here)", row.target)
        } else {
            format!("{}@{}", row.target, row.name)
        };
        let kind = if row.undo_point { "undo point" } else { "" };
        rows.push(vec![name, bytes(row.exclusive), bytes(row.shared), kind.to_owned()]);
    }
    rows
}

/// What a group takes in all.
fn totals(space: &GroupSpace) -> Vec<String> {
    let mut lines = vec![
        format!("page store       {}", bytes(space.store_bytes)),
        format!("disk layers      {}{}", bytes(space.disk_bytes), unknown(space)),
        format!("gc would free    {}", bytes(space.reclaimable)),
        format!("pinned by undo   {}", bytes(space.pinned_by_undo)),
        format!("memory found     {}", saved(&space.saved)),
    ];
    if space.set_aside_bytes > 0 {
        let aside = bytes(space.set_aside_bytes);
        lines.insert(
            1,
            format!("  of that          {aside} set aside by a repair (*.bad): of no use unless a snapshot is damaged"),
        );
    }
    lines.extend(space.problem.as_ref().map(|why| format!("unusable         {why}")));
    lines
}

/// What of the frozen layers the store has not looked through yet: pages that are only there are stored again until it has.
fn unknown(space: &GroupSpace) -> String {
    match space.frozen_bytes.saturating_sub(space.known_bytes) {
        0 => String::new(),
        left => format!(", {} not looked through yet", bytes(left)),
    }
}

/// Where the pages of memory were found: causes that have none are left out.
pub(super) fn saved(saved: &Saved) -> String {
    let causes = [
        (saved.zero, "zero"),
        (saved.same, "equal to another page"),
        (saved.earlier, "in an earlier snapshot"),
        (saved.other, "in another machine"),
        (saved.disk, "on disk"),
        (saved.new, "new"),
    ];
    let there = causes.iter().filter(|(pages, _)| *pages > 0);
    let words: Vec<String> =
        there.map(|(pages, cause)| format!("{} {cause}", bytes(pages.saturating_mul(4096)))).collect();
    if words.is_empty() { "none stored".into() } else { words.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_used_is_said() {
        let space = GroupSpace {
            group: "work".into(),
            store_bytes: 40 << 20,
            set_aside_bytes: 2 << 20,
            disk_bytes: 1 << 20,
            reclaimable: 0,
            pinned_by_undo: 0,
            saved: Saved { zero: 100, other: 256, disk: 1000, ..Saved::default() },
            frozen_bytes: 9 << 20,
            known_bytes: 5 << 20,
            problem: Some("its key is gone: /s/key".into()),
        };
        insta::assert_snapshot!(totals(&space).join("\n"));
    }
}
