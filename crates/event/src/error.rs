//! Why an event or a name is refused.

use crate::json::Kind;

/// A refusal, with the SQLSTATE of SPEC §20. Values that do not fit their field are no errors: see
/// [`crate::coerce::Misfit`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    #[error("invalid input syntax for type json: {0}")]
    InvalidJson(String),
    #[error("unsupported Unicode escape sequence: \\u0000 cannot be converted to text")]
    NulCharacter,
    #[error("number is out of the range of type numeric")]
    NumberOutOfRange,
    #[error("JSON is nested deeper than {limit} levels")]
    TooDeep { limit: usize },
    #[error("event of {bytes} bytes is over the limit of {limit} bytes")]
    TooLarge { bytes: usize, limit: usize },
    #[error("batch of events is full")]
    BatchFull,
    #[error("event properties must be a JSON object, not {0}")]
    NotAnObject(Kind),
    #[error("events must be a JSON array, not {0}")]
    NotAnArray(Kind),
    #[error("more than {max} events of the batch are refused", max = crate::entry::REJECTED_MAX)]
    TooManyRejected,
    #[error("malformed event: {0}")]
    MalformedItem(String),
    #[error("field \"{0}\" is reserved for the server")]
    ReservedField(String),
    #[error("\"_id\" of {bytes} bytes is over the limit of {limit} bytes")]
    IdTooLong { bytes: usize, limit: usize },
    #[error("invalid project name \"{0}\"")]
    BadProjectName(String),
    #[error("project name \"{0}\" is reserved")]
    ReservedProjectName(String),
    #[error("collection name must not be empty")]
    EmptyCollectionName,
    #[error("collection name of {bytes} bytes is over the limit of {limit} bytes")]
    CollectionNameTooLong { bytes: usize, limit: usize },
    #[error("collection name must not contain NUL characters")]
    NulInCollectionName,
    #[error("collection name \"{0}\" is reserved")]
    ReservedCollectionName(String),
    #[error("field \"{field}\" of collection \"{collection}\" does not exist")]
    UnknownField { collection: String, field: String },
    #[error("collection \"{0}\" does not exist")]
    UnknownCollection(String),
    #[error("\"{0}\" is an attached table, which takes no events")]
    AttachedTable(String),
    #[error("project has reached its quota of {0} collections")]
    TooManyCollections(i32),
    #[error("project has reached its quota of {0} fields")]
    TooManyFields(i32),
    #[error("could not build a batch of events: {0}")]
    Arrow(String),
}

impl EventError {
    pub fn sqlstate(&self) -> &'static str {
        match self {
            Self::InvalidJson(_) => "22P02",
            Self::NulCharacter => "22P05",
            Self::NumberOutOfRange => "22003",
            Self::TooDeep { .. }
            | Self::TooLarge { .. }
            | Self::BatchFull
            | Self::TooManyRejected
            | Self::IdTooLong { .. } => "54000",
            Self::NotAnObject(_) | Self::NotAnArray(_) | Self::MalformedItem(_) => "22023",
            Self::ReservedField(_)
            | Self::ReservedProjectName(_)
            | Self::ReservedCollectionName(_) => "42939",
            Self::BadProjectName(_)
            | Self::EmptyCollectionName
            | Self::CollectionNameTooLong { .. }
            | Self::NulInCollectionName => "42602",
            Self::UnknownField { .. } | Self::UnknownCollection(_) => "42703",
            Self::AttachedTable(_) => "42710",
            Self::TooManyCollections(_) | Self::TooManyFields(_) => "53400",
            Self::Arrow(_) => "XX000",
        }
    }

    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::NulCharacter => "Remove the character: text in Postgres cannot hold it.",
            Self::NumberOutOfRange => "Send the number as text.",
            Self::TooDeep { .. } => "Send what lies deeper as text.",
            Self::NotAnObject(_) => {
                "The properties of an event are an object, such as {\"url\": \"/\"}."
            }
            Self::EmptyCollectionName
            | Self::CollectionNameTooLong { .. }
            | Self::NulInCollectionName => {
                "The name of a collection has 1 to 63 bytes, none of them NUL."
            }
            Self::TooLarge { .. } => "Send less in one event, or raise \"rakam.max_event_bytes\".",
            Self::NotAnArray(_) => {
                "Send [{\"collection\": \"pageview\", \"properties\": {\"url\": \"/\"}}, ...]."
            }
            Self::TooManyRejected => {
                "Nothing of the batch was stored. Send smaller batches: each tells what is wrong with its events."
            }
            Self::MalformedItem(_) => {
                "Each event is {\"collection\": text, \"properties\": object}."
            }
            Self::ReservedField(_) => {
                "Rename the field: _received_at, _extra, _project, _collection and $server_time cannot be sent."
            }
            Self::IdTooLong { .. } => "Use a shorter identifier, such as a UUID.",
            Self::BadProjectName(_) => {
                "A project name starts with a letter and has at most 40 lower-case letters, digits and underscores."
            }
            Self::ReservedProjectName(_) => {
                "Names that start with pg_ or rakam, public and information_schema belong to the server."
            }
            Self::ReservedCollectionName(_) => {
                "users and names that start with an underscore, continuous_ or materialized_ are used by rakam itself."
            }
            Self::UnknownField { .. } => {
                "The project's schema is fixed: its admin declares fields with rakam.add_field."
            }
            Self::UnknownCollection(_) => {
                "The project's schema is fixed: its admin makes collections with rakam.create_collection."
            }
            Self::AttachedTable(_) => {
                "Choose another name for the collection, or take the table away with rakam.detach."
            }
            Self::TooManyCollections(_) => {
                "Send to a collection that exists, or let an administrator raise the quota with rakam.set_quota."
            }
            Self::TooManyFields(_) => {
                "Send fields that exist, or let an administrator raise the quota with rakam.set_quota."
            }
            _ => return None,
        })
    }
}
