//! Space, garbage, damage, and taking operations back.

use ::snapshots::{Du, FsckReport, GcReport, Mounted, Undone};
use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::extract::{Body, Key, Parameters};
use super::{Accepted, Shared};
use crate::Problem;
use crate::operations::OperationView;

/// Query of `du`.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct DuQuery {
    /// Only this machine.
    target: Option<String>,
    /// Addresses of snapshots, separated by commas: how much would come back without them.
    without: Option<String>,
}

/// Body of `gc`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GcRequest {
    /// Free what only undo still needs, too.
    pub now: bool,
    /// Only say what would be freed.
    pub dry_run: bool,
}

/// Body of `mount`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MountRequest {
    /// Name of a group; the default one if none.
    pub group: Option<String>,
}

/// Body of `fsck`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FsckRequest {
    /// Mend what can be mended first, and mark the snapshots that cannot.
    pub repair: bool,
}

/// Body of `undo`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct UndoRequest {
    /// The operation to take back, by its id; or a machine, whose last one is meant. If left out, the last one of the machine that
    /// was worked on last.
    pub id: Option<String>,
}

/// Space: exclusive, shared, reclaimable
#[utoipa::path(get, path = "/v1/du", tag = "store", operation_id = "du", params(DuQuery),
    responses((status = 200, description = "Space by snapshot and in all", body = Du)))]
pub(super) async fn du(
    State(app): Shared,
    Parameters(query): Parameters<DuQuery>,
) -> Result<Json<Du>, Problem> {
    app.read(move |engine| {
        let without: Vec<String> =
            query.without.iter().flat_map(|list| list.split(',')).map(str::to_owned).collect();
        engine.du(query.target.as_deref(), &without)
    })
    .await
}

/// Free what nothing needs; the operation's result is a `GcReport`
#[utoipa::path(post, path = "/v1/gc", tag = "store", operation_id = "gc", request_body = GcRequest,
    responses((status = 202, description = "Started; the result is a `GcReport`", body = OperationView)))]
pub(super) async fn gc(
    State(app): Shared,
    key: Key,
    Body(body): Body<GcRequest>,
) -> Result<Accepted, Problem> {
    let GcRequest { now, dry_run } = body;
    app.run("gc", "", key, body, move |engine, cx| -> ::snapshots::Result<GcReport> {
        engine.gc(cx, now, dry_run)
    })
}

/// Show the snapshots of a group as folders of plain files; the operation's result is a `Mounted`
#[utoipa::path(post, path = "/v1/mount", tag = "store", operation_id = "mount", request_body = MountRequest,
    responses((status = 202, description = "Started; the result is a `Mounted`", body = OperationView)))]
pub(super) async fn mount(
    State(app): Shared,
    key: Key,
    Body(body): Body<MountRequest>,
) -> Result<Accepted, Problem> {
    let group = body.group.clone();
    app.run("mount", "", key, body, move |engine, cx| -> ::snapshots::Result<Mounted> {
        engine.mount(cx, group.as_deref())
    })
}

/// Read everything back and compare; the operation's result is an `FsckReport`
#[utoipa::path(post, path = "/v1/fsck", tag = "store", operation_id = "fsck", request_body = FsckRequest,
    responses((status = 202, description = "Started; the result is an `FsckReport`", body = OperationView)))]
pub(super) async fn fsck(
    State(app): Shared,
    key: Key,
    Body(body): Body<FsckRequest>,
) -> Result<Accepted, Problem> {
    let repair = body.repair;
    app.run("fsck", "", key, body, move |engine, cx| -> ::snapshots::Result<FsckReport> {
        engine.fsck(cx, repair)
    })
}

/// Take an operation back; the operation's result is an `Undone`
#[utoipa::path(post, path = "/v1/undo", tag = "operations", operation_id = "undo", request_body = UndoRequest,
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn undo(
    State(app): Shared,
    key: Key,
    Body(body): Body<UndoRequest>,
) -> Result<Accepted, Problem> {
    let id = body.id.clone();
    app.run(
        "undo",
        id.clone().unwrap_or_default(),
        key,
        body,
        move |engine, cx| -> ::snapshots::Result<Undone> { engine.undo(cx, id.as_deref()) },
    )
}
