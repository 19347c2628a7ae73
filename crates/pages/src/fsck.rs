//! Checking everything: each pack's structure, each page and node against its name, each root's map.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::disk::DiskFile;
use crate::error::{Error, Kind, Problem, Result};
use crate::map::{Child, Forest};
use crate::pack::{Entry, Pack, Place, Refused, read_footer, read_layout};
use crate::read::read_span;
use crate::store::{Inner, Store};
use crate::sync::{Mutex, lock, read};
use crate::threads::side_by_side;
use crate::{MapRoot, PAGE_SIZE, PageHash};

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Packs read, those set aside included.
    pub packs: u64,
    /// Pages compared with their names.
    pub pages: u64,
    /// Map nodes compared with their names.
    pub nodes: u64,
    /// Roots whose maps were walked.
    pub roots: u64,
    /// What is wrong; empty if nothing is.
    pub damage: Vec<Damage>,
    /// Packs of it: what a repair has something to save from.
    pub damaged_packs: u64,
    /// The caller stopped the check before its end.
    pub stopped: bool,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The thing: a pack, or the maps of roots by their labels.
    pub what: String,
    /// What is wrong with it.
    pub problem: String,
    /// Labels of the roots that need what is damaged, sorted.
    pub labels: Vec<String>,
}

/// Pages read at once.
const RUN: usize = 256;
/// Runs looked at between two signs of progress: 64 MiB.
const RUNS: usize = 64;

impl Store {
    /// Checks the whole store and the maps of `roots`, each with a label for the report. Changes nothing. `progress` gets
    /// the bytes read so far and in all, and stops the check by returning false. Damage is in the report; an error means
    /// that the check itself could not be done.
    pub fn fsck(&self, roots: &[(MapRoot, String)], progress: &dyn Fn(u64, u64) -> bool) -> Result<Report> {
        let store = &*self.inner;
        let packs = store.packs.all();
        let total = packs.iter().map(|pack| work(pack)).sum();
        let mut report = Report::default();
        let mut found: Vec<Found> = Vec::new();
        let mut before = 0;
        for pack in &packs {
            let go_on = |done: u64| progress(before + done, total);
            let own = store.check_pack(pack, &mut report, &go_on)?;
            found.extend(own);
            if report.stopped {
                break;
            }
            before += work(pack);
        }
        let aside = read(&store.set_aside).clone();
        report.packs += aside.len() as u64;
        let lost = store.check_roots(roots, &mut found, &mut report)?;
        for (name, problem) in &aside {
            // Its footer is not to be trusted, so it may be what any root lacks.
            let labels = lost.iter().cloned().collect();
            report.damage.push(Damage { what: format!("pack {name}"), problem: problem.to_string(), labels });
        }
        report.damaged_packs = (aside.len() + found.iter().filter(|found| !found.gone).count()) as u64;
        report.damage.extend(found.into_iter().map(Found::into_damage));
        Ok(report)
    }
}

/// Bytes that are looked at for a pack.
fn work(pack: &Pack) -> u64 {
    u64::from(pack.layout.pages) * PAGE_SIZE as u64 + pack.layout.node_end - pack.layout.node_offset
}

/// Damage of one pack that is in use.
struct Found {
    /// The pack, or the image whose blocks it names.
    what: String,
    problem: String,
    /// Its file is gone: there is nothing to save from it until it is back.
    gone: bool,
    pages: HashSet<Place>,
    labels: BTreeSet<String>,
}

impl Found {
    fn into_damage(self) -> Damage {
        let labels = self.labels.into_iter().collect();
        Damage { what: self.what, problem: self.problem, labels }
    }
}

impl Inner {
    /// Checks one pack; None if it is intact, or was collected meanwhile.
    fn check_pack(
        &self,
        pack: &Pack,
        report: &mut Report,
        go_on: &dyn Fn(u64) -> bool,
    ) -> Result<Option<Found>> {
        let found = |problem: String, pages| {
            Some(Found { what: pack.in_words(), problem, gone: false, pages, labels: BTreeSet::new() })
        };
        let file = match self.open_pack(pack.number) {
            Ok(Some((_, file))) => file,
            Ok(None) => return Ok(None),
            Err(Error::Io { source, .. }) => {
                return Ok(found(format!("cannot be opened: {source}"), HashSet::new()));
            }
            Err(e) => return Err(e),
        };
        report.packs += 1;
        let pages = |entries: &[Entry]| {
            let pages = entries.iter().filter(|e| e.kind() == Kind::Page);
            pages.map(|e| Place { pack: pack.number, at: e.at }).collect()
        };
        let entries = match self.structure(pack, &*file) {
            Ok(entries) => entries,
            Err(problem) => {
                // Its pages are read where the index has them: damage of theirs would go unnamed otherwise.
                let known = self.index.in_pack(pack.number);
                let known = known.into_iter().filter(|entry| entry.kind() == Kind::Page).collect();
                let bad = self.check_content(pack, &*file, known, report, go_on)?;
                return Ok(found(problem.to_string(), pages(&bad)));
            }
        };
        if let Err(Error::Io { source, .. }) = self.packs.body(pack) {
            let gone = source.kind() == std::io::ErrorKind::NotFound;
            let found = found(format!("cannot be opened: {source}"), pages(&entries));
            return Ok(found.map(|found| Found { gone, ..found }));
        }
        let bad = self.check_content(pack, &*file, entries, report, go_on)?;
        let count = |kind| bad.iter().filter(|entry| entry.kind() == kind).count();
        let Some(first) = bad.first() else { return Ok(None) };
        let problem = format!(
            "{} unlike what was stored, first the {} {:?}",
            pages_and_nodes(count(Kind::Page), count(Kind::Node)),
            first.kind(),
            first.name
        );
        Ok(found(problem, pages(&bad)))
    }

    /// Reads header, trailer and footer again, as they are now.
    fn structure(&self, pack: &Pack, file: &dyn DiskFile) -> Result<Vec<Entry>, Problem> {
        match read_layout(file, pack.layout.id, &self.names.fingerprint) {
            Ok(layout) if layout == pack.layout => read_footer(file, &layout),
            Ok(_) => Err(Problem::Field("trailer: not the one read at open")),
            Err(Refused::Damaged(problem)) => Err(problem),
            Err(Refused::Newer(_)) => Err(Problem::Field("version")),
        }
    }

    /// Entries whose content does not fit the name, in the order in which they lie.
    pub(crate) fn check_content(
        &self,
        pack: &Pack,
        file: &dyn DiskFile,
        mut entries: Vec<Entry>,
        report: &mut Report,
        go_on: &dyn Fn(u64) -> bool,
    ) -> Result<Vec<Entry>> {
        entries.sort_unstable_by_key(|entry| entry.at);
        let (pages, nodes) = entries.split_at(entries.partition_point(|entry| entry.kind() == Kind::Page));
        let body = self.packs.body(pack)?;
        let runs: Vec<&[Entry]> = pages.chunk_by(Entry::is_before).flat_map(|run| run.chunks(RUN)).collect();
        let mut bad: Vec<Entry> = Vec::new();
        let mut done = 0;
        // Used again: the first touch of fresh memory takes longer than hashing what is read into it.
        let buffers: Mutex<Vec<Vec<[u8; PAGE_SIZE]>>> = Mutex::default();
        for runs in runs.chunks(RUNS) {
            if !go_on(done) {
                report.stopped = true;
                return Ok(bad);
            }
            let wrong = side_by_side(runs.iter(), |run| {
                let mut bytes = lock(&buffers).pop().unwrap_or_default();
                let wrong = self.wrong_pages(pack, &*body, run, &mut bytes);
                lock(&buffers).push(bytes);
                wrong
            });
            bad.extend(wrong.into_iter().flatten());
            let count = runs.iter().map(|run| run.len() as u64).sum::<u64>();
            report.pages += count;
            done += count * PAGE_SIZE as u64;
        }
        report.nodes += nodes.len() as u64;
        let wrong = |entry: &&Entry| {
            let node = self.node_bytes(pack, file, entry);
            !node.is_ok_and(|bytes| bytes.len() == usize::from(entry.len))
        };
        bad.extend(nodes.iter().filter(wrong));
        Ok(bad)
    }

    /// Those of a run of pages that cannot be read, or are not what their names say.
    fn wrong_pages(
        &self,
        pack: &Pack,
        body: &dyn DiskFile,
        run: &[Entry],
        bytes: &mut Vec<[u8; PAGE_SIZE]>,
    ) -> Vec<Entry> {
        let Some(first) = run.first().and_then(|entry| entry.at.slot()) else { return Vec::new() };
        bytes.resize(run.len().max(bytes.len()), [0; PAGE_SIZE]);
        let bytes = bytes.get_mut(..run.len()).unwrap_or_default();
        if read_span(pack, body, first, bytes).is_err() {
            // A run that cannot be read as a whole may have good pages.
            return match run {
                [entry] => vec![*entry],
                _ => {
                    run.chunks(1).flat_map(|one| self.wrong_pages(pack, body, one, &mut Vec::new())).collect()
                }
            };
        }
        let mut bad = Vec::new();
        self.names.pages(bytes.iter(), |i, name| {
            bad.extend(run.get(i).filter(|entry| !entry.name.is_of(&name)));
        });
        bad
    }

    /// Walks the maps. Adds to `found` the labels of roots that need a damaged page, to the report what roots lack;
    /// returns the labels of those that lack something.
    fn check_roots(
        &self,
        roots: &[(MapRoot, String)],
        found: &mut [Found],
        report: &mut Report,
    ) -> Result<BTreeSet<String>> {
        let maps: Vec<MapRoot> = roots.iter().map(|(root, _)| *root).collect();
        let forest = Forest::read(self, &maps)?;
        let pages: HashMap<Place, usize> =
            (0..).zip(found.iter()).flat_map(|(i, f)| f.pages.iter().map(move |p| (*p, i))).collect();
        let (mut lost, mut by_problem) = (BTreeSet::new(), BTreeMap::<String, Vec<String>>::new());
        for (top, (_, label)) in forest.tops.iter().zip(roots) {
            report.roots += 1;
            let (mut lacks, mut seen) = (BTreeSet::new(), vec![false; forest.nodes().len()]);
            let mut todo: Vec<Child> = top.iter().copied().collect();
            while let Some(child) = todo.pop() {
                match child {
                    Child::Node(number) => {
                        if let Some(seen) = seen.get_mut(number as usize).filter(|seen| !**seen) {
                            *seen = true;
                            todo.extend(forest.children(number));
                        }
                    }
                    Child::Pages(first, count) => {
                        for i in first.run(count).filter_map(|place| pages.get(&place)) {
                            found.get_mut(*i).map(|found| found.labels.insert(label.clone()));
                        }
                    }
                    Child::Missing(number) => {
                        lacks.extend(forest.missing.get(number as usize).map(|m| (m.kind, m.name, number)));
                    }
                }
            }
            if let Some(problem) = describe(&forest, &lacks) {
                by_problem.entry(problem).or_default().push(label.clone());
                lost.insert(label.clone());
            }
        }
        // A page that is gone is mostly gone for many.
        report.damage.extend(by_problem.into_iter().map(|(problem, mut labels)| {
            labels.sort_unstable();
            let more = labels.len().saturating_sub(1);
            let first = labels.first().cloned().unwrap_or_default();
            let what = if more == 0 {
                format!("map of {first}")
            } else {
                format!("maps of {first} and {more} more")
            };
            Damage { what, problem, labels }
        }));
        Ok(lost)
    }
}

/// What one root lacks, in words.
fn describe(forest: &Forest, lacks: &BTreeSet<(Kind, PageHash, u32)>) -> Option<String> {
    let (_, _, first) = lacks.first()?;
    let names: BTreeSet<_> = lacks.iter().map(|(kind, name, _)| (*kind, *name)).collect();
    let nodes = names.iter().filter(|(kind, _)| *kind == Kind::Node).count();
    let why = forest.missing.get(*first as usize).map(|m| m.why.to_string()).unwrap_or_default();
    Some(format!("{} missing: {why}", pages_and_nodes(names.len() - nodes, nodes)))
}

/// `1 page`, `3 pages and 1 map node`.
fn pages_and_nodes(pages: usize, nodes: usize) -> String {
    let count = |n: usize, one: &str| format!("{n} {one}{}", if n == 1 { "" } else { "s" });
    match (pages, nodes) {
        (pages, 0) => count(pages, "page"),
        (0, nodes) => count(nodes, "map node"),
        (pages, nodes) => format!("{} and {}", count(pages, "page"), count(nodes, "map node")),
    }
}
