//! Writing to a stream, as a state machine over [`Puts`].
//!
//! A request takes many records, of which some may be refused while later ones are stored; so a request has one record of a key at
//! most, and a key's next record waits until the one before it is stored. Keys do not wait for each other. Records without a key
//! have one of their own each.
//!
//! There are no headers: collection and mark follow the record ([`append_mark`]).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use md5::{Digest, Md5};

use super::Failure;
use super::reader::Pace;
use crate::error::SourceError;
use crate::publish::{Outgoing, Parcel, Publish, Refused, Trouble};
use crate::published::append_mark;

const WRITE: &str = "write to Kinesis";
/// What a request takes: records, and bytes of which the service allows 5 MB.
const REQUEST_RECORDS: usize = 500;
const REQUEST_BYTES: usize = 4 << 20;
/// A stream takes records up to this size with their keys, unless it was made for larger ones.
const RECORD_BYTES: usize = 1 << 20;
/// A key is no longer than this.
const KEY_CHARACTERS: usize = 256;
/// Being throttled so often in a row is told.
const PATIENCE: u32 = 3;

/// A record of a request.
#[derive(Debug, Clone)]
pub(crate) struct Put<'a> {
    pub(crate) key: &'a str,
    pub(crate) data: &'a [u8],
}

/// What [`Producer`] needs of a stream.
#[async_trait]
pub(crate) trait Puts: Send + Sync {
    /// Stores records: the outcome of each in their order, for those that are not stored the code of their error.
    async fn put(&self, records: &[Put<'_>]) -> Result<Vec<Result<(), String>>, Failure>;
}

pub(crate) struct Producer<P> {
    stream: P,
    pace: Pace,
}

impl<P: Puts> Producer<P> {
    pub(crate) fn new(stream: P, pace: Pace) -> Self {
        Self { stream, pace }
    }
}

/// The records that are to be stored, by key.
struct Queues {
    /// The places of a key in their order.
    keys: Vec<VecDeque<usize>>,
    /// Keys by the first place that waits: those that wait longest are first.
    waiting: BTreeMap<usize, usize>,
}

impl Queues {
    fn new(records: &[Outgoing]) -> Self {
        let mut by_key: HashMap<&str, usize> = HashMap::new();
        let mut keys: Vec<VecDeque<usize>> = Vec::new();
        for (at, record) in records.iter().enumerate() {
            let number = match &record.key {
                Some(key) => *by_key.entry(key).or_insert(keys.len()),
                None => keys.len(),
            };
            match keys.get_mut(number) {
                Some(queue) => queue.push_back(at),
                None => keys.push(VecDeque::from([at])),
            }
        }
        let waiting = keys
            .iter()
            .enumerate()
            .filter_map(|(number, queue)| Some((*queue.front()?, number)))
            .collect();
        Self { keys, waiting }
    }

    /// The next request: the first records of as many keys as it takes.
    fn request(&self, bytes: impl Fn(usize) -> usize) -> Vec<usize> {
        let mut chosen = Vec::new();
        let mut total = 0;
        for &at in self.waiting.keys() {
            total += bytes(at);
            // What is too large for others goes alone.
            if !chosen.is_empty() && (total > REQUEST_BYTES || bytes(at) > RECORD_BYTES) {
                break;
            }
            chosen.push(at);
            if chosen.len() == REQUEST_RECORDS || bytes(at) > RECORD_BYTES {
                break;
            }
        }
        chosen
    }

    /// A record is done with: its key's next one may go.
    fn done(&mut self, at: usize) {
        let Some(number) = self.waiting.remove(&at) else {
            return;
        };
        if let Some(queue) = self.keys.get_mut(number) {
            queue.pop_front();
            if let Some(&next) = queue.front() {
                self.waiting.insert(next, number);
            }
        }
    }
}

/// A record's key, as the stream takes it: one that is too long by its hash.
fn partition_key(parcel: &Parcel, record: &Outgoing) -> String {
    match &record.key {
        None => parcel.mark(record).sequence(),
        Some(key) if key.is_empty() || key.chars().count() > KEY_CHARACTERS => {
            format!("{:x}", Md5::digest(key))
        }
        Some(key) => key.clone(),
    }
}

#[async_trait]
impl<P: Puts> Publish for Producer<P> {
    /// The stream spreads keys itself.
    async fn partitions(&mut self, topics: &[Arc<str>]) -> Result<Vec<i32>, SourceError> {
        Ok(vec![1; topics.len()])
    }

    async fn publish(
        &mut self,
        parcel: Arc<Parcel>,
        trouble: Trouble,
    ) -> Result<Vec<Refused>, SourceError> {
        let data: Vec<Vec<u8>> = parcel
            .records
            .iter()
            .map(|record| {
                let mut data = record.value.clone();
                append_mark(&mut data, &record.collection, &parcel.mark(record));
                data
            })
            .collect();
        let keys: Vec<String> = parcel
            .records
            .iter()
            .map(|record| partition_key(&parcel, record))
            .collect();
        let size = |at: usize| data[at].len() + keys[at].len();
        let mut queues = Queues::new(&parcel.records);
        let mut refused = Vec::new();
        let mut failures = 0u32;
        loop {
            let chosen = queues.request(size);
            if chosen.is_empty() {
                trouble.set(None);
                return Ok(refused);
            }
            let puts: Vec<Put<'_>> = chosen
                .iter()
                .map(|&at| Put {
                    key: &keys[at],
                    data: &data[at],
                })
                .collect();
            let mut problem = None;
            match self.stream.put(&puts).await {
                Ok(outcomes) => {
                    // An answer that is too short tells nothing of the rest.
                    for (&at, outcome) in chosen.iter().zip(outcomes) {
                        match outcome {
                            Ok(()) => {
                                queues.done(at);
                                failures = 0;
                            }
                            Err(code) => problem = Some(Failure::Throttled(code)),
                        }
                    }
                }
                Err(Failure::Invalid(_)) if size(chosen[0]) > RECORD_BYTES => {
                    let record = &parcel.records[chosen[0]];
                    refused.push(Refused {
                        place: record.place,
                        reason: format!(
                            "the stream does not take records of {} bytes",
                            size(chosen[0])
                        ),
                    });
                    queues.done(chosen[0]);
                }
                Err(failure @ (Failure::Throttled(_) | Failure::Transient(_))) => {
                    problem = Some(failure);
                }
                Err(failure) => return Err(failure.into_error(WRITE)),
            }
            let Some(problem) = problem else {
                continue;
            };
            let factor = 1u32 << failures.min(16);
            failures += 1;
            if failures > PATIENCE || !matches!(problem, Failure::Throttled(_)) {
                trouble.set(Some(problem.into_error(WRITE)));
            }
            let wait: Duration = self.pace.backoff.saturating_mul(factor);
            tokio::time::sleep(wait.min(self.pace.backoff_most)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use uuid::Uuid;

    use super::*;
    use crate::published::split_mark;

    const PACE: Pace = Pace {
        pause: Duration::ZERO,
        backoff: Duration::ZERO,
        backoff_most: Duration::ZERO,
    };

    /// What to answer, by the number of the request and of the record in it.
    type Answers = fn(usize, usize) -> Result<(), Failure>;

    struct Fake {
        answers: Answers,
        /// Requests with the keys and places of their records, and whether each is stored.
        requests: Mutex<Vec<Vec<(String, u32, bool)>>>,
    }

    #[async_trait]
    impl Puts for Arc<Fake> {
        async fn put(&self, records: &[Put<'_>]) -> Result<Vec<Result<(), String>>, Failure> {
            let mut requests = self.requests.lock().expect("no test panics here");
            let number = requests.len();
            let mut told = Vec::new();
            let mut outcomes = Vec::new();
            let mut failed = None;
            for (at, record) in records.iter().enumerate() {
                let (_, collection, mark) =
                    split_mark(record.data).unwrap_or_else(|| panic!("a mark"));
                assert_eq!(collection, b"c");
                let outcome = (self.answers)(number, at);
                told.push((record.key.to_string(), mark.place, outcome.is_ok()));
                outcomes.push(match outcome {
                    Ok(()) => Ok(()),
                    Err(Failure::Throttled(code)) => Err(code),
                    Err(failure) => {
                        failed = Some(failure);
                        Ok(())
                    }
                });
            }
            requests.push(told);
            failed.map_or(Ok(outcomes), Err)
        }
    }

    fn parcel(records: &[(Option<&str>, usize)]) -> Arc<Parcel> {
        let record = |(place, (key, bytes)): (usize, &(Option<&str>, usize))| Outgoing {
            place: place as u32,
            topic: Arc::from("s"),
            partition: 0,
            collection: Arc::from("c"),
            key: key.map(str::to_owned),
            value: vec![0xA7; *bytes],
            timestamp_ms: 0,
        };
        Arc::new(Parcel {
            origin: Uuid::from_u128(1),
            publish_seq: 3,
            records: records.iter().enumerate().map(record).collect(),
        })
    }

    type Seen = Vec<Vec<(String, u32, bool)>>;

    fn publish(
        answers: Answers,
        records: &[(Option<&str>, usize)],
    ) -> (Result<Vec<u32>, SourceError>, Seen) {
        let fake = Arc::new(Fake {
            answers,
            requests: Mutex::default(),
        });
        let mut producer = Producer::new(Arc::clone(&fake), PACE);
        let outcome = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap_or_else(|e| panic!("{e}"))
            .block_on(producer.publish(parcel(records), Trouble::default()));
        let seen = fake.requests.lock().expect("no test panics here").clone();
        let refused = outcome.map(|refused| refused.into_iter().map(|r| r.place).collect());
        (refused, seen)
    }

    fn keys(request: &[(String, u32, bool)]) -> Vec<&str> {
        request.iter().map(|(key, ..)| key.as_str()).collect()
    }

    /// The places that were stored, in their order, by key.
    fn stored(seen: &Seen) -> BTreeMap<&str, Vec<u32>> {
        let mut stored: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
        for (key, place, is_stored) in seen.iter().flatten() {
            if *is_stored {
                stored.entry(key).or_default().push(*place);
            }
        }
        stored
    }

    #[test]
    fn a_key_has_one_record_in_a_request() {
        let records = [
            (Some("a"), 1),
            (Some("a"), 1),
            (Some("b"), 1),
            (None, 1),
            (None, 1),
            (Some("a"), 1),
        ];
        let (outcome, seen) = publish(|_, _| Ok(()), &records);
        assert_eq!(outcome, Ok(vec![]));
        assert_eq!(keys(&seen[0]), ["a", "b", "3.3", "3.4"]);
        assert_eq!((keys(&seen[1]), keys(&seen[2])), (vec!["a"], vec!["a"]));
    }

    #[test]
    fn what_is_refused_for_now_comes_again_before_its_keys_next() {
        let records: Vec<_> = ["a", "b", "a", "b", "c", "a"].map(|k| (Some(k), 1)).into();
        let throttled = |request: usize, at: usize| match (request + at) % 3 {
            0 => Err(Failure::Throttled(
                "ProvisionedThroughputExceededException".into(),
            )),
            _ => Ok(()),
        };
        let (outcome, seen) = publish(throttled, &records);
        assert_eq!(outcome, Ok(vec![]));
        let stored = stored(&seen);
        assert_eq!(stored["a"], [0, 2, 5]);
        assert_eq!(stored["b"], [1, 3]);
        assert_eq!(stored["c"], [4]);
        assert!(seen.iter().flatten().any(|(_, _, is_stored)| !is_stored));
    }

    #[test]
    fn a_request_without_an_answer_is_repeated() {
        let lost = |request: usize, _: usize| match request {
            0..5 => Err(Failure::Transient("no answer".into())),
            _ => Ok(()),
        };
        let (outcome, seen) = publish(lost, &[(Some("a"), 1), (Some("b"), 1)]);
        assert_eq!(outcome, Ok(vec![]));
        assert_eq!(seen.len(), 6);
        let refused = |_: usize, _: usize| Err(Failure::Refused("AccessDenied".into()));
        let (outcome, seen) = publish(refused, &[(Some("a"), 1)]);
        assert!(outcome.is_err_and(|e| e.is_retryable()));
        assert_eq!(seen.len(), 1);
    }

    #[test]
    fn requests_are_bounded_and_large_records_go_alone() {
        let many = vec![(None, 1); 1200];
        let (outcome, seen) = publish(|_, _| Ok(()), &many);
        assert_eq!(outcome, Ok(vec![]));
        assert_eq!(
            seen.iter().map(Vec::len).collect::<Vec<_>>(),
            [500, 500, 200]
        );
        let large = vec![(None, RECORD_BYTES - 1000); 9];
        let (_, seen) = publish(|_, _| Ok(()), &large);
        assert_eq!(seen.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 1]);
        // Too large for this stream: only this one is given up.
        let invalid = |request: usize, _: usize| match request {
            1 => Err(Failure::Invalid("ValidationException".into())),
            _ => Ok(()),
        };
        let records = [
            (Some("a"), 1),
            (Some("b"), RECORD_BYTES + 1),
            (Some("b"), 1),
        ];
        let (outcome, seen) = publish(invalid, &records);
        assert_eq!(outcome, Ok(vec![1]));
        assert_eq!(seen.iter().map(Vec::len).collect::<Vec<_>>(), [1, 1, 1]);
        // A record counts with its key.
        let invalid = |_: usize, _: usize| Err(Failure::Invalid("ValidationException".into()));
        let key = "k".repeat(KEY_CHARACTERS);
        let (outcome, _) = publish(invalid, &[(Some(&key), RECORD_BYTES - 100)]);
        assert_eq!(outcome, Ok(vec![0]));
        // What is refused without being large is nobody's fault here.
        let invalid = |_: usize, _: usize| Err(Failure::Invalid("InvalidArgument".into()));
        assert!(publish(invalid, &[(None, 1)]).0.is_err());
    }

    #[test]
    fn long_keys_become_hashes() {
        let long = "ü".repeat(257);
        let (_, seen) = publish(|_, _| Ok(()), &[(Some(&long), 1), (Some(""), 1)]);
        assert!(seen.iter().flatten().all(|(key, ..)| key.len() == 32));
        let just = "ü".repeat(256);
        let (_, seen) = publish(|_, _| Ok(()), &[(Some(&just), 1)]);
        assert_eq!(seen[0][0].0, just);
    }
}
