//! Writing a pack: slots for pages are handed out or pages are put into frames, nodes are gathered, and sealing puts table, footer
//! and trailer behind them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::footer::{self, ENTRY, Entry};
use super::frame::{BodyKind, Header, TRAILER, Trailer};
use super::frames::{FRAME_PAGES, FrameWriter, Frames};
use super::{At, HEADER, Image, Layout, PackId, VERSION};
use crate::disk::{Disk, DiskFile};
use crate::error::{Error, Kind, Result};
use crate::{Origin, PAGE_SIZE};

/// How a new pack keeps its pages.
#[derive(Clone, Debug)]
pub(crate) enum NewBody {
    /// As they are.
    Raw,
    /// In frames compressed at this level of zstd.
    Frames(i32),
    /// They are blocks of this file.
    Image(Arc<Image>),
}

/// A pack under its temporary name.
pub(crate) struct Building {
    header: Header,
    folder: PathBuf,
    file: Arc<dyn DiskFile>,
    pages: u32,
    body: OpenBody,
    /// Nodes gathered and not yet written.
    nodes: Vec<u8>,
    /// Start and length of each node, in order of their starts.
    lens: Vec<(u32, u16)>,
    /// Bytes of nodes written by [`Building::close`].
    closed: Option<u64>,
}

enum OpenBody {
    Raw {
        /// Slots up to here are being written back.
        written_back: u32,
    },
    Frames {
        writer: FrameWriter,
        /// Pages of the next frame.
        waiting: Vec<u8>,
        /// Start of each frame, in units of eight bytes.
        starts: Vec<u32>,
        bytes: u64,
    },
    Image(Arc<Image>),
}

/// Slots handed out for pages that follow each other.
pub(crate) struct Slots {
    file: Arc<dyn DiskFile>,
    path: PathBuf,
    offset: u64,
    /// From and to where the file is to be written back behind these slots. Other threads may not have written theirs yet: what they
    /// write later is left for the end.
    write_back: Option<(u64, u64)>,
}

/// The disk is given so many pages at a time, 32 MiB, while more come: at the end there is less to wait for.
const WRITE_BACK_PAGES: u32 = 8192;

/// Entries of a footer that are written at a time.
const FOOTER_PIECE: usize = 16 << 10;

impl Slots {
    /// Writes the pages of these slots, given in parts of any length.
    pub(crate) fn write(&self, parts: &[&[u8]]) -> Result<()> {
        self.file.write_at(parts, self.offset).map_err(Error::io("write", &self.path))?;
        if let Some((from, to)) = self.write_back {
            self.file.write_back(from, to - from);
        }
        Ok(())
    }
}

impl Building {
    /// Creates the temporary file, with the header in it.
    pub(crate) fn create(
        disk: &dyn Disk,
        folder: &Path,
        group: [u8; 16],
        origin: Origin,
        body: NewBody,
    ) -> Result<Self> {
        let id = PackId::random()?;
        let path = folder.join(id.tmp_name());
        let (kind, body) = match body {
            NewBody::Raw => (BodyKind::Raw, OpenBody::Raw { written_back: 0 }),
            NewBody::Frames(level) => {
                let writer = FrameWriter::new(level).map_err(Error::io("compress into", &path))?;
                let body = OpenBody::Frames { writer, waiting: Vec::new(), starts: Vec::new(), bytes: 0 };
                (BodyKind::Frames(FRAME_PAGES), body)
            }
            NewBody::Image(image) => (BodyKind::Image, OpenBody::Image(image)),
        };
        let file = disk.create(&path).map_err(Error::io("create", &path))?;
        let building = Self {
            header: Header { version: VERSION, id, group, origin, body: kind },
            folder: folder.to_owned(),
            file,
            pages: 0,
            body,
            nodes: Vec::new(),
            lens: Vec::new(),
            closed: None,
        };
        building.write(&building.header.encode(), 0).inspect_err(|_| building.discard(disk))?;
        Ok(building)
    }

    /// Number of pages.
    pub(crate) fn pages(&self) -> u32 {
        self.pages
    }

    /// Bytes of nodes gathered.
    pub(crate) fn node_bytes(&self) -> usize {
        self.nodes.len()
    }

    /// Hands out the next `n` slots; the number of the first is the number of pages before.
    pub(crate) fn claim(&mut self, n: u32) -> Slots {
        let offset = page_offset(self.pages);
        self.pages += n;
        let mut write_back = None;
        if let OpenBody::Raw { written_back } = &mut self.body
            && self.pages - *written_back >= WRITE_BACK_PAGES
        {
            write_back = Some((page_offset(*written_back), page_offset(self.pages)));
            *written_back = self.pages;
        }
        Slots { file: self.file.clone(), path: self.tmp_path(), offset, write_back }
    }

    /// Adds whole pages behind those before, in whatever way this pack keeps them.
    pub(crate) fn append(&mut self, pages: &[u8]) -> Result<()> {
        let count = (pages.len() / PAGE_SIZE) as u32;
        if let OpenBody::Frames { waiting, .. } = &mut self.body {
            waiting.extend(pages);
            self.pages += count;
            return self.write_frames(FRAME_PAGES as usize * PAGE_SIZE);
        }
        self.claim(count).write(&[pages])
    }

    /// Counts pages that lie elsewhere.
    pub(crate) fn count_elsewhere(&mut self, pages: u32) {
        self.pages += pages;
    }

    /// Writes frames of what waits, as long as that is so many bytes at least.
    fn write_frames(&mut self, least: usize) -> Result<()> {
        let path = self.tmp_path();
        let OpenBody::Frames { writer, waiting, starts, bytes } = &mut self.body else { return Ok(()) };
        let mut out = Vec::new();
        let mut rest = waiting.as_slice();
        while !rest.is_empty() && rest.len() >= least {
            let (frame, behind) = rest.split_at(rest.len().min(FRAME_PAGES as usize * PAGE_SIZE));
            starts.push(((*bytes + out.len() as u64) / 8) as u32);
            out.extend(writer.encode(frame));
            rest = behind;
        }
        let left = rest.len();
        self.file.write_at(&[&out], HEADER + *bytes).map_err(Error::io("write", &path))?;
        *bytes += out.len() as u64;
        waiting.drain(..waiting.len() - left);
        Ok(())
    }

    /// Has the disk begin with what it was not given yet.
    pub(crate) fn write_back(&mut self) {
        let OpenBody::Raw { written_back } = &mut self.body else { return };
        let (from, to) = (page_offset(*written_back), page_offset(self.pages));
        *written_back = self.pages;
        if from < to {
            self.file.write_back(from, to - from);
        }
    }

    /// Keeps a node for the end of the pack; returns its place there.
    pub(crate) fn add_node(&mut self, node: &[u8]) -> At {
        let units = (self.nodes.len() / 8) as u32;
        self.lens.push((units, node.len() as u16));
        self.nodes.extend(node);
        self.nodes.resize(self.nodes.len().next_multiple_of(8), 0);
        At::node(units)
    }

    /// Length of the node that [`Building::add_node`] put there; that of a page for a page's place.
    pub(crate) fn len_at(&self, at: At) -> u16 {
        let Some(offset) = at.node_offset() else { return PAGE_SIZE as u16 };
        let found = self.lens.binary_search_by_key(&((offset / 8) as u32), |(at, _)| *at).ok();
        found.and_then(|i| self.lens.get(i)).map_or(0, |(_, len)| *len)
    }

    /// Writes the nodes behind the pages. Nothing more is claimed from or added to this pack.
    pub(crate) fn close(&mut self) -> Result<u64> {
        if let Some(bytes) = self.closed {
            return Ok(bytes);
        }
        self.write_frames(1)?;
        let nodes = std::mem::take(&mut self.nodes);
        self.write(&nodes, HEADER + self.body_bytes())?;
        self.closed = Some(nodes.len() as u64);
        Ok(nodes.len() as u64)
    }

    fn body_bytes(&self) -> u64 {
        match &self.body {
            OpenBody::Raw { .. } => u64::from(self.pages) * PAGE_SIZE as u64,
            OpenBody::Frames { bytes, .. } => *bytes,
            OpenBody::Image(_) => 0,
        }
    }

    /// Writes table, footer and trailer behind pages and nodes and makes all of it durable, still under the temporary name.
    pub(crate) fn seal(&mut self, entries: &mut [Entry]) -> Result<Layout> {
        let node_bytes = self.close()?;
        let body_bytes = self.body_bytes();
        let table = match &self.body {
            OpenBody::Raw { .. } => Vec::new(),
            OpenBody::Frames { starts, .. } => Frames::encode(starts),
            OpenBody::Image(image) => image.encode(),
        };
        let (mut at, mut checksum) = (HEADER + body_bytes + node_bytes, blake3::Hasher::new());
        self.write(&table, at)?;
        at += table.len() as u64;
        // Names are different, and as numbers they are in the same order.
        entries.sort_unstable_by_key(|entry| u128::from_be_bytes(entry.name.0));
        // In pieces: of a large machine it is megabytes.
        for piece in entries.chunks(FOOTER_PIECE) {
            let bytes = footer::encode(piece);
            checksum.update(&bytes);
            self.write(&bytes, at)?;
            at += bytes.len() as u64;
        }
        let trailer = Trailer {
            id: self.header.id,
            pages: u64::from(self.pages),
            nodes: entries.iter().filter(|entry| entry.kind() == Kind::Node).count() as u64,
            body_bytes,
            node_bytes,
            table_bytes: table.len() as u64,
            footer_bytes: (entries.len() * ENTRY) as u64,
            table_checksum: *blake3::hash(&table).as_bytes(),
            footer_checksum: *checksum.finalize().as_bytes(),
        };
        self.write(&trailer.encode(), at)?;
        let path = self.tmp_path();
        self.file.sync().map_err(Error::io("sync", &path))?;
        Layout::new(&self.header, &trailer, at + TRAILER as u64)
            .and_then(|layout| layout.with_table(self.header.body, &table))
            .map_err(|problem| Error::DamagedPack { pack: self.header.id.file_name(), problem })
    }

    /// Gives the sealed file its name, which is durable only once the folder is synced.
    pub(crate) fn rename(&self, disk: &dyn Disk) -> Result<PathBuf> {
        let (from, to) = (self.tmp_path(), self.folder.join(self.header.id.file_name()));
        disk.rename(&from, &to).map_err(Error::io("rename", &from))?;
        Ok(to)
    }

    /// Removes the file under whichever name it has; what cannot be removed is garbage that the next open or collection
    /// finds.
    pub(crate) fn discard(&self, disk: &dyn Disk) {
        for path in [self.tmp_path(), self.folder.join(self.header.id.file_name())] {
            match disk.remove(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), error = %e, "cannot remove an unfinished pack");
                }
                _ => {}
            }
        }
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.file.write_at(&[bytes], at).map_err(Error::io("write", &self.tmp_path()))
    }

    fn tmp_path(&self) -> PathBuf {
        self.folder.join(self.header.id.tmp_name())
    }
}

/// Offset of a page slot in bytes.
fn page_offset(slot: u32) -> u64 {
    HEADER + u64::from(slot) * PAGE_SIZE as u64
}
