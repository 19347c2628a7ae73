//! What happens to a target: take, go to, branch, remove. The catalog, the tree and the journal live here.
//!
//! **Must not know:** HTTP, terminals, the user's environment. Plain functions and threads, no async.

mod engine;
mod error;
mod types;

pub use engine::{Context, Engine, Progress, Settings};
pub use error::{Code, Error, Result};
pub use types::*;
