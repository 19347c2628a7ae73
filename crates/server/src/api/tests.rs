//! What HTTP alone decides: problem documents, limits, the checked-in description.

use axum::body::{Body as HttpBody, to_bytes};
use axum::http::Request as HttpRequest;
use axum::routing::post;
use serde_json::Value;
use tower::ServiceExt;

use super::extract::{Body, Key, Parameters, Segment};
use super::*;

/// A router with the guard of the real one, and no engine behind it.
fn plumbing() -> Router {
    async fn stop(
        Segment(target): Segment,
        Parameters(dry): Parameters<extract::DryRun>,
        key: Key,
        Body(body): Body<StopRequest>,
    ) -> String {
        format!("{target} {} {:?} {}", dry.dry_run, key.0, body.timeout_seconds)
    }
    guard(Router::new().route("/v1/targets/{target}/stop", post(stop)))
}

async fn answer(request: HttpRequest<HttpBody>) -> (StatusCode, String, Vec<u8>) {
    let response = plumbing().oneshot(request).await.expect("never fails");
    let status = response.status();
    let kind = response.headers().get(header::CONTENT_TYPE).map(|v| v.to_str().unwrap().to_owned());
    let bytes = to_bytes(response.into_body(), 1 << 20).await.expect("a body");
    (status, kind.unwrap_or_default(), bytes.to_vec())
}

async fn problem(request: HttpRequest<HttpBody>) -> (u16, Problem) {
    let (status, kind, bytes) = answer(request).await;
    assert_eq!(kind, problem::MEDIA_TYPE);
    let problem: Problem = serde_json::from_slice(&bytes).expect("a problem document");
    assert_eq!(problem.status, status.as_u16());
    (problem.status, problem)
}

fn stop() -> axum::http::request::Builder {
    HttpRequest::post("/v1/targets/shop%2Fdb1/stop?dry_run=true").header("content-type", "application/json")
}

#[tokio::test]
async fn a_good_request_reaches_its_handler() {
    let request = stop().header("idempotency-key", "k1").body(r#"{"timeout_seconds": 5}"#.into()).unwrap();
    let (status, _, body) = answer(request).await;
    assert_eq!((status, body.as_slice()), (StatusCode::OK, br#"shop/db1 true Some("k1") 5"#.as_slice()));
    let (_, _, body) = answer(stop().body(HttpBody::empty()).unwrap()).await;
    assert_eq!(body, b"shop/db1 true None 60", "an empty body stands for the defaults");
}

#[tokio::test]
async fn an_unknown_path_is_a_problem() {
    let (status, problem) = problem(HttpRequest::get("/v2/x").body(HttpBody::empty()).unwrap()).await;
    assert_eq!((status, problem.code), (404, Code::NotFound));
    assert_eq!(problem.detail, "no such path: /v2/x");
}

#[tokio::test]
async fn a_wrong_method_is_a_problem() {
    let request = HttpRequest::delete("/v1/targets/web/stop").body(HttpBody::empty()).unwrap();
    assert_eq!(problem(request).await.0, 405);
}

#[tokio::test]
async fn bad_json_is_a_problem_with_its_place() {
    let (status, problem) = problem(stop().body(r#"{"timeout_seconds": -1}"#.into()).unwrap()).await;
    assert_eq!((status, problem.code), (400, Code::Usage));
    assert!(problem.cause.first().expect("a cause").contains("line 1"), "{problem:?}");
}

#[tokio::test]
async fn a_misspelt_field_is_a_problem() {
    let (_, problem) = problem(stop().body(r#"{"kil": true}"#.into()).unwrap()).await;
    assert!(problem.cause.first().expect("a cause").contains("kil"), "{problem:?}");
}

#[tokio::test]
async fn too_large_a_body_is_a_problem() {
    assert_eq!(problem(stop().body(vec![b' '; BODY_LIMIT + 1].into()).unwrap()).await.0, 413);
}

#[tokio::test]
async fn another_media_type_is_a_problem() {
    let request = HttpRequest::post("/v1/targets/web/stop").body("{}".into()).unwrap();
    assert_eq!(problem(request).await.0, 415);
}

#[tokio::test]
async fn a_bad_query_and_a_bad_key_are_problems() {
    let request = HttpRequest::post("/v1/targets/web/stop?dry=1").body(HttpBody::empty()).unwrap();
    assert_eq!(problem(request).await.0, 400);
    let request = stop().header("idempotency-key", "k".repeat(256)).body(HttpBody::empty()).unwrap();
    assert_eq!(problem(request).await.0, 400);
}

#[test]
fn the_checked_in_description_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");
    let mut now = openapi().to_pretty_json().expect("JSON");
    now.push('\n');
    if std::env::var_os("SPINNEY_REFRESH").is_some() {
        std::fs::write(path, &now).expect("docs/openapi.json can be written");
    }
    let then = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        now == then,
        "docs/openapi.json is stale; refresh it with\n  SPINNEY_REFRESH=1 cargo test -p spinney-server description\n\
         and look at what changed for callers"
    );
}

#[test]
fn every_operation_of_the_description_names_problems_and_has_one_id() {
    let document = serde_json::to_value(openapi()).expect("JSON");
    assert_eq!(document["openapi"], "3.1.0");
    let mut ids = Vec::new();
    for methods in document["paths"].as_object().expect("paths").values() {
        for operation in methods.as_object().expect("methods").values().filter(|value| value.is_object()) {
            assert!(operation["responses"]["default"] != Value::Null, "{operation}");
            ids.push(operation["operationId"].as_str().expect("an id").to_owned());
        }
    }
    let count = ids.len();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), count);
    assert!(count > 25);
}
