//! The snapshot file system: a group's page store as plain files, read-only, through FUSE.
//!
//! ```text
//!   /TARGET/SNAPSHOT/ram, disk0.raw, device-state, snapshot.json ...      for people; what is listed ([`list`])
//!   /.ram/HASH-BYTES     the memory that a map describes                  for QEMU, which maps it privately
//!   /.disk/HASH-BYTES    the disk that a map describes                    for QEMU, as a layer below others
//! ```
//! Nothing is read before it is asked for, and what was read stays in the kernel's page cache, which all forks of a snapshot share. The
//! files below the dotted folders are named after what they hold, so they need no list, never change, and are there for as long as
//! the store has what the map needs.
//!
//! A guest that runs on such a file must not notice the death of whoever serves it. Two processes hold the connection to the kernel, one
//! serving and one standing by ([`process`]); if the one who serves dies, the other takes over, and asks the kernel to send again what had
//! not been answered. What cannot be read rightly is not answered at all ([`held`]): an error would end QEMU (SIGBUS), and wrong bytes
//! would be worse.
//!
//! [`view`] is the daemon's side: it mounts, starts, finds again and ends.
//!
//! **Must not know:** machines, QEMU, the catalog. It has the page store, read as a visitor, and a list of names.

#![forbid(unsafe_code)]

mod fault;
mod fs;
mod handover;
pub mod held;
pub mod list;
mod log;
pub mod mount;
mod nodes;
pub mod process;
mod serve;
pub mod view;

pub use nodes::MapFile;
