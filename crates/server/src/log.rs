//! The daemon's log: one file in the state folder, cut at start when it has grown.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
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
    start_on(io::stderr);
}

/// The same for a helper that may outlive daemons, with a log of its own: that begins anew whenever it has grown.
pub fn start_lasting_helper() {
    start_on(|| Lasting);
}

fn start_on(writer: impl for<'a> MakeWriter<'a> + Send + Sync + 'static) {
    let filter = EnvFilter::try_from_env("SPINNEY_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).log_internal_errors(false);
    let _ = builder.with_writer(writer).try_init();
}

/// Bytes above which a helper's own log begins anew.
const OWN_LIMIT: u64 = 4 << 20;
/// After so many bytes its length is looked at: others write to it as well.
const LOOK_AFTER: u64 = 64 << 10;

/// Stderr, if that is a file of which somebody has to see that it does not grow for ever.
struct Lasting;

impl Write for Lasting {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        static WRITTEN: AtomicU64 = AtomicU64::new(LOOK_AFTER);
        if WRITTEN.fetch_add(bytes.len() as u64, Ordering::Relaxed) >= LOOK_AFTER {
            WRITTEN.store(0, Ordering::Relaxed);
            // A log that cannot be cut is no reason not to write to it.
            let _ = io::stderr().as_fd().try_clone_to_owned().and_then(|file| cut(&File::from(file)));
        }
        io::stderr().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Empties a helper's log if it has grown. All who write to it do so at its end.
fn cut(log: &File) -> io::Result<()> {
    let meta = log.metadata()?;
    if meta.is_file() && meta.len() > OWN_LIMIT { log.set_len(0) } else { Ok(()) }
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
    use super::*;

    #[test]
    fn a_grown_log_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        open(folder.path()).unwrap().set_len(LIMIT + 1).unwrap();
        assert_eq!(open(folder.path()).unwrap().metadata().unwrap().len(), 0);
    }

    #[test]
    fn a_helpers_log_begins_anew_when_it_has_grown() {
        let file = tempfile::tempfile().unwrap();
        for (before, after) in [(OWN_LIMIT, OWN_LIMIT), (OWN_LIMIT + 1, 0)] {
            file.set_len(before).unwrap();
            cut(&file).unwrap();
            assert_eq!(file.metadata().unwrap().len(), after);
        }
        cut(&File::options().write(true).open("/dev/null").unwrap()).unwrap();
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
