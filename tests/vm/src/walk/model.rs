//! What must be: the tree of snapshots, and for each what the guest said when it was taken.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

/// Power state, in the words of the JSON documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// No process.
    Off,
    /// The guest stands still.
    Paused,
    /// The guest runs.
    Running,
}

impl Power {
    /// Its word.
    pub fn word(self) -> &'static str {
        match self {
            Power::Off => "off",
            Power::Paused => "paused",
            Power::Running => "running",
        }
    }
}

/// A number that went up while nobody looked: it is one of these.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// The least that it can be.
    pub low: u64,
    /// The most.
    pub high: u64,
}

impl Range {
    /// A number that is known.
    pub fn exactly(value: u64) -> Self {
        Self { low: value, high: value }
    }

    /// Whether it can be `value`.
    pub fn allows(self, value: u64) -> bool {
        (self.low..=self.high).contains(&value)
    }

    fn later(self, rate: u64, after: Duration) -> Self {
        // Twice the rate: the host's and an emulated guest's clock are two. Half a second: what is read is read in between.
        let most = rate.saturating_mul(after.as_millis() as u64 + 500).saturating_mul(2) / 1000;
        Self { low: self.low, high: self.high + most }
    }
}

/// What lies in memory and nowhere else.
#[derive(Clone, Debug)]
pub struct Life {
    /// Drawn when the guest booted.
    pub nonce: String,
    /// Over the filled memory.
    pub hash: u64,
    /// Up by one every millisecond.
    pub counter: Range,
    /// Steps of the writer, at least.
    pub steps: u64,
    /// Whether the writer writes.
    pub writing: bool,
    /// Entries a second that go to the log by themselves.
    pub log_rate: u64,
    /// MiB a second that go to the disk by themselves, unsynced.
    pub disk_rate: u64,
}

/// A machine at an instant.
#[derive(Clone, Debug)]
pub struct Moment {
    /// Its power.
    pub power: Power,
    /// Its memory; none if it has none, or boots.
    pub life: Option<Life>,
    /// The last entry of the log on the disk.
    pub log: Range,
    /// What the mark on the disk says; 0 before it is first written.
    pub mark: u64,
}

impl Moment {
    /// The same guest when it may have run on for the time `after`.
    pub fn later(&self, after: Duration) -> Self {
        let rate = self.life.as_ref().map_or(0, |life| life.log_rate);
        let life =
            self.life.as_ref().map(|life| Life { counter: life.counter.later(1000, after), ..life.clone() });
        let log = if rate == 0 { self.log } else { self.log.later(rate, after) };
        Self { power: self.power, life, log, mark: self.mark }
    }

    /// The same with no memory.
    pub fn off(&self) -> Self {
        Self { power: Power::Off, life: None, ..self.clone() }
    }
}

/// A snapshot.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its note.
    pub note: String,
    /// Not to be removed.
    pub protected: bool,
    /// Index of the one that it was taken on.
    pub parent: Option<usize>,
    /// Kept by a goto.
    pub undo_point: bool,
    /// Its name is gone.
    pub removed: bool,
    /// What comes back with it.
    pub moment: Moment,
}

/// How an operation is taken back.
#[derive(Clone, Debug)]
pub enum Inverse {
    /// The snapshot goes; here is again a child of what it was.
    Take(usize, Option<usize>),
    /// The snapshots are back.
    Rm(Vec<usize>),
    /// Go to the undo point.
    Goto(usize),
    /// The snapshot has its old name and note.
    Edit(usize, String, String),
    /// The snapshot does not expire.
    Expiry(usize),
    /// The machine has its old name.
    Rename(String),
    /// The machine is copied back to the group that it came from.
    Regroup,
}

impl Inverse {
    /// Whether `gc --now` leaves what it needs.
    fn outlives_gc(&self, nodes: &[Node]) -> bool {
        match self {
            Inverse::Take(index, _)
            | Inverse::Goto(index)
            | Inverse::Edit(index, ..)
            | Inverse::Expiry(index) => !nodes[*index].removed,
            Inverse::Rm(indices) => indices.iter().all(|&index| !nodes[index].removed),
            Inverse::Rename(_) | Inverse::Regroup => true,
        }
    }
}

/// The tree and where the machine stands.
#[derive(Debug)]
pub struct Model {
    /// All snapshots, removed ones included.
    pub nodes: Vec<Node>,
    /// Index of the snapshot that here comes from.
    pub parent: Option<usize>,
    /// What the guest said last, or what was gone to.
    pub here: Moment,
    /// Since when the guest may have run on.
    pub since: Instant,
    /// By operation id.
    pub undo: HashMap<String, Inverse>,
    /// Of all boots.
    pub nonces: HashSet<String>,
}

impl Model {
    /// A machine that is off, with so many entries in the log on its disk.
    pub fn new(log: u64) -> Self {
        let here = Moment { power: Power::Off, life: None, log: Range::exactly(log), mark: 0 };
        let (undo, nonces) = (HashMap::new(), HashSet::new());
        Self { nodes: Vec::new(), parent: None, here, since: Instant::now(), undo, nonces }
    }

    /// What here can be by now.
    pub fn now(&self) -> Moment {
        if self.here.power == Power::Off { self.here.clone() } else { self.here.later(self.since.elapsed()) }
    }

    /// The nearest that is not removed, from `at` on.
    pub fn visible(&self, mut at: Option<usize>) -> Option<usize> {
        while let Some(index) = at {
            if !self.nodes[index].removed {
                return at;
            }
            at = self.nodes[index].parent;
        }
        None
    }

    /// Indices of the snapshots whose names can be used.
    pub fn named(&self, undo_points: bool) -> Vec<usize> {
        let good = |node: &Node| !node.removed && (undo_points || !node.undo_point);
        (0..self.nodes.len()).filter(|&index| good(&self.nodes[index])).collect()
    }

    /// The snapshot and everything below it that has a name.
    pub fn subtree(&self, top: usize) -> Vec<usize> {
        let below = |index: usize| {
            let up = |at: &usize| self.nodes[*at].parent;
            std::iter::successors(Some(index), up).any(|at| at == top)
        };
        self.named(true).into_iter().filter(|&index| below(index)).collect()
    }

    /// `gc --now`: what was removed cannot come back any more.
    pub fn collect(&mut self) {
        let nodes = &self.nodes;
        self.undo.retain(|_, inverse| inverse.outlives_gc(nodes));
    }

    /// Adds a snapshot of here, whose moment is `moment`.
    pub fn add(&mut self, id: &str, name: &str, undo_point: bool, moment: Moment) -> usize {
        let node = Node {
            id: id.to_owned(),
            name: name.to_owned(),
            note: if undo_point { "before goto".to_owned() } else { String::new() },
            protected: false,
            parent: self.parent,
            undo_point,
            removed: false,
            moment,
        };
        self.nodes.push(node);
        self.nodes.len() - 1
    }
}
