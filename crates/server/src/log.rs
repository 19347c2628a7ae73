//! The daemon's log: one file in the state folder, cut at start when it has grown.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::MakeWriterExt;

/// Bytes above which the log begins anew.
const LIMIT: u64 = 10 << 20;

/// Path of the log.
pub(crate) fn path(state: &Path) -> PathBuf {
    state.join("daemon.log")
}

/// Opens the log for appending; empties it first if it is over [`LIMIT`].
pub(crate) fn open(state: &Path) -> io::Result<File> {
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path(state))?;
    if file.metadata()?.len() > LIMIT {
        file.set_len(0)?;
    }
    Ok(file)
}

/// Sends tracing's events to the log, and to stderr as well if somebody looks at it. `SPINNEY_LOG` filters them in the
/// syntax of `RUST_LOG`.
pub(crate) fn start(file: File, stderr: bool) {
    let filter = EnvFilter::try_from_env("SPINNEY_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // A log that cannot be written to, for want of room, is no reason for anything to fail: to say so on stderr, which is the same
    // file, would end the thread that has something to say.
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).log_internal_errors(false);
    let file = Arc::new(file);
    // A second daemon in one process (tests) keeps the first one's log.
    let _ = if stderr {
        builder.with_writer(file.and(io::stderr)).try_init()
    } else {
        builder.with_writer(file).try_init()
    };
}

/// Sends tracing's events to stderr, which is the daemon's log: for the daemon's helpers.
pub fn start_helper() {
    let filter = EnvFilter::try_from_env("SPINNEY_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).log_internal_errors(false);
    let _ = builder.with_writer(io::stderr).try_init();
}

/// What was written from byte `from` on, the last `lines` lines of it; empty if there is no log.
pub(crate) fn tail(state: &Path, from: u64, lines: usize) -> Vec<String> {
    let Ok(bytes) = std::fs::read(path(state)) else { return Vec::new() };
    let from = usize::try_from(from).ok().filter(|from| *from <= bytes.len()).unwrap_or(0);
    let text = String::from_utf8_lossy(bytes.get(from..).unwrap_or_default()).into_owned();
    let all: Vec<&str> = text.lines().collect();
    all.iter().skip(all.len().saturating_sub(lines)).map(|line| (*line).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_grown_log_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        open(folder.path()).unwrap().set_len(LIMIT + 1).unwrap();
        assert_eq!(open(folder.path()).unwrap().metadata().unwrap().len(), 0);
    }

    #[test]
    fn the_tail_starts_where_it_is_told() {
        let folder = tempfile::tempdir().unwrap();
        open(folder.path()).unwrap().write_all(b"old\none\ntwo\nthree\n").unwrap();
        assert_eq!(tail(folder.path(), 4, 2), ["two", "three"]);
        assert_eq!(tail(folder.path(), 4, 9), ["one", "two", "three"]);
        assert_eq!(tail(folder.path(), 1000, 1), ["three"]);
    }
}
