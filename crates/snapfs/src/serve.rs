//! Threads that answer the kernel.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread;

use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};

use crate::fault::{Fault, planted};
use crate::fs::SnapFs;

/// Bytes of the largest request: the kernel wants room for a write of a page, though there are none.
const REQUEST: usize = 64 << 10;
/// Bytes of the largest answer: what is read at once, and a header.
const ANSWER: usize = MAX_READ + (4 << 10);
/// Bytes that are read at once at most, as is said when mounting.
pub(crate) const MAX_READ: usize = 128 << 10;

/// The threads that there are, and how many there should be.
#[derive(Default)]
pub(crate) struct Servers {
    wanted: AtomicUsize,
    there: AtomicUsize,
    spawn: std::sync::OnceLock<Box<dyn Fn() + Send + Sync>>,
}

/// A thread more than otherwise, until dropped.
pub(crate) struct OneMore<'a>(&'a Servers);

impl Servers {
    /// One thread more, for as long as the caller waits for something.
    pub(crate) fn one_more(&self) -> OneMore<'_> {
        self.wanted.fetch_add(1, Ordering::Relaxed);
        if let Some(spawn) = self.spawn.get() {
            spawn();
        }
        OneMore(self)
    }

    /// Whether this thread is one too many by now; then it is not counted any more.
    fn is_too_many(&self) -> bool {
        let wanted = self.wanted.load(Ordering::Relaxed);
        let less = |there: usize| (there > wanted).then(|| there - 1);
        self.there.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }
}

impl Drop for OneMore<'_> {
    fn drop(&mut self) {
        self.0.wanted.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection to the kernel with its file system.
struct Connection {
    fuse: OwnedFd,
    server: Server<SnapFs>,
    servers: Arc<Servers>,
}

/// Answers until the file system is unmounted and nobody has a file of it any more. `resend` asks the kernel for what a predecessor had
/// not answered.
pub(crate) fn serve(fuse: OwnedFd, fs: SnapFs, servers: &Arc<Servers>, resend: bool) -> io::Result<()> {
    let connection = Arc::new(Connection { fuse, server: Server::new(fs), servers: Arc::clone(servers) });
    if resend && !planted(Fault::NoResend) {
        let mut room = vec![0; 4096];
        let writer = FuseDevWriter::<()>::new(connection.fuse.as_raw_fd(), &mut room);
        let sent = writer
            .map_err(io::Error::other)
            .and_then(|writer| connection.server.notify_resend(writer).map_err(io::Error::other));
        sent.inspect_err(|error| tracing::error!(%error, "the kernel does not send again"))?;
    }
    let more: Weak<Connection> = Arc::downgrade(&connection);
    let spawn = move || {
        let Some(connection) = more.upgrade() else { return };
        connection.servers.there.fetch_add(1, Ordering::Relaxed);
        let named = thread::Builder::new().name("answer".into());
        if let Err(error) = named.spawn(move || connection.answer()) {
            tracing::error!(%error, "no thread more to answer with");
        }
    };
    let _ = servers.spawn.set(Box::new(spawn));
    let threads = thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 8));
    servers.wanted.store(threads, Ordering::Relaxed);
    servers.there.fetch_add(1, Ordering::Relaxed);
    (1..threads).for_each(|_| {
        if let Some(spawn) = servers.spawn.get() {
            spawn();
        }
    });
    // This one stays to the end.
    connection.answer_to_the_end();
    Ok(())
}

impl Connection {
    fn answer(&self) {
        let (mut request, mut answer) = (vec![0; REQUEST], vec![0; ANSWER]);
        while !self.servers.is_too_many() && self.answer_one(&mut request, &mut answer) {}
    }

    fn answer_to_the_end(&self) {
        let (mut request, mut answer) = (vec![0; REQUEST], vec![0; ANSWER]);
        while self.answer_one(&mut request, &mut answer) {}
    }

    /// False once there is nobody who could ask.
    fn answer_one(&self, request: &mut [u8], answer: &mut [u8]) -> bool {
        use rustix::io::Errno;
        let len = match rustix::io::read(self.fuse.as_fd(), &mut *request) {
            Ok(len) => len,
            // Whoever asked has given up, or a signal came.
            Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => return true,
            Err(Errno::NODEV) => return false,
            Err(error) => {
                tracing::error!(%error, "the kernel's requests cannot be read");
                return false;
            }
        };
        let asked = Reader::<()>::from_fuse_buffer(FuseBuf::new(request.get_mut(..len).unwrap_or_default()));
        let answering = FuseDevWriter::<()>::new(self.fuse.as_raw_fd(), answer);
        if let (Ok(asked), Ok(answering)) = (asked, answering)
            && let Err(error) = self.server.handle_message(asked, Writer::FuseDev(answering), None, None)
        {
            // Whoever asked may be gone by now.
            tracing::debug!(?error, "an answer was not taken");
        }
        true
    }
}
