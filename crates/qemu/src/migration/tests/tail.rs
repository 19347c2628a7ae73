//! Finding the end of the device tail, and the walk through it.

use crate::migration::{DeviceTail, MAX_TAIL_BYTES};

use super::*;

fn stream_with_tail(tail: &[u8]) -> Vec<u8> {
    [HEADER, START_RAM, BLOCK_LIST, END_PAYLOAD, END_RAM, END_PAYLOAD, tail].concat()
}

/// Tail and description of one device `d` with this payload.
fn one_device(payload: &[u8]) -> Vec<u8> {
    let json =
        format!(r#"{{"devices":[{{"name":"d","instance_id":0,"fields":[{{"size":{}}}]}}]}}"#, payload.len());
    [
        b"\x04\0\0\0\x06\x01d\0\0\0\0\0\0\0\x01".as_slice(),
        payload,
        b"\x7e\0\0\0\x06\0\x06",
        &(json.len() as u32).to_be_bytes(),
        json.as_bytes(),
    ]
    .concat()
}

#[test]
fn sections_are_located() {
    let tail = DeviceTail::new(tail_bytes(), DESCRIPTION.into()).unwrap();
    let [timer, globalstate] = tail.sections() else { panic!("{:?}", tail.sections()) };
    assert_eq!((timer.name.as_str(), timer.instance), ("timer", 1));
    assert_eq!((timer.range.clone(), timer.payload.clone()), (0..41, 19..36));
    assert_eq!((globalstate.name.as_str(), globalstate.instance), ("globalstate", 0));
    assert_eq!(tail.payload("timer").unwrap(), b"\x11\x12ABC\x05\x05timer\0\0\0\x01\x77");
    assert_eq!(tail.payload("none"), None);
    assert_eq!(tail.run_state(), Some("running"));
}

#[test]
fn a_tail_without_globalstate_has_no_run_state() {
    let (finished, _) = read(stream_with_tail(&one_device(b"x")).as_slice()).unwrap();
    assert_eq!(finished.state.tail.run_state(), None);
}

#[test]
fn a_planted_end_does_not_end_the_tail() {
    let plant = b"\0\x06\0\0\0\x0e{\"devices\":[]}";
    let stream = stream_with_tail(&one_device(plant));
    let piece = stream.windows(plant.len()).position(|window| window == plant).unwrap() + plant.len();
    // The first piece ends where the plant does, as it would in the worst of cases.
    let (finished, _) = read(StaysOpen { bytes: &stream, piece }).unwrap();
    assert_eq!(finished.state.tail.payload("d").unwrap(), plant);
    // If nothing follows, the error says why that was no end.
    assert_eq!(
        error_of(&stream[..piece]),
        "the byte after the last device section is 0x4, not 0x0 (byte 99 of the input)"
    );
}

#[test]
fn a_description_must_agree_with_the_bytes() {
    let message = |bytes: &[u8], from: &str, to: &str| {
        assert!(DESCRIPTION.contains(from));
        DeviceTail::new(bytes.to_vec(), DESCRIPTION.replacen(from, to, 1).into()).unwrap_err().to_string()
    };
    let bytes = tail_bytes();
    assert_eq!(
        message(&bytes, r#""size":2"#, r#""size":3"#),
        "device section \"timer\": no footer follows its payload (byte 0 of the input)"
    );
    assert_eq!(
        message(&bytes, r#""size":2"#, r#""size":200"#),
        "device section \"timer\": it is longer than the device state (byte 0 of the input)"
    );
    assert_eq!(
        message(
            &bytes,
            r#""array_len":3,"type":"uint8","size":1"#,
            r#""array_len":18446744073709551615,"size":2"#
        ),
        "device section \"timer\": its size overflows (byte 0 of the input)"
    );
    assert_eq!(
        message(&bytes, r#""name":"timer""#, r#""name":"clock""#),
        "device section \"clock\": another device's section is in its place (byte 0 of the input)"
    );
    assert_eq!(
        message(&bytes, r#""instance_id":1"#, r#""instance_id":2"#),
        "device section \"timer\": another instance's section is in its place (byte 0 of the input)"
    );
    assert!(
        message(&bytes, r#""instance_id":1"#, r#""instance_id":-1"#)
            .starts_with("the description of the device")
    );
    assert_eq!(
        message(&[&bytes[..], b"x"].concat(), "page_size", "page_size"),
        "1 bytes follow after the end of the device state (byte 176 of the input)"
    );
    let mut damaged = bytes.clone();
    damaged[40] ^= 1;
    assert!(message(&damaged, "page_size", "page_size").contains("no footer follows"));
    damaged = bytes.clone();
    damaged[41] = 5;
    assert!(message(&damaged, "page_size", "page_size").contains("no device section starts"));
    damaged = bytes;
    *damaged.last_mut().unwrap() = 4;
    assert!(
        message(&damaged, "page_size", "page_size")
            .starts_with("the byte after the last device section is 0x4")
    );
}

#[test]
fn a_tail_above_the_limit_is_refused() {
    struct Endless;
    impl Read for Endless {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            out.fill(0xaa);
            Ok(out.len())
        }
    }
    let begin = stream_with_tail(b"\x04");
    let error = read(begin.chain(Endless)).unwrap_err().to_string();
    assert!(error.starts_with("the device state is 67"), "{error}");
    assert!(error.contains(&format!("above the limit of {MAX_TAIL_BYTES}")), "{error}");
}

#[test]
fn deep_json_is_refused_and_not_recursed_into() {
    let json = format!(r#"{{"devices":{}1{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    assert!(DeviceTail::new(vec![0], json.into()).is_err());
}

#[test]
fn a_description_of_another_length_is_no_end() {
    for wrong in [DESCRIPTION.len() - 1, DESCRIPTION.len() + 1] {
        let tail = [&tail_bytes(), b"\x06".as_slice(), &(wrong as u32).to_be_bytes(), DESCRIPTION.as_bytes()]
            .concat();
        assert!(error_of(&stream_with_tail(&tail)).starts_with("the input ends inside the device state"));
    }
}
