//! The API under `/v1`: routes, the document that describes them, and what every handler shares.
//!
//! A handler that changes something hands a closure to [`App::run`] and answers 202 with the operation's place; one
//! that reads goes through [`App::read`]. Both keep the engine's blocking calls off the runtime's threads.

mod daemon;
mod events;
mod extract;
mod groups;
mod operations;
mod snapshots;
mod store;
mod targets;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use ::snapshots::{Code, Context, Engine, Settings};
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::watch;
use utoipa::OpenApi;
use utoipa::openapi::{Content, Ref, RefOr, ResponseBuilder};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::operations::{OperationView, Operations, Request};
use crate::{Problem, problem};

pub use daemon::Version;
pub use events::EVENT_OPERATION;
pub use groups::CreateGroupRequest;
pub use store::{FsckRequest, GcRequest, MountRequest, UndoRequest};
pub use targets::{CreateRequest, DiscardPlan, GotoRequest, PowerOffRequest, StopRequest};

/// Largest request body in bytes.
const BODY_LIMIT: usize = 1 << 20;

/// What handlers work with.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) engine: Arc<Engine>,
    pub(crate) settings: Settings,
    pub(crate) operations: Arc<Operations>,
    pub(crate) started: Timestamp,
    /// What people should know of what the start found.
    pub(crate) notes: Vec<String>,
    /// Becomes true when the daemon shall end.
    pub(crate) stop: watch::Sender<bool>,
}

/// The engine as handlers take it.
type Shared = State<Arc<App>>;

impl App {
    pub(crate) fn new(engine: Arc<Engine>, settings: Settings, notes: Vec<String>) -> Arc<Self> {
        let operations = Arc::default();
        Arc::new(Self {
            engine,
            settings,
            operations,
            started: Timestamp::now(),
            notes,
            stop: watch::channel(false).0,
        })
    }

    /// Answers with what a blocking call reads.
    async fn read<T, F>(&self, call: F) -> Result<Json<T>, Problem>
    where
        T: Send + 'static,
        F: FnOnce(&Engine) -> ::snapshots::Result<T> + Send + 'static,
    {
        let engine = Arc::clone(&self.engine);
        match tokio::task::spawn_blocking(move || call(&engine)).await {
            Ok(result) => Ok(Json(result?)),
            Err(error) => {
                tracing::error!(%error, "a reading request died");
                Err(Problem::new(Code::Failed, "the request ran into a mistake in Spinney")
                    .hint("daemon.log in the state folder says where; please report it"))
            }
        }
    }

    /// Starts an operation and answers with its place.
    fn run<T, F>(
        &self,
        kind: &'static str,
        subject: impl Into<String>,
        key: extract::Key,
        parameters: impl Serialize,
        call: F,
    ) -> Result<Accepted, Problem>
    where
        T: Serialize,
        F: FnOnce(&Engine, &Context) -> ::snapshots::Result<T> + Send + 'static,
    {
        let parameters = serde_json::to_value(parameters)
            .map_err(|error| Problem::new(Code::Usage, "cannot read the parameters").because(&error))?;
        let request = Request { kind, subject: subject.into(), key: key.0, parameters };
        let engine = Arc::clone(&self.engine);
        let view = self.operations.start(request, move |cx| Ok(call(&engine, cx)?))?;
        Ok(Accepted(view))
    }

    /// Starts what is to be done with a machine, by its id, that was powered off by its guest.
    pub(crate) fn see_to_power_off(&self, target: String, name: String) -> Result<OperationView, Problem> {
        let request = Request { kind: "power-off", subject: name, key: None, parameters: Value::Null };
        let engine = Arc::clone(&self.engine);
        self.operations.start(request, move |cx| Ok(engine.see_to_power_off(cx, &target)?))
    }
}

/// Answer 202: the operation has started, and this is where to ask for it.
#[derive(Debug)]
struct Accepted(OperationView);

impl IntoResponse for Accepted {
    fn into_response(self) -> Response {
        let location = HeaderValue::try_from(format!("/v1/operations/{}", self.0.id));
        let mut response = (StatusCode::ACCEPTED, Json(self.0)).into_response();
        if let Ok(location) = location {
            response.headers_mut().insert(header::LOCATION, location);
        }
        response
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Spinney",
        description = "Snapshots of QEMU machines. Bytes are integers, times are RFC 3339 in UTC. A request that \
            changes something answers 202 with the place of its operation; send an `Idempotency-Key` with it, and \
            a repetition finds the same operation. Errors are problem documents (RFC 9457).",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0")
    ),
    components(schemas(Problem)),
    tags(
        (name = "targets", description = "Machines and what can be done with them"),
        (name = "snapshots", description = "One snapshot, by its address"),
        (name = "groups", description = "Circles of trust: what is stored is shared inside one and never across"),
        (name = "store", description = "Space, garbage, damage"),
        (name = "operations", description = "What is under way, what was done, taking it back"),
        (name = "daemon", description = "The daemon itself")
    )
)]
struct Description;

/// Routes with their description.
fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(targets::list, targets::create))
        .routes(routes!(targets::show, targets::edit, targets::rm))
        .routes(routes!(targets::tree))
        .routes(routes!(targets::start))
        .routes(routes!(targets::stop))
        .routes(routes!(targets::kill))
        .routes(routes!(targets::power_off))
        .routes(routes!(targets::pause))
        .routes(routes!(targets::resume))
        .routes(routes!(targets::set))
        .routes(routes!(targets::suspend))
        .routes(routes!(targets::take))
        .routes(routes!(targets::goto))
        .routes(routes!(targets::clone))
        .routes(routes!(targets::fork))
        .routes(routes!(targets::back))
        .routes(routes!(targets::protect))
        .routes(routes!(targets::unprotect))
        .routes(routes!(snapshots::show, snapshots::edit, snapshots::rm))
        .routes(routes!(snapshots::clone))
        .routes(routes!(snapshots::fork))
        .routes(routes!(snapshots::protect))
        .routes(routes!(snapshots::unprotect))
        .routes(routes!(groups::list, groups::create))
        .routes(routes!(groups::show, groups::rm))
        .routes(routes!(store::du))
        .routes(routes!(store::gc))
        .routes(routes!(store::fsck))
        .routes(routes!(store::mount))
        .routes(routes!(store::undo))
        .routes(routes!(operations::list))
        .routes(routes!(operations::show, operations::cancel))
        .routes(routes!(events::events))
        .routes(routes!(daemon::doctor))
        .routes(routes!(daemon::version))
        .routes(routes!(daemon::shutdown))
        .routes(routes!(daemon::openapi))
}

/// The OpenAPI document. It is checked in as `docs/openapi.json`.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let mut document = routes().into_openapi();
    let problem = ResponseBuilder::new()
        .description("What went wrong")
        .content(problem::MEDIA_TYPE, Content::new(Some(Ref::from_schema_name("Problem"))))
        .build();
    let components = document.components.get_or_insert_default();
    components.responses.insert("Problem".to_owned(), RefOr::T(problem));
    for item in document.paths.paths.values_mut() {
        let operations = [&mut item.get, &mut item.post, &mut item.patch, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            let reference = RefOr::Ref(Ref::from_response_name("Problem"));
            operation.responses.responses.insert("default".to_owned(), reference);
        }
    }
    document
}

/// Everything that is served.
pub(crate) fn router(app: Arc<App>) -> Router {
    let (router, _) = routes().split_for_parts();
    guard(router).with_state(app)
}

/// Problem documents for what no handler answers, and a limit to what is read.
fn guard<S: Clone + Send + Sync + 'static>(router: Router<S>) -> Router<S> {
    router
        .fallback(no_such_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
}

async fn no_such_path(uri: Uri) -> Problem {
    Problem::new(Code::NotFound, format!("no such path: {}", uri.path()))
        .hint("GET /v1/openapi.json lists them")
}

async fn wrong_method(method: Method, uri: Uri) -> Problem {
    Problem::new(Code::Usage, format!("{method} means nothing at {}", uri.path()))
        .hint("GET /v1/openapi.json lists what does")
        .status(StatusCode::METHOD_NOT_ALLOWED)
}
