//! Running a helper program to its end, never longer than it may take, never with more output than it may give.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// More than any tool we call has to say; the rest is thrown away.
const OUTPUT_LIMIT: u64 = 4 << 20;

/// How often somebody who watches a program is asked whether it is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// What a finished program left.
#[derive(Debug)]
pub(crate) struct Output {
    /// Whether it exited with 0.
    pub(crate) success: bool,
    /// Its exit code; none if a signal ended it.
    pub(crate) code: Option<i32>,
    /// Standard output.
    pub(crate) stdout: String,
    /// Standard error.
    pub(crate) stderr: String,
}

/// Why a program could not be run to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ToolError {
    /// It could not be started.
    #[error("cannot run {program}")]
    Spawn {
        /// The program.
        program: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It was still running at the deadline, and was killed.
    #[error("{program} did not end within {seconds} s and was killed")]
    TimedOut {
        /// The program.
        program: String,
        /// The limit.
        seconds: u64,
    },
}

/// Runs `command` without input, at most for `limit`.
pub(crate) fn run(mut command: Command, limit: Duration) -> Result<Output, ToolError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let spawn_error = |source| ToolError::Spawn { program: program.clone(), source };
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(spawn_error)?;
    let stdout = child.stdout.take().map(collect);
    let stderr = child.stderr.take().map(collect);
    let deadline = Instant::now() + limit;
    let mut nap = Duration::from_micros(500);
    let status = loop {
        if let Some(status) = child.try_wait().map_err(spawn_error)? {
            break status;
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            return Err(ToolError::TimedOut { program, seconds: limit.as_secs() });
        }
        thread::sleep(nap);
        nap = (nap * 2).min(Duration::from_millis(10));
    };
    let text =
        |handle: Option<thread::JoinHandle<String>>| handle.and_then(|h| h.join().ok()).unwrap_or_default();
    Ok(Output { success: status.success(), code: status.code(), stdout: text(stdout), stderr: text(stderr) })
}

/// Runs `command` without input for as long as `go_on` wants it; that gets what the program wrote to its standard output since it was last
/// asked. None if it was not wanted any more, and was killed.
pub(crate) fn run_watched(
    mut command: Command,
    go_on: &mut dyn FnMut(&[u8]) -> bool,
) -> Result<Option<Output>, ToolError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let spawn_error = |source| ToolError::Spawn { program: program.clone(), source };
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(spawn_error)?;
    let stderr = child.stderr.take().map(collect);
    let (said, news) = channel();
    let stdout = child.stdout.take();
    let reader = thread::spawn(move || {
        let mut bytes = [0; 4096];
        let mut stdout = stdout.into_iter();
        let Some(mut stdout) = stdout.next() else { return };
        while let Ok(read @ 1..) = stdout.read(&mut bytes) {
            let _ = said.send(bytes.get(..read).unwrap_or_default().to_vec());
        }
    });
    let status = loop {
        let bytes = match news.recv_timeout(LOOK_EVERY) {
            Ok(bytes) => bytes,
            Err(RecvTimeoutError::Timeout) => Vec::new(),
            Err(RecvTimeoutError::Disconnected) => break Some(child.wait().map_err(spawn_error)?),
        };
        if !go_on(&bytes) {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
    };
    let _ = reader.join();
    let stderr = stderr.and_then(|handle| handle.join().ok()).unwrap_or_default();
    Ok(status.map(|status| Output {
        success: status.success(),
        code: status.code(),
        stdout: String::new(),
        stderr,
    }))
}

fn collect(mut from: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.by_ref().take(OUTPUT_LIMIT).read_to_end(&mut bytes);
        let _ = std::io::copy(&mut from, &mut std::io::sink());
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_is_ended() {
        let mut sleep = Command::new("sleep");
        sleep.arg("60");
        let error = run(sleep, Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, ToolError::TimedOut { .. }), "{error}");
    }

    #[test]
    fn a_program_that_is_watched_tells_how_far_it_is_and_can_be_ended() {
        let sh = |script: &str| {
            let mut sh = Command::new("sh");
            sh.args(["-c", script]);
            sh
        };
        let mut heard = Vec::new();
        let mut hear = |bytes: &[u8]| {
            heard.extend_from_slice(bytes);
            true
        };
        let output = run_watched(sh("echo a; sleep 0.2; echo b; echo e >&2; exit 3"), &mut hear).unwrap();
        assert_eq!(output.map(|output| (output.code, output.stderr)), Some((Some(3), "e\n".to_owned())));
        assert_eq!(heard, b"a\nb\n");
        let began = Instant::now();
        assert!(run_watched(sh("exec sleep 60"), &mut |_| false).unwrap().is_none());
        assert!(began.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn both_outputs_are_kept() {
        let mut sh = Command::new("sh");
        sh.args(["-c", "echo out; echo err >&2; exit 3"]);
        let output = run(sh, Duration::from_secs(10)).unwrap();
        assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("out\n", "err\n"));
        assert_eq!((output.success, output.code), (false, Some(3)));
    }
}
