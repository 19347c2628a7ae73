//! Images: files of somebody else's that never change, such as the frozen layers of a disk. Most of a guest's memory is a copy of its
//! disk, so a page that is a block of an image is not stored: its place is there.
//!
//! An image is *shared* or *private*. A shared one is the caller's own: he does not change it, and does not take it away before a
//! collection says that nothing is left on it ([`crate::GcRequest::leaving`]). A private one belongs to a user, who may change it or
//! take it away. Only sessions that name it rely on it ([`crate::Purpose::images`]), so nobody comes to depend on such a file who did
//! not depend on it already.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use crate::disk::DiskFile;
use crate::error::{Error, Result};
use crate::pack::{At, Building, Entry, Image, NewBody, Pack};
use crate::store::{Inner, Store};
use crate::{Fingerprint, Origin, PAGE_SIZE};

/// A file whose blocks are to be pages.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// What the caller calls it.
    pub label: String,
    /// Relative to the store's folder, or absolute.
    pub path: PathBuf,
    /// A user's file; see the module's head.
    pub private: bool,
    /// Its length and the time of its last change in nanoseconds since 1970, if the caller knows what it has to look like.
    pub seen: Option<(u64, i128)>,
    /// Where in the file there is data; blocks are looked for at multiples of [`PAGE_SIZE`].
    pub data: Vec<Extent>,
}

/// A stretch of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins, in bytes from the file's start.
    pub offset: u64,
    /// Its length in bytes; it may reach past the file's end.
    pub bytes: u64,
}

/// An image that the store knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// What the caller calls it.
    pub label: String,
    /// Where it is.
    pub path: PathBuf,
    /// Different blocks that may be pages.
    pub pages: u64,
    /// All of its parts are there.
    pub whole: bool,
    /// It is not what it was: no session relies on it any more.
    pub suspect: bool,
}

/// Blocks of a part: 1 GiB.
const PART: u64 = 262_144;
/// Blocks read and hashed at once.
const RUN: u64 = 256;

impl Store {
    /// Names the blocks of an image, part by part; parts that are known already are left out, so that a second call goes on where a first
    /// one was stopped. `go_on` gets the bytes looked at so far and in all, and stops the work by returning false, which may also make it
    /// wait. True if all of it is known in the end.
    ///
    /// # Errors
    /// The file cannot be read, or changes meanwhile; the disk is full.
    pub fn add_image(&self, new: &NewImage, go_on: &dyn Fn(u64, u64) -> bool) -> Result<bool> {
        let store = &*self.inner;
        let path = store.home.join(&new.path);
        // A user's as he, or a link in its place could have us name what he may not read. Blocks are read as we: they have to be what they
        // are called, and so what he could read.
        let open = || {
            let opened = if new.private { store.disk.open_users(&path) } else { store.disk.open(&path) };
            opened.map_err(Error::io("open", &path))
        };
        let stamp = |file: &dyn DiskFile| {
            let stamp = file.len().and_then(|len| file.modified().map(|modified| (len, modified)));
            stamp.map_err(Error::io("look at", &path))
        };
        let file = open()?;
        let (bytes, modified) = stamp(&*file)?;
        // By its name too: it may be gone, or another file, while this one can still be read.
        let is_same =
            || Ok::<_, Error>(stamp(&*file)? == (bytes, modified) && stamp(&*open()?)? == (bytes, modified));
        if new.seen.is_some_and(|seen| seen != (bytes, modified)) {
            return Err(Error::ImageChanges { path });
        }
        let runs = runs(&new.data, bytes);
        let total: u64 = runs.iter().map(|run| run.end - run.start).sum();
        let parts = u32::try_from(total.div_ceil(PART)).unwrap_or(u32::MAX).max(1);
        let known: HashSet<u32> = store.parts(&new.label).iter().map(|(_, image)| image.part).collect();
        let mut runs = runs.into_iter().peekable();
        let mut done = 0;
        for part in 0..parts {
            let (mut entries, mut seen) = (Vec::new(), HashSet::new());
            let mut left = PART;
            while let Some(run) = runs.next_if(|run| run.end - run.start <= left) {
                left -= run.end - run.start;
                if !known.contains(&part) {
                    if !go_on(done * PAGE_SIZE as u64, total * PAGE_SIZE as u64) {
                        return Ok(false);
                    }
                    store.name_blocks(&*file, &path, run.clone(), &mut seen, &mut entries)?;
                }
                done += run.end - run.start;
            }
            if known.contains(&part) {
                continue;
            }
            // What is relied on must be durable: a user may have copied the file a moment ago.
            file.sync().map_err(Error::io("sync", &path))?;
            if !is_same()? {
                return Err(Error::ImageChanges { path });
            }
            let (label, path, private) = (new.label.clone(), new.path.clone(), new.private);
            let image = Image { label, path, bytes, modified, private, part, parts };
            store.write_part(image, &mut entries)?;
            if self.wants_folding() {
                self.fold()?;
            }
        }
        go_on(total * PAGE_SIZE as u64, total * PAGE_SIZE as u64);
        Ok(true)
    }

    /// Relies on no other images from now on than those with these labels. What lies on others is still read there.
    pub fn trust_images(&self, labels: &HashSet<String>) {
        for pack in self.inner.packs.view().iter() {
            if pack.layout.image().is_some_and(|image| !labels.contains(&image.label)) {
                pack.suspect();
            }
        }
    }

    /// The images that the store knows.
    pub fn images(&self) -> Vec<ImageInfo> {
        let mut images: HashMap<String, (ImageInfo, HashSet<u32>)> = HashMap::new();
        for pack in self.inner.packs.view().iter() {
            let Some(image) = pack.layout.image() else { continue };
            let fresh = || {
                let path = pack.body_path().to_owned();
                let info =
                    ImageInfo { label: image.label.clone(), path, pages: 0, whole: false, suspect: false };
                (info, HashSet::new())
            };
            let (info, parts) = images.entry(image.label.clone()).or_insert_with(fresh);
            // Two who named it at the same time have made a part twice.
            if parts.insert(image.part) {
                info.pages += u64::from(pack.layout.pages);
            }
            info.whole = parts.len() == image.parts as usize;
            info.suspect |= pack.is_suspect();
        }
        images.into_values().map(|(info, _)| info).collect()
    }
}

/// The blocks of a file's data in runs of [`RUN`] at most, which never reach from one part into the next.
fn runs(data: &[Extent], bytes: u64) -> Vec<Range<u64>> {
    let end = (bytes / PAGE_SIZE as u64).min(u64::from(At::END));
    let (mut runs, mut room) = (Vec::new(), PART);
    for extent in data {
        let mut from = extent.offset.div_ceil(PAGE_SIZE as u64);
        let to = (extent.offset.saturating_add(extent.bytes) / PAGE_SIZE as u64).min(end);
        while from < to {
            let len = (to - from).min(RUN).min(room);
            runs.push(from..from + len);
            from += len;
            room -= len;
            if room == 0 {
                room = PART;
            }
        }
    }
    runs
}

impl Inner {
    /// Adds the names of blocks that are not zero, each once.
    fn name_blocks(
        &self,
        file: &dyn DiskFile,
        path: &std::path::Path,
        blocks: Range<u64>,
        seen: &mut HashSet<Fingerprint>,
        entries: &mut Vec<Entry>,
    ) -> Result<()> {
        let mut bytes = vec![[0; PAGE_SIZE]; (blocks.end - blocks.start) as usize];
        let offset = blocks.start * PAGE_SIZE as u64;
        file.read_at(bytes.as_flattened_mut(), offset).map_err(Error::io("read", path))?;
        let there: Vec<(u64, &[u8; PAGE_SIZE])> =
            blocks.zip(&bytes).filter(|(_, page)| **page != [0; PAGE_SIZE]).collect();
        self.names.pages(there.iter().map(|(_, page)| *page), |i, name| {
            let Some((block, _)) = there.get(i) else { return };
            if seen.insert(name.fingerprint()) {
                entries.push(Entry::page(name.fingerprint(), *block as u32));
            }
        });
        Ok(())
    }

    /// Makes one part durable and known.
    fn write_part(&self, image: Image, entries: &mut [Entry]) -> Result<()> {
        let body = NewBody::Image(Arc::new(image));
        let (disk, group) = (&*self.disk, self.names.fingerprint);
        let mut building = Building::create(disk, &self.folder, group, Origin::default(), body)?;
        building.count_elsewhere(entries.len() as u32);
        let sealed = self.make_durable(&mut building, entries);
        let (layout, path) = sealed.inspect_err(|_| building.discard(disk))?;
        self.publish(path, layout, entries);
        Ok(())
    }

    /// The packs of an image.
    pub(crate) fn parts(&self, label: &str) -> Vec<(Arc<Pack>, Arc<Image>)> {
        let view = self.packs.view();
        let own =
            view.iter().filter_map(|pack| pack.layout.image().map(|image| (pack.clone(), image.clone())));
        own.filter(|(_, image)| image.label == label).collect()
    }

    /// Looks whether private images are what they were when they were hashed.
    pub(crate) fn watch_images(&self, labels: &[String]) {
        labels.iter().flat_map(|label| self.parts(label)).for_each(|(pack, _)| self.watch_image(&pack));
    }

    /// The same for one pack.
    pub(crate) fn watch_image(&self, pack: &Pack) {
        let Some(image) = pack.layout.image().filter(|_| !pack.is_suspect()) else { return };
        // By its name: the file that is held open may have been replaced.
        let file = self.disk.open(pack.body_path());
        let same = file.is_ok_and(|file| {
            file.len().is_ok_and(|len| len == image.bytes)
                && file.modified().is_ok_and(|modified| modified == image.modified)
        });
        if !same {
            tracing::warn!(image = %pack.body_path().display(), "an image is not what it was");
            pack.suspect();
        }
    }
}
