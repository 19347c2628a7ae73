//! The workload.

fn main() {}
