//! Reading shards, as a state machine over a [`Stream`].
//!
//! A shard has an iterator, which comes from its position and lives five minutes, and a time before which it is not asked
//! again: a shard answers five requests a second. Several shards are asked at once, those that wait longest first. A shard ends
//! when it gives no next iterator *and* the shards that follow it are known, or the list says that it is closed: an answer
//! without a next iterator alone is not believed.
//!
//! At a record that was deleted the service begins with the oldest one that it has, and does not say so. So where that may
//! have happened, an iterator begins at the record that was read last, not after it: if another one comes first, the shard
//! stops. If none comes, nobody can tell whether there were any, and a shard that is not closed goes on.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use futures::future::join_all;

use super::aggregate::{self, Held};
use super::{Answer, Failure, Raw, Stream};
use crate::batch::{Batch, Limits, NewRecord, Offset, Stop};
use crate::cursor::{Cursor, Cursors};
use crate::error::{SourceError, StopReason};
use crate::position::Position;
use crate::published::split_mark;
use crate::source::{Ends, Fetch, Lag};

const READ: &str = "read from Kinesis";
/// Shards asked at the same time. An answer has up to 10 MB, so this bounds memory.
const AT_ONCE: usize = 4;
/// Records of one answer, at most: what the service allows.
const MOST_RECORDS: usize = 10_000;
/// A record is taken for so large when it is asked how many may come.
const RECORD_BYTES: usize = 1 << 10;
/// An iterator at a record that was deleted may bring nothing for ever. After so many answers the oldest record is asked for.
const EMPTY_MOST: u32 = 5;

/// How often a shard is asked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// After an answer.
    pub(crate) pause: Duration,
    /// After a first failure; twice as long after each further one,
    pub(crate) backoff: Duration,
    /// and this at most.
    pub(crate) backoff_most: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            pause: Duration::from_millis(220),
            backoff: Duration::from_millis(400),
            backoff_most: Duration::from_secs(10),
        }
    }
}

/// What the reader knows of a shard beside its positions.
#[derive(Debug)]
pub(crate) struct Known {
    hashes: RangeInclusive<u128>,
    /// They are not known, or may be those of an earlier stream of the name.
    may_have_other_hashes: bool,
    iterator: Option<String>,
    /// The record that has to come first.
    expects: Option<String>,
    /// So many answers were empty since it was asked for.
    empty: u32,
    /// They were too many: the oldest record is asked for.
    asks_oldest: bool,
    /// What is not stored of it was written later than this; None: not known.
    unread_since: Option<SystemTime>,
    /// It gave no next iterator: whether it is closed has to be asked.
    may_have_ended: bool,
    due: Instant,
    failures: u32,
    behind_ms: Option<u64>,
}

impl Cursor<Known> {
    /// The record that a new iterator has to begin with; None: there is none, or what is behind it cannot have been deleted.
    fn expected(&self, kept: Duration) -> Option<String> {
        let is_kept = |since: SystemTime| since.elapsed().is_ok_and(|age| age < kept);
        if self.more.unread_since.is_some_and(is_kept) {
            return None;
        }
        match &self.read {
            Position::After(sequence) => Some(sequence.clone()),
            // Where somebody has it begin: the number that a shard starts with is no record's.
            _ => None,
        }
    }
}

/// What a shard answered.
enum Told {
    /// With the range of its hash keys, if that was asked for.
    Records(Answer, Option<RangeInclusive<u128>>),
    Closed(bool),
}

pub(crate) struct Reader<S> {
    stream: S,
    pace: Pace,
    /// No record is deleted before it is so old.
    kept: Duration,
    cursors: Cursors<Known>,
    ranges: HashMap<String, RangeInclusive<u128>>,
    /// A poll began whose batch nobody has got.
    undelivered: bool,
}

impl<S: Stream> Reader<S> {
    pub(crate) fn new(stream: S, pace: Pace, kept: Duration) -> Self {
        Self {
            stream,
            pace,
            kept,
            cursors: Cursors::default(),
            ranges: HashMap::new(),
            undelivered: false,
        }
    }

    /// The range of a shard's hash keys, which tells the aggregates that are its own; None: the service does not say it now.
    async fn hashes(&mut self, shard: &str) -> Result<Option<RangeInclusive<u128>>, SourceError> {
        if !self.ranges.contains_key(shard) {
            let shards = match self.stream.shards().await {
                Ok(shards) => shards,
                // It is asked again with the shard's first request. An error would begin all shards anew, which asks it more.
                Err(Failure::Throttled(_) | Failure::Transient(_)) => return Ok(None),
                Err(failure) => return Err(failure.into_error("list the shards of a stream")),
            };
            self.ranges = shards.into_iter().map(|s| (s.split.id, s.hashes)).collect();
        }
        let known = self.ranges.get(shard).cloned();
        Ok(Some(known.unwrap_or(0..=u128::MAX)))
    }

    /// Everything that is not acknowledged comes again.
    fn begin_again(&mut self) {
        self.cursors.rewind();
        for cursor in self.cursors.iter_mut() {
            cursor.more.iterator = None;
            cursor.more.may_have_ended = false;
        }
        self.undelivered = false;
    }

    /// The shards to ask now, those first that are due longest. No more than there may be records: each brings one at least.
    fn turn(&self, limits: &Limits) -> Vec<usize> {
        let now = Instant::now();
        let mut due: Vec<(Instant, usize)> = self
            .cursors
            .iter()
            .enumerate()
            .filter(|(_, c)| !c.done && !c.paused && c.more.due <= now)
            .map(|(place, c)| (c.more.due, place))
            .collect();
        due.sort_unstable();
        due.truncate(AT_ONCE.min(limits.records.max(1)));
        due.into_iter().map(|(_, place)| place).collect()
    }

    fn next_due(&self) -> Option<Instant> {
        let open = self.cursors.iter().filter(|c| !c.done && !c.paused);
        open.map(|c| c.more.due).min()
    }

    async fn ask(&mut self, turn: &[usize], limits: &Limits, batch: &mut Batch) {
        // The service takes no limit of bytes.
        let fitting = limits.records.min(limits.bytes / RECORD_BYTES);
        let most = fitting.clamp(1, MOST_RECORDS);
        let kept = self.kept;
        let Self {
            stream, cursors, ..
        } = self;
        let stream: &S = stream;
        let asked: Vec<_> = turn
            .iter()
            .filter_map(|&place| {
                let cursor = cursors.at(place)?;
                let mut position = cursor.read.clone();
                if cursor.more.iterator.is_none() && !cursor.more.may_have_ended {
                    cursor.more.expects = cursor.expected(kept);
                    if let Some(sequence) = &cursor.more.expects {
                        position = match cursor.more.asks_oldest {
                            true => Position::Beginning,
                            false => Position::At(sequence.clone()),
                        };
                    }
                }
                let ask = Ask {
                    shard: cursor.split.clone(),
                    position,
                    iterator: cursor.more.iterator.clone(),
                    may_have_ended: cursor.more.may_have_ended,
                    may_have_other_hashes: cursor.more.may_have_other_hashes,
                };
                Some(async move { (place, ask.run(stream, most).await) })
            })
            .collect();
        for (place, told) in join_all(asked).await {
            self.hear(place, told, batch);
        }
    }

    fn hear(&mut self, place: usize, told: Result<Told, Failure>, batch: &mut Batch) {
        let pace = self.pace;
        let Some(cursor) = self.cursors.at(place) else {
            return;
        };
        let known = &mut cursor.more;
        let now = Instant::now();
        let failure = match told {
            Ok(Told::Records(answer, hashes)) => {
                known.failures = 0;
                known.due = now + pace.pause;
                if let Some(hashes) = hashes {
                    known.hashes = hashes;
                    known.may_have_other_hashes = false;
                }
                if let Some(reason) = take(cursor, answer, batch) {
                    self.stop(place, reason, batch);
                }
                return;
            }
            Ok(Told::Closed(closed)) => {
                known.failures = 0;
                known.due = now + pace.pause;
                known.may_have_ended = false;
                if !closed {
                    return;
                }
                match known.expects.take() {
                    Some(sequence) => self.stop(place, StopReason::Trimmed(sequence), batch),
                    None => {
                        let moved = batch.moved(&cursor.split, &cursor.read);
                        batch.moves[moved].ended = true;
                        cursor.done = true;
                    }
                }
                return;
            }
            Err(failure) => failure,
        };
        // Whatever it was, the position gives a new iterator.
        let had_iterator = known.iterator.take().is_some();
        if had_iterator && !matches!(cursor.read, Position::At(_) | Position::After(_)) {
            // No record would tell that the stream was made anew.
            known.may_have_other_hashes = true;
            self.ranges.clear();
        }
        let reason = match (&failure, &cursor.read) {
            (Failure::Expired, _) if had_iterator => {
                known.due = now;
                return;
            }
            (Failure::Missing(_), _) => Some(StopReason::Gone),
            (Failure::Foreign(_), Position::At(sequence) | Position::After(sequence)) => {
                Some(StopReason::UnknownRecord(sequence.clone()))
            }
            _ => None,
        };
        if let Some(reason) = reason {
            self.stop(place, reason, batch);
            return;
        }
        let factor = 1u32 << known.failures.min(16);
        known.failures += 1;
        known.due = now + pace.backoff.saturating_mul(factor).min(pace.backoff_most);
        // Being throttled is how a shard says that it is asked enough: no trouble unless it lasts.
        if !matches!(failure, Failure::Throttled(_)) || known.failures > 3 {
            known.behind_ms = None;
            batch.trouble = Some(failure.into_error(READ));
        }
    }

    /// Reads a shard no further.
    fn stop(&mut self, place: usize, reason: StopReason, batch: &mut Batch) {
        let Some(cursor) = self.cursors.at(place) else {
            return;
        };
        cursor.done = true;
        batch.stops.push(Stop {
            split: cursor.split.clone(),
            reason,
        });
        // A stream that was made anew has other ranges.
        self.ranges.clear();
    }
}

#[async_trait]
impl<S: Stream> Fetch for Reader<S> {
    async fn open(&mut self, shard: &str, from: Position) -> Result<(), SourceError> {
        let sequence = match &from {
            Position::Beginning | Position::Time(_) => None,
            Position::At(sequence) | Position::After(sequence) => Some(sequence),
            Position::Offset { .. } | Position::Row { .. } => {
                return Err(SourceError::Misuse(format!(
                    "a shard has no position {from:?}"
                )));
            }
        };
        if sequence.is_some_and(|s| !crate::position::is_sequence_number(s)) {
            return Err(SourceError::option(
                "malformed sequence number",
                "A sequence number of Kinesis is a text of digits.",
            ));
        }
        let hashes = self.hashes(shard).await?;
        let known = Known {
            may_have_other_hashes: hashes.is_none(),
            hashes: hashes.unwrap_or(0..=u128::MAX),
            iterator: None,
            expects: None,
            empty: 0,
            asks_oldest: false,
            unread_since: None,
            may_have_ended: false,
            due: Instant::now(),
            failures: 0,
            behind_ms: None,
        };
        self.cursors.open(shard, from, known);
        Ok(())
    }

    async fn close(&mut self, shard: &str) -> Result<(), SourceError> {
        self.cursors.close(shard);
        Ok(())
    }

    async fn poll(&mut self, limits: &Limits) -> Result<Batch, SourceError> {
        if self.undelivered {
            self.begin_again();
        }
        self.undelivered = true;
        let mut batch = Batch::default();
        let until = Instant::now() + limits.wait;
        loop {
            let turn = self.turn(limits);
            if !turn.is_empty() {
                self.ask(&turn, limits, &mut batch).await;
            }
            let now = Instant::now();
            let stopped = !batch.stops.is_empty() || batch.trouble.is_some();
            if batch.is_full(limits) || stopped || now >= until {
                break;
            }
            let next = self.next_due().map_or(until, |due| due.min(until));
            tokio::time::sleep(next.saturating_duration_since(now)).await;
        }
        self.undelivered = false;
        Ok(batch)
    }

    fn ack(&mut self, batch: &Batch) {
        self.cursors.ack(batch);
    }

    async fn rewind(&mut self) -> Result<(), SourceError> {
        self.begin_again();
        Ok(())
    }

    async fn pause(&mut self, shard: &str, paused: bool) -> Result<(), SourceError> {
        if let Some(cursor) = self.cursors.get(shard) {
            cursor.paused = paused;
        }
        Ok(())
    }

    fn lag(&mut self, shard: &str, _ends: &Ends) -> Option<Lag> {
        // Each answer says it.
        let behind = self.cursors.get(shard).and_then(|c| c.more.behind_ms);
        behind.map(Lag::Milliseconds)
    }
}

/// What a shard is asked.
struct Ask {
    shard: String,
    position: Position,
    iterator: Option<String>,
    may_have_ended: bool,
    may_have_other_hashes: bool,
}

impl Ask {
    async fn run<S: Stream>(self, stream: &S, most: usize) -> Result<Told, Failure> {
        if self.may_have_ended {
            let shards = stream.shards().await?;
            let shard = shards.iter().find(|s| s.split.id == self.shard);
            return Ok(Told::Closed(shard.is_none_or(|s| s.split.closed)));
        }
        let iterator = match self.iterator {
            Some(iterator) => iterator,
            None => match stream.iterator(&self.shard, &self.position).await {
                Err(Failure::Invalid(reason)) => return Err(Failure::Foreign(reason)),
                iterator => iterator?,
            },
        };
        let hashes = match self.may_have_other_hashes {
            true => {
                let shards = stream.shards().await?;
                let shard = shards.into_iter().find(|s| s.split.id == self.shard);
                Some(shard.map_or(0..=u128::MAX, |s| s.hashes))
            }
            false => None,
        };
        let answer = stream.records(&iterator, most).await?;
        Ok(Told::Records(answer, hashes))
    }
}

/// Takes what an answer brings, or says why the shard stops.
fn take(cursor: &mut Cursor<Known>, answer: Answer, batch: &mut Batch) -> Option<StopReason> {
    let known = &mut cursor.more;
    known.behind_ms = answer.behind_ms;
    known.may_have_ended = answer.next.is_none();
    let ended = answer.next.is_none() && answer.has_children;
    known.iterator = answer.next;
    let mut records = answer.records.as_slice();
    if let Some(expected) = known.expects.take() {
        let is_behind = answer.behind_ms.is_some_and(|ms| ms > 0);
        match records.first() {
            Some(first) if first.sequence == expected => {}
            // Older ones are kept, and so it is as well: it is asked for again.
            Some(first) if known.asks_oldest && is_below(&first.sequence, &expected) => {
                (known.empty, known.asks_oldest) = (0, false);
                known.may_have_ended = false;
                known.iterator = None;
                return None;
            }
            // Of an open shard nothing is left. A source that rests must not stop for that.
            None if known.iterator.is_some() && !is_behind => {}
            // A later answer tells, or the list whether the shard is closed.
            None if !ended => {
                known.expects = Some(expected);
                known.empty += 1;
                if known.empty >= EMPTY_MOST && !known.asks_oldest {
                    known.asks_oldest = true;
                    known.iterator = None;
                }
                return None;
            }
            _ => return Some(StopReason::Trimmed(expected)),
        }
        (known.empty, known.asks_oldest) = (0, false);
    }
    // What was read comes once more.
    if let (Position::After(read), Some((first, others))) = (&cursor.read, records.split_first())
        && first.sequence == *read
    {
        records = others;
    }
    if records.is_empty()
        && cursor.read == cursor.acked
        && let Some(behind_ms) = answer.behind_ms
    {
        known.unread_since = SystemTime::now().checked_sub(Duration::from_millis(behind_ms));
    }
    if ended || !records.is_empty() {
        let moved = batch.moved(&cursor.split, &cursor.read);
        for raw in records {
            add(batch, moved, raw, &known.hashes);
            cursor.read = Position::After(raw.sequence.clone());
        }
        batch.moves[moved].to = cursor.read.clone();
        batch.moves[moved].ended = ended;
    }
    cursor.done = ended;
    None
}

/// Whether a sequence number is below another one: they begin with no zeros.
fn is_below(sequence: &str, other: &str) -> bool {
    (sequence.len(), sequence) < (other.len(), other)
}

/// Adds the user records of a record, all or none of an aggregate to the same batch.
fn add(batch: &mut Batch, moved: usize, raw: &Raw, hashes: &RangeInclusive<u128>) {
    let offset = Offset::Digits(Arc::from(raw.sequence.as_str()));
    let mut push = |bytes: &[u8]| {
        let (value, collection, mark) = match split_mark(bytes) {
            Some((value, collection, mark)) => (value, Some(collection), Some(mark)),
            None => (bytes, None, None),
        };
        let record = NewRecord {
            offset: &offset,
            timestamp_ms: raw.arrived_ms,
            value: Some(value),
            collection,
            mark,
        };
        batch.push(moved, record);
    };
    match aggregate::unpack(&raw.data, hashes) {
        Held::One => push(&raw.data),
        Held::Many(records) => records.into_iter().for_each(push),
        Held::Elsewhere => {}
    }
}
