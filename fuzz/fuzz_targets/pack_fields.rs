//! A pack of any parts whose checksums fit, so that the checks behind them are reached: pages as they are, frames, images.
#![no_main]

type Input<'a> = ([u8; 3], [u16; 2], [&'a [u8]; 4], [u8; 4]);

libfuzzer_sys::fuzz_target!(|input: Input<'_>| {
    let ([version, body, per_frame], counts, parts, mut errors) = input;
    // Mostly what a pack may have; the lengths are mostly right.
    let header = [version % 4, body % 4, per_frame];
    if errors[0] < 250 {
        errors = [0; 4];
    }
    pages::fuzzing::pack_of_parts(&pages::fuzzing::Parts {
        header,
        counts: counts.map(|n| n % 64),
        parts,
        errors,
    });
});
