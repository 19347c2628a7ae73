//! Following an operation from its start to its end.

use reqwest::Method;
use serde::de::DeserializeOwned;
use snapshots::{Code, OpState};

use super::{Client, PATIENCE, decode, path, with_query};
use crate::Problem;
use crate::operations::OperationView;

/// Seconds that one request waits for news.
const WAIT: &str = "30";

impl Client {
    /// Follows an operation to its end and returns its result. `look` sees it each time that it has changed.
    ///
    /// # Errors
    /// The problem that the operation failed with, or no answer.
    pub fn follow<T: DeserializeOwned>(
        &self,
        first: OperationView,
        mut look: impl FnMut(&OperationView),
    ) -> Result<T, Problem> {
        let place = with_query(&path(&["operations", &first.id])?, &[("wait", WAIT)]);
        let mut view = first;
        while view.state == OpState::Running {
            look(&view);
            view = decode(self.send(self.request(Method::GET, &place).timeout(PATIENCE))?)?;
        }
        look(&view);
        if let Some(problem) = view.problem {
            return Err(problem);
        }
        // What has no result (protect) is null here; so is what an earlier daemon did.
        serde_json::from_value(view.result.unwrap_or_default()).map_err(|error| {
            Problem::new(
                Code::Failed,
                format!("{} {} is done, but its result is lost", view.kind, view.subject),
            )
            .because(&error)
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
