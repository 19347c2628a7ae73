//! A map node; one that is accepted encodes to the same bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pages::fuzzing::node(bytes));
