//! Reading a store that another process has open, beside its takes, its collector and its compressor.
//!
//! A visitor has no part in the store's bookkeeping: it locks nothing, writes nothing, and relies on what is true of a store's files at
//! every moment. A pack has its name only when it is whole; what a rewritten pack had is in its successor before it goes; every page is
//! compared with its name. So what a visitor knows may be old, and never wrong: when something is not where it should be, it looks at the
//! folder again, and only then is it missing. Whoever has the store must not let go of what visitors may ask for
//! ([`crate::GcRequest::roots`]).
//!
//! A folder is listed in several calls, between which a pack may come to where the listing has been while the one that it replaces goes
//! from where the listing has yet to come. So it is listed until two listings say the same.
//!
//! What is not where the index has it is searched for in the footers of all packs, once. Where its copies are is remembered, and new packs
//! are looked through for it as they come: whoever tries again and again costs next to nothing.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::fs::{Dir, FileType};

use crate::disk::{Disk, DiskFile, HostDisk, list_surely};
use crate::error::{Error, Problem, Result};
use crate::group::GroupKey;
use crate::pack::{Entry, Pack, PackId, Place, Refused, read_footer, read_layout};
use crate::read::{PlacesIn, places_among};
use crate::store::{Inner, Limits};
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering, lock};
use crate::{Fingerprint, MapRoot, PageHash};

/// Names that memory may gather before the store's own index is opened anew: 20 MiB or so.
const ENOUGH: usize = 512 << 10;
/// How often the folder is looked at while packs that it lists are gone when they are opened, at most.
const ROUNDS: usize = 8;
/// After which what could not be read in a pack's frame is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// After which everything is searched for again that somebody still asks for.
const SEARCH: Duration = Duration::from_secs(60);
/// Names that are remembered at most: 8 MiB or so.
const SOUGHT: usize = 64 << 10;

/// A store that another process has, to be read.
pub struct Visitor {
    inner: Arc<Inner>,
}

/// The folders of a store, opened by somebody who may list them: a visitor may be another user, who is let through to files whose names
/// he knows.
#[derive(Debug)]
pub struct OpenFolders {
    /// Folder of the packs.
    pub packs: OwnedFd,
    /// Folder of the index.
    pub index: OwnedFd,
}

impl OpenFolders {
    /// Opens those of the store in `dir`.
    ///
    /// # Errors
    /// There is no store, or we may not list it.
    pub fn of(dir: &Path) -> Result<Self> {
        let open = |name: &str| {
            let path = dir.join(name);
            let file = std::fs::File::open(&path).map_err(Error::io("open", &path))?;
            Ok::<_, Error>(OwnedFd::from(file))
        };
        Ok(Self { packs: open("packs")?, index: open("index")? })
    }
}

impl Visitor {
    /// Opens the store in `dir`. `doubt` has its index read whole before it is mapped: for a visitor whose predecessor was ended by a
    /// sector that cannot be read.
    ///
    /// # Errors
    /// A folder cannot be listed.
    pub fn open(dir: &Path, key: &GroupKey, folders: OpenFolders, doubt: bool) -> Result<Self> {
        let folder = |name: &str, fd: OwnedFd| {
            let path = dir.join(name);
            let opened = Dir::new(fd).map_err(|error| Error::io("list", &path)(error.into()))?;
            Ok::<_, Error>((path, Mutex::new(opened)))
        };
        let folders = [folder("packs", folders.packs)?, folder("index", folders.index)?];
        Self::open_on(Arc::new(Listed { host: HostDisk::default(), folders }), dir.to_owned(), key, doubt)
    }

    /// Opens a store's folder on any disk.
    pub(crate) fn open_on(disk: Arc<dyn Disk>, home: PathBuf, key: &GroupKey, doubt: bool) -> Result<Self> {
        let visit = Some(Visit::default());
        let inner = Inner::new(disk, home, key, Limits::default(), None, visit);
        if let Some(visit) = &inner.visit {
            inner.find_packs(visit, &mut lock(&visit.looking), false)?;
        }
        inner.read_index(doubt)?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Has `begin` called before anything that takes longer than a read should; what it returns is dropped at its end.
    pub fn when_slow(&self, begin: impl Fn() -> Box<dyn Any> + Send + Sync + 'static) {
        if let Some(visit) = &self.inner.visit {
            let _ = visit.slow.set(Box::new(begin));
        }
    }

    /// A number that changes when packs come or go. None if not all of them could be looked into the last time: then what is missing may
    /// only be out of sight.
    pub fn state(&self) -> Option<u64> {
        let visit = self.inner.visit.as_ref()?;
        let all = !visit.unsure.load(Ordering::Relaxed) && lock(&visit.sought).unread.is_empty();
        all.then(|| visit.changes.load(Ordering::Relaxed))
    }

    /// Names of pages `first .. first + out.len()` of a map.
    ///
    /// # Errors
    /// They lie behind its end; a part of the map is missing or damaged.
    pub fn map_range(&self, root: &MapRoot, first: u64, out: &mut [PageHash]) -> Result<()> {
        self.inner.map_range(root, first, out)
    }

    /// Reads pages, each compared with its name; `out` is as long as they are.
    ///
    /// # Errors
    /// One is missing or damaged, and there is no other copy of it.
    pub fn read(&self, names: &[PageHash], out: &mut [u8]) -> Result<()> {
        self.inner.read_pages(names, out)
    }

    /// The same, but reads what can be read. Returns the positions of the others, in ascending order, each with the reason.
    ///
    /// # Errors
    /// It cannot be looked what the store has by now.
    pub fn read_each(&self, names: &[PageHash], out: &mut [u8]) -> Result<Vec<(usize, Error)>> {
        self.inner.read_each(names, out)
    }
}

impl std::fmt::Debug for Visitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Visitor").field("folder", &self.inner.folder).finish_non_exhaustive()
    }
}

/// What a visitor has beside what every store has.
#[derive(Default)]
pub(crate) struct Visit {
    looking: Mutex<Look>,
    /// Looks that were begun.
    looks: AtomicU64,
    /// Packs that have come and gone.
    changes: AtomicU64,
    /// At the last look a pack could not be read for a reason that may pass.
    unsure: AtomicBool,
    /// Held by whoever goes through the footers: one is enough for the disk.
    searching: Mutex<()>,
    sought: Mutex<Sought>,
    slow: OnceLock<Box<dyn Fn() -> Box<dyn Any> + Send + Sync>>,
}

/// What was seen in the packs' folder, held by whoever looks.
#[derive(Default)]
struct Look {
    failed: bool,
    /// Packs that are there and of no use.
    useless: HashMap<PackId, Useless>,
}

/// A pack of no use.
struct Useless {
    since: Instant,
    tried: Instant,
    /// It may be of use later.
    passing: bool,
}

/// What was searched for in the footers of all packs.
#[derive(Default)]
struct Sought {
    names: HashMap<Fingerprint, SoughtName>,
    /// When all of these were last searched for.
    searched: Option<Instant>,
    /// Packs whose footers could not be read, for a reason that may pass, and when that was tried.
    unread: BTreeSet<u32>,
    tried: Option<Instant>,
}

/// A name that was searched for.
struct SoughtName {
    /// Wherever it lies.
    places: Vec<Place>,
    /// When somebody last wanted it.
    asked: Instant,
}

/// What became of a pack that was not known.
enum Met {
    Known,
    /// Gone again.
    Gone,
    /// Of no use; it says whether that may pass.
    Useless(bool),
}

impl Visit {
    fn slow(&self) -> Option<Box<dyn Any>> {
        self.slow.get().map(|begin| begin())
    }
}

impl Sought {
    /// What has to be searched for before anything can be said of these names: those that are new; if it is time for that, all that are
    /// asked for. And whether packs that could not be read are to be tried again for what is known.
    fn lacks(&mut self, wanted: &[Fingerprint]) -> (Vec<Fingerprint>, bool) {
        let is_due = |after, last: Option<Instant>| last.is_none_or(|last| last.elapsed() >= after);
        let all = !self.names.is_empty() && is_due(SEARCH, self.searched);
        if all {
            self.names.retain(|_, known| known.asked.elapsed() < SEARCH);
        }
        let is_new = |name: &&Fingerprint| !self.names.contains_key(name);
        let mut ask: Vec<Fingerprint> = wanted.iter().filter(is_new).copied().collect();
        if all {
            ask.extend(self.names.keys());
        }
        ask.sort_unstable();
        (ask, !self.unread.is_empty() && is_due(RETRY, self.tried))
    }

    /// All names, sorted.
    fn names(&self) -> Vec<Fingerprint> {
        let mut names: Vec<Fingerprint> = self.names.keys().copied().collect();
        names.sort_unstable();
        names
    }

    /// Takes in a place of a name that is sought.
    fn learn(&mut self, name: &Fingerprint, place: Place) {
        if let Some(known) = self.names.get_mut(name)
            && !known.places.contains(&place)
        {
            known.places.push(place);
        }
    }
}

impl Inner {
    /// Of a store that another process has: looks what it has done since. False if this one has the store, and knows.
    pub(crate) fn look_again(&self) -> Result<bool> {
        let Some(visit) = &self.visit else { return Ok(false) };
        let _slow = visit.slow();
        let before = visit.looks.load(Ordering::SeqCst);
        let mut look = lock(&visit.looking);
        if visit.looks.load(Ordering::SeqCst) != before && !look.failed {
            // Somebody has begun after we came, and is done.
            return Ok(true);
        }
        visit.looks.fetch_add(1, Ordering::SeqCst);
        look.failed = true;
        self.find_packs(visit, &mut look, true)?;
        if self.index.in_memory() > ENOUGH {
            self.read_index(false)?;
        }
        look.failed = false;
        Ok(true)
    }

    /// Adds packs that are new and takes out those that are gone. The names of new ones are read, unless the index comes next.
    fn find_packs(&self, visit: &Visit, look: &mut Look, names: bool) -> Result<()> {
        let list = || list_surely(|| Ok::<_, Error>(self.pack_ids(|_| Ok(()))?.into_iter().collect()));
        let (mut seen, mut changes, mut unsure): (BTreeSet<PackId>, u64, bool) = (list()?, 0, false);
        let mut keep = false;
        for round in 1..=ROUNDS {
            let known: HashSet<PackId> = self.packs.view().iter().map(|pack| pack.layout.id).collect();
            let mut gone = false;
            (unsure, keep) = (false, false);
            for id in seen.iter().filter(|id| !known.contains(id)) {
                let before = look.useless.get(id);
                let met = match before.filter(|before| before.tried.elapsed() < RETRY) {
                    Some(before) => Met::Useless(before.passing),
                    None => self.meet(visit, *id, names)?,
                };
                match met {
                    Met::Known => changes += 1,
                    Met::Gone => gone = true,
                    Met::Useless(passing) => {
                        let now = Instant::now();
                        let own = look.useless.entry(*id);
                        let own = own.or_insert_with(|| Useless { since: now, tried: now, passing });
                        if own.tried.elapsed() >= RETRY {
                            (own.tried, own.passing) = (now, passing);
                        }
                        unsure |= passing;
                        keep |= passing && own.since.elapsed() < SEARCH;
                    }
                }
            }
            if !gone {
                break;
            }
            // What it had is in a pack that has come since.
            (unsure, keep) = (unsure || round == ROUNDS, keep || round == ROUNDS);
            seen = list()?;
        }
        let view = self.packs.view();
        let is_known = |id: &PackId| view.iter().any(|pack| pack.layout.id == *id);
        look.useless.retain(|id, _| seen.contains(id) && !is_known(id));
        let gone: Vec<u32> =
            view.iter().filter(|pack| !seen.contains(&pack.layout.id)).map(|pack| pack.number).collect();
        // Only when all that they had is known elsewhere: as long as what has come may be of use soon, what is open of them can be read.
        if !gone.is_empty() && !keep {
            gone.iter().for_each(|number| self.packs.forget(*number));
            changes += gone.len() as u64;
            let view = self.packs.view();
            self.index.retain(|place| view.get(place.pack).is_some());
        }
        visit.unsure.store(unsure, Ordering::Relaxed);
        visit.changes.fetch_add(changes, Ordering::Relaxed);
        Ok(())
    }

    /// Adds a pack that was not known, if it is of use. With its names, unless the index comes next.
    fn meet(&self, visit: &Visit, id: PackId, names: bool) -> Result<Met> {
        let path = self.folder.join(id.file_name());
        let useless = |problem: Problem| {
            // What is in it is looked for elsewhere, and the store's own process tells of it.
            tracing::debug!(pack = id.file_name(), %problem, "a pack cannot be used");
            Ok(Met::Useless(may_pass(problem)))
        };
        let file = match self.disk.open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Met::Gone),
            Err(error) => return useless(Problem::Unreadable(error.kind())),
        };
        let layout = match read_layout(&*file, id, &self.names.fingerprint) {
            Ok(layout) => layout,
            Err(Refused::Damaged(problem)) => return useless(problem),
            Err(Refused::Newer(_)) if names => return useless(Problem::Field("version")),
            Err(Refused::Newer(version)) => {
                return Err(Error::NewerFormat { pack: id.file_name(), version });
            }
        };
        let entries = match names.then(|| read_footer(&*file, &layout)).transpose() {
            Ok(entries) => entries,
            Err(problem) => return useless(problem),
        };
        let pack = self.packs.add(&self.home, path, layout, 0);
        self.watch_image(&pack);
        if let Some(entries) = entries {
            self.enter_sought(visit, &pack, &entries);
        }
        Ok(Met::Known)
    }

    /// Puts the names of a pack into the index, and what is sought of them where it is remembered.
    fn enter_sought(&self, visit: &Visit, pack: &Pack, entries: &[Entry]) {
        self.enter(pack, entries);
        let mut sought = lock(&visit.sought);
        let names = sought.names();
        places_among(&names, entries)
            .for_each(|(name, at)| sought.learn(&name, Place { pack: pack.number, at }));
    }

    /// Opens the store's own index, and reads only the names that it does not have.
    fn read_index(&self, doubt: bool) -> Result<()> {
        let runs = self.index.runs();
        let before: HashSet<PackId> = runs.all().iter().flat_map(|run| run.covers()).copied().collect();
        let indexed = runs.visit(&self.packs, doubt)?;
        let view = self.packs.view();
        let is_indexed = |number: u32| view.get(number).is_some_and(|pack| indexed.contains(&pack.layout.id));
        self.index.retain(|place| !is_indexed(place.pack));
        for pack in view.iter() {
            let id = pack.layout.id;
            if indexed.contains(&id) {
                pack.publish();
            } else if !pack.is_published() || before.contains(&id) {
                match (self.footer(pack), &self.visit) {
                    (Ok(entries), Some(visit)) => self.enter_sought(visit, pack, &entries),
                    // The next look meets it anew.
                    _ => self.packs.forget(pack.number),
                }
            }
        }
        Ok(())
    }

    /// Every place that these names have, from the packs themselves; of what was searched for before, from memory.
    pub(crate) fn search(&self, visit: &Visit, wanted: &[Fingerprint]) -> Vec<PlacesIn> {
        let open = || {
            let (ask, unread) = lock(&visit.sought).lacks(wanted);
            (!ask.is_empty() || unread).then_some((ask, unread))
        };
        if open().is_some() {
            let _slow = visit.slow();
            let _one = lock(&visit.searching);
            // Somebody may have searched for the same meanwhile.
            if let Some((ask, unread)) = open() {
                self.search_packs(visit, &ask, unread);
            }
        }
        let mut places: BTreeMap<u32, Vec<_>> = BTreeMap::new();
        {
            let (mut sought, now) = (lock(&visit.sought), Instant::now());
            for name in wanted {
                let Some(known) = sought.names.get_mut(name) else { continue };
                known.asked = now;
                for place in &known.places {
                    places.entry(place.pack).or_default().push((*name, place.at));
                }
            }
        }
        places.into_iter().filter_map(|(number, places)| Some((self.packs.get(number)?, places))).collect()
    }

    /// Goes through the footers of all packs for `ask`; through those that could not be read before for everything that is sought.
    fn search_packs(&self, visit: &Visit, ask: &[Fingerprint], unread: bool) {
        let (known, before) = {
            let sought = lock(&visit.sought);
            (sought.names(), sought.unread.clone())
        };
        let mut found: Vec<(Fingerprint, Place)> = Vec::new();
        let mut still = BTreeSet::new();
        for pack in self.packs.all() {
            let again = before.contains(&pack.number);
            if ask.is_empty() && !(again && unread) {
                still.extend(again.then_some(pack.number));
                continue;
            }
            match self.footer(&pack) {
                Ok(footer) => {
                    let names = [ask, if again { &known } else { &[] }];
                    let places = names.into_iter().flat_map(|names| places_among(names, &footer));
                    found.extend(places.map(|(name, at)| (name, Place { pack: pack.number, at })));
                }
                Err(problem) if may_pass(problem) => drop(still.insert(pack.number)),
                // Damaged, or gone.
                Err(_) => {}
            }
        }
        let (mut sought, now) = (lock(&visit.sought), Instant::now());
        if sought.names.len() + ask.len() > SOUGHT {
            sought.names.clear();
        }
        // All at once: what is there counts as searched for.
        for name in ask {
            let known = sought.names.entry(*name);
            known.or_insert_with(|| SoughtName { places: Vec::new(), asked: now });
        }
        found.iter().for_each(|(name, place)| sought.learn(name, *place));
        let view = self.packs.view();
        sought.names.values_mut().for_each(|name| name.places.retain(|place| view.get(place.pack).is_some()));
        if sought.names.keys().all(|name| ask.binary_search(name).is_ok()) {
            sought.searched = Some(now);
        }
        (sought.unread, sought.tried) = (still, Some(now));
    }
}

/// Whether a pack may be of use later, as it is.
fn may_pass(problem: Problem) -> bool {
    matches!(problem, Problem::Unreadable(kind) if kind != io::ErrorKind::NotFound)
}

/// The host's file system, with folders that can only be listed through what was opened before.
struct Listed {
    host: HostDisk,
    folders: [(PathBuf, Mutex<Dir>); 2],
}

impl Disk for Listed {
    fn create(&self, _: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.host.open(path)
    }

    fn rename(&self, _: &Path, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn remove(&self, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<OsString>> {
        let (_, opened) =
            self.folders.iter().find(|(path, _)| path == folder).ok_or(io::ErrorKind::NotFound)?;
        let mut opened = lock(opened);
        opened.rewind();
        let mut names = Vec::new();
        while let Some(entry) = opened.read() {
            let entry = entry?;
            if entry.file_type() != FileType::Directory {
                names.push(OsString::from_vec(entry.file_name().to_bytes().to_vec()));
            }
        }
        Ok(names)
    }

    fn sync_folder(&self, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}
