//! What callers hand in and get back. Bytes are integers, times are UTC, durations are in the unit of the field's name.

use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::config::MachineConfig;

/// Whether a machine has a process, and what that does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Power {
    /// No process.
    Off,
    /// The guest's CPUs stand still.
    Paused,
    /// The guest runs.
    Running,
    /// The process went away without our doing (host restart, crash).
    LostPower,
    /// No process; its memory is kept, and `start` goes on from there.
    Suspended,
}

/// One line of `ls`, one page of `show`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Machine {
    /// Stable id, 16 hex digits.
    pub id: String,
    /// Name.
    pub name: String,
    /// Power state at this moment.
    pub power: Power,
    /// Why QEMU has stopped the guest, if it has: "disk0 has no room on the host". Such a guest goes on by itself.
    pub stopped_because: Option<String>,
    /// Why the guest waits for a page of its memory, if it does: "page 17 is damaged: ...". It goes on when that is mended.
    #[serde(default)]
    pub held_because: Option<String>,
    /// Name of the group.
    pub group: String,
    /// Why the group's page store cannot be used, if it cannot: then the machine cannot be worked with.
    #[serde(default)]
    pub group_problem: Option<String>,
    /// Settings.
    pub config: MachineConfig,
    /// Universally unique id the guest sees.
    pub uuid: String,
    /// MAC address of each card.
    pub macs: Vec<String>,
    /// Name of the snapshot that here comes from.
    pub parent: Option<String>,
    /// Number of snapshots, undo points left out.
    pub snapshots: u64,
    /// Refuses `rm`.
    pub protected: bool,
    /// It is removed when it stops.
    #[serde(default)]
    pub throw_away: bool,
    /// When it was created.
    pub created: Timestamp,
    /// Process id of QEMU.
    pub pid: Option<u32>,
    /// Full name of the undo point that is the machine as it was, if a goto had to end it and could not bring it back.
    #[serde(default)]
    pub brought_back_by: Option<String>,
    /// Why it was left as it is when it was powered off, though its settings say that something is to be done then.
    #[serde(default)]
    pub left_at_power_off: Option<String>,
    /// Unix socket of the serial console while a process exists.
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub console: Option<PathBuf>,
    /// Unix socket of its VNC screen while a process exists.
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub vnc: Option<PathBuf>,
    /// Operation under way, if any: its kind ("take").
    pub busy: Option<String>,
    /// Accelerator of the running process ("kvm", "tcg").
    pub accel: Option<String>,
    /// QEMU's version, of the running process.
    pub qemu: Option<String>,
}

/// Result of `stop` and `kill`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct PoweredOff {
    /// The machine.
    #[serde(flatten)]
    pub machine: Machine,
    /// What was done with it then, as its settings say: an operation of its own.
    #[serde(default)]
    pub then: Option<Operation>,
}

/// How memory was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Paused throughout.
    StopCopy,
    /// Copied in rounds while the machine runs, paused for the last.
    PreCopy,
    /// Paused for the instant; memory is copied while the machine runs on.
    Live,
    /// No memory was taken: the machine was off.
    Off,
    /// Memory was there already: the machine was suspended.
    Suspended,
    /// No memory was taken, though the machine ran (`--disk-only`).
    DiskOnly,
}

/// Whether a snapshot can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum SnapshotState {
    /// It is on its way to the disk: the guest runs on. It comes to be with its take, or not at all.
    Saving,
    /// It is durable.
    Ready,
    /// The last `fsck --repair` could not mend it: what it needs is damaged or gone. Its disks may be whole when its memory is not.
    Damaged,
}

/// A snapshot as `tree` and `show` have it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Snapshot {
    /// Stable id, 16 hex digits.
    pub id: String,
    /// Target's name.
    pub target: String,
    /// Name; unique in its target.
    pub name: String,
    /// Durable, or on its way.
    pub state: SnapshotState,
    /// Note, possibly empty.
    pub note: String,
    /// Nearest visible ancestor's id.
    pub parent: Option<String>,
    /// When it was taken.
    pub created: Timestamp,
    /// An undo point: kept by `goto`, folded away in `tree`.
    pub undo_point: bool,
    /// Power state recorded, which comes back at `goto`.
    pub power: Power,
    /// How it was taken.
    pub mode: Mode,
    /// Microseconds between QEMU's STOP and RESUME; none if the guest did not run.
    pub pause_us: Option<u64>,
    /// Microseconds from the command to durable.
    pub took_us: u64,
    /// Bytes of guest memory it holds, before anything is shared.
    pub memory_bytes: u64,
    /// Bytes it added to the page store.
    pub stored_bytes: u64,
    /// Bytes of the disk layers that its parent does not have: what was written since.
    pub disk_bytes: u64,
    /// Pages by cause.
    pub saved: pages::Saved,
    /// No policy, series or expiry removes it.
    pub keep: bool,
    /// When it goes by itself, if it does. Later if its machine is worked on then, or as long as it is protected.
    #[serde(default)]
    pub expires: Option<Timestamp>,
    /// Refuses `rm`.
    pub protected: bool,
    /// Layers under the disk with the longest chain.
    pub depth: u32,
    /// Settings at the time.
    pub config: MachineConfig,
}

/// Options of `take`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(default, deny_unknown_fields)]
pub struct TakeOptions {
    /// Name; `snap-N` if left out.
    pub name: Option<String>,
    /// Note.
    pub note: String,
    /// Mode; the one with the least pause if left out.
    pub mode: Option<Mode>,
    /// Leave memory out.
    pub disk_only: bool,
    /// Set `keep`.
    pub keep: bool,
    /// Seconds until it goes by itself, as by `rm`; never if left out. Not together with `keep`.
    pub expire_seconds: Option<u64>,
    /// Microseconds that the guest may stand still; a take that would need more is rolled back.
    pub max_pause_us: Option<u64>,
}

/// Power state wanted after `goto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum GotoPower {
    /// As recorded.
    Recorded,
    /// Disks only.
    Off,
    /// Paused.
    Paused,
    /// Running.
    Running,
}

/// Result of `goto` and `back`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct GotoReport {
    /// Where the target stands now.
    pub snapshot: Snapshot,
    /// Power state now.
    pub power: Power,
    /// The undo point that keeps what was left; none with `--discard`.
    pub undo_point: Option<Snapshot>,
    /// Microseconds from the end of the old process (or the command, if there was none) to the guest being as wanted.
    pub took_us: u64,
    /// Why the old process had to end before the new one could start, which takes longer; none if it did not have to.
    pub in_place: Option<String>,
}

/// Changes of `edit`; what is `None` stays.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(default, deny_unknown_fields)]
pub struct Edit {
    /// New name.
    pub name: Option<String>,
    /// New note.
    pub note: Option<String>,
    /// New `keep` (snapshots only). What is kept does not expire: setting it takes an expiry away.
    pub keep: Option<bool>,
    /// Seconds from now until it goes by itself, as by `rm`; 0: never (snapshots only).
    pub expire_seconds: Option<u64>,
    /// Take the images of the user's under the disks as they are now (machines only).
    pub accept_disks: bool,
    /// Group that it is to belong to (machines only, and nothing else at the same time): all that is stored of it is copied there.
    pub group: Option<String>,
}

/// Result of an `edit`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Edited {
    /// Full name now.
    pub address: String,
    /// False if all was so already.
    #[serde(default)]
    pub changed: bool,
}

/// What `clone` makes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CloneOptions {
    /// Name of the new machine.
    pub name: String,
    /// Copy the disks: nothing of the new machine lies over anything of the old one.
    #[serde(default)]
    pub full: bool,
    /// Folder for the copies, as images that the new machine lies over; among the layers of its group if none.
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    #[serde(default)]
    pub dir: Option<PathBuf>,
}

/// Result of `clone`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Cloned {
    /// The new machine.
    pub machine: Machine,
    /// Images in the folder that was chosen.
    #[cfg_attr(feature = "schema", schema(value_type = Vec<String>))]
    pub files: Vec<PathBuf>,
}

/// What becomes of a fork's identity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Identity {
    /// Inside all addresses are the same; its networks are its own.
    #[default]
    Isolate,
    /// Addresses and names become new, as far as the guest lets them.
    Renew,
    /// It takes itself for what it was forked from, but for what makes its random numbers others.
    Keep,
}

/// What `fork` makes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ForkOptions {
    /// Name of the new machine, or what the names of several begin with; made from the source's if none.
    #[serde(default)]
    pub name: Option<String>,
    /// How many; 1 if left out.
    #[serde(default = "one")]
    pub count: u32,
    /// What becomes of their identity.
    #[serde(default)]
    pub identity: Identity,
    /// They are removed when they stop.
    #[serde(default)]
    pub throw_away: bool,
}

fn one() -> u32 {
    1
}

/// A part of a machine's identity after a fork.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct IdentityItem {
    /// What it is: "MAC address".
    pub what: String,
    /// What became of it.
    pub state: ItemState,
    /// Why, or when it will.
    pub why: Option<String>,
}

/// What became of a part of a machine's identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum ItemState {
    /// It is new.
    Renewed,
    /// It is the same, as was asked for.
    Kept,
    /// It becomes new later.
    Pending,
    /// It stays the same, though it should not.
    Impossible,
}

/// One machine that `fork` made.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Fork {
    /// The machine, running.
    pub machine: Machine,
    /// What became of its identity.
    pub identity: Vec<IdentityItem>,
}

/// Result of `fork`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Forked {
    /// What was forked.
    pub from: String,
    /// The forks, all of them.
    pub forks: Vec<Fork>,
    /// Microseconds that the source stood still for it; none if it did not run, or was not asked for anything.
    pub source_pause_us: Option<u64>,
    /// Microseconds from the command to all of them running.
    pub took_us: u64,
}

/// Result of `mount`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Mounted {
    /// Where the snapshots are: a folder for each machine, with one for each snapshot.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub path: PathBuf,
    /// Name of the group that they are of.
    pub group: String,
}

/// A target's tree.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Tree {
    /// The machine.
    pub machine: Machine,
    /// Its snapshots, parents before children, siblings by time. Undo points included.
    pub snapshots: Vec<Snapshot>,
    /// Id of the snapshot that here is a child of.
    pub here: Option<String>,
}

/// What `rm` would take away; `rm` executes the same plan.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct RemovePlan {
    /// Full names of the snapshots that go.
    pub snapshots: Vec<String>,
    /// The whole machine goes.
    pub machine: Option<String>,
    /// Bytes that come back through `gc` once undo no longer pins them.
    pub reclaimable_bytes: u64,
    /// Bytes that stay, because others need them.
    pub kept_bytes: u64,
    /// Who needs them ("here", "web@after").
    pub kept_by: Vec<String>,
    /// True if a terminal should be asked first.
    pub needs_confirmation: bool,
}

/// Space of one snapshot, or of here (empty name).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct DuRow {
    /// Group of the target.
    pub group: String,
    /// Target.
    pub target: String,
    /// Snapshot; empty for here.
    pub name: String,
    /// Undo point.
    pub undo_point: bool,
    /// Bytes that only it needs.
    pub exclusive: u64,
    /// Bytes it shares with others.
    pub shared: u64,
}

/// Space of one group.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct GroupSpace {
    /// Name of the group.
    pub group: String,
    /// Allocated bytes of its page store: packs, index, and what a repair set aside.
    pub store_bytes: u64,
    /// Bytes of those that a repair set aside: no snapshot needs them.
    #[serde(default)]
    pub set_aside_bytes: u64,
    /// Allocated bytes of its disk layers.
    pub disk_bytes: u64,
    /// Bytes that `gc` would free now.
    pub reclaimable: u64,
    /// Bytes that only the undo log still holds.
    pub pinned_by_undo: u64,
    /// Pages of all listed takes, by cause.
    pub saved: pages::Saved,
    /// Bytes of the layers that nobody writes to any more, users' images included.
    #[serde(default)]
    pub frozen_bytes: u64,
    /// Bytes of those whose blocks the page store knows: a page that is there is not stored again.
    #[serde(default)]
    pub known_bytes: u64,
    /// Why its page store cannot be used; its pages count nothing then.
    pub problem: Option<String>,
}

/// Result of `du`. The numbers are sums over the groups that were looked at: all, or that of the target.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Du {
    /// Per snapshot.
    pub rows: Vec<DuRow>,
    /// Allocated bytes of page packs.
    pub store_bytes: u64,
    /// Allocated bytes of disk layers.
    pub disk_bytes: u64,
    /// Bytes that `gc` would free now.
    pub reclaimable: u64,
    /// Bytes that only the undo log still holds.
    pub pinned_by_undo: u64,
    /// Pages of all listed takes, by cause.
    pub saved: pages::Saved,
    /// Bytes that `--without` would free, if asked.
    pub without: Option<u64>,
    /// The same group by group.
    pub groups: Vec<GroupSpace>,
}

/// What `gc` does, or would do, in one group.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct GroupGc {
    /// Name of the group.
    pub group: String,
    /// Pack files removed or rewritten.
    pub packs: u64,
    /// Pack files compressed.
    #[serde(default)]
    pub compressed: u64,
    /// Bytes of `bytes` that were freed by that. A plan does not know them: its `bytes` are without.
    #[serde(default)]
    pub compressed_away: u64,
    /// Disk layers removed.
    pub layers: u64,
    /// Bytes freed, or to be freed.
    pub bytes: u64,
    /// Why nothing was done there.
    pub problem: Option<String>,
}

/// Plan and result of `gc`. The numbers are sums over all groups.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct GcReport {
    /// Nothing was done.
    pub dry_run: bool,
    /// Pack files removed or rewritten.
    pub packs: u64,
    /// Disk layers removed.
    pub layers: u64,
    /// Bytes freed, or to be freed.
    pub bytes: u64,
    /// Operations that can no longer be undone afterwards ("rm web@old").
    pub ends_undo_of: Vec<String>,
    /// The same group by group.
    pub groups: Vec<GroupGc>,
}

/// One thing that `fsck` found.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Damage {
    /// Name of the group; none if it is about the catalog.
    #[serde(default)]
    pub group: Option<String>,
    /// It is a file of the user's, that a machine lies over: to put it back as it was mends it.
    #[serde(default)]
    pub users_file: bool,
    /// The thing: a file, a page, a catalog row.
    pub what: String,
    /// What is wrong with it.
    pub problem: String,
    /// Snapshots that it touches ("web@before").
    pub snapshots: Vec<String>,
}

/// What `fsck` looked at in one group.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct GroupFsck {
    /// Name of the group.
    pub group: String,
    /// Packs read.
    pub packs: u64,
    /// Pages read and compared with their names.
    pub pages: u64,
    /// Layers looked at.
    pub layers: u64,
    /// Snapshots walked.
    pub snapshots: u64,
    /// Things that are damaged.
    pub damage: u64,
}

/// Result of `fsck`. The numbers are sums over all groups.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct FsckReport {
    /// Packs read.
    pub packs: u64,
    /// Pages read and compared with their names.
    pub pages: u64,
    /// Layers looked at.
    pub layers: u64,
    /// Snapshots walked.
    pub snapshots: u64,
    /// What is wrong; empty if nothing is. After a repair: what is still wrong.
    pub damage: Vec<Damage>,
    /// What a repair did, in sentences.
    pub mended: Vec<String>,
    /// There are packs from which a repair may save something.
    #[serde(default)]
    pub mendable: bool,
    /// The same group by group.
    #[serde(default)]
    pub groups: Vec<GroupFsck>,
}

/// State of a journalled operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum OpState {
    /// Under way.
    Running,
    /// Done.
    Done,
    /// Failed; everything was rolled back.
    Failed,
    /// Cancelled; everything was rolled back.
    Cancelled,
    /// Undone by a later operation.
    Undone,
}

/// One entry of the operation log.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Operation {
    /// Id, 16 hex digits.
    pub id: String,
    /// Kind: "take", "goto", "rm", ...
    pub kind: String,
    /// What it was about: "web@before".
    pub subject: String,
    /// What an edit changed: "name", "note", "keep", "expiry", "group".
    #[serde(default)]
    pub changed: Vec<String>,
    /// State.
    pub state: OpState,
    /// Start.
    pub started: Timestamp,
    /// End.
    pub ended: Option<Timestamp>,
    /// Sentence of the error, if it failed.
    pub error: Option<String>,
    /// `undo` can take it back.
    pub undoable: bool,
}

/// Result of `undo`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Undone {
    /// What was taken back ("take web@before").
    pub operation: String,
    /// It was an undo: what that had taken back is done again.
    pub redone: bool,
    /// The operation whose undo does it again; none if this was one.
    pub again: Option<String>,
}

/// One line of `doctor`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Check {
    /// What was looked at: "QEMU", "accelerator".
    pub name: String,
    /// Good, works with less, or missing.
    pub level: CheckLevel,
    /// What was found.
    pub found: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// How good a [`Check`] came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum CheckLevel {
    /// As wanted.
    Good,
    /// Works, with less.
    Limited,
    /// Spinney cannot do its job.
    Missing,
}
