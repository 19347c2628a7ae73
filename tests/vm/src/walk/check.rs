//! The checks after every step: does the guest say what it said, is the tree what it should be?

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::model::{Life, Power, Range};
use super::{Violation, Walk};
use crate::guest::Guest;

/// Undo points that a target keeps.
const UNDO_POINTS: usize = 5;

/// Writes the mark: a number at a fixed place of the disk, synced, over the one before.
///
/// The log alone cannot tell a disk that is *ahead* of memory: it only ever grows, by the same entries in the same places,
/// and its length lies in memory with the inode.
pub(super) fn write_mark(guest: &mut Guest, mark: u64) -> Result<(), Violation> {
    let command = format!("printf %08d {mark} | dd of=/data/mark conv=notrunc,fsync 2>&1");
    match guest.cmd(&command)? {
        (0, _) => Ok(()),
        (code, text) => Err(Violation::Wrong(format!("the mark could not be written: {code}, {text}"))),
    }
}

/// Reads the mark from the disk itself, not from the page cache.
fn read_mark(guest: &mut Guest) -> Result<u64, Violation> {
    let (_, text) = guest.cmd("echo 1 >/proc/sys/vm/drop_caches; cat /data/mark 2>/dev/null || echo 0")?;
    text.trim().parse().map_err(|_| Violation::Wrong(format!("the disk's mark is {text:?}")))
}

/// Puts other content into the last part of the file that is written to unsynced, and syncs that.
pub(super) fn rewrite_scratch(guest: &mut Guest, part: u64) -> Result<(), Violation> {
    let copy = "dd if=/data/known of=/data/scratch bs=1M count=4 seek=60 conv=notrunc,fsync";
    match guest.cmd(&format!("{copy} skip={part} 2>&1"))? {
        (0, _) => Ok(()),
        (code, text) => {
            Err(Violation::Wrong(format!("the scratch file could not be written: {code}, {text}")))
        }
    }
}

/// Compares what the page cache has of the file that is written to unsynced with what the disk has, here and there. Pages that
/// were written back before the snapshot and again after it differ when the disk is of a later instant than memory.
fn check_scratch(guest: &mut Guest) -> Result<(), Violation> {
    guest.disk_write(0)?;
    let command = "for at in 0 20 40 60; do \
         part() { dd if=/data/scratch bs=1M count=1 skip=$at \"$@\" 2>/dev/null | md5sum; }; \
         [ \"$(part)\" = \"$(part iflag=direct)\" ] || echo $at; done";
    match guest.cmd(command)? {
        (0, parts) if parts.is_empty() => Ok(()),
        (code, text) => Err(Violation::Wrong(format!(
            "memory and disk are of two instants: these parts of the scratch file are not what is cached of them: \
             {}, {code}",
            text.trim().replace('\n', " ")
        ))),
    }
}

impl Walk {
    /// All checks.
    pub fn check(&mut self) -> Result<(), Violation> {
        self.check_tree()?;
        match self.model.here.power {
            Power::Off => Ok(()),
            Power::Running => self.check_guest(),
            Power::Paused => {
                self.spinney.ok(&format!("resume {}", self.name))?;
                self.check_guest()?;
                self.spinney.ok(&format!("pause {}", self.name))?;
                Ok(())
            }
        }
    }

    /// A connection to the guest, which may still be booting.
    pub(super) fn guest(&self) -> Result<Guest, Violation> {
        let port = self.spinney.port(&self.name)?;
        let port = port.ok_or_else(|| Violation::Wrong("the machine should have a process".to_owned()))?;
        let mut guest = Guest::connect(&port, self.patience)?;
        guest.set_timeout(self.patience);
        Ok(guest)
    }

    /// Compares a guest that runs with the model, and takes over what time has changed.
    pub(super) fn check_guest(&mut self) -> Result<(), Violation> {
        let mut guest = self.guest()?;
        let wrong = |text: String| Err(Violation::Wrong(text));
        // It costs a second or two, and finds nothing in a guest that only ran on. First of all, while there is something in
        // the page cache.
        let disk_rate = self.model.here.life.as_ref().map_or(0, |life| life.disk_rate);
        if std::mem::take(&mut self.loaded) && disk_rate > 0 {
            check_scratch(&mut guest)?;
            guest.disk_write(disk_rate)?;
        }
        let nonce = guest.nonce()?;
        let since = Instant::now();
        let (counter, log, writer, hash) =
            (guest.counter()?, guest.log_check()?, guest.writer_check()?, guest.hash()?);
        let expected = self.model.now();
        if !log.ok {
            return wrong(format!("memory and disk are of two instants: {log:?}"));
        }
        let mark = read_mark(&mut guest)?;
        if mark != expected.mark {
            return wrong(format!(
                "memory and disk are of two instants: the disk's mark is {mark}, not {}",
                expected.mark
            ));
        }
        if !expected.log.allows(log.mem) {
            return wrong(format!("the log has {} entries, not {:?}", log.mem, expected.log));
        }
        if writer.bad > 0 {
            return wrong(format!("the writer's pages are of two instants: {writer:?}"));
        }
        let (writing, log_rate) = match &expected.life {
            None if !self.model.nonces.insert(nonce.clone()) => {
                return wrong(format!("a guest that booted has the nonce of another life: {nonce}"));
            }
            None => (false, 0),
            Some(life) if life.nonce != nonce => {
                return wrong(format!("another guest: its nonce is {nonce}, not {}", life.nonce));
            }
            Some(life) if life.hash != hash => {
                return wrong(format!("memory is not what it was: hash {hash:016x}, not {:016x}", life.hash));
            }
            Some(life) if !life.counter.allows(counter) => {
                return wrong(format!("the counter is {counter}, not in {:?}", life.counter));
            }
            Some(life) if writer.steps < life.steps || !life.writing && writer.steps != life.steps => {
                return wrong(format!("the writer has done {} steps, not {}", writer.steps, life.steps));
            }
            Some(life) => (life.writing, life.log_rate),
        };
        let counter = Range::exactly(counter);
        self.model.here.life =
            Some(Life { nonce, hash, counter, steps: writer.steps, writing, log_rate, disk_rate });
        self.model.here.log = Range::exactly(log.mem);
        self.model.since = since;
        Ok(())
    }

    /// Compares the tree with the model. Undo points that are one too many go by themselves.
    pub(super) fn check_tree(&mut self) -> Result<(), Violation> {
        let tree = self.spinney.ok(&format!("tree {}", self.name))?;
        let wrong = |text: String| Err(Violation::Wrong(text));
        let list = tree["snapshots"].as_array().cloned().unwrap_or_default();
        let has = |id: &str| list.iter().any(|s| s["id"] == id);
        for index in self.model.named(true) {
            let node = &self.model.nodes[index];
            let newer = self.model.named(true).into_iter().filter(|&i| i > index);
            let newer_points = newer.filter(|&i| self.model.nodes[i].undo_point).count();
            if has(&node.id) {
                continue;
            }
            if !node.undo_point || node.protected || newer_points < UNDO_POINTS {
                return wrong(format!("the tree lacks {}", node.name));
            }
            self.model.nodes[index].removed = true;
        }
        let named = self.model.named(true);
        if named.len() != list.len() {
            let names: Vec<_> = list.iter().map(|s| s["name"].to_string()).collect();
            return wrong(format!("the tree has {} snapshots, not {}: {names:?}", list.len(), named.len()));
        }
        let id = |index: Option<usize>| index.map_or(Value::Null, |i| self.model.nodes[i].id.as_str().into());
        for index in named {
            let node = &self.model.nodes[index];
            let Some(found) = list.iter().find(|s| s["id"] == node.id.as_str()) else { continue };
            let parent = id(self.model.visible(node.parent));
            let power = node.moment.power.word();
            let same = found["name"] == node.name.as_str()
                && found["note"] == node.note.as_str()
                && found["protected"] == node.protected;
            if !same || found["parent"] != parent || found["power"] != power {
                return wrong(format!("the tree should have, with the parent {parent}, {node:?}: {found}"));
            }
        }
        let here = id(self.model.visible(self.model.parent));
        if tree["here"] != here {
            return wrong(format!("here comes from {}, not from {here}", tree["here"]));
        }
        if tree["machine"]["name"] != self.name.as_str() {
            return wrong(format!("the machine's name should be {}: {}", self.name, tree["machine"]));
        }
        let power = &tree["machine"]["power"];
        if power != self.model.here.power.word() {
            return wrong(format!("the machine is {power}, not {}", self.model.here.power.word()));
        }
        Ok(())
    }

    /// Whether the counter of the guest at this port moves within `limit`, without a question to the daemon.
    pub fn ticks_within(&self, port: &Path, limit: Duration) -> Result<(), Violation> {
        let deadline = Instant::now() + limit;
        let mut guest = Guest::connect(port, limit)?;
        guest.set_timeout(limit);
        let first = guest.counter()?;
        while Instant::now() < deadline {
            if guest.counter()? > first {
                return Ok(());
            }
        }
        Err(Violation::Wrong(format!("the guest's counter stands still at {first}")))
    }
}
