//! What the tests on real guests share.

pub mod crash;
pub mod disks;
pub mod guest;
pub mod harness;
pub mod loop_disk;
pub mod small_disk;
pub mod underway;
pub mod walk;
