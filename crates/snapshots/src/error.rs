//! One error type for everything that can happen to a target, with the class that decides exit code and HTTP status.

use std::fmt;

/// Class of an error: what a caller can decide on. Exit codes and HTTP statuses are derived from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// It failed for a reason that fits no other class (exit 1).
    Failed,
    /// The request makes no sense (exit 2).
    Usage,
    /// No such target, snapshot, operation (exit 3).
    NotFound,
    /// Protected, name taken, in use (exit 4).
    Refused,
    /// Something needed is missing: QEMU, a device that can be migrated (exit 5).
    Precondition,
    /// Stored data is damaged (exit 6).
    Damaged,
    /// No space (exit 7).
    NoSpace,
    /// Not permitted (exit 8).
    NotPermitted,
    /// Timed out; rolled back (exit 9).
    TimedOut,
    /// Cancelled by the user; rolled back (exit 130).
    Interrupted,
}

/// An error as people meet it: one sentence that names the thing, its causes, and what can be done.
#[derive(Debug)]
pub struct Error {
    code: Code,
    message: String,
    hint: Option<String>,
    in_the_way: bool,
    /// A full disk was found to be the cause: a hint that was meant for another one does not help.
    full: bool,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// What can be done about a full disk.
pub(crate) const MAKE_ROOM: &str = "make room on that disk and try again: `spinney du` shows what takes it, `spinney rm` and `spinney gc --now` \
     work on a full disk too";

/// Result of an engine call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of a class, with its sentence.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, in_the_way: false, full: false, source: None }
    }

    /// Adds what the reader can do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        if !self.full {
            self.hint = Some(hint.into());
        }
        self
    }

    /// Adds the cause. A full disk makes what failed for no known reason a [`Code::NoSpace`], wherever below it is said: by the
    /// system, by SQLite, in the words of QEMU or `qemu-img`.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        let source = source.into();
        let vague = matches!(self.code, Code::Failed | Code::Precondition | Code::NotPermitted);
        if vague && is_full(source.as_ref()) {
            self.code = Code::NoSpace;
            self.full = true;
            self.hint = Some(MAKE_ROOM.to_owned());
        } else if self.code == Code::NoSpace {
            self.hint.get_or_insert_with(|| MAKE_ROOM.to_owned());
        }
        self.source = Some(source);
        self
    }

    /// Notes that another running machine may be all that is in the way.
    pub(crate) fn in_the_way(mut self) -> Self {
        self.in_the_way = true;
        self
    }

    /// True if it may be that only another running machine is in the way.
    pub(crate) fn is_in_the_way(&self) -> bool {
        self.in_the_way
    }

    /// Its class.
    pub fn code(&self) -> Code {
        self.code
    }

    /// What the reader can do, if anything.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The causes below the sentence, outermost first.
    pub fn causes(&self) -> Vec<String> {
        let mut out = Vec::new();
        let mut next = std::error::Error::source(self);
        while let Some(error) = next {
            out.push(error.to_string());
            next = error.source();
        }
        out
    }
}

/// True if an error, or a cause of it, is that a disk or the user's share of it is full.
fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let words = error.to_string();
        // The system's words, which QEMU repeats; and SQLite's.
        let full = ["No space left on device", "Disk quota exceeded", "database or disk is full"];
        if full.iter().any(|full| words.contains(full)) {
            return true;
        }
        next = error.source();
    }
    false
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as &(dyn std::error::Error + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_found_wherever_it_is_said() {
        let system = || std::io::Error::from_raw_os_error(28);
        let deep = Error::new(Code::Failed, "an inner thing").because(system());
        let sqlite = rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(13), None);
        for error in [
            Error::new(Code::Failed, "x").because(system()),
            Error::new(Code::Precondition, "x").because(std::io::Error::from_raw_os_error(122)),
            Error::new(Code::Failed, "x").because(deep),
            Error::new(Code::Failed, "x").because(sqlite),
            Error::new(Code::Failed, "x").because("qemu-img: y: No space left on device"),
        ] {
            let error = error.hint("look at the QEMU arguments");
            assert_eq!((error.code(), error.hint_text()), (Code::NoSpace, Some(MAKE_ROOM)), "{error:?}");
        }
        let other = Error::new(Code::Failed, "x").because(std::io::Error::from_raw_os_error(2)).hint("h");
        assert_eq!((other.code(), other.hint_text()), (Code::Failed, Some("h")));
        let damaged = Error::new(Code::Damaged, "x").because(system());
        assert_eq!(damaged.code(), Code::Damaged, "what is known is not made less of");
    }
}
