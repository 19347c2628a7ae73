//! The pack's structures by hand from `docs/formats/pages.md`, encode and decode apart, so that a mistake made in both
//! directions shows.

use super::footer::{self, ENTRY, Entry};
use super::frame::{BodyKind, Header, TRAILER, TRAILER_V1, Trailer};
use super::{At, HEADER, PackId};
use crate::error::Problem;
use crate::{Fingerprint, Origin};

fn with_checksum(mut bytes: Vec<u8>, len: usize) -> Vec<u8> {
    bytes.resize(len - 32, 0);
    let checksum = *blake3::hash(&bytes).as_bytes();
    bytes.extend(checksum);
    bytes
}

fn header() -> (Header, Vec<u8>) {
    let mut bytes = b"SPINPACK".to_vec();
    bytes.extend([2, 0, 0, 0]);
    bytes.extend([0, 16, 0, 0]);
    bytes.extend([8, 7, 6, 5, 4, 3, 2, 1]);
    bytes.extend([0xfe; 16]);
    bytes.extend([0xda; 16]);
    bytes.extend([1, 0, 0, 0, 16, 0, 0, 0]);
    let header = Header {
        version: 2,
        id: PackId(0x0102_0304_0506_0708),
        group: [0xfe; 16],
        origin: Origin([0xda; 16]),
        body: BodyKind::Frames(16),
    };
    (header, with_checksum(bytes, 4096))
}

fn trailer() -> (Trailer, Vec<u8>) {
    let mut bytes = b"SPINTAIL".to_vec();
    for field in 1..=7u8 {
        bytes.extend([field, 0, 0, 0, 0, 0, 0, field]);
    }
    bytes.extend([0xcd; 32]);
    bytes.extend([0xab; 32]);
    let field = |n: u64| n << 56 | n;
    let trailer = Trailer {
        id: PackId(field(1)),
        pages: field(2),
        nodes: field(3),
        body_bytes: field(4),
        node_bytes: field(5),
        table_bytes: field(6),
        footer_bytes: field(7),
        table_checksum: [0xcd; 32],
        footer_checksum: [0xab; 32],
    };
    (trailer, with_checksum(bytes, TRAILER))
}

fn entries() -> (Vec<Entry>, Vec<u8>) {
    let page = Entry::page(Fingerprint([1; 16]), 512);
    let node = Entry { name: Fingerprint([2; 16]), at: At::node(6), len: 48 };
    let mut bytes = vec![1; 16];
    bytes.extend([0, 2, 0, 0, 0, 16, 0, 0]);
    bytes.extend([2; 16]);
    bytes.extend([6, 0, 0, 0x80, 48, 0, 0, 0]);
    (vec![page, node], bytes)
}

#[test]
fn encodes_the_documented_bytes() {
    assert_eq!(header().0.encode(), header().1);
    assert_eq!(trailer().0.encode(), trailer().1);
    let (mut unsorted, bytes) = entries();
    unsorted.reverse();
    unsorted.sort_unstable();
    assert_eq!(footer::encode(&unsorted), bytes);
}

#[test]
fn decodes_the_documented_bytes() {
    let block: [u8; HEADER as usize] = header().1.try_into().unwrap();
    assert_eq!(Header::decode(&block), Ok(header().0));
    let tail: [u8; TRAILER] = trailer().1.try_into().unwrap();
    assert_eq!(Trailer::decode(&tail), Ok(trailer().0));
    assert_eq!(footer::decode(&entries().1), Ok(entries().0));
}

#[test]
fn version_1_is_still_read() {
    let mut bytes = b"SPINPACK".to_vec();
    bytes.extend([1, 0, 0, 0]);
    bytes.extend([0, 16, 0, 0]);
    bytes.extend([8, 7, 6, 5, 4, 3, 2, 1]);
    bytes.extend([0xfe; 16]);
    let block: [u8; HEADER as usize] = with_checksum(bytes, 4096).try_into().unwrap();
    let read = Header::decode(&block).unwrap();
    assert_eq!((read.version, read.origin, read.body), (1, Origin::default(), BodyKind::Raw));

    let mut bytes = b"SPINTAIL".to_vec();
    for field in [9u64, 2, 1, 4096 + 2 * 4096, 48, 4096 + 2 * 4096 + 48, 120] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend([0xab; 32]);
    let tail: [u8; TRAILER_V1] = with_checksum(bytes, TRAILER_V1).try_into().unwrap();
    let read = Trailer::decode_v1(&tail).unwrap();
    assert_eq!((read.body_bytes, read.node_bytes, read.table_bytes, read.footer_bytes), (8192, 48, 0, 120));

    // A page in the second slot, a node 8 bytes behind the first.
    let mut bytes = vec![1; 32];
    bytes.extend([0, 4, 0, 0, 0, 16, 0, 0]);
    bytes.extend([2; 32]);
    bytes.extend([1, 6, 0, 0, 48, 0, 1, 0]);
    let page = Entry::page(Fingerprint([1; 16]), 1);
    let node = Entry { name: Fingerprint([2; 16]), at: At::node(1), len: 48 };
    assert_eq!(footer::v1::decode(&bytes, 4096 + 2 * 4096), Ok(vec![page, node]));
    assert!(footer::v1::decode(&bytes, 4096 + 3 * 4096).is_err(), "a node among the pages");
}

#[test]
fn a_changed_byte_anywhere_is_refused() {
    for at in 0..TRAILER {
        let mut tail: [u8; TRAILER] = trailer().1.try_into().unwrap();
        tail[at] ^= 0x10;
        assert!(Trailer::decode(&tail).is_err(), "trailer byte {at}");
    }
    for at in 0..HEADER as usize {
        let mut block: [u8; HEADER as usize] = header().1.try_into().unwrap();
        block[at] ^= 0x10;
        assert!(Header::decode(&block).is_err(), "header byte {at}");
    }
}

#[test]
fn footers_that_contradict_themselves_are_refused() {
    let (_, bytes) = entries();
    for len in (1..bytes.len()).filter(|len| len % ENTRY != 0) {
        assert_eq!(footer::decode(&bytes[..len]), Err(Problem::Field("footer length")));
    }
    let swapped = [&bytes[ENTRY..], &bytes[..ENTRY]].concat();
    let twice = [&bytes[..ENTRY], &bytes[..ENTRY]].concat();
    let zero = [&[0; 16], &bytes[16..]].concat();
    for bad in [swapped, twice, zero] {
        assert_eq!(footer::decode(&bad), Err(Problem::Field("footer order")));
    }
    let mut bad = bytes.clone();
    bad[22] = 1;
    assert_eq!(footer::decode(&bad), Err(Problem::Field("footer entry")));
}

#[test]
fn a_later_version_is_told_from_damage() {
    let (_, mut bytes) = header();
    bytes[8] = 9;
    bytes[12] = 1; // what follows the version may mean something else by then
    bytes.truncate(4064);
    let block: [u8; HEADER as usize] = with_checksum(bytes, 4096).try_into().unwrap();
    assert_eq!(Header::decode(&block).unwrap().version, 9);
}
