//! What the kernel asks, and what it is told.

use std::collections::hash_map::Entry as MapEntry;
use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FsOptions, OpenOptions, statvfs64};
use fuse_backend_rs::api::filesystem::{Context, DirEntry, Entry, FileSystem, ZeroCopyWriter};
use libc::stat64;
use pages::{LEAF_PAGES, PAGE_SIZE, PageHash, Visitor};

use crate::MapFile;
use crate::fault::{Fault, planted};
use crate::handover::{Known, Told};
use crate::held::{Held, HeldRead, PAGES};
use crate::list::ListReader;
use crate::log::{Saying, is_new};
use crate::nodes::{DISK, Node, RAM, ROOT, Tree, Use};
use crate::serve::Servers;

/// What never changes is known for as long as this.
const FOR_EVER: Duration = Duration::from_secs(365 * 86_400);
/// How long it is tried to read a disk before its reader hears that it cannot be. Not longer: QEMU does not stand still before it has an
/// answer, and its guest is not to stand still for long.
const DISK_PATIENCE: Duration = Duration::from_secs(2);
/// ... and how often.
const AGAIN: Duration = Duration::from_millis(200);
/// How long a wait in vain spares others the same.
const IN_VAIN: Duration = Duration::from_secs(60);
/// How long the kernel's own threads wait for memory.
const KERNEL_PATIENCE: Duration = Duration::from_secs(1);

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
    /// When somebody last waited in vain for a page of a disk, and in which state the store was all the time.
    in_vain: Mutex<Option<(u64, Instant)>>,
    /// Both for whoever takes over.
    known: Known,
    owner: (u32, u32),
}

/// What cannot be read of a stretch.
struct Unread {
    /// Numbers of the pages, in ascending order.
    pages: Vec<u64>,
    why: pages::Error,
}

impl Unread {
    fn held(&self, file: &MapFile) -> HeldRead {
        let pages = self.pages.iter().take(PAGES).copied().collect();
        HeldRead { file: *file, pages, why: self.why.to_string() }
    }
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
        let more = Arc::clone(&servers);
        store.when_slow(move || Box::new(more.one_more()));
        let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Self {
            store,
            maps: RwLock::new(maps),
            tree: Mutex::new((list, Arc::default())),
            held,
            servers,
            bad: Mutex::new(bad),
            in_vain: Mutex::new(None),
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
            Err(error) if is_new(Saying::Told, (0, 0)) => tracing::warn!(%error, "the list cannot be read"),
            Err(_) => {}
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

    /// Fills `out` with what a map describes from page `first` on.
    fn fill(&self, file: &MapFile, first: u64, out: &mut [u8]) -> Result<(), Unread> {
        let mut names = vec![PageHash::ZERO; out.len() / PAGE_SIZE];
        let count = names.len();
        let mut unread: Vec<(Range<usize>, pages::Error)> = Vec::new();
        if self.store.map_range(&file.root, first, &mut names).is_err() {
            // What is missing of a map are whole leaves at least.
            let mut at = 0;
            while let Some(rest) = names.get_mut(at..).filter(|rest| !rest.is_empty()) {
                let first = first + at as u64;
                let to_next = LEAF_PAGES - (first % LEAF_PAGES as u64) as usize;
                let own = rest.get_mut(..to_next.min(count - at)).unwrap_or_default();
                let end = at + own.len();
                if let Err(why) = self.store.map_range(&file.root, first, own) {
                    own.fill(PageHash::ZERO);
                    unread.push((at..end, why));
                }
                at = end;
            }
        }
        match self.store.read_each(&names, out) {
            Ok(pages) => unread.extend(pages.into_iter().map(|(i, why)| (i..i + 1, why))),
            Err(why) => unread = vec![(0..count, why)],
        }
        unread.sort_by_key(|(range, _)| range.start);
        let pages = unread.iter().flat_map(|(range, _)| range.clone()).map(|i| first + i as u64).collect();
        // What may pass comes first: as long as it is there nothing can be said of the others.
        let told = unread.iter().position(|(_, why)| !why.is_damage()).unwrap_or_default();
        if unread.is_empty() { Ok(()) } else { Err(Unread { pages, why: unread.swap_remove(told).1 }) }
    }

    /// The same, and what must not fail does not; what may only does after a while.
    fn fill_surely(
        &self,
        file: &MapFile,
        used: Use,
        first: u64,
        out: &mut [u8],
        asker: i32,
    ) -> io::Result<()> {
        match self.fill(file, first, out) {
            Ok(()) => Ok(()),
            Err(unread) if planted(Fault::AnswerErrors) => Err(fails(file, used, &unread)),
            Err(unread) if used == Use::Ram => self.hold(file, first, out, asker, &unread),
            Err(unread) => self.try_for_a_while(file, used, first, out, asker, unread),
        }
    }

    /// Answers when it can be read.
    fn hold(
        &self,
        file: &MapFile,
        first: u64,
        out: &mut [u8],
        asker: i32,
        unread: &Unread,
    ) -> io::Result<()> {
        // Such a read is one ahead, of which nobody hears: each page that is needed is asked for again by itself. So the good ones among
        // them need not wait. Should they come together again, they belong together, and an error would be heard.
        let (number, several) = (file.number(Use::Ram), out.len() > PAGE_SIZE);
        let is_ahead = |bad: &Unread| several && bad.why.is_damage() && self.is_news(number, &bad.pages);
        if is_ahead(unread) {
            return Err(os(libc::EIO));
        }
        // Others are not to wait with the one who asked.
        let _more = self.servers.one_more();
        let began = Instant::now();
        self.held.until(unread.held(file), &mut || {
            self.servers.fill_up();
            let Err(unread) = self.fill(file, first, out) else { return Ok(Ok(())) };
            if is_ahead(&unread) {
                return Ok(Err(os(libc::EIO)));
            }
            match Asker::of(asker) {
                // The kernel does not let him end before he has an answer. Whoever waits for the same page asks again.
                Asker::Killed => Ok(Err(os(libc::EINTR))),
                // It asks for somebody who cannot end while it waits, and goes on without what it has asked for: he asks again himself, if he
                // lives.
                Asker::Kernel if began.elapsed() >= KERNEL_PATIENCE => Ok(Err(os(libc::EIO))),
                Asker::Kernel | Asker::Other => Err(unread.held(file)),
            }
        })
    }

    /// Tries again for a while, since most of what is no damage passes; unless that was in vain just now, and nothing has changed.
    fn try_for_a_while(
        &self,
        file: &MapFile,
        used: Use,
        first: u64,
        out: &mut [u8],
        asker: i32,
        mut unread: Unread,
    ) -> io::Result<()> {
        let state = self.store.state();
        if !(unread.why.is_damage() && self.was_in_vain(state)) {
            let _more = self.servers.one_more();
            let began = Instant::now();
            while began.elapsed() < DISK_PATIENCE {
                if matches!(Asker::of(asker), Asker::Killed) {
                    return Err(os(libc::EINTR));
                }
                std::thread::sleep(AGAIN);
                self.servers.fill_up();
                match self.fill(file, first, out) {
                    Ok(()) => return Ok(()),
                    Err(again) => unread = again,
                }
            }
            if unread.why.is_damage() && state == self.store.state() {
                *self.in_vain.lock().unwrap_or_else(PoisonError::into_inner) =
                    state.map(|state| (state, Instant::now()));
            }
        }
        Err(fails(file, used, &unread))
    }

    /// True if somebody waited in vain for something else that is damaged, while the store was as it is now. Whoever reads a disk through
    /// waits once then, and not for each page.
    fn was_in_vain(&self, state: Option<u64>) -> bool {
        let in_vain = *self.in_vain.lock().unwrap_or_else(PoisonError::into_inner);
        in_vain.is_some_and(|(then, when)| state == Some(then) && when.elapsed() < IN_VAIN)
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

/// The error of a read that is given up.
fn fails(file: &MapFile, used: Use, unread: &Unread) -> io::Error {
    let page = unread.pages.first().copied().unwrap_or_default();
    if is_new(Saying::Fails, (file.number(used), page)) {
        tracing::error!(file = file.file_name(), page, why = %unread.why, "a read fails");
    }
    os(libc::EIO)
}

/// Who waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asker {
    /// A thread that has been killed, or is gone: whatever it is answered, it does not go on.
    Killed,
    /// A thread of the kernel's. KVM has pages fetched by such, so that the guest can do something else meanwhile, and QEMU cannot end
    /// before they have what they were sent for, though nobody has killed *them*.
    Kernel,
    Other,
}

impl Asker {
    fn of(thread: i32) -> Self {
        // Somebody whom we cannot see: from within a container the kernel's threads are such. QEMU is started beside us.
        if thread <= 0 {
            return Self::Kernel;
        }
        match std::fs::read_to_string(format!("/proc/{thread}/status")) {
            Ok(status) if is_kernels(&status) => Self::Kernel,
            Ok(status) if has_kill_pending(&status) => Self::Killed,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::Killed,
            _ => Self::Other,
        }
    }
}

/// `Kthread` is there from Linux 6.8 on. Before that: what has no memory, and is a child of `kthreadd`, or that itself. In a container
/// number 2 may be anybody, who has memory then.
fn is_kernels(status: &str) -> bool {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    match field("Kthread:") {
        Some(value) => value == "1",
        None => field("VmSize:").is_none() && [field("Pid:"), field("PPid:")].contains(&Some("2")),
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
        assert_eq!(Asker::of(i32::MAX), Asker::Killed);
        assert_eq!(Asker::of(i32::try_from(std::process::id()).unwrap()), Asker::Other);
    }

    #[test]
    fn the_kernels_threads_are_told_from_others() {
        assert_eq!(Asker::of(0), Asker::Kernel);
        // In a container number 2 may be somebody else, or nobody.
        let second = std::fs::read_to_string("/proc/2/status").unwrap_or_default();
        let kthreadd = second.starts_with("Name:\tkthreadd\n");
        assert_eq!(Asker::of(2) == Asker::Kernel, kthreadd);
        let without = |status: &str| {
            let lines = status.lines().filter(|line| !line.starts_with("Kthread:"));
            lines.collect::<Vec<_>>().join("\n")
        };
        assert_eq!(is_kernels(&without(&second)), kthreadd);
        let own = std::fs::read_to_string("/proc/self/status").unwrap();
        assert!(!is_kernels(&own) && !is_kernels(&without(&own)));
        assert!(is_kernels("Name:\tkworker/0:1\nPid:\t31\nPPid:\t2\nThreads:\t1\n"));
        assert!(!is_kernels("Name:\tqemu\nPid:\t31\nPPid:\t2\nVmSize:\t  100 kB\n"));
        assert!(!is_kernels("Name:\tqemu\nPid:\t31\nPPid:\t2\nKthread:\t0\n"));
    }
}
