//! One run of the program: its settings, its voice, its connection to the daemon.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use serde::Serialize;
use serde::de::DeserializeOwned;
use server::Problem;
use server::client::{Client, Method};
use server::operations::OperationView;
use server::snapshots::Code;
use signal_hook::consts::SIGINT;
use signal_hook::iterator::{Handle, Signals};

use crate::config::Config;
use crate::output::Output;
use crate::progress::Progress;

/// What commands work with.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) config: Config,
    pub(crate) out: Output,
}

impl Session {
    pub(crate) fn new(config: Config, out: Output) -> Self {
        Self { config, out }
    }

    /// The daemon, started if it is not there.
    pub(crate) fn client(&self) -> Result<Client, Problem> {
        let executable = std::env::current_exe().map_err(|error| {
            Problem::new(Code::Failed, "cannot find the spinney executable").because(&error)
        })?;
        Client::start(&self.config.state.value, &executable)
    }

    /// Reads from the daemon.
    pub(crate) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Problem> {
        self.client()?.get(path)
    }

    /// Has the daemon change something, with a body, and follows it to its end.
    pub(crate) fn change<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Problem> {
        let client = self.client()?;
        let started = client.ask(method, path, Some(body))?;
        self.follow(&client, started)
    }

    /// Posts without a body and follows the operation to its end.
    pub(crate) fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T, Problem> {
        self.change(Method::POST, path, &serde_json::json!({}))
    }

    /// Follows an operation with progress. Ctrl-C has it rolled back, a second one leaves it to itself.
    pub(crate) fn follow<T: DeserializeOwned>(
        &self,
        client: &Client,
        started: OperationView,
    ) -> Result<T, Problem> {
        self.out.detail(format_args!("operation {} {} {}", started.id, started.kind, started.subject));
        let mut progress = Progress::new(self.out);
        let watch = Interrupts::watch(client.clone(), started.id.clone(), self.out);
        let result = client.follow(started, |view| progress.show(view));
        progress.clear();
        drop(watch);
        result
    }

    /// Asks a person. Off a terminal there is nobody to ask: without `--yes` that is a refusal.
    pub(crate) fn confirm(&self, question: &str, yes: bool) -> Result<(), Problem> {
        if yes {
            return Ok(());
        }
        let refused = |sentence: &str| {
            Err(Problem::new(Code::Refused, sentence).hint("--yes goes ahead without asking"))
        };
        if self.out.json || !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
            return refused("this has to be confirmed, and there is no terminal to ask on");
        }
        let mut stderr = std::io::stderr();
        let _ = write!(stderr, "{question} [y/N] ").and_then(|()| stderr.flush());
        let mut answer = String::new();
        let read = std::io::stdin().read_line(&mut answer);
        if read.is_ok() && matches!(answer.trim(), "y" | "Y" | "yes") {
            Ok(())
        } else {
            refused("nothing was done")
        }
    }
}

/// Turns Ctrl-C into a cancellation while an operation is followed.
struct Interrupts {
    signals: Option<(Handle, JoinHandle<()>)>,
}

impl Interrupts {
    fn watch(client: Client, id: String, out: Output) -> Self {
        // Without the handler Ctrl-C ends this program, and the operation goes on: worse, but sound.
        let Ok(mut signals) = Signals::new([SIGINT]) else { return Self { signals: None } };
        let handle = signals.handle();
        let thread = std::thread::spawn(move || {
            let cancelled = AtomicBool::new(false);
            for _ in signals.forever() {
                if cancelled.swap(true, Ordering::SeqCst) {
                    out.note(format_args!("\nleft to itself; `spinney op log` shows how it ends ({id})"));
                    std::process::exit(130);
                }
                out.note("\nrolling back; Ctrl-C again leaves it to itself");
                if let Err(problem) = client.cancel(&id) {
                    out.note(format_args!("cannot cancel: {}", problem.detail));
                }
            }
        });
        Self { signals: Some((handle, thread)) }
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        if let Some((handle, thread)) = self.signals.take() {
            handle.close();
            let _ = thread.join();
        }
    }
}
