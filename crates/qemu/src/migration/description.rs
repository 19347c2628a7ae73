//! The JSON description that QEMU puts behind the device state, and the walk through the device state along it.
//!
//! A device's payload does not say where it ends; only its device knows. The description lists every section with the
//! sizes of its fields, so the state can be checked, section by section, without knowing a single device.

use std::ops::Range;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::codec::{Bytes, SliceReader};
use super::error::{Error, ErrorKind, Result};

/// Longest description, in bytes: 16 MiB. A small machine has 60 KiB, and it grows with the number of devices.
pub const MAX_DESCRIPTION_BYTES: usize = 16 << 20;

/// Element byte of a device's section.
pub(super) const SECTION_FULL: u8 = 0x04;
/// Element byte of the stream's end.
pub(super) const EOF: u8 = 0x00;
/// First byte of a section's footer.
pub(crate) const FOOTER: u8 = 0x7E;

/// Where a device's section lies in the device state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSection {
    /// QEMU's name for it: `globalstate`, `0000:00:03.0/e1000`.
    pub name: String,
    /// Instance id, which tells devices of one name apart.
    pub instance: u32,
    /// Bytes of the whole section, from its element byte to the end of its footer.
    pub range: Range<usize>,
    /// Bytes of what the device wrote.
    pub payload: Range<usize>,
}

/// True if `bytes` are a whole description. Says nothing of the shape of its devices.
pub(super) fn is_description(bytes: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Probe {
        #[expect(dead_code, reason = "only that it is there")]
        devices: Vec<IgnoredAny>,
    }
    serde_json::from_slice::<Probe>(bytes).is_ok()
}

/// Walks through `tail` (device sections and EOF) along `description`, checking each header and footer. `base` is the
/// offset of the tail's first byte, for errors.
pub(super) fn walk(tail: &[u8], description: &[u8], base: u64) -> Result<Vec<DeviceSection>> {
    let at = base + tail.len() as u64;
    let description: Description =
        serde_json::from_slice(description).map_err(|e| Error::new(at, ErrorKind::Description(e)))?;
    let mut input = SliceReader::new(tail, base);
    let mut sections = Vec::with_capacity(description.devices.len());
    for device in &description.devices {
        sections.push(walk_section(&mut input, device)?);
    }
    input.expect_u8(EOF, "the byte after the last device section")?;
    input.end("the device state")?;
    Ok(sections)
}

fn walk_section(input: &mut SliceReader<'_>, device: &Device) -> Result<DeviceSection> {
    let start = input.position();
    let at = input.offset();
    let wrong = |problem| Error::new(at, ErrorKind::Section { name: device.name.clone(), problem });
    if input.u8("a device section")? != SECTION_FULL {
        return Err(wrong("no device section starts where it should"));
    }
    let id = input.be32("a device section's id")?;
    if input.str8("a device section's name")? != device.name {
        return Err(wrong("another device's section is in its place"));
    }
    if input.be32("a device section's instance")? != device.instance_id {
        return Err(wrong("another instance's section is in its place"));
    }
    input.be32("a device section's version")?;

    let size =
        payload_size(&device.fields, &device.subsections).ok_or_else(|| wrong("its size overflows"))?;
    let size = usize::try_from(size).map_err(|_| wrong("its size overflows"))?;
    let payload_start = input.position();
    input
        .take(size, "a device section's payload")
        .map_err(|_| wrong("it is longer than the device state"))?;
    let payload = payload_start..input.position();

    if input.u8("a section's footer")? != FOOTER || input.be32("a section's footer")? != id {
        return Err(wrong("no footer follows its payload"));
    }
    Ok(DeviceSection {
        name: device.name.clone(),
        instance: device.instance_id,
        range: start..input.position(),
        payload,
    })
}

/// What is used of the JSON. QEMU writes more (types, names of fields), and may add to it.
#[derive(Deserialize)]
struct Description {
    devices: Vec<Device>,
}

#[derive(Deserialize)]
struct Device {
    name: String,
    instance_id: u32,
    #[serde(default)]
    fields: Vec<Field>,
    #[serde(default)]
    subsections: Vec<Subsection>,
}

#[derive(Deserialize)]
struct Field {
    size: u64,
    // Equal elements of an array are described once.
    array_len: Option<u64>,
}

#[derive(Deserialize)]
struct Subsection {
    vmsd_name: String,
    #[serde(default)]
    fields: Vec<Field>,
    #[serde(default)]
    subsections: Vec<Subsection>,
}

/// Bytes of a payload in the stream; none if the sum overflows.
fn payload_size(fields: &[Field], subsections: &[Subsection]) -> Option<u64> {
    let mut sum = 0u64;
    for field in fields {
        sum = sum.checked_add(field.size.checked_mul(field.array_len.unwrap_or(1))?)?;
    }
    for subsection in subsections {
        // Element byte, length of the name, name, version.
        let header = 1 + 1 + subsection.vmsd_name.len() as u64 + 4;
        let payload = payload_size(&subsection.fields, &subsection.subsections)?;
        sum = sum.checked_add(header)?.checked_add(payload)?;
    }
    Some(sum)
}
