//! The one document in which errors leave the daemon (RFC 9457), and the one shape in which a client has them.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use snapshots::{Code, Error};
use utoipa::ToSchema;

/// Media type of a problem document.
pub(crate) const MEDIA_TYPE: &str = "application/problem+json";

/// What went wrong: one sentence, its causes, and what can be done about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// `urn:spinney:problem:` and the code.
    #[serde(rename = "type")]
    pub kind: String,
    /// The class in words; the same for every problem of a code.
    #[schema(value_type = String)]
    pub title: Box<str>,
    /// HTTP status.
    pub status: u16,
    /// The sentence that names the thing.
    pub detail: String,
    /// The class, for programs.
    pub code: Code,
    /// Causes below the sentence, outermost first.
    #[serde(default)]
    pub cause: Vec<String>,
    /// What the reader can do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Problem {
    /// A problem of a class, with its sentence. The status follows from the class.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        let (status, title) = class(code);
        Self {
            kind: format!("urn:spinney:problem:{}", word(code)),
            title: title.into(),
            status,
            detail: detail.into(),
            code,
            cause: Vec::new(),
            hint: None,
        }
    }

    /// Adds what the reader can do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds a cause below those that are there, and what caused it in turn.
    #[must_use]
    pub fn because(mut self, error: &dyn std::error::Error) -> Self {
        let mut next = Some(error);
        while let Some(error) = next {
            self.cause.push(error.to_string());
            next = error.source();
        }
        self
    }

    /// The same problem under an HTTP status of its own (405, 413), where the class alone says less.
    #[must_use]
    pub fn status(mut self, status: StatusCode) -> Self {
        self.status = status.as_u16();
        self
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let mut problem = Self::new(error.code(), error.to_string());
        problem.cause = error.causes();
        problem.hint = error.hint_text().map(str::to_owned);
        problem
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(self)).into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
        response
    }
}

/// HTTP status and title of a class.
fn class(code: Code) -> (u16, &'static str) {
    match code {
        Code::Failed => (500, "Failed"),
        Code::Usage => (400, "The request makes no sense"),
        Code::NotFound => (404, "Not found"),
        Code::Refused => (409, "Refused"),
        Code::Precondition => (422, "Something needed is missing"),
        Code::Damaged => (500, "Stored data is damaged"),
        Code::NoSpace => (507, "No space"),
        Code::NotPermitted => (403, "Not permitted"),
        Code::TimedOut => (504, "Timed out"),
        // Not in the registry of statuses; widely used for "the client closed the request".
        Code::Interrupted => (499, "Cancelled"),
    }
}

/// The class as programs read it.
fn word(code: Code) -> &'static str {
    match code {
        Code::Failed => "failed",
        Code::Usage => "usage",
        Code::NotFound => "not_found",
        Code::Refused => "refused",
        Code::Precondition => "precondition",
        Code::Damaged => "damaged",
        Code::NoSpace => "no_space",
        Code::NotPermitted => "not_permitted",
        Code::TimedOut => "timed_out",
        Code::Interrupted => "interrupted",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_error_keeps_its_causes_and_hint() {
        let cause = std::io::Error::other("disk on fire");
        let error =
            Error::new(Code::NoSpace, "cannot save web").because(cause).hint("run `spinney gc --now`");
        let problem = Problem::from(error);
        assert_eq!((problem.status, problem.kind.as_str()), (507, "urn:spinney:problem:no_space"));
        assert_eq!(problem.cause, ["disk on fire"]);
        assert_eq!(problem.hint.as_deref(), Some("run `spinney gc --now`"));
    }

    #[test]
    fn the_type_and_the_code_are_the_same_word() {
        let problem = Problem::new(Code::NotFound, "no machine web");
        let json = serde_json::to_value(&problem).unwrap();
        assert_eq!(json["type"], "urn:spinney:problem:not_found");
        assert_eq!(json["code"], "not_found");
    }
}
