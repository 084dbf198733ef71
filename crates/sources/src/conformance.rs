//! What every kind of source has to do, checked the same way for all: each record once and in the order of its split, whatever
//! is dropped, rolled back, handed over or made to wait in between.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rakam_files::source::Rows;

use crate::batch::{Batch, Limits};
use crate::error::SourceError;
use crate::position::Position;
use crate::source::{Fetch, Lag, Splits, Start, lag_now};

/// A service that can be written to.
#[async_trait]
pub(crate) trait World {
    /// Makes a split of these records; its id.
    async fn make(&mut self, name: &str, records: &[String]) -> String;

    /// What a process that starts anew would have.
    async fn splits(&mut self) -> Box<dyn Splits>;

    async fn fetch(&mut self) -> Box<dyn Fetch>;
}

const RECORDS: usize = 40;
const GIVE_UP: Duration = Duration::from_secs(120);
const LIMITS: Limits = Limits {
    bytes: 1 << 20,
    records: 7,
    wait: Duration::from_millis(20),
};

/// What was read, by split, and where each split is stored to be.
#[derive(Default)]
struct Reading {
    records: BTreeMap<String, Vec<String>>,
    stored: BTreeMap<String, Position>,
    ended: Vec<String>,
}

impl Reading {
    /// As the transaction of a consumer does.
    fn store(&mut self, batch: &Batch) {
        for moved in &batch.moves {
            assert_eq!(
                self.stored.get(&moved.split),
                Some(&moved.from),
                "{}",
                moved.split
            );
            self.stored.insert(moved.split.clone(), moved.to.clone());
            if moved.ended {
                self.ended.push(moved.split.clone());
            }
        }
        for (split, value) in values(batch) {
            self.records.entry(split).or_default().push(value);
        }
    }

    fn count(&self) -> usize {
        self.records.values().map(Vec::len).sum()
    }
}

fn values(batch: &Batch) -> Vec<(String, String)> {
    assert_eq!(batch.stops, []);
    assert_eq!(batch.trouble, None);
    let of = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
    let split = |at: usize| batch.moves[at].split.clone();
    let records = batch
        .records()
        .iter()
        .map(|r| (split(r.split), of(batch.value(r).unwrap_or_default())));
    let rows = batch.pieces.iter().flat_map(|file| match &file.piece.rows {
        Rows::Events(events) => events
            .iter()
            .map(|e| (split(file.split), e.json.clone()))
            .collect(),
        Rows::Columns { .. } => Vec::new(),
    });
    records.chain(rows).collect()
}

/// Polls until it holds; fails when nothing comes any more.
async fn until(fetch: &mut dyn Fetch, mut done: impl FnMut(&mut dyn Fetch, Batch) -> bool) {
    let give_up = Instant::now() + GIVE_UP;
    loop {
        let batch = polled(fetch.poll(&LIMITS).await);
        if done(fetch, batch) {
            return;
        }
        assert!(Instant::now() < give_up, "no more records come");
    }
}

fn polled(batch: Result<Batch, SourceError>) -> Batch {
    batch.unwrap_or_else(|error| panic!("{error}"))
}

pub(crate) async fn conforms(world: &mut dyn World) {
    let mut expected = BTreeMap::new();
    for name in ["a", "b", "c"] {
        let record = |n: usize| format!("{{\"of\":\"{name}\",\"n\":{n}}}");
        let records: Vec<String> = (0..RECORDS).map(record).collect();
        let id = world.make(name, &records).await;
        expected.insert(id, records);
    }
    let ids: Vec<&String> = expected.keys().collect();

    // Splits are listed whole, in order, and begin with their oldest record.
    let mut splits = world.splits().await;
    let listed = splits.list().await.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(listed.iter().map(|s| &s.id).collect::<Vec<_>>(), ids);
    let located = splits.locate(&listed, &Start::Earliest).await;
    let located = located.unwrap_or_else(|e| panic!("{e}"));
    let begin: BTreeMap<String, Position> =
        listed.iter().map(|s| s.id.clone()).zip(located).collect();

    // Read whole; what is not stored is read again, and each process goes on where the one before it stored.
    let mut reading = Reading {
        stored: begin.clone(),
        ..Reading::default()
    };
    for turn in 0.. {
        let mut fetch = world.fetch().await;
        for (id, position) in &reading.stored {
            // The position survives the database.
            let kept = serde_json::to_string(position).unwrap_or_default();
            let position = serde_json::from_str(&kept).unwrap_or_else(|e| panic!("{kept}: {e}"));
            open(&mut *fetch, id, position).await;
        }
        let (mut polls, before) = (0, reading.count());
        until(&mut *fetch, |fetch, batch| {
            polls += 1;
            if turn % 2 == 1 && polls == 1 {
                // The process dies before it stores anything.
                return !batch.is_empty();
            }
            reading.store(&batch);
            fetch.ack(&batch);
            reading.count() == 3 * RECORDS || turn < 4 && reading.count() >= before + 10
        })
        .await;
        if reading.count() == 3 * RECORDS {
            // Nothing is left that would still be counted as unread: the positions are at the ends.
            let (mut caught_up, give_up) = (false, Instant::now() + GIVE_UP);
            while !caught_up {
                assert!(Instant::now() < give_up, "the ends are not reached");
                let batch = polled(fetch.poll(&LIMITS).await);
                reading.store(&batch);
                fetch.ack(&batch);
                caught_up = true;
                for id in &ids {
                    let lag = lag_now(&mut *fetch, id).await;
                    let lag = lag.unwrap_or_else(|e| panic!("{e}"));
                    caught_up &= matches!(
                        lag,
                        None | Some(Lag::Records(0)) | Some(Lag::Milliseconds(0))
                    );
                }
            }
            break;
        }
    }
    assert_eq!(reading.records, expected);

    // A transaction that fails, and a poll that is dropped.
    let mut fetch = world.fetch().await;
    for (id, position) in &begin {
        open(&mut *fetch, id, position.clone()).await;
    }
    let mut reading = Reading {
        stored: begin.clone(),
        ..Reading::default()
    };
    let (mut turn, give_up) = (0, Instant::now() + GIVE_UP);
    loop {
        assert!(
            Instant::now() < give_up,
            "no more records come: {}",
            reading.count()
        );
        turn += 1;
        if turn % 3 == 0 {
            // Whether it was done or not, nobody gets what it read.
            let done = {
                let poll = pin!(fetch.poll(&LIMITS));
                let mut context = Context::from_waker(Waker::noop());
                matches!(poll.poll(&mut context), Poll::Ready(_))
            };
            if done {
                fetch.rewind().await.unwrap_or_else(|e| panic!("{e}"));
            }
            continue;
        }
        if turn % 3 == 1 {
            drop(polled(fetch.poll(&LIMITS).await));
            fetch.rewind().await.unwrap_or_else(|e| panic!("{e}"));
            continue;
        }
        until(&mut *fetch, |fetch, batch| {
            reading.store(&batch);
            fetch.ack(&batch);
            !batch.is_empty()
        })
        .await;
        if reading.count() == 3 * RECORDS {
            break;
        }
    }
    assert_eq!(reading.records, expected);

    // A split that waits, one that is closed, and one that is opened again.
    let mut fetch = world.fetch().await;
    for (id, position) in &begin {
        open(&mut *fetch, id, position.clone()).await;
    }
    let pause = |paused| (ids[0].clone(), paused);
    let (id, paused) = pause(true);
    fetch
        .pause(&id, paused)
        .await
        .unwrap_or_else(|e| panic!("{e}"));
    fetch.close(ids[1]).await.unwrap_or_else(|e| panic!("{e}"));
    let mut reading = Reading {
        stored: begin.clone(),
        ..Reading::default()
    };
    until(&mut *fetch, |fetch, batch| {
        reading.store(&batch);
        fetch.ack(&batch);
        reading.count() == RECORDS
    })
    .await;
    assert_eq!(reading.records.keys().collect::<Vec<_>>(), [ids[2]]);
    let (id, paused) = pause(false);
    fetch
        .pause(&id, paused)
        .await
        .unwrap_or_else(|e| panic!("{e}"));
    open(&mut *fetch, ids[1], begin[ids[1]].clone()).await;
    until(&mut *fetch, |fetch, batch| {
        reading.store(&batch);
        fetch.ack(&batch);
        reading.count() == 3 * RECORDS
    })
    .await;
    assert_eq!(reading.records, expected);
}

async fn open(fetch: &mut dyn Fetch, split: &str, from: Position) {
    fetch
        .open(split, from)
        .await
        .unwrap_or_else(|e| panic!("{split}: {e}"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Memory, MemoryFetch};

    #[async_trait]
    impl World for Memory {
        async fn make(&mut self, name: &str, records: &[String]) -> String {
            for record in records {
                self.write(name, record.as_bytes());
            }
            name.to_owned()
        }

        async fn splits(&mut self) -> Box<dyn Splits> {
            Box::new(self.clone())
        }

        async fn fetch(&mut self) -> Box<dyn Fetch> {
            Box::new(MemoryFetch::new(self.clone()))
        }
    }

    #[tokio::test]
    async fn memory_conforms() {
        conforms(&mut Memory::default()).await;
    }
}
