//! Writing a pack: slots for pages are handed out, nodes are gathered, and sealing puts footer and trailer behind them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::footer::{self, ENTRY, Entry};
use super::frame::{Header, TRAILER, Trailer};
use super::{HEADER, Layout, PackId};
use crate::PAGE_SIZE;
use crate::disk::{Disk, DiskFile};
use crate::error::{Error, Kind, Result};

/// A pack under its temporary name.
pub(crate) struct Building {
    id: PackId,
    folder: PathBuf,
    file: Arc<dyn DiskFile>,
    pages: u32,
    /// Slots up to here are being written back.
    written_back: u32,
    /// Nodes gathered and not yet written.
    nodes: Vec<u8>,
    /// Start and length of each node, in order of their starts.
    lens: Vec<(u32, u16)>,
    /// Bytes of nodes written by [`Building::close`].
    closed: Option<u64>,
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
    pub(crate) fn create(disk: &dyn Disk, folder: &Path, fingerprint: [u8; 16]) -> Result<Self> {
        let id = PackId::random()?;
        let path = folder.join(id.tmp_name());
        let file = disk.create(&path).map_err(Error::io("create", &path))?;
        let building = Self {
            id,
            folder: folder.to_owned(),
            file,
            pages: 0,
            written_back: 0,
            nodes: Vec::new(),
            lens: Vec::new(),
            closed: None,
        };
        let header = Header::new(id, fingerprint).encode();
        building.file.write_at(&[&header], 0).map_err(Error::io("write", &path)).inspect_err(|_| {
            building.discard(disk);
        })?;
        Ok(building)
    }

    /// Number of page slots handed out.
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
        if self.pages - self.written_back >= WRITE_BACK_PAGES {
            write_back = Some((page_offset(self.written_back), page_offset(self.pages)));
            self.written_back = self.pages;
        }
        Slots { file: self.file.clone(), path: self.tmp_path(), offset, write_back }
    }

    /// Has the disk begin with what it was not given yet.
    pub(crate) fn write_back(&mut self) {
        let (from, to) = (page_offset(self.written_back), page_offset(self.pages));
        self.written_back = self.pages;
        if from < to {
            self.file.write_back(from, to - from);
        }
    }

    /// Keeps a node for the end of the pack; returns its offset from the start of the nodes, in units of eight bytes.
    pub(crate) fn add_node(&mut self, node: &[u8]) -> u32 {
        let at = (self.nodes.len() / 8) as u32;
        self.lens.push((at, node.len() as u16));
        self.nodes.extend(node);
        self.nodes.resize(self.nodes.len().next_multiple_of(8), 0);
        at
    }

    /// Length of the node that [`Building::add_node`] put there.
    pub(crate) fn node_len(&self, at: u32) -> u16 {
        let found = self.lens.binary_search_by_key(&at, |(at, _)| *at).ok();
        found.and_then(|i| self.lens.get(i)).map_or(0, |(_, len)| *len)
    }

    /// Where the nodes will begin, in units of eight bytes. Final once no more slots are claimed.
    pub(crate) fn nodes_at(&self) -> u32 {
        (page_offset(self.pages) / 8) as u32
    }

    /// Writes the nodes behind the pages. Nothing more is claimed from or added to this pack.
    pub(crate) fn close(&mut self) -> Result<u64> {
        if let Some(bytes) = self.closed {
            return Ok(bytes);
        }
        let nodes = std::mem::take(&mut self.nodes);
        let path = self.tmp_path();
        self.file.write_at(&[&nodes], page_offset(self.pages)).map_err(Error::io("write", &path))?;
        self.closed = Some(nodes.len() as u64);
        Ok(nodes.len() as u64)
    }

    /// Writes footer and trailer behind pages and nodes and makes all of it durable, still under the temporary name.
    pub(crate) fn seal(&mut self, entries: &mut [Entry]) -> Result<Layout> {
        let node_bytes = self.close()?;
        let node_offset = page_offset(self.pages);
        let footer_offset = node_offset + node_bytes;
        let (path, mut at, mut checksum) = (self.tmp_path(), footer_offset, blake3::Hasher::new());
        entries.sort_unstable();
        // In pieces: of a large machine it is tens of megabytes.
        for piece in entries.chunks(FOOTER_PIECE) {
            let bytes = footer::encode(piece);
            checksum.update(&bytes);
            self.file.write_at(&[&bytes], at).map_err(Error::io("write", &path))?;
            at += bytes.len() as u64;
        }
        let trailer = Trailer {
            id: self.id,
            pages: u64::from(self.pages),
            nodes: entries.iter().filter(|entry| entry.kind == Kind::Node).count() as u64,
            node_offset,
            node_bytes,
            footer_offset,
            footer_bytes: (entries.len() * ENTRY) as u64,
            footer_checksum: *checksum.finalize().as_bytes(),
        };
        let len = at + TRAILER as u64;
        self.file.write_at(&[&trailer.encode()], at).map_err(Error::io("write", &path))?;
        self.file.sync().map_err(Error::io("sync", &path))?;
        Layout::new(&trailer, len)
            .map_err(|problem| Error::DamagedPack { pack: self.id.file_name(), problem })
    }

    /// Gives the sealed file its name, which is durable only once the folder is synced.
    pub(crate) fn rename(&self, disk: &dyn Disk) -> Result<PathBuf> {
        let (from, to) = (self.tmp_path(), self.folder.join(self.id.file_name()));
        disk.rename(&from, &to).map_err(Error::io("rename", &from))?;
        Ok(to)
    }

    /// Removes the file under whichever name it has; what cannot be removed is garbage that the next open or collection
    /// finds.
    pub(crate) fn discard(&self, disk: &dyn Disk) {
        for path in [self.tmp_path(), self.folder.join(self.id.file_name())] {
            match disk.remove(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), error = %e, "cannot remove an unfinished pack");
                }
                _ => {}
            }
        }
    }

    fn tmp_path(&self) -> PathBuf {
        self.folder.join(self.id.tmp_name())
    }
}

/// Offset of a page slot in bytes.
fn page_offset(slot: u32) -> u64 {
    HEADER + u64::from(slot) * PAGE_SIZE as u64
}

/// Offset of a page slot in units of eight bytes.
pub(crate) fn page_at(slot: u32) -> u32 {
    (page_offset(slot) / 8) as u32
}
