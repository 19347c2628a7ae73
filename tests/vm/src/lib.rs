//! What the tests on real guests share.
