//! Server-sent events: every start, end and step of every operation.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::stream::{self, Stream};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use super::{App, Shared};
use crate::operations::OperationView;

/// Name of the event that carries an operation.
pub const EVENT_OPERATION: &str = "operation";

/// How often progress is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Events that may wait for a slow reader before it holds up its own stream.
const BACKLOG: usize = 64;

/// Changes of operations, as server-sent events
#[utoipa::path(get, path = "/v1/events", tag = "operations", operation_id = "events",
    responses((status = 200, content_type = "text/event-stream", body = OperationView,
        description = "Event `operation`, its data an operation: first those that run, then every start, step and end")))]
pub(super) async fn events(State(app): Shared) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let (send, receive) = mpsc::channel(BACKLOG);
    tokio::spawn(watch(app, send));
    let stream = stream::unfold(receive, |mut receive| async move {
        let view: OperationView = receive.recv().await?;
        let event = Event::default().event(EVENT_OPERATION).id(view.id.clone()).json_data(view);
        // An operation always has a JSON form; were it otherwise, the reader gets a comment and goes on.
        Some((Ok(event.unwrap_or_else(|_| Event::default().comment("unreadable"))), receive))
    });
    Sse::new(stream).keep_alive(KeepAlive::default())
}

/// Sends what changes until the reader or the daemon goes away.
async fn watch(app: Arc<App>, send: mpsc::Sender<OperationView>) {
    let mut changes = app.operations.subscribe();
    let mut stop = app.stop.subscribe();
    let mut tick = interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut shown: HashMap<String, OperationView> = HashMap::new();
    loop {
        let changed = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return,
            () = send.closed() => return,
            _ = tick.tick() => app.operations.running(),
            change = changes.recv() => match change {
                Ok(view) => vec![view],
                // Too slow: what was missed and still runs is found at the next tick.
                Err(RecvError::Lagged(_)) => Vec::new(),
                Err(RecvError::Closed) => return,
            },
        };
        for view in changed {
            if shown.get(&view.id) == Some(&view) {
                continue;
            }
            if view.ended.is_some() {
                shown.remove(&view.id);
            } else {
                shown.insert(view.id.clone(), view.clone());
            }
            if send.send(view).await.is_err() {
                return;
            }
        }
    }
}
