//! What one poll brings: records of several splits in one buffer, and how far each split has come with them.

use std::ops::Range;
use std::sync::Arc;

use rakam_event::types::FieldType;
use rakam_files::source::Piece;

use crate::error::{SourceError, StopReason};
use crate::position::Position;
use crate::published::Mark;

/// The offset of a record, for dead letters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Offset {
    Number(i64),
    /// A sequence number of Kinesis. The records of one aggregate have the same.
    Digits(Arc<str>),
}

impl std::fmt::Display for Offset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Digits(digits) => digits.fmt(f),
        }
    }
}

/// A record as a source adds it to a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewRecord<'a> {
    pub(crate) offset: &'a Offset,
    pub(crate) timestamp_ms: Option<i64>,
    pub(crate) value: Option<&'a [u8]>,
    /// What the record itself says, beside its value, of where it belongs.
    pub(crate) collection: Option<&'a [u8]>,
    /// Which record of an event store it is.
    pub(crate) mark: Option<Mark>,
}

/// A record of a batch; its bytes are the batch's.
#[derive(Debug, Clone)]
pub struct Record {
    /// An index into [`Batch::moves`].
    pub split: usize,
    pub offset: Offset,
    /// When it was written, in milliseconds since 1970, if the source knows.
    pub timestamp_ms: Option<i64>,
    /// Which record of an event store it is; None: of none of ours.
    pub mark: Option<Mark>,
    value: Option<Range<usize>>,
    collection: Option<Range<usize>>,
}

/// How far a split has come in a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    pub split: String,
    pub from: Position,
    /// Behind all of the batch. Equal to `from` if the split has only ended.
    pub to: Position,
    pub records: u64,
    /// Records without a value, which are skipped.
    pub tombstones: u64,
    pub bytes: u64,
    /// Nothing comes after `to`, ever.
    pub ended: bool,
    /// Of the last record.
    pub timestamp_ms: Option<i64>,
}

/// A time of a record in microseconds since 1970. None: a timestamptz does not hold it, as records may say what they like.
pub fn written_us(ms: i64) -> Option<i64> {
    // From the year 1 to 9999.
    (-62_135_596_800_000..=253_402_300_799_999)
        .contains(&ms)
        .then(|| ms * 1000)
}

/// A split that is read no further.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    pub split: String,
    pub reason: StopReason,
}

/// Rows of a file.
#[derive(Debug, Clone)]
pub struct FilePiece {
    /// An index into [`Batch::moves`].
    pub split: usize,
    pub piece: Piece,
    /// Columns whose type the file itself declares, by their names in the file.
    pub declared: Arc<[(String, FieldType)]>,
}

/// What one poll brings. All of it is stored in one transaction, together with the positions of `moves`, or none.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    records: Vec<Record>,
    /// Rows of files.
    pub pieces: Vec<FilePiece>,
    /// One for each split that has moved.
    pub moves: Vec<Move>,
    /// Splits that stopped: nothing more comes of them. What came before is in the batch.
    pub stops: Vec<Stop>,
    /// What the source struggles with now, though it goes on.
    pub trouble: Option<SourceError>,
}

impl Batch {
    /// One record, to be decoded once more: without its split's position.
    pub fn of_record(
        split: &str,
        timestamp_ms: Option<i64>,
        value: &[u8],
        collection: Option<&[u8]>,
    ) -> Self {
        let mut batch = Self::default();
        let moved = batch.moved(split, &Position::Beginning);
        batch.push(
            moved,
            NewRecord {
                offset: &Offset::Number(0),
                timestamp_ms,
                value: Some(value),
                collection,
                mark: None,
            },
        );
        batch
    }

    /// In the order of each split.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// None: a tombstone.
    pub fn value(&self, record: &Record) -> Option<&[u8]> {
        self.slice(record.value.as_ref())
    }

    /// The collection that the record names beside its value.
    pub fn collection(&self, record: &Record) -> Option<&[u8]> {
        self.slice(record.collection.as_ref())
    }

    /// Nothing to store.
    pub fn is_empty(&self) -> bool {
        self.moves.is_empty() && self.stops.is_empty()
    }

    /// Bytes of records.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    fn slice(&self, range: Option<&Range<usize>>) -> Option<&[u8]> {
        self.bytes.get(range?.clone())
    }

    pub(crate) fn is_full(&self, limits: &Limits) -> bool {
        self.bytes.len() >= limits.bytes || self.records.len() >= limits.records
    }

    /// The split's move, which begins at `from` if it is not there yet.
    pub(crate) fn moved(&mut self, split: &str, from: &Position) -> usize {
        if let Some(at) = self.moves.iter().position(|m| m.split == split) {
            return at;
        }
        self.moves.push(Move {
            split: split.to_owned(),
            from: from.clone(),
            to: from.clone(),
            records: 0,
            tombstones: 0,
            bytes: 0,
            ended: false,
            timestamp_ms: None,
        });
        self.moves.len() - 1
    }

    /// Adds a record to a move. Its position is the caller's to set, once a record or once a batch.
    pub(crate) fn push(&mut self, split: usize, record: NewRecord<'_>) {
        let value = record.value.map(|value| self.append(value));
        let collection = record.collection.map(|name| self.append(name));
        if let Some(moved) = self.moves.get_mut(split) {
            moved.records += 1;
            moved.tombstones += u64::from(value.is_none());
            moved.bytes += value.as_ref().map_or(0, |v| v.len() as u64);
            moved.timestamp_ms = record.timestamp_ms.or(moved.timestamp_ms);
        }
        self.records.push(Record {
            split,
            offset: record.offset.clone(),
            timestamp_ms: record.timestamp_ms,
            mark: record.mark,
            value,
            collection,
        });
    }

    /// Keeps the records of which `keep` says so, by their split and mark. How far the splits have come stays the same.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&str, Option<&Mark>) -> bool) {
        let moves = &self.moves;
        self.records.retain(|record| {
            let split = moves.get(record.split).map_or("", |m| m.split.as_str());
            keep(split, record.mark.as_ref())
        });
    }

    fn append(&mut self, bytes: &[u8]) -> Range<usize> {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        start..self.bytes.len()
    }
}

/// When a poll has enough. A batch is larger by one record at most (Kinesis: by one answer).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub bytes: usize,
    pub records: usize,
    /// How long a poll waits for more.
    pub wait: std::time::Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: 8 << 20,
            records: 32_768,
            wait: std::time::Duration::from_millis(200),
        }
    }
}
