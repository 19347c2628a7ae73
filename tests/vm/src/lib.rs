//! What the tests on real guests share.

pub mod disks;
pub mod guest;
pub mod harness;
pub mod underway;
pub mod walk;
