//! Operations under way and those that ended lately: one thread each, progress to look at, a flag to cancel with.
//!
//! The journal in the catalog is the record that survives; this registry only adds what the journal does not hold:
//! progress, the result document, and the key under which a repeated request finds its first answer.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use snapshots::{Code, Context, OpState};
use tokio::sync::{Notify, broadcast};
use utoipa::ToSchema;

use crate::Problem;

/// Ended operations that are remembered, and as many idempotency keys.
const REMEMBERED: usize = 1000;
/// Operations that may run at once; each has a thread.
const AT_ONCE: usize = 256;
/// How often a waiting reader looks at the progress of an operation.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How far an operation is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProgressView {
    /// Units done.
    pub done: u64,
    /// Units in all; 0 if unknown.
    pub total: u64,
    /// What is being done ("saving memory"); empty before the first word.
    pub phase: String,
}

/// An operation as the API shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct OperationView {
    /// Id, 16 hex digits; the same as in the journal.
    pub id: String,
    /// Kind: "take", "goto", "rm", ...
    pub kind: String,
    /// What it is about: "web@before".
    pub subject: String,
    /// State.
    pub state: OpState,
    /// Start.
    pub started: Timestamp,
    /// End.
    pub ended: Option<Timestamp>,
    /// How far it is.
    pub progress: ProgressView,
    /// What it came to; its shape is that of the kind. A take has one while it still runs: the snapshot, `saving`, from when the
    /// guest runs on. Lost when the daemon ends.
    pub result: Option<Value>,
    /// What people should know though it is done: a disk that is missing below a snapshot.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Why it failed or was rolled back.
    pub problem: Option<Problem>,
}

/// What is asked for: what to call it, and how to tell a repetition from another request.
#[derive(Debug)]
pub struct Request {
    /// Kind: "take", "goto", "rm", ...
    pub kind: &'static str,
    /// What it is about.
    pub subject: String,
    /// The caller's `Idempotency-Key`.
    pub key: Option<String>,
    /// The request's parameters; the same key with others is refused.
    pub parameters: Value,
}

/// All operations of one daemon.
#[derive(Debug)]
pub struct Operations {
    table: Mutex<Table>,
    changes: broadcast::Sender<OperationView>,
}

#[derive(Debug, Default)]
struct Table {
    by_id: HashMap<String, Arc<Entry>>,
    /// Ids of the ended, oldest first.
    ended: VecDeque<String>,
    by_key: HashMap<String, Repeatable>,
    /// Keys, oldest first.
    keys: VecDeque<String>,
    running: usize,
    closed: bool,
}

#[derive(Debug)]
struct Repeatable {
    id: String,
    kind: &'static str,
    subject: String,
    parameters: Value,
}

#[derive(Debug)]
struct Entry {
    kind: &'static str,
    subject: String,
    started: Timestamp,
    context: Context,
    end: Mutex<Option<End>>,
    /// Wakes whoever waits for the end.
    woken: Notify,
}

#[derive(Clone, Debug)]
struct End {
    at: Timestamp,
    result: Result<Value, Problem>,
}

impl Default for Operations {
    fn default() -> Self {
        Self { table: Mutex::default(), changes: broadcast::channel(256).0 }
    }
}

impl Operations {
    /// Starts `work` on a thread of its own, or finds the operation that an equal request with the same key started.
    ///
    /// # Errors
    /// The key was used for another request; too many operations run; the daemon is ending; no thread can be had.
    pub fn start<T, F>(self: &Arc<Self>, request: Request, work: F) -> Result<OperationView, Problem>
    where
        T: Serialize,
        F: FnOnce(&Context) -> Result<T, Problem> + Send + 'static,
    {
        let entry = {
            let mut table = self.table();
            if let Some(first) = table.repeated(&request)? {
                return Ok(first.view());
            }
            table.admit()?;
            let entry = Arc::new(Entry {
                kind: request.kind,
                subject: request.subject.clone(),
                started: Timestamp::now(),
                context: Context::new(),
                end: Mutex::default(),
                woken: Notify::new(),
            });
            table.running += 1;
            table.by_id.insert(entry.context.id.clone(), Arc::clone(&entry));
            table.remember_key(request, &entry.context.id);
            entry
        };
        let view = entry.view();
        let _ = self.changes.send(view.clone());

        let operations = Arc::clone(self);
        let (thread_entry, name) = (Arc::clone(&entry), format!("op-{}", entry.kind));
        let spawned = std::thread::Builder::new().name(name).spawn(move || {
            let result = run(&thread_entry, work);
            operations.ended(&thread_entry, result);
        });
        if let Err(error) = spawned {
            let problem = Problem::new(Code::Failed, "cannot start a thread").because(&error);
            self.ended(&entry, Err(problem.clone()));
            return Err(problem);
        }
        Ok(view)
    }

    /// The operation with this id, or whose id alone begins so.
    pub fn find(&self, id: &str) -> Option<OperationView> {
        self.table().find(id).map(|entry| entry.view())
    }

    /// Asks for the operation to be rolled back; one that has ended is left as it is. None if it is not known.
    pub fn cancel(&self, id: &str) -> Option<OperationView> {
        let entry = self.table().find(id)?;
        if !entry.has_ended() {
            tracing::info!(id = entry.context.id, kind = entry.kind, "cancel");
            entry.context.cancel.store(true, Ordering::SeqCst);
        }
        Some(entry.view())
    }

    /// Waits until the operation has ended or its progress differs from what it is now, at most `wait`. None if it is
    /// not known.
    pub async fn wait(&self, id: &str, wait: Duration) -> Option<OperationView> {
        let entry = self.table().find(id)?;
        let first = entry.view();
        let until = tokio::time::Instant::now() + wait;
        loop {
            // Enlisted before looking, so that an end in between is not missed.
            let woken = entry.woken.notified();
            tokio::pin!(woken);
            woken.as_mut().enable();
            let now = entry.view();
            if now.state != OpState::Running
                || now.progress != first.progress
                || now.result != first.result
                || tokio::time::Instant::now() >= until
            {
                return Some(now);
            }
            let _ = tokio::time::timeout(LOOK_EVERY, woken).await;
        }
    }

    /// Those that run, oldest first.
    pub fn running(&self) -> Vec<OperationView> {
        let mut views: Vec<_> =
            self.table().by_id.values().filter(|e| !e.has_ended()).map(|e| e.view()).collect();
        views.sort_by(|a, b| (a.started, &a.id).cmp(&(b.started, &b.id)));
        views
    }

    /// Hears of every start and end from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<OperationView> {
        self.changes.subscribe()
    }

    /// Accepts nothing more.
    pub fn close(&self) {
        self.table().closed = true;
    }

    fn ended(&self, entry: &Entry, result: Result<Value, Problem>) {
        *entry.end() = Some(End { at: Timestamp::now(), result });
        {
            let mut table = self.table();
            table.running = table.running.saturating_sub(1);
            table.ended.push_back(entry.context.id.clone());
            if table.ended.len() > REMEMBERED
                && let Some(oldest) = table.ended.pop_front()
            {
                table.by_id.remove(&oldest);
            }
        }
        entry.woken.notify_waiters();
        let _ = self.changes.send(entry.view());
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// The operation that an equal request started under the same key.
    fn repeated(&self, request: &Request) -> Result<Option<Arc<Entry>>, Problem> {
        let Some(first) = request.key.as_ref().and_then(|key| self.by_key.get(key)) else { return Ok(None) };
        let same = (first.kind, &first.subject, &first.parameters)
            == (request.kind, &request.subject, &request.parameters);
        if !same {
            let kind = first.kind;
            return Err(Problem::new(
                Code::Usage,
                format!("this Idempotency-Key belongs to another request ({kind} {})", first.subject),
            )
            .hint("use a new key for every new request"));
        }
        Ok(self.by_id.get(&first.id).cloned())
    }

    fn admit(&self) -> Result<(), Problem> {
        if self.closed {
            return Err(Problem::new(Code::Refused, "the daemon is ending").hint("try again in a moment"));
        }
        if self.running >= AT_ONCE {
            return Err(Problem::new(Code::Refused, format!("{AT_ONCE} operations are running already"))
                .hint("wait until some have ended"));
        }
        Ok(())
    }

    fn remember_key(&mut self, request: Request, id: &str) {
        let Some(key) = request.key else { return };
        let value = Repeatable {
            id: id.to_owned(),
            kind: request.kind,
            subject: request.subject,
            parameters: request.parameters,
        };
        if self.by_key.insert(key.clone(), value).is_none() {
            self.keys.push_back(key);
        }
        if self.keys.len() > REMEMBERED
            && let Some(oldest) = self.keys.pop_front()
        {
            self.by_key.remove(&oldest);
        }
    }

    fn find(&self, id: &str) -> Option<Arc<Entry>> {
        if let Some(entry) = self.by_id.get(id) {
            return Some(Arc::clone(entry));
        }
        if id.len() < 4 {
            return None;
        }
        let mut matches = self.by_id.iter().filter(|(full, _)| full.starts_with(id));
        match (matches.next(), matches.next()) {
            (Some((_, entry)), None) => Some(Arc::clone(entry)),
            _ => None,
        }
    }
}

impl Entry {
    fn end(&self) -> MutexGuard<'_, Option<End>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There may be thousands to ask, with results of some size.
    fn has_ended(&self) -> bool {
        self.end().is_some()
    }

    fn view(&self) -> OperationView {
        let progress = &self.context.progress;
        let end = self.end();
        let (state, result, problem) = match end.as_ref().map(|end| &end.result) {
            None => (
                OpState::Running,
                progress.so_far.lock().unwrap_or_else(PoisonError::into_inner).clone(),
                None,
            ),
            Some(Ok(value)) => (OpState::Done, Some(value.clone()), None),
            Some(Err(problem)) if problem.code == Code::Interrupted => {
                (OpState::Cancelled, None, Some(problem.clone()))
            }
            Some(Err(problem)) => (OpState::Failed, None, Some(problem.clone())),
        };
        OperationView {
            id: self.context.id.clone(),
            kind: self.kind.to_owned(),
            subject: self.subject.clone(),
            state,
            started: self.started,
            ended: end.as_ref().map(|end| end.at),
            progress: ProgressView {
                done: progress.done.load(Ordering::Relaxed),
                total: progress.total.load(Ordering::Relaxed),
                phase: progress.phase.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            },
            result,
            warnings: progress.warnings.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            problem,
        }
    }
}

/// Runs the work and makes a document of what it returns; a panic becomes a problem like any other.
fn run<T: Serialize>(
    entry: &Entry,
    work: impl FnOnce(&Context) -> Result<T, Problem>,
) -> Result<Value, Problem> {
    let (id, kind, subject) = (&entry.context.id, entry.kind, &entry.subject);
    tracing::info!(id, kind, subject, "start");
    let outcome = catch_unwind(AssertUnwindSafe(|| work(&entry.context)));
    let result = match outcome {
        Ok(Ok(value)) => serde_json::to_value(value)
            .map_err(|error| Problem::new(Code::Failed, "cannot write down the result").because(&error)),
        Ok(Err(problem)) => Err(problem),
        Err(_) => Err(Problem::new(Code::Failed, format!("{kind} {subject} ran into a mistake in Spinney"))
            .hint("daemon.log in the state folder says where; please report it")),
    };
    match &result {
        Ok(_) => tracing::info!(id, kind, subject, "done"),
        Err(problem) => tracing::warn!(id, kind, subject, cause = ?problem.cause, "{}", problem.detail),
    }
    result
}

#[cfg(test)]
mod tests;
