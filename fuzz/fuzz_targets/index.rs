//! A file of the index, and look-ups in it.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: (Vec<u8>, [[u8; 32]; 4])| {
    pages::fuzzing::index(&input.0, &input.1);
});
