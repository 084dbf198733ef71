//! Where in a split reading goes on: what the checkpoint table keeps.

use std::hash::Hasher;

use serde::{Deserialize, Serialize};
use siphasher::sip::SipHasher13;

/// A place in a split. Kept as JSON (`serde`), in the transaction that stores the events before it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Position {
    /// Before the oldest record that there is, whichever that is then.
    Beginning,
    /// Kafka: before the record of this offset. The mark is of the record before it, if that was read.
    Offset {
        next: i64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mark: Option<Mark>,
    },
    /// Kinesis: before the first record that came at this time or later, in milliseconds since 1970.
    Time(i64),
    /// Kinesis: before the record of this sequence number.
    At(String),
    /// Kinesis: after the record of this sequence number.
    After(String),
    /// A file: so many records, decompressed bytes and lines have been read of it. The version tells it from another file of
    /// its name.
    Row {
        row: u64,
        byte: u64,
        line: u64,
        version: u64,
    },
}

impl Position {
    /// An offset that nothing is known of.
    pub fn offset(next: i64) -> Self {
        Self::Offset { next, mark: None }
    }

    /// The `next_offset` of `rakam.offsets`, as the digits of a numeric: the next offset (or row), or the last stored
    /// sequence number. None before the first record.
    pub fn next_offset(&self) -> Option<String> {
        match self {
            Self::Beginning | Self::Time(_) | Self::At(_) => None,
            Self::Offset { next, .. } => Some(next.to_string()),
            Self::After(sequence) => Some(sequence.clone()),
            Self::Row { row, .. } => Some(row.to_string()),
        }
    }
}

/// By what a record is known again. A topic that was deleted and made anew has the same offsets; that the record before the
/// next one is still the same tells that it is still the same topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    pub offset: i64,
    pub timestamp_ms: Option<i64>,
    /// Of the value.
    pub hash: u64,
}

impl Mark {
    pub fn of(offset: i64, timestamp_ms: Option<i64>, value: Option<&[u8]>) -> Self {
        let mut hasher = SipHasher13::new();
        // So that a missing value is another one than an empty one.
        let length = value.map_or(u64::MAX, |value| value.len() as u64);
        hasher.write(&length.to_le_bytes());
        hasher.write(value.unwrap_or_default());
        Self {
            offset,
            timestamp_ms,
            hash: hasher.finish(),
        }
    }
}

/// By what a file is known again.
pub(crate) fn version_hash(version: &[u8]) -> u64 {
    let mut hasher = SipHasher13::new();
    hasher.write(version);
    hasher.finish()
}

/// Whether these are the digits of a sequence number, and so of a numeric.
pub(crate) fn is_sequence_number(text: &str) -> bool {
    (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_kept_as_json() {
        let mark = Mark::of(6, Some(5), Some(b"v"));
        for (position, json, next) in [
            (Position::Beginning, "\"beginning\"".to_owned(), None),
            (
                Position::offset(7),
                r#"{"offset":{"next":7}}"#.to_owned(),
                Some("7"),
            ),
            (
                Position::Offset {
                    next: 7,
                    mark: Some(mark),
                },
                format!(
                    r#"{{"offset":{{"next":7,"mark":{{"offset":6,"timestamp_ms":5,"hash":{}}}}}}}"#,
                    mark.hash
                ),
                Some("7"),
            ),
            (Position::Time(-1), r#"{"time":-1}"#.to_owned(), None),
            (Position::At("49".into()), r#"{"at":"49"}"#.to_owned(), None),
            (
                Position::After("49".into()),
                r#"{"after":"49"}"#.to_owned(),
                Some("49"),
            ),
            (
                Position::Row {
                    row: 1,
                    byte: 2,
                    line: 3,
                    version: 4,
                },
                r#"{"row":{"row":1,"byte":2,"line":3,"version":4}}"#.to_owned(),
                Some("1"),
            ),
        ] {
            assert_eq!(
                serde_json::to_string(&position).ok().as_deref(),
                Some(json.as_str())
            );
            assert_eq!(
                serde_json::from_str::<Position>(&json).ok().as_ref(),
                Some(&position)
            );
            assert_eq!(position.next_offset().as_deref(), next);
        }
    }

    #[test]
    fn a_mark_tells_values_apart() {
        let of = |value: Option<&str>| Mark::of(1, None, value.map(str::as_bytes)).hash;
        let all = [of(None), of(Some("")), of(Some("a")), of(Some("b"))];
        for (at, one) in all.iter().enumerate() {
            assert!(!all[..at].contains(one), "{at}");
        }
        // Kept in the database: the same for ever.
        assert_eq!(of(Some("value")), 9_007_781_194_815_759_743);
    }
}
