//! The daemon itself: version, health, its description, its end.

use std::path::PathBuf;

use ::snapshots::{Check, Code, Engine};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Shared;
use crate::Problem;

/// Which daemon answers.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// Version of the build.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// State folder.
    #[schema(value_type = String)]
    pub state: PathBuf,
    /// When it started.
    pub started: Timestamp,
    /// Operations that run now.
    pub running: usize,
    /// What its start found and put in order, in sentences.
    pub notes: Vec<String>,
}

/// Version, process and state folder of the daemon
#[utoipa::path(get, path = "/v1/version", tag = "daemon", operation_id = "version",
    responses((status = 200, description = "The daemon", body = Version)))]
pub(super) async fn version(State(app): Shared) -> Json<Version> {
    Json(Version {
        version: crate::VERSION.to_owned(),
        pid: std::process::id(),
        state: app.settings.state.clone(),
        started: app.started,
        running: app.operations.running().len(),
        notes: app.notes.clone(),
    })
}

/// What this host has and lacks, as the daemon sees it
#[utoipa::path(get, path = "/v1/doctor", tag = "daemon", operation_id = "doctor",
    responses((status = 200, description = "Checks", body = Vec<Check>)))]
pub(super) async fn doctor(State(app): Shared) -> Result<Json<Vec<Check>>, Problem> {
    let settings = app.settings.clone();
    app.read(move |_| Ok(Engine::doctor(&settings))).await
}

/// End the daemon; machines run on. Refused while operations run
#[utoipa::path(post, path = "/v1/shutdown", tag = "daemon", operation_id = "shutdown",
    responses((status = 202, description = "It ends as soon as this is answered")))]
pub(super) async fn shutdown(State(app): Shared) -> Result<StatusCode, Problem> {
    let running = app.operations.running();
    if let Some(first) = running.first() {
        let (kind, subject) = (&first.kind, &first.subject);
        let (detail, it) = match running.len() {
            1 => (format!("the daemon is busy with {kind} {subject}"), "it"),
            n => (format!("the daemon is busy with {n} operations, first {kind} {subject}"), "that"),
        };
        return Err(Problem::new(Code::Refused, detail)
            .hint(format!("wait, or give {it} up: `spinney op cancel {}`", first.id)));
    }
    app.stop.send_replace(true);
    Ok(StatusCode::ACCEPTED)
}

/// This description
#[utoipa::path(get, path = "/v1/openapi.json", tag = "daemon", operation_id = "openapi",
    responses((status = 200, description = "OpenAPI 3.1", body = serde_json::Value)))]
pub(super) async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(super::openapi())
}
