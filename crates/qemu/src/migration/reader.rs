//! Reading a precopy (or background-snapshot) stream from its first byte to its last.
//!
//! ```text
//!   header  [command]*  START(ram)  PART(ram)*  [command]*  END(ram)?  FULL*  EOF  VMDESCRIPTION
//!                       `- blocks   `- pages ----------------------'   `- device tail --------'
//! ```
//! RAM is understood record by record; the device tail is kept as it is (see `tail.rs`). A background-snapshot has no
//! END(ram).

use std::io::Read;

use super::codec::Bytes;
use super::description::{EOF, FOOTER, SECTION_FULL};
use super::device_state::DeviceState;
use super::error::{Error, ErrorKind, Result, SinkError};
use super::header::StreamHeader;
use super::ram::{PAGE_SIZE, PageRecords, RamBlock, read_start};
use super::source::StreamReader;
use super::tail::{DeviceTail, VMDESCRIPTION};

pub(super) const SECTION_START: u8 = 0x01;
pub(super) const SECTION_PART: u8 = 0x02;
pub(super) const SECTION_END: u8 = 0x03;
const COMMAND: u8 = 0x08;

/// Version of the RAM section that every QEMU since 0.14 writes.
pub(super) const RAM_VERSION: u32 = 4;
/// Log2 of [`PAGE_SIZE`].
const PAGE_BITS: u32 = PAGE_SIZE.trailing_zeros();

/// Receives memory as it arrives. An error ends the reading and comes back as [`ErrorKind::Sink`].
///
/// A page that the guest writes during a live migration comes again, and the last copy is the right one.
pub trait Sink {
    /// The blocks of memory; called once, before any page. `page` and `zero` count blocks in this order.
    fn blocks(&mut self, blocks: &[RamBlock]) -> Result<(), SinkError>;

    /// A page of block `block`, `offset` bytes into it. The slice lies in the reader's buffer: copying it to where it
    /// is collected is the only copy after the kernel's. Pages that follow each other in memory mostly come in order.
    fn page(&mut self, block: usize, offset: u64, bytes: &[u8; PAGE_SIZE]) -> Result<(), SinkError>;

    /// A page of zero bytes.
    fn zero(&mut self, block: usize, offset: u64) -> Result<(), SinkError>;

    /// No page will follow; the device state comes now. Called once, at the end of RAM or, in a background-snapshot,
    /// where the first device begins.
    fn ram_end(&mut self) -> Result<(), SinkError> {
        Ok(())
    }

    /// QEMU asks for an answer on the return path ([`super::pong`]). It does not wait for one in precopy.
    fn ping(&mut self, value: u32) -> Result<(), SinkError> {
        let _ = value;
        Ok(())
    }
}

/// How much a stream had of what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Page records with bytes, repeats included.
    pub pages: u64,
    /// Zero page records, repeats included.
    pub zero_pages: u64,
    /// Bytes of the whole stream.
    pub bytes: u64,
}

/// What a stream held besides its pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// All that is needed, with the pages, to restore the machine.
    pub state: DeviceState,
    /// Statistics.
    pub counts: Counts,
}

/// Reads one stream up to the last byte of its description, and not beyond: with a return path, QEMU holds the socket
/// open and waits for an answer then ([`super::shut`]). Without one it just closes.
///
/// Fails at the first byte that is not understood, with its offset; what was handed to `sink` by then is worthless.
/// There is no time-out here: a socket's reads fail with one if it was set, as [`ErrorKind::Read`].
pub fn read_stream(input: impl Read, sink: &mut dyn Sink) -> Result<Finished> {
    let mut input = StreamReader::new(input);
    let header = read_header(&mut input)?;
    let mut counts = Counts::default();

    let ram_section = find_ram(&mut input, sink)?;
    let blocks = read_start(&mut input)?;
    read_footer(&mut input, ram_section)?;
    let at = input.offset();
    sink.blocks(&blocks).map_err(|e| Error::new(at, ErrorKind::Sink(e)))?;

    let mut records = PageRecords::new(blocks);
    let mut ended = false;
    loop {
        let at = input.offset();
        match input.u8("the next section")? {
            part @ (SECTION_PART | SECTION_END) if !ended => {
                input.expect_be32(ram_section, "the RAM section's id")?;
                records.read(&mut input, sink, &mut counts)?;
                read_footer(&mut input, ram_section)?;
                ended = part == SECTION_END;
            }
            COMMAND => read_command(&mut input, sink)?,
            SECTION_FULL => break,
            other => return Err(misplaced(&mut input, at, other, "between RAM and the device state")),
        }
    }
    let at = input.offset();
    sink.ram_end().map_err(|e| Error::new(at, ErrorKind::Sink(e)))?;

    let tail = DeviceTail::collect(&mut input)?;
    counts.bytes = input.offset();
    Ok(Finished { state: DeviceState { header, blocks: records.into_blocks(), ram_section, tail }, counts })
}

fn read_header(input: &mut impl Bytes) -> Result<StreamHeader> {
    let header = StreamHeader::read(input)?;
    if let Some(name) = header.capabilities().first() {
        return Err(Error::new(input.offset(), ErrorKind::Capability(name.clone())));
    }
    match header.page_bits() {
        None | Some(PAGE_BITS) => Ok(header),
        Some(bits) => Err(Error::new(input.offset(), ErrorKind::PageBits(bits))),
    }
}

/// Reads up to the payload of START(ram), and returns its section id.
fn find_ram(input: &mut impl Bytes, sink: &mut dyn Sink) -> Result<u32> {
    loop {
        let at = input.offset();
        match input.u8("the first section")? {
            COMMAND => read_command(input, sink)?,
            SECTION_START => {
                let (id, name) = read_section_name(input)?;
                if name != "ram" {
                    return Err(Error::new(at, iterable(name)));
                }
                input.expect_be32(0, "the RAM section's instance")?;
                input.expect_be32(RAM_VERSION, "the RAM section's version")?;
                return Ok(id);
            }
            SECTION_FULL => {
                let (_, name) = read_section_name(input)?;
                return Err(Error::new(at, ErrorKind::EarlyDeviceState(name)));
            }
            other => return Err(misplaced(input, at, other, "before the RAM section")),
        }
    }
}

fn read_section_name(input: &mut impl Bytes) -> Result<(u32, String)> {
    let id = input.be32("a section's id")?;
    Ok((id, input.str8("a section's name")?))
}

fn read_footer(input: &mut impl Bytes, id: u32) -> Result<()> {
    input.expect_u8(FOOTER, "the RAM section's footer")?;
    input.expect_be32(id, "the section id in the RAM section's footer")
}

/// Commands that ask something of a destination are passed over: a reader of snapshots has nothing to do for them.
fn read_command(input: &mut impl Bytes, sink: &mut dyn Sink) -> Result<()> {
    const PING: u16 = 2;
    let at = input.offset();
    let id = input.be16("a command")?;
    let (name, length) = match id {
        1 => ("OPEN_RETURN_PATH", Some(0)),
        PING => ("PING", Some(4)),
        3 => ("POSTCOPY_ADVISE", None),
        4 => ("POSTCOPY_LISTEN", None),
        5 => ("POSTCOPY_RUN", None),
        6 => ("POSTCOPY_RAM_DISCARD", None),
        7 => ("PACKAGED", None),
        8 => ("ENABLE_COLO", None),
        9 => ("POSTCOPY_RESUME", None),
        10 => ("RECV_BITMAP", None),
        11 => ("SWITCHOVER_START", Some(0)),
        _ => ("unknown", None),
    };
    let Some(expected) = length else {
        return Err(Error::new(at, ErrorKind::Command { id, name }));
    };
    let found = input.be16("a command's length")?;
    if found != expected {
        let what = "a command's length";
        let kind = ErrorKind::Unexpected { what, found: found.into(), expected: expected.into() };
        return Err(Error::new(at, kind));
    }
    if id == PING {
        let value = input.be32("a ping's value")?;
        sink.ping(value).map_err(|e| Error::new(at, ErrorKind::Sink(e)))?;
    }
    Ok(())
}

/// The error for an element that cannot be where it is.
fn misplaced(input: &mut impl Bytes, at: u64, element: u8, place: &'static str) -> Error {
    let what = match element {
        SECTION_START => match read_section_name(input) {
            Ok((_, name)) if name != "ram" => return Error::new(at, iterable(name)),
            Ok(_) => "a second RAM section".to_owned(),
            Err(error) => return error,
        },
        SECTION_PART => "SECTION_PART".to_owned(),
        SECTION_END => "SECTION_END".to_owned(),
        EOF => "EOF".to_owned(),
        VMDESCRIPTION => "VMDESCRIPTION".to_owned(),
        other => format!("unknown element {other:#04x}"),
    };
    Error::new(at, ErrorKind::Misplaced { what, place })
}

/// The error for a device that, as RAM, sends in parts. Where these end only the device knows.
fn iterable(name: String) -> ErrorKind {
    let reason = match name.as_str() {
        "dirty-bitmap" => "switch capability dirty-bitmaps off",
        "block" => "block migration copies disks into the stream; switch it off",
        vfio if vfio.ends_with("/vfio") => "the state of a VFIO device cannot be separated from the stream",
        other if other.starts_with("spapr/") || other.starts_with("s390-") => {
            "only x86 machines are supported"
        }
        _ => "only RAM may come in parts",
    };
    ErrorKind::Iterable { name, reason }
}
