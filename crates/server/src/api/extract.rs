//! Bodies, path segments, queries and keys of requests; whatever is wrong with them becomes a [`Problem`].

use ::snapshots::Code;
use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use utoipa::IntoParams;

use crate::Problem;

/// Longest `Idempotency-Key` in bytes.
const KEY_LIMIT: usize = 255;

/// A JSON body; an empty one stands for `{}`.
#[derive(Debug)]
pub(super) struct Body<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let media_type = request.headers().get(header::CONTENT_TYPE).cloned();
        let bytes = Bytes::from_request(request, state)
            .await
            .map_err(|error| Problem::new(Code::Usage, error.body_text()).status(error.status()))?;
        if bytes.is_empty() {
            return parse(b"{}");
        }
        let media_type = media_type.as_ref().and_then(|value| value.to_str().ok()).unwrap_or_default();
        if media_type.split(';').next().map(str::trim) != Some("application/json") {
            return Err(Problem::new(Code::Usage, format!("the body is not JSON but {media_type:?}"))
                .hint("send it with Content-Type: application/json")
                .status(StatusCode::UNSUPPORTED_MEDIA_TYPE));
        }
        parse(&bytes)
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<Body<T>, Problem> {
    let value = serde_json::from_slice(bytes).map_err(|error| {
        Problem::new(Code::Usage, "the body is not what is expected here").because(&error)
    })?;
    Ok(Body(value))
}

/// The one variable segment of a path, decoded.
#[derive(Debug)]
pub(super) struct Segment(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path(text) = Path::from_request_parts(parts, state)
            .await
            .map_err(|error| Problem::new(Code::Usage, error.body_text()).status(error.status()))?;
        Ok(Self(text))
    }
}

/// The query, as a struct.
#[derive(Debug)]
pub(super) struct Parameters<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Parameters<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Query(value) = Query::from_request_parts(parts, state)
            .await
            .map_err(|error| Problem::new(Code::Usage, error.body_text()).status(error.status()))?;
        Ok(Self(value))
    }
}

/// The caller's `Idempotency-Key`, if any.
#[derive(Debug)]
pub(super) struct Key(pub(super) Option<String>);

impl<S: Send + Sync> FromRequestParts<S> for Key {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let Some(value) = parts.headers.get("idempotency-key") else { return Ok(Self(None)) };
        match value.to_str() {
            Ok(key) if !key.is_empty() && key.len() <= KEY_LIMIT => Ok(Self(Some(key.to_owned()))),
            _ => Err(Problem::new(
                Code::Usage,
                format!("an Idempotency-Key is 1 to {KEY_LIMIT} printable ASCII characters"),
            )),
        }
    }
}

/// Query of what can be planned without being done.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct DryRun {
    /// Answer 200 with the plan, and do nothing.
    pub(super) dry_run: bool,
}

/// Query of `rm`.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Remove {
    /// Answer 200 with the plan, and do nothing.
    pub(super) dry_run: bool,
    /// Remove everything below it too.
    pub(super) tree: bool,
}
