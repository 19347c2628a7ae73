//! `ls`: machines, or the snapshots of one.

use clap_complete::ArgValueCompleter;
use jiff::Timestamp;
use serde_json::json;
use server::Problem;
use server::snapshots::{Machine, Tree};

use crate::draw::{power, state};
use crate::output::{ago, bytes, plain, span};
use crate::session::Session;
use crate::{address, complete};

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
        session.out.document("spinney.machines/1", &json!({ "machines": machines }));
        return Ok(());
    }
    if machines.is_empty() {
        session.out.note("no machines; `spinney create --help` tells how to make one");
        return Ok(());
    }
    let mut rows = vec![
        ["NAME", "STATE", "MEMORY", "CPUS", "SNAPSHOTS", "HERE IS ON", "GROUP"].map(str::to_owned).to_vec(),
    ];
    for machine in machines {
        let state = match &machine.busy {
            Some(kind) => format!("{} ({kind})", power(machine.power)),
            None => power(machine.power).to_owned(),
        };
        rows.push(vec![
            machine.name,
            state,
            bytes(machine.config.memory),
            machine.config.cpus.to_string(),
            machine.snapshots.to_string(),
            machine.parent.unwrap_or_else(|| "-".to_owned()),
            machine.group,
        ]);
    }
    session.out.table(&rows);
    Ok(())
}

fn snapshots(session: &Session, target: &str) -> Result<(), Problem> {
    let tree: Tree = session.get(&format!("{}/tree", address::target(target)?))?;
    if session.out.json {
        session.out.document("spinney.snapshots/1", &json!({ "snapshots": tree.snapshots }));
        return Ok(());
    }
    let now = Timestamp::now();
    let mut rows =
        vec![["NAME", "TAKEN", "STATE", "MEMORY", "STORED", "PAUSE", "NOTE"].map(str::to_owned).to_vec()];
    for snapshot in tree.snapshots.into_iter().filter(|snapshot| !snapshot.undo_point) {
        let state = state(&snapshot).to_owned();
        rows.push(vec![
            snapshot.name,
            ago(now, snapshot.created),
            state,
            if snapshot.memory_bytes == 0 { "-".to_owned() } else { bytes(snapshot.memory_bytes) },
            bytes(snapshot.stored_bytes + snapshot.disk_bytes),
            snapshot.pause_us.map_or_else(|| "-".to_owned(), span),
            plain(&snapshot.note),
        ]);
    }
    if rows.len() == 1 {
        session.out.note(format_args!("no snapshots; `spinney take {target}` takes one"));
        return Ok(());
    }
    session.out.table(&rows);
    Ok(())
}
