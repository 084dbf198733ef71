//! Reading partitions, as a state machine over a [`Broker`].
//!
//! Every partition is asked for its ends before it is read, and whenever librdkafka complains: a position outside of them
//! stops it. The first record asked for is the one before the position, if the position has its mark: another record there
//! means another topic of the same name.
//!
//! A position moves over what is no record as well, markers of transactions and what was aborted: else it would stay before
//! them until they are deleted, and look as if records were lost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Ask, Broker, Failure, Message, Partition};
use crate::batch::{Batch, Limits, NewRecord, Offset, Stop};
use crate::cursor::{Cursor, Cursors};
use crate::error::{SourceError, StopReason};
use crate::position::{Mark, Position};
use crate::source::{Ends, Lag};

pub(super) const READ: &str = "read from Kafka";

/// What the reader knows of a partition beside its positions.
#[derive(Debug)]
pub(crate) struct Known {
    partition: Partition,
    /// Whether the broker reads it: not yet, after it could not be reached.
    assigned: bool,
    /// The broker's position is of the present assignment.
    fresh: bool,
    /// The record that has to come first.
    expects: Option<Mark>,
    /// Where in the batch that is being made its records are counted.
    moved: Option<usize>,
    /// Since when the cluster has not known it.
    missing_since: Option<Instant>,
    stopped: Option<StopReason>,
}

pub(crate) struct Reader<B> {
    broker: B,
    /// A partition counts as gone when the cluster has not known it for so long: brokers that start know little at first.
    gone_after: Duration,
    cursors: Cursors<Known>,
    /// Where the last message's partition is: most often it is the next one's as well.
    last: usize,
    /// A poll began whose batch nobody has got.
    undelivered: bool,
    /// The broker may still read what it should not.
    unassigns: bool,
}

impl<B: Broker> Reader<B> {
    pub(crate) fn new(broker: B, gone_after: Duration) -> Self {
        Self {
            broker,
            gone_after,
            cursors: Cursors::default(),
            last: 0,
            undelivered: false,
            unassigns: false,
        }
    }

    pub(crate) fn open(&mut self, split: &str, from: Position) -> Result<(), SourceError> {
        let partition = Partition::parse(split)?;
        if !matches!(from, Position::Beginning | Position::Offset { .. }) {
            return Err(SourceError::Misuse(format!(
                "a partition has no position {from:?}"
            )));
        }
        self.close(split)?;
        let known = Known {
            partition,
            assigned: false,
            fresh: false,
            expects: None,
            moved: None,
            missing_since: None,
            stopped: None,
        };
        self.cursors.open(split, from, known);
        Ok(())
    }

    pub(crate) fn close(&mut self, split: &str) -> Result<(), SourceError> {
        let Some(cursor) = self.cursors.get(split) else {
            return Ok(());
        };
        let partition = cursor.more.assigned.then(|| cursor.more.partition.clone());
        self.cursors.close(split);
        if let Some(partition) = partition
            && self.broker.unassign(&partition).is_err()
        {
            // Then all at once, before anything is read again: nothing comes of it in the meantime.
            self.forget_assignment();
        }
        Ok(())
    }

    pub(crate) fn pause(&mut self, split: &str, paused: bool) -> Result<(), SourceError> {
        let Some(cursor) = self.cursors.get(split) else {
            return Ok(());
        };
        cursor.paused = paused;
        if !cursor.more.assigned {
            return Ok(());
        }
        self.broker
            .pause(&cursor.more.partition, paused)
            .map_err(|failure| failure.into_error(READ))
    }

    pub(crate) fn ack(&mut self, batch: &Batch) {
        self.cursors.ack(batch);
    }

    /// The partitions that are read, and what may be asked for their ends.
    pub(crate) fn asker(&self) -> (Arc<dyn Ask>, Vec<Partition>) {
        let open = self.cursors.iter().filter(|cursor| !cursor.done);
        let partitions = open.map(|cursor| cursor.more.partition.clone());
        (self.broker.asker(), partitions.collect())
    }

    /// Records between what was read and the end as it was told.
    pub(crate) fn lag(&mut self, split: &str, ends: &Ends) -> Option<Lag> {
        let cursor = self.cursors.get(split)?;
        let (oldest, end) = *ends.offsets.get(split)?;
        let next = match cursor.read {
            Position::Offset { next, .. } => next,
            _ => oldest,
        };
        Some(Lag::Records(u64::try_from(end - next).unwrap_or(0)))
    }

    #[cfg(test)]
    pub(crate) fn broker(&mut self) -> &mut B {
        &mut self.broker
    }

    /// The batch of the last poll has reached the caller.
    pub(crate) fn delivered(&mut self) {
        self.undelivered = false;
    }

    pub(crate) fn rewind(&mut self) {
        self.forget_assignment();
        self.cursors.rewind();
        for cursor in self.cursors.iter_mut() {
            cursor.more.stopped = None;
        }
        self.undelivered = false;
    }

    pub(crate) fn poll(&mut self, limits: &Limits) -> Result<Batch, SourceError> {
        if self.undelivered {
            self.rewind();
        }
        self.undelivered = true;
        let mut batch = Batch::default();
        for cursor in self.cursors.iter_mut() {
            cursor.more.moved = None;
        }
        self.assign(&mut batch);
        let until = Instant::now() + limits.wait;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let Self {
                broker,
                cursors,
                last,
                ..
            } = self;
            let polled = broker.poll(left, &mut |message| {
                take(cursors, last, &mut batch, message);
            });
            match polled {
                Ok(true) if batch.is_full(limits) => break,
                Ok(true) => {}
                Ok(false) if left.is_zero() => break,
                Ok(false) => {}
                Err(failure) => {
                    self.failed(failure, &mut batch);
                    // What failed may fail again at once: the caller's next poll is soon enough.
                    break;
                }
            }
        }
        self.finish(&mut batch);
        Ok(batch)
    }

    /// Lets the broker read what it does not read yet, if it may be read.
    fn assign(&mut self, batch: &mut Batch) {
        if self.unassigns {
            if let Err(failure) = self.broker.unassign_all() {
                batch.trouble = Some(failure.into_error(READ));
                return;
            }
            self.unassigns = false;
        }
        let mut starts = Vec::new();
        for cursor in self.cursors.iter_mut() {
            if cursor.more.assigned || cursor.done {
                continue;
            }
            match check(&mut self.broker, cursor, self.gone_after) {
                Ok(Ok(from)) => starts.push((cursor.more.partition.clone(), from)),
                Ok(Err(reason)) => cursor.more.stopped = Some(reason),
                Err(failure) => batch.trouble = Some(failure.into_error(READ)),
            }
        }
        if starts.is_empty() {
            return;
        }
        if let Err(failure) = self.broker.assign(&starts) {
            batch.trouble = Some(failure.into_error(READ));
            return;
        }
        for cursor in self.cursors.iter_mut() {
            let known = &mut cursor.more;
            if starts
                .iter()
                .any(|(partition, _)| *partition == known.partition)
            {
                known.assigned = true;
                known.fresh = false;
                if cursor.paused
                    && let Err(failure) = self.broker.pause(&known.partition, true)
                {
                    batch.trouble = Some(failure.into_error(READ));
                }
            }
        }
    }

    /// After a failure that is about partitions all are assigned anew by the next poll, which finds what has happened to each;
    /// librdkafka gives up the one it complained of.
    fn failed(&mut self, failure: Failure, batch: &mut Batch) {
        if matches!(failure, Failure::Partitions(_) | Failure::Unknown(_)) {
            self.forget_assignment();
        }
        batch.trouble = Some(failure.into_error(READ));
    }

    /// The next poll assigns all anew. What the broker still brings until then is not taken.
    fn forget_assignment(&mut self) {
        self.unassigns = true;
        for cursor in self.cursors.iter_mut() {
            cursor.more.assigned = false;
        }
    }

    /// Marks the last record of each split, and tells what has stopped.
    fn finish(&mut self, batch: &mut Batch) {
        let mut marked = vec![false; batch.moves.len()];
        for at in (0..batch.records().len()).rev() {
            let record = &batch.records()[at];
            let split = record.split;
            if std::mem::replace(&mut marked[split], true) {
                continue;
            }
            let Offset::Number(offset) = record.offset else {
                continue;
            };
            let mark = Mark::of(offset, record.timestamp_ms, batch.value(record));
            let to = Position::Offset {
                next: offset + 1,
                mark: Some(mark),
            };
            if let Some(cursor) = self.cursors.get(&batch.moves[split].split) {
                cursor.read = to.clone();
            }
            batch.moves[split].to = to;
        }
        self.pass_over(batch);
        for cursor in self.cursors.iter_mut() {
            if let Some(reason) = cursor.more.stopped.take() {
                cursor.done = true;
                batch.stops.push(Stop {
                    split: cursor.split.clone(),
                    reason,
                });
            }
        }
    }

    /// Moves the positions over what lies behind the last records and is none. Where that is not known they stay: it is asked
    /// again after the next poll.
    fn pass_over(&mut self, batch: &mut Batch) {
        if !self.cursors.iter().any(|cursor| cursor.more.assigned) {
            return;
        }
        let Ok(positions) = self.broker.positions() else {
            return;
        };
        for (partition, position) in positions {
            let mut cursors = self.cursors.iter_mut();
            let Some(cursor) = cursors.find(|cursor| cursor.more.partition == partition) else {
                continue;
            };
            let known = &mut cursor.more;
            let Some(next) = position else {
                known.fresh = true;
                continue;
            };
            if cursor.done || !known.assigned || !known.fresh || known.stopped.is_some() {
                continue;
            }
            let mark = match cursor.read {
                Position::Offset { next: read, .. } if next <= read => continue,
                Position::Offset { mark, .. } => mark,
                _ => None,
            };
            let moved = batch.moved(&cursor.split, &cursor.read);
            cursor.read = Position::Offset { next, mark };
            batch.moves[moved].to = cursor.read.clone();
        }
    }
}

/// From which offset a partition has to be read (None: the oldest), or why it cannot be.
fn check<B: Broker>(
    broker: &mut B,
    cursor: &mut Cursor<Known>,
    gone_after: Duration,
) -> Result<Result<Option<i64>, StopReason>, Failure> {
    let known = &mut cursor.more;
    known.expects = None;
    let (oldest, end) = match broker.ends(&known.partition) {
        Ok(ends) => ends,
        Err(Failure::Unknown(reason)) => {
            let since = *known.missing_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= gone_after {
                return Ok(Err(StopReason::Gone));
            }
            return Err(Failure::Unknown(reason));
        }
        Err(failure) => return Err(failure),
    };
    known.missing_since = None;
    let Position::Offset { next, mark } = cursor.read else {
        return Ok(Ok(None));
    };
    if next < oldest {
        return Ok(Err(StopReason::Truncated { next, oldest }));
    }
    if next > end {
        return Ok(Err(StopReason::Shorter { next, end }));
    }
    Ok(Ok(Some(match mark {
        Some(mark) if mark.offset >= oldest && mark.offset < next => {
            known.expects = Some(mark);
            mark.offset
        }
        _ => next,
    })))
}

/// Adds a message to the batch, if it is the next one of a partition that is read.
fn take(cursors: &mut Cursors<Known>, last: &mut usize, batch: &mut Batch, message: Message<'_>) {
    let is_of = |cursor: &Cursor<Known>| {
        cursor.more.partition.number == message.partition
            && cursor.more.partition.topic == message.topic
    };
    if !cursors.at(*last).is_some_and(|cursor| is_of(cursor)) {
        match cursors.iter().position(is_of) {
            Some(place) => *last = place,
            None => return,
        }
    }
    let Some(cursor) = cursors.at(*last) else {
        return;
    };
    let known = &mut cursor.more;
    if cursor.done || known.stopped.is_some() || !known.assigned {
        return;
    }
    known.fresh = true;
    if let Some(expected) = known.expects {
        // Of a compacted topic, or between transactions, the record itself may be gone.
        known.expects = None;
        if message.offset == expected.offset {
            let found = Mark::of(message.offset, message.timestamp_ms, message.value);
            if found != expected {
                known.stopped = Some(StopReason::Recreated {
                    next: expected.offset + 1,
                });
            }
            return;
        }
    }
    if let Position::Offset { next, .. } = cursor.read
        && message.offset < next
    {
        return;
    }
    let split = *known
        .moved
        .get_or_insert_with(|| batch.moved(&cursor.split, &cursor.read));
    cursor.read = Position::offset(message.offset + 1);
    batch.push(
        split,
        NewRecord {
            offset: &Offset::Number(message.offset),
            timestamp_ms: message.timestamp_ms,
            value: message.value,
            collection: message.collection,
            mark: message.mark,
        },
    );
}
