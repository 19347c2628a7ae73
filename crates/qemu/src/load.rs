//! Putting a machine's state into a QEMU that was started with `-incoming defer -S`: we are the source of a migration.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::binary::Version;
use crate::qmp::{Qmp, QmpError};
use crate::save::{CallbackError, SaveError, hand_over, set_capabilities};

/// How long QEMU may take to finish loading after the last byte.
const FINISH_LIMIT: Duration = Duration::from_secs(30);

/// Why a state could not be loaded. The QEMU it was meant for is of no further use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The monitor failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The stream could not be set up.
    #[error(transparent)]
    SetUp(#[from] SaveError),
    /// The stream could not be produced.
    #[error("the snapshot's state could not be read")]
    Feed(#[source] CallbackError),
    /// QEMU refused the state.
    #[error("QEMU cannot load the state: {reason}")]
    Refused {
        /// Its words.
        reason: String,
    },
    /// QEMU did not finish.
    #[error("QEMU was not done loading {} s after the last byte (state {status:?})", FINISH_LIMIT.as_secs())]
    TimedOut {
        /// Its migration state.
        status: String,
    },
}

/// Loads the stream that `feed` writes into the socket. Afterwards the guest's CPUs stand still until `cont`.
pub fn load(
    qmp: &Qmp,
    version: Version,
    feed: &mut dyn FnMut(&UnixStream) -> Result<(), CallbackError>,
) -> Result<(), LoadError> {
    set_capabilities(qmp, &["events"])?;
    let socket = hand_over(qmp, "spinney-load")?;
    // A QEMU that reads no more must not keep us, nor whoever waits for this machine.
    let bounded = socket.set_write_timeout(Some(FINISH_LIMIT));
    bounded.map_err(|source| SaveError::System { act: "set a time-out", source })?;
    let mut arguments = json!({ "uri": "fd:spinney-load" });
    if version >= Version::at(9, 1)
        && let Some(map) = arguments.as_object_mut()
    {
        // Keeps the process, and with it the reason, when the stream is refused.
        map.insert("exit-on-error".into(), false.into());
    }
    qmp.execute("migrate-incoming", arguments)?;
    let fed = feed(&socket);
    let _ = socket.shutdown(if fed.is_ok() { Shutdown::Write } else { Shutdown::Both });
    // A stream that broke because QEMU closed it has its reason with QEMU; one that was given up has it here.
    let fed = match fed {
        Err(error) if !is_broken_pipe(error.as_ref()) => return Err(LoadError::Feed(error)),
        other => other,
    };

    let deadline = Instant::now() + FINISH_LIMIT;
    loop {
        let answer = match (qmp.execute("query-migrate", json!({})), &fed) {
            (Ok(answer), _) => answer,
            (Err(error), Ok(())) => return Err(error.into()),
            (Err(_), Err(_)) => break,
        };
        let status = answer.get("status").and_then(Value::as_str).unwrap_or("none").to_owned();
        let reason = answer.get("error-desc").and_then(Value::as_str).map(str::to_owned);
        match status.as_str() {
            "completed" if fed.is_ok() => return Ok(()),
            "failed" | "cancelled" => {
                let reason = reason.unwrap_or_else(|| "no reason given".into());
                return Err(LoadError::Refused { reason });
            }
            _ if Instant::now() >= deadline => return Err(LoadError::TimedOut { status }),
            _ => thread::sleep(Duration::from_millis(1)),
        }
    }
    match fed {
        Err(error) => Err(LoadError::Feed(error)),
        Ok(()) => Err(LoadError::Refused { reason: "QEMU ended".into() }),
    }
}

fn is_broken_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<std::io::Error>()
            && matches!(io.kind(), std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset)
        {
            return true;
        }
        next = error.source();
    }
    false
}
