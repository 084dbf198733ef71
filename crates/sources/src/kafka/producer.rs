//! Writing to topics, as a state machine over a [`Cluster`].
//!
//! All records of a batch are queued in their order, each for its partition; librdkafka repeats what fails for a while, without
//! ever letting a record overtake one of its partition. An outage is waited out. Whatever else fails ends the attempt: the batch is
//! then published again from its beginning by a new client, because the old one may have given up some records and not others.
//!
//! A record that the broker finds too large may only have travelled with others: the batch goes out once more, record by record,
//! before any is given up.

pub mod client;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::Failure;
use crate::error::SourceError;
use crate::publish::{Outgoing, Parcel, Publish, Refused, Trouble};
use crate::published::Mark;

const WRITE: &str = "write to Kafka";
/// How long the answer to a record is waited for at a time: longer each time, since no answer comes fast in an outage.
const WAIT: Duration = Duration::from_millis(1);
const WAIT_MOST: Duration = Duration::from_millis(50);

/// Why a record did not arrive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lost {
    /// It, or what it travelled with, is larger than the broker takes.
    TooLarge(String),
    Failed(Failure),
}

/// What [`Producer`] needs of a cluster. Nothing of it waits but [`Cluster::partitions`].
#[async_trait]
pub(crate) trait Cluster: Send {
    /// How many partitions a topic has; makes it if it is not there.
    async fn partitions(&mut self, topic: &Arc<str>) -> Result<i32, Failure>;

    /// Forgets all that is on its way and begins anew; `alone`: records do not travel together.
    async fn begin(&mut self, alone: bool) -> Result<(), Failure>;

    /// Queues a record under a number. False: there is no room for now. What is too large here is so by itself.
    fn send(&mut self, number: usize, record: &Outgoing, mark: &Mark) -> Result<bool, Lost>;

    /// What has become of records since the last look, by their numbers.
    fn told(&mut self) -> Vec<(usize, Result<(), Lost>)>;

    /// What the client complained of last; None since something arrived.
    fn complaint(&mut self) -> Option<Failure>;
}

pub(crate) struct Producer<C> {
    cluster: C,
    /// None: the client is to begin anew. Else whether records travel alone.
    begun: Option<bool>,
}

impl<C: Cluster> Producer<C> {
    pub(crate) fn new(cluster: C) -> Self {
        Self {
            cluster,
            begun: None,
        }
    }

    /// Publishes the records that are not refused, once. What was found too large.
    async fn attempt(
        &mut self,
        parcel: &Parcel,
        refused: &mut BTreeMap<u32, String>,
        trouble: &Trouble,
    ) -> Result<Vec<Refused>, Failure> {
        let mut too_large = Vec::new();
        let (mut next, mut under_way) = (0, 0usize);
        let mut wait = WAIT;
        loop {
            // Behind a record that was given up nothing more is sent.
            while too_large.is_empty()
                && let Some(record) = parcel.records.get(next)
            {
                if let Entry::Vacant(place) = refused.entry(record.place) {
                    match self.cluster.send(next, record, &parcel.mark(record)) {
                        Ok(true) => under_way += 1,
                        Ok(false) => break,
                        Err(Lost::Failed(failure)) => return Err(failure),
                        Err(Lost::TooLarge(reason)) => {
                            place.insert(reason);
                        }
                    }
                }
                next += 1;
            }
            let is_sent = next == parcel.records.len() || !too_large.is_empty();
            if under_way == 0 && is_sent {
                trouble.set(None);
                return Ok(too_large);
            }
            let told = self.cluster.told();
            wait = match told.is_empty() {
                true => (wait * 2).min(WAIT_MOST),
                false => WAIT,
            };
            let is_quiet = told.is_empty();
            for (number, outcome) in told {
                under_way = under_way.saturating_sub(1);
                match outcome {
                    Ok(()) => {}
                    Err(Lost::Failed(failure)) => return Err(failure),
                    Err(Lost::TooLarge(reason)) => {
                        too_large.extend(parcel.records.get(number).map(|record| Refused {
                            place: record.place,
                            reason,
                        }));
                    }
                }
            }
            let complaint = self.cluster.complaint();
            trouble.set(complaint.map(|failure| failure.into_error(WRITE)));
            if !too_large.is_empty() {
                // The others are published again, too: their answers are of no use.
                return Ok(too_large);
            }
            if is_quiet {
                tokio::time::sleep(wait).await;
            }
        }
    }
}

#[async_trait]
impl<C: Cluster> Publish for Producer<C> {
    async fn partitions(&mut self, topics: &[Arc<str>]) -> Result<Vec<i32>, SourceError> {
        let mut counts = Vec::with_capacity(topics.len());
        for topic in topics {
            let count = self.cluster.partitions(topic).await;
            counts.push(count.map_err(|failure| failure.into_error("find a topic of Kafka"))?);
        }
        Ok(counts)
    }

    async fn publish(
        &mut self,
        parcel: Arc<Parcel>,
        trouble: Trouble,
    ) -> Result<Vec<Refused>, SourceError> {
        let mut refused = BTreeMap::new();
        let mut alone = false;
        loop {
            if self.begun != Some(alone) {
                let begun = self.cluster.begin(alone).await;
                begun.map_err(|failure| failure.into_error(WRITE))?;
            }
            // Until it is known that nothing of this attempt is left behind.
            self.begun = None;
            let outcome = self.attempt(&parcel, &mut refused, &trouble).await;
            let too_large = outcome.map_err(|failure| failure.into_error(WRITE))?;
            if too_large.is_empty() {
                self.begun = Some(alone);
                break;
            }
            if alone {
                refused.extend(too_large.into_iter().map(|r| (r.place, r.reason)));
            }
            alone = true;
        }
        Ok(refused
            .into_iter()
            .map(|(place, reason)| Refused { place, reason })
            .collect())
    }
}

#[cfg(test)]
mod tests;
