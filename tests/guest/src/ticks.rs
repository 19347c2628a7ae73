//! Threads that do something so many times a second, and the counter that one of them drives.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// A thread that calls a function at a steady rate; dropping it stops the thread and waits for it.
pub(crate) struct Steady {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Steady {
    /// Calls `act(n)` about every `pause`, where `n` of all calls together come to `rate` a second.
    ///
    /// After a stall, such as a pause of the machine, what was missed is not made up for. The
    /// thread ends when `act` returns false.
    pub(crate) fn start(
        rate: u64,
        pause: Duration,
        mut act: impl FnMut(u64) -> bool + Send + 'static,
    ) -> Steady {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut last = Instant::now();
            let mut owed = 0.0;
            while !stopped.load(Ordering::Relaxed) {
                thread::sleep(pause);
                let now = Instant::now();
                let passed = now.duration_since(last).min(pause * 10);
                last = now;
                owed += passed.as_secs_f64() * rate as f64;
                let due = owed as u64;
                owed -= due as f64;
                if due > 0 && !act(due) {
                    break;
                }
            }
        });
        Steady { stop, thread: Some(thread) }
    }
}

impl Drop for Steady {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It ends by itself; a panic in it has been printed on the console.
            let _ = thread.join();
        }
    }
}

/// A number in memory that goes up by one about every millisecond.
pub(crate) struct Counter {
    value: Arc<AtomicU64>,
    started: Instant,
}

impl Counter {
    /// Starts counting at 0, for as long as the program runs.
    pub(crate) fn start() -> Counter {
        let value = Arc::new(AtomicU64::new(0));
        let counting = Arc::clone(&value);
        thread::spawn(move || {
            loop {
                thread::sleep(Duration::from_millis(1));
                counting.fetch_add(1, Ordering::Relaxed);
            }
        });
        Counter { value, started: Instant::now() }
    }

    /// Where it stands.
    pub(crate) fn value(&self) -> u64 {
        self.value.load(Ordering::Relaxed)
    }

    /// The number itself, to be read from another thread.
    pub(crate) fn shared(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.value)
    }

    /// How long it has been counting, by the guest's monotonic clock.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}
