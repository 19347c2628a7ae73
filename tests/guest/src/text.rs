//! Text as one word: bytes that are not plain letters, digits or `-_/:,` become `%XX`.

use std::fmt::Write;

/// Makes one word without spaces of `bytes`.
pub(crate) fn encode(bytes: &[u8]) -> String {
    let mut word = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-_/:,".contains(&byte) {
            word.push(byte.into());
        } else {
            // Writing to a string does not fail.
            let _ = write!(word, "%{byte:02X}");
        }
    }
    word
}

/// The bytes of a word, or nothing when a `%` is not followed by two hex digits.
pub(crate) fn decode(word: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => hex(rest.next()?)? << 4 | hex(rest.next()?)?,
            byte => byte,
        });
    }
    Some(bytes)
}

fn hex(digit: u8) -> Option<u8> {
    (digit as char).to_digit(16).map(|value| value as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_the_text_again() {
        let text: Vec<u8> = (0..=255).collect();
        let word = encode(&text);
        assert!(!word.contains([' ', '\n', '=']));
        assert_eq!(decode(&word), Some(text));
        assert_eq!(encode(b"a b."), "a%20b%2E");
        assert_eq!(decode("%4"), None);
        assert_eq!(decode("%zz"), None);
    }
}
