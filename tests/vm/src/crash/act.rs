//! The acts: what is there before each, the words of the command, and the tree that it makes.

use super::scene::{BASE, Scene};
use super::view::{UNDO_POINT, View};
use crate::walk::Violation;

/// Name of a clone: behind those of the machine, in the order of the alphabet.
pub(super) const CLONE: &str = "zz-clone";

/// Something that is done to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Act {
    /// `take` of a running guest, paused throughout.
    TakeStopCopy,
    /// `take` of a running guest, in rounds.
    TakePreCopy,
    /// `take` of a running guest that runs on.
    TakeLive,
    /// `take --disk-only` of a running guest.
    TakeDiskOnly,
    /// `take` of a running guest that hears Ctrl-C while memory is saved, and is taken back.
    TakeCancelled,
    /// `goto` from a running guest to a running one.
    Goto,
    /// The same, with memory that is loaded, not mapped, on both sides.
    GotoLoaded,
    /// `goto` with nothing kept.
    GotoDiscard,
    /// `goto --off` from a running guest.
    GotoToOff,
    /// `goto` from a machine that is off to a running guest.
    GotoFromOff,
    /// `goto` where the two cannot be there at once.
    GotoInPlace,
    /// The same, with memory that is loaded, not mapped.
    GotoInPlaceLoaded,
    /// `undo` of a goto.
    UndoGoto,
    /// `gc --now` with layers and packs to remove and a pack to rewrite.
    Gc,
    /// `start`.
    Start,
    /// `stop`.
    Stop,
    /// `kill`.
    Kill,
    /// `stop` of a machine that goes back when it is powered off.
    StopBack,
    /// `suspend`.
    Suspend,
    /// `start` of a machine that is suspended.
    Wake,
    /// `edit --group` of a machine that is suspended.
    Regroup,
    /// `clone` of a guest that runs.
    Clone,
    /// `fork` of a guest that runs.
    Fork,
    /// A disk settles, in the background, after a `take --disk-only` of a running guest.
    Settle,
    /// `take` of a machine that is off.
    TakeOff,
    /// `rm` of a snapshot in the middle.
    Rm,
    /// A snapshot in the middle expires, a second after the command that asks for it.
    Expire,
    /// `rm --tree`.
    RmTree,
    /// `rm` of the machine.
    RmMachine,
    /// `edit` of a snapshot.
    Edit,
    /// `edit` of the machine's name.
    Rename,
    /// `undo` of a take.
    UndoTake,
    /// `undo` of a `rm`.
    UndoRm,
    /// `undo` of an `edit`.
    UndoEdit,
    /// `edit --group` of a machine that is off.
    RegroupOff,
    /// `clone --full` of a machine that is off.
    CloneFull,
    /// The same with `--dir`.
    CloneTo,
    /// `group create`.
    GroupCreate,
    /// `group rm`.
    GroupRm,
}

/// Which machine an act is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// A guest that runs.
    Guest,
    /// The same with a port of the host's, so that there can be only one.
    GuestWithPort,
    /// A machine that is off and never ran.
    Cold,
}

/// An act that is about to be done.
pub(super) struct Plan {
    pub(super) words: String,
    /// The entry of the journal.
    pub(super) kind: &'static str,
    pub(super) old: View,
    pub(super) new: View,
    /// A snapshot to go to afterwards, whatever happened, besides what is new.
    pub(super) also: Option<String>,
}

impl Act {
    /// Where it is played.
    pub fn stage(self) -> Stage {
        match self {
            Act::GotoInPlace | Act::GotoInPlaceLoaded => Stage::GuestWithPort,
            _ if self < Act::TakeOff => Stage::Guest,
            _ => Stage::Cold,
        }
    }

    /// A snapshot of a guest that runs is made of here.
    pub(super) fn takes(self) -> bool {
        matches!(self, Act::TakeStopCopy | Act::TakePreCopy | Act::TakeLive | Act::TakeDiskOnly | Act::Settle)
    }

    /// Only the disks are taken.
    pub(super) fn leaves_memory_out(self) -> bool {
        matches!(self, Act::TakeDiskOnly | Act::Settle)
    }

    /// Here becomes another state.
    pub(super) fn goes(self) -> bool {
        matches!(
            self,
            Act::Goto
                | Act::GotoLoaded
                | Act::GotoDiscard
                | Act::GotoToOff
                | Act::GotoFromOff
                | Act::GotoInPlace
                | Act::GotoInPlaceLoaded
                | Act::UndoGoto
                | Act::StopBack
        )
    }

    /// It is about a machine whose memory was loaded: only that can be taken while it runs on.
    pub(super) fn loads(self) -> bool {
        matches!(self, Act::TakeLive | Act::GotoLoaded | Act::GotoInPlaceLoaded)
    }

    /// The old machine ends before the new one is there.
    pub(super) fn is_in_place(self) -> bool {
        matches!(self, Act::GotoInPlace | Act::GotoInPlaceLoaded)
    }

    /// Another machine is made of it.
    pub(super) fn clones(self) -> bool {
        matches!(self, Act::Clone | Act::Fork | Act::CloneFull | Act::CloneTo)
    }

    /// It happens after the command, by itself.
    pub(super) fn comes_later(self) -> bool {
        matches!(self, Act::Expire | Act::Settle)
    }

    /// What it comes to is done without it too, by the next daemon.
    pub(super) fn is_due(self) -> bool {
        self == Act::StopBack
    }

    /// It is about whether there is a process at all.
    pub(super) fn switches(self) -> bool {
        matches!(self, Act::Start | Act::Stop | Act::Kill)
    }

    /// Brings about what has to be there before, and says what comes.
    pub(super) fn prepare(self, scene: &mut Scene) -> Result<Plan, Violation> {
        scene.number += 1;
        let (m, number) = (scene.machine(), scene.number);
        let fresh = format!("t{number}");
        match self {
            Act::UndoGoto => {
                scene.ok(&format!("goto {m}@{BASE}"))?;
                scene.keep_undo_point()?;
            }
            Act::Gc => scene.make_garbage()?,
            Act::Start | Act::GotoFromOff => {
                scene.ok(&format!("kill {m}"))?;
                scene.here.running = false;
            }
            Act::StopBack => drop(scene.ok(&format!("set {m} --on-poweroff back"))?),
            Act::Wake => drop(scene.ok(&format!("suspend {m}"))?),
            Act::Regroup => {
                // What was left where it came from before.
                scene.ok("gc --now")?;
                scene.ok(&format!("suspend {m}"))?;
                scene.ok(&format!("group create g{number}"))?;
            }
            Act::RegroupOff | Act::GroupRm => drop(scene.ok(&format!("group create g{number}"))?),
            Act::UndoTake => drop(scene.ok(&format!("take {m} {fresh}"))?),
            Act::UndoRm => drop(scene.ok(&format!("rm {m}@c2"))?),
            Act::UndoEdit => drop(scene.ok(&format!("edit {m}@c2 --name {fresh}"))?),
            _ => {}
        }
        let (old, _) = View::read(&scene.spinney)?;
        let was = || old.clone();
        let point = |here: &str| was().with(UNDO_POINT).at(here);
        let take = |mode: &str| (format!("take {m} {fresh}{mode}"), "take", was().with(&fresh).at(&fresh));
        let mut also = None;
        let (words, kind, new) = match self {
            Act::TakeStopCopy => take(" --mode stop-copy"),
            Act::TakePreCopy => take(" --mode pre-copy"),
            Act::TakeLive => take(" --mode live"),
            Act::TakeDiskOnly | Act::Settle => take(" --disk-only"),
            Act::TakeOff => take(""),
            Act::TakeCancelled => (format!("take {m} {fresh} --mode pre-copy"), "take", was()),
            Act::Goto | Act::GotoLoaded | Act::GotoInPlace | Act::GotoInPlaceLoaded | Act::GotoFromOff => {
                (format!("goto {m}@{BASE}"), "goto", point(BASE))
            }
            Act::GotoDiscard => (format!("goto {m}@{BASE} --discard --yes"), "goto", was().at(BASE)),
            Act::GotoToOff => (format!("goto {m}@{BASE} --off"), "goto", point(BASE)),
            Act::UndoGoto => {
                also = scene.kept.clone();
                ("undo".to_owned(), "undo", point(BASE))
            }
            Act::Gc => {
                also = Some("gb".to_owned());
                ("gc --now".to_owned(), "gc", was())
            }
            Act::Start => (format!("start {m}"), "start", was()),
            Act::Stop => (format!("stop {m}"), "stop", was()),
            Act::Kill => (format!("kill {m}"), "kill", was()),
            Act::StopBack => (format!("stop {m}"), "power-off goto", point(BASE)),
            Act::Suspend => (format!("suspend {m}"), "suspend", was()),
            Act::Wake => (format!("start {m}"), "start", was()),
            Act::Regroup | Act::RegroupOff => (format!("edit {m} --group g{number}"), "edit", was()),
            Act::Clone => (format!("clone {m} {CLONE}"), "clone", was().with_clone(CLONE)),
            Act::Fork => (format!("fork {m} {CLONE}"), "fork", was().with_clone(CLONE)),
            Act::CloneFull => (format!("clone {m} {CLONE} --full"), "clone", was().with_clone(CLONE)),
            Act::CloneTo => {
                let dir = scene.clones_folder();
                (format!("clone {m} {CLONE} --full --dir {dir}"), "clone", was().with_clone(CLONE))
            }
            Act::GroupCreate => (format!("group create g{number}"), "group create", was()),
            Act::GroupRm => (format!("group rm g{number} --yes"), "group rm", was()),
            Act::Rm => (format!("rm {m}@c2"), "rm", was().without("c2")),
            Act::Expire => (format!("edit {m}@c2 --expire 1s"), "expire", was().without("c2")),
            Act::RmTree => (format!("rm {m}@c2 --tree --yes"), "rm", was().without("c3").without("c2")),
            Act::RmMachine => (format!("rm {m} --yes"), "rm", View::default()),
            Act::Edit => (format!("edit {m}@c2 --name {fresh} -m note"), "edit", was().renamed("c2", &fresh)),
            Act::Rename => {
                (format!("edit {m} --name {fresh}"), "edit", View { machine: fresh.clone(), ..was() })
            }
            Act::UndoTake => ("undo".to_owned(), "undo", was().without(&fresh)),
            Act::UndoRm | Act::UndoEdit => ("undo".to_owned(), "undo", scene.canon.clone()),
        };
        Ok(Plan { words, kind, old, new, also })
    }
}
