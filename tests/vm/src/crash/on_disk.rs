//! The log on the disk of a machine that is off, read from outside.

use std::fs;
use std::path::{Path, PathBuf};

use crate::harness::{Spinney, tool};
use crate::walk::Violation;

/// Bytes of an entry: sixteen hex digits of its number, a space, a checksum of fourteen, a line feed.
const ENTRY: usize = 32;

/// The number of the last entry of the log on the disk of a machine that is off. The image and its file system must be sound. The
/// machine is started for it and killed before it gets to its disk: its QEMU has the layer open that here writes to.
pub(super) fn log_on_disk(spinney: &Spinney, machine: &str) -> Result<u64, Violation> {
    let pid = spinney.ok(&format!("start {machine}"))?["pid"].as_u64().unwrap_or_default();
    let active = written_by(pid);
    spinney.ok(&format!("kill {machine}"))?;
    let [active] = active.as_slice() else {
        return Err(Violation::Wrong(format!("{machine} should write to one layer, not to {active:?}")));
    };
    last_entry(active, spinney.folder())
}

/// The images that a process may write to.
fn written_by(pid: u64) -> Vec<PathBuf> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let writable = entries.filter(|entry| {
        let info = format!("/proc/{pid}/fdinfo/{}", entry.file_name().to_string_lossy());
        let info = fs::read_to_string(info).unwrap_or_default();
        let flags =
            info.lines().find_map(|line| u32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok());
        flags.is_some_and(|flags| flags & 3 == 2)
    });
    let mut files: Vec<PathBuf> = writable.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "qcow2"));
    files.sort();
    files.dedup();
    files
}

fn last_entry(layer: &Path, scratch: &Path) -> Result<u64, Violation> {
    let (flat, log) = (scratch.join("flat.raw"), scratch.join("flat.log"));
    let _ = fs::remove_file(&log);
    let [layer, flat, log] = [layer, &flat, &log].map(|path| path.display().to_string());
    let dump = format!("dump /log {log}");
    // As every mount does it: the journal, and nothing that only a repair would do.
    let looks: [(&str, &[&str], &[i32]); 4] = [
        ("qemu-img", &["check", "-q", "-f", "qcow2", &layer], &[0, 3]),
        ("qemu-img", &["convert", "-O", "raw", &layer, &flat], &[0]),
        ("/sbin/e2fsck", &["-fp", &flat], &[0, 1]),
        ("/sbin/debugfs", &["-R", &dump, &flat], &[0]),
    ];
    for (program, words, good) in looks {
        let output = tool(program, words);
        if output.status.code().is_none_or(|code| !good.contains(&code)) {
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            return Err(Violation::Wrong(format!("{layer}: {program}: {} {}", output.status, said.trim())));
        }
    }
    let bytes = fs::read(&log).unwrap_or_default();
    let _ = fs::remove_file(&flat);
    let number = |entry: &[u8]| u64::from_str_radix(std::str::from_utf8(entry.get(..16)?).ok()?, 16).ok();
    // An entry that was under way may be there in part.
    let whole =
        bytes.chunks_exact(ENTRY).zip(1..).take_while(|(entry, at)| number(entry) == Some(*at)).count();
    Ok(whole as u64)
}
