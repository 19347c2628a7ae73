//! The files of the index, and how memory becomes one of them.
//!
//! A process that ended without closing its store may have been ended by its own index: a mapped page that the disk cannot read is a
//! SIGBUS. So while a store is open a mark lies beside the runs, and who finds one reads every run whole before he maps it. What is
//! damaged then, or cannot be read, is thrown away: its packs are asked instead.

use std::cell::Cell;
use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::merge::merge;
use super::run::{ENTRY, Encoder, HEADER};
use super::{Index, Run, rank};
use crate::disk::{Disk, list_surely};
use crate::error::{Error, Problem, Result};
use crate::pack::{PackId, Packs};
use crate::planted::{Mistake, is_made};
use crate::sync::{AtomicBool, Mutex, Ordering, RwLock, lock, read, write};

/// Names that memory may keep: 1 MiB and some.
const ENOUGH: usize = 32 << 10;
/// Packs that may be asked one by one at the next open.
const PACKS: usize = 32;
/// A run is merged with what is newer once that is a fourth of it.
const RATIO: usize = 4;
/// Bytes written at once.
const PIECE: usize = 1 << 20;

/// Lies in the folder while a store is open.
const MARK: &str = "in-use";

/// The files of the index.
pub(crate) struct Runs {
    disk: Arc<dyn Disk>,
    folder: PathBuf,
    group: [u8; 16],
    /// Newest first.
    list: RwLock<Arc<Vec<Arc<Run>>>>,
    /// Number of the next run; held by whoever makes one.
    next: Mutex<u64>,
    /// The mark is ours to take away.
    opened: AtomicBool,
}

impl Runs {
    pub(crate) fn new(disk: Arc<dyn Disk>, folder: PathBuf, group: [u8; 16]) -> Self {
        Self {
            disk,
            folder,
            group,
            list: RwLock::default(),
            next: Mutex::new(1),
            opened: AtomicBool::new(false),
        }
    }

    /// All runs, newest first.
    pub(crate) fn all(&self) -> Arc<Vec<Arc<Run>>> {
        read(&self.list).clone()
    }

    /// Opens the runs there are and leaves the mark. Returns the packs whose names they have. What cannot be used is removed.
    pub(crate) fn open(&self, packs: &Packs) -> Result<HashSet<PackId>> {
        let names = self.disk.list(&self.folder).map_err(Error::io("list", &self.folder))?;
        let marked = names.iter().any(|name| name == MARK);
        let covered = self.open_all(&names, packs, marked, |path, problem| {
            if let Some(problem) = problem {
                tracing::warn!(path = %path.display(), %problem, "a part of the index is made anew");
            }
            self.disk.remove(path).map_err(Error::io("remove", path))
        })?;
        if !marked {
            let path = self.folder.join(MARK);
            // On a disk that is full, or read-only, it is only that nobody notices.
            if let Err(error) = self.disk.create(&path).and_then(|_| self.disk.sync_folder(&self.folder)) {
                tracing::debug!(%error, "no mark beside the index");
            }
        }
        self.opened.store(true, Ordering::Relaxed);
        Ok(covered)
    }

    /// Opens the runs there are of a store that another process has. Returns the packs whose names they have. What cannot be used is left
    /// alone. `doubt` has each read whole before it is mapped.
    pub(crate) fn visit(&self, packs: &Packs, doubt: bool) -> Result<HashSet<PackId>> {
        let list = || self.disk.list(&self.folder).map_err(Error::io("list", &self.folder));
        for last in [false, false, true] {
            let names: Vec<OsString> =
                list_surely(|| Ok::<_, Error>(list()?.into_iter().collect()))?.into_iter().collect();
            let gone = Cell::new(false);
            let covered = self.open_all(&names, packs, doubt, |_, problem| {
                gone.set(gone.get() || problem == Some(Problem::Unreadable(io::ErrorKind::NotFound)));
                Ok(())
            })?;
            // One that is gone when it is opened has become part of another.
            if last || !gone.get() {
                return Ok(covered);
            }
        }
        Ok(HashSet::new())
    }

    /// Opens the runs among these files; `spoilt` gets what is of no use, with what is wrong with it.
    fn open_all(
        &self,
        names: &[OsString],
        packs: &Packs,
        doubt: bool,
        spoilt: impl Fn(&Path, Option<Problem>) -> Result<()>,
    ) -> Result<HashSet<PackId>> {
        let numbers: std::collections::HashMap<PackId, u32> =
            packs.view().iter().map(|pack| (pack.layout.id, pack.number)).collect();
        let mut runs: Vec<Arc<Run>> = Vec::new();
        for name in names.iter().filter_map(|name| name.to_str()).filter(|name| *name != MARK) {
            let path = self.folder.join(name);
            let number = name.strip_suffix(".run").and_then(|stem| u64::from_str_radix(stem, 16).ok());
            let run = number
                .filter(|number| file_name(*number) == name)
                .map(|number| self.open_run(number, &path, doubt, &|id| numbers.get(&id).copied()));
            match run {
                Some(Ok(run)) => runs.push(Arc::new(run)),
                Some(Err(problem)) => spoilt(&path, Some(problem))?,
                None if name.ends_with(".tmp") => spoilt(&path, None)?,
                None => {}
            }
        }
        runs.sort_unstable_by_key(|run| std::cmp::Reverse(run.number));
        *lock(&self.next) = runs.first().map_or(1, |run| run.number + 1);
        let covered = runs.iter().flat_map(|run| run.covers()).copied().collect();
        *write(&self.list) = Arc::new(runs);
        Ok(covered)
    }

    /// The store closes in order.
    pub(crate) fn close(&self) {
        if !self.opened.load(Ordering::Relaxed) {
            return;
        }
        let _ = self.disk.remove(&self.folder.join(MARK));
    }

    fn open_run(
        &self,
        number: u64,
        path: &Path,
        whole: bool,
        pack: &dyn Fn(PackId) -> Option<u32>,
    ) -> Result<Run, Problem> {
        let unreadable = |error: io::Error| Problem::Unreadable(error.kind());
        let file = self.disk.open(path).map_err(unreadable)?;
        if whole {
            // Through the door at which a bad sector is an error and not the end.
            let (len, mut at, mut bytes) = (file.len().map_err(unreadable)?, 0, vec![0; PIECE]);
            while at < len {
                let piece = bytes.get_mut(..(len - at).min(PIECE as u64) as usize).unwrap_or_default();
                file.read_at(piece, at).map_err(unreadable)?;
                at += piece.len() as u64;
            }
        }
        let bytes = file.map().map_err(unreadable)?;
        Run::new(number, path.to_owned(), bytes, &self.group, pack, whole)
    }
}

impl Index {
    /// Memory has gathered enough for a run, or so many packs that the next open would take long.
    pub(crate) fn wants_folding(&self) -> bool {
        let covered: HashSet<PackId> = self.runs.all().iter().flat_map(|run| run.covers().to_vec()).collect();
        let open = self.packs.view().iter().filter(|pack| !covered.contains(&pack.layout.id)).count();
        self.in_memory() > ENOUGH || open > PACKS
    }

    /// Writes what memory has to a run, together with newer runs that have grown to the size of older ones. It runs beside everything
    /// else, one at a time.
    pub(crate) fn fold(&self) -> Result<()> {
        let runs = &self.runs;
        let mut next = lock(&runs.next);
        // Before memory is copied: all names of these are in it, or in a run. Of a pack that is published while memory is copied only
        // some may be, so it waits for the next time.
        let view = self.packs.view();
        let published = || -> HashSet<u32> {
            view.iter().filter(|pack| pack.is_published()).map(|pack| pack.number).collect()
        };
        let mut whole = published();
        let mut copied = self.copy_memory();
        if is_made(Mistake::PublishedLate) {
            whole = published();
        }
        copied.retain(|(_, place)| whole.contains(&place.pack));
        let old = runs.all();
        let mut names = copied.len();
        let merged: Vec<Arc<Run>> = old
            .iter()
            .take_while(|run| {
                let take = names * RATIO >= run.len();
                names += if take { run.len() } else { 0 };
                take
            })
            .cloned()
            .collect();
        let untouched: HashSet<PackId> =
            old.iter().skip(merged.len()).flat_map(|run| run.covers().to_vec()).collect();
        // Packs of older runs may have names here all the same: set anew, by a repair, now or before an earlier fold.
        let mut spoken_of: HashSet<u32> = copied.iter().map(|(_, place)| place.pack).collect();
        spoken_of.extend(merged.iter().flat_map(|run| run.packs()));
        let own: Vec<(PackId, u32)> = view
            .iter()
            .filter(|pack| whole.contains(&pack.number))
            .map(|pack| (pack.layout.id, pack.number))
            .filter(|(id, number)| !untouched.contains(id) || spoken_of.contains(number))
            .collect();
        let number = *next;
        let mut lists: Vec<Box<dyn Iterator<Item = _>>> = vec![Box::new(copied.iter().copied())];
        lists.extend(merged.iter().map(|run| Box::new(run.iter()) as Box<dyn Iterator<Item = _>>));
        let encoder = Encoder::new(names, &own);
        let path = runs.write(number, encoder, merge(lists, |place| rank(&view, place)))?;
        let numbers: std::collections::HashMap<PackId, u32> = own.iter().copied().collect();
        let run = runs
            .open_run(number, &path, false, &|id| numbers.get(&id).copied())
            .map_err(|problem| Error::DamagedPack { pack: file_name(number), problem })?;
        let mut list = vec![Arc::new(run)];
        list.extend(old.iter().skip(merged.len()).cloned());
        *write(&runs.list) = Arc::new(list);
        *next += 1;
        self.forget_copied(&copied);
        for run in merged {
            runs.disk.remove(&run.path).map_err(Error::io("remove", &run.path))?;
        }
        Ok(())
    }
}

impl Index {
    /// Looks at the checksums of runs that nobody has looked at since they were opened. One that is damaged is thrown away: `enter` puts
    /// the names of its packs into memory, and how many there were is returned.
    pub(crate) fn doubt(&self, enter: impl Fn(PackId) -> Result<()>) -> Result<usize> {
        let runs = &self.runs;
        let _one = lock(&runs.next);
        let all = runs.all();
        let (whole, damaged): (Vec<_>, Vec<_>) = all.iter().cloned().partition(|run| run.is_whole());
        for run in &damaged {
            tracing::warn!(path = %run.path.display(), "a part of the index is damaged: made anew");
            run.covers().iter().try_for_each(|id| enter(*id))?;
        }
        if !damaged.is_empty() {
            *write(&runs.list) = Arc::new(whole);
        }
        for run in &damaged {
            runs.disk.remove(&run.path).map_err(Error::io("remove", &run.path))?;
        }
        Ok(damaged.len())
    }
}

impl Runs {
    /// Writes a run and makes it durable under its name.
    pub(super) fn write(
        &self,
        number: u64,
        mut encoder: Encoder,
        entries: impl Iterator<Item = (crate::Fingerprint, crate::pack::Place)>,
    ) -> Result<PathBuf> {
        let (path, tmp) =
            (self.folder.join(file_name(number)), self.folder.join(format!("{number:016x}.tmp")));
        let file = self.disk.create(&tmp).map_err(Error::io("create", &tmp))?;
        let mut at = HEADER as u64;
        let written = (|| {
            file.write_at(&[&Encoder::header(number, &self.group)], 0)?;
            let mut piece = Vec::with_capacity(PIECE + ENTRY);
            let mut put = |piece: &mut Vec<u8>, encoder: Option<&mut Encoder>| {
                if let Some(encoder) = encoder {
                    encoder.hash(piece);
                }
                file.write_at(&[piece], at)?;
                at += piece.len() as u64;
                piece.clear();
                Ok::<_, io::Error>(())
            };
            for entry in entries {
                encoder.entry(entry, &mut piece)?;
                if piece.len() >= PIECE {
                    put(&mut piece, Some(&mut encoder))?;
                }
            }
            put(&mut piece, Some(&mut encoder))?;
            put(&mut encoder.end(), None)?;
            file.sync()?;
            self.disk.rename(&tmp, &path)
        })();
        if let Err(error) = written {
            let _ = self.disk.remove(&tmp);
            return Err(Error::io("write", &tmp)(error));
        }
        self.disk.sync_folder(&self.folder).map_err(Error::io("sync", &self.folder))?;
        Ok(path)
    }
}

fn file_name(number: u64) -> String {
    format!("{number:016x}.run")
}
