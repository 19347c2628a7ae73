//! One snapshot, by any form of its address.

use ::snapshots::{CloneOptions, Code, Edit, ForkOptions, RemovePlan, Snapshot};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};

use super::extract::{Body, Key, Parameters, Remove, Segment};
use super::{Accepted, Shared};
use crate::Problem;
use crate::operations::OperationView;

/// Refuses what is not the address of a snapshot: here, `web` alone must never stand for the whole machine.
fn address(text: String) -> Result<String, Problem> {
    if text.contains('@') {
        return Ok(text);
    }
    Err(Problem::new(Code::Usage, format!("{text:?} is not the address of a snapshot"))
        .hint("write TARGET@SNAPSHOT"))
}

/// One snapshot
#[utoipa::path(get, path = "/v1/snapshots/{address}", tag = "snapshots", operation_id = "show_snapshot",
    params(("address" = String, Path, description = "`web@before`, `web@`, `web@~2`, `web@{2h}`, `web@id:3f2a`")),
    responses((status = 200, description = "The snapshot", body = Snapshot)))]
pub(super) async fn show(State(app): Shared, Segment(text): Segment) -> Result<Json<Snapshot>, Problem> {
    let address = address(text)?;
    app.read(move |engine| engine.snapshot(&address)).await
}

/// Change name, note, keep or expiry; the operation's result is an `Edited`
#[utoipa::path(patch, path = "/v1/snapshots/{address}", tag = "snapshots", operation_id = "edit_snapshot",
    params(("address" = String, Path, description = "Address")), request_body = Edit,
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn edit(
    State(app): Shared,
    Segment(text): Segment,
    key: Key,
    Body(edit): Body<Edit>,
) -> Result<Accepted, Problem> {
    let address = address(text)?;
    app.run("edit", address.clone(), key, edit.clone(), move |engine, cx| engine.edit(cx, &address, edit))
}

/// Remove a snapshot; the operation's result is the plan that was executed
#[utoipa::path(delete, path = "/v1/snapshots/{address}", tag = "snapshots", operation_id = "rm_snapshot",
    params(("address" = String, Path, description = "Address, with something behind the `@`"), Remove),
    responses((status = 200, description = "Dry run: the plan", body = RemovePlan),
        (status = 202, description = "Started", body = OperationView)))]
pub(super) async fn rm(
    State(app): Shared,
    Segment(text): Segment,
    Parameters(remove): Parameters<Remove>,
    key: Key,
) -> Result<Response, Problem> {
    let address = address(text)?;
    if remove.dry_run {
        return Ok(app.read(move |engine| engine.rm_plan(&address, remove.tree)).await?.into_response());
    }
    let started = app.run("rm", address.clone(), key, remove.tree, move |engine, cx| {
        engine.rm(cx, &address, remove.tree)
    })?;
    Ok(started.into_response())
}

/// Make a machine of a snapshot; the operation's result is a `Cloned`
#[utoipa::path(post, path = "/v1/snapshots/{address}/clone", tag = "snapshots", operation_id = "clone_snapshot",
    params(("address" = String, Path, description = "Address")), request_body = CloneOptions,
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn clone(
    State(app): Shared,
    Segment(text): Segment,
    key: Key,
    Body(options): Body<CloneOptions>,
) -> Result<Accepted, Problem> {
    let address = address(text)?;
    let subject = format!("{address} {}", options.name);
    app.run("clone", subject, key, (address.clone(), options.clone()), move |engine, cx| {
        engine.clone_target(cx, &address, &options)
    })
}

/// Make machines that run of a snapshot, all or none; the operation's result is a `Forked`
#[utoipa::path(post, path = "/v1/snapshots/{address}/fork", tag = "snapshots", operation_id = "fork_snapshot",
    params(("address" = String, Path, description = "Address")), request_body = ForkOptions,
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn fork(
    State(app): Shared,
    Segment(text): Segment,
    key: Key,
    Body(options): Body<ForkOptions>,
) -> Result<Accepted, Problem> {
    let address = address(text)?;
    app.run("fork", address.clone(), key, (address.clone(), options.clone()), move |engine, cx| {
        engine.fork(cx, &address, &options)
    })
}

/// Make a snapshot refuse `rm`; the operation has no result
#[utoipa::path(post, path = "/v1/snapshots/{address}/protect", tag = "snapshots", operation_id = "protect_snapshot",
    params(("address" = String, Path, description = "Address")),
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn protect(
    State(app): Shared,
    Segment(text): Segment,
    key: Key,
) -> Result<Accepted, Problem> {
    let address = address(text)?;
    app.run("protect", address.clone(), key, (), move |engine, cx| engine.protect(cx, &address, true))
}

/// Let a snapshot be removed again; the operation has no result
#[utoipa::path(post, path = "/v1/snapshots/{address}/unprotect", tag = "snapshots",
    operation_id = "unprotect_snapshot", params(("address" = String, Path, description = "Address")),
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn unprotect(
    State(app): Shared,
    Segment(text): Segment,
    key: Key,
) -> Result<Accepted, Problem> {
    let address = address(text)?;
    app.run("unprotect", address.clone(), key, (), move |engine, cx| engine.protect(cx, &address, false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_no_snapshot() {
        assert!(address("web@old".into()).is_ok());
        assert_eq!(address("web".into()).unwrap_err().code, Code::Usage);
    }
}
