//! Records that the event store of a rakam published, and how a source tells the copies among them.
//!
//! A relay publishes its events in batches, one after the other, each with the next number of its origin, and publishes a batch
//! again when it does not know whether all of it arrived. So within a split no record of a batch comes for the first time behind
//! one of a later batch, and a reader needs to remember the newest batch only: its number, and which of its records it has seen.
//!
//! Kafka has the mark of a record in headers. Kinesis has none: there it follows the framed record, where readers that go by the
//! schema do not look ([`append_mark`], [`split_mark`]).

use std::collections::{BTreeMap, HashMap};

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

/// What is remembered of a split at most: origins, and bytes of their places. The origin that came up longest ago is forgotten
/// first, which costs that its copies are told no more. Whoever may write to a topic can make any number of them up.
const ORIGINS_MAX: usize = 10_000;
const PLACES_BYTES_MAX: usize = 8 << 20;

/// What a split has brought, by origin.
#[derive(Debug, Default)]
struct Brought {
    origins: HashMap<Uuid, Known>,
    /// The origins by when they came up.
    order: BTreeMap<u64, Uuid>,
    turns: u64,
    bytes: usize,
    /// As the origins of the batch of the moment were before it.
    before: HashMap<Uuid, Option<Known>>,
}

#[derive(Debug, Clone, Default)]
struct Known {
    seen: Seen,
    turn: u64,
}

impl Brought {
    /// Takes a record in; false: it has been seen.
    fn take(&mut self, mark: &Mark) -> bool {
        let known = self.remove(mark.origin);
        (self.before.entry(mark.origin)).or_insert_with(|| known.clone());
        let mut seen = known.unwrap_or_default().seen;
        let is_new = seen.take(mark);
        self.turns += 1;
        let turn = self.turns;
        self.insert(mark.origin, Known { seen, turn });
        while (self.origins.len() > ORIGINS_MAX || self.bytes > PLACES_BYTES_MAX)
            && let Some((_, oldest)) = self.order.pop_first()
        {
            let known = self.remove(oldest);
            self.before.entry(oldest).or_insert(known);
        }
        is_new
    }

    fn insert(&mut self, origin: Uuid, known: Known) {
        self.bytes += known.seen.places.len();
        self.order.insert(known.turn, origin);
        self.origins.insert(origin, known);
    }

    fn remove(&mut self, origin: Uuid) -> Option<Known> {
        let known = self.origins.remove(&origin)?;
        self.bytes -= known.seen.places.len();
        self.order.remove(&known.turn);
        Some(known)
    }

    fn undo(&mut self) {
        for (origin, before) in std::mem::take(&mut self.before) {
            self.remove(origin);
            if let Some(known) = before {
                self.insert(origin, known);
            }
        }
    }
}

/// What the splits of a consumer have brought, with the batch of the moment.
#[derive(Debug, Default)]
pub struct Copies(HashMap<String, Brought>);

impl Copies {
    /// Begins with a split, as it is stored.
    pub fn open(&mut self, split: &str, seen: Vec<(Uuid, Seen)>) {
        let mut brought = Brought::default();
        for (origin, seen) in seen {
            brought.turns += 1;
            let turn = brought.turns;
            brought.insert(origin, Known { seen, turn });
        }
        self.0.insert(split.to_owned(), brought);
    }

    pub fn close(&mut self, split: &str) {
        self.0.remove(split);
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
            let is_new = match self.0.get_mut(split) {
                Some(brought) => brought.take(mark),
                None => self.0.entry(split.to_owned()).or_default().take(mark),
            };
            removed += u64::from(!is_new);
            is_new
        });
        removed
    }

    /// What is to be stored with the batch: split, origin, what was seen; None: nothing is to be known of it any more.
    pub fn changes(&self) -> impl Iterator<Item = (&str, Uuid, Option<&Seen>)> {
        self.0.iter().flat_map(|(split, brought)| {
            brought.before.iter().filter_map(move |(origin, before)| {
                let now = brought.origins.get(origin).map(|known| &known.seen);
                let before = before.as_ref().map(|known| &known.seen);
                (now != before).then_some((split.as_str(), *origin, now))
            })
        })
    }

    /// The batch is stored.
    pub fn stored(&mut self) {
        for brought in self.0.values_mut() {
            brought.before.clear();
        }
    }

    /// The batch is not stored, and will be read again.
    pub fn undo(&mut self) {
        self.0.values_mut().for_each(Brought::undo);
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
        assert_eq!(changes, [("t/0", ORIGIN, Some(&Seen::new(2, vec![1])))]);
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
            .filter_map(|(_, origin, seen)| Some((origin, seen?.clone())))
            .collect();
        let mut next = Copies::default();
        next.open("s", stored);
        let mut read = batch("s", &[Some(mark(4, 9)), Some(mark(4, 1)), Some(mark(3, 1))]);
        assert_eq!(next.remove_from(&mut read), 2);
        assert_eq!(left(&read), ["1"]);
    }

    #[test]
    fn origins_that_are_made_up_take_no_more_than_there_is_room_for() {
        let mut copies = Copies::default();
        copies.open("t/0", vec![(ORIGIN, Seen::new(1, vec![1]))]);
        let made_up = |n: u128| Mark {
            origin: Uuid::from_u128(1000 + n),
            ..mark(1, BATCH_RECORDS_MAX - 1)
        };
        let marks: Vec<_> = (0..1000).map(|n| Some(made_up(n))).collect();
        assert_eq!(copies.remove_from(&mut batch("t/0", &marks)), 0);
        let bytes = |copies: &Copies| {
            let seen = |(_, _, seen): (_, _, Option<&Seen>)| seen.map_or(0, |s| s.places().len());
            copies.changes().map(seen).sum::<usize>()
        };
        assert!(bytes(&copies) <= PLACES_BYTES_MAX);
        // What was stored of the one that came up longest ago goes.
        assert!(
            copies
                .changes()
                .any(|change| change == ("t/0", ORIGIN, None))
        );
        copies.undo();
        assert_eq!(copies.changes().count(), 0);
        assert_eq!(
            copies.remove_from(&mut batch("t/0", &[Some(mark(1, 0))])),
            1
        );
        // In use, it stays.
        for n in 0..1000 {
            let both = [Some(made_up(n)), Some(mark(1, 0))];
            assert_eq!(copies.remove_from(&mut batch("t/0", &both)), 1);
            copies.stored();
        }
        let many: Vec<_> = (0..ORIGINS_MAX as u128 + 10)
            .map(|n| {
                Some(Mark {
                    origin: Uuid::from_u128(n + 1_000_000),
                    ..mark(1, 0)
                })
            })
            .collect();
        copies.remove_from(&mut batch("t/1", &many));
        assert_eq!(copies.changes().count(), ORIGINS_MAX);
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
