//! What can go wrong in the lake, as Postgres reports it.

use std::error::Error as StdError;
use std::io;

use arrow::error::ArrowError;
use parquet::errors::ParquetError;

use crate::storage::reason::{Explained, Meaning, explain};

/// An error of the lake. Messages are in Postgres' style; [`LakeError::sqlstate`] and [`LakeError::hint`] complete them.
#[derive(Debug, thiserror::Error)]
pub enum LakeError {
    /// The store did not do what was asked; it may do so later. Without a path it is the storage as a whole.
    #[error("could not {action} {}: {reason}", named(.path))]
    Unreachable {
        action: &'static str,
        path: String,
        reason: String,
    },
    #[error("could not {action} \"{path}\": no space left on device")]
    DiskFull { action: &'static str, path: String },
    /// An object that the manifest names is not there.
    #[error("object \"{path}\" is missing")]
    Missing { path: String },
    /// An object of somebody else is not what it was when it was found.
    #[error("object \"{path}\" was changed while it was read")]
    Changed { path: String },
    /// Objects are immutable: a name is written once.
    #[error("object \"{path}\" exists already")]
    Exists { path: String },
    #[error("{what} is corrupt: {reason}")]
    Corrupt { what: &'static str, reason: String },
    #[error("{message}")]
    Unsupported { message: String, hint: String },
    #[error("{message}")]
    InvalidOption { message: String, hint: String },
    #[error("invalid storage url: {reason}")]
    InvalidUrl { reason: String },
    #[error("invalid object path \"{path}\"")]
    InvalidPath { path: String },
    #[error("{what} is too large: {bytes} bytes, limit {limit}")]
    TooLarge {
        what: &'static str,
        bytes: usize,
        limit: usize,
    },
    /// Rows that do not fit what they are written to: a fault of the caller.
    #[error("could not write {what}: {reason}")]
    Encode { what: &'static str, reason: String },
}

impl LakeError {
    /// The SQLSTATE that clients see.
    pub fn sqlstate(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } | Self::Changed { .. } => "58030",
            Self::DiskFull { .. } => "53100",
            Self::Missing { .. } => "58P01",
            Self::Exists { .. } => "58P02",
            Self::Corrupt { .. } => "XX001",
            Self::Unsupported { .. } => "0A000",
            Self::InvalidOption { .. } | Self::InvalidUrl { .. } | Self::InvalidPath { .. } => {
                "22023"
            }
            Self::TooLarge { .. } => "54000",
            Self::Encode { .. } => "XX000",
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Unreachable { .. } => {
                "Check that the storage can be reached and that the server may read and write it; collecting goes on meanwhile."
                    .to_owned()
            }
            Self::Changed { .. } => "Try again: it is read as it is then.".to_owned(),
            Self::DiskFull { .. } => "Free space on the storage; events are kept in the hot tier until then.".to_owned(),
            Self::Missing { .. } => {
                "Try again; if the object stays away, see what rakam.check_storage() lists.".to_owned()
            }
            Self::Corrupt { .. } => "See what rakam.check_storage() lists, and restore the object from a backup.".to_owned(),
            Self::Unsupported { hint, .. } | Self::InvalidOption { hint, .. } => hint.clone(),
            Self::InvalidUrl { .. } => {
                "A storage url looks like s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file:///var/lib/lake."
                    .to_owned()
            }
            Self::Exists { .. } | Self::InvalidPath { .. } | Self::TooLarge { .. } | Self::Encode { .. } => return None,
        })
    }

    /// Whether the same call may succeed later without anybody changing it.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. }
                | Self::DiskFull { .. }
                | Self::Missing { .. }
                | Self::Changed { .. }
        )
    }

    /// An I/O error while doing `action` to the object or directory `path`.
    pub fn io(action: &'static str, path: &str, error: &io::Error) -> Self {
        let path = path.to_owned();
        match error.kind() {
            // A folder is no object.
            io::ErrorKind::NotFound | io::ErrorKind::IsADirectory => Self::Missing { path },
            io::ErrorKind::AlreadyExists => Self::Exists { path },
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::DiskFull { action, path }
            }
            _ => Self::Unreachable {
                action,
                path,
                reason: error.to_string(),
            },
        }
    }

    /// An error of a store while doing `action` to the object `path`, without the store's own words: they name addresses.
    pub fn of_store(action: &'static str, path: &str, error: object_store::Error) -> Self {
        let path = path.to_owned();
        match find::<Self>(&error) {
            Some(Self::Corrupt { what, reason }) => {
                return Self::Corrupt {
                    what,
                    reason: reason.clone(),
                };
            }
            Some(Self::Changed { .. }) => return Self::Changed { path },
            _ => {}
        }
        let Explained { meaning, reason } = explain(&error);
        match meaning {
            Meaning::Missing if !path.is_empty() => Self::Missing { path },
            Meaning::Exists => Self::Exists { path },
            _ if matches!(error, object_store::Error::InvalidPath { .. }) => {
                Self::InvalidPath { path }
            }
            _ => Self::Unreachable {
                action,
                path,
                reason,
            },
        }
    }

    pub(crate) fn corrupt(what: &'static str, reason: impl ToString) -> Self {
        Self::Corrupt {
            what,
            reason: reason.to_string(),
        }
    }

    pub(crate) fn encode(what: &'static str, reason: impl ToString) -> Self {
        Self::Encode {
            what,
            reason: reason.to_string(),
        }
    }

    /// An error of the Parquet writer: the sink's I/O error where there is one beneath it.
    pub(crate) fn from_writer(path: &str, error: ParquetError) -> Self {
        match find::<io::Error>(&error) {
            Some(io) => Self::io("write", path, io),
            None => Self::encode("data file", error),
        }
    }
}

/// What an action was done to, in a message.
fn named(path: &str) -> String {
    if path.is_empty() {
        "the storage".to_owned()
    } else {
        format!("\"{path}\"")
    }
}

impl From<LakeError> for ArrowError {
    fn from(error: LakeError) -> Self {
        Self::ExternalError(Box::new(error))
    }
}

/// The first error of type `E` in the chain of causes. `ParquetError` names no source for some of its boxes.
fn find<'a, E: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a E> {
    let mut next = Some(error);
    while let Some(e) = next {
        if let Some(found) = e.downcast_ref::<E>() {
            return Some(found);
        }
        next = match e.downcast_ref::<ParquetError>() {
            Some(ParquetError::External(inner)) => {
                let inner: &'a (dyn StdError + 'static) = inner.as_ref();
                Some(inner)
            }
            _ => e.source(),
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_errors_keep_their_meaning() {
        let state = |kind| LakeError::io("write", "a", &io::Error::from(kind)).sqlstate();
        assert_eq!(state(io::ErrorKind::NotFound), "58P01");
        assert_eq!(state(io::ErrorKind::StorageFull), "53100");
        assert_eq!(state(io::ErrorKind::PermissionDenied), "58030");
        assert_eq!(state(io::ErrorKind::AlreadyExists), "58P02");
    }

    #[test]
    fn the_sinks_error_is_found_below_the_writers() {
        let error = ParquetError::from(io::Error::from(io::ErrorKind::StorageFull));
        assert_eq!(LakeError::from_writer("a", error).sqlstate(), "53100");
    }
}
