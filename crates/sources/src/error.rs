//! What can go wrong with a source, as Postgres reports it.

use rakam_event::error::EventError;
use rakam_files::FilesError;
use rakam_lake::error::LakeError;

/// An error of a source as a whole, or of a call. What is wrong with one split only is a [`StopReason`], what is wrong with
/// one record only a dead letter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    #[error("{message}")]
    Option { message: String, hint: String },
    /// A kind of service that there is nothing for.
    #[error("{message}")]
    Unsupported { message: String, hint: &'static str },
    /// The service did not answer as it should; it may later.
    #[error("could not {action}: {reason}")]
    Unreachable {
        action: &'static str,
        reason: String,
    },
    /// The service answers, and does not let us.
    #[error("could not {action}: {reason}")]
    Refused {
        action: &'static str,
        reason: String,
    },
    /// There is no such stream, or none of the topics.
    #[error("{what} \"{name}\" does not exist")]
    Missing { what: &'static str, name: String },
    /// No collection can have the name that an option gives.
    #[error("{0}")]
    Collection(EventError),
    /// A call that does not fit what the source is.
    #[error("{0}")]
    Misuse(String),
}

impl SourceError {
    pub(crate) fn option(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Option {
            message: message.into(),
            hint: hint.into(),
        }
    }

    /// The SQLSTATE that clients see.
    pub fn sqlstate(&self) -> &'static str {
        match self {
            Self::Option { .. } => "22023",
            Self::Unsupported { .. } => "0A000",
            Self::Unreachable { .. } | Self::Refused { .. } => "58030",
            Self::Missing { .. } => "58P01",
            Self::Collection(error) => error.sqlstate(),
            Self::Misuse(_) => "XX000",
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Option { hint, .. } => hint.clone(),
            Self::Unsupported { hint, .. } => (*hint).to_owned(),
            Self::Unreachable { .. } => {
                "Check that the service can be reached from the database server; reading goes on by itself then."
                    .to_owned()
            }
            Self::Refused { .. } => {
                "Check the options of the server, the user mapping of its owner, and what the service allows."
                    .to_owned()
            }
            Self::Collection(error) => return error.hint().map(Into::into),
            Self::Missing { .. } | Self::Misuse(_) => return None,
        })
    }

    /// Whether the same call may succeed later without anybody changing the source. A refusal is tried again as well: what
    /// the service allows is changed there, not here.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Refused { .. } | Self::Missing { .. } => true,
            Self::Option { .. }
            | Self::Unsupported { .. }
            | Self::Collection(_)
            | Self::Misuse(_) => false,
        }
    }
}

impl From<LakeError> for SourceError {
    fn from(error: LakeError) -> Self {
        match error {
            LakeError::Missing { path } => Self::Missing {
                what: "object",
                name: path,
            },
            LakeError::InvalidPath { .. }
            | LakeError::InvalidOption { .. }
            | LakeError::InvalidUrl { .. }
            | LakeError::Unsupported { .. } => {
                let hint = error.hint().unwrap_or_default();
                Self::option(error.to_string(), hint)
            }
            error => Self::Unreachable {
                action: "read the storage",
                reason: error.to_string(),
            },
        }
    }
}

/// Why a split is read no further until somebody decides (`rakam.seek_source`).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StopReason {
    #[error("records from {next} to before {oldest} were deleted before they were read")]
    Truncated { next: i64, oldest: i64 },
    #[error("it ends at {end}, before {next}: it was truncated or made anew")]
    Shorter { next: i64, end: i64 },
    #[error("the record before {next} is another one than was read: it was made anew")]
    Recreated { next: i64 },
    #[error("it does not exist any more")]
    Gone,
    #[error("its stream has no record \"{0}\": it was made anew")]
    UnknownRecord(String),
    #[error("records from \"{0}\" on may have been deleted before they were read")]
    Trimmed(String),
    #[error("the object has changed since it was found")]
    Changed,
    #[error("{0}")]
    Unreadable(String),
}

impl From<FilesError> for StopReason {
    fn from(error: FilesError) -> Self {
        Self::Unreadable(error.to_string())
    }
}
