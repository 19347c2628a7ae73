//! Tests of the pack format.
