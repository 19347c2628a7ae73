//! Following an operation from its start to its end.

use reqwest::Method;
use serde::de::DeserializeOwned;
use snapshots::{Code, OpState};

use super::{Client, PATIENCE, path, with_query};
use crate::Problem;
use crate::operations::OperationView;

/// How long an operation is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// To its end.
    Ended,
    /// Until it has a result, though it may not have ended.
    Result,
}

/// Seconds that one request waits for news. What changes between two requests is news to neither, so this is also how late
/// a phase that lasts ("waiting for take") may be seen.
const WAIT: &str = "1";

impl Client {
    /// Follows an operation and returns its result. `look` sees it each time that it has changed.
    ///
    /// # Errors
    /// The problem that the operation failed with, or no answer.
    pub fn follow<T: DeserializeOwned>(
        &self,
        first: OperationView,
        until: Until,
        mut look: impl FnMut(&OperationView),
    ) -> Result<T, Problem> {
        let place = path(&["operations", &first.id])?;
        let mut view = first;
        // Most first words come right after the answer that started it.
        let mut wait = "0";
        look(&view);
        while view.state == OpState::Running && (until == Until::Ended || view.result.is_none()) {
            let request = self.request(Method::GET, &with_query(&place, &[("wait", wait)]));
            let next: OperationView = self.decode(self.send(request.timeout(PATIENCE))?)?;
            wait = WAIT;
            if next != view {
                look(&next);
            }
            view = next;
        }
        if let Some(problem) = view.problem {
            return Err(problem);
        }
        // What has no result (protect) is null here; so is what an earlier daemon did.
        serde_json::from_value(view.result.unwrap_or_default()).map_err(|_| {
            let sentence = format!(
                "{} {} is done, but what it came to is lost: the daemon ended meanwhile",
                view.kind, view.subject
            );
            Problem::new(Code::Failed, sentence)
                .hint("`spinney op log` has it, `spinney tree` shows where things stand")
        })
    }

    /// Asks for an operation to be rolled back; [`Client::follow`] says when it is.
    ///
    /// # Errors
    /// There is no such operation, or no answer.
    pub fn cancel(&self, id: &str) -> Result<OperationView, Problem> {
        self.ask(Method::DELETE, &path(&["operations", id])?, None::<&()>)
    }
}
