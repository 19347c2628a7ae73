//! The header: what it says, and its bytes with other capabilities.

use crate::migration::StreamHeader;

use super::HEADER;

const CAPABILITIES: &[u8] =
    b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x02\x0fx-ignore-shared\x0amapped-ram";
const UUID: &[u8] = b"\x05\x12configuration/uuid\0\0\0\x010123456789abcdef";
const PAGE_BITS: &[u8] = b"\x05\x1econfiguration/target-page-bits\0\0\0\x01\0\0\0\x0c";

#[test]
fn all_subsections_are_read() {
    let bytes = [HEADER, PAGE_BITS, CAPABILITIES, UUID].concat();
    let header = StreamHeader::decode(&bytes).unwrap();
    assert_eq!(header.raw(), bytes);
    assert_eq!(header.page_bits(), Some(12));
    assert_eq!(header.capabilities(), ["x-ignore-shared", "mapped-ram"]);
    assert_eq!(header.uuid(), Some(b"0123456789abcdef"));
}

#[test]
fn capabilities_are_taken_out_and_put_in() {
    let with = StreamHeader::decode(&[HEADER, PAGE_BITS, CAPABILITIES, UUID].concat()).unwrap();
    let without = StreamHeader::decode(&[HEADER, PAGE_BITS, UUID].concat()).unwrap();
    assert_eq!(with.with_capabilities(&[]), without);
    assert_eq!(without.with_capabilities(&["x-ignore-shared", "mapped-ram"]), with);
    assert_eq!(with.with_capabilities(&["x-ignore-shared", "mapped-ram"]), with);
}

#[test]
fn capabilities_that_do_not_fit_are_left_out() {
    let plain = StreamHeader::decode(HEADER).unwrap();
    let long = "x".repeat(256);
    assert_eq!(plain.with_capabilities(&[&long]), plain);
    let many = vec!["y"; 65];
    assert_eq!(plain.with_capabilities(&many).capabilities().len(), 64);
}

#[test]
fn what_is_not_a_header_is_refused() {
    let message = |bytes: &[u8]| StreamHeader::decode(bytes).unwrap_err().to_string();
    assert_eq!(
        message(b"QFI\xfb\0\0\0\x03"),
        "no migration stream: it starts with 0x514649fb (byte 0 of the input)"
    );
    assert_eq!(
        message(b"QEVM\0\0\0\x02\x07"),
        "version 2 of the migration stream; known is 3 (byte 4 of the input)"
    );
    assert_eq!(
        message(b"QEVM\0\0\0\x03\x01"),
        "the configuration section's first byte is 0x1, not 0x7 (byte 8 of the input)"
    );
    assert_eq!(
        message(b"QEVM\0\0\0\x03\x07\xff\xff\xff\xff"),
        "the machine type's length is 4294967295, above the limit of 256 (byte 9 of the input)"
    );
    assert_eq!(
        message(b"QEVM\0\0\0\x03\x07\0\0\0\x01\xff"),
        "the machine type is not UTF-8 (byte 13 of the input)"
    );
    assert_eq!(
        message(&[HEADER, b"\x05\x03new\0\0\0\x01"].concat()),
        "unknown or repeated configuration subsection \"new\" (byte 15 of the input)"
    );
    assert_eq!(
        message(&[HEADER, UUID, UUID].concat()),
        "unknown or repeated configuration subsection \"configuration/uuid\" (byte 55 of the input)"
    );
    assert_eq!(
        message(&[HEADER, b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x41"].concat()),
        "the number of capabilities is 65, above the limit of 64 (byte 47 of the input)"
    );
    assert_eq!(
        message(&[HEADER, b"\0"].concat()),
        "1 bytes follow after the end of the stream header (byte 15 of the input)"
    );
}
