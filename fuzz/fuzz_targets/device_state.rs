//! A device state from a damaged disk: decoding must not panic, and what is decoded must encode to the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qemu::migration::DeviceState;

fuzz_target!(|bytes: &[u8]| {
    let Ok(state) = DeviceState::decode(bytes) else { return };
    let encoded = state.encode();
    let (same, padding) = bytes.split_at(encoded.len());
    assert_eq!(same, encoded);
    assert!(padding.iter().all(|&byte| byte == 0));
});
