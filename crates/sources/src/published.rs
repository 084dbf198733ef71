//! Records that the event store of a rakam published, and how a source tells the copies among them.
//!
//! A relay publishes its events in batches, one after the other, each with the next number of its origin, and publishes a batch
//! again when it does not know whether all of it arrived. So within a split no record of a batch comes for the first time behind
//! one of a later batch, and a reader needs to remember the newest batch only: its number, and which of its records it has seen.
//!
//! Kafka has the mark of a record in headers. Kinesis has none: there it follows the framed record, where readers that go by the
//! schema do not look ([`append_mark`], [`split_mark`]).

use std::collections::HashMap;

use uuid::Uuid;

use crate::batch::Batch;

/// The header of a Kafka record that names the event store it comes from.
pub const ORIGIN_HEADER: &str = "rakam-origin";
/// The header with the record's place in it: `<number of the batch>.<place in the batch>`.
pub const SEQUENCE_HEADER: &str = "rakam-publish-seq";

/// A batch has fewer records than this: so many events fit a row of the outbox at most. What claims a higher place is no record of ours.
pub const BATCH_RECORDS_MAX: u32 = 1 << 19;

/// Which record of which event store it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    pub origin: Uuid,
    /// Of the batch; from 1 on, without gaps.
    pub publish_seq: i64,
    /// In the batch.
    pub place: u32,
}

impl Mark {
    /// From the values of both headers; None: they are not ours.
    pub fn parse(origin: &[u8], sequence: &[u8]) -> Option<Self> {
        let (batch, place) = std::str::from_utf8(sequence).ok()?.split_once('.')?;
        Self {
            origin: Uuid::try_parse_ascii(origin).ok()?,
            publish_seq: batch.parse().ok()?,
            place: place.parse().ok()?,
        }
        .checked()
    }

    fn checked(self) -> Option<Self> {
        (self.publish_seq > 0 && self.place < BATCH_RECORDS_MAX).then_some(self)
    }

    /// The value of [`SEQUENCE_HEADER`].
    pub fn sequence(&self) -> String {
        format!("{}.{}", self.publish_seq, self.place)
    }
}

/// Ends a record that has a mark behind it. No text ends so: 0xF5 is in no UTF-8.
const MAGIC: [u8; 8] = *b"\xF5rakam\x01\xF5";
/// Of the mark without the collection's name: its length, origin, batch, place, magic.
const FIXED: usize = 1 + 16 + 8 + 4 + MAGIC.len();

/// Writes collection and mark behind a framed record: the name, its length, origin, batch, place (numbers with the most
/// significant byte first), eight fixed bytes.
pub fn append_mark(record: &mut Vec<u8>, collection: &str, mark: &Mark) {
    // Names of collections have 63 bytes at most.
    let name = &collection.as_bytes()[..collection.len().min(u8::MAX.into())];
    record.reserve(name.len() + FIXED);
    record.extend_from_slice(name);
    record.push(name.len() as u8);
    record.extend_from_slice(mark.origin.as_bytes());
    record.extend_from_slice(&mark.publish_seq.to_be_bytes());
    record.extend_from_slice(&mark.place.to_be_bytes());
    record.extend_from_slice(&MAGIC);
}

/// The record, collection and mark of bytes that [`append_mark`] ended. None: nothing is behind the record.
pub fn split_mark(bytes: &[u8]) -> Option<(&[u8], &[u8], Mark)> {
    let rest = bytes.strip_suffix(&MAGIC)?;
    let (rest, place) = rest.split_last_chunk::<4>()?;
    let (rest, batch) = rest.split_last_chunk::<8>()?;
    let (rest, origin) = rest.split_last_chunk::<16>()?;
    let (length, rest) = rest.split_last()?;
    let (record, name) = rest.split_at_checked(rest.len().checked_sub(usize::from(*length))?)?;
    let mark = Mark {
        origin: Uuid::from_bytes(*origin),
        publish_seq: i64::from_be_bytes(*batch),
        place: u32::from_be_bytes(*place),
    };
    Some((record, name, mark.checked()?))
}

/// What a split has brought of one origin.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// The newest batch.
    pub publish_seq: i64,
    /// Its places, a bit each, the lowest bit of the first byte first.
    places: Vec<u8>,
}

impl Seen {
    /// As it was stored.
    pub fn new(publish_seq: i64, places: Vec<u8>) -> Self {
        Self {
            publish_seq,
            places,
        }
    }

    pub fn places(&self) -> &[u8] {
        &self.places
    }

    /// Takes a record in. False: it, or its batch as a whole, has been seen.
    fn take(&mut self, mark: &Mark) -> bool {
        if mark.publish_seq < self.publish_seq {
            return false;
        }
        if mark.publish_seq > self.publish_seq {
            self.publish_seq = mark.publish_seq;
            self.places.clear();
        }
        let (byte, bit) = (mark.place as usize / 8, 1 << (mark.place % 8));
        if byte >= self.places.len() {
            self.places.resize(byte + 1, 0);
        }
        let is_new = self.places[byte] & bit == 0;
        self.places[byte] |= bit;
        is_new
    }

    /// Takes in what another split has brought: a shard that was merged with this one.
    pub fn join(&mut self, other: &Self) {
        match other.publish_seq.cmp(&self.publish_seq) {
            std::cmp::Ordering::Less => {}
            std::cmp::Ordering::Greater => self.clone_from(other),
            std::cmp::Ordering::Equal => {
                if self.places.len() < other.places.len() {
                    self.places.resize(other.places.len(), 0);
                }
                for (own, others) in self.places.iter_mut().zip(&other.places) {
                    *own |= others;
                }
            }
        }
    }
}

/// By origin; there are few.
type Origins = Vec<(Uuid, Seen)>;

/// What the splits of a consumer have brought, as it is stored, and what the batch of the moment adds to that.
#[derive(Debug, Default)]
pub struct Copies {
    stored: HashMap<String, Origins>,
    changed: HashMap<String, Origins>,
}

impl Copies {
    /// Begins with a split, as it is stored.
    pub fn open(&mut self, split: &str, seen: Origins) {
        self.changed.remove(split);
        self.stored.insert(split.to_owned(), seen);
    }

    pub fn close(&mut self, split: &str) {
        self.changed.remove(split);
        self.stored.remove(split);
    }

    /// Whether a batch has records of event stores at all.
    pub fn concern(batch: &Batch) -> bool {
        batch.records().iter().any(|record| record.mark.is_some())
    }

    /// Takes the records out of a batch that have been stored before; how many.
    pub fn remove_from(&mut self, batch: &mut Batch) -> u64 {
        let mut removed = 0;
        batch.retain(|split, mark| {
            let Some(mark) = mark else {
                return true;
            };
            if !self.changed.contains_key(split) {
                let stored = self.stored.get(split).cloned().unwrap_or_default();
                self.changed.insert(split.to_owned(), stored);
            }
            let is_new = self.changed.get_mut(split).is_none_or(|origins| {
                if let Some((_, seen)) = origins.iter_mut().find(|(o, _)| *o == mark.origin) {
                    return seen.take(mark);
                }
                let mut seen = Seen::default();
                seen.take(mark);
                origins.push((mark.origin, seen));
                true
            });
            removed += u64::from(!is_new);
            is_new
        });
        removed
    }

    /// What is to be stored with the batch: split, origin, what was seen.
    pub fn changes(&self) -> impl Iterator<Item = (&str, Uuid, &Seen)> {
        self.changed.iter().flat_map(|(split, origins)| {
            let stored = self.stored.get(split);
            origins.iter().filter_map(move |(origin, seen)| {
                let is_stored = stored.is_some_and(|stored| {
                    stored
                        .iter()
                        .any(|(o, before)| o == origin && before == seen)
                });
                (!is_stored).then_some((split.as_str(), *origin, seen))
            })
        })
    }

    /// The batch is stored.
    pub fn stored(&mut self) {
        self.stored.extend(self.changed.drain());
    }

    /// The batch is not stored, and will be read again.
    pub fn undo(&mut self) {
        self.changed.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{NewRecord, Offset};
    use crate::position::Position;

    const ORIGIN: Uuid = Uuid::from_u128(7);

    fn mark(publish_seq: i64, place: u32) -> Mark {
        Mark {
            origin: ORIGIN,
            publish_seq,
            place,
        }
    }

    fn batch(split: &str, marks: &[Option<Mark>]) -> Batch {
        let mut batch = Batch::default();
        let moved = batch.moved(split, &Position::Beginning);
        for (at, mark) in marks.iter().enumerate() {
            let value = format!("{at}");
            batch.push(
                moved,
                NewRecord {
                    offset: &Offset::Number(at as i64),
                    timestamp_ms: None,
                    value: Some(value.as_bytes()),
                    collection: None,
                    mark: *mark,
                },
            );
        }
        batch
    }

    fn left(batch: &Batch) -> Vec<String> {
        let value = |r| String::from_utf8_lossy(batch.value(r).unwrap_or_default()).into_owned();
        batch.records().iter().map(value).collect()
    }

    #[test]
    fn headers_and_trailers_carry_a_mark() {
        let given = mark(12, 345);
        assert_eq!(given.sequence(), "12.345");
        let parsed = Mark::parse(ORIGIN.to_string().as_bytes(), b"12.345");
        assert_eq!(parsed, Some(given));
        for (origin, sequence) in [
            ("x", "1.1"),
            ("00000000-0000-0000-0000-000000000007", "1"),
            ("00000000-0000-0000-0000-000000000007", "0.1"),
            ("00000000-0000-0000-0000-000000000007", "1.524288"),
            ("00000000-0000-0000-0000-000000000007", "-1.1"),
        ] {
            assert_eq!(Mark::parse(origin.as_bytes(), sequence.as_bytes()), None);
        }
        let mut bytes = vec![0xA7, 0, 0, 0, 1, 2, 3];
        append_mark(&mut bytes, "größe", &given);
        let (record, name, found) = split_mark(&bytes).unwrap_or_else(|| panic!("a mark"));
        assert_eq!(record, [0xA7, 0, 0, 0, 1, 2, 3]);
        assert_eq!((name, found), ("größe".as_bytes(), given));
        for cut in 0..bytes.len() {
            // Nothing shorter is taken for one, and nothing panics.
            let part = split_mark(&bytes[cut..]);
            assert_eq!(part.is_some(), cut <= 7, "{cut}");
            assert_eq!(split_mark(&bytes[..cut]), None);
        }
    }

    #[test]
    fn copies_are_removed_and_nothing_else() {
        let mut copies = Copies::default();
        copies.open("t/0", Vec::new());
        let first = [mark(1, 0), mark(1, 2), mark(1, 3)].map(Some);
        let mut read = batch("t/0", &first);
        assert_eq!(copies.remove_from(&mut read), 0);
        assert_eq!(copies.changes().count(), 1);
        copies.stored();
        assert_eq!(copies.changes().count(), 0);
        // The relay did not know how far it had come: the same once more, with what was missing; and records of others.
        let again = [
            Some(mark(1, 0)),
            Some(mark(1, 2)),
            None,
            Some(mark(1, 3)),
            Some(mark(1, 5)),
            Some(mark(2, 0)),
            Some(mark(1, 7)),
        ];
        let mut read = batch("t/0", &again);
        assert_eq!(copies.remove_from(&mut read), 4);
        assert_eq!(left(&read), ["2", "4", "5"]);
        // Not stored after all.
        copies.undo();
        let mut read = batch("t/0", &again);
        assert_eq!(copies.remove_from(&mut read), 4);
        let changes: Vec<_> = copies.changes().collect();
        assert_eq!(changes, [("t/0", ORIGIN, &Seen::new(2, vec![1]))]);
        copies.stored();
        // Another split, and another origin, are their own.
        let mut other = batch("t/1", &first);
        assert_eq!(copies.remove_from(&mut other), 0);
        let stranger = Mark {
            origin: Uuid::from_u128(8),
            ..mark(1, 0)
        };
        let mut other = batch("t/0", &[Some(stranger), Some(stranger)]);
        assert_eq!(copies.remove_from(&mut other), 1);
    }

    #[test]
    fn what_is_stored_goes_on_elsewhere() {
        let mut first = Copies::default();
        first.open("s", Vec::new());
        first.remove_from(&mut batch("s", &[Some(mark(4, 9)), Some(mark(4, 0))]));
        let stored: Vec<_> = first
            .changes()
            .map(|(_, o, s)| (o, Seen::new(s.publish_seq, s.places().to_vec())))
            .collect();
        let mut next = Copies::default();
        next.open("s", stored);
        let mut read = batch("s", &[Some(mark(4, 9)), Some(mark(4, 1)), Some(mark(3, 1))]);
        assert_eq!(next.remove_from(&mut read), 2);
        assert_eq!(left(&read), ["1"]);
    }

    #[test]
    fn merged_shards_are_joined() {
        let mut seen = Seen::new(3, vec![0b1]);
        seen.join(&Seen::new(2, vec![0xFF]));
        assert_eq!(seen, Seen::new(3, vec![0b1]));
        seen.join(&Seen::new(3, vec![0b10, 1]));
        assert_eq!(seen, Seen::new(3, vec![0b11, 1]));
        seen.join(&Seen::new(5, vec![]));
        assert_eq!(seen, Seen::new(5, vec![]));
    }
}
