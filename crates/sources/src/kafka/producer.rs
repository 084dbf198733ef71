//! Writing to topics, as a state machine over a [`Cluster`].
//!
//! All records of a batch are queued in their order, each for its partition; librdkafka repeats what fails for a while, without
//! ever letting a record overtake one of its partition. An outage is waited out. Whatever else fails ends the attempt: the batch is
//! then published again from its beginning by a new client, because the old one may have given up some records and not others.
//!
//! A record that the broker refuses (it is too large, or against a rule of its topic) may only have travelled with the one that is
//! meant: those that it refused together go out once more, each alone, before any is given up, and before what is behind them. What
//! has arrived meanwhile does not go out again.

pub mod client;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::Failure;
use crate::error::SourceError;
use crate::publish::{Outgoing, Parcel, Publish, Refused, Trouble};
use crate::published::Mark;

const WRITE: &str = "write to Kafka";
/// How long the answer to a record is waited for at a time: longer each time, since no answer comes fast in an outage.
const WAIT: Duration = Duration::from_millis(1);
const WAIT_MOST: Duration = Duration::from_millis(50);
/// A client that has failed may have more to tell for so long.
const HEAR_OUT: Duration = Duration::from_millis(500);

/// Why a record did not arrive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lost {
    /// The broker does not take it, or something that it travelled with.
    Refused(String),
    Failed(Failure),
}

/// What [`Producer`] needs of a cluster. Nothing of it waits but [`Cluster::partitions`].
#[async_trait]
pub(crate) trait Cluster: Send {
    /// How many partitions a topic has; makes it if it is not there.
    async fn partitions(&mut self, topic: &Arc<str>) -> Result<i32, Failure>;

    /// Forgets all that is on its way and begins anew; `alone`: records do not travel together.
    async fn begin(&mut self, alone: bool) -> Result<(), Failure>;

    /// Queues a record under a number. False: there is no room for now. What is refused here is so by itself. A partition's
    /// record arrives after those that were queued before it, or not at all.
    fn send(&mut self, number: usize, record: &Outgoing, mark: &Mark) -> Result<bool, Lost>;

    /// What has become of records since the last look, by their numbers.
    fn told(&mut self) -> Vec<(usize, Result<(), Lost>)>;

    /// What the client complained of last; None since something arrived.
    fn complaint(&mut self) -> Option<Failure>;
}

pub(crate) struct Producer<C> {
    cluster: C,
    /// Silence of so long is told.
    patience: Duration,
    /// None: the client is to begin anew. Else whether records travel alone.
    begun: Option<bool>,
}

/// What has become of a batch's records so far, by their numbers.
struct Progress {
    /// They have arrived, or are refused for good.
    done: Vec<bool>,
    /// Refused together with others: to be sent alone, and before all others.
    suspects: BTreeSet<usize>,
    refused: Vec<Refused>,
}

impl Progress {
    fn refuse(&mut self, parcel: &Parcel, number: usize, reason: String) {
        self.done[number] = true;
        self.suspects.remove(&number);
        self.refused.push(Refused {
            place: parcel.records[number].place,
            reason,
        });
    }

    fn arrived(&mut self, number: usize) {
        if let Some(done) = self.done.get_mut(number) {
            *done = true;
        }
        self.suspects.remove(&number);
    }
}

impl<C: Cluster> Producer<C> {
    pub(crate) fn new(cluster: C, patience: Duration) -> Self {
        Self {
            cluster,
            patience,
            begun: None,
        }
    }

    /// Sends the suspects if there are any, else all that is not done, once. What was refused.
    async fn attempt(
        &mut self,
        parcel: &Parcel,
        progress: &mut Progress,
        trouble: &Trouble,
    ) -> Result<Vec<(usize, String)>, Failure> {
        let numbers: Vec<usize> = match progress.suspects.is_empty() {
            false => progress.suspects.iter().copied().collect(),
            true => (0..parcel.records.len())
                .filter(|&number| !progress.done[number])
                .collect(),
        };
        let mut queue = numbers.into_iter().peekable();
        let mut under_way = 0usize;
        let mut wait = WAIT;
        let mut heard = Instant::now();
        let mut failed: Option<(Failure, Instant)> = None;
        loop {
            while failed.is_none()
                && let Some(&number) = queue.peek()
            {
                let record = &parcel.records[number];
                match self.cluster.send(number, record, &parcel.mark(record)) {
                    Ok(true) => under_way += 1,
                    Ok(false) => break,
                    Err(Lost::Refused(reason)) => progress.refuse(parcel, number, reason),
                    Err(Lost::Failed(failure)) => {
                        failed = Some((failure, Instant::now()));
                        break;
                    }
                }
                queue.next();
            }
            if under_way == 0 && queue.peek().is_none() {
                trouble.set(None);
                return Ok(Vec::new());
            }
            let told = self.cluster.told();
            wait = match told.is_empty() {
                true => (wait * 2).min(WAIT_MOST),
                false => WAIT,
            };
            let is_quiet = told.is_empty();
            if !is_quiet {
                heard = Instant::now();
            }
            let mut refused = Vec::new();
            for (number, outcome) in told {
                under_way = under_way.saturating_sub(1);
                match outcome {
                    Ok(()) => progress.arrived(number),
                    Err(Lost::Refused(reason)) => refused.push((number, reason)),
                    Err(Lost::Failed(failure)) => {
                        failed.get_or_insert((failure, Instant::now()));
                    }
                }
            }
            if !refused.is_empty() {
                // After a refusal the client gives up whatever is behind it: that is no failure of its own, nor a struggle.
                trouble.set(None);
                return Ok(refused);
            }
            if let Some((failure, since)) = &failed {
                // A refusal may be told behind the failure that it makes.
                if under_way == 0 || since.elapsed() >= HEAR_OUT {
                    return Err(failure.clone());
                }
                if is_quiet {
                    tokio::time::sleep(wait).await;
                }
                continue;
            }
            let complaint = self.cluster.complaint().or_else(|| {
                let is_silent = heard.elapsed() >= self.patience;
                is_silent.then(|| Failure::Transient("the brokers do not answer".to_owned()))
            });
            trouble.set(complaint.map(|failure| failure.into_error(WRITE)));
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
        let mut progress = Progress {
            done: vec![false; parcel.records.len()],
            suspects: BTreeSet::new(),
            refused: Vec::new(),
        };
        while progress.done.contains(&false) {
            let alone = !progress.suspects.is_empty();
            if self.begun != Some(alone) {
                let begun = self.cluster.begin(alone).await;
                begun.map_err(|failure| failure.into_error(WRITE))?;
            }
            // Until it is known that nothing of this attempt is left behind.
            self.begun = None;
            let outcome = self.attempt(&parcel, &mut progress, &trouble).await;
            let refused = outcome.map_err(|failure| failure.into_error(WRITE))?;
            if refused.is_empty() {
                self.begun = Some(alone);
            }
            for (number, reason) in refused {
                match alone {
                    true => progress.refuse(&parcel, number, reason),
                    false => {
                        progress.suspects.insert(number);
                    }
                }
            }
        }
        progress.refused.sort_unstable_by_key(|r| r.place);
        Ok(progress.refused)
    }
}

#[cfg(test)]
mod tests;
