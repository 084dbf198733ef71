//! Kafka: topics and partitions.
//!
//! [`config`] says what a server's options may say, [`topics`] which partitions there are, [`reader`] is the state machine
//! that reads them through a [`Broker`], and [`client`] is that broker by librdkafka. [`producer`] writes.
//!
//! Partitions are assigned by us and offsets kept in the database: there are no consumer groups, whose rebalances cannot fence
//! a writer of another system, and nothing is ever skipped (`auto.offset.reset=error`). What librdkafka cannot tell of an
//! error, which partition it is about, is found by asking for the ends of all.

pub mod client;
pub mod config;
pub(crate) mod fetch;
pub mod producer;
pub(crate) mod reader;
#[cfg(test)]
mod tests;
pub mod topics;

use std::sync::Arc;
use std::time::Duration;

use crate::error::SourceError;
use crate::published::Mark;

/// A partition of a topic, as a split: `<topic>/<partition>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Partition {
    pub topic: String,
    pub number: i32,
}

impl Partition {
    pub fn parse(split: &str) -> Result<Self, SourceError> {
        split
            .rsplit_once('/')
            .and_then(|(topic, number)| {
                let number = number.parse().ok().filter(|n: &i32| *n >= 0)?;
                (!topic.is_empty()).then(|| Self {
                    topic: topic.to_owned(),
                    number,
                })
            })
            .ok_or_else(|| {
                SourceError::option(
                    format!("\"{split}\" is not a partition"),
                    "A split of a Kafka source is <topic>/<partition>, such as clicks/0.",
                )
            })
    }

    pub fn split(&self) -> String {
        format!("{}/{}", self.topic, self.number)
    }
}

/// A record as it comes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Message<'a> {
    pub(crate) topic: &'a str,
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) timestamp_ms: Option<i64>,
    pub(crate) value: Option<&'a [u8]>,
    pub(crate) collection: Option<&'a [u8]>,
    pub(crate) mark: Option<Mark>,
}

/// What went wrong with a call to the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Something about partitions: which, the ends of all of them tell. What comes behind it may not be the next record.
    Partitions(String),
    /// There is no such topic or partition.
    Unknown(String),
    Refused(String),
    Transient(String),
}

impl Failure {
    pub(crate) fn into_error(self, action: &'static str) -> SourceError {
        match self {
            Self::Refused(reason) => SourceError::Refused { action, reason },
            Self::Partitions(reason) | Self::Unknown(reason) | Self::Transient(reason) => {
                SourceError::Unreachable { action, reason }
            }
        }
    }
}

/// The question that a cluster is asked beside reading. Brokers answer a connection's requests one after another, so that it
/// waits for a fetch that waits for records.
pub(crate) trait Ask: Send + Sync {
    /// The oldest offset of each of these partitions, and the next one that will be written. Blocks for a few seconds at
    /// most, however many they are.
    fn ends(&self, partitions: &[Partition]) -> Result<Vec<(i64, i64)>, Failure>;
}

/// What [`reader::Reader`] needs of a cluster. Calls block, those of one partition's ends for a few seconds at most.
pub(crate) trait Broker: Send {
    /// Reads these partitions, which it does not read yet, from these offsets on (None: the oldest record).
    fn assign(&mut self, partitions: &[(Partition, Option<i64>)]) -> Result<(), Failure>;

    fn unassign(&mut self, partition: &Partition) -> Result<(), Failure>;

    /// Reads nothing any more.
    fn unassign_all(&mut self) -> Result<(), Failure>;

    /// Behind the last message that was shown of each partition that it reads, or behind the last marker of a transaction that
    /// was passed over since; None: neither was. Until a message is shown, or it was None, it may be of an assignment before
    /// the present one.
    fn positions(&mut self) -> Result<Vec<(Partition, Option<i64>)>, Failure>;

    fn pause(&mut self, partition: &Partition, paused: bool) -> Result<(), Failure>;

    /// The oldest offset, and the next one that will be written.
    fn ends(&mut self, partition: &Partition) -> Result<(i64, i64), Failure>;

    /// What may be asked for the ends of partitions while they are read.
    fn asker(&self) -> Arc<dyn Ask>;

    /// Waits for the next message and shows it: false if none came.
    fn poll(&mut self, wait: Duration, take: &mut dyn FnMut(Message<'_>)) -> Result<bool, Failure>;
}
