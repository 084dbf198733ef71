//! A source in memory: the least that passes the conformance tests.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;

use crate::batch::{Batch, Limits, NewRecord, Offset};
use crate::cursor::Cursors;
use crate::error::SourceError;
use crate::position::Position;
use crate::source::{Ends, Fetch, Lag, Split, Splits, Start};

/// Splits and their records, shared by whoever writes and reads them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Memory(Arc<Mutex<BTreeMap<String, Vec<Vec<u8>>>>>);

impl Memory {
    pub(crate) fn write(&self, split: &str, value: &[u8]) {
        self.lock()
            .entry(split.to_owned())
            .or_default()
            .push(value.to_owned());
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Vec<Vec<u8>>>> {
        self.0.lock().expect("no test writes and panics")
    }
}

#[async_trait]
impl Splits for Memory {
    async fn list(&mut self) -> Result<Vec<Split>, SourceError> {
        let split = |id: &String| Split {
            id: id.clone(),
            ..Split::default()
        };
        Ok(self.lock().keys().map(split).collect())
    }

    async fn locate(
        &mut self,
        splits: &[Split],
        _start: &Start,
    ) -> Result<Vec<Position>, SourceError> {
        Ok(vec![Position::Beginning; splits.len()])
    }
}

pub(crate) struct MemoryFetch {
    memory: Memory,
    cursors: Cursors<()>,
    undelivered: bool,
}

impl MemoryFetch {
    pub(crate) fn new(memory: Memory) -> Self {
        Self {
            memory,
            cursors: Cursors::default(),
            undelivered: false,
        }
    }
}

#[async_trait]
impl Fetch for MemoryFetch {
    async fn open(&mut self, split: &str, from: Position) -> Result<(), SourceError> {
        self.cursors.open(split, from, ());
        Ok(())
    }

    async fn close(&mut self, split: &str) -> Result<(), SourceError> {
        self.cursors.close(split);
        Ok(())
    }

    async fn poll(&mut self, limits: &Limits) -> Result<Batch, SourceError> {
        if self.undelivered {
            self.cursors.rewind();
        }
        self.undelivered = true;
        let mut batch = Batch::default();
        {
            let splits = self.memory.lock();
            for cursor in self.cursors.iter_mut().filter(|c| !c.paused) {
                let Some(records) = splits.get(&cursor.split) else {
                    continue;
                };
                let mut next = match cursor.read {
                    Position::Offset { next, .. } => next,
                    _ => 0,
                };
                for value in records.iter().skip(next as usize) {
                    if batch.is_full(limits) {
                        break;
                    }
                    let moved = batch.moved(&cursor.split, &cursor.read);
                    let record = NewRecord {
                        offset: &Offset::Number(next),
                        timestamp_ms: None,
                        value: Some(value),
                        collection: None,
                        mark: None,
                    };
                    batch.push(moved, record);
                    next += 1;
                    cursor.read = Position::offset(next);
                    batch.moves[moved].to = cursor.read.clone();
                }
            }
        }
        tokio::task::yield_now().await;
        self.undelivered = false;
        Ok(batch)
    }

    fn ack(&mut self, batch: &Batch) {
        self.cursors.ack(batch);
    }

    async fn rewind(&mut self) -> Result<(), SourceError> {
        self.cursors.rewind();
        self.undelivered = false;
        Ok(())
    }

    async fn pause(&mut self, split: &str, paused: bool) -> Result<(), SourceError> {
        if let Some(cursor) = self.cursors.get(split) {
            cursor.paused = paused;
        }
        Ok(())
    }

    fn lag(&mut self, _split: &str, _ends: &Ends) -> Option<Lag> {
        None
    }
}
