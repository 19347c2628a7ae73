//! Starting the daemon when it is not there, as gpg and adb do.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use snapshots::Code;

use super::Client;
use crate::{Problem, log, socket};

/// How long a daemon may take until it answers, while its process lives: it may have much to recover.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often we knock.
const KNOCK_EVERY: Duration = Duration::from_millis(10);
/// Exit code of a daemon that found the state folder taken.
const REFUSED: i32 = 4;
/// How long we wait for another daemon to let go of the folder; one that ends takes up to ten seconds.
const LOCK_PATIENCE: Duration = Duration::from_secs(15);
/// How often we try again meanwhile.
const RETRY_EVERY: Duration = Duration::from_millis(200);
/// Lines of the log shown when it does not start.
const LINES: usize = 8;

/// Starts the daemon and waits until it answers. Of several that try at once one starts it, and the others connect.
pub(super) fn start(state: &Path, executable: &Path) -> Result<Client, Problem> {
    socket::make_folder(state)?;
    let _lock = lock(state).map_err(|error| refused(&error, cannot(state)))?;
    if let Some(client) = Client::existing(state)? {
        return Ok(Client { notes: Vec::new(), ..client });
    }
    let written = std::fs::metadata(log::path(state)).map_or(0, |metadata| metadata.len());
    let began = Instant::now();
    let mut child = spawn(state, executable).map_err(|error| refused(&error, cannot(state)))?;
    loop {
        if let Some(client) = Client::existing(state)? {
            return Ok(client);
        }
        match child.try_wait() {
            // A daemon that is ending still has the folder, or somebody started one by hand.
            Ok(Some(status)) if status.code() == Some(REFUSED) && began.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(RETRY_EVERY);
                child = spawn(state, executable).map_err(|error| refused(&error, cannot(state)))?;
            }
            Ok(Some(status)) => return Err(died(state, status, written)),
            _ if began.elapsed() >= PATIENCE => {
                return Err(cannot(state).hint(format!(
                    "process {} is still at it; daemon.log in that folder says what it does",
                    child.id()
                )));
            }
            _ => std::thread::sleep(KNOCK_EVERY),
        }
    }
}

/// Keeps two clients from starting two daemons; released when the file is closed.
fn lock(state: &Path) -> io::Result<File> {
    let path = state.join("start.lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

fn spawn(state: &Path, executable: &Path) -> io::Result<Child> {
    let log = log::open(state)?;
    Command::new(executable)
        .arg("--state")
        .arg(state)
        .args(["serve", "--detached"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .current_dir("/")
        .spawn()
}

fn cannot(state: &Path) -> Problem {
    Problem::new(Code::Failed, format!("cannot start the daemon for {}", state.display()))
}

/// The class that the system's reason stands for.
fn refused(error: &io::Error, problem: Problem) -> Problem {
    Problem::new(socket::class(error), problem.detail).because(error)
}

fn died(state: &Path, status: ExitStatus, written: u64) -> Problem {
    let mut problem = cannot(state)
        .hint("`spinney serve` starts it in the foreground; `spinney doctor` looks at this host");
    // It says by its exit code what is wrong, and so do we.
    let code = match status.code() {
        Some(5) => Code::Precondition,
        Some(6) => Code::Damaged,
        Some(7) => Code::NoSpace,
        Some(8) => Code::NotPermitted,
        _ => Code::Failed,
    };
    problem = Problem { hint: problem.hint, ..Problem::new(code, problem.detail) };
    problem.cause.push(format!("it ended with {status}; the end of its log:"));
    problem.cause.extend(log::tail(state, written, LINES));
    problem
}
