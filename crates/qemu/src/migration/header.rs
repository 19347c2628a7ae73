//! The beginning of a stream: magic, version, and the configuration section that says which machine it is for.

use super::codec::{Bytes, Recorder, SliceReader, put_str8};
use super::error::{Error, ErrorKind, Result};

/// `QEVM`.
const MAGIC: u32 = 0x5145_564D;
/// The only stream version that QEMU writes since 0.13.
const VERSION: u32 = 3;
/// Element byte of the configuration section.
const CONFIGURATION: u8 = 0x07;
/// Element byte of a subsection.
const SUBSECTION: u8 = 0x05;

const PAGE_BITS: &str = "configuration/target-page-bits";
const CAPABILITIES: &str = "configuration/capabilities";
const UUID: &str = "configuration/uuid";

/// Longest machine type name, in bytes. QEMU's longest today has under 40; the be32 before it could announce 4 GiB.
pub const MAX_MACHINE_NAME: usize = 256;
/// Most capabilities in a header. QEMU knows fewer than 30 and lists at most two.
pub const MAX_CAPABILITIES: usize = 64;

/// The header of a stream: its bytes as they came, and what they say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamHeader {
    raw: Vec<u8>,
    machine: String,
    page_bits: Option<u32>,
    capabilities: Vec<String>,
    uuid: Option<[u8; 16]>,
}

impl StreamHeader {
    /// Reads a header that is all of `bytes`.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        Self::decode_at(bytes, 0)
    }

    /// The header of a plain stream for this machine type.
    ///
    /// # Errors
    /// No machine type has such a name.
    pub fn of_machine(machine: &str) -> Result<Self> {
        let (machine, capabilities) = (machine.to_owned(), Vec::new());
        let new = Self { raw: Vec::new(), machine, page_bits: None, capabilities, uuid: None };
        Self::decode(&new.encode())
    }

    /// As [`Self::decode`], with errors counting from `base`.
    pub(super) fn decode_at(bytes: &[u8], base: u64) -> Result<Self> {
        let mut input = SliceReader::new(bytes, base);
        let header = Self::read(&mut input)?;
        input.end("the stream header")?;
        Ok(header)
    }

    /// Reads a header from the front of `input`. It ends before the first byte that starts no subsection.
    pub(super) fn read(input: &mut impl Bytes) -> Result<Self> {
        let mut input = Recorder::new(input);
        read_magic(&mut input)?;
        input.expect_u8(CONFIGURATION, "the configuration section's first byte")?;
        let count = input.length("the machine type's length", MAX_MACHINE_NAME)?;
        let machine = input.text(count, "the machine type")?;

        let (mut page_bits, mut capabilities, mut uuid) = (None, None, None);
        while input.peek()? == Some(SUBSECTION) {
            let at = input.offset();
            input.u8("a configuration subsection")?;
            let name = input.str8("a configuration subsection's name")?;
            input.expect_be32(1, "a configuration subsection's version")?;
            match name.as_str() {
                PAGE_BITS if page_bits.is_none() => page_bits = Some(input.be32("the page bits")?),
                CAPABILITIES if capabilities.is_none() => capabilities = Some(read_capabilities(&mut input)?),
                UUID if uuid.is_none() => uuid = Some(*input.array("the uuid")?),
                _ => return Err(Error::new(at, ErrorKind::ConfigurationSubsection(name))),
            }
        }
        let capabilities = capabilities.unwrap_or_default();
        Ok(Self { raw: input.bytes, machine, page_bits, capabilities, uuid })
    }

    /// The same header with another list of capabilities, as QEMU would have written it: no subsection if empty. A
    /// loader refuses a stream whose list is not the same set as its own. Names above 255 bytes, and names after the
    /// first [`MAX_CAPABILITIES`], are left out: QEMU knows none.
    #[must_use]
    pub fn with_capabilities(&self, capabilities: &[&str]) -> Self {
        if self.capabilities == capabilities {
            return self.clone();
        }
        let names =
            capabilities.iter().filter(|name| name.len() <= usize::from(u8::MAX)).take(MAX_CAPABILITIES);
        let mut new = Self {
            raw: Vec::new(),
            capabilities: names.map(|&name| name.to_owned()).collect(),
            ..self.clone()
        };
        new.raw = new.encode();
        new
    }

    /// The bytes, as they came or as [`Self::with_capabilities`] made them.
    pub fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// Machine type with its version, as `pc-i440fx-10.0`. The loader must be started with the same.
    pub fn machine(&self) -> &str {
        &self.machine
    }

    /// log2 of the guest's page size, if the stream says so. On x86 it does not, and the size is 4,096.
    pub fn page_bits(&self) -> Option<u32> {
        self.page_bits
    }

    /// Capabilities that change the layout of the stream and therefore must be the same at both ends.
    pub fn capabilities(&self) -> &[String] {
        &self.capabilities
    }

    /// The machine's uuid, if capability `validate-uuid` was on.
    pub fn uuid(&self) -> Option<&[u8; 16]> {
        self.uuid.as_ref()
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.machine.len() + 128);
        out.extend(MAGIC.to_be_bytes());
        out.extend(VERSION.to_be_bytes());
        out.push(CONFIGURATION);
        out.extend((self.machine.len() as u32).to_be_bytes());
        out.extend(self.machine.as_bytes());
        if let Some(bits) = self.page_bits {
            put_subsection(&mut out, PAGE_BITS);
            out.extend(bits.to_be_bytes());
        }
        if !self.capabilities.is_empty() {
            put_subsection(&mut out, CAPABILITIES);
            out.extend((self.capabilities.len() as u32).to_be_bytes());
            self.capabilities.iter().for_each(|name| put_str8(&mut out, name));
        }
        if let Some(uuid) = &self.uuid {
            put_subsection(&mut out, UUID);
            out.extend(uuid);
        }
        out
    }
}

/// Reads what every file and stream of QEMU's begins with: magic and version.
pub(super) fn read_magic(input: &mut impl Bytes) -> Result<()> {
    let at = input.offset();
    let magic = input.be32("the stream magic")?;
    if magic != MAGIC {
        return Err(Error::new(at, ErrorKind::Magic(magic)));
    }
    let at = input.offset();
    let version = input.be32("the stream version")?;
    if version != VERSION {
        let kind = ErrorKind::Version { what: "the migration stream", found: version, known: VERSION };
        return Err(Error::new(at, kind));
    }
    Ok(())
}

fn read_capabilities(input: &mut impl Bytes) -> Result<Vec<String>> {
    let count = input.length("the number of capabilities", MAX_CAPABILITIES)?;
    (0..count).map(|_| input.str8("a capability's name")).collect()
}

fn put_subsection(out: &mut Vec<u8>, name: &str) {
    out.push(SUBSECTION);
    put_str8(out, name);
    out.extend(1u32.to_be_bytes());
}
