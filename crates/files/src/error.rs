//! What can go wrong with a file, as Postgres reports it.

use std::io;

use rakam_lake::LakeError;

/// An error that ends the reading of a file, or forbids to begin it. A row that is no event is none: see
/// [`crate::source::BadRow`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FilesError {
    #[error("could not {action} file \"{name}\": {reason}")]
    Io {
        action: &'static str,
        name: String,
        reason: String,
        kind: io::ErrorKind,
    },
    #[error("file \"{name}\" is not a valid {format} file: {reason}")]
    Malformed {
        name: String,
        format: &'static str,
        reason: String,
    },
    #[error("file \"{name}\", line {line}: a record is larger than {limit} bytes")]
    RecordTooLarge {
        name: String,
        line: u64,
        limit: usize,
    },
    #[error("{message}")]
    Option { message: String, hint: String },
    #[error("{message}")]
    Unsupported { message: String, hint: String },
    #[error("column \"{0}\" of the file is reserved for the server")]
    ReservedColumn(String),
    #[error("the name of a column of the file has a NUL character")]
    NulInColumn,
    #[error("permission denied for column \"_received_at\" of the file")]
    ReceivedAt,
    #[error("no file matches \"{0}\"")]
    NoFile(String),
    #[error("invalid path \"{path}\": {reason}")]
    Path { path: String, reason: &'static str },
    #[error("could not convert the rows of a file: {0}")]
    Arrow(String),
    #[error("file \"{name}\", line {line}: {reason}")]
    BadRow {
        name: String,
        line: u64,
        reason: String,
    },
    #[error("value of column \"{column}\" does not fit: {reason} (file \"{name}\", line {line})")]
    BadValue {
        name: String,
        line: u64,
        column: String,
        reason: String,
    },
    #[error(
        "value of column \"{column}\" in the folders of file \"{name}\" does not fit: {reason}"
    )]
    BadFolder {
        name: String,
        column: String,
        reason: String,
    },
    #[error(
        "column \"{column}\" is of type {first} in file \"{first_name}\", of type {ty} in file \"{name}\""
    )]
    OtherType {
        column: String,
        first: String,
        first_name: String,
        ty: String,
        name: String,
    },
    #[error("file \"{name}\" has two columns \"{column}\"")]
    SameColumn { name: String, column: String },
    /// Of what is to be written.
    #[error("column \"{0}\" specified more than once")]
    SameName(String),
    #[error("the files have no columns")]
    NoColumns,
    #[error("not enough memory to read file \"{0}\"")]
    OutOfMemory(String),
    /// A bucket did not do what was asked.
    #[error("{message}")]
    Store {
        message: String,
        sqlstate: &'static str,
        hint: Option<String>,
    },
    /// Nobody waits for the files any more.
    #[error("reading files was cancelled")]
    Cancelled,
}

impl FilesError {
    pub fn io(action: &'static str, name: &str, error: &io::Error) -> Self {
        // Of a file in a bucket, read through a decompressor: what it was is in it.
        if let Some(own) = error.get_ref().and_then(|e| e.downcast_ref::<Self>()) {
            return own.clone();
        }
        Self::Io {
            action,
            name: name.to_owned(),
            reason: error.to_string(),
            kind: error.kind(),
        }
    }

    /// An error of a storage while doing `action` to the file `name`; without a name to the storage.
    pub fn of_store(action: &'static str, name: &str, error: &LakeError) -> Self {
        let what = match name {
            "" => "the storage".to_owned(),
            name => format!("file \"{name}\""),
        };
        let (message, hint) = match error {
            LakeError::Unreachable { reason, .. } => (
                format!("could not {action} {what}: {reason}"),
                Some("Check that the storage can be reached and that the credentials of its server are right, then try again.".to_owned()),
            ),
            LakeError::Missing { .. } => (
                format!("{what} is missing"),
                Some("It was deleted after the files were listed: try again.".to_owned()),
            ),
            LakeError::Changed { .. } => (
                format!("{what} was changed while it was read"),
                Some("Try again: it is read as it is then.".to_owned()),
            ),
            LakeError::Exists { .. } => (
                format!("{what} exists already"),
                Some("In a storage nothing is replaced: choose another name.".to_owned()),
            ),
            other => (other.to_string(), other.hint()),
        };
        Self::Store {
            message,
            sqlstate: error.sqlstate(),
            hint,
        }
    }

    pub(crate) fn malformed(name: &str, format: &'static str, reason: impl ToString) -> Self {
        Self::Malformed {
            name: name.to_owned(),
            format,
            reason: reason.to_string(),
        }
    }

    /// The SQLSTATE that clients see.
    pub fn sqlstate(&self) -> &'static str {
        match self {
            Self::Io { kind, .. } => match kind {
                io::ErrorKind::NotFound => "58P01",
                io::ErrorKind::AlreadyExists => "58P02",
                io::ErrorKind::PermissionDenied => "42501",
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "53100",
                _ => "58030",
            },
            Self::Malformed { .. } => "22P04",
            Self::RecordTooLarge { .. } => "54000",
            Self::Option { .. } | Self::Path { .. } => "22023",
            Self::Unsupported { .. } => "0A000",
            Self::ReservedColumn(_) => "42939",
            Self::NulInColumn => "22P05",
            Self::ReceivedAt => "42501",
            Self::NoFile(_) => "58P01",
            Self::Arrow(_) => "XX000",
            Self::BadRow { .. } => "22P04",
            Self::BadValue { .. } | Self::BadFolder { .. } => "22P02",
            Self::OtherType { .. } => "42804",
            Self::SameColumn { .. } | Self::SameName(_) => "42701",
            Self::NoColumns => "42P16",
            Self::OutOfMemory(_) => "53200",
            Self::Store { sqlstate, .. } => sqlstate,
            Self::Cancelled => "57014",
        }
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Option { hint, .. } | Self::Unsupported { hint, .. } => hint.clone(),
            Self::RecordTooLarge { .. } => {
                "A quote that is never closed makes one record of all lines after it.".to_owned()
            }
            Self::BadValue { .. } | Self::BadFolder { .. } => {
                "The columns are those of the files when they were attached: rakam.detach, and rakam.attach \
                 again, take them from the files of now."
                    .to_owned()
            }
            Self::OtherType { .. } => {
                "Attach the files of each type apart, by a narrower pattern.".to_owned()
            }
            Self::SameName(_) => {
                "Give each column of the query a name of its own with AS.".to_owned()
            }
            Self::ReservedColumn(_) => {
                "Rename the column: _project, _collection and $server_time cannot be loaded."
                    .to_owned()
            }
            Self::NulInColumn => {
                "Remove the character: text in Postgres cannot hold it. A file in UTF-16 is to be converted to UTF-8."
                    .to_owned()
            }
            Self::ReceivedAt => {
                "Only the project's admin may set _received_at; leave the column out.".to_owned()
            }
            Self::NoFile(_) => {
                "The path of a file:// url is one on the server; *, ? and [] match within a name, ** matches folders."
                    .to_owned()
            }
            Self::OutOfMemory(_) => {
                "Raise rakam.memory_limit, read fewer columns, or write the file with shorter pages and lists."
                    .to_owned()
            }
            Self::Store { hint, .. } => return hint.clone(),
            Self::Io { kind, .. } => match kind {
                io::ErrorKind::NotFound => "The path is one on the server.",
                io::ErrorKind::AlreadyExists => "In a storage nothing is replaced: choose another name.",
                io::ErrorKind::PermissionDenied => {
                    "The system user of the server needs the right to the file and its folders."
                }
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    "Free space where the file is to be."
                }
                _ => "Check the disk or the mount that the file is on.",
            }
            .to_owned(),
            Self::Malformed { .. }
            | Self::Path { .. }
            | Self::Arrow(_)
            | Self::BadRow { .. }
            | Self::SameColumn { .. }
            | Self::NoColumns
            | Self::Cancelled => return None,
        })
    }
}
