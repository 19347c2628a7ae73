//! `demo`: to come.
