//! The `spinney` executable.

fn main() {}
