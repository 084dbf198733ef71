//! Reading shards, as a state machine over a [`Stream`].
//!
//! A shard has an iterator, which comes from its position and lives five minutes, and a time before which it is not asked
//! again: a shard answers five requests a second. Several shards are asked at once, those that wait longest first. A shard ends
//! when it gives no next iterator *and* the shards that follow it are known, or the list says that it is closed: an answer
//! without a next iterator alone is not believed.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::future::join_all;

use super::aggregate::{self, Held};
use super::{Answer, Failure, Raw, Stream};
use crate::batch::{Batch, Limits, NewRecord, Offset, Stop};
use crate::cursor::Cursors;
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
    iterator: Option<String>,
    /// It gave no next iterator: whether it is closed has to be asked.
    may_have_ended: bool,
    due: Instant,
    failures: u32,
    behind_ms: Option<u64>,
}

/// What a shard answered.
enum Told {
    Records(Answer),
    Closed(bool),
}

pub(crate) struct Reader<S> {
    stream: S,
    pace: Pace,
    cursors: Cursors<Known>,
    ranges: HashMap<String, RangeInclusive<u128>>,
    /// A poll began whose batch nobody has got.
    undelivered: bool,
}

impl<S: Stream> Reader<S> {
    pub(crate) fn new(stream: S, pace: Pace) -> Self {
        Self {
            stream,
            pace,
            cursors: Cursors::default(),
            ranges: HashMap::new(),
            undelivered: false,
        }
    }

    /// The range of a shard's hash keys, which tells the aggregates that are its own.
    async fn hashes(&mut self, shard: &str) -> Result<RangeInclusive<u128>, SourceError> {
        if !self.ranges.contains_key(shard) {
            let shards = self.stream.shards().await;
            let shards = shards.map_err(|f| f.into_error("list the shards of a stream"))?;
            self.ranges = shards.into_iter().map(|s| (s.split.id, s.hashes)).collect();
        }
        Ok(self.ranges.get(shard).cloned().unwrap_or(0..=u128::MAX))
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

    /// The shards to ask now, those first that are due longest.
    fn turn(&self) -> Vec<usize> {
        let now = Instant::now();
        let mut due: Vec<(Instant, usize)> = self
            .cursors
            .iter()
            .enumerate()
            .filter(|(_, c)| !c.done && !c.paused && c.more.due <= now)
            .map(|(place, c)| (c.more.due, place))
            .collect();
        due.sort_unstable();
        due.truncate(AT_ONCE);
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
        let Self {
            stream, cursors, ..
        } = self;
        let stream: &S = stream;
        let asked: Vec<_> = turn
            .iter()
            .filter_map(|&place| {
                let cursor = cursors.at(place)?;
                let iterator = cursor.more.iterator.clone();
                let ask = Ask {
                    shard: cursor.split.clone(),
                    position: cursor.read.clone(),
                    iterator,
                    may_have_ended: cursor.more.may_have_ended,
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
            Ok(Told::Records(answer)) => {
                known.failures = 0;
                known.due = now + pace.pause;
                known.behind_ms = answer.behind_ms;
                known.may_have_ended = answer.next.is_none();
                let ended = answer.next.is_none() && answer.has_children;
                known.iterator = answer.next;
                if ended || !answer.records.is_empty() {
                    let moved = batch.moved(&cursor.split, &cursor.read);
                    for raw in &answer.records {
                        add(batch, moved, raw, &known.hashes);
                        cursor.read = Position::After(raw.sequence.clone());
                    }
                    batch.moves[moved].to = cursor.read.clone();
                    batch.moves[moved].ended = ended;
                }
                cursor.done = ended;
                return;
            }
            Ok(Told::Closed(closed)) => {
                known.failures = 0;
                known.due = now + pace.pause;
                known.may_have_ended = false;
                if closed {
                    let moved = batch.moved(&cursor.split, &cursor.read);
                    batch.moves[moved].ended = true;
                    cursor.done = true;
                }
                return;
            }
            Err(failure) => failure,
        };
        // Whatever it was, the position gives a new iterator.
        let had_iterator = known.iterator.take().is_some();
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
            cursor.done = true;
            batch.stops.push(Stop {
                split: cursor.split.clone(),
                reason,
            });
            // A stream that was made anew has other ranges.
            self.ranges.clear();
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
        let known = Known {
            hashes: self.hashes(shard).await?,
            iterator: None,
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
            let turn = self.turn();
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
        stream.records(&iterator, most).await.map(Told::Records)
    }
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
