//! Groups: list, create, show, remove.

use ::snapshots::{Group, GroupRemovePlan};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::extract::{Body, DryRun, Key, Parameters, Segment};
use super::{Accepted, Shared};
use crate::Problem;
use crate::operations::OperationView;

/// Body of `create_group`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateGroupRequest {
    /// Name of the group.
    pub name: String,
    /// Its owner: a user's name or id. If left out, whoever runs the daemon.
    #[serde(default)]
    pub owner: Option<String>,
}

/// All groups
#[utoipa::path(get, path = "/v1/groups", tag = "groups", operation_id = "list_groups",
    responses((status = 200, description = "Groups, the default one first, then by name", body = Vec<Group>)))]
pub(super) async fn list(State(app): Shared) -> Result<Json<Vec<Group>>, Problem> {
    app.read(|engine| engine.groups()).await
}

/// Create a group; the operation's result is the group
#[utoipa::path(post, path = "/v1/groups", tag = "groups", operation_id = "create_group",
    request_body = CreateGroupRequest,
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn create(
    State(app): Shared,
    key: Key,
    Body(body): Body<CreateGroupRequest>,
) -> Result<Accepted, Problem> {
    let CreateGroupRequest { name, owner } = body.clone();
    app.run("group create", name.clone(), key, body, move |engine, cx| {
        engine.create_group(cx, &name, owner.as_deref())
    })
}

/// One group
#[utoipa::path(get, path = "/v1/groups/{group}", tag = "groups", operation_id = "show_group",
    params(("group" = String, Path, description = "Name")),
    responses((status = 200, description = "The group", body = Group)))]
pub(super) async fn show(State(app): Shared, Segment(group): Segment) -> Result<Json<Group>, Problem> {
    app.read(move |engine| engine.group(&group)).await
}

/// Remove a group that nothing belongs to; the operation's result is the plan that was executed
#[utoipa::path(delete, path = "/v1/groups/{group}", tag = "groups", operation_id = "rm_group",
    params(("group" = String, Path, description = "Name"), DryRun),
    responses((status = 200, description = "Dry run: the plan", body = GroupRemovePlan),
        (status = 202, description = "Started", body = OperationView)))]
pub(super) async fn rm(
    State(app): Shared,
    Segment(group): Segment,
    Parameters(query): Parameters<DryRun>,
    key: Key,
) -> Result<Response, Problem> {
    if query.dry_run {
        return Ok(app.read(move |engine| engine.rm_group_plan(&group)).await?.into_response());
    }
    let started =
        app.run("group rm", group.clone(), key, (), move |engine, cx| engine.rm_group(cx, &group))?;
    Ok(started.into_response())
}
