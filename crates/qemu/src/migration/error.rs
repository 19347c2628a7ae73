//! What can be wrong with a stream, each error with the byte at which it was found.

use std::fmt;

/// Result of reading migration bytes.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a [`Sink`](super::Sink) fails with; handed through unchanged.
pub type SinkError = Box<dyn std::error::Error + Send + Sync>;

/// Why a stream, a return-path message or a stored device state could not be read.
#[derive(Debug)]
pub struct Error {
    /// Bytes of input before the thing that is wrong.
    pub offset: u64,
    /// What is wrong with it.
    pub kind: ErrorKind,
}

impl Error {
    pub(super) fn new(offset: u64, kind: ErrorKind) -> Self {
        Self { offset, kind }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (byte {} of the input)", self.kind, self.offset)
    }
}

impl std::error::Error for Error {
    // The kind is part of the message already, so the chain goes on below it.
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&self.kind)
    }
}

/// What is wrong. First what happens around the bytes, then bytes that break the format, then features that are
/// legal in QEMU and refused here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system could not read the input.
    #[error("cannot read the migration bytes")]
    Read(#[source] std::io::Error),
    /// The input is over inside something.
    #[error("the input ends inside {what}")]
    Truncated {
        /// The thing that was being read.
        what: &'static str,
    },
    /// The receiver of the pages failed.
    #[error("the receiver of the pages failed")]
    Sink(#[source] SinkError),

    /// A length or a count is above its limit; nothing was allocated for it.
    #[error("{what} is {value}, above the limit of {limit}")]
    TooLarge {
        /// The thing that is too large.
        what: &'static str,
        /// The number found.
        value: u64,
        /// The largest number taken.
        limit: u64,
    },
    /// A name is not UTF-8.
    #[error("{what} is not UTF-8")]
    NotUtf8 {
        /// The name that was being read.
        what: &'static str,
    },
    /// A field holds something else than the one value it may have there.
    #[error("{what} is {found:#x}, not {expected:#x}")]
    Unexpected {
        /// The field.
        what: &'static str,
        /// The value found.
        found: u64,
        /// The value it must have.
        expected: u64,
    },
    /// Bytes follow where the input should be over.
    #[error("{count} bytes follow after the end of {what}")]
    Trailing {
        /// The thing that was complete.
        what: &'static str,
        /// Bytes left over.
        count: u64,
    },
    /// The configuration section has a subsection that is not known, so its end is not known either.
    #[error("unknown or repeated configuration subsection {0:?}")]
    ConfigurationSubsection(String),
    /// A byte that starts no element, or an element in a place where it makes no sense.
    #[error("{what} {place}")]
    Misplaced {
        /// The element: "SECTION_PART", "element 0x99".
        what: String,
        /// The place: "before the RAM block list".
        place: &'static str,
    },
    /// The RAM blocks contradict themselves or a limit.
    #[error("RAM block {name:?} {problem}")]
    Block {
        /// Name of the block.
        name: String,
        /// What is wrong with it, as the rest of a sentence.
        problem: &'static str,
    },
    /// The lengths of the blocks do not add up to the announced total.
    #[error("the RAM blocks have {sum} bytes, {total} were announced")]
    BlockTotal {
        /// Sum of the lengths, in bytes.
        sum: u64,
        /// Bytes announced.
        total: u64,
    },
    /// A page of a block that is not in the list.
    #[error("a page of unknown RAM block {0:?}")]
    UnknownBlock(String),
    /// CONTINUE before any page named its block.
    #[error("a page record goes on in the previous block, and there is none")]
    NoPreviousBlock,
    /// A page that starts beyond its block.
    #[error("a page at {page:#x} of RAM block {name:?}, which has {length:#x} bytes")]
    PageOutOfRange {
        /// Name of the block.
        name: String,
        /// Byte offset of the page in it.
        page: u64,
        /// Bytes of the block.
        length: u64,
    },
    /// A page record with flags that no QEMU sends together, or that are not known.
    #[error("unknown page record, flags {0:#x}")]
    Flags(u64),
    /// The JSON at the end of the stream does not have the shape QEMU gives it.
    #[error("the description of the device state is not understood")]
    Description(#[source] serde_json::Error),
    /// The device state is not what the description at its end says.
    #[error("device section {name:?}: {problem}")]
    Section {
        /// Name of the section, from the description.
        name: String,
        /// What is wrong with it, as a sentence.
        problem: &'static str,
    },

    /// Not the beginning of a migration stream.
    #[error("no migration stream: it starts with {0:#010x}")]
    Magic(u32),
    /// A stream version other than 3, or a device state of a later Spinney.
    #[error("version {found} of {what}; known is {known}")]
    Version {
        /// What has the version.
        what: &'static str,
        /// The version found.
        found: u32,
        /// The one understood.
        known: u32,
    },
    /// A capability that changes the layout of the stream.
    #[error("capability {0:?} is on at the sender; switch it off before migrating")]
    Capability(String),
    /// A stream in pages of another size.
    #[error("the guest's pages have 2^{0} bytes; only 4,096 are supported")]
    PageBits(u32),
    /// A device that sends state in several parts.
    #[error("section {name:?} cannot be part of a snapshot: {reason}")]
    Iterable {
        /// Its name.
        name: String,
        /// Why not, and what to do.
        reason: &'static str,
    },
    /// Device state ahead of RAM.
    #[error("device {0:?} sends state before RAM (virtio-mem does); such machines are not supported")]
    EarlyDeviceState(String),
    /// A command that has no place in a precopy stream.
    #[error("command {id} ({name}) is not supported; switch postcopy and COLO capabilities off")]
    Command {
        /// Its number.
        id: u16,
        /// QEMU's name for it.
        name: &'static str,
    },
    /// A page as a difference to the one sent before.
    #[error("a page in XBZRLE encoding; switch capability xbzrle off")]
    Xbzrle,
    /// A compressed page.
    #[error("a compressed page; switch capability compress off")]
    CompressedPage,
    /// RDMA's hook into the stream.
    #[error("an RDMA hook; migrate over a socket")]
    RdmaHook,
    /// Pages travel on channels of their own.
    #[error("a multifd flush; switch capability multifd off")]
    Multifd,
    /// A message that only a postcopy recovery may bring.
    #[error("return-path message {0} is not supported")]
    ReturnMessage(u16),
}
