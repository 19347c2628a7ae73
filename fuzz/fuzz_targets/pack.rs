//! A whole pack as it is read at open.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    pages::fuzzing::pack(bytes);
});
