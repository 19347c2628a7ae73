//! The entries of a pack's footer; those accepted encode to the same bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pages::fuzzing::footer(bytes));
