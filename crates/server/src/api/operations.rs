//! The journal, and operations under way.

use std::time::Duration;

use ::snapshots::{Code, Engine, Operation};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use utoipa::IntoParams;

use super::Shared;
use super::extract::{Parameters, Segment};
use crate::Problem;
use crate::operations::{OperationView, ProgressView};

/// Longest wait in seconds.
const LONGEST_WAIT: u64 = 300;
/// Most entries of the journal in one answer.
const MOST_ENTRIES: usize = 10_000;

/// Query of the journal.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// Entries at most, newest first.
    limit: usize,
}

impl Default for ListQuery {
    fn default() -> Self {
        Self { limit: 100 }
    }
}

/// Query of one operation.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct WaitQuery {
    /// Seconds to wait until it has ended or its progress has changed; at most 300.
    wait: u64,
}

/// The journal, newest first; what still waits for its turn, and is in no journal, comes before it
#[utoipa::path(get, path = "/v1/operations", tag = "operations", operation_id = "list_operations",
    params(ListQuery),
    responses((status = 200, description = "Entries", body = Vec<Operation>)))]
pub(super) async fn list(
    State(app): Shared,
    Parameters(query): Parameters<ListQuery>,
) -> Result<Json<Vec<Operation>>, Problem> {
    let limit = query.limit.min(MOST_ENTRIES);
    let waiting = app.operations.running();
    app.read(move |engine| {
        let mut entries = engine.operations(limit)?;
        let waiting = waiting.into_iter().rev().filter(|view| engine.operation(&view.id).is_err());
        entries.splice(0..0, waiting.map(waiting_entry));
        entries.truncate(limit);
        Ok(entries)
    })
    .await
}

/// One operation: how far it is, and what it came to
#[utoipa::path(get, path = "/v1/operations/{id}", tag = "operations", operation_id = "show_operation",
    params(("id" = String, Path, description = "Id, or at least four of its first digits"), WaitQuery),
    responses((status = 200, description = "The operation", body = OperationView)))]
pub(super) async fn show(
    State(app): Shared,
    Segment(id): Segment,
    Parameters(query): Parameters<WaitQuery>,
) -> Result<Json<OperationView>, Problem> {
    let wait = Duration::from_secs(query.wait.min(LONGEST_WAIT));
    let mut stop = app.stop.subscribe();
    let live = tokio::select! {
        live = app.operations.wait(&id, wait) => live,
        // The daemon ends: nobody waits any longer.
        _ = stop.wait_for(|stop| *stop) => app.operations.find(&id),
    };
    match live {
        Some(view) => Ok(Json(view)),
        None => app.read(move |engine| journalled(engine, &id)).await,
    }
}

/// Cancel an operation: it is rolled back. One that has ended stays as it is
#[utoipa::path(delete, path = "/v1/operations/{id}", tag = "operations", operation_id = "cancel",
    params(("id" = String, Path, description = "Id, or at least four of its first digits")),
    responses((status = 202, description = "Asked for; `state` says when it is rolled back", body = OperationView)))]
pub(super) async fn cancel(
    State(app): Shared,
    Segment(id): Segment,
) -> Result<(StatusCode, Json<OperationView>), Problem> {
    let view = match app.operations.cancel(&id) {
        Some(view) => Json(view),
        None => app.read(move |engine| journalled(engine, &id)).await?,
    };
    Ok((StatusCode::ACCEPTED, view))
}

/// An operation that waits for its turn, as an entry of the journal that it will get.
fn waiting_entry(view: OperationView) -> Operation {
    Operation {
        id: view.id,
        kind: view.kind,
        subject: view.subject,
        changed: Vec::new(),
        state: view.state,
        started: view.started,
        ended: None,
        error: None,
        undoable: false,
    }
}

/// An operation that only the journal still knows.
fn journalled(engine: &Engine, id: &str) -> ::snapshots::Result<OperationView> {
    let entry = engine.operation(id)?;
    Ok(OperationView {
        id: entry.id,
        kind: entry.kind,
        subject: entry.subject,
        state: entry.state,
        started: entry.started,
        ended: entry.ended,
        progress: ProgressView::default(),
        result: None,
        warnings: Vec::new(),
        problem: entry.error.map(|sentence| Problem::new(Code::Failed, sentence)),
    })
}
