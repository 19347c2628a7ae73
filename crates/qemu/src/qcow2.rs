//! What QEMU does not say of a qcow2 file. Whether it has been cut off: QEMU reads zeros behind the end of a file, and a guest would find
//! its disk with holes. Whether its data lies in another file: `qemu-img map` gives offsets all the same. The format is QEMU's
//! `docs/interop/qcow2.txt`; integers are big-endian.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The fields of the header up to the refcount table.
const HEADER: usize = 72;
const MAGIC: &[u8; 4] = b"QFI\xfb";
/// Where the tables of an entry lie.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// A compressed cluster: its offset is of another form.
const COMPRESSED: u64 = 1 << 62;
/// Reads as zeros, whatever lies there.
const ZERO: u64 = 1;
/// The fields up to the incompatible features, which version 3 has.
const FEATURES: usize = 80;
/// Incompatible features with which data lies in the file, where its tables say: closed without being written back, found corrupt, another
/// compression, subclusters. The one that is left out is the external data file.
const DATA_INSIDE: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 4;
/// Largest table of tables that is believed: for 64 TiB in clusters of 64 KiB it has 1 MiB.
const L1_LIMIT: u64 = 32 << 20;

/// What of the image lies behind the end of its file, in words; none if all of it is there. Reads its tables, not its data.
///
/// # Errors
/// It cannot be read.
pub fn is_cut(path: &Path) -> io::Result<Option<&'static str>> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut header = [0; HEADER];
    if len < HEADER as u64 {
        return Ok(Some("its header"));
    }
    file.read_exact_at(&mut header, 0)?;
    let field = |at: usize, bytes: usize| {
        header
            .get(at..at + bytes)
            .unwrap_or_default()
            .iter()
            .fold(0u64, |sum, byte| sum << 8 | u64::from(*byte))
    };
    let (bits, entries, l1, refcounts) = (field(20, 4), field(36, 4), field(40, 8), field(48, 8));
    if header.first_chunk() != Some(MAGIC) || !(9..=21).contains(&bits) || entries * 8 > L1_LIMIT {
        return Ok(Some("a header of the format"));
    }
    let cluster = 1u64 << bits;
    if refcounts >= len || l1.saturating_add(entries * 8) > len {
        return Ok(Some("one of its tables"));
    }
    let mut table = vec![0; cluster as usize];
    let mut first = vec![0; (entries * 8) as usize];
    file.read_exact_at(&mut first, l1)?;
    for l2 in words(&first).map(|entry| entry & OFFSET).filter(|offset| *offset != 0) {
        if l2.saturating_add(cluster) > len {
            return Ok(Some("one of its tables"));
        }
        file.read_exact_at(&mut table, l2)?;
        let data = words(&table).filter(|entry| entry & (COMPRESSED | ZERO) == 0).map(|entry| entry & OFFSET);
        if data.max().is_some_and(|offset| offset >= len) {
            return Ok(Some("data"));
        }
    }
    Ok(None)
}

/// True if the image's data lies in its own file, where `qemu-img map` says. False where that is not known: with an external data file, or a
/// feature that we do not know.
///
/// # Errors
/// It cannot be read, or ends within its header.
pub fn has_own_data(file: &File) -> io::Result<bool> {
    let mut header = [0; FEATURES];
    file.read_exact_at(&mut header, 0)?;
    let [magic, version] =
        [0, 4].map(|at| header.get(at..).and_then(<[u8]>::first_chunk).copied().unwrap_or_default());
    let features = header.last_chunk().copied().map_or(u64::MAX, u64::from_be_bytes);
    Ok(magic == *MAGIC
        && match u32::from_be_bytes(version) {
            2 => true,
            3 => features & !DATA_INSIDE == 0,
            _ => false,
        })
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::QemuImg;
    use std::process::Command;

    /// An image with data in it.
    fn make(path: &Path) -> u64 {
        QemuImg::find(None, None).unwrap().create(path, 64 << 20, None).unwrap();
        assert_eq!(is_cut(path).unwrap(), None, "empty");
        for command in ["write -P 7 0 256k", "write -P 8 30M 64k", "write -z 40M 128k"] {
            let done =
                Command::new("qemu-io").args(["-f", "qcow2", "-c", command]).arg(path).output().unwrap();
            assert!(done.status.success(), "{done:?}");
        }
        path.metadata().unwrap().len()
    }

    #[test]
    fn where_data_lies_is_told_from_the_header() {
        let dir = tempfile::tempdir().unwrap();
        let own = |options: &str| {
            let path = dir.path().join("a.qcow2");
            let mut create = Command::new("qemu-img");
            create.args(["create", "-q", "-f", "qcow2", "-o", options]).arg(&path).arg("1M");
            assert!(create.status().unwrap().success(), "{options}");
            has_own_data(&File::open(path).unwrap()).unwrap()
        };
        for inside in
            ["compat=0.10", "compat=1.1,lazy_refcounts=on", "compression_type=zstd", "extended_l2=on"]
        {
            assert!(own(inside), "{inside}");
        }
        let data = dir.path().join("data").display().to_string();
        for outside in [format!("data_file={data}"), format!("data_file={data},data_file_raw=on")] {
            assert!(!own(&outside), "{outside}");
        }
        let path = dir.path().join("b.qcow2");
        make(&path);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        for (at, byte) in [(79, 1 << 5), (72, 1), (7, 4), (0, 0)] {
            let mut before = [0];
            file.read_exact_at(&mut before, at).unwrap();
            assert!(has_own_data(&file).unwrap());
            file.write_all_at(&[byte], at).unwrap();
            assert!(!has_own_data(&file).unwrap(), "byte {at}");
            file.write_all_at(&before, at).unwrap();
        }
        file.set_len(79).unwrap();
        assert!(has_own_data(&file).is_err());
    }

    #[test]
    fn every_cut_that_costs_something_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        let len = make(&path);
        assert_eq!(is_cut(&path).unwrap(), None);
        for kept in [0, 50, 1000, 65_536, len / 2, len - 65_536 * 2] {
            std::fs::remove_file(&path).unwrap();
            make(&path);
            std::fs::File::options().write(true).open(&path).unwrap().set_len(kept).unwrap();
            assert!(is_cut(&path).unwrap().is_some(), "{kept} of {len}");
        }
    }
}
