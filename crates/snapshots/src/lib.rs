//! What happens to a target: take, go to, branch, remove. The catalog, the tree and the journal live here.
//!
//! **Must not know:** HTTP, terminals, the user's environment. Plain functions and threads, no async.
//!
//! Verbs are files: `take.rs` is the story of one snapshot from top to bottom, `goto.rs` the way back; `recover.rs` is what
//! happens when either was cut short.

#![forbid(unsafe_code)]

mod address;
mod autostart;
mod capture;
mod catalog;
mod check;
mod clone;
mod collect;
mod config;
mod context;
mod copy_file;
mod create;
mod disks;
mod doctor;
mod du;
mod edit;
mod engine;
mod error;
mod expire;
mod fault;
mod flat_copy;
mod fork;
mod forwards;
mod frozen_file;
mod fsck;
mod full_disk;
mod goto;
mod group;
mod groups;
mod half_made;
mod hash_layers;
mod id;
mod identity;
mod ingest;
mod leaves;
mod let_go;
mod locks;
mod memory;
mod mount;
mod name;
mod new_disks;
mod owner;
mod pins;
mod power;
mod power_off;
mod read_out;
mod recover;
mod regroup;
mod remove;
mod room;
mod running;
mod saving;
mod set;
mod settle;
mod shorten;
mod suspend;
mod swap;
mod switch;
mod take;
mod tree;
mod types;
mod undo;
mod undo_point;
mod views;

pub use config::*;
pub use context::{Context, Progress};
pub use engine::{Engine, Settings};
pub use error::{Code, Error, Result};
pub use expire::Alarm;
pub use group::{Group, GroupRemovePlan};
pub use pages::Saved;
pub use power_off::Watch;
pub use types::*;
