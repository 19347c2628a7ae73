//! `ls`: machines, or the snapshots of one.

use std::collections::BTreeSet;

use clap_complete::ArgValueCompleter;
use jiff::Timestamp;
use serde_json::json;
use server::Problem;
use server::snapshots::{Machine, Tree};

use super::show::DEFAULT_GROUP;
use crate::draw::{power, state};
use crate::output::{ago, bytes, plain, span};
use crate::session::Session;
use crate::{address, complete};

/// Columns of the list of snapshots that a narrow terminal is not shown.
const MEMORY: usize = 3;
const PAUSE: usize = 5;

/// List machines, or the snapshots of one
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  spinney ls\n  spinney ls web")]
pub(crate) struct Args {
    /// Machine
    #[arg(add = ArgValueCompleter::new(complete::targets))]
    target: Option<String>,
}

pub(crate) fn run(session: &Session, args: &Args) -> Result<(), Problem> {
    match &args.target {
        None => machines(session),
        Some(target) => snapshots(session, target),
    }
}

fn machines(session: &Session) -> Result<(), Problem> {
    let machines: Vec<Machine> = session.get("/v1/targets")?;
    if session.out.json {
        session.document("spinney.machines/1", &json!({ "machines": machines }));
        return Ok(());
    }
    if machines.is_empty() {
        session.out.note("no machines; `spinney create --help` tells how to make one");
        return Ok(());
    }
    let unusable: BTreeSet<String> = machines
        .iter()
        .filter_map(|m| Some(format!("the group {} cannot be used: {}", m.group, m.group_problem.as_ref()?)))
        .collect();
    session.out.table(&table(&machines));
    let lost: Vec<String> = machines
        .iter()
        .filter_map(|machine| Some(lost_in_goto(&machine.name, machine.brought_back_by.as_ref()?)))
        .collect();
    lost.iter().chain(&unusable).for_each(|words| session.out.warning(words));
    Ok(())
}

/// Machines, with a column for their groups if one is in another than the default one.
fn table(machines: &[Machine]) -> Vec<Vec<String>> {
    let grouped = machines.iter().any(|machine| machine.group != DEFAULT_GROUP);
    let row = |cells: [String; 7]| {
        let mut row = cells.to_vec();
        row.truncate(if grouped { 7 } else { 6 });
        row
    };
    let head = ["NAME", "STATE", "MEMORY", "CPUS", "SNAPSHOTS", "HERE IS ON", "GROUP"];
    let mut rows = vec![row(head.map(str::to_owned))];
    for machine in machines {
        let held = machine.held_because.is_some().then(|| "held: page damaged".to_owned());
        let state = match machine.busy.as_ref().or(machine.stopped_because.as_ref()).or(held.as_ref()) {
            Some(why) => format!("{} ({why})", power(machine.power)),
            None => power(machine.power).to_owned(),
        };
        let kind = match (machine.throw_away, machine.protected) {
            (true, _) => ", throw-away",
            (false, true) => ", protected",
            (false, false) => "",
        };
        let state = format!("{state}{kind}");
        rows.push(row([
            machine.name.clone(),
            state,
            bytes(machine.config.memory),
            machine.config.cpus.to_string(),
            machine.snapshots.to_string(),
            machine.parent.clone().unwrap_or_else(|| "-".to_owned()),
            machine.group.clone(),
        ]));
    }
    rows
}

/// How to get a machine back that a goto ended and could not bring back.
pub(super) fn lost_in_goto(name: &str, point: &str) -> String {
    format!(
        "a goto had to end {name} and could not bring it back; `spinney goto {point}` does, memory and all"
    )
}

fn snapshots(session: &Session, target: &str) -> Result<(), Problem> {
    let tree: Tree = session.get(&format!("{}/tree", address::target(target)?))?;
    if session.out.json {
        session.document("spinney.snapshots/1", &json!({ "snapshots": tree.snapshots }));
        return Ok(());
    }
    let now = Timestamp::now();
    // Where there is little room it is for names and notes; `show` has the rest.
    let row = |cells: [String; 7]| {
        let keep = |n: usize| !session.out.narrow() || !matches!(n, MEMORY | PAUSE);
        cells.into_iter().enumerate().filter(|(n, _)| keep(*n)).map(|(_, cell)| cell).collect::<Vec<_>>()
    };
    let mut rows =
        vec![row(["NAME", "TAKEN", "STATE", "MEMORY", "STORED", "PAUSE", "NOTE"].map(str::to_owned))];
    for snapshot in tree.snapshots.into_iter().filter(|snapshot| !snapshot.undo_point) {
        let state = state(&snapshot).to_owned();
        rows.push(row([
            snapshot.name,
            ago(now, snapshot.created),
            state,
            if snapshot.memory_bytes == 0 { "-".to_owned() } else { bytes(snapshot.memory_bytes) },
            bytes(snapshot.stored_bytes + snapshot.disk_bytes),
            snapshot.pause_us.map_or_else(|| "-".to_owned(), span),
            plain(&snapshot.note),
        ]));
    }
    if rows.len() == 1 {
        session.out.note(format_args!("no snapshots; `spinney take {target}` takes one"));
        return Ok(());
    }
    session.out.table(&rows);
    Ok(())
}
