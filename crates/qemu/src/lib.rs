//! QEMU from outside: its processes, its monitors, its migration stream, its disk tools.
//!
//! **Must not know:** the page store, the catalog, what a snapshot is.

#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

pub mod accel;
pub mod binary;
pub mod command;
pub mod disc;
pub mod ends;
pub mod firmware;
pub mod forward;
pub mod guest_agent;
mod guest_memory;
pub mod image;
pub mod live;
pub mod load;
pub mod migration;
pub mod outside;
mod populate;
pub mod process;
pub mod qcow2;
pub mod qmp;
pub mod save;
mod tool;
