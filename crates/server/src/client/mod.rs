//! The client: blocking HTTP over the daemon's Unix socket. Every failure is a [`Problem`], the daemon's as ours.

mod operation;
mod start;

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use reqwest::blocking::{RequestBuilder, Response};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use snapshots::Code;

use crate::{Problem, socket};

pub use operation::Until;
pub use reqwest::Method;

/// Longest time for an answer that needs no waiting.
const PATIENCE: Duration = Duration::from_secs(120);
/// Longest time from the request to end until the process is gone: twice what the daemon gives to what is under way.
const END_PATIENCE: Duration = Duration::from_secs(20);
/// What must not stand in a path segment as it is.
const SEGMENT: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'/')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'[')
    .add(b'\\')
    .add(b']')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'|')
    .add(b'}')
    .add(b'&')
    .add(b'+')
    .add(b'=')
    .add(b',');

/// A connection to the daemon of one state folder.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::blocking::Client,
    state: PathBuf,
    notes: Vec<String>,
}

impl Client {
    /// Connects to the daemon, and starts it with `executable` if it is not there.
    ///
    /// # Errors
    /// No daemon answers and none can be started, or it is of another version.
    pub fn start(state: &Path, executable: &Path) -> Result<Self, Problem> {
        if let Some(client) = Self::existing(state)? {
            return Ok(Self { notes: Vec::new(), ..client });
        }
        start::start(state, executable)
    }

    /// Connects to the daemon if it is there.
    ///
    /// # Errors
    /// It answers nonsense or is of another version.
    pub fn existing(state: &Path) -> Result<Option<Self>, Problem> {
        let mut client = Self::new(state)?;
        let version = match client.version() {
            Ok(version) => version,
            Err(Unanswered::Nobody) => return Ok(None),
            Err(Unanswered::Problem(problem)) => return Err(problem),
        };
        if version.version != crate::VERSION {
            return Err(Problem::new(
                Code::Refused,
                format!("the daemon is version {}, this is {}", version.version, crate::VERSION),
            )
            .hint("`spinney serve --stop` ends it, the next command starts the new one; machines run on"));
        }
        client.notes = version.notes;
        Ok(Some(client))
    }

    /// Asks whatever daemon is there, of any version, to end, and waits until its process is gone and has let go of the files.
    ///
    /// # Errors
    /// It refuses because it is busy, answers nonsense, or does not end. None there is fine: false comes back.
    pub fn shutdown(state: &Path) -> Result<bool, Problem> {
        let client = Self::new(state)?;
        let daemon = match client.version() {
            Ok(daemon) => daemon,
            Err(Unanswered::Nobody) => return Ok(false),
            Err(Unanswered::Problem(problem)) => return Err(problem),
        };
        // While it answers, the number is its own. One that runs in this process would be waited for in vain.
        let other = daemon.pid.filter(|pid| i32::try_from(std::process::id()) != Ok(*pid));
        let process = other.and_then(Pid::from_raw).map(|pid| pidfd_open(pid, PidfdFlags::empty()));
        client.send(client.request(Method::POST, "/v1/shutdown").timeout(PATIENCE))?;
        match process {
            Some(Ok(process)) if !ends(&process, END_PATIENCE) => {
                let words = format!("the daemon of {} was asked to end and is still there", state.display());
                Err(Problem::new(Code::Failed, words).hint("daemon.log in that folder says what it does"))
            }
            // Without a number, or gone already.
            _ => Ok(true),
        }
    }

    /// What the daemon's start found and put in order, if it was we who started it: others have been told.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// State folder of the daemon.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Reads.
    ///
    /// # Errors
    /// The daemon's problem, or no answer.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Problem> {
        self.decode(self.send(self.request(Method::GET, path).timeout(PATIENCE))?)
    }

    /// Reads with a query.
    ///
    /// # Errors
    /// The daemon's problem, or no answer.
    pub fn get_with<T: DeserializeOwned>(&self, path: &str, query: &[(&str, &str)]) -> Result<T, Problem> {
        self.get(&with_query(path, query))
    }

    /// Asks for a change or its plan: `method` is POST, PATCH or DELETE. Sent once, under a key of its own.
    ///
    /// # Errors
    /// The daemon's problem, or no answer.
    pub fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Problem> {
        let mut request = self.request(method, path).timeout(PATIENCE).header("idempotency-key", key());
        if let Some(body) = body {
            request = request.json(body);
        }
        self.decode(self.send(request)?)
    }

    fn new(state: &Path) -> Result<Self, Problem> {
        let path = socket::path(state)?;
        let http = reqwest::blocking::Client::builder()
            .unix_socket(path)
            .timeout(None)
            .build()
            .map_err(|error| Problem::new(Code::Failed, "cannot make an HTTP client").because(&error))?;
        Ok(Self { http, state: state.to_owned(), notes: Vec::new() })
    }

    /// The first words with a daemon.
    fn version(&self) -> Result<Greeting, Unanswered> {
        let sent = self.request(Method::GET, "/v1/version").timeout(Duration::from_secs(10)).send();
        match sent {
            Ok(response) => self.decode(response).map_err(Unanswered::Problem),
            Err(error) if error.is_timeout() => Err(Unanswered::Problem(self.silent(&error))),
            // Nobody listens, or whoever did dies at this moment.
            Err(_) => Err(Unanswered::Nobody),
        }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        // The host is not looked at: the connection is to the socket.
        self.http.request(method, format!("http://spinney{path}"))
    }

    fn send(&self, request: RequestBuilder) -> Result<Response, Problem> {
        let response = request.send().map_err(|error| self.silent(&error))?;
        if response.status().is_success() { Ok(response) } else { Err(problem_of(response)) }
    }

    fn decode<T: DeserializeOwned>(&self, response: Response) -> Result<T, Problem> {
        response.json().map_err(|error| match cause::<serde_json::Error>(&error) {
            Some(_) => Problem::new(Code::Failed, "the daemon's answer makes no sense").because(&error),
            // It was cut off.
            None => self.silent(&error),
        })
    }

    /// No answer came. What HTTP calls this is nothing that people can use.
    fn silent(&self, error: &reqwest::Error) -> Problem {
        let state = self.state.display();
        if error.is_timeout() {
            let problem = Problem::new(Code::Failed, format!("the daemon of {state} does not answer"));
            return problem.hint(
                "daemon.log in that folder says what it does; machines run on, whatever becomes of it",
            );
        }
        let mut problem =
            Problem::new(Code::Failed, format!("the daemon of {state} ended before it could answer"));
        problem.cause.extend(io_cause(error));
        problem.hint(
            "try again: that starts it anew, and what was under way is finished or rolled back (`spinney op log`); machines run \
             on; daemon.log in that folder may say why",
        )
    }
}

/// Waits for the end of a process; true if it has ended.
fn ends(process: &OwnedFd, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    loop {
        let left = Timespec::try_from(until.saturating_duration_since(Instant::now()));
        match poll(&mut [PollFd::new(process, PollFlags::IN)], left.ok().as_ref()) {
            Ok(ready) => return ready > 0,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// The system's words, if they say more than that the connection is gone.
fn io_cause(error: &reqwest::Error) -> Option<String> {
    let io = cause::<std::io::Error>(error)?;
    let gone = matches!(
        io.kind(),
        ErrorKind::ConnectionReset
            | ErrorKind::ConnectionRefused
            | ErrorKind::BrokenPipe
            | ErrorKind::NotFound
            | ErrorKind::UnexpectedEof
    );
    (!gone).then(|| io.to_string())
}

/// The first cause of this type.
fn cause<T: std::error::Error + 'static>(error: &reqwest::Error) -> Option<&T> {
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        if let Some(found) = cause.downcast_ref::<T>() {
            return Some(found);
        }
        next = cause.source();
    }
    None
}

/// What a client has to know of a daemon of any version, and no more: a field that it lacks must not keep us from ending it.
#[derive(Debug, Deserialize)]
struct Greeting {
    version: String,
    #[serde(default)]
    pid: Option<i32>,
    #[serde(default)]
    notes: Vec<String>,
}

/// Why there is no version.
enum Unanswered {
    /// No daemon is there.
    Nobody,
    /// One is there, but.
    Problem(Problem),
}

/// A path below `/v1` with its variable segments encoded.
///
/// # Errors
/// A segment that no URL can hold (`.`, `..`, nothing): no name looks like this.
pub fn path(segments: &[&str]) -> Result<String, Problem> {
    let mut out = String::from("/v1");
    for segment in segments {
        if matches!(*segment, "" | "." | "..") {
            return Err(Problem::new(Code::Usage, format!("{segment:?} is not a name"))
                .hint("names are letters, digits, `.`, `_`, `-`, and start with a letter or digit"));
        }
        out.push('/');
        out.extend(utf8_percent_encode(segment, SEGMENT));
    }
    Ok(out)
}

/// `path` with a query.
pub fn with_query(path: &str, query: &[(&str, &str)]) -> String {
    let mut out = path.to_owned();
    for (n, (name, value)) in query.iter().enumerate() {
        out.push(if n == 0 { '?' } else { '&' });
        out.push_str(name);
        out.push('=');
        out.extend(utf8_percent_encode(value, SEGMENT));
    }
    out
}

fn problem_of(response: Response) -> Problem {
    let status = response.status();
    let otherwise = || Problem::new(Code::Failed, format!("the daemon answered {status}"));
    response.json().unwrap_or_else(|_| otherwise())
}

/// A key that no other request has.
fn key() -> String {
    snapshots::Context::new().id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_encoded() {
        assert_eq!(path(&["snapshots", "shop/db1@{2h}"]).unwrap(), "/v1/snapshots/shop%2Fdb1@%7B2h%7D");
        assert_eq!(with_query("/v1/du", &[("without", "a b,c")]), "/v1/du?without=a%20b%2Cc");
    }

    /// A daemon that dies is no lesson in HTTP.
    #[test]
    fn a_daemon_that_dies_is_told_in_words() {
        use std::io::{Read, Write};

        let folder = tempfile::tempdir().unwrap();
        for said in ["", "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"version\":"] {
            let path = socket::path(folder.path()).unwrap();
            let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
            let server = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.read(&mut [0; 4096]);
                let _ = stream.write_all(said.as_bytes());
            });
            let problem =
                Client::new(folder.path()).unwrap().get::<serde_json::Value>("/v1/targets").unwrap_err();
            server.join().unwrap();
            std::fs::remove_file(&path).unwrap();
            let words = format!("{problem:?}");
            assert!(problem.detail.ends_with("ended before it could answer"), "{words}");
            assert!(problem.hint.as_ref().is_some_and(|hint| hint.contains("machines run on")), "{words}");
            for raw in ["http", "request", "message", "body"] {
                assert!(!words.contains(raw), "{raw}: {words}");
            }
        }
    }

    #[test]
    fn a_daemon_of_another_version_is_understood() {
        for said in [r#"{"version":"0.0.1"}"#, r#"{"version":"9.9.9","pid":1,"color":"red"}"#] {
            assert!(serde_json::from_str::<Greeting>(said).is_ok(), "{said}");
        }
    }

    #[test]
    fn segments_that_urls_swallow_are_refused() {
        for bad in ["", ".", ".."] {
            assert_eq!(path(&["targets", bad]).unwrap_err().code, Code::Usage);
        }
    }
}
