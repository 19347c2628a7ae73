//! Choosing an accelerator that cannot hang.
//!
//! `/dev/kvm` can exist, open and be writable, and ordinary guests still hang on it: para-virtual KVM in a cloud machine
//! is like that. So KVM is taken only where the CPU shows hardware virtualisation *and* a guest of 512 bytes was seen to
//! run on it within a second or two; else TCG, QEMU's own emulation, which always works.

use std::fmt;
use std::fs;
use std::io::Write;
use std::process::Command;
use std::time::Duration;

use crate::binary::Qemu;
use crate::tool;

/// How QEMU runs guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// The CPU's own virtualisation.
    Kvm,
    /// Emulation.
    Tcg,
}

impl Accel {
    /// QEMU's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// Reads QEMU's word.
    pub fn parse(word: &str) -> Option<Self> {
        match word {
            "kvm" => Some(Self::Kvm),
            "tcg" => Some(Self::Tcg),
            _ => None,
        }
    }
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A boot sector that writes 0x21 to the debug-exit port: `mov al,0x21; mov dx,0x501; out dx,al; hlt; jmp -3`.
const PROBE_CODE: [u8; 10] = [0xB0, 0x21, 0xBA, 0x01, 0x05, 0xEE, 0xF4, 0xEB, 0xFD, 0x90];
/// QEMU's exit code for it: the value doubled, plus one.
const PROBE_EXIT: i32 = (0x21 << 1) | 1;
/// A working KVM boots the sector in well under half of this.
const PROBE_LIMIT: Duration = Duration::from_secs(5);

/// The accelerator to use, and why, in words for `doctor`.
pub fn probe(qemu: &Qemu) -> (Accel, String) {
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return (Accel::Tcg, format!("/dev/kvm cannot be opened: {error}"));
    }
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !has_virtualisation(&cpu) {
        return (
            Accel::Tcg,
            "/dev/kvm opens, but the CPU shows neither vmx nor svm: guests would hang on it".into(),
        );
    }
    match boots_on_kvm(qemu) {
        Ok(true) => (Accel::Kvm, "a probe guest ran on /dev/kvm".into()),
        Ok(false) => (Accel::Tcg, "/dev/kvm opens, but a probe guest did not run on it".into()),
        Err(error) => (Accel::Tcg, format!("/dev/kvm could not be probed: {error}")),
    }
}

fn has_virtualisation(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .is_some_and(|line| line.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

fn boots_on_kvm(qemu: &Qemu) -> Result<bool, Box<dyn std::error::Error>> {
    let path = std::env::temp_dir().join(format!("spinney-kvm-probe-{}", std::process::id()));
    let mut sector = [0u8; 512];
    for (to, from) in
        sector.iter_mut().zip(PROBE_CODE.iter().chain(std::iter::repeat_n(&0, 500)).chain(&[0x55, 0xAA]))
    {
        *to = *from;
    }
    fs::File::create_new(&path)?.write_all(&sector)?;
    let mut command = Command::new(&qemu.path);
    command.args(["-accel", "kvm", "-nodefaults", "-display", "none", "-no-reboot", "-m", "16"]);
    command.args(["-device", "isa-debug-exit", "-drive"]);
    command.arg(format!("if=ide,format=raw,readonly=on,file={}", path.display()));
    let ran = tool::run(command, PROBE_LIMIT);
    let _ = fs::remove_file(&path);
    Ok(ran.is_ok_and(|output| output.code == Some(PROBE_EXIT)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtualisation_is_a_whole_word_of_the_flags() {
        assert!(has_virtualisation("model name\t: x\nflags\t\t: fpu vmx sse\n"));
        assert!(has_virtualisation("flags\t\t: fpu svm\n"));
        assert!(!has_virtualisation("flags\t\t: fpu svm_lock\nbugs\t: vmx\n"));
        assert!(!has_virtualisation(""));
    }

    #[test]
    fn the_probe_code_is_shorter_than_the_sector_leaves_room_for() {
        assert_eq!(PROBE_CODE.len() + 500 + 2, 512);
    }
}
