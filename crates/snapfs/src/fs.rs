//! What the kernel asks, and what it is told.

use std::collections::hash_map::Entry as MapEntry;
use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FsOptions, OpenOptions, statvfs64};
use fuse_backend_rs::api::filesystem::{Context, DirEntry, Entry, FileSystem, ZeroCopyWriter};
use libc::stat64;
use pages::{PAGE_SIZE, PageHash, Visitor};

use crate::MapFile;
use crate::fault::{Fault, planted};
use crate::handover::{Known, Told};
use crate::held::{Held, HeldRead, bad_pages};
use crate::list::ListReader;
use crate::nodes::{DISK, Node, RAM, ROOT, Tree, Use};
use crate::serve::Servers;

/// What never changes is known for as long as this.
const FOR_EVER: Duration = Duration::from_secs(365 * 86_400);

/// The file system.
pub(crate) struct SnapFs {
    store: Visitor,
    /// Files of maps that the kernel knows, by their numbers.
    maps: RwLock<HashMap<u64, (MapFile, Use)>>,
    tree: Mutex<(ListReader, Arc<Tree>)>,
    held: Held,
    servers: Arc<Servers>,
    /// Pages that could not be read together with others, by the numbers of their files.
    bad: Mutex<HashSet<(u64, u64)>>,
    /// Both for whoever takes over.
    known: Known,
    owner: (u32, u32),
}

/// What there is under a number.
enum Found {
    Node(Node),
    /// One of the folders that are not listed.
    Hidden,
}

impl SnapFs {
    /// A view of `store` with what is listed, and with the files that the kernel knows from before.
    pub(crate) fn new(
        store: Visitor,
        list: ListReader,
        held: Held,
        servers: Arc<Servers>,
        known: (Known, Vec<Told>),
    ) -> Self {
        let (known, told) = known;
        let (mut maps, mut bad) = (HashMap::new(), HashSet::new());
        for told in told {
            match told {
                Told::File(file, used) => drop(maps.insert(file.number(used), (file, used))),
                Told::Bad(number, page) => drop(bad.insert((number, page))),
            }
        }
        let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Self {
            store,
            maps: RwLock::new(maps),
            tree: Mutex::new((list, Arc::default())),
            held,
            servers,
            bad: Mutex::new(bad),
            known,
            owner,
        }
    }

    /// The listed folders as they are now.
    fn tree(&self) -> Arc<Tree> {
        let mut tree = self.tree.lock().unwrap_or_else(PoisonError::into_inner);
        let (list, built) = &mut *tree;
        match list.look() {
            Ok(false) => {}
            Ok(true) => *built = Arc::new(Tree::of(list.all())),
            Err(error) => tracing::warn!(%error, "the list cannot be read"),
        }
        Arc::clone(built)
    }

    fn find(&self, number: u64) -> io::Result<Found> {
        if matches!(number, RAM | DISK) {
            return Ok(Found::Hidden);
        }
        let map = self.maps.read().unwrap_or_else(PoisonError::into_inner).get(&number).copied();
        if let Some((file, used)) = map.filter(|(_, used)| *used != Use::Shown) {
            return Ok(Found::Node(Node::Map { file, used, time: 0 }));
        }
        let known = || match map {
            // It is listed no more, and somebody has it open.
            Some((file, used)) => Some(Node::Map { file, used, time: 0 }),
            None => (number == ROOT).then(|| Node::Folder { entries: Vec::new(), time: 0 }),
        };
        let node = self.tree().get(number).cloned().or_else(known);
        node.map(Found::Node).ok_or_else(|| os(libc::ENOENT))
    }

    /// The file of a map that the store has.
    fn map(&self, name: &str, used: Use) -> io::Result<(u64, MapFile)> {
        let file = MapFile::parse(name).ok_or_else(|| os(libc::ENOENT))?;
        let number = file.number(used);
        if !self.maps.read().unwrap_or_else(PoisonError::into_inner).contains_key(&number) {
            self.store.map_range(&file.root, 0, &mut [PageHash::ZERO]).map_err(|error| {
                tracing::debug!(name, %error, "not to be had");
                os(libc::ENOENT)
            })?;
            self.remember(file, used)?;
        }
        Ok((number, file))
    }

    /// Before the kernel is told of it: whoever takes over has to know it.
    fn remember(&self, file: MapFile, used: Use) -> io::Result<()> {
        let mut maps = self.maps.write().unwrap_or_else(PoisonError::into_inner);
        if let MapEntry::Vacant(vacant) = maps.entry(file.number(used)) {
            self.known.add(Told::File(file, used))?;
            vacant.insert((file, used));
        }
        Ok(())
    }

    fn attributes(&self, number: u64, node: &Found) -> stat64 {
        // All of it zero but what is set here.
        let mut attributes = Entry::default().attr;
        let (mode, bytes, time) = match node {
            Found::Hidden => (libc::S_IFDIR | 0o500, 0, 0),
            Found::Node(Node::Folder { time, .. }) => (libc::S_IFDIR | 0o500, 0, *time),
            Found::Node(Node::Map { file, time, .. }) => (libc::S_IFREG | 0o400, file.bytes, *time),
            Found::Node(Node::Text { text, time }) => (libc::S_IFREG | 0o400, text.len() as u64, *time),
        };
        attributes.st_ino = number;
        attributes.st_mode = mode;
        attributes.st_nlink = 1;
        (attributes.st_uid, attributes.st_gid) = self.owner;
        attributes.st_size = bytes as i64;
        attributes.st_blocks = bytes.div_ceil(512) as i64;
        attributes.st_blksize = PAGE_SIZE as i64;
        (attributes.st_mtime, attributes.st_ctime, attributes.st_atime) = (time, time, time);
        attributes
    }

    /// Fills `out` with what a map describes from `offset` on, which is a multiple of the page's size.
    fn fill(&self, file: &MapFile, first: u64, out: &mut [u8]) -> Result<(), pages::Error> {
        let mut names = vec![PageHash::ZERO; out.len() / PAGE_SIZE];
        self.store.map_range(&file.root, first, &mut names)?;
        self.store.read(&names, out)
    }

    /// The same for what must not fail.
    fn fill_surely(
        &self,
        file: &MapFile,
        used: Use,
        first: u64,
        out: &mut [u8],
        asker: i32,
    ) -> io::Result<()> {
        let Err(error) = self.fill(file, first, out) else { return Ok(()) };
        if used != Use::Ram || planted(Fault::AnswerErrors) {
            tracing::error!(file = file.file_name(), page = first, %error, "a read fails");
            return Err(os(libc::EIO));
        }
        let mut page_buffer = vec![0; PAGE_SIZE];
        let readable = |page| self.fill(file, page, &mut page_buffer).map_err(|error| error.to_string());
        let count = (out.len() / PAGE_SIZE) as u64;
        let (pages, why) = bad_pages(first..first + count, readable);
        if count > 1 && self.is_news(file.number(used), &pages) {
            // Such a read is one ahead, of which nobody hears: each page that is needed is asked for again by itself. So the good ones among
            // them need not wait. Should they come together again, they belong together, and an error would be heard.
            return Err(os(libc::EIO));
        }
        let why = why.unwrap_or_else(|| error.to_string());
        // Others are not to wait with the one who asked.
        let _more = self.servers.one_more();
        self.held.until(HeldRead { file: *file, pages, why }, &mut || match self.fill(file, first, out) {
            Ok(()) => Some(Ok(())),
            // The kernel does not let him end before he has an answer. Whoever waits for the same page asks again.
            Err(_) => is_being_killed(asker).then(|| Err(os(libc::EINTR))),
        })
    }

    /// True if none of these pages was ever found bad before. Then they have been by now.
    fn is_news(&self, number: u64, pages: &[u64]) -> bool {
        let mut bad = self.bad.lock().unwrap_or_else(PoisonError::into_inner);
        let news = !pages.is_empty() && pages.iter().all(|page| !bad.contains(&(number, *page)));
        news && pages.iter().all(|page| {
            bad.insert((number, *page));
            self.known.add(Told::Bad(number, *page)).is_ok()
        })
    }
}

impl FileSystem for SnapFs {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let wanted = FsOptions::ASYNC_READ | FsOptions::PARALLEL_DIROPS | FsOptions::HAS_RESEND;
        Ok(capable & wanted)
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let name = name.to_str().map_err(|_| os(libc::ENOENT))?;
        let hidden = |used| -> io::Result<_> {
            let (number, file) = self.map(name, used)?;
            Ok((number, Found::Node(Node::Map { file, used, time: 0 }), FOR_EVER))
        };
        let (number, found, known) = match (parent, name) {
            (RAM, _) => hidden(Use::Ram),
            (DISK, _) => hidden(Use::Disk),
            (ROOT, ".ram") => Ok((RAM, Found::Hidden, FOR_EVER)),
            (ROOT, ".disk") => Ok((DISK, Found::Hidden, FOR_EVER)),
            _ => {
                let tree = self.tree();
                let number = tree.get(parent).and_then(|node| node.entry(name));
                let number = number.ok_or_else(|| os(libc::ENOENT))?;
                let node = tree.get(number).cloned().ok_or_else(|| os(libc::ENOENT))?;
                if let Node::Map { file, used, .. } = &node {
                    self.remember(*file, *used)?;
                }
                // It may be removed or renamed at any moment.
                Ok((number, Found::Node(node), Duration::ZERO))
            }
        }?;
        Ok(Entry {
            inode: number,
            attr: self.attributes(number, &found),
            attr_timeout: known,
            entry_timeout: known,
            ..Entry::default()
        })
    }

    fn getattr(&self, _: &Context, number: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        Ok((self.attributes(number, &self.find(number)?), Duration::ZERO))
    }

    fn open(
        &self,
        _: &Context,
        number: u64,
        flags: u32,
        _: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        if flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32 {
            return Err(os(libc::EROFS));
        }
        self.find(number)?;
        // Under a number is always the same: what the page cache has of it stays right.
        Ok((None, OpenOptions::KEEP_CACHE, None))
    }

    fn create(
        &self,
        _: &Context,
        _: u64,
        _: &CStr,
        _: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        Err(os(libc::EROFS))
    }

    fn read(
        &self,
        asking: &Context,
        number: u64,
        _: u64,
        out: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        let range = |bytes: u64| (offset.min(bytes), offset.saturating_add(size.into()).min(bytes));
        match self.find(number)? {
            Found::Node(Node::Map { file, used, .. }) => {
                let (from, to) = range(file.bytes);
                let page = PAGE_SIZE as u64;
                let (first, end) = (from / page, to.div_ceil(page));
                let mut bytes = vec![0; ((end - first) * page) as usize];
                if !bytes.is_empty() {
                    self.fill_surely(&file, used, first, &mut bytes, asking.pid)?;
                }
                let skip = (from - first * page) as usize;
                let wanted = bytes.get(skip..skip + (to - from) as usize).unwrap_or_default();
                out.write_all(wanted)?;
                Ok(wanted.len())
            }
            Found::Node(Node::Text { text, .. }) => {
                let (from, to) = range(text.len() as u64);
                let wanted = text.as_bytes().get(from as usize..to as usize).unwrap_or_default();
                out.write_all(wanted)?;
                Ok(wanted.len())
            }
            Found::Hidden | Found::Node(Node::Folder { .. }) => Err(os(libc::EISDIR)),
        }
    }

    fn readdir(
        &self,
        _: &Context,
        number: u64,
        _: u64,
        _: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let tree = self.tree();
        let Some(Node::Folder { entries, .. }) = tree.get(number) else { return Ok(()) };
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (place, (name, own)) in entries.iter().enumerate().skip(from) {
            let folder = matches!(tree.get(*own), Some(Node::Folder { .. }));
            let type_ = u32::from(if folder { libc::DT_DIR } else { libc::DT_REG });
            let entry = DirEntry { ino: *own, offset: place as u64 + 1, type_, name: name.as_bytes() };
            if add(entry)? == 0 {
                break;
            }
        }
        Ok(())
    }

    fn release(
        &self,
        _: &Context,
        _: u64,
        _: u32,
        _: u64,
        _: bool,
        _: bool,
        _: Option<u64>,
    ) -> io::Result<()> {
        Ok(())
    }

    fn statfs(&self, _: &Context, _: u64) -> io::Result<statvfs64> {
        Err(os(libc::ENOSYS))
    }
}

fn os(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// True if a thread has been killed, or is gone: whatever it is answered, it does not go on.
fn is_being_killed(thread: i32) -> bool {
    // Whom we cannot see (in a container, say) we cannot ask.
    if thread <= 0 {
        return false;
    }
    match std::fs::read_to_string(format!("/proc/{thread}/status")) {
        Ok(status) => has_kill_pending(&status),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// `SigPnd` is of the thread, `ShdPnd` of its process: see `proc_pid_status(5)`.
fn has_kill_pending(status: &str) -> bool {
    let pending = status
        .lines()
        .filter_map(|line| line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:")))
        .filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    pending.fold(0, |all, mask| all | mask) & 1 << (libc::SIGKILL - 1) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_being_killed_is_told_from_who_only_got_a_signal() {
        let status = |thread: &str, process: &str| {
            format!("Name:\tqemu\nSigPnd:\t{thread}\nShdPnd:\t{process}\nSigBlk:\t0000000000000100\n")
        };
        assert!(has_kill_pending(&status("0000000000000100", "0000000000000000")));
        assert!(has_kill_pending(&status("0000000000000000", "0000000000000300")));
        assert!(!has_kill_pending(&status("0000000000000200", "0000000000000000")));
        assert!(!has_kill_pending(""));
        assert!(is_being_killed(i32::MAX) && !is_being_killed(0));
        assert!(!is_being_killed(i32::try_from(std::process::id()).unwrap()));
    }
}
