//! The two traits of a source: which splits there are, and what is in them.
//!
//! The consumer's turn is: [`Fetch::poll`] outside of any transaction → decode → one transaction that stores the events and,
//! for each move, compares and sets the split's epoch and sets its position → [`Fetch::ack`]. If the transaction fails:
//! [`Fetch::rewind`]. If a split's epoch is another's: [`Fetch::close`]. A source keeps nothing that is not in the positions,
//! so that a process may die at any moment.

use std::collections::HashMap;

use async_trait::async_trait;
use futures::future::{BoxFuture, ready};

use crate::batch::{Batch, Limits};
use crate::error::SourceError;
use crate::position::Position;

/// A part of a source that is read on its own, in order: a partition, a shard, an object.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Split {
    /// `<topic>/<partition>`, a shard's id, an object's path.
    pub id: String,
    /// Splits that have to be read to their end before it.
    pub parents: Vec<String>,
    /// Nothing is written to it any more.
    pub closed: bool,
}

/// Where a new source begins.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Start {
    #[default]
    Earliest,
    Latest,
    /// Milliseconds since 1970.
    Time(i64),
    /// Splits and where each of them begins; others begin with their oldest record.
    Splits(Vec<(String, Position)>),
}

/// Which splits there are.
#[async_trait]
pub trait Splits: Send {
    /// All splits that there are now, in the order of their ids: complete, or an error.
    async fn list(&mut self) -> Result<Vec<Split>, SourceError>;

    /// The positions at which these splits begin, in their order. None of them depends on when it is read from then on:
    /// `Latest` is the present end.
    async fn locate(
        &mut self,
        splits: &[Split],
        start: &Start,
    ) -> Result<Vec<Position>, SourceError>;
}

/// How far behind its end a split is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lag {
    Records(u64),
    Milliseconds(u64),
}

/// Where splits end, as a service said it at some moment.
#[derive(Debug, Clone, Default)]
pub struct Ends {
    /// By split, the oldest offset and the next one that will be written. Empty where nobody need be asked.
    pub(crate) offsets: HashMap<String, (i64, i64)>,
}

/// What is in splits.
#[async_trait]
pub trait Fetch: Send {
    /// Begins to read a split. One that is open is read from `from` on instead.
    async fn open(&mut self, split: &str, from: Position) -> Result<(), SourceError>;

    /// Reads a split no more; nothing of it is in any later batch.
    async fn close(&mut self, split: &str) -> Result<(), SourceError>;

    /// The next records of the open splits: as soon as they are enough, or after `limits.wait` as many as came. An outage is
    /// [`Batch::trouble`], and asks for nothing but another poll.
    ///
    /// Cancel safe: what a dropped poll had read is read again.
    async fn poll(&mut self, limits: &Limits) -> Result<Batch, SourceError>;

    /// The batch is stored. Batches are stored in the order in which they came.
    fn ack(&mut self, batch: &Batch);

    /// Reads everything again that was not acknowledged.
    async fn rewind(&mut self) -> Result<(), SourceError>;

    /// Lets an open split wait, or go on: back-pressure.
    async fn pause(&mut self, split: &str, paused: bool) -> Result<(), SourceError>;

    /// Asks where the open splits end. The answer is waited for while the source is read: a service may take its time.
    fn ask_ends(&mut self) -> BoxFuture<'static, Result<Ends, SourceError>> {
        Box::pin(ready(Ok(Ends::default())))
    }

    /// How far an open split is read behind the end that was asked for; None: not known.
    fn lag(&mut self, split: &str, ends: &Ends) -> Option<Lag>;
}

/// How far behind its end an open split is now.
#[cfg(test)]
pub(crate) async fn lag_now(
    fetch: &mut dyn Fetch,
    split: &str,
) -> Result<Option<Lag>, SourceError> {
    let ends = fetch.ask_ends().await?;
    Ok(fetch.lag(split, &ends))
}
