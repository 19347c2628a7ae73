//! The figures of `make bench`.

fn main() {}
