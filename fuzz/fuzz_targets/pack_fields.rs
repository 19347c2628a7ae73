//! A whole pack whose checksums fit, so that the checks behind them are reached.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    pages::fuzzing::pack_with_right_checksums(bytes);
});
