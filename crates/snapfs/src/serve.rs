//! Threads that answer the kernel.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread;
use std::time::Duration;

use fuse_backend_rs::api::filesystem::FileSystem;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::fault::{Fault, planted};
use crate::log::{Saying, is_new};

/// Bytes of the largest request: the kernel wants room for a write of a page, though there are none.
const REQUEST: usize = 64 << 10;
/// Bytes of the largest answer: what is read at once, and a header.
const ANSWER: usize = MAX_READ + (4 << 10);
/// Bytes that are read at once at most, as is said when mounting.
pub(crate) const MAX_READ: usize = 128 << 10;

/// How often the kernel's requests may fail to be read before somebody else is to try ...
const TRIES: u32 = 6;
/// ... and how long is waited in between, longer each time ...
const BETWEEN: Duration = Duration::from_millis(50);
/// ... up to this.
const PAUSE: Duration = Duration::from_secs(2);
/// How long whoever is alone waits for a request before he looks whether he still has to be.
const ALONE: Duration = Duration::from_secs(1);

/// The other processes that have the connection, as far as whoever serves has to know of them.
pub(crate) trait Others: Send + Sync + 'static {
    /// Sees to it that somebody stands by, if nothing else does. True if it wants to be called again before long.
    fn see_to(&self) -> bool;
    /// True if somebody stands by: then our end is not that of all.
    fn stand_by(&self) -> bool;
}

/// The threads that there are, and how many there should be.
#[derive(Default)]
pub(crate) struct Servers {
    wanted: AtomicUsize,
    there: AtomicUsize,
    spawn: OnceLock<Box<dyn Fn() -> bool + Send + Sync>>,
}

/// A thread more than otherwise, until dropped by the one for which it is.
pub(crate) struct OneMore(Option<Arc<Servers>>);

thread_local! {
    /// There is one more for this thread.
    static STOOD_IN_FOR: Cell<bool> = const { Cell::new(false) };
}

impl Servers {
    /// One thread more, for as long as the caller waits for something.
    pub(crate) fn one_more(self: &Arc<Self>) -> OneMore {
        if STOOD_IN_FOR.replace(true) {
            return OneMore(None);
        }
        self.wanted.fetch_add(1, Ordering::Relaxed);
        self.fill_up();
        OneMore(Some(Arc::clone(self)))
    }

    /// Starts the threads that are wanted and not there. Whoever waits for long calls it now and then: they may not be to be had just now.
    pub(crate) fn fill_up(&self) {
        let Some(spawn) = self.spawn.get() else { return };
        let wanted = self.wanted.load(Ordering::Relaxed);
        let more = |there: usize| (there < wanted).then_some(there + 1);
        while self.there.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok() {
            if !spawn() {
                self.there.fetch_sub(1, Ordering::Relaxed);
                return;
            }
        }
    }

    /// Whether this thread is one too many by now; then it is not counted any more.
    fn is_too_many(&self) -> bool {
        let wanted = self.wanted.load(Ordering::Relaxed);
        let less = |there: usize| (there > wanted).then(|| there - 1);
        self.there.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }
}

impl Drop for OneMore {
    fn drop(&mut self) {
        if let Some(servers) = &self.0 {
            STOOD_IN_FOR.set(false);
            servers.wanted.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// A connection to the kernel with its file system.
struct Connection<F: FileSystem + Sync> {
    fuse: Arc<OwnedFd>,
    server: Server<F>,
    servers: Arc<Servers>,
    others: Arc<dyn Others>,
}

/// Answers until the file system is unmounted and nobody has a file of it any more. `resend` asks the kernel for what a predecessor had
/// not answered.
///
/// # Errors
/// The kernel's requests cannot be read, though there may be some, and somebody stands by to try it.
pub(crate) fn serve<F: FileSystem + Send + Sync + 'static>(
    fuse: Arc<OwnedFd>,
    fs: F,
    servers: &Arc<Servers>,
    others: Arc<dyn Others>,
    resend: bool,
) -> io::Result<()> {
    let connection = Connection { fuse, server: Server::new(fs), servers: Arc::clone(servers), others };
    let connection = Arc::new(connection);
    if resend && !planted(Fault::NoResend) && !connection.ask_again()? {
        return Ok(());
    }
    let more: Weak<Connection<F>> = Arc::downgrade(&connection);
    let spawn = move || {
        let Some(connection) = more.upgrade() else { return false };
        // The first thread may wait for something.
        connection.others.see_to();
        let named = thread::Builder::new().name("answer".into());
        let answer = move || {
            if let Err(error) = connection.answer(false) {
                tracing::error!(%error, "whoever stands by is to try it");
                // The first thread may wait for something. To him who stands by it is a death like any other.
                std::process::exit(1);
            }
        };
        let spawned = named.spawn(answer);
        if let Err(error) = &spawned
            && is_new(Saying::Threads, (0, 0))
        {
            tracing::error!(%error, "no thread more to answer with");
        }
        spawned.is_ok()
    };
    let _ = servers.spawn.set(Box::new(spawn));
    let threads = thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 8));
    servers.wanted.store(threads, Ordering::Relaxed);
    servers.there.fetch_add(1, Ordering::Relaxed);
    // This one stays to the end.
    connection.answer(true)
}

impl<F: FileSystem + Sync> Connection<F> {
    /// Has the kernel send again what nobody has answered. False if there is nobody who could ask.
    fn ask_again(&self) -> io::Result<bool> {
        let mut failed = 0;
        loop {
            let mut room = vec![0; 4096];
            let writer = FuseDevWriter::<()>::new(self.fuse.as_raw_fd(), &mut room);
            let sent = writer
                .map_err(io::Error::other)
                .and_then(|writer| self.server.notify_resend(writer).map_err(io::Error::other));
            match sent {
                Ok(()) => return Ok(true),
                Err(_) if is_over(&self.fuse) => return Ok(false),
                Err(error) => self.has_failed(error, &mut failed, "the kernel does not send again")?,
            }
            self.others.see_to();
        }
    }

    /// Answers, the first thread to the end, others until they are too many.
    fn answer(&self, first: bool) -> io::Result<()> {
        let (mut request, mut answer) = (vec![0; REQUEST], vec![0; ANSWER]);
        let mut failed = 0;
        loop {
            // A thread that sees to it that somebody stands by comes before those that answer.
            if first && self.others.see_to() {
                if !has_something(&self.fuse, ALONE) {
                    continue;
                }
            } else if first || !self.servers.is_too_many() {
                self.servers.fill_up();
            } else {
                return Ok(());
            }
            match self.answer_one(&mut request, &mut answer) {
                Ok(true) => failed = 0,
                Ok(false) => return Ok(()),
                Err(error) => {
                    self.has_failed(error, &mut failed, "the kernel's requests cannot be read")?;
                }
            }
        }
    }

    /// Waits for a moment, so that it can be tried again; or has somebody else try it, if there is somebody.
    fn has_failed(&self, error: io::Error, failed: &mut u32, what: &str) -> io::Result<()> {
        *failed += 1;
        if is_new(Saying::Requests, (0, 0)) {
            tracing::error!(%error, "{what}");
        }
        if *failed >= TRIES && self.others.stand_by() {
            return Err(error);
        }
        thread::sleep(PAUSE.min(BETWEEN * *failed));
        Ok(())
    }

    /// False once there is nobody who could ask.
    fn answer_one(&self, request: &mut [u8], answer: &mut [u8]) -> io::Result<bool> {
        let len = match rustix::io::read(self.fuse.as_fd(), &mut *request) {
            Ok(len) => len,
            // Whoever asked has given up, or a signal came.
            Err(Errno::NOENT | Errno::INTR) => return Ok(true),
            // Somebody has made it one that does not wait.
            Err(Errno::AGAIN) => return Ok(has_something(&self.fuse, ALONE) || !is_over(&self.fuse)),
            Err(Errno::NODEV) => return Ok(false),
            // An abort has other words for it.
            Err(_) if is_over(&self.fuse) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let asked = Reader::<()>::from_fuse_buffer(FuseBuf::new(request.get_mut(..len).unwrap_or_default()));
        let answering = FuseDevWriter::<()>::new(self.fuse.as_raw_fd(), answer);
        if let (Ok(asked), Ok(answering)) = (asked, answering)
            && let Err(error) = self.server.handle_message(asked, Writer::FuseDev(answering), None, None)
        {
            // Whoever asked may be gone by now.
            tracing::debug!(?error, "an answer was not taken");
        }
        Ok(true)
    }
}

/// True if the file system is unmounted, and nobody has anything of it any more.
pub(crate) fn is_over(fuse: &OwnedFd) -> bool {
    events(fuse, Duration::ZERO).contains(PollFlags::ERR)
}

/// Waits until there is a request, or an end.
fn has_something(fuse: &OwnedFd, limit: Duration) -> bool {
    !events(fuse, limit).is_empty()
}

fn events(fuse: &OwnedFd, limit: Duration) -> PollFlags {
    let mut fds = [PollFd::new(fuse, PollFlags::IN)];
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
    if poll(&mut fds, Some(&limit)).is_err() {
        return PollFlags::empty();
    }
    fds.iter().fold(PollFlags::empty(), |all, fd| all | fd.revents())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::atomic::AtomicU32;
    use std::time::Instant;

    use super::*;

    struct Nothing;

    impl FileSystem for Nothing {
        type Inode = u64;
        type Handle = u64;
    }

    /// Somebody stands by from the so-manieth question on.
    #[derive(Default)]
    struct Late {
        from: u32,
        asked: AtomicU32,
        seen_to: AtomicU32,
    }

    impl Others for Late {
        fn see_to(&self) -> bool {
            self.seen_to.fetch_add(1, Ordering::Relaxed);
            false
        }

        fn stand_by(&self) -> bool {
            self.asked.fetch_add(1, Ordering::Relaxed) >= self.from
        }
    }

    #[test]
    fn what_cannot_be_read_is_no_end_and_is_left_to_others_if_there_are_any() {
        // Reading a folder fails with EISDIR, and writing to it as well.
        let folder = Arc::new(OwnedFd::from(File::open("/").unwrap()));
        for resend in [false, true] {
            let (others, began) = (Arc::new(Late { from: 2, ..Late::default() }), Instant::now());
            let servers: Arc<Servers> = Arc::default();
            // Others would end the test with themselves.
            let _ = servers.spawn.set(Box::new(|| false));
            let served = serve(Arc::clone(&folder), Nothing, &servers, others.clone(), resend);
            assert!(served.is_err());
            assert_eq!(others.asked.load(Ordering::Relaxed), 3, "not before there is somebody");
            assert!(others.seen_to.load(Ordering::Relaxed) >= TRIES, "and that is seen to meanwhile");
            assert!(began.elapsed() > BETWEEN * TRIES, "nor at once");
        }
    }

    #[test]
    fn there_are_as_many_threads_as_are_wanted_also_if_they_come_late() {
        let servers: Arc<Servers> = Arc::default();
        let (refused, made) = (Arc::new(AtomicU32::new(2)), Arc::new(AtomicU32::new(0)));
        let counts = Arc::clone(&made);
        let spawn = move || {
            let is_refused = refused.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
            is_refused.is_err() && counts.fetch_add(1, Ordering::Relaxed) < u32::MAX
        };
        let _ = servers.spawn.set(Box::new(spawn));
        servers.wanted.store(3, Ordering::Relaxed);
        servers.there.store(1, Ordering::Relaxed);
        servers.fill_up();
        let more = servers.one_more();
        let none = servers.one_more();
        assert_eq!((servers.wanted.load(Ordering::Relaxed), made.load(Ordering::Relaxed)), (4, 0));
        servers.fill_up();
        assert_eq!((servers.there.load(Ordering::Relaxed), made.load(Ordering::Relaxed)), (4, 3));
        assert!(!servers.is_too_many());
        drop(none);
        drop(more);
        assert!(servers.is_too_many() && !servers.is_too_many());
        drop(servers.one_more());
        assert_eq!(made.load(Ordering::Relaxed), 4);
    }
}
