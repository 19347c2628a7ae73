//! What one process leaves to another: a word and descriptors, over a socket pair whose one end is the other's standard input. Among the
//! descriptors is a file with the files that the kernel knows, a JSON object a line.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::{Deserialize, Serialize};

use crate::MapFile;
use crate::nodes::Use;

/// Longest word: some paths.
const WORD: usize = 64 << 10;
/// How many descriptors there are.
const COUNT: usize = 6;
/// Says that nobody has to take over.
const OVER: &[u8] = b"over\n";

/// The descriptors of a view.
#[derive(Debug)]
pub(crate) struct Descriptors {
    /// The connection to the kernel. Never cloned: what had been asked through a clone would be given up with it.
    pub(crate) fuse: Arc<OwnedFd>,
    /// Folder of the store's packs.
    pub(crate) packs: OwnedFd,
    /// Folder of the store's index.
    pub(crate) index: OwnedFd,
    /// What is listed, for reading.
    pub(crate) list: OwnedFd,
    /// The report of what is held, for writing.
    pub(crate) report: OwnedFd,
    /// Which files the kernel knows, for reading and adding.
    pub(crate) known: OwnedFd,
}

/// The word.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Start {
    /// Folder of the page store.
    pub(crate) store: PathBuf,
    /// The view's own folder.
    pub(crate) folder: PathBuf,
    /// Answer at once; else stand by.
    pub(crate) serve: bool,
    /// How many have died before, one soon after the other.
    pub(crate) deaths: u32,
}

/// Sends word and descriptors. They are the other's from now on, even if he has yet to be born and we die before.
pub(crate) fn send_start(socket: &UnixStream, start: &Start, descriptors: &Descriptors) -> io::Result<()> {
    let mut line = serde_json::to_vec(start)?;
    line.push(b'\n');
    let Descriptors { fuse, packs, index, list, report, known } = descriptors;
    let fds = [&**fuse, packs, index, list, report, known].map(AsFd::as_fd);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(COUNT))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for the descriptors"));
    }
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(&line)], &mut control, SendFlags::NOSIGNAL)?;
    let mut socket = socket;
    socket.write_all(line.get(sent..).unwrap_or_default())
}

/// Says that nobody has to take over.
pub(crate) fn send_over(mut socket: &UnixStream) -> io::Result<()> {
    socket.write_all(OVER)
}

/// What was left to us.
#[derive(Debug)]
pub(crate) struct Inherited {
    pub(crate) start: Start,
    pub(crate) descriptors: Descriptors,
    socket: UnixStream,
}

impl Inherited {
    /// Receives it.
    pub(crate) fn receive(socket: UnixStream) -> io::Result<Self> {
        let mut bytes = vec![0; WORD];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(COUNT))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message = rustix::net::recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let mut fds: Vec<OwnedFd> = Vec::new();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = part {
                fds.extend(received);
            }
        }
        let none = || io::Error::other("not all descriptors came");
        let [fuse, packs, index, list, report, known] =
            <[OwnedFd; COUNT]>::try_from(fds).map_err(|_| none())?;
        // It is sent in one go, before anything else.
        let word = bytes.get(..message.bytes).and_then(|bytes| bytes.split(|byte| *byte == b'\n').next());
        let start = serde_json::from_slice(word.unwrap_or_default())?;
        let fuse = Arc::new(fuse);
        Ok(Self { start, descriptors: Descriptors { fuse, packs, index, list, report, known }, socket })
    }

    /// Waits until whoever serves is gone. False if nobody has to take over.
    pub(crate) fn wait(&mut self) -> bool {
        let mut words = Vec::new();
        // An error is as good as an end: the other one is not there.
        let _ = self.socket.read_to_end(&mut words);
        words != OVER
    }
}

/// What was told the kernel, written down before by whoever serves, for whoever comes next.
#[derive(Debug)]
pub(crate) struct Known(File);

/// A line of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Told {
    /// There is this file.
    File(MapFile, Use),
    /// This page of the file with this number could not be read together with others.
    Bad(u64, u64),
}

impl Known {
    /// Goes on with the file that was left to us. Returns what it has.
    pub(crate) fn read(file: File) -> io::Result<(Self, Vec<Told>)> {
        let mut bytes = vec![0; usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut bytes, 0)?;
        // A line that was cut was of a file that the kernel was not told of.
        let lines = bytes.split(|byte| *byte == b'\n');
        let known = lines.filter_map(|line| serde_json::from_slice(line).ok()).collect();
        Ok((Self(file), known))
    }

    /// Writes something down.
    pub(crate) fn add(&self, told: Told) -> io::Result<()> {
        // A line that was cut ends here.
        let mut line = b"\n".to_vec();
        serde_json::to_writer(&mut line, &told)?;
        line.push(b'\n');
        (&self.0).write_all(&line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pages::{MapRoot, PageHash};

    fn descriptors() -> Descriptors {
        let file = || OwnedFd::from(File::open("/dev/null").unwrap());
        Descriptors {
            fuse: Arc::new(file()),
            packs: file(),
            index: file(),
            list: file(),
            report: file(),
            known: file(),
        }
    }

    #[test]
    fn what_is_sent_is_received_also_after_the_senders_death() {
        let start = Start { store: "/a b".into(), folder: "/".into(), serve: true, deaths: 3 };
        let (ours, theirs) = UnixStream::pair().unwrap();
        send_start(&ours, &start, &descriptors()).unwrap();
        drop(ours);
        let mut inherited = Inherited::receive(theirs).unwrap();
        assert_eq!((&inherited.start.store, inherited.start.deaths), (&start.store, 3));
        assert!(inherited.wait(), "he is gone without a word");
        let (ours, theirs) = UnixStream::pair().unwrap();
        send_start(&ours, &start, &descriptors()).unwrap();
        send_over(&ours).unwrap();
        let mut inherited = Inherited::receive(theirs).unwrap();
        drop(ours);
        assert!(!inherited.wait());
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(ours);
        assert!(Inherited::receive(theirs).is_err());
        let (ours, theirs) = UnixStream::pair().unwrap();
        (&ours).write_all(b"{}\n").unwrap();
        assert!(Inherited::receive(theirs).is_err());
    }

    #[test]
    fn what_the_kernel_knows_is_written_down_line_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("known");
        let open = || File::options().create(true).read(true).append(true).open(&path).unwrap();
        let file = |n| MapFile { root: MapRoot { node: PageHash([n; 32]), pages: 1 }, bytes: 4096 };
        let (known, none) = Known::read(open()).unwrap();
        assert!(none.is_empty());
        known.add(Told::File(file(1), Use::Ram)).unwrap();
        known.add(Told::Bad(3, 4)).unwrap();
        known.add(Told::File(file(2), Use::Disk)).unwrap();
        let len = path.metadata().unwrap().len();
        open().set_len(len - 5).unwrap();
        let (known, found) = Known::read(open()).unwrap();
        assert_eq!(found, [Told::File(file(1), Use::Ram), Told::Bad(3, 4)]);
        let later = Told::File(file(3), Use::Shown);
        known.add(later).unwrap();
        assert_eq!(Known::read(open()).unwrap().1, [&found[..], &[later]].concat());
    }
}
