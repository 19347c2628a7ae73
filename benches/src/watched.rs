//! A command that brings a machine to run, seen from outside: when did its CPUs run, and when did its guest answer?
//!
//! Both are counted from before the command was started. That the CPUs run is QEMU's own time stamp of RESUME, on a monitor that nobody
//! else uses; the guest's answer is the first one to a client that tries every few milliseconds.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use qemu::qmp::Qmp;
use serde_json::{Value, json};
use vm_tests::guest::Guest;

use crate::error::{Error, Result};
use crate::machine::{MONITOR, SOON, monitor};
use crate::spinney::{Done, Spinney};

/// Between two looks for a new process.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// What came to run.
pub(crate) struct Watched {
    /// What the command said, and how long it took to its end.
    pub(crate) done: Done,
    /// The folder of its QEMU's sockets.
    pub(crate) run: PathBuf,
    /// From the command's start until its CPUs ran.
    pub(crate) running: Duration,
    /// From the command's start until its guest answered.
    pub(crate) answered: Duration,
    /// Its guest.
    pub(crate) guest: Guest,
}

/// Runs a command that brings one machine to run in a new process.
pub(crate) fn run(spinney: &Spinney<'_>, args: &[&str]) -> Result<Watched> {
    let before = spinney.run_folders();
    let failed = AtomicBool::new(false);
    thread::scope(|scope| {
        let watch = scope.spawn(|| appear(spinney, &before, &failed));
        let began = SystemTime::now();
        let done = spinney.run(args);
        failed.store(done.is_err(), Ordering::Relaxed);
        let appeared = watch.join().map_err(|_| Error::Lacks("watcher of the new guest"))?;
        let done = done?;
        let Appeared { run, resumed, guest, answered } = appeared?;
        let since = |then: SystemTime| then.duration_since(began).map_err(|_| Error::Lacks("steady clock"));
        Ok(Watched { done, run, running: since(resumed)?, answered: since(answered)?, guest })
    })
}

struct Appeared {
    run: PathBuf,
    resumed: SystemTime,
    guest: Guest,
    answered: SystemTime,
}

/// Waits for a new run folder, for its guest's CPUs to run, and for the guest's first answer.
fn appear(spinney: &Spinney<'_>, before: &[PathBuf], failed: &AtomicBool) -> Result<Appeared> {
    let deadline = Instant::now() + SOON;
    let run = loop {
        let folders = spinney.run_folders();
        if let Some(new) = folders.into_iter().find(|run| !before.contains(run) && run.join(MONITOR).exists())
        {
            break new;
        }
        if Instant::now() >= deadline || failed.load(Ordering::Relaxed) {
            return Err(Error::Lacks("new process"));
        }
        thread::sleep(LOOK_EVERY);
    };
    let resumed = resumed(&monitor(&run)?)?;
    let guest = Guest::connect(&run.join("port"), SOON)?;
    Ok(Appeared { run, resumed, guest, answered: SystemTime::now() })
}

/// Waits until the CPUs run, and says since when.
pub(crate) fn resumed(monitor: &Qmp) -> Result<SystemTime> {
    let is_resume = |event: &qemu::qmp::Event| event.name == "RESUME";
    let status = monitor.execute("query-status", json!({}))?;
    if status.get("status").and_then(Value::as_str) == Some("running")
        && !monitor.events_after(0).iter().any(is_resume)
    {
        // Whoever came too late for the event knows it no better than this.
        return Ok(SystemTime::now());
    }
    let event = monitor.wait_event(0, SOON, is_resume)?;
    Ok(SystemTime::UNIX_EPOCH + Duration::from_micros(event.micros))
}
