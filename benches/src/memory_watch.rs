//! Watching a daemon's memory: what is its own, without the files that it has mapped.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How often it is looked at.
const EVERY: Duration = Duration::from_millis(100);

/// The largest memory of each daemon that was watched, in bytes.
#[derive(Debug, Default)]
pub(crate) struct Peaks(Mutex<Vec<u64>>);

impl Peaks {
    /// The peaks so far, in megabytes (10^6 bytes).
    pub(crate) fn megabytes(&self) -> Vec<f64> {
        self.lock().iter().map(|&bytes| bytes as f64 / 1e6).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks at a process until dropped.
#[derive(Debug)]
pub(crate) struct MemoryWatch {
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl MemoryWatch {
    /// Begins; the end adds the process's peak to `peaks`.
    pub(crate) fn start(pid: u32, peaks: Arc<Peaks>) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&done);
        let thread = thread::spawn(move || {
            let mut peak = 0;
            while !seen.load(Ordering::Relaxed) {
                peak = own_memory(pid).unwrap_or(0).max(peak);
                thread::sleep(EVERY);
            }
            peaks.lock().push(peak);
        });
        Self { done, thread: Some(thread) }
    }
}

impl Drop for MemoryWatch {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Resident bytes that are not of files: anonymous and shared memory.
fn own_memory(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    Some((field("RssAnon")? + field("RssShmem")?) << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_outlives_what_it_was_used_for() {
        let peaks = Arc::new(Peaks::default());
        let watch = MemoryWatch::start(std::process::id(), Arc::clone(&peaks));
        let block = std::hint::black_box(vec![1_u8; 50 << 20]);
        thread::sleep(3 * EVERY);
        drop(block);
        thread::sleep(2 * EVERY);
        drop(watch);
        assert!(matches!(peaks.megabytes().as_slice(), [peak] if *peak > 50.0), "{peaks:?}");
    }
}
