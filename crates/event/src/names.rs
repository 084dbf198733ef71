//! Names of projects, collections and fields, as checked types.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;

use crate::error::EventError;
use crate::schema;

/// The longest identifier of Postgres, in bytes.
pub const MAX_NAME_BYTES: usize = 63;
const MAX_PROJECT_BYTES: usize = 40;

/// Columns that every table of Postgres has; a field of such a name cannot be a column. `_xid` is our own
/// hidden column of chunks and data files.
const SYSTEM_COLUMNS: [&str; 7] = [
    "xmin",
    "xmax",
    "cmin",
    "cmax",
    "ctid",
    "tableoid",
    schema::XID,
];

/// Fields that only the server sets, after normalisation.
const SERVER_FIELDS: [&str; 5] = [
    schema::RECEIVED_AT,
    schema::EXTRA,
    "_project",
    "_collection",
    "$server_time",
];

/// The name of a project: lower-cased, `[a-z][a-z0-9_]{0,39}`, not reserved.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProjectName(String);

impl ProjectName {
    pub fn parse(text: &str) -> Result<Self, EventError> {
        let name = text.to_ascii_lowercase();
        let well_formed = name.len() <= MAX_PROJECT_BYTES
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && name
                .bytes()
                .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_'));
        if !well_formed {
            return Err(EventError::BadProjectName(text.to_owned()));
        }
        if name.starts_with("pg_")
            || name.starts_with("rakam")
            || name == "public"
            || name == "information_schema"
        {
            return Err(EventError::ReservedProjectName(name));
        }
        Ok(Self(name))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The name of a collection: ASCII lower-cased, 1 to 63 bytes, not reserved.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CollectionName(String);

impl CollectionName {
    pub fn parse(text: &str) -> Result<Self, EventError> {
        if text.is_empty() {
            return Err(EventError::EmptyCollectionName);
        }
        if text.len() > MAX_NAME_BYTES {
            return Err(EventError::CollectionNameTooLong {
                bytes: text.len(),
                limit: MAX_NAME_BYTES,
            });
        }
        if text.contains('\0') {
            return Err(EventError::NulInCollectionName);
        }
        let name = text.to_ascii_lowercase();
        if name == "users"
            || ["_", "continuous_", "materialized_"]
                .iter()
                .any(|prefix| name.starts_with(prefix))
        {
            return Err(EventError::ReservedCollectionName(name));
        }
        Ok(Self(name))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn into_string(self) -> String {
        self.0
    }
}

/// Names of collections, each once, in the order in which they first came.
#[derive(Debug, Default)]
pub struct CollectionNames {
    names: Vec<CollectionName>,
    index: HashMap<CollectionName, usize>,
}

impl CollectionNames {
    /// The place of a name, which it gets when it comes for the first time.
    pub fn index_of(&mut self, name: CollectionName) -> usize {
        if let Some(&index) = self.index.get(&name) {
            return index;
        }
        let index = self.names.len();
        self.names.push(name.clone());
        self.index.insert(name, index);
        index
    }

    pub fn names(&self) -> &[CollectionName] {
        &self.names
    }

    pub fn into_names(self) -> Vec<CollectionName> {
        self.names
    }
}

impl fmt::Display for ProjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for CollectionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c')
}

/// The field that a client's name means: double quotes and outer blanks stripped, camelCase to snake_case,
/// each inner blank or dot to `_`, ASCII lower-cased, everything else kept. Applying it twice changes nothing.
pub fn field_name(raw: &str) -> Cow<'_, str> {
    let plain = |b: u8| {
        b.is_ascii() && !b.is_ascii_uppercase() && b != b'"' && b != b'.' && !is_blank(b as char)
    };
    if raw.bytes().all(plain) {
        return Cow::Borrowed(raw);
    }
    let unquoted: Cow<'_, str> = if raw.contains('"') {
        Cow::Owned(raw.replace('"', ""))
    } else {
        Cow::Borrowed(raw)
    };
    let mut name = String::with_capacity(raw.len() + 4);
    let mut chars = unquoted.trim_matches(is_blank).chars().peekable();
    let mut previous: Option<char> = None;
    while let Some(c) = chars.next() {
        if c.is_uppercase()
            && previous.is_some_and(|p| {
                p.is_lowercase()
                    || p.is_ascii_digit()
                    || (p.is_uppercase() && chars.peek().is_some_and(|n| n.is_lowercase()))
            })
        {
            name.push('_');
        }
        name.push(if is_blank(c) || c == '.' {
            '_'
        } else {
            c.to_ascii_lowercase()
        });
        previous = Some(c);
    }
    Cow::Owned(name)
}

/// Whether a normalised field name can be a column of a table.
pub fn can_be_column(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME_BYTES
        && !SYSTEM_COLUMNS.contains(&name)
        && !name.contains('\0')
}

/// The server's field that a client's name would set, if it would.
pub fn server_field(raw: &str) -> Option<&'static str> {
    if !may_be_special(raw) {
        return None;
    }
    let name = field_name(raw);
    SERVER_FIELDS.iter().copied().find(|&field| field == name)
}

/// False for most names, at the price of one byte: a name that starts with a letter or digit can only
/// normalise to one that does so too, and all special names start with `_` or `$`.
pub fn may_be_special(raw: &str) -> bool {
    raw.bytes()
        .next()
        .is_some_and(|b| b.is_ascii() && !b.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn field_names_are_normalised_once_and_for_all() {
        for (raw, expected) in [
            ("userName", "user_name"),
            ("userID", "user_id"),
            ("HTTPStatus", "http_status"),
            ("\"Total Price\"", "total_price"),
            (" \" Total Price \" ", "total_price"),
            ("a.b", "a_b"),
            ("a..b", "a__b"),
            ("a \tb", "a__b"),
            ("already_snake", "already_snake"),
            ("ABC", "abc"),
            ("A_B", "a_b"),
            ("user_Name", "user_name"),
            ("_Time", "_time"),
            (".extra", "_extra"),
            ("$serverTime", "$server_time"),
            ("éTat", "é_tat"),
            ("état", "état"),
            ("load2Time", "load2_time"),
            ("2Fast", "2_fast"),
            ("userIDs", "user_i_ds"),
            ("UserName", "user_name"),
            ("Total-Price", "total-price"),
            ("it's", "it's"),
            ("", ""),
            ("  ", ""),
            ("\"\"", ""),
        ] {
            let name = field_name(raw);
            assert_eq!(name, expected, "{raw:?}");
            assert_eq!(field_name(&name), expected, "{raw:?} twice");
        }
    }

    #[test]
    fn names_that_cannot_be_columns() {
        for name in ["", "xmin", "tableoid", "_xid", &"x".repeat(64)] {
            assert!(!can_be_column(name), "{name}");
        }
        for name in ["oid", "_time", "select", &"x".repeat(63)] {
            assert!(can_be_column(name), "{name}");
        }
    }

    #[test]
    fn server_fields_are_found_in_any_spelling() {
        for (raw, field) in [
            ("_received_at", Some("_received_at")),
            ("_receivedAt", Some("_received_at")),
            ("\"_extra\"", Some("_extra")),
            (".extra", Some("_extra")),
            (" _Project", Some("_project")),
            ("_collection", Some("_collection")),
            ("$serverTime", Some("$server_time")),
            ("$server_time", Some("$server_time")),
            ("received_at", None),
            ("_time", None),
            ("_id", None),
        ] {
            assert_eq!(server_field(raw), field, "{raw}");
        }
    }

    #[test]
    fn project_names() {
        let state = |text: &str| ProjectName::parse(text).map_err(|e| e.sqlstate());
        assert_eq!(state("Acme").map(|n| n.to_string()), Ok("acme".to_owned()));
        assert!(state(&"a".repeat(40)).is_ok());
        for bad in ["", "1a", "_a", "a-b", "é", "a b", &"a".repeat(41), "a\0"] {
            assert_eq!(state(bad).err(), Some("42602"), "{bad}");
        }
        for reserved in [
            "pg_x",
            "public",
            "PUBLIC",
            "information_schema",
            "rakam",
            "rakam_x",
        ] {
            assert_eq!(state(reserved).err(), Some("42939"), "{reserved}");
        }
    }

    #[test]
    fn collection_names() {
        let state = |text: &str| CollectionName::parse(text).map_err(|e| e.sqlstate());
        assert_eq!(
            state("PageView").map(|n| n.to_string()),
            Ok("pageview".to_owned())
        );
        assert!(state("page view").is_ok());
        assert!(state("user").is_ok());
        for bad in ["", &"a".repeat(64), "a\0b"] {
            assert_eq!(state(bad).err(), Some("42602"), "{bad:?}");
        }
        for reserved in ["users", "Users", "_all", "continuous_x", "Materialized_x"] {
            assert_eq!(state(reserved).err(), Some("42939"), "{reserved}");
        }
    }
}
