//! One run of the program: its settings, its voice, its connection to the daemon.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use server::Problem;
use server::client::{Client, Method, Until};
use server::operations::OperationView;
use server::snapshots::Code;

use crate::config::Config;
use crate::interrupts::{Ended, Interrupts, outcome};
use crate::output::Output;
use crate::progress::Progress;

/// What commands work with.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) config: Config,
    pub(crate) out: Output,
    /// What operations had to say though they were done.
    pub(crate) warnings: Mutex<Vec<String>>,
    /// By which signal, if one came while an operation was followed.
    pub(crate) ended: Ended,
}

impl Session {
    pub(crate) fn new(config: Config, out: Output) -> Self {
        Self { config, out, warnings: Mutex::default(), ended: Ended::default() }
    }

    /// The daemon, started if it is not there.
    pub(crate) fn client(&self) -> Result<Client, Problem> {
        let executable = std::env::current_exe().map_err(|error| {
            Problem::new(Code::Failed, "cannot find the spinney executable").because(&error)
        })?;
        let client = Client::start(&self.config.state.value, &executable)?;
        for note in client.notes() {
            self.out.note(format_args!("note: {note}"));
        }
        Ok(client)
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
        self.operate(&self.client()?, method, path, Some(body))
    }

    /// Posts without a body and follows the operation to its end.
    pub(crate) fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T, Problem> {
        self.change(Method::POST, path, &json!({}))
    }

    /// Starts an operation and follows it with progress. Ctrl-C, SIGTERM and SIGHUP have it rolled back, a second one
    /// leaves it to itself.
    pub(crate) fn operate<T: DeserializeOwned>(
        &self,
        client: &Client,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Problem> {
        self.operate_until(Until::Ended, client, method, path, body)
    }

    /// As [`Self::operate`], but may leave before the end.
    pub(crate) fn operate_until<T: DeserializeOwned>(
        &self,
        until: Until,
        client: &Client,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Problem> {
        let progress = Progress::new(self.out);
        let mut watch = Interrupts::watch(client.clone(), self.ended.clone(), progress.voice());
        let mut too_late = None;
        let result = client.ask(method, path, body).and_then(|started: OperationView| {
            watch.follow(&started);
            let (kind, subject) = (started.kind.clone(), started.subject.clone());
            self.out.detail(format_args!("operation {} {kind} {subject}", started.id));
            let (mut warnings, mut phase) = (Vec::new(), String::new());
            let mut follow = |until| {
                let look = |view: &OperationView| {
                    warnings.clone_from(&view.warnings);
                    phase.clone_from(&view.progress.phase);
                    progress.show(view);
                };
                client.follow(started.clone(), until, look).map_err(|problem| match problem.code {
                    Code::Interrupted => Problem { detail: outcome(&kind, &subject, &phase), ..problem },
                    _ => problem,
                })
            };
            let mut followed = follow(until)?;
            // No signal can change anything from here on.
            too_late = watch.end();
            if until == Until::Result && too_late.is_some() {
                // It is being cancelled: only its end says whether it was.
                followed = follow(Until::Ended)?;
            }
            Ok((followed, warnings))
        });
        progress.clear();
        let (result, warnings) = result?;
        if let Some(words) = too_late {
            self.out.note(words);
        }
        warnings.iter().for_each(|words| self.out.warning(words));
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).extend(warnings);
        Ok(result)
    }

    /// The one document of `--json` for what an operation came to: with `warnings`, if there are any.
    pub(crate) fn document(&self, schema: &str, value: &impl Serialize) {
        let warnings = self.warnings.lock().unwrap_or_else(PoisonError::into_inner);
        let mut value = serde_json::to_value(value).unwrap_or_default();
        if let Some(object) = value.as_object_mut().filter(|_| !warnings.is_empty()) {
            object.insert("warnings".to_owned(), json!(*warnings));
        }
        self.out.document(schema, &value);
    }

    /// Asks a person something that need not be answered; none if there is nobody to ask.
    pub(crate) fn ask(&self, question: &str) -> Option<String> {
        if !self.has_somebody() {
            return None;
        }
        let mut stderr = std::io::stderr();
        let _ = write!(stderr, "{question}").and_then(|()| stderr.flush());
        let mut answer = String::new();
        let read = std::io::stdin().read_line(&mut answer);
        if !answer.ends_with('\n') {
            // Ctrl-D leaves the cursor behind the question.
            let _ = writeln!(stderr);
        }
        read.ok().map(|_| answer.trim().to_owned())
    }

    /// Whether there is a person who can be asked.
    fn has_somebody(&self) -> bool {
        !self.out.json && std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
    }

    /// Shows a plan and asks a person, who may call it off. Off a terminal there is nobody to ask: without `--yes` that is
    /// a refusal.
    pub(crate) fn confirm(&self, plan: &[String], question: &str, yes: bool) -> Result<(), Problem> {
        if yes {
            return Ok(());
        }
        if !self.has_somebody() {
            let sentence = "this has to be confirmed, and there is no terminal to ask on";
            let problem = Problem::new(Code::Refused, sentence).hint("--yes goes ahead without asking");
            return Err(Problem { cause: plan.to_vec(), ..problem });
        }
        let mut stderr = std::io::stderr();
        let _ = plan.iter().try_for_each(|line| writeln!(stderr, "{line}"));
        let answer = self.ask(&format!("{question} [y/N] "));
        if answer.is_some_and(|answer| matches!(answer.as_str(), "y" | "Y" | "yes")) {
            return Ok(());
        }
        Err(Problem::new(Code::Interrupted, "nothing was done"))
    }
}
