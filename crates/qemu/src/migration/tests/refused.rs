//! What QEMU can send and a snapshot cannot use, and what breaks the format: each with its own error.

use super::*;

/// Reads a stream with `records` in a PART after the block list.
fn with_records(records: &[u8]) -> String {
    error_of(&[HEADER, START_RAM, BLOCK_LIST, END_PAYLOAD, PART_RAM, records].concat())
}

/// Reads a stream whose START(ram) has this payload.
fn with_list(payload: &[u8]) -> String {
    error_of(&[HEADER, START_RAM, payload].concat())
}

fn list(total: u64, blocks: &[(&str, u64)]) -> Vec<u8> {
    let mut out = (total | 4).to_be_bytes().to_vec();
    for (name, length) in blocks {
        out.push(name.len() as u8);
        out.extend(name.as_bytes());
        out.extend(length.to_be_bytes());
    }
    out
}

#[test]
fn capabilities_that_change_the_stream() {
    let header =
        [HEADER, b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared"].concat();
    assert_eq!(
        error_of(&[&header, START_RAM].concat()),
        "capability \"x-ignore-shared\" is on at the sender; switch it off before migrating (byte 67 of the input)"
    );
    let header = [HEADER, b"\x05\x1econfiguration/target-page-bits\0\0\0\x01\0\0\0\x0e"].concat();
    assert_eq!(
        error_of(&[&header, START_RAM].concat()),
        "the guest's pages have 2^14 bytes; only 4,096 are supported (byte 55 of the input)"
    );
}

#[test]
fn records_of_other_modes() {
    let record = |word: &[u8]| with_records(&[b"\0\0\0\0\0\0", word].concat());
    assert_eq!(
        record(b"\0\x40"),
        "a page in XBZRLE encoding; switch capability xbzrle off (byte 86 of the input)"
    );
    assert_eq!(
        record(b"\0\x60"),
        "a page in XBZRLE encoding; switch capability xbzrle off (byte 86 of the input)"
    );
    assert_eq!(record(b"\x01\0"), "a compressed page; switch capability compress off (byte 86 of the input)");
    assert_eq!(record(b"\0\x80"), "an RDMA hook; migrate over a socket (byte 86 of the input)");
    assert_eq!(record(b"\x02\0"), "a multifd flush; switch capability multifd off (byte 86 of the input)");
}

#[test]
fn records_that_make_no_sense() {
    let record = |word: &[u8]| with_records(&[b"\0\0\0\0\0\0", word].concat());
    for (word, flags) in [
        (b"\0\0", "0x0"),
        (b"\0\x01", "0x1"),
        (b"\x04\0", "0x400"),
        (b"\x08\0", "0x800"),
        (b"\0\x0a", "0xa"),
        (b"\0\x30", "0x30"),
    ] {
        assert_eq!(record(word), format!("unknown page record, flags {flags} (byte 86 of the input)"));
    }
    // EOS has no offset.
    assert_eq!(record(b"\x10\x10"), "unknown page record, flags 0x10 (byte 86 of the input)");
    assert_eq!(record(b"\x40\x04"), "a second RAM block list among the page records (byte 86 of the input)");
    assert_eq!(
        record(b"\0\x28"),
        "a page record goes on in the previous block, and there is none (byte 86 of the input)"
    );
    assert_eq!(record(b"\0\x08\x03rom"), "a page of unknown RAM block \"rom\" (byte 94 of the input)");
    assert_eq!(
        record(b"\x30\x08\x06pc.ram"),
        "a page at 0x3000 of RAM block \"pc.ram\", which has 0x3000 bytes (byte 86 of the input)"
    );
    assert_eq!(
        with_records(b"\xff\xff\xff\xff\xff\xff\xf0\x08\x06pc.ram"),
        "a page at 0xfffffffffffff000 of RAM block \"pc.ram\", which has 0x3000 bytes (byte 86 of the input)"
    );
    assert_eq!(
        record(b"\0\x02\x06pc.ram\x01"),
        "the fill byte of a zero page is 0x1, not 0x0 (byte 101 of the input)"
    );
}

#[test]
fn block_lists() {
    assert_eq!(
        with_list(&list(0x2000, &[("a", 0x1000), ("a", 0x1000)])),
        "RAM block \"a\" is listed twice (byte 32 of the input)"
    );
    assert_eq!(
        with_list(&list(0x1000, &[("a", 0x800), ("b", 0x800)])),
        "RAM block \"a\" does not consist of whole pages (byte 32 of the input)"
    );
    assert_eq!(
        with_list(&list(0x1000, &[("a", 0), ("b", 0x1000)])),
        "RAM block \"a\" is empty (byte 32 of the input)"
    );
    assert_eq!(
        with_list(&list(0x1000, &[("a", 0x2000)])),
        "the RAM blocks have 8192 bytes, 4096 were announced (byte 32 of the input)"
    );
    assert_eq!(
        with_list(&list(0, &[])),
        "the RAM blocks have 0 bytes, 0 were announced (byte 32 of the input)"
    );
    assert_eq!(
        with_list(&list(!0xfff, &[("a", !0xfff)])),
        "the size of all RAM blocks is 18446744073709547520, above the limit of 17592186044416 (byte 32 of the input)"
    );
    let names: Vec<String> = (0..1025).map(|i| format!("block{i}")).collect();
    let many: Vec<_> = names.iter().map(|name| (name.as_str(), 0x1000)).collect();
    assert!(
        with_list(&list(1025 * 0x1000, &many))
            .starts_with("the number of RAM blocks is 1025, above the limit of 1024")
    );
    // Empty blocks do not bring the end of the list nearer; their number must still be bounded.
    let empty: Vec<_> = names.iter().map(|name| (name.as_str(), 0)).collect();
    assert!(with_list(&list(0x1000, &empty)).starts_with("the number of RAM blocks is 1025"));
    assert_eq!(
        with_list(b"\0\0\0\0\0\0\0\x10"),
        "page record, flags 0x10 where the RAM block list should start (byte 32 of the input)"
    );
    assert_eq!(
        with_list(&[BLOCK_LIST, b"\0\0\0\0\0\0\0\x08"].concat()),
        "the word after the RAM block list is 0x8, not 0x10 (byte 68 of the input)"
    );
}

#[test]
fn sections_of_others() {
    let start = |name: &str| {
        let section = [&[1, 0, 0, 0, 9, name.len() as u8], name.as_bytes()].concat();
        let early = error_of(&[HEADER, &section].concat());
        let late = error_of(&[HEADER, START_RAM, BLOCK_LIST, END_PAYLOAD, &section].concat());
        let cut = |text: &str| text.split(" (byte").next().unwrap().to_owned();
        assert_eq!(cut(&early), cut(&late));
        cut(&early)
    };
    assert_eq!(
        start("dirty-bitmap"),
        "section \"dirty-bitmap\" cannot be part of a snapshot: switch capability dirty-bitmaps off"
    );
    assert!(
        start("0000:00:05.0/vfio")
            .ends_with("the state of a VFIO device cannot be separated from the stream")
    );
    assert!(start("block").contains("block migration"));
    assert!(start("spapr/htab").contains("only x86"));
    assert!(start("cmma").contains("only RAM may come in parts"));
    assert_eq!(
        error_of(&[HEADER, b"\x04\0\0\0\x09\x0avirtio-mem"].concat()),
        "device \"virtio-mem\" sends state before RAM (virtio-mem does); such machines are not supported (byte 15 of the input)"
    );
}

#[test]
fn elements_out_of_place() {
    let begin = [HEADER, START_RAM, BLOCK_LIST, END_PAYLOAD].concat();
    let end = [&begin, END_RAM, END_PAYLOAD].concat();
    assert_eq!(
        error_of(&[HEADER, PART_RAM].concat()),
        "SECTION_PART before the RAM section (byte 15 of the input)"
    );
    assert_eq!(error_of(&[HEADER, b"\0"].concat()), "EOF before the RAM section (byte 15 of the input)");
    assert_eq!(
        error_of(&[HEADER, b"\x99"].concat()),
        "unknown element 0x99 before the RAM section (byte 15 of the input)"
    );
    assert!(error_of(&[&begin, START_RAM].concat()).starts_with("a second RAM section between RAM and"));
    assert!(
        error_of(&[&begin, b"\0".as_slice()].concat()).starts_with("EOF between RAM and the device state")
    );
    assert!(error_of(&[&end, PART_RAM].concat()).starts_with("SECTION_PART between"));
    assert!(error_of(&[&end, END_RAM].concat()).starts_with("SECTION_END between"));
    assert!(error_of(&[&begin, b"\x06".as_slice()].concat()).starts_with("VMDESCRIPTION between"));
    assert!(
        error_of(&[&begin, b"\x02\0\0\0\x06".as_slice()].concat())
            .starts_with("the RAM section's id is 0x6, not 0x5")
    );
    assert!(
        error_of(&[&begin, PART_RAM, b"\0\0\0\0\0\0\0\x10\0"].concat())
            .starts_with("the RAM section's footer is 0x0, not 0x7e")
    );
    assert!(
        error_of(&[&begin, PART_RAM, b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x06"].concat())
            .starts_with("the section id in the RAM section's footer is 0x6, not 0x5")
    );
    assert!(
        error_of(&[HEADER, b"\x01\0\0\0\x05\x03ram\0\0\0\0\0\0\0\x03"].concat())
            .starts_with("the RAM section's version is 0x3, not 0x4")
    );
}

#[test]
fn commands() {
    let command = |bytes: &[u8]| error_of(&[HEADER, b"\x08", bytes].concat());
    assert_eq!(
        command(b"\0\x03\0\x10"),
        "command 3 (POSTCOPY_ADVISE) is not supported; switch postcopy and COLO capabilities off (byte 16 of the input)"
    );
    for id in [0u16, 4, 5, 6, 7, 8, 9, 10, 12, 0xffff] {
        assert!(command(&id.to_be_bytes()).starts_with(&format!("command {id} (")));
    }
    assert_eq!(command(b"\0\x02\0\x05"), "a command's length is 0x5, not 0x4 (byte 16 of the input)");
    assert_eq!(command(b"\0\x01\xff\xff"), "a command's length is 0xffff, not 0x0 (byte 16 of the input)");
}
