//! The daemon: the engine behind an HTTP API on a Unix socket, and the client that the command line talks to it with.
//!
//! A request that changes something becomes an operation with a thread of its own ([`operations`]); its caller gets an
//! id at once and asks for the rest. A request that only reads is answered directly. Whatever goes wrong is answered
//! with one kind of document ([`Problem`]).
//!
//! **Must not know:** terminals, colours, the user's configuration files. Async starts here: nothing below this crate
//! has a runtime.

mod allocator;
pub mod api;
pub mod client;
mod log;
pub mod operations;
mod problem;
mod serve;
pub mod socket;

pub use log::{start_helper, start_lasting_helper};
pub use problem::Problem;
pub use serve::{Options, serve};
pub use snapshots;

/// Version of this build, which client and daemon compare.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
