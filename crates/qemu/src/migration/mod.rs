//! QEMU's migration stream: a reader that takes a machine's state out of it, a writer that puts one back.
//!
//! Bytes only: everything works on [`std::io::Read`] and [`std::io::Write`]. No sockets, no monitor, no clock; deadlines
//! are the caller's, who owns the socket. What is read, written and refused, and why: `docs/formats/migration-stream.md`.
//!
//! ```text
//!   QEMU -> read_stream -> Sink (pages, as they come)        DeviceState -> RestoreStream -> QEMU
//!                       -> DeviceState (everything else)     pages       ->
//! ```
//!
//! Every byte read here was written by someone else: by QEMU on behalf of a guest, or long ago to a disk. All of it goes
//! through `codec::Bytes`, lengths are checked against a named limit before memory is taken, and nothing panics.

mod codec;
mod description;
mod device_state;
mod error;
mod header;
mod ram;
mod reader;
mod return_path;
mod source;
mod tail;
#[cfg(test)]
mod tests;
mod writer;

pub(crate) use description::FOOTER;
pub use description::{DeviceSection, MAX_DESCRIPTION_BYTES};
pub use device_state::DeviceState;
pub use error::{Error, ErrorKind, Result, SinkError};
pub use header::{MAX_CAPABILITIES, MAX_MACHINE_NAME, StreamHeader};
pub use ram::{MAX_BLOCKS, MAX_RAM_BYTES, PAGE_SIZE, RamBlock, RamBlocks};
pub use reader::{Counts, Finished, Sink, read_stream};
pub use return_path::{ReturnMessage, SHUT_FAILED, SHUT_OK, pong, read_return_message, shut, switchover_ack};
pub use tail::{DeviceTail, MAX_TAIL_BYTES};
pub use writer::{RestoreStream, WriteError};
