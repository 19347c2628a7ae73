//! Live names for the shell's completion. A daemon that does not run is not started for it.

use std::ffi::OsStr;

use clap_complete::CompletionCandidate;
use server::client::{Client, path};
use server::snapshots::{Machine, Tree};

use crate::config::Config;
use crate::output::plain;

/// Names of machines.
pub(crate) fn targets(current: &OsStr) -> Vec<CompletionCandidate> {
    let current = current.to_string_lossy();
    let Some(client) = daemon() else { return Vec::new() };
    candidates_of(&client, &current)
}

/// Names of machines, and behind an `@` those of snapshots.
pub(crate) fn addresses(current: &OsStr) -> Vec<CompletionCandidate> {
    let current = current.to_string_lossy();
    let Some(client) = daemon() else { return Vec::new() };
    let Some((target, start)) = current.split_once('@') else { return candidates_of(&client, &current) };
    let Ok(path) = path(&["targets", target, "tree"]) else { return Vec::new() };
    let Ok(tree) = client.get::<Tree>(&path) else { return Vec::new() };
    let snapshots = tree.snapshots.into_iter().filter(|snapshot| snapshot.name.starts_with(start));
    snapshots
        .map(|snapshot| {
            let note = (!snapshot.note.is_empty()).then(|| plain(&snapshot.note).into());
            CompletionCandidate::new(format!("{target}@{}", snapshot.name)).help(note)
        })
        .collect()
}

fn candidates_of(client: &Client, start: &str) -> Vec<CompletionCandidate> {
    let machines: Vec<Machine> = client.get("/v1/targets").unwrap_or_default();
    machines
        .into_iter()
        .filter(|m| m.name.starts_with(start))
        .map(|m| CompletionCandidate::new(m.name))
        .collect()
}

/// The daemon of the configured state folder; a `--state` on the line that is being typed is not seen.
fn daemon() -> Option<Client> {
    let config = Config::load(None).ok()?;
    Client::existing(&config.state.value).ok().flatten()
}
