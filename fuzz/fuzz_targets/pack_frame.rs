//! A frame of compressed pages.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    pages::fuzzing::frame(bytes);
});
