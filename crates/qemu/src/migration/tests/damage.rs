//! Streams that are cut, altered, or made up.

use proptest::prelude::*;

use super::*;

#[test]
fn every_cut_is_an_error() {
    let sample = sample();
    for length in 0..sample.len() {
        let error = read(&sample[..length]).expect_err("a cut stream");
        assert!(error.to_string().contains("the input ends inside"), "cut at {length}: {error}");
        assert_eq!(error.offset, length as u64, "cut at {length}: {error}");
    }
}

#[test]
fn no_altered_byte_makes_it_panic() {
    let sample = sample();
    for position in 0..sample.len() {
        for value in [0x01, 0x80, 0xff] {
            let mut damaged = sample.clone();
            damaged[position] ^= value;
            let _ = read(damaged.as_slice());
        }
    }
}

proptest! {
    #[test]
    fn random_bytes_do_not_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), place in 0usize..5) {
        let stream = match place {
            0 => bytes,
            1 => [HEADER, &bytes].concat(),
            2 => [HEADER, START_RAM, &bytes].concat(),
            3 => [HEADER, START_RAM, BLOCK_LIST, END_PAYLOAD, PART_RAM, &bytes].concat(),
            _ => [HEADER, START_RAM, BLOCK_LIST, END_PAYLOAD, b"\x04", &bytes].concat(),
        };
        prop_assert!(read(stream.as_slice()).is_err());
    }

    #[test]
    fn several_altered_bytes_do_not_make_it_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20)) {
        let mut stream = sample();
        for (index, value) in changes {
            let at = index.index(stream.len());
            stream[at] = value;
        }
        let _ = read(stream.as_slice());
    }
}
