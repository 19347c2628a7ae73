//! Following an operation from its start to its end, with a way out.

use reqwest::Method;
use serde::de::DeserializeOwned;
use snapshots::{Code, OpState};

use super::{Client, PATIENCE, decode, path, with_query};
use crate::Problem;
use crate::operations::OperationView;

/// Seconds that one request waits for news.
const WAIT: &str = "2";

/// What the caller of [`follow`] wants after each look at the operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Following {
    /// Look again.
    On,
    /// Have it rolled back, and look again.
    Cancel,
    /// Leave it to itself.
    Detach,
}

/// Follows an operation to its end. `look` sees it each time it has changed, and at least every two seconds. The
/// result is none if `look` detached.
///
/// # Errors
/// The problem that the operation failed with, or no answer.
pub fn follow<T: DeserializeOwned>(
    client: &Client,
    first: OperationView,
    mut look: impl FnMut(&OperationView) -> Following,
) -> Result<Option<T>, Problem> {
    let place = path(&["operations", &first.id])?;
    let mut view = first;
    let mut cancelled = false;
    while view.state == OpState::Running {
        match look(&view) {
            Following::On => {}
            Following::Detach => return Ok(None),
            Following::Cancel if cancelled => {}
            Following::Cancel => {
                cancelled = true;
                let _: OperationView = client.ask(Method::DELETE, &place, None::<&()>)?;
            }
        }
        let request = client.request(Method::GET, &with_query(&place, &[("wait", WAIT)])).timeout(PATIENCE);
        view = decode(client.send(request)?)?;
    }
    look(&view);
    if let Some(problem) = view.problem {
        return Err(problem);
    }
    // Results without a body (protect) are null; a journal entry of an earlier daemon has none either.
    serde_json::from_value(view.result.unwrap_or_default()).map(Some).map_err(|error| {
        Problem::new(Code::Failed, format!("{} {} is done, but its result is lost", view.kind, view.subject))
            .because(&error)
    })
}
