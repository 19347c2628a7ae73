//! The warden: a small process beside the daemon that keeps deadlines.
//!
//! While the daemon saves a machine's memory there are moments in which the guest stands still and only the daemon can let it go
//! on. If the daemon is gone then, or stopped, or stuck, nobody would. So before such a moment it arms a deadline here, renews it
//! for as long as it gets on, and disarms it afterwards. If a deadline passes, or the daemon dies, the warden goes to the machine's
//! second monitor and lets the guest go on; and it starts the next daemon, which puts the rest in order.
//!
//! ```text
//!   daemon ── arm, renew, hold, disarm ──► warden ── yank, migrate_cancel, cont ──► QEMU (second monitor)
//!      ▲                                     │
//!      └────────── starts the next ──────────┘
//! ```
//! The two talk over a socket pair: the warden's end is its standard input, so there is no path to find or to guard, and the end
//! of the daemon is the end of the stream. The daemon starts a warden at its first need, and another if that one died.
//!
//! [`deadlines`] is the part that decides, without clock or sockets; [`rescue`] what is done to a QEMU; [`process`] the warden's
//! loop; [`client`] the daemon's side.
//!
//! **Must not know:** stores, the catalog, anything that comes from a guest.

#![forbid(unsafe_code)]

pub mod client;
mod deadlines;
pub mod process;
mod protocol;
mod rescue;

pub use client::{Armed, Keeper, TooLate, Unkept};
