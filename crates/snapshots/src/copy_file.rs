//! Copying a file with its holes: by reference where the file system can, else piece by piece, so that it can be called off.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;

/// What is copied between two questions whether to go on.
const PIECE: u64 = 8 << 20;

/// Copies a file to a new one and makes its content durable. `goes_on` is told how many bytes were copied since it was asked
/// last; an error of its ends the copying. On an error nothing is left of the new file.
pub(crate) fn copy_file<E: From<io::Error>>(
    from: &Path,
    to: &Path,
    goes_on: &mut dyn FnMut(u64) -> Result<(), E>,
) -> Result<(), E> {
    let source = File::open(from)?;
    let target = File::options().read(true).write(true).create_new(true).open(to)?;
    let copied = copy(&source, &target, goes_on).and_then(|()| Ok(target.sync_all()?));
    copied.inspect_err(|_| drop(std::fs::remove_file(to)))
}

fn copy<E: From<io::Error>>(
    from: &File,
    to: &File,
    goes_on: &mut dyn FnMut(u64) -> Result<(), E>,
) -> Result<(), E> {
    let length = from.metadata()?.len();
    goes_on(0)?;
    if ioctl_ficlone(to, from).is_ok() {
        return goes_on(length);
    }
    to.set_len(length)?;
    let mut at = 0;
    while at < length {
        let data = match seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => return goes_on(length - at),
            // A file system that knows no holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(error) => return Err(io::Error::from(error).into()),
        };
        let hole = seek(from, SeekFrom::Hole(data)).unwrap_or(length);
        goes_on(data.saturating_sub(at))?;
        at = data;
        while at < hole {
            let piece = usize::try_from((hole - at).min(PIECE)).unwrap_or(usize::MAX);
            let (mut read_at, mut write_at) = (at, at);
            let copied = match copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), piece) {
                Ok(copied) => copied as u64,
                Err(Errno::NOSYS | Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP) => {
                    by_hand(from, to, at, piece)?
                }
                Err(error) => return Err(io::Error::from(error).into()),
            };
            if copied == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            at += copied;
            goes_on(copied)?;
        }
    }
    Ok(())
}

/// Where the kernel does not copy for us.
fn by_hand(from: &File, to: &File, at: u64, piece: usize) -> io::Result<u64> {
    use std::os::unix::fs::FileExt;

    let mut bytes = vec![0; piece.min(1 << 20)];
    let read = from.read_at(&mut bytes, at)?;
    to.write_all_at(bytes.get(..read).unwrap_or_default(), at)?;
    Ok(read as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn a_file_is_copied_with_its_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        for at in [0, 20 << 20, (50 << 20) + 5] {
            file.write_all_at(&[7; 10_000], at).unwrap();
        }
        let mut bytes = 0;
        let mut count = |more| -> io::Result<()> {
            bytes += more;
            Ok(())
        };
        copy_file(&from, &to, &mut count).unwrap();
        assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(&to).unwrap());
        let blocks = std::fs::metadata(&to).unwrap().blocks();
        assert!(blocks * 512 < 1 << 20, "holes stay holes: {blocks} blocks");
        assert_eq!(bytes, 64 << 20);
        let again = copy_file(&from, &to, &mut |_| io::Result::Ok(())).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists, "nothing is written over");
    }

    #[test]
    fn what_is_called_off_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&from, vec![1; 1 << 20]).unwrap();
        let mut asked = 0;
        let off = copy_file(&from, &to, &mut |_| {
            asked += 1;
            if asked > 1 { Err(io::Error::from(io::ErrorKind::Interrupted)) } else { Ok(()) }
        });
        assert_eq!(off.unwrap_err().kind(), io::ErrorKind::Interrupted);
        assert!(!to.exists());
    }
}
