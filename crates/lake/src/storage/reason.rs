//! What an error of a store means, and a reason that may be shown.
//!
//! The texts of `object_store` and of the stores name addresses, key ids and what was signed, so none of them is passed
//! on: a reason is a status, the store's own error code, or a kind of failure of the connection.

use std::error::Error as StdError;
use std::io;

use object_store::Error;
use object_store::client::{HttpError, HttpErrorKind};

/// What an error means for who called the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    Missing,
    Exists,
    /// A condition of the call does not hold (any more).
    Changed,
    /// The store does not know this kind of call.
    Unsupported,
    /// The same call may succeed in a moment.
    Transient,
    Refused,
}

/// The meaning of a store's error, with its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explained {
    pub meaning: Meaning,
    pub reason: String,
}

/// Explains an error of a store.
pub fn explain(error: &Error) -> Explained {
    let answer = Answer::of(error);
    let code = answer.code.as_deref();
    let no_bucket = matches!(code, Some("NoSuchBucket" | "ContainerNotFound"));
    let meaning = match error {
        _ if no_bucket => Meaning::Refused,
        // Of an upload in parts that the store does not know (any more).
        Error::NotFound { .. } => Meaning::Missing,
        // Two conditional writes at a time: either may win.
        Error::AlreadyExists { .. } if code == Some("ConditionalRequestConflict") => {
            Meaning::Transient
        }
        Error::AlreadyExists { .. } => Meaning::Exists,
        Error::Precondition { .. } | Error::NotModified { .. } => Meaning::Changed,
        Error::NotSupported { .. } | Error::NotImplemented { .. } => Meaning::Unsupported,
        Error::PermissionDenied { .. }
        | Error::Unauthenticated { .. }
        | Error::InvalidPath { .. } => Meaning::Refused,
        _ => answer.meaning(),
    };
    let reason = if no_bucket {
        "the bucket does not exist".to_owned()
    } else {
        match error {
            Error::NotFound { .. } => "it is missing".to_owned(),
            Error::AlreadyExists { .. } => "it exists already".to_owned(),
            Error::Precondition { .. } | Error::NotModified { .. } => {
                "it was changed meanwhile".to_owned()
            }
            Error::NotSupported { .. } | Error::NotImplemented { .. } => {
                "the store does not support the request".to_owned()
            }
            Error::InvalidPath { .. } => "its name is not valid".to_owned(),
            Error::PermissionDenied { .. } => with_code("access denied", code),
            Error::Unauthenticated { .. } => with_code("the credentials were refused", code),
            _ => answer.reason(),
        }
    };
    Explained { meaning, reason }
}

fn with_code(text: &str, code: Option<&str>) -> String {
    match code {
        Some(code) => format!("{text} ({code})"),
        None => text.to_owned(),
    }
}

/// What can be known of a failed request.
struct Answer {
    status: Option<u16>,
    code: Option<String>,
    http: Option<HttpErrorKind>,
    io: Option<io::ErrorKind>,
    /// It was the machine's own credentials that were asked for.
    of_metadata: bool,
}

impl Answer {
    fn of(error: &Error) -> Self {
        let mut answer = Self {
            status: None,
            code: None,
            http: None,
            io: None,
            of_metadata: false,
        };
        let mut next: Option<&(dyn StdError + 'static)> = Some(error);
        while let Some(cause) = next {
            if let Some(http) = cause.downcast_ref::<HttpError>() {
                answer.http.get_or_insert(http.kind());
            }
            if let Some(io) = cause.downcast_ref::<io::Error>() {
                answer.io = Some(io.kind());
            }
            let text = cause.to_string();
            answer.status = answer.status.or_else(|| status(&text));
            answer.code = answer.code.or_else(|| code(&text));
            answer.of_metadata |= ["169.254.", "metadata.google.internal", "/metadata/identity"]
                .iter()
                .any(|place| text.contains(place));
            next = cause.source();
        }
        answer
    }

    fn meaning(&self) -> Meaning {
        if matches!(
            self.code.as_deref(),
            Some("SlowDown" | "InternalError" | "RequestTimeout" | "ServiceUnavailable")
        ) {
            return Meaning::Transient;
        }
        match self.status {
            Some(501) => Meaning::Unsupported,
            Some(408 | 429 | 500..) | None => Meaning::Transient,
            Some(412) => Meaning::Changed,
            Some(_) => Meaning::Refused,
        }
    }

    fn reason(&self) -> String {
        if self.of_metadata {
            return "there are no credentials: neither in the user mapping of the server's owner nor on this machine".to_owned();
        }
        if let Some(status) = self.status {
            return with_code(
                &format!("the store answered {status}"),
                self.code.as_deref(),
            );
        }
        match (self.http, self.io) {
            (Some(HttpErrorKind::Timeout), _) => "the request timed out".to_owned(),
            (
                Some(HttpErrorKind::Connect),
                Some(io::ErrorKind::Other | io::ErrorKind::InvalidData),
            ) => "could not connect, or its certificate is not trusted".to_owned(),
            (Some(HttpErrorKind::Connect), Some(io)) => format!("could not connect: {io}"),
            (Some(HttpErrorKind::Connect), None) => "could not connect".to_owned(),
            (Some(HttpErrorKind::Request | HttpErrorKind::Interrupted), _) => {
                "the connection was closed".to_owned()
            }
            (Some(HttpErrorKind::Decode), _) => "the answer was cut short".to_owned(),
            (_, Some(io)) => io.to_string(),
            _ => with_code("the store did not answer as expected", self.code.as_deref()),
        }
    }
}

/// The status in the text of a failed request.
fn status(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

/// The error code in a store's XML.
fn code(text: &str) -> Option<String> {
    let (_, rest) = text.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    let plain =
        !code.is_empty() && code.len() <= 64 && code.bytes().all(|b| b.is_ascii_alphanumeric());
    plain.then(|| code.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(text: &str) -> Explained {
        explain(&Error::Generic {
            store: "S3",
            source: text.to_owned().into(),
        })
    }

    #[test]
    fn reasons_have_no_secrets() {
        let denied = explain(&Error::PermissionDenied {
            path: "p".into(),
            source: "Error performing GET http://h/p in 1ms - Server returned non-2xx status code: 403 Forbidden: \
                     <Error><Code>InvalidAccessKeyId</Code><AWSAccessKeyId>hunter2</AWSAccessKeyId></Error>"
                .into(),
        });
        assert_eq!(denied.reason, "access denied (InvalidAccessKeyId)");
        assert_eq!(denied.meaning, Meaning::Refused);
        let odd = generic("status code: 400 Bad Request: <Code>hunter 2</Code>");
        assert_eq!(odd.reason, "the store answered 400");
        assert_eq!(odd.meaning, Meaning::Refused);
        let metadata =
            generic("Error performing PUT http://169.254.169.254/latest/api/token in 1s");
        assert!(metadata.reason.starts_with("there are no credentials"));
    }

    #[test]
    fn what_may_pass_is_told_from_what_stays() {
        let meaning = |text| generic(text).meaning;
        assert_eq!(
            meaning("status code: 503 Service Unavailable: <Code>SlowDown</Code>"),
            Meaning::Transient
        );
        assert_eq!(
            meaning("status code: 501 Not Implemented"),
            Meaning::Unsupported
        );
        assert_eq!(
            meaning("code: SlowDown <Code>SlowDown</Code>"),
            Meaning::Transient
        );
        assert_eq!(meaning("invalid list response"), Meaning::Transient);
        let missing = Error::NotFound {
            path: "p".into(),
            source: "status code: 404 Not Found: <Code>NoSuchBucket</Code>".into(),
        };
        assert_eq!(explain(&missing).reason, "the bucket does not exist");
        assert_eq!(explain(&missing).meaning, Meaning::Refused);
    }
}
