//! UEFI firmware as distributions package it.

use std::path::{Path, PathBuf};

/// Firmware and the variable store that a new machine starts with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UefiFiles {
    /// The firmware, the same for all machines.
    pub code: PathBuf,
    /// The template of the variable store.
    pub variables: PathBuf,
}

/// Where packages put them: Debian and Ubuntu (`ovmf`), Fedora (`edk2-ovmf`), Arch (`edk2-ovmf`).
const PLACES: [(&str, &str); 3] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
];

/// The first that is there.
pub fn find_uefi() -> Option<UefiFiles> {
    let there =
        |(code, variables): &(&str, &str)| Path::new(code).is_file() && Path::new(variables).is_file();
    let (code, variables) = PLACES.into_iter().find(there)?;
    Some(UefiFiles { code: code.into(), variables: variables.into() })
}
