//! What can go wrong in the engine, as values.
//!
//! No message carries an object's path, a store's address or a credential: a reader may see events without being
//! allowed to see where they lie.

use std::error::Error;

use datafusion_common::DataFusionError;
use rakam_lake::LakeError;
use rakam_lake::storage::reason::{Explained, Meaning, explain};

/// An error of the engine. Cheap to clone, because it travels inside the errors of Parquet and DataFusion and is
/// taken out again at the end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    #[error("out of memory: the query needs more than its share of rakam.memory_limit")]
    OutOfMemory,
    #[error("a data file is missing from its storage")]
    FileMissing,
    #[error("could not read a data file: {reason}")]
    Storage { reason: String },
    #[error("a data file cannot be read: {reason}")]
    CorruptFile { reason: String },
    #[error("chunk {id} cannot be read: {reason}")]
    CorruptChunk { id: i64, reason: String },
    /// An error of the side that answers the [`crate::Broker`], passed through unchanged.
    #[error("{message}")]
    Host {
        sqlstate: String,
        message: String,
        hint: Option<String>,
    },
    /// The plan asks for something the engine does not do: a fault of whoever built it.
    #[error("invalid engine plan: {0}")]
    Plan(String),
    #[error("internal error of the query engine: {0}")]
    Internal(String),
}

impl EngineError {
    pub fn sqlstate(&self) -> &str {
        match self {
            Self::OutOfMemory => "53200",
            Self::FileMissing => "58P01",
            Self::Storage { .. } => "58030",
            Self::CorruptFile { .. } | Self::CorruptChunk { .. } => "XX001",
            Self::Host { sqlstate, .. } => sqlstate,
            Self::Plan(_) | Self::Internal(_) => "XX000",
        }
    }

    pub fn message(&self) -> String {
        self.to_string()
    }

    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::OutOfMemory => Some(
                "Raise rakam.memory_limit, read fewer columns or a shorter time range, or run fewer queries at a time.",
            ),
            Self::FileMissing => {
                Some("Try again; if the file stays away, see what rakam.check_storage() lists.")
            }
            Self::Storage { .. } => Some("Check that the storage can be reached and try again."),
            Self::Host { hint, .. } => hint.as_deref(),
            Self::CorruptFile { .. }
            | Self::CorruptChunk { .. }
            | Self::Plan(_)
            | Self::Internal(_) => None,
        }
    }

    /// What a store's error means, without its text: that names paths and addresses.
    pub(crate) fn from_store(error: &object_store::Error) -> Self {
        if let Some(own) = find::<Self>(error) {
            return own.clone();
        }
        match find::<LakeError>(error) {
            Some(LakeError::Missing { .. }) => return Self::FileMissing,
            Some(corrupt @ LakeError::Corrupt { .. }) => {
                let reason = corrupt.to_string();
                return Self::CorruptFile { reason };
            }
            _ => {}
        }
        let Explained { meaning, reason } = explain(error);
        match meaning {
            Meaning::Missing => Self::FileMissing,
            _ => Self::Storage { reason },
        }
    }

    /// The cause of a DataFusion error, whatever it was wrapped in on its way.
    pub(crate) fn from_datafusion(error: &DataFusionError) -> Self {
        if let Some(own) = find::<Self>(error) {
            return own.clone();
        }
        if let Some(store) = find::<object_store::Error>(error) {
            return Self::from_store(store);
        }
        if let Some(parquet) = find::<parquet::errors::ParquetError>(error) {
            return Self::CorruptFile {
                reason: parquet.to_string(),
            };
        }
        match error.find_root() {
            DataFusionError::ResourcesExhausted(_) => Self::OutOfMemory,
            root => Self::Internal(root.strip_backtrace()),
        }
    }
}

impl From<DataFusionError> for EngineError {
    fn from(error: DataFusionError) -> Self {
        Self::from_datafusion(&error)
    }
}

impl From<EngineError> for DataFusionError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::OutOfMemory => Self::ResourcesExhausted(error.to_string()),
            other => Self::External(Box::new(other)),
        }
    }
}

/// The first error of type `T` in the chain of causes, looking also into the boxes that hide theirs from `source`.
fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(current) = next {
        if let Some(found) = current.downcast_ref::<T>() {
            return Some(found);
        }
        next = match current.downcast_ref::<parquet::errors::ParquetError>() {
            Some(parquet::errors::ParquetError::External(inner)) => Some(inner.as_ref()),
            _ => current.source(),
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use parquet::errors::ParquetError;

    #[test]
    fn causes_survive_every_wrapping() {
        let missing = || {
            ParquetError::External(Box::new(object_store::Error::NotFound {
                path: "secret/path".into(),
                source: "x".into(),
            }))
        };
        let wrapped = DataFusionError::Context(
            "reading".into(),
            Box::new(DataFusionError::ParquetError(Box::new(missing()))),
        );
        let error = EngineError::from(wrapped);
        assert_eq!(error, EngineError::FileMissing);
        assert_eq!(error.sqlstate(), "58P01");
        assert!(!error.message().contains("secret"));

        let own = EngineError::CorruptChunk {
            id: 7,
            reason: "bad magic".into(),
        };
        let through =
            DataFusionError::ParquetError(Box::new(ParquetError::External(Box::new(own.clone()))));
        assert_eq!(EngineError::from(through), own);

        let exhausted = DataFusionError::ResourcesExhausted("no".into());
        let error = EngineError::from(exhausted);
        assert_eq!(error.sqlstate(), "53200");
        assert!(
            error
                .hint()
                .is_some_and(|h| h.contains("rakam.memory_limit"))
        );
    }

    #[test]
    fn a_store_error_keeps_its_address_to_itself() {
        let io = std::io::Error::new(std::io::ErrorKind::TimedOut, "http://key:secret@host/");
        let error = EngineError::from_store(&object_store::Error::Generic {
            store: "S3",
            source: Box::new(io),
        });
        assert_eq!(error.sqlstate(), "58030");
        assert_eq!(error.message(), "could not read a data file: timed out");
    }
}
