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
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Result of an engine call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of a class, with its sentence.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, in_the_way: false, source: None }
    }

    /// Adds what the reader can do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
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
