//! A file of the index, and look-ups in it: of any bytes, and of parts whose checksums fit.
#![no_main]

type Input<'a> = (&'a [u8], u8, &'a [u8], &'a [u8], [[u8; 32]; 4]);

libfuzzer_sys::fuzz_target!(|input: Input<'_>| {
    let (entries, bits, buckets, packs, names) = input;
    pages::fuzzing::index(entries, &names);
    pages::fuzzing::index_of_parts(entries, bits % 40, buckets, packs, &names);
});
