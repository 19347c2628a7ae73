//! Live names for the shell's completion. A daemon that does not run is not started for it.

use std::ffi::OsStr;

use clap_complete::CompletionCandidate;
use server::client::{Client, path};
use server::snapshots::{Group, Machine, Tree};

use crate::config::Config;
use crate::output::{cut, plain};

/// What is shown of a note beside a name.
const NOTE: usize = 60;

/// Names of machines.
pub(crate) fn targets(current: &OsStr) -> Vec<CompletionCandidate> {
    candidates(current, |client, start| machines(client, start, &[""]))
}

/// Names of machines, and behind an `@` those of snapshots.
pub(crate) fn addresses(current: &OsStr) -> Vec<CompletionCandidate> {
    candidates(current, |client, current| match current.split_once('@') {
        Some((target, start)) => of_target(client, target, start),
        // Both are addresses; that neither is the only candidate also keeps the shell from setting a space.
        None => machines(client, current, &["", "@"]),
    })
}

/// Addresses of snapshots: no machine alone.
pub(crate) fn snapshots(current: &OsStr) -> Vec<CompletionCandidate> {
    candidates(current, |client, current| match current.split_once('@') {
        Some((target, start)) => of_target(client, target, start),
        None => machines(client, current, &["@"]),
    })
}

/// Names of groups.
pub(crate) fn groups(current: &OsStr) -> Vec<CompletionCandidate> {
    candidates(current, |client, start| {
        let groups: Vec<Group> = client.get("/v1/groups").unwrap_or_default();
        let names = groups.into_iter().map(|group| group.name).filter(|name| name.starts_with(start));
        names.map(CompletionCandidate::new).collect()
    })
}

fn candidates(
    current: &OsStr,
    find: impl FnOnce(&Client, &str) -> Vec<CompletionCandidate>,
) -> Vec<CompletionCandidate> {
    daemon().map_or_else(Vec::new, |client| find(&client, &current.to_string_lossy()))
}

/// Machines whose name begins so, each with every ending.
fn machines(client: &Client, start: &str, endings: &[&str]) -> Vec<CompletionCandidate> {
    let machines: Vec<Machine> = client.get("/v1/targets").unwrap_or_default();
    let names = machines.into_iter().map(|machine| machine.name).filter(|name| name.starts_with(start));
    names
        .flat_map(|name| {
            endings.iter().map(move |ending| CompletionCandidate::new(format!("{name}{ending}")))
        })
        .collect()
}

/// Snapshots of a machine whose name begins so.
fn of_target(client: &Client, target: &str, start: &str) -> Vec<CompletionCandidate> {
    let Ok(path) = path(&["targets", target, "tree"]) else { return Vec::new() };
    let Ok(tree) = client.get::<Tree>(&path) else { return Vec::new() };
    let snapshots = tree.snapshots.into_iter().filter(|snapshot| snapshot.name.starts_with(start));
    snapshots
        .map(|snapshot| {
            let note = (!snapshot.note.is_empty()).then(|| cut(&plain(&snapshot.note), NOTE).into());
            CompletionCandidate::new(format!("{target}@{}", snapshot.name)).help(note)
        })
        .collect()
}

/// The daemon of the configured state folder; a `--state` on the line that is being typed is not seen.
fn daemon() -> Option<Client> {
    let config = Config::load(None).ok()?;
    Client::existing(&config.state.value).ok().flatten()
}
