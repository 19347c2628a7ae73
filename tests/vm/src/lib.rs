//! What the tests on real guests share.

pub mod guest;
