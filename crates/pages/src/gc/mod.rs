//! Garbage collection: mark from the roots, show the plan, carry it out.
//!
//! What makes it safe beside sessions is one number for each pack: the tick at which a session last relied on it, by a
//! de-duplication hit or by committing it. A plan remembers the earliest tick that anybody held when its roots were read.
//! Whatever was touched at that tick or later is left alone, both when planning and again, behind the gate, at the moment
//! when a pack is to go: so a page that a session found in the store cannot vanish under it, and what a session
//! committed in the meantime is in no plan. Anything else that is alive is reached by a root of the plan.
//!
//! A node may outlive pages below it (when its pack is kept and theirs goes). That is harmless: `put_leaves`
//! looks every page up, and `put_map_over` takes only leaves of its own session, so no old node's word is taken for what lies below.

mod doubt;
mod plan;
mod run;

pub use plan::{Cold, GcPlan, GcRequest, PackPlan};
pub use run::GcDone;
