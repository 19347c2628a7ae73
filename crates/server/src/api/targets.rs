//! Machines: list, create, start, take, goto and the other verbs.

use std::time::Duration;

use ::snapshots::{
    CloneOptions, Edit, ForkOptions, GotoPower, Machine, MachineConfig, OnPowerOff, RemovePlan, SetOptions,
    TakeOptions, Tree,
};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::extract::{Body, DryRun, Key, Parameters, Remove, Segment};
use super::{Accepted, Shared};
use crate::Problem;
use crate::operations::OperationView;

/// Body of `create`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateRequest {
    /// Name of the machine.
    pub name: String,
    /// Its settings. Paths are absolute.
    pub config: MachineConfig,
    /// Name of the group that it belongs to; the default one if left out.
    #[serde(default)]
    pub group: Option<String>,
}

/// Body of `stop`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct StopRequest {
    /// Seconds that the guest has to turn itself off.
    pub timeout_seconds: u64,
    /// End QEMU when the guest did not.
    pub kill: bool,
}

impl Default for StopRequest {
    fn default() -> Self {
        Self { timeout_seconds: 60, kill: false }
    }
}

/// Body of `power-off`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PowerOffRequest {
    /// Go back, take a snapshot, or do nothing.
    pub then: OnPowerOff,
}

/// Body of `goto`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GotoRequest {
    /// What stands behind the `@` of the snapshot's address.
    pub to: String,
    /// Power state wanted afterwards.
    #[serde(default = "recorded")]
    pub power: GotoPower,
    /// Keep no undo point.
    #[serde(default)]
    pub discard: bool,
}

fn recorded() -> GotoPower {
    GotoPower::Recorded
}

/// Plan of `goto` with `discard`, and of `set` with disks that go.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DiscardPlan {
    /// What would be lost, in words; none if nothing.
    pub discards: Option<String>,
}

/// All machines
#[utoipa::path(get, path = "/v1/targets", tag = "targets", operation_id = "list",
    responses((status = 200, description = "Machines by name", body = Vec<Machine>)))]
pub(super) async fn list(State(app): Shared) -> Result<Json<Vec<Machine>>, Problem> {
    app.read(|engine| engine.list()).await
}

/// Create a machine; the operation's result is the machine
#[utoipa::path(post, path = "/v1/targets", tag = "targets", operation_id = "create", request_body = CreateRequest,
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn create(
    State(app): Shared,
    key: Key,
    Body(body): Body<CreateRequest>,
) -> Result<Accepted, Problem> {
    let CreateRequest { name, config, group } = body.clone();
    app.run("create", name.clone(), key, body, move |engine, cx| {
        engine.create_in(cx, group.as_deref(), &name, config)
    })
}

/// One machine
#[utoipa::path(get, path = "/v1/targets/{target}", tag = "targets", operation_id = "show",
    params(("target" = String, Path, description = "Name")),
    responses((status = 200, description = "The machine", body = Machine)))]
pub(super) async fn show(State(app): Shared, Segment(target): Segment) -> Result<Json<Machine>, Problem> {
    app.read(move |engine| engine.machine(&target)).await
}

/// Rename a machine, or copy it to another group; the operation's result is an `Edited`
#[utoipa::path(patch, path = "/v1/targets/{target}", tag = "targets", operation_id = "edit",
    params(("target" = String, Path, description = "Name")), request_body = Edit,
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn edit(
    State(app): Shared,
    Segment(target): Segment,
    key: Key,
    Body(edit): Body<Edit>,
) -> Result<Accepted, Problem> {
    app.run("edit", target.clone(), key, edit.clone(), move |engine, cx| engine.edit(cx, &target, edit))
}

/// Remove a machine; the operation's result is the plan that was executed
#[utoipa::path(delete, path = "/v1/targets/{target}", tag = "targets", operation_id = "rm",
    params(("target" = String, Path, description = "Name"), Remove),
    responses((status = 200, description = "Dry run: the plan", body = RemovePlan),
        (status = 202, description = "Started", body = OperationView)))]
pub(super) async fn rm(
    State(app): Shared,
    Segment(target): Segment,
    Parameters(remove): Parameters<Remove>,
    key: Key,
) -> Result<Response, Problem> {
    if remove.dry_run {
        return Ok(app.read(move |engine| engine.rm_plan(&target, remove.tree)).await?.into_response());
    }
    let started = app
        .run("rm", target.clone(), key, remove.tree, move |engine, cx| engine.rm(cx, &target, remove.tree))?;
    Ok(started.into_response())
}

/// A machine's snapshots, undo points included, and where it stands
#[utoipa::path(get, path = "/v1/targets/{target}/tree", tag = "targets", operation_id = "tree",
    params(("target" = String, Path, description = "Name")),
    responses((status = 200, description = "The tree", body = Tree)))]
pub(super) async fn tree(State(app): Shared, Segment(target): Segment) -> Result<Json<Tree>, Problem> {
    app.read(move |engine| engine.tree(&target)).await
}

/// Start a machine; the operation's result is the machine. Of a protected one that is off it is a throw-away fork
#[utoipa::path(post, path = "/v1/targets/{target}/start", tag = "targets", operation_id = "start",
    params(("target" = String, Path, description = "Name")),
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn start(
    State(app): Shared,
    Segment(target): Segment,
    key: Key,
) -> Result<Accepted, Problem> {
    app.run("start", target.clone(), key, (), move |engine, cx| engine.start(cx, &target))
}

/// Ask the guest to turn itself off, and do what the settings say of that; the operation's result is a `PoweredOff`
#[utoipa::path(post, path = "/v1/targets/{target}/stop", tag = "targets", operation_id = "stop",
    params(("target" = String, Path, description = "Name")), request_body = StopRequest,
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn stop(
    State(app): Shared,
    Segment(target): Segment,
    key: Key,
    Body(body): Body<StopRequest>,
) -> Result<Accepted, Problem> {
    let (timeout, kill) = (Duration::from_secs(body.timeout_seconds), body.kill);
    app.run("stop", target.clone(), key, body, move |engine, cx| engine.stop(cx, &target, timeout, kill))
}

/// End a machine's process at once, and do what the settings say of that; the operation's result is a `PoweredOff`
#[utoipa::path(post, path = "/v1/targets/{target}/kill", tag = "targets", operation_id = "kill",
    params(("target" = String, Path, description = "Name")),
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn kill(
    State(app): Shared,
    Segment(target): Segment,
    key: Key,
) -> Result<Accepted, Problem> {
    app.run("kill", target.clone(), key, (), move |engine, cx| engine.kill(cx, &target))
}

/// Say what is to be done with a machine that was powered off and left as it is; the operation's result is a `PoweredOff`
#[utoipa::path(post, path = "/v1/targets/{target}/power-off", tag = "targets", operation_id = "power_off",
    params(("target" = String, Path, description = "Name")), request_body = PowerOffRequest,
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn power_off(
    State(app): Shared,
    Segment(target): Segment,
    key: Key,
    Body(body): Body<PowerOffRequest>,
) -> Result<Accepted, Problem> {
    let then = body.then;
    app.run("power-off", target.clone(), key, body, move |engine, cx| {
        engine.answer_power_off(cx, &target, then)
    })
}

/// Let a machine's CPUs stand still; the operation's result is the machine
#[utoipa::path(post, path = "/v1/targets/{target}/pause", tag = "targets", operation_id = "pause",
    params(("target" = String, Path, description = "Name")),
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn pause(
    State(app): Shared,
    Segment(target): Segment,
    key: Key,
) -> Result<Accepted, Problem> {
    app.run("pause", target.clone(), key, (), move |engine, cx| engine.pause(cx, &target))
}

/// Let a paused machine run on; the operation's result is the machine
#[utoipa::path(post, path = "/v1/targets/{target}/resume", tag = "targets", operation_id = "resume",
    params(("target" = String, Path, description = "Name")),
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn resume(
    State(app): Shared,
    Segment(target): Segment,
    key: Key,
) -> Result<Accepted, Problem> {
    app.run("resume", target.clone(), key, (), move |engine, cx| engine.resume(cx, &target))
}

/// Change settings; the operation's result is the machine
#[utoipa::path(post, path = "/v1/targets/{target}/set", tag = "targets", operation_id = "set",
    params(("target" = String, Path, description = "Name"), DryRun), request_body = SetOptions,
    responses((status = 200, description = "Dry run: what would be discarded", body = DiscardPlan),
        (status = 202, description = "Started", body = OperationView)))]
pub(super) async fn set(
    State(app): Shared,
    Segment(target): Segment,
    Parameters(query): Parameters<DryRun>,
    key: Key,
    Body(options): Body<SetOptions>,
) -> Result<Response, Problem> {
    if query.dry_run {
        let plan = app
            .read(move |engine| Ok(DiscardPlan { discards: engine.set_plan(&target, &options.rm_disks)? }));
        return Ok(plan.await?.into_response());
    }
    let started = app.run("set", target.clone(), key, options.clone(), move |engine, cx| {
        engine.set(cx, &target, options)
    })?;
    Ok(started.into_response())
}

/// Keep a machine's memory on the disk and end its process; the operation's result is the machine
#[utoipa::path(post, path = "/v1/targets/{target}/suspend", tag = "targets", operation_id = "suspend",
    params(("target" = String, Path, description = "Name")),
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn suspend(
    State(app): Shared,
    Segment(target): Segment,
    key: Key,
) -> Result<Accepted, Problem> {
    app.run("suspend", target.clone(), key, (), move |engine, cx| engine.suspend(cx, &target))
}

/// Take a snapshot; the operation's result is the snapshot
#[utoipa::path(post, path = "/v1/targets/{target}/take", tag = "targets", operation_id = "take",
    params(("target" = String, Path, description = "Name")), request_body = TakeOptions,
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn take(
    State(app): Shared,
    Segment(target): Segment,
    key: Key,
    Body(options): Body<TakeOptions>,
) -> Result<Accepted, Problem> {
    let subject = match &options.name {
        Some(name) => format!("{target}@{name}"),
        None => target.clone(),
    };
    app.run("take", subject, key, options.clone(), move |engine, cx| engine.take(cx, &target, options))
}

/// Make another machine of one that may run on; the operation's result is a `Cloned`
#[utoipa::path(post, path = "/v1/targets/{target}/clone", tag = "targets", operation_id = "clone",
    params(("target" = String, Path, description = "Name")), request_body = CloneOptions,
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn clone(
    State(app): Shared,
    Segment(target): Segment,
    key: Key,
    Body(options): Body<CloneOptions>,
) -> Result<Accepted, Problem> {
    let subject = format!("{target} {}", options.name);
    app.run("clone", subject, key, (target.clone(), options.clone()), move |engine, cx| {
        engine.clone_target(cx, &target, &options)
    })
}

/// Make machines that run of one that may run on, all or none; the operation's result is a `Forked`
#[utoipa::path(post, path = "/v1/targets/{target}/fork", tag = "targets", operation_id = "fork",
    params(("target" = String, Path, description = "Name")), request_body = ForkOptions,
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn fork(
    State(app): Shared,
    Segment(target): Segment,
    key: Key,
    Body(options): Body<ForkOptions>,
) -> Result<Accepted, Problem> {
    app.run("fork", target.clone(), key, (target.clone(), options.clone()), move |engine, cx| {
        engine.fork(cx, &target, &options)
    })
}

/// Go to a snapshot; the operation's result is a `GotoReport`
#[utoipa::path(post, path = "/v1/targets/{target}/goto", tag = "targets", operation_id = "goto",
    params(("target" = String, Path, description = "Name"), DryRun), request_body = GotoRequest,
    responses((status = 200, description = "Dry run: what would be discarded", body = DiscardPlan),
        (status = 202, description = "Started", body = OperationView)))]
pub(super) async fn goto(
    State(app): Shared,
    Segment(target): Segment,
    Parameters(query): Parameters<DryRun>,
    key: Key,
    Body(body): Body<GotoRequest>,
) -> Result<Response, Problem> {
    let address = format!("{target}@{}", body.to);
    if query.dry_run {
        let plan = app.read(move |engine| {
            engine.snapshot(&address)?;
            let discards = if body.discard { engine.discard_plan(&target)? } else { None };
            Ok(DiscardPlan { discards })
        });
        return Ok(plan.await?.into_response());
    }
    let (power, discard) = (body.power, body.discard);
    let started = app.run("goto", address.clone(), key, body, move |engine, cx| {
        engine.goto(cx, &address, power, discard)
    })?;
    Ok(started.into_response())
}

/// Go to the parent of here; the operation's result is a `GotoReport`
#[utoipa::path(post, path = "/v1/targets/{target}/back", tag = "targets", operation_id = "back",
    params(("target" = String, Path, description = "Name")),
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn back(
    State(app): Shared,
    Segment(target): Segment,
    key: Key,
) -> Result<Accepted, Problem> {
    app.run("back", target.clone(), key, (), move |engine, cx| engine.back(cx, &target))
}

/// Make a machine refuse `rm`; the operation has no result
#[utoipa::path(post, path = "/v1/targets/{target}/protect", tag = "targets", operation_id = "protect",
    params(("target" = String, Path, description = "Name")),
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn protect(
    State(app): Shared,
    Segment(target): Segment,
    key: Key,
) -> Result<Accepted, Problem> {
    app.run("protect", target.clone(), key, (), move |engine, cx| engine.protect(cx, &target, true))
}

/// Let a machine be removed again; the operation has no result
#[utoipa::path(post, path = "/v1/targets/{target}/unprotect", tag = "targets", operation_id = "unprotect",
    params(("target" = String, Path, description = "Name")),
    responses((status = 202, description = "Started", body = OperationView)))]
pub(super) async fn unprotect(
    State(app): Shared,
    Segment(target): Segment,
    key: Key,
) -> Result<Accepted, Problem> {
    app.run("unprotect", target.clone(), key, (), move |engine, cx| engine.protect(cx, &target, false))
}
