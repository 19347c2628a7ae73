//! The return path: the few bytes that a destination sends back to the source.
//!
//! As destination (taking a snapshot) Spinney answers with [`shut`]; as source (restoring) it reads QEMU's verdict with
//! [`read_return_message`].

use std::io::Read;

use super::codec::{Bytes, SliceReader};
use super::error::{Error, ErrorKind, Result};

/// Verdict of [`shut`] for a migration that is to be completed: the source stays stopped, its disks inactive.
pub const SHUT_OK: u32 = 0;
/// Verdict of [`shut`] for a migration that is rejected: the source re-activates its disks and runs on.
pub const SHUT_FAILED: u32 = 1;

const SHUT: u16 = 1;
const PONG: u16 = 2;
const REQ_PAGES_ID: u16 = 3;
const REQ_PAGES: u16 = 4;
const RESUME_ACK: u16 = 6;
const SWITCHOVER_ACK: u16 = 7;

/// Longest payload: REQ_PAGES_ID with a name of 255 bytes.
const MAX_PAYLOAD: u16 = 8 + 4 + 1 + 255;

/// What a destination says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReturnMessage {
    /// The end, with 0 for success.
    Shut(u32),
    /// Answer to a PING, with its value.
    Pong(u32),
    /// A guest waits for memory (postcopy): `length` bytes at `start` of `block`, or of the block named last.
    RequestPages {
        /// Byte offset in the block.
        start: u64,
        /// Bytes wanted.
        length: u32,
        /// Name of the block, if it is not that of the last request.
        block: Option<String>,
    },
    /// A paused postcopy may go on.
    ResumeAck(u32),
    /// The destination agrees to the switchover.
    SwitchoverAck,
}

/// The bytes of SHUT with a verdict, [`SHUT_OK`] or [`SHUT_FAILED`].
pub fn shut(verdict: u32) -> [u8; 8] {
    with_value(SHUT, verdict)
}

/// The bytes of the answer to a ping.
pub fn pong(value: u32) -> [u8; 8] {
    with_value(PONG, value)
}

/// The bytes of the consent to a switchover.
pub fn switchover_ack() -> [u8; 4] {
    let [a, b] = SWITCHOVER_ACK.to_be_bytes();
    [a, b, 0, 0]
}

/// Reads one message; none if the peer has closed before its first byte. Offsets in errors count from the message's
/// start. RECV_BITMAP, which only follows on a recovery that Spinney never begins, is refused.
pub fn read_return_message(input: &mut impl Read) -> Result<Option<ReturnMessage>> {
    let mut head = [0; 4];
    if fill(input, &mut head, 0)? == 0 {
        return Ok(None);
    }
    let mut reader = SliceReader::new(&head, 0);
    let id = reader.be16("a return-path message")?;
    let length = reader.be16("a return-path message's length")?;
    if length > MAX_PAYLOAD {
        let what = "a return-path message's length";
        let kind = ErrorKind::TooLarge { what, value: length.into(), limit: MAX_PAYLOAD.into() };
        return Err(Error::new(2, kind));
    }
    let mut payload = vec![0; usize::from(length)];
    if length > 0 && fill(input, &mut payload, 4)? == 0 {
        return Err(Error::new(4, ErrorKind::Truncated { what: "a return-path message" }));
    }

    let mut reader = SliceReader::new(&payload, 4);
    let message = match id {
        SHUT => ReturnMessage::Shut(reader.be32("the verdict")?),
        PONG => ReturnMessage::Pong(reader.be32("a pong's value")?),
        REQ_PAGES | REQ_PAGES_ID => {
            let start = reader.be64("the start of requested pages")?;
            let length = reader.be32("the length of requested pages")?;
            let block = match id {
                REQ_PAGES_ID => Some(reader.str8("the block of requested pages")?),
                _ => None,
            };
            ReturnMessage::RequestPages { start, length, block }
        }
        RESUME_ACK => ReturnMessage::ResumeAck(reader.be32("the resume value")?),
        SWITCHOVER_ACK => ReturnMessage::SwitchoverAck,
        other => return Err(Error::new(0, ErrorKind::ReturnMessage(other))),
    };
    reader.end("a return-path message")?;
    Ok(Some(message))
}

fn with_value(id: u16, value: u32) -> [u8; 8] {
    let ([a, b], [c, d, e, f]) = (id.to_be_bytes(), value.to_be_bytes());
    [a, b, 0, 4, c, d, e, f]
}

/// Fills `out`. Returns 0 if the input is over before its first byte, and fails if it is over later.
fn fill(input: &mut impl Read, out: &mut [u8], base: u64) -> Result<usize> {
    let mut done = 0;
    while let Some(free) = out.get_mut(done..).filter(|free| !free.is_empty()) {
        let at = base + done as u64;
        match input.read(free) {
            Ok(0) if done == 0 => return Ok(0),
            Ok(0) => return Err(Error::new(at, ErrorKind::Truncated { what: "a return-path message" })),
            Ok(count) => done += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::new(at, ErrorKind::Read(error))),
        }
    }
    Ok(done)
}
