//! Disk layers of machines that are off, looked at with other people's tools.

use std::path::{Path, PathBuf};

use crate::harness::tool;

/// Checks that every layer is a sound image, and that what it shows to a guest is a sound file system. Returns what is
/// wrong, one line each. Nothing may be writing to the layers. `scratch` is a folder for copies.
///
/// The disk of a snapshot of a running machine is what a disk is after a power cut: its journal waits to be replayed.
/// `e2fsck -fn` would report that as damage, and `-fy` would mend real damage. So a copy gets `-fp`, which does what
/// every mount does (journal, orphans, counters) and stops at anything else with exit code 4; after that `-fn` must find
/// nothing.
pub fn wrong_layers(layers: &[PathBuf], scratch: &Path) -> Vec<String> {
    let mut wrong = Vec::new();
    for layer in layers {
        let name = layer.display().to_string();
        let mut expect = |what: &str, program: &str, words: &[&str], good: &[i32]| {
            let output = tool(program, words);
            if output.status.code().is_none_or(|code| !good.contains(&code)) {
                let (out, err) =
                    (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
                wrong.push(format!("{name}: {what}: {} {} {}", output.status, out.trim(), err.trim()));
            }
        };
        let flat = scratch.join("flat.raw").display().to_string();
        expect("the image", "qemu-img", &["check", "-q", "-f", "qcow2", &name], &[0]);
        expect("flattening", "qemu-img", &["convert", "-O", "raw", &name, &flat], &[0]);
        expect("the file system", "/sbin/e2fsck", &["-fp", &flat], &[0, 1]);
        expect("the file system after its journal", "/sbin/e2fsck", &["-fn", &flat], &[0]);
        let _ = std::fs::remove_file(&flat);
    }
    wrong
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_torn_file_system_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let (raw, layer) = (folder.path().join("raw"), folder.path().join("layer.qcow2"));
        let shown = |path: &Path| path.display().to_string();
        File::create(&raw).unwrap().set_len(8 << 20).unwrap();
        tool("/sbin/mke2fs", ["-q", "-t", "ext4", &shown(&raw)]);
        let convert =
            || tool("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", &shown(&raw), &shown(&layer)]);
        convert();
        assert_eq!(wrong_layers(std::slice::from_ref(&layer), folder.path()), [""; 0]);
        // The inode table of the first group lies somewhere in here.
        let file = File::options().write(true).open(&raw).unwrap();
        (8..64).for_each(|block| file.write_all_at(&[0x5A; 1024], block * 1024).unwrap());
        convert();
        assert!(!wrong_layers(&[layer], folder.path()).is_empty());
    }
}
