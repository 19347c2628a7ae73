//! Forks by name: made, watched while they come to run, and removed.

use crate::error::Result;
use crate::spinney::Spinney;
use crate::watched::{self, Watched};

/// Forks a snapshot, or a machine as it is, and sees when the fork runs and answers.
pub(crate) fn watched(spinney: &Spinney<'_>, address: &str, name: &str) -> Result<Watched> {
    watched::run(spinney, &["fork", address, name])
}

/// Ends a machine, and removes it with what was taken of it.
pub(crate) fn remove(spinney: &Spinney<'_>, name: &str) -> Result<()> {
    spinney.run(&["kill", name])?;
    spinney.run(&["rm", name, "--yes"]).map(drop)
}
