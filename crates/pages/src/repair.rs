//! Mending: what is good in damaged packs goes to new ones, what is bad is taken from wherever else it lies, and the damaged files
//! are put aside. Nothing is deleted, and nothing is given up that a map may still need.
//!
//! Every step leaves the store as good as it was or better, so a repair that is cut short is simply done again: a copy is durable
//! before the index follows it, and a file is put aside only when all that is good in it has been copied.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::disk::DiskFile;
use crate::error::{Error, Kind, Problem, Result};
use crate::index::Place;
use crate::map::{Forest, MAX_NODE, Node};
use crate::pack::{Building, Entry, HEADER, Pack, page_at, read_footer, read_layout};
use crate::store::{Inner, Store};
use crate::sync::{lock, read, write};
use crate::{MapRoot, PAGE_SIZE, PageHash};

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

/// One that was read and has the content that its name says.
#[derive(Clone, Copy)]
struct Good {
    name: Name,
    offset: u64,
    len: u16,
}

/// Pages read at once.
const RUN: usize = 256;

/// How often a read that failed is tried again.
const RETRIES: u32 = 3;
const RETRY_AFTER: Duration = Duration::from_millis(20);

/// Rounds in which what was found may show what else is missing: one for each level of a map, and one to see that nothing is.
const ROUNDS: usize = 12;

impl Store {
    /// Mends what can be mended. `roots` are all maps that anybody may still need: from a pack whose index is damaged only what they
    /// lack is saved, since nothing else can be told from chance. Stopped by `go_on`, it has done what it has done.
    pub fn repair(&self, roots: &[MapRoot], go_on: &dyn Fn() -> bool) -> Result<Repaired> {
        let store = &*self.inner;
        let _one = lock(&store.collector);
        let mut done = Repaired::default();
        for pack in store.packs.all() {
            if !go_on() {
                return Ok(done);
            }
            store.mend_in_use(&pack, &mut done)?;
        }
        let mut scanned = HashMap::new();
        for _ in 0..ROUNDS {
            let forest = Forest::read(store, roots)?;
            let mut wanted: HashSet<Name> = forest.missing.iter().map(|m| (m.kind, m.name)).collect();
            if wanted.is_empty() || !go_on() {
                break;
            }
            let elsewhere = store.find_in_packs(&mut wanted)?;
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
    /// Replaces a pack in use by a new one with all that is good in it, if anything is bad.
    fn mend_in_use(&self, pack: &Arc<Pack>, done: &mut Repaired) -> Result<()> {
        let file = match self.disk.open(&pack.path) {
            Ok(file) => Some(file),
            // Another reason to fail than that the file is gone may pass.
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
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
        let names: Vec<(Name, u64)> = match footer {
            Some(entries) => entries.iter().map(|e| ((e.kind, e.name), u64::from(e.at) * 8)).collect(),
            None => self.names_in(pack),
        };
        let good = |(name, at): &(Name, u64)| self.verify(file.as_deref()?, *name, *at);
        let mut good: Vec<Good> = names.iter().filter_map(good).collect();
        if whole && good.len() == names.len() {
            return Ok(());
        }
        tracing::warn!(pack = pack.name(), good = good.len(), of = names.len(), "mending a pack");
        let own = |name: Name| self.index(name.0).get(&name.1).is_some_and(|place| place.pack == pack.number);
        good.retain(|good| own(good.name));
        good.sort_unstable_by_key(|good| good.offset);
        if let Some(file) = &file {
            self.copy(&**file, &pack.path, &good, Some(pack.number))?;
        }
        {
            let _gate = write(&self.gate);
            for kind in [Kind::Page, Kind::Node] {
                // Whatever has not moved is bad.
                let bad: Vec<PageHash> =
                    self.index(kind).in_pack(pack.number).into_iter().map(|(name, _)| name).collect();
                done.lost += bad.len() as u64;
                if !bad.is_empty() {
                    self.clock.lose();
                }
                self.index(kind).remove(pack.number, &bad);
            }
            pack.retire();
        }
        self.packs.forget(pack.number);
        if file.is_some() {
            // It may have what another pack has lost: it goes aside at the end.
            write(&self.set_aside).push((pack.name(), Problem::Content));
        }
        done.aside.entry(pack.name()).or_default().add(&good);
        Ok(())
    }

    /// Everything that the index has in a pack.
    fn names_in(&self, pack: &Pack) -> Vec<(Name, u64)> {
        let mut known = Vec::new();
        for kind in [Kind::Page, Kind::Node] {
            let own = self.index(kind).in_pack(pack.number).into_iter();
            known.extend(own.map(|(name, place)| ((kind, name), place.offset())));
        }
        known.sort_unstable_by_key(|(_, offset)| *offset);
        known
    }

    /// Reads what should lie at an offset, and compares it with its name.
    fn verify(&self, file: &dyn DiskFile, name: Name, offset: u64) -> Option<Good> {
        match name.0 {
            Kind::Page => {
                let mut page = [0; PAGE_SIZE];
                read_patiently(file, &mut page, offset).ok()?;
                (self.names.page(&page) == name.1).then_some(Good { name, offset, len: PAGE_SIZE as u16 })
            }
            Kind::Node => {
                let room = file.len().ok()?.saturating_sub(offset).min(MAX_NODE as u64) as usize;
                let mut bytes = vec![0; room];
                read_patiently(file, &mut bytes, offset).ok()?;
                let (_, len) = Node::decode(&bytes).ok()?;
                let same = bytes.get(..len).is_some_and(|own| self.names.node(own) == name.1);
                same.then_some(Good { name, offset, len: len as u16 })
            }
        }
    }

    /// Copies what was verified to a new pack; when that is durable the index follows. With `from`, only for names that lie there.
    fn copy(&self, file: &dyn DiskFile, path: &Path, good: &[Good], from: Option<u32>) -> Result<()> {
        if good.is_empty() {
            return Ok(());
        }
        let mut building = Building::create(&*self.disk, &self.folder, self.names.fingerprint)?;
        let filled = self.copy_into(&mut building, file, path, good);
        let sealed = filled.and_then(|mut entries| {
            let layout = building.seal(&mut entries)?;
            let path = building.rename(&*self.disk)?;
            self.disk.sync_folder(&self.folder).map_err(Error::io("sync", &self.folder))?;
            Ok((entries, layout, path))
        });
        let (entries, layout, path) = sealed.inspect_err(|_| building.discard(&*self.disk))?;
        let Some(from) = from else {
            self.publish(path, layout, &entries);
            return Ok(());
        };
        let new = self.packs.add(path, layout, self.clock.now()).number;
        let _gate = write(&self.gate);
        for kind in [Kind::Page, Kind::Node] {
            let moved = entries.iter().filter(|entry| entry.kind == kind);
            let moved: Vec<_> = moved.map(|entry| (entry.name, Place { pack: new, at: entry.at })).collect();
            self.index(kind).switch(from, &moved);
        }
        Ok(())
    }

    fn copy_into(
        &self,
        to: &mut Building,
        file: &dyn DiskFile,
        path: &Path,
        good: &[Good],
    ) -> Result<Vec<Entry>> {
        let (pages, nodes): (Vec<&Good>, Vec<&Good>) =
            good.iter().partition(|good| good.name.0 == Kind::Page);
        let mut entries = Vec::with_capacity(good.len());
        let mut bytes = vec![0; PAGE_SIZE];
        for page in pages {
            file.read_at(&mut bytes, page.offset).map_err(Error::io("read", path))?;
            let at = page_at(to.pages());
            to.claim(1).write(&[&bytes])?;
            entries.push(Entry { name: page.name.1, at, len: page.len, kind: Kind::Page });
        }
        for node in nodes {
            bytes.resize(usize::from(node.len), 0);
            file.read_at(&mut bytes, node.offset).map_err(Error::io("read", path))?;
            let at = to.nodes_at() + to.add_node(&bytes);
            entries.push(Entry { name: node.name.1, at, len: node.len, kind: Kind::Node });
        }
        Ok(entries)
    }

    /// Looks for lost names in the footers of all packs: a name may lie in several. What is found is no longer wanted.
    fn find_in_packs(&self, wanted: &mut HashSet<Name>) -> Result<u64> {
        let before = wanted.len();
        for pack in self.packs.all() {
            let Some((pack, file)) = self.open_pack(pack.number)? else { continue };
            for entry in read_footer(&*file, &pack.layout).unwrap_or_default() {
                let name = (entry.kind, entry.name);
                if wanted.contains(&name) && self.verify(&*file, name, u64::from(entry.at) * 8).is_some() {
                    // A plan to collect it may have been made before anybody needed it.
                    pack.touch(self.clock.now());
                    let place = Place { pack: pack.number, at: entry.at };
                    self.index(entry.kind).set(&[(entry.name, place)]);
                    wanted.remove(&name);
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
            let asked: HashSet<Name> = wanted.iter().filter(|name| known.insert(**name)).copied().collect();
            if asked.is_empty() {
                continue;
            }
            let path = self.folder.join(&pack);
            let file = self.disk.open(&path).map_err(Error::io("open", &path))?;
            let good = self.scan(&*file, &asked);
            self.copy(&*file, &path, &good, None)?;
            wanted.retain(|name| good.iter().all(|good| good.name != *name));
            done.aside.entry(pack).or_default().add(&good);
            sum += good.len() as u64;
        }
        Ok(sum)
    }

    /// Everything of `wanted` that lies anywhere in a file where a page or a node may lie.
    fn scan(&self, file: &dyn DiskFile, wanted: &HashSet<Name>) -> Vec<Good> {
        let len = file.len().unwrap_or(0);
        let mut found: HashMap<Name, Good> = HashMap::new();
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
            for (i, page) in
                bytes.get(..own).unwrap_or_default().as_chunks::<PAGE_SIZE>().0.iter().enumerate()
            {
                let name = (Kind::Page, self.names.page(page));
                if wanted.contains(&name) {
                    let offset = start + (i * PAGE_SIZE) as u64;
                    found.entry(name).or_insert(Good { name, offset, len: PAGE_SIZE as u16 });
                }
            }
            for at in (0..own).step_by(8) {
                let here = bytes.get(at..).unwrap_or_default();
                let Ok((_, len)) = Node::decode(here) else { continue };
                let name = (Kind::Node, self.names.node(here.get(..len).unwrap_or_default()));
                if wanted.contains(&name) {
                    found.entry(name).or_insert(Good { name, offset: start + at as u64, len: len as u16 });
                }
            }
        }
        let mut found: Vec<Good> = found.into_values().collect();
        found.sort_unstable_by_key(|good| good.offset);
        found
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

/// Reads, and again a moment later if the disk fails, before anything is called lost.
fn read_patiently(file: &dyn DiskFile, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    let mut attempts = 0;
    loop {
        match file.read_at(bytes, offset) {
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof && attempts < RETRIES => {
                attempts += 1;
                std::thread::sleep(RETRY_AFTER);
            }
            other => return other,
        }
    }
}

/// Damage that does not pass by itself, in a pack of our own.
fn is_lasting(problem: Problem) -> bool {
    !matches!(problem, Problem::OtherGroup | Problem::Unreadable(_))
}

impl Salvaged {
    fn add(&mut self, good: &[Good]) {
        let pages = good.iter().filter(|good| good.name.0 == Kind::Page).count() as u64;
        self.pages += pages;
        self.nodes += good.len() as u64 - pages;
    }
}
