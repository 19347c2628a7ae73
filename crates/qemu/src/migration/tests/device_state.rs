//! The stored form of all but the pages.

use crate::migration::{DeviceState, DeviceTail, RamBlocks, StreamHeader};

use super::*;

fn state() -> DeviceState {
    let blocks = vec![
        RamBlock { name: "pc.ram".into(), length: 0x3000 },
        RamBlock { name: "bios".into(), length: 0x1000 },
    ];
    DeviceState {
        header: StreamHeader::decode(HEADER).unwrap(),
        blocks: RamBlocks::new(blocks).unwrap(),
        ram_section: 5,
        tail: DeviceTail::new(tail_bytes(), DESCRIPTION.into()).unwrap(),
    }
}

fn bytes() -> Vec<u8> {
    [
        b"SPINNEYD\0\0\0\x01\0\0\0\x0f".as_slice(),
        HEADER,
        b"\0\0\0\x05\0\0\0\x02\x06pc.ram\0\0\0\0\0\0\x30\0\x04bios\0\0\0\0\0\0\x10\0",
        &(tail_bytes().len() as u32).to_be_bytes(),
        &tail_bytes(),
        &(DESCRIPTION.len() as u32).to_be_bytes(),
        DESCRIPTION.as_bytes(),
    ]
    .concat()
}

fn message(bytes: &[u8]) -> String {
    DeviceState::decode(bytes).unwrap_err().to_string()
}

#[test]
fn it_is_written_as_these_bytes() {
    assert_eq!(state().encode(), bytes());
}

#[test]
fn these_bytes_are_read() {
    assert_eq!(DeviceState::decode(&bytes()).unwrap(), state());
}

#[test]
fn zeros_may_fill_the_last_page() {
    let mut padded = bytes();
    padded.resize(8192, 0);
    assert_eq!(DeviceState::decode(&padded).unwrap(), state());
    *padded.last_mut().unwrap() = 1;
    assert!(message(&padded).contains("bytes follow after the end of the device state"));
}

#[test]
fn every_cut_is_an_error() {
    let bytes = bytes();
    for length in 0..bytes.len() {
        assert!(DeviceState::decode(&bytes[..length]).is_err(), "cut at {length}");
    }
}

#[test]
fn no_altered_byte_makes_it_panic() {
    let bytes = bytes();
    for position in 0..bytes.len() {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[position] ^= 1 << bit;
            let _ = DeviceState::decode(&damaged);
        }
    }
}

#[test]
fn lengths_above_their_limit_are_refused_before_anything_is_read() {
    assert_eq!(
        message(b"QEVM\0\0\0\x03"),
        "no migration stream: it starts with 0x5145564d (byte 0 of the input)"
    );
    assert_eq!(
        message(b"SPINNEYD\0\0\0\x03"),
        "version 3 of the device state; known is 2 (byte 8 of the input)"
    );
    assert!(
        message(b"SPINNEYD\0\0\0\x01\xff\xff\xff\xff").starts_with("the stream header is 4294967295, above")
    );
    let mut many = bytes();
    many[35..39].copy_from_slice(&1025u32.to_be_bytes());
    assert!(message(&many).starts_with("the number of RAM blocks is 1025, above the limit of 1024"));
    let mut long = bytes();
    long[67..71].copy_from_slice(&(64 << 20 | 1u32).to_be_bytes());
    assert!(
        message(&long).starts_with("the device tail is 67108865, above the limit of 67108864"),
        "{}",
        message(&long)
    );
    let at = 71 + tail_bytes().len();
    let mut long = bytes();
    long[at..at + 4].copy_from_slice(&(16 << 20 | 1u32).to_be_bytes());
    assert!(message(&long).starts_with("the description is 16777217, above the limit of 16777216"));
}

#[test]
fn blocks_are_checked_again() {
    let mut odd = bytes();
    odd[46..54].copy_from_slice(&[0xff; 8]);
    assert!(
        message(&odd).starts_with("RAM block \"pc.ram\" does not consist of whole pages"),
        "{}",
        message(&odd)
    );
}

/// What `xen-save-devices-state` writes.
fn file() -> Vec<u8> {
    [b"QEVM\0\0\0\x03".as_slice(), &tail_bytes()].concat()
}

#[test]
fn a_state_without_a_description_has_a_version_of_its_own() {
    let state = DeviceState { tail: DeviceTail::from_file(&file()).unwrap(), ..state() };
    assert_eq!((state.tail.bytes(), state.tail.description()), (&tail_bytes()[..], &b""[..]));
    let described = bytes();
    let end = described.len() - DESCRIPTION.len() - 4;
    let mut undescribed = [&described[..end], b"\0\0\0\0"].concat();
    undescribed[11] = 2;
    assert_eq!(state.encode(), undescribed);
    assert_eq!(DeviceState::decode(&undescribed).unwrap(), state);
    // Neither version passes for the other.
    let mut wrong = described;
    wrong[11] = 2;
    assert!(
        message(&wrong).starts_with("the length of the description that this version lacks is "),
        "{}",
        message(&wrong)
    );
    undescribed[11] = 1;
    assert!(DeviceState::decode(&undescribed).is_err());
}

#[test]
fn a_file_of_device_state_has_both_ends() {
    let whole = file();
    for length in 0..whole.len() {
        assert!(DeviceTail::from_file(&whole[..length]).is_err(), "cut at {length}");
    }
    for place in [0, 7, 8, whole.len() - 1, whole.len() - 6] {
        let mut damaged = whole.clone();
        damaged[place] ^= 0x80;
        assert!(DeviceTail::from_file(&damaged).is_err(), "byte {place}");
    }
}
