//! Kinesis: streams and shards.
//!
//! [`config`] says what a server's options may say, [`reader`] is the state machine that reads shards through a [`Stream`],
//! [`producer`] writes, [`aggregate`] unpacks what Amazon's producer library packs, and [`client`] is the stream by Amazon's SDK.
//!
//! There is no lease table of Amazon's beside ours: positions, and who reads what, are in the database. Enhanced fan-out is not
//! used: it needs a consumer registered per source, and pushes whether or not the database keeps up.

pub(crate) mod aggregate;
pub mod client;
pub mod config;
pub mod producer;
pub(crate) mod reader;
#[cfg(test)]
mod tests;

use std::ops::RangeInclusive;
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;

use crate::error::SourceError;
use crate::position::Position;
use crate::source::{Split, Start};

/// A shard as the stream lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shard {
    pub(crate) split: Split,
    pub(crate) hashes: RangeInclusive<u128>,
}

/// A record as it comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Raw {
    pub(crate) sequence: String,
    pub(crate) arrived_ms: Option<i64>,
    pub(crate) data: Vec<u8>,
}

/// What one request for records brings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) records: Vec<Raw>,
    /// None: the shard has ended.
    pub(crate) next: Option<String>,
    /// The shards that go on where this one ends are known.
    pub(crate) has_children: bool,
    pub(crate) behind_ms: Option<u64>,
}

/// What went wrong with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The iterator is older than five minutes.
    Expired,
    Throttled(String),
    /// There is no such stream or shard.
    Missing(String),
    /// An argument is refused.
    Invalid(String),
    /// The position is refused.
    Foreign(String),
    Refused(String),
    Transient(String),
}

impl Failure {
    pub(crate) fn into_error(self, action: &'static str) -> SourceError {
        match self {
            Self::Refused(reason) | Self::Invalid(reason) | Self::Foreign(reason) => {
                SourceError::Refused { action, reason }
            }
            Self::Missing(reason) | Self::Throttled(reason) | Self::Transient(reason) => {
                SourceError::Unreachable { action, reason }
            }
            Self::Expired => SourceError::Unreachable {
                action,
                reason: "the iterator has expired".to_owned(),
            },
        }
    }
}

/// What [`reader::Reader`] needs of a stream.
#[async_trait]
pub(crate) trait Stream: Send + Sync {
    async fn shards(&self) -> Result<Vec<Shard>, Failure>;

    /// An iterator at a position of a shard.
    async fn iterator(&self, shard: &str, position: &Position) -> Result<String, Failure>;

    async fn records(&self, iterator: &str, most: usize) -> Result<Answer, Failure>;
}

/// Where shards begin. `Latest` is the time of now: a shard's own end is known to nobody.
pub(crate) fn located(splits: &[Split], start: &Start, now: SystemTime) -> Vec<Position> {
    let of = |split: &Split| match start {
        Start::Earliest => Position::Beginning,
        Start::Latest => {
            let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
            Position::Time(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
        }
        Start::Time(time_ms) => Position::Time(*time_ms),
        Start::Splits(named) => named
            .iter()
            .find(|(id, _)| *id == split.id)
            .map_or(Position::Beginning, |(_, position)| position.clone()),
    };
    splits.iter().map(of).collect()
}
