//! The reader on threads for blocking work: librdkafka waits on its own queues.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use futures::future::BoxFuture;
use tokio::task::spawn_blocking;

use super::reader::{READ, Reader};
use super::{Broker, Failure, Partition};
use crate::batch::{Batch, Limits};
use crate::error::SourceError;
use crate::position::Position;
use crate::source::{Ends, Fetch, Lag};

/// Partitions read through a broker. A dropped call goes on for as long as its wait, and the next one waits for it.
pub(crate) struct Fetcher<B>(Arc<Mutex<Reader<B>>>);

impl<B: Broker + 'static> Fetcher<B> {
    pub(crate) fn new(reader: Reader<B>) -> Self {
        Self(Arc::new(Mutex::new(reader)))
    }

    async fn run<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Reader<B>) -> Result<T, SourceError> + Send + 'static,
    ) -> Result<T, SourceError> {
        let reader = Arc::clone(&self.0);
        spawn_blocking(move || call(&mut lock(&reader)))
            .await
            .map_err(|error| SourceError::Misuse(error.to_string()))?
    }
}

/// A reader that panicked in a call has delivered nothing of it, and begins anew at what is stored.
fn lock<B>(reader: &Mutex<Reader<B>>) -> MutexGuard<'_, Reader<B>> {
    reader.lock().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl<B: Broker + 'static> Fetch for Fetcher<B> {
    async fn open(&mut self, split: &str, from: Position) -> Result<(), SourceError> {
        let split = split.to_owned();
        self.run(move |reader| reader.open(&split, from)).await
    }

    async fn close(&mut self, split: &str) -> Result<(), SourceError> {
        let split = split.to_owned();
        self.run(move |reader| reader.close(&split)).await
    }

    async fn poll(&mut self, limits: &Limits) -> Result<Batch, SourceError> {
        let limits = *limits;
        let batch = self.run(move |reader| reader.poll(&limits)).await?;
        lock(&self.0).delivered();
        Ok(batch)
    }

    fn ack(&mut self, batch: &Batch) {
        lock(&self.0).ack(batch);
    }

    async fn rewind(&mut self) -> Result<(), SourceError> {
        self.run(|reader| {
            reader.rewind();
            Ok(())
        })
        .await
    }

    async fn pause(&mut self, split: &str, paused: bool) -> Result<(), SourceError> {
        let split = split.to_owned();
        self.run(move |reader| reader.pause(&split, paused)).await
    }

    fn ask_ends(&mut self) -> BoxFuture<'static, Result<Ends, SourceError>> {
        let (asker, partitions) = lock(&self.0).asker();
        Box::pin(async move {
            if partitions.is_empty() {
                return Ok(Ends::default());
            }
            let asked = spawn_blocking(move || {
                let ends = asker.ends(&partitions)?;
                let splits = partitions.iter().map(Partition::split);
                Ok(Ends {
                    offsets: splits.zip(ends).collect(),
                })
            });
            asked
                .await
                .map_err(|error| SourceError::Misuse(error.to_string()))?
                .map_err(|failure: Failure| failure.into_error(READ))
        })
    }

    fn lag(&mut self, split: &str, ends: &Ends) -> Option<Lag> {
        lock(&self.0).lag(split, ends)
    }
}
