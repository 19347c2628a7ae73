//! Reading pages and map nodes: look up, sort by place, read neighbours at once, check everything against its name. What cannot be
//! read, or is not what its name says, is looked for elsewhere before it counts as damaged: every copy is as good.

use std::io;
use std::sync::Arc;

use crate::disk::DiskFile;
use crate::error::{Error, Kind, Problem, Result};
use crate::fault::readable;
use crate::index::ATTEMPTS;
use crate::map::{MAX_NODE, Node};
use crate::pack::{At, Body, Entry, HEADER, Pack, Place, decode_frame, read_footer};
use crate::store::Inner;
use crate::{Fingerprint, PAGE_SIZE, PageHash};

/// Pages read at once at most: 1 MiB.
const RUN: usize = 256;

/// A pack with its open file.
pub(crate) type OpenPack = (Arc<Pack>, Arc<dyn DiskFile>);

/// Places of names in a pack.
pub(crate) type PlacesIn = (Arc<Pack>, Vec<(Fingerprint, At)>);

/// One page to be read: where it lies, and where it goes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Wanted {
    pack: u32,
    slot: u32,
    out: usize,
}

/// The pages of a caller, and which of them are still to be read.
struct Reading<'a> {
    names: &'a [PageHash],
    out: &'a mut [[u8; PAGE_SIZE]],
    /// Moved by the collector between look-up and reading.
    again: Vec<usize>,
    /// Not to be had from where they lie, with the reason.
    bad: Vec<(usize, Error)>,
}

impl Inner {
    /// See [`crate::PageStore::read`].
    pub(crate) fn read_pages(&self, names: &[PageHash], out: &mut [u8]) -> Result<()> {
        let mut lost = self.read_each(names, out)?;
        // What may pass comes first: whoever is told of damage takes it for lasting.
        let passing = lost.iter().position(|(_, why)| !why.is_damage());
        if lost.is_empty() { Ok(()) } else { Err(lost.swap_remove(passing.unwrap_or_default()).1) }
    }

    /// Reads what can be read. Returns the positions of the others, in ascending order, each with the reason.
    pub(crate) fn read_each(&self, names: &[PageHash], out: &mut [u8]) -> Result<Vec<(usize, Error)>> {
        let (pages, rest) = out.as_chunks_mut::<PAGE_SIZE>();
        if !rest.is_empty() || pages.len() != names.len() {
            return Err(Error::Misuse("read needs room for as many whole pages as names"));
        }
        let mut todo: Vec<usize> = Vec::with_capacity(names.len());
        for (i, (name, page)) in names.iter().zip(pages.iter_mut()).enumerate() {
            if *name == PageHash::ZERO { page.fill(0) } else { todo.push(i) }
        }
        let (mut looked_again, mut lost) = (false, Vec::new());
        for _ in 0..ATTEMPTS {
            let mut reading = Reading { names, out: pages, again: Vec::new(), bad: Vec::new() };
            self.read_found(&todo, &mut reading)?;
            let (mut again, mut bad) = (reading.again, reading.bad);
            if !bad.is_empty() && !looked_again && self.look_again()? {
                looked_again = true;
                again.extend(bad.drain(..).map(|(i, _)| i));
            }
            lost.extend(self.read_elsewhere(names, bad, pages));
            todo = again;
            if todo.is_empty() {
                break;
            }
        }
        lost.extend(todo.into_iter().map(|i| {
            let name = names.get(i).copied().unwrap_or(PageHash::ZERO);
            (i, self.missing(Kind::Page, name))
        }));
        lost.sort_unstable_by_key(|(i, _)| *i);
        Ok(lost)
    }

    /// Reads the numbered pages from where the index has them.
    fn read_found(&self, numbers: &[usize], reading: &mut Reading<'_>) -> Result<()> {
        let own: Vec<PageHash> = numbers.iter().filter_map(|i| reading.names.get(*i)).copied().collect();
        let mut wanted: Vec<Wanted> = Vec::with_capacity(own.len());
        let mut packs: Vec<Arc<Pack>> = Vec::new();
        let mut known = vec![false; own.len()];
        self.index.lookup_surely(&own, |i, place, pack| {
            let (Some(out), Some(slot)) = (numbers.get(i), place.at.slot()) else { return };
            if let Some(known) = known.get_mut(i) {
                *known = true;
            }
            wanted.push(Wanted { pack: place.pack, slot, out: *out });
            if packs.last().is_none_or(|last| last.number != place.pack) {
                packs.push(pack.clone());
            }
        });
        for (i, _) in numbers.iter().zip(&known).filter(|(_, known)| !**known) {
            let name = reading.names.get(*i).copied().unwrap_or(PageHash::ZERO);
            reading.bad.push((*i, self.missing(Kind::Page, name)));
        }
        wanted.sort_unstable();
        packs.sort_unstable_by_key(|pack| pack.number);
        for group in wanted.chunk_by(|a, b| a.pack == b.pack) {
            let number = group.first().map_or(0, |w| w.pack);
            let found = packs.binary_search_by_key(&number, |pack| pack.number);
            let Some(pack) = found.ok().and_then(|i| packs.get(i)) else { continue };
            match self.packs.body(pack) {
                Ok(file) => reading.group(self, pack, &*file, group)?,
                Err(e) if e.is_not_found() && self.packs.get(number).is_none() => {
                    reading.again.extend(group.iter().map(|w| w.out));
                }
                Err(e) => reading.all_bad(self, pack, group, e)?,
            }
        }
        Ok(())
    }

    /// Pack and file, or None if it was collected.
    pub(crate) fn open_pack(&self, number: u32) -> Result<Option<OpenPack>> {
        let Some(pack) = self.packs.get(number) else { return Ok(None) };
        match self.packs.file(&pack) {
            Ok(file) => Ok(Some((pack, file))),
            Err(e) if e.is_not_found() && self.packs.get(number).is_none() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// One page of a pack, checked; None if it is not there, or not that page.
    pub(crate) fn page_at(&self, pack: &Pack, slot: u32, name: &PageHash) -> Result<Option<[u8; PAGE_SIZE]>> {
        let file = self.packs.body(pack)?;
        let mut page = [[0; PAGE_SIZE]];
        let wanted = [Wanted { pack: pack.number, slot, out: 0 }];
        let mut reading =
            Reading { names: std::slice::from_ref(name), out: &mut page, again: Vec::new(), bad: Vec::new() };
        reading.group(self, pack, &*file, &wanted)?;
        let good = reading.bad.is_empty();
        let [page] = page;
        Ok(good.then_some(page))
    }

    /// Reads pages from any packs that have them, going once through every footer. Returns those that are nowhere. What is found is where
    /// the index looks from then on.
    fn read_elsewhere(
        &self,
        names: &[PageHash],
        mut bad: Vec<(usize, Error)>,
        out: &mut [[u8; PAGE_SIZE]],
    ) -> Vec<(usize, Error)> {
        if bad.is_empty() {
            return bad;
        }
        let wanted: Vec<PageHash> = bad.iter().filter_map(|(i, _)| names.get(*i)).copied().collect();
        for (pack, places) in self.all_places(&wanted) {
            let mut found = Vec::new();
            bad.retain(|(i, _)| {
                let (Some(name), Some(out)) = (names.get(*i), out.get_mut(*i)) else { return true };
                let at = places.iter().find(|(own, _)| own.is_of(name)).map(|(_, at)| *at);
                let Some((at, slot)) = at.and_then(|at| Some((at, at.slot()?))) else { return true };
                let Ok(Some(page)) = self.page_at(&pack, slot, name) else { return true };
                *out = page;
                found.push((name.fingerprint(), Place { pack: pack.number, at }));
                false
            });
            if !found.is_empty() && pack.layout.image().is_none() {
                tracing::warn!(pack = pack.name(), pages = found.len(), "pages were read from another pack");
                self.index.set(&found);
            }
            if bad.is_empty() {
                break;
            }
        }
        bad
    }

    /// Every place that these names have, pack by pack, from the packs themselves; or from what a visitor remembers of them.
    fn all_places(&self, names: &[PageHash]) -> Box<dyn Iterator<Item = PlacesIn> + '_> {
        let mut wanted: Vec<Fingerprint> = names.iter().map(PageHash::fingerprint).collect();
        wanted.sort_unstable();
        wanted.dedup();
        if let Some(visit) = &self.visit {
            return Box::new(self.search(visit, &wanted).into_iter());
        }
        Box::new(self.packs.all().into_iter().map(move |pack| {
            let footer = self.footer(&pack).unwrap_or_default();
            let places = places_among(&wanted, &footer).collect();
            (pack, places)
        }))
    }

    /// What a pack says that it has. A visitor who has it open opens it anew before he believes that it cannot be read.
    pub(crate) fn footer(&self, pack: &Pack) -> Result<Vec<Entry>, Problem> {
        let footer = || {
            let file = self.packs.file(pack).map_err(|error| match error {
                Error::Io { source, .. } => Problem::Unreadable(source.kind()),
                _ => Problem::Unreadable(io::ErrorKind::Other),
            })?;
            read_footer(&*file, &pack.layout)
        };
        footer().or_else(|problem| {
            if self.visit.is_none() {
                return Err(problem);
            }
            self.doubt(pack.number);
            footer()
        })
    }

    /// A node by its name, which must be of this level; from the cache if it was used lately.
    pub(crate) fn node(&self, name: &PageHash, level: u8) -> Result<Arc<Node>> {
        let node = match self.node_cache.get(name) {
            Some(node) => node,
            None => {
                let (node, _) = self.read_node(name)?;
                let node = Arc::new(node);
                self.node_cache.put(*name, node.clone());
                node
            }
        };
        if node.level == level { Ok(node) } else { Err(self.wrong_level(name)) }
    }

    /// Reads and checks a node, past the cache; with its length in bytes.
    pub(crate) fn read_node(&self, name: &PageHash) -> Result<(Node, usize)> {
        match self.read_known_node(name) {
            Err(error) if self.may_be_elsewhere(&error) && self.look_again()? => self.read_known_node(name),
            read => read,
        }
    }

    /// The same, as far as the packs are known.
    fn read_known_node(&self, name: &PageHash) -> Result<(Node, usize)> {
        let mut why = None;
        for _ in 0..ATTEMPTS {
            let Some((place, _)) = self.index.get(name) else { break };
            let found = self.open_pack(place.pack).and_then(|open| {
                open.map(|(pack, file)| self.read_node_at(&pack, &*file, place.at, name)).transpose()
            });
            match found {
                Ok(Some(node)) => return Ok(node),
                Ok(None) => {}
                Err(e) if self.may_be_elsewhere(&e) => {
                    self.doubt(place.pack);
                    why = Some(e);
                    break;
                }
                Err(e) => return Err(e),
            }
        }
        for (pack, places) in self.all_places(std::slice::from_ref(name)) {
            if let Some((_, at)) = places.first()
                && let Ok(file) = self.packs.file(&pack)
                && let Ok(node) = self.read_node_at(&pack, &*file, *at, name)
            {
                return Ok(node);
            }
        }
        Err(why.unwrap_or_else(|| self.missing(Kind::Node, *name)))
    }

    /// Reads and checks a node at a known place.
    pub(crate) fn read_node_at(
        &self,
        pack: &Pack,
        file: &dyn DiskFile,
        at: At,
        name: &PageHash,
    ) -> Result<(Node, usize)> {
        let mut buffer = [0; MAX_NODE];
        let (node, own) = node_at(pack, file, at, *name, &mut buffer)?;
        if self.names.node(own) == *name {
            return Ok((node, own.len()));
        }
        Err(damaged(Kind::Node, *name, pack, Problem::Content))
    }

    /// The bytes of a node that a footer speaks of, checked.
    pub(crate) fn node_bytes(&self, pack: &Pack, file: &dyn DiskFile, entry: &Entry) -> Result<Vec<u8>> {
        let (name, mut buffer) = (entry.name.padded(), [0; MAX_NODE]);
        let (_, own) = node_at(pack, file, entry.at, name, &mut buffer)?;
        if entry.name.is_of(&self.names.node(own)) {
            return Ok(own.to_vec());
        }
        Err(damaged(Kind::Node, name, pack, Problem::Content))
    }

    /// A node that is intact, but at a place of the tree where it cannot be.
    pub(crate) fn wrong_level(&self, name: &PageHash) -> Error {
        let file = self.index.get(name).map_or_else(|| "a pack".into(), |(_, pack)| pack.in_words());
        Error::Damaged { kind: Kind::Node, name: *name, file, problem: Problem::Field("node level") }
    }

    /// Whether other copies are worth a look after this. To a visitor any error is: what he has open may be stale, what he knows may be
    /// old, and nobody draws conclusions from what he is told.
    fn may_be_elsewhere(&self, error: &Error) -> bool {
        error.is_damage() || self.visit.is_some()
    }

    /// Something of a pack cannot be read by a visitor: the next time its file is opened anew.
    fn doubt(&self, pack: u32) {
        if self.visit.is_some() {
            self.packs.let_go(pack);
        }
    }

    pub(crate) fn missing(&self, kind: Kind, name: PageHash) -> Error {
        Error::Missing { kind, name, set_aside: self.set_aside_names() }
    }
}

impl Reading<'_> {
    /// Reads pages of one pack, sorted by slot.
    fn group(&mut self, store: &Inner, pack: &Pack, file: &dyn DiskFile, group: &[Wanted]) -> Result<()> {
        let next = |a: &Wanted, b: &Wanted| b.slot - a.slot <= 1;
        for run in group.chunk_by(next).flat_map(|run| run.chunks(RUN)) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
            let len = (last.slot - first.slot) as usize + 1;
            let in_order = run.windows(2).all(|w| matches!(w, [a, b] if a.out + 1 == b.out));
            let direct = in_order && len == run.len();
            let mut scratch = Vec::new();
            let bytes: &mut [[u8; PAGE_SIZE]] = if direct {
                self.out.get_mut(first.out..=last.out).unwrap_or_default()
            } else {
                scratch.resize(len, [0; PAGE_SIZE]);
                &mut scratch
            };
            if let Err(e) = read_span(pack, file, first.slot, bytes) {
                if run.len() == 1 {
                    self.all_bad(store, pack, run, Error::io("read", pack.body_path())(e))?;
                } else {
                    // A run that cannot be read as a whole may have good pages.
                    for one in run.chunks(1) {
                        self.group(store, pack, file, one)?;
                    }
                }
                continue;
            }
            if direct {
                let bad = wrong(store, self.names, run, self.out, |wanted| wanted.out);
                self.note(store, pack, &bad);
            } else {
                let bad =
                    wrong(store, self.names, run, &scratch, |wanted| (wanted.slot - first.slot) as usize);
                self.note(store, pack, &bad);
                for wanted in run {
                    let from = scratch.get((wanted.slot - first.slot) as usize);
                    if let (Some(to), Some(from)) = (self.out.get_mut(wanted.out), from) {
                        to.copy_from_slice(from);
                    }
                }
            }
        }
        Ok(())
    }

    fn note(&mut self, store: &Inner, pack: &Pack, bad: &[usize]) {
        if !bad.is_empty() {
            store.doubt(pack.number);
        }
        for out in bad {
            let name = self.names.get(*out).copied().unwrap_or(PageHash::ZERO);
            let problem = match pack.layout.image() {
                Some(_) => Problem::Changed,
                None => Problem::Content,
            };
            self.bad.push((*out, damaged(Kind::Page, name, pack, problem)));
        }
    }

    /// None of them can be read; what cannot lie elsewhere is the caller's error.
    fn all_bad(&mut self, store: &Inner, pack: &Pack, group: &[Wanted], why: Error) -> Result<()> {
        if !store.may_be_elsewhere(&why) {
            return Err(why);
        }
        store.doubt(pack.number);
        // The first one has the system's own word; the others its like if it may pass, so that nobody takes it for lasting.
        let passing = !why.is_damage();
        let others: Vec<_> = group.iter().skip(1).map(|_| why.again().filter(|_| passing)).collect();
        for (wanted, why) in group.iter().zip(std::iter::once(Some(why)).chain(others)) {
            let name = self.names.get(wanted.out).copied().unwrap_or(PageHash::ZERO);
            let damaged = || damaged(Kind::Page, name, pack, Problem::Content);
            self.bad.push((wanted.out, why.unwrap_or_else(damaged)));
        }
        Ok(())
    }
}

/// What lies at the place of a node, with its bytes; the caller compares them with the `name`, which here is for messages.
fn node_at<'a>(
    pack: &Pack,
    file: &dyn DiskFile,
    at: At,
    name: PageHash,
    buffer: &'a mut [u8; MAX_NODE],
) -> Result<(Node, &'a [u8])> {
    let bad = |problem| damaged(Kind::Node, name, pack, problem);
    let layout = &pack.layout;
    let offset = at.node_offset().and_then(|offset| layout.node_offset.checked_add(offset));
    let offset = offset.ok_or_else(|| bad(Problem::Content))?;
    let room = layout.node_end.saturating_sub(offset).min(MAX_NODE as u64) as usize;
    let bytes = buffer.get_mut(..room).unwrap_or_default();
    file.read_at(bytes, offset).map_err(Error::io("read", &pack.path))?;
    let (node, len) = Node::decode(bytes).map_err(bad)?;
    Ok((node, bytes.get(..len).ok_or_else(|| bad(Problem::Content))?))
}

/// The places of these names in a footer, which is in the order of names.
pub(crate) fn places_among(
    names: &[Fingerprint],
    footer: &[Entry],
) -> impl Iterator<Item = (Fingerprint, At)> {
    names.iter().filter_map(|name| {
        let found = footer.binary_search_by_key(name, |entry| entry.name).ok();
        found.and_then(|i| footer.get(i)).map(|entry| (*name, entry.at))
    })
}

/// Reads the pages of slots that follow each other, unchecked, from the file that has the pack's pages: as they lie, in one request;
/// of frames, whole ones. A frame that cannot be decoded is `InvalidData`.
pub(crate) fn read_span(
    pack: &Pack,
    file: &dyn DiskFile,
    first: u32,
    out: &mut [[u8; PAGE_SIZE]],
) -> io::Result<()> {
    readable()?;
    let frames = match &pack.layout.body {
        Body::Raw => {
            return file.read_at(out.as_flattened_mut(), HEADER + u64::from(first) * PAGE_SIZE as u64);
        }
        Body::Image(_) => return file.read_at(out.as_flattened_mut(), u64::from(first) * PAGE_SIZE as u64),
        Body::Frames(frames) => frames,
    };
    let Some(last) = out.len().checked_sub(1) else { return Ok(()) };
    let (from, to) = (frames.find(first).0, frames.find(first.saturating_add(last as u32)).0);
    let ends = frames.range(from).zip(frames.range(to));
    let Some(((start, _), (end, len))) = ends else { return Err(io::ErrorKind::UnexpectedEof.into()) };
    let mut bytes = vec![0; (end - start) as usize + len];
    file.read_at(&mut bytes, HEADER + start)?;
    let (mut rest, mut skip) = (out, frames.find(first).1);
    for frame in from..=to {
        let own = frames.range(frame).and_then(|(at, len)| bytes.get((at - start) as usize..)?.get(..len));
        let pages = decode_frame(own.unwrap_or_default(), frames.pages)
            .map_err(|problem| io::Error::new(io::ErrorKind::InvalidData, problem))?;
        let pages = pages.get(skip..).unwrap_or_default();
        let count = pages.len().min(rest.len());
        let (own, behind) = rest.split_at_mut(count);
        own.copy_from_slice(pages.get(..count).unwrap_or_default());
        (rest, skip) = (behind, 0);
    }
    if rest.is_empty() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Numbers of the callers' pages whose bytes are not what their names say.
fn wrong(
    store: &Inner,
    names: &[PageHash],
    run: &[Wanted],
    bytes: &[[u8; PAGE_SIZE]],
    slot: impl Fn(&Wanted) -> usize,
) -> Vec<usize> {
    let mut bad = Vec::new();
    store.names.pages(run.iter().filter_map(|wanted| bytes.get(slot(wanted))), |number, found| {
        let out = run.get(number).map(|wanted| wanted.out);
        bad.extend(out.filter(|out| names.get(*out) != Some(&found)));
    });
    bad
}

/// Damage of a page or node; of a block of an image, that image's.
pub(crate) fn damaged(kind: Kind, name: PageHash, pack: &Pack, problem: Problem) -> Error {
    Error::Damaged { kind, name, file: pack.in_words(), problem }
}
