//! Which QEMU there is: its executable, its version, its newest `pc` machine.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::tool::{self, ToolError};

/// How long `qemu -version` and its like may take.
const LIMIT: Duration = Duration::from_secs(20);

/// QEMU's version, as `-version` prints it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 10 of 10.0.2.
    pub major: u32,
    /// 0 of 10.0.2.
    pub minor: u32,
    /// 2 of 10.0.2.
    pub patch: u32,
}

impl Version {
    /// A version without patch level, to compare with.
    pub const fn at(major: u32, minor: u32) -> Self {
        Self { major, minor, patch: 0 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// A QEMU that can be used.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// The executable.
    pub path: PathBuf,
    /// Its version.
    pub version: Version,
    /// Its newest versioned `pc` machine ("pc-i440fx-10.0"): what new machines are made with, so that their snapshots
    /// load in later versions too.
    pub machine: String,
}

/// Why there is no QEMU to use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BinaryError {
    /// No such executable.
    #[error("{name} was not found on PATH")]
    Missing {
        /// What was looked for.
        name: String,
    },
    /// It could not be run.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// It runs, but does not talk like QEMU.
    #[error("{path} does not say which {what} it has")]
    Unknown {
        /// The executable.
        path: PathBuf,
        /// "version", "machine".
        what: &'static str,
    },
    /// It is too old.
    #[error("{path} is QEMU {version}; 7.2 is the oldest that works")]
    TooOld {
        /// The executable.
        path: PathBuf,
        /// Its version.
        version: Version,
    },
}

impl Qemu {
    /// Uses `path`, or looks for `qemu-system-x86_64` on PATH.
    pub fn find(path: Option<&Path>) -> Result<Self, BinaryError> {
        let path = match path {
            Some(path) => path.to_owned(),
            None => on_path("qemu-system-x86_64")?,
        };
        let ask = |word: &[&str]| {
            let mut command = Command::new(&path);
            command.args(word);
            tool::run(command, LIMIT)
        };
        let version = parse_version(&ask(&["-version"])?.stdout)
            .ok_or_else(|| BinaryError::Unknown { path: path.clone(), what: "version" })?;
        if version < Version::at(7, 2) {
            return Err(BinaryError::TooOld { path, version });
        }
        let machine = parse_machine(&ask(&["-machine", "help"])?.stdout)
            .ok_or_else(|| BinaryError::Unknown { path: path.clone(), what: "machine" })?;
        Ok(Self { path, version, machine })
    }
}

/// Looks for an executable file on PATH.
pub fn on_path(name: &str) -> Result<PathBuf, BinaryError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok() && file.is_file())
        .ok_or_else(|| BinaryError::Missing { name: name.to_owned() })
}

/// `QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)`.
fn parse_version(text: &str) -> Option<Version> {
    let word = text.split_once("version ")?.1.split_whitespace().next()?;
    let mut numbers = word.split('.').map(|n| n.parse::<u32>());
    let mut next = || numbers.next()?.ok();
    Some(Version { major: next()?, minor: next()?, patch: next().unwrap_or(0) })
}

/// `pc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-10.0)`.
fn parse_machine(text: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with("pc "))?;
    let name = line.split_once("(alias of ")?.1.split_once(')')?.0;
    Some(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_machines_are_read() {
        let text = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright (c) 2003";
        assert_eq!(parse_version(text), Some(Version { major: 7, minor: 2, patch: 22 }));
        assert_eq!(parse_version("QEMU emulator version ten"), None);
        let text =
            "none   empty machine\npc    Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-10.0)\n";
        assert_eq!(parse_machine(text).as_deref(), Some("pc-i440fx-10.0"));
        assert_eq!(parse_machine("pc-i440fx-2.4 Standard PC"), None);
    }
}
