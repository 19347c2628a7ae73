//! QEMU from outside: its processes, its monitors, its migration stream, its disk tools.
//!
//! **Must not know:** the page store, the catalog, what a snapshot is.

pub mod migration;
