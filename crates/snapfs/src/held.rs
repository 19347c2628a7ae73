//! Reads that are not answered, because what is asked for cannot be read rightly.
//!
//! A guest's memory is mapped from here: an error would end its QEMU, and invented bytes would be believed. So the one who asked waits
//! until the page can be read: from another copy, or mended by a repair. Meanwhile others are served as before, and the report says what
//! is waited for.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::MapFile;
use crate::log::{Saying, is_new};
use crate::nodes::Use;

/// How often it is tried again: at first, and after a while.
const EVERY: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(2)];
/// Pages named for one read at most.
pub(crate) const PAGES: usize = 32;
/// Longest report.
const LIMIT: usize = 4 << 20;

/// A read that waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldRead {
    /// What is read.
    pub file: MapFile,
    /// Numbers of the pages that cannot be read, some of them if they are many.
    pub pages: Vec<u64>,
    /// Why the first of them cannot.
    pub why: String,
}

/// The reads that wait, and the report on them.
#[derive(Debug)]
pub(crate) struct Held {
    reads: Mutex<Reads>,
}

#[derive(Debug)]
struct Reads {
    report: File,
    last: u64,
    all: BTreeMap<u64, HeldRead>,
}

impl Held {
    /// Reports to a file that is open for writing.
    pub(crate) fn new(report: File) -> Self {
        let held = Self { reads: Mutex::new(Reads { report, last: 0, all: BTreeMap::new() }) };
        // What a predecessor waited for is asked for again.
        held.change(|_| {});
        held
    }

    /// Tries until it succeeds. `bad` says what is waited for, and so does what `attempt` returns as long as it fails.
    pub(crate) fn until<T>(&self, mut bad: HeldRead, attempt: &mut dyn FnMut() -> Result<T, HeldRead>) -> T {
        let page = bad.pages.first().copied().unwrap_or_default();
        let said = is_new(Saying::Held, (bad.file.number(Use::Ram), page));
        if said {
            tracing::error!(file = bad.file.file_name(), pages = ?bad.pages, why = bad.why, "a read is held");
        }
        let mut number = 0;
        self.change(|reads| {
            reads.last += 1;
            number = reads.last;
            reads.all.insert(number, bad.clone());
        });
        let mut tried = 0;
        let done = loop {
            let [soon, later] = EVERY;
            std::thread::sleep(if tried < 25 { soon } else { later });
            tried += 1;
            match attempt() {
                Ok(done) => break done,
                Err(now) if now == bad => {}
                Err(now) => {
                    bad = now;
                    self.change(|reads| drop(reads.all.insert(number, bad.clone())));
                }
            }
        };
        if said {
            tracing::warn!(file = bad.file.file_name(), page, "a read that was held is answered");
        }
        self.change(|reads| drop(reads.all.remove(&number)));
        done
    }

    fn change(&self, change: impl FnOnce(&mut Reads)) {
        let mut reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut reads);
        let mut bytes =
            serde_json::to_vec(&reads.all.values().collect::<Vec<_>>()).unwrap_or_else(|_| b"[]".to_vec());
        bytes.push(b'\n');
        let written = reads.report.set_len(0).and_then(|()| reads.report.write_all_at(&bytes, 0));
        if let Err(error) = written
            && is_new(Saying::Told, (1, 0))
        {
            tracing::warn!(%error, "the report of what is held cannot be written");
        }
    }
}

/// What a report says; nothing if it cannot be read, or is being written just now.
pub fn read_report(report: &File) -> Vec<HeldRead> {
    let mut bytes = vec![0; LIMIT];
    for _ in 0..3 {
        let Ok(len) = report.read_at(&mut bytes, 0) else { return Vec::new() };
        match bytes.get(..len).filter(|bytes| bytes.last() == Some(&b'\n')) {
            Some(whole) => return serde_json::from_slice(whole).unwrap_or_default(),
            None if len == 0 => return Vec::new(),
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
    Vec::new()
}
