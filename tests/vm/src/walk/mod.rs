//! A seeded random walk over one machine's tree, with a model beside it that says what must come back.
//!
//! The steps come from a deck of cards: shuffled by the seed, so that every kind of step happens in every order sooner or
//! later, and each at least once in a deck. After every step the guest is asked for everything that can be checked
//! ([`Walk::check`]). A walk ends at the first [`Violation`].

mod check;
mod cut;
mod model;
mod names;
mod random;
mod steps;
mod undo;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::disks::wrong_layers;
use crate::guest::GuestError;
use crate::harness::{Failed, Spinney};

pub use cut::{Blow, SOON};
pub use model::{Inverse, Life, Model, Moment, Node, Power, Range};
pub use random::Random;

/// Name of the machine, until it is renamed.
pub const NAME: &str = "web";

/// MiB that a walk fills by itself.
pub const FILL: u64 = 48;

/// Something that must not be.
#[derive(Debug, Error)]
pub enum Violation {
    /// A command failed that should work.
    #[error(transparent)]
    Command(#[from] Failed),
    /// The guest does not answer as a whole guest does.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// A check found something.
    #[error("{0}")]
    Wrong(String),
}

/// A kind of step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Card {
    /// `take --mode stop-copy` of a running guest.
    TakeStopCopy,
    /// `take --mode pre-copy` of a running guest.
    TakePreCopy,
    /// `take --mode live` of a running guest.
    TakeLive,
    /// `take` of a paused guest.
    TakePaused,
    /// `take` of a machine that is off.
    TakeOff,
    /// `take --disk-only` of a running guest.
    TakeDiskOnly,
    /// `goto` with these words behind the address.
    Goto(&'static str),
    /// `back`.
    Back,
    /// `goto`, something done there, `take`.
    Branch,
    /// `fork` of a snapshot, and `undo` of that.
    Fork,
    /// `rm` of a snapshot.
    Rm,
    /// `rm --tree` of a snapshot with what is below it.
    RmTree,
    /// `rm` of the machine, and `undo` of that.
    RmMachine,
    /// `edit` of a snapshot's name and note.
    Edit,
    /// `edit` of the machine's name.
    Rename,
    /// `edit --expire` of a snapshot, which goes by itself.
    Expire,
    /// `edit --group` of the machine: all of it is copied to another group, or back.
    Regroup,
    /// `protect` of a snapshot that is not, and nothing removes it.
    Protect,
    /// `unprotect` of one that is.
    Unprotect,
    /// `protect` of the machine: it cannot be removed until `unprotect`.
    ProtectMachine,
    /// `gc --now`.
    Gc,
    /// `undo`.
    Undo,
    /// The daemon is killed; the next command starts it.
    KillDaemon,
    /// Whoever serves the memory that is mapped is killed; somebody else takes over.
    KillView,
    /// Memory that is brought back is loaded from now on, or mapped again.
    View,
    /// The power is cut.
    Cut,
    /// Entries are added to the log on the disk.
    LogStep,
    /// The log goes on by itself, or no longer.
    LogRate,
    /// Pages of the filled memory change.
    Mutate,
    /// Memory is filled anew.
    Fill,
    /// Pages are dirtied all the time, or no longer.
    Writer,
    /// The disk is written to all the time, unsynced, or no longer.
    DiskWriter,
    /// The disk is written to while a running guest is taken and afterwards, then back to the snapshot.
    TakeWhileWriting,
}

/// A deck.
const DECK: &[Card] = &[
    Card::TakeStopCopy,
    Card::TakeStopCopy,
    Card::TakePreCopy,
    Card::TakePreCopy,
    Card::TakeLive,
    Card::TakeLive,
    Card::TakePaused,
    Card::TakePaused,
    Card::TakeOff,
    Card::TakeDiskOnly,
    Card::Goto(""),
    Card::Goto(""),
    Card::Goto(""),
    Card::Goto(" --discard --yes"),
    Card::Goto(" --paused"),
    Card::Goto(" --off"),
    Card::Goto(" --running"),
    Card::Back,
    Card::Branch,
    Card::Branch,
    Card::Fork,
    Card::Fork,
    Card::Rm,
    Card::Rm,
    Card::RmTree,
    Card::RmMachine,
    Card::Edit,
    Card::Edit,
    Card::Rename,
    Card::Expire,
    Card::Regroup,
    Card::Protect,
    Card::Unprotect,
    Card::ProtectMachine,
    Card::Gc,
    Card::Undo,
    Card::Undo,
    Card::Undo,
    Card::Undo,
    Card::KillDaemon,
    Card::KillDaemon,
    Card::KillView,
    Card::View,
    Card::View,
    Card::Cut,
    Card::LogStep,
    Card::LogRate,
    Card::Mutate,
    Card::Fill,
    Card::Writer,
    Card::Writer,
    Card::DiskWriter,
    Card::TakeWhileWriting,
];

/// Steps of one kind.
#[derive(Clone, Copy, Debug, Default)]
pub struct Played {
    /// How many.
    pub count: u64,
    /// What they took together, without the checks after them.
    pub total: Duration,
    /// What the longest took.
    pub longest: Duration,
}

/// One walk.
#[derive(Debug)]
pub struct Walk {
    /// Where the machine lives.
    pub spinney: Spinney,
    /// What must be.
    pub model: Model,
    /// What the machine is called now.
    pub name: String,
    /// What was done, for whoever reads the failure.
    pub history: Vec<String>,
    /// What was done, by kind.
    pub played: BTreeMap<String, Played>,
    /// What the checks took together.
    pub checked: Duration,
    random: Random,
    /// How long the guest may take to answer.
    patience: Duration,
    /// MiB that `fill` fills.
    fill: u64,
    /// The last number given to a snapshot.
    number: u64,
    /// The last mark written.
    marks: u64,
    /// The machine belongs to another group than the default one.
    elsewhere: bool,
    /// Memory that is brought back is mapped.
    mapped: bool,
    /// The guest's memory came from a snapshot, and was not looked at since.
    loaded: bool,
}

impl Walk {
    /// A machine of 256 MiB, created and booted, with `fill` MiB filled.
    pub fn begin(spinney: Spinney, seed: u64, fill: u64) -> Result<Self, Violation> {
        spinney.create_guest(NAME, 256)?;
        let mut walk = Self {
            spinney,
            model: Model::new(0),
            name: NAME.to_owned(),
            history: Vec::new(),
            played: BTreeMap::new(),
            checked: Duration::ZERO,
            random: Random::new(seed),
            patience: Duration::from_secs(30),
            fill,
            number: 0,
            marks: 0,
            elsewhere: false,
            mapped: true,
            loaded: false,
        };
        walk.need(Power::Running)?;
        walk.play(Card::Fill)?;
        Ok(walk)
    }

    /// Sets how long the guest may take to answer, in place of 30 s.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Plays `steps` cards from shuffled decks, with the checks after each.
    pub fn wander(&mut self, steps: usize) -> Result<(), Violation> {
        let mut deck = Vec::new();
        for _ in 0..steps {
            if deck.is_empty() {
                deck = DECK.to_vec();
                self.random.shuffle(&mut deck);
            }
            if let Some(card) = deck.pop() {
                self.play(card)?;
            }
        }
        Ok(())
    }

    /// Plays one card, with the checks after it.
    pub fn play(&mut self, card: Card) -> Result<(), Violation> {
        self.play_it(card).map_err(|violation| {
            // A guest that waits for a page that cannot be read does not answer.
            let shown = self.spinney.ok(&format!("show {}", self.name)).unwrap_or_default();
            match shown["held_because"].as_str() {
                Some(why) => Violation::Wrong(format!("{violation}; it is held: {why}")),
                None => violation,
            }
        })
    }

    fn play_it(&mut self, card: Card) -> Result<(), Violation> {
        let begun = Instant::now();
        self.history.push(format!("{card:?}"));
        self.step(card)?;
        let stepped = begun.elapsed();
        let kind = format!("{card:?}");
        let played = self.played.entry(kind.split('(').next().unwrap_or_default().to_owned()).or_default();
        played.count += 1;
        played.total += stepped;
        played.longest = played.longest.max(stepped);
        self.check()?;
        self.checked += begun.elapsed() - stepped;
        let power = self.model.here.power.word();
        let said = format!(
            " {power} {:.1} + {:.1} s",
            stepped.as_secs_f64(),
            (begun.elapsed() - stepped).as_secs_f64()
        );
        if let Some(last) = self.history.last_mut() {
            last.push_str(&said);
        }
        Ok(())
    }

    /// The last checks: everything stored is whole, and nothing is left when the machine is removed.
    pub fn end(&mut self) -> Result<(), Violation> {
        self.history.push("the end".to_owned());
        self.need(Power::Off)?;
        self.check()?;
        let wrong = wrong_layers(&self.spinney.layers(), self.spinney.folder());
        if !wrong.is_empty() {
            return Err(Violation::Wrong(wrong.join("\n")));
        }
        let fsck = self.spinney.ok("fsck")?;
        if fsck["damage"].as_array().is_none_or(|damage| !damage.is_empty()) {
            return Err(Violation::Wrong(format!("fsck found {}", fsck["damage"])));
        }
        self.unprotect_all()?;
        self.spinney.ok(&format!("rm {} --yes", self.name))?;
        self.spinney.ok("gc --now")?;
        let left = self.spinney.layers();
        if !left.is_empty() {
            return Err(Violation::Wrong(format!("gc left {left:?} of a machine that was removed")));
        }
        Ok(())
    }
}
