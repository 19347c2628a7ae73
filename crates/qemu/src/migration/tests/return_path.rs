//! Messages of the return path.

use crate::migration::{
    ReturnMessage, SHUT_FAILED, SHUT_OK, pong, read_return_message, shut, switchover_ack,
};

fn decode(mut bytes: &[u8]) -> Result<Option<ReturnMessage>, String> {
    read_return_message(&mut bytes).map_err(|error| error.to_string())
}

#[test]
fn messages_are_written() {
    assert_eq!(shut(SHUT_FAILED), *b"\0\x01\0\x04\0\0\0\x01");
    assert_eq!(shut(SHUT_OK), *b"\0\x01\0\x04\0\0\0\0");
    assert_eq!(pong(0x0102_0304), *b"\0\x02\0\x04\x01\x02\x03\x04");
    assert_eq!(switchover_ack(), *b"\0\x07\0\0");
}

#[test]
fn messages_are_read() {
    let request = |block: Option<&str>| ReturnMessage::RequestPages {
        start: 0x1000,
        length: 0x2000,
        block: block.map(str::to_owned),
    };
    assert_eq!(decode(b""), Ok(None));
    assert_eq!(decode(b"\0\x01\0\x04\0\0\0\x01"), Ok(Some(ReturnMessage::Shut(1))));
    assert_eq!(decode(b"\0\x02\0\x04\0\0\0\x07"), Ok(Some(ReturnMessage::Pong(7))));
    assert_eq!(
        decode(b"\0\x03\0\x13\0\0\0\0\0\0\x10\0\0\0\x20\0\x06pc.ram"),
        Ok(Some(request(Some("pc.ram"))))
    );
    assert_eq!(decode(b"\0\x04\0\x0c\0\0\0\0\0\0\x10\0\0\0\x20\0"), Ok(Some(request(None))));
    assert_eq!(decode(b"\0\x06\0\x04\0\0\0\x01"), Ok(Some(ReturnMessage::ResumeAck(1))));
    assert_eq!(decode(b"\0\x07\0\0"), Ok(Some(ReturnMessage::SwitchoverAck)));
}

#[test]
fn messages_are_left_in_the_input_behind_the_first() {
    let mut input = b"\0\x02\0\x04\0\0\0\x07\0\x07\0\0".as_slice();
    assert_eq!(read_return_message(&mut input).unwrap(), Some(ReturnMessage::Pong(7)));
    assert_eq!(read_return_message(&mut input).unwrap(), Some(ReturnMessage::SwitchoverAck));
    assert_eq!(read_return_message(&mut input).unwrap(), None);
}

#[test]
fn cut_and_wrong_messages_are_refused() {
    let whole = b"\0\x03\0\x13\0\0\0\0\0\0\x10\0\0\0\x20\0\x06pc.ram";
    for length in 1..whole.len() {
        assert!(decode(&whole[..length]).is_err(), "cut at {length}");
    }
    assert!(decode(b"\0\x01\xff\xff").unwrap_err().contains("is 65535, above the limit of 268"));
    assert!(decode(b"\0\x01\0\x05\0\0\0\x01\0").unwrap_err().contains("1 bytes follow"));
    assert!(decode(b"\0\x01\0\x02\0\0").unwrap_err().contains("ends inside the verdict"));
    assert!(decode(b"\0\x05\0\x01\0").unwrap_err().starts_with("return-path message 5 is not supported"));
}
