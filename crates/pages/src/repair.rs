//! Mending: what is good in damaged packs goes to new ones, what is bad is taken from wherever else it lies, and the damaged files
//! are put aside. Nothing is deleted, and nothing is given up that a map may still need.
//!
//! Every step leaves the store as good as it was or better, so a repair that is cut short is simply done again: a copy is durable
//! before the index follows it, and a file is put aside only when all that is good in it has been copied.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::disk::DiskFile;
use crate::error::{Error, Kind, Problem, Result};
use crate::fsck::Report;
use crate::map::{Forest, MAX_NODE, Node};
use crate::pack::{
    At, Building, Entry, FRAME_MAGIC, HEADER, Image, MAX_FRAME_PAGES, NewBody, Pack, Place, decode_frame,
    frame_bytes, is_raw, read_footer, read_layout,
};
use crate::planted::{Mistake, is_made};
use crate::read::read_span;
use crate::store::{Inner, Store};
use crate::sync::{lock, read, write};
use crate::{Fingerprint, MapRoot, Origin, PAGE_SIZE, PageHash};

/// What a repair did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Repaired {
    /// Packs put aside, by their old file names, each with what was saved from it.
    pub aside: BTreeMap<String, Salvaged>,
    /// Pages and nodes that a damaged pack had lost and that another one turned out to have.
    pub elsewhere: u64,
    /// Pages and nodes that were found damaged and are in no readable pack. They are forgotten: brought again, they are stored again.
    pub lost: u64,
}

/// What was saved from one pack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Salvaged {
    /// Pages.
    pub pages: u64,
    /// Map nodes.
    pub nodes: u64,
}

/// A page or node as maps name it.
type Name = (Kind, PageHash);

/// Pages read at once.
const RUN: usize = 256;

/// How often a read that failed is tried again ...
const RETRIES: u32 = 3;
const RETRY_AFTER: Duration = Duration::from_millis(20);
/// ... and how often that is done without any success in between: in a pack that is gone as a whole, each page would be waited for.
const RETRIES_IN_A_ROW: u32 = 30;

/// Packs from which a page is read to see whether the disk answers at all.
const PROBES: usize = 16;

/// Rounds in which what was found may show what else is missing: one for each level of a map, and one to see that nothing is.
const ROUNDS: usize = 12;

impl Store {
    /// Mends what can be mended. `roots` are all maps that anybody may still need: from a pack whose index is damaged only what they
    /// lack is saved, since nothing else can be told from chance. Stopped by `go_on`, it has done what it has done.
    ///
    /// # Errors
    /// The disk cannot be read at all: then nothing is given up, since it may be another day.
    pub fn repair(&self, roots: &[MapRoot], go_on: &dyn Fn() -> bool) -> Result<Repaired> {
        let store = &*self.inner;
        let _one = lock(&store.collector);
        store.check_disk()?;
        let (mut done, patience) = (Repaired::default(), Patience::default());
        for pack in store.packs.all() {
            if !go_on() {
                return Ok(done);
            }
            store.mend_in_use(&pack, &patience, go_on, &mut done)?;
        }
        let mut scanned = HashMap::new();
        for _ in 0..ROUNDS {
            let forest = Forest::read(store, roots)?;
            let mut wanted: HashSet<Name> = forest.missing.iter().map(|m| (m.kind, m.name)).collect();
            if wanted.is_empty() || !go_on() {
                break;
            }
            let elsewhere = store.find_in_packs(&mut wanted, &patience)?;
            done.elsewhere += elsewhere;
            done.lost = done.lost.saturating_sub(elsewhere);
            if elsewhere + store.find_aside(&mut wanted, &mut scanned, &mut done)? == 0 {
                break;
            }
        }
        if go_on() {
            store.put_aside(&mut done)?;
        }
        Ok(done)
    }
}

impl Inner {
    /// Sees to it that anything can be read from the disk that the packs are on.
    fn check_disk(&self) -> Result<()> {
        let mut packs = self.packs.all();
        packs.retain(|pack| pack.layout.image().is_none());
        let (mut failed, patience) = (Ok(()), Patience::default());
        for pack in packs.iter().step_by(packs.len().div_ceil(PROBES).max(1)) {
            // Not its first page, which comes with the header.
            let slot = pack.layout.pages.saturating_sub(1);
            let read = patience.read(|| {
                let file = self.disk.open(&pack.path)?;
                file.forget_cached();
                read_span(pack, &*file, slot, &mut [[0; PAGE_SIZE]])
            });
            match read.map_err(|source| (source.kind(), source)) {
                Ok(()) | Err((io::ErrorKind::InvalidData, _)) => return Ok(()),
                // That may be known without the disk.
                Err((io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof, _)) => {}
                Err((_, source)) => failed = Err(Error::NoAnswer { path: pack.path.clone(), source }),
            }
        }
        failed
    }

    /// Replaces a pack in use by a new one with all that is good in it, if anything is bad.
    fn mend_in_use(
        &self,
        pack: &Arc<Pack>,
        patience: &Patience,
        go_on: &dyn Fn() -> bool,
        done: &mut Repaired,
    ) -> Result<()> {
        let file = match self.disk.open(&pack.path) {
            Ok(file) => Some(file),
            // Another reason to fail than that the file is gone may pass.
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io("open", &pack.path)(e));
            }
            Err(_) => None,
        };
        let footer = file.as_deref().and_then(|file| {
            let layout = read_layout(file, pack.layout.id, &self.names.fingerprint).ok()?;
            (layout == pack.layout).then(|| read_footer(file, &layout).ok()).flatten()
        });
        let whole = footer.is_some();
        // A footer that cannot be read any more is still in the index, but for names that lie in other packs too.
        let mut good = footer.unwrap_or_else(|| self.index.in_pack(pack.number));
        let all = good.len();
        good.sort_unstable_by_key(|entry| entry.at);
        match &file {
            None => good.clear(),
            Some(file) => {
                let mut report = Report::default();
                let checked = self.check_content(pack, &**file, good.clone(), &mut report, &|_| go_on());
                if report.stopped {
                    return Ok(());
                }
                let bad: HashSet<At> = match checked {
                    Ok(bad) => bad.into_iter().map(|entry| entry.at).collect(),
                    Err(e) if e.is_damage() => good.iter().map(|entry| entry.at).collect(),
                    Err(e) => return Err(e),
                };
                good.retain(|entry| {
                    !bad.contains(&entry.at) || self.content(pack, &**file, entry, patience).is_some()
                });
            }
        }
        if whole && good.len() == all {
            return Ok(());
        }
        // Before anything is given up: it may have failed just now.
        self.check_disk()?;
        tracing::warn!(pack = pack.in_words(), good = good.len(), of = all, "mending a pack");
        good.retain(|entry| {
            self.index.get(&entry.name.padded()).is_some_and(|(place, _)| place.pack == pack.number)
        });
        let new = match &file {
            Some(file) if !good.is_empty() => Some(self.copy_good(pack, &**file, &good)?),
            _ => None,
        };
        // Whatever does not move is bad, but for what lies elsewhere too. Found before the gate: nobody is to wait for it.
        let had = self.index.in_pack(pack.number).len();
        let moved = new.iter().flat_map(|(new, entries)| {
            let place = |at: At| Place { pack: new.number, at };
            entries.iter().map(move |entry| (entry.name, place(entry.at)))
        });
        let moved = self.index.those_in(pack.number, &moved.collect::<Vec<_>>());
        let bad = had.saturating_sub(moved.len());
        {
            let _gate = write(&self.gate);
            self.index.set(&moved);
            done.lost += bad as u64;
            if bad > 0 && !is_made(Mistake::LoseSilently) {
                self.clock.lose();
            }
            pack.retire();
        }
        self.index.retain(|place| place.pack != pack.number);
        new.iter().for_each(|(new, _)| new.publish());
        self.packs.forget(pack.number);
        if file.is_some() {
            // It may have what another pack has lost: it goes aside at the end.
            write(&self.set_aside).push((pack.name(), Problem::Content));
        }
        let saved = done.aside.entry(pack.name()).or_default();
        good.iter().for_each(|entry| saved.count(entry.kind()));
        Ok(())
    }

    /// The bytes of a page or node, if they are what its name says.
    fn content(
        &self,
        pack: &Pack,
        file: &dyn DiskFile,
        entry: &Entry,
        patience: &Patience,
    ) -> Option<Vec<u8>> {
        let read = || match entry.at.slot() {
            Some(slot) => {
                let body = self.packs.body(pack).map_err(io::Error::other)?;
                let mut page = [[0; PAGE_SIZE]];
                read_span(pack, &*body, slot, &mut page)?;
                let [page] = page;
                Ok(entry.name.is_of(&self.names.page(&page)).then(|| page.to_vec()))
            }
            None => match self.node_bytes(pack, file, entry) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(Error::Io { source, .. }) => Err(source),
                Err(_) => Ok(None),
            },
        };
        patience.read(read).ok().flatten()
    }

    /// Copies what is good in a pack to a new one, durably. Of an image only the names are kept: its blocks stay where they are.
    fn copy_good(&self, pack: &Pack, file: &dyn DiskFile, good: &[Entry]) -> Result<(Arc<Pack>, Vec<Entry>)> {
        let patience = Patience::default();
        // Under another label: put back as it was, the file is looked through anew under its own.
        let body = pack.layout.image().map_or(NewBody::Raw, |image| {
            let label = format!("{} (mended)", image.label);
            NewBody::Image(Arc::new(Image { label, ..Image::clone(image) }))
        });
        let mut salvage = Salvage::begin(self, pack.layout.origin, body)?;
        let filled = good.iter().try_for_each(|entry| match (entry.at.slot(), pack.layout.image()) {
            (Some(_), Some(_)) => {
                salvage.leave(entry);
                Ok(())
            }
            _ => match self.content(pack, file, entry, &patience) {
                Some(bytes) => salvage.add(entry.kind(), entry.name, &bytes),
                // It could be read a moment ago. The next repair may have more luck.
                None => Err(Error::DamagedPack { pack: pack.name(), problem: Problem::Content }),
            },
        });
        salvage.finish(filled)
    }

    /// Looks for lost names in the footers of all packs: a name may lie in several. What is found is no longer wanted.
    fn find_in_packs(&self, wanted: &mut HashSet<Name>, patience: &Patience) -> Result<u64> {
        let before = wanted.len();
        for pack in self.packs.all() {
            let Some((pack, file)) = self.open_pack(pack.number)? else { continue };
            let names: HashMap<Fingerprint, Name> = wanted.iter().map(|w| (w.1.fingerprint(), *w)).collect();
            for entry in read_footer(&*file, &pack.layout).unwrap_or_default() {
                let Some(name) = names.get(&entry.name).filter(|name| name.0 == entry.kind()) else {
                    continue;
                };
                if self.content(&pack, &*file, &entry, patience).is_some() {
                    // A plan to collect it may have been made before anybody needed it.
                    pack.touch(self.clock.now());
                    self.index.set(&[(entry.name, Place { pack: pack.number, at: entry.at })]);
                    wanted.remove(name);
                }
            }
        }
        Ok((before - wanted.len()) as u64)
    }

    /// Looks for lost names in the packs that were set aside, byte for byte: a page's name is the hash of its content, so no index is
    /// needed to find it. What is found goes to a new pack.
    fn find_aside(
        &self,
        wanted: &mut HashSet<Name>,
        scanned: &mut HashMap<String, HashSet<Name>>,
        done: &mut Repaired,
    ) -> Result<u64> {
        let mut sum = 0;
        let aside = read(&self.set_aside).clone();
        for (pack, problem) in aside {
            if wanted.is_empty() || !is_lasting(problem) {
                continue;
            }
            // What a file was searched for once it does not have.
            let known = scanned.entry(pack.clone()).or_default();
            let mut asked: HashSet<Name> =
                wanted.iter().filter(|name| known.insert(**name)).copied().collect();
            if asked.is_empty() {
                continue;
            }
            let path = self.folder.join(&pack);
            let file = match self.disk.open(&path) {
                Ok(file) => file,
                // Somebody took it away.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io("open", &path)(error)),
            };
            let before = asked.clone();
            let mut salvage = Salvage::begin(self, Origin::default(), NewBody::Raw)?;
            let filled = self.scan(&*file, &mut asked, &mut salvage);
            if salvage.entries.is_empty() && filled.is_ok() {
                salvage.building.discard(&*self.disk);
            } else {
                let (new, entries) = salvage.finish(filled)?;
                self.enter(&new, &entries);
            }
            let saved = done.aside.entry(pack).or_default();
            for name in before.difference(&asked) {
                saved.count(name.0);
                wanted.remove(name);
                sum += 1;
            }
        }
        Ok(sum)
    }

    /// Saves everything of `wanted` that lies anywhere in a file where a page, a frame of pages or a node may lie; what it has found is
    /// no longer wanted.
    fn scan(&self, file: &dyn DiskFile, wanted: &mut HashSet<Name>, salvage: &mut Salvage<'_>) -> Result<()> {
        let len = file.len().unwrap_or(0);
        // A guest can write what looks like frames into pages that lie as they are: then there are none.
        let framed = !is_raw(file);
        let mut bytes = Vec::new();
        for start in (HEADER..len).step_by(RUN * PAGE_SIZE) {
            let own = (len - start).min((RUN * PAGE_SIZE) as u64) as usize;
            // A node may reach into the next run.
            let with_tail = (len - start).min((RUN * PAGE_SIZE + MAX_NODE) as u64) as usize;
            bytes.clear();
            bytes.resize(with_tail, 0);
            if file.read_at(&mut bytes, start).is_err() {
                // A stretch that cannot be read as a whole may have good pages.
                for (i, part) in bytes.chunks_mut(PAGE_SIZE).enumerate() {
                    if file.read_at(part, start + (i * PAGE_SIZE) as u64).is_err() {
                        part.fill(0);
                    }
                }
            }
            let mut page = |page: &[u8; PAGE_SIZE], wanted: &mut HashSet<Name>| -> Result<()> {
                let name = self.names.page(page);
                if wanted.remove(&(Kind::Page, name)) {
                    salvage.add(Kind::Page, name.fingerprint(), page)?;
                }
                Ok(())
            };
            for one in bytes.get(..own).unwrap_or_default().as_chunks::<PAGE_SIZE>().0 {
                page(one, wanted)?;
            }
            let starts = |magic: &[u8; 4]| {
                let bytes = bytes.as_slice();
                (0..own)
                    .step_by(8)
                    .filter(|at| bytes.get(*at..).is_some_and(|b| b.starts_with(magic)))
                    .collect()
            };
            let frames: Vec<usize> = if framed { starts(FRAME_MAGIC) } else { Vec::new() };
            for at in frames {
                let header = bytes.get(at..).unwrap_or_default();
                let Some(room) = frame_bytes(header).filter(|room| *room <= len - start - at as u64) else {
                    continue;
                };
                let mut frame = vec![0; room as usize];
                if file.read_at(&mut frame, start + at as u64).is_ok() {
                    let pages = decode_frame(&frame, MAX_FRAME_PAGES).unwrap_or_default();
                    pages.iter().try_for_each(|one| page(one, wanted))?;
                }
            }
            for at in (0..own).step_by(8) {
                let here = bytes.get(at..).unwrap_or_default();
                let Ok((_, len)) = Node::decode(here) else { continue };
                let node = here.get(..len).unwrap_or_default();
                let name = self.names.node(node);
                if wanted.remove(&(Kind::Node, name)) {
                    salvage.add(Kind::Node, name.fingerprint(), node)?;
                }
            }
        }
        Ok(())
    }

    /// Takes the damaged packs that nothing more can be had from out of the way of the next check.
    fn put_aside(&self, done: &mut Repaired) -> Result<()> {
        let aside = read(&self.set_aside).clone();
        for (pack, problem) in aside {
            if is_lasting(problem) {
                self.set_aside_file(&pack)?;
                done.aside.entry(pack.clone()).or_default();
                write(&self.set_aside).retain(|(name, _)| *name != pack);
            }
        }
        Ok(())
    }

    /// Gives a damaged pack a name under which no store looks for packs.
    fn set_aside_file(&self, pack: &str) -> Result<()> {
        let from = self.folder.join(pack);
        let to = from.with_extension("bad");
        self.disk.rename(&from, &to).map_err(Error::io("rename", &from))?;
        self.disk.sync_folder(&self.folder).map_err(Error::io("sync", &self.folder))
    }
}

/// Reads that were tried again since one last succeeded.
#[derive(Default)]
struct Patience(Cell<u32>);

impl Patience {
    /// Reads, and again a moment later if the disk fails, before anything is called lost.
    fn read<T>(&self, mut read: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        let mut attempts = 0;
        loop {
            match read() {
                Err(error)
                    if is_lasting_error(&error)
                        || attempts == RETRIES
                        || self.0.get() >= RETRIES_IN_A_ROW =>
                {
                    return Err(error);
                }
                Err(_) => {
                    attempts += 1;
                    self.0.update(|retries| retries + 1);
                    std::thread::sleep(RETRY_AFTER);
                }
                done => {
                    self.0.set(0);
                    return done;
                }
            }
        }
    }
}

/// No second attempt will tell more.
fn is_lasting_error(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData | io::ErrorKind::NotFound
    )
}

/// Damage that does not pass by itself, in a pack of our own.
fn is_lasting(problem: Problem) -> bool {
    !matches!(problem, Problem::OtherGroup | Problem::Unreadable(_))
}

impl Salvaged {
    fn count(&mut self, kind: Kind) {
        match kind {
            Kind::Page => self.pages += 1,
            Kind::Node => self.nodes += 1,
        }
    }
}

/// A pack of what was saved.
struct Salvage<'a> {
    store: &'a Inner,
    building: Building,
    entries: Vec<Entry>,
}

impl<'a> Salvage<'a> {
    fn begin(store: &'a Inner, origin: Origin, body: NewBody) -> Result<Self> {
        let building = Building::create(&*store.disk, &store.folder, store.names.fingerprint, origin, body)?;
        Ok(Self { store, building, entries: Vec::new() })
    }

    fn add(&mut self, kind: Kind, name: Fingerprint, bytes: &[u8]) -> Result<()> {
        let entry = match kind {
            Kind::Page => {
                let slot = self.building.pages();
                self.building.append(bytes)?;
                Entry::page(name, slot)
            }
            Kind::Node => Entry { name, at: self.building.add_node(bytes), len: bytes.len() as u16 },
        };
        self.entries.push(entry);
        Ok(())
    }

    /// A page stays where it is, in an image.
    fn leave(&mut self, entry: &Entry) {
        self.building.count_elsewhere(1);
        self.entries.push(*entry);
    }

    /// Makes it durable, if filling it went well. The index does not know of it yet.
    fn finish(mut self, filled: Result<()>) -> Result<(Arc<Pack>, Vec<Entry>)> {
        let store = self.store;
        let sealed = filled.and_then(|()| store.make_durable(&mut self.building, &mut self.entries));
        let (layout, path) = sealed.inspect_err(|_| self.building.discard(&*store.disk))?;
        Ok((store.packs.add(&store.home, path, layout, store.clock.now()), self.entries))
    }
}
