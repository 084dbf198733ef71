use std::collections::VecDeque;

use uuid::Uuid;

use super::*;

/// A cluster that keeps what arrives, and does what it is told to do.
#[derive(Default)]
struct Fake {
    queued: VecDeque<(usize, Outgoing)>,
    room: usize,
    /// Places that arrived, by attempt.
    arrived: Vec<Vec<u32>>,
    /// Records of so many bytes are too large for the broker, and so is what travels with them.
    takes: usize,
    alone: bool,
    /// Answers nothing for so many looks, and complains,
    away: u32,
    /// or not even that.
    is_silent: bool,
    /// At this place, in the first attempt.
    fails_at: Option<u32>,
    begun: Vec<bool>,
    /// As librdkafka does, after a refusal it takes nothing more, and gives up what it has.
    gives_up: bool,
    has_given_up: bool,
}

impl Fake {
    fn new() -> Self {
        Self {
            room: 3,
            takes: 100,
            ..Self::default()
        }
    }
}

#[async_trait]
impl Cluster for Fake {
    async fn partitions(&mut self, topic: &Arc<str>) -> Result<i32, Failure> {
        match &**topic {
            "gone" => Err(Failure::Unknown("it does not exist".to_owned())),
            _ => Ok(4),
        }
    }

    async fn begin(&mut self, alone: bool) -> Result<(), Failure> {
        self.queued.clear();
        self.alone = alone;
        self.has_given_up = false;
        self.begun.push(alone);
        self.arrived.push(Vec::new());
        Ok(())
    }

    fn send(&mut self, number: usize, record: &Outgoing, mark: &Mark) -> Result<bool, Lost> {
        assert_eq!(mark.place, record.place);
        if record.value.len() > 1000 {
            return Err(Lost::Refused("far too large".to_owned()));
        }
        if self.queued.len() == self.room {
            return Ok(false);
        }
        if self.has_given_up {
            return Err(Lost::Failed(Failure::Transient("given up".to_owned())));
        }
        self.queued.push_back((number, record.clone()));
        Ok(true)
    }

    fn told(&mut self) -> Vec<(usize, Result<(), Lost>)> {
        if self.away > 0 {
            self.away -= 1;
            return Vec::new();
        }
        let together: usize = self.queued.iter().map(|(_, r)| r.value.len()).sum();
        let queued = std::mem::take(&mut self.queued);
        let fails_at = self.fails_at;
        let mut failed = false;
        let gives_up = self.gives_up;
        let mut has_given_up = false;
        let told = queued
            .into_iter()
            .map(|(number, record)| {
                if has_given_up {
                    let failure = Failure::Transient("given up".to_owned());
                    return (number, Err(Lost::Failed(failure)));
                }
                let bytes = if self.alone {
                    record.value.len()
                } else {
                    together
                };
                if bytes > self.takes {
                    has_given_up = gives_up;
                    return (number, Err(Lost::Refused(format!("{bytes} bytes"))));
                }
                failed |= fails_at == Some(record.place);
                if failed {
                    let failure = Failure::Transient("it broke".to_owned());
                    return (number, Err(Lost::Failed(failure)));
                }
                if let Some(arrived) = self.arrived.last_mut() {
                    arrived.push(record.place);
                }
                (number, Ok(()))
            })
            .collect();
        if failed {
            self.fails_at = None;
        }
        self.has_given_up |= has_given_up;
        told
    }

    fn complaint(&mut self) -> Option<Failure> {
        (self.away > 0 && !self.is_silent).then(|| Failure::Transient("nobody there".to_owned()))
    }
}

fn parcel(sizes: &[usize]) -> Arc<Parcel> {
    let record = |(place, &bytes): (usize, &usize)| Outgoing {
        place: place as u32,
        topic: Arc::from("t"),
        partition: 0,
        collection: Arc::from("c"),
        key: None,
        value: vec![0; bytes],
        timestamp_ms: 0,
    };
    Arc::new(Parcel {
        origin: Uuid::from_u128(1),
        publish_seq: 1,
        records: sizes.iter().enumerate().map(record).collect(),
    })
}

fn producer(fake: Fake) -> Producer<Fake> {
    Producer::new(fake, Duration::ZERO)
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap_or_else(|e| panic!("{e}"))
        .block_on(future)
}

fn publish(producer: &mut Producer<Fake>, sizes: &[usize]) -> Result<Vec<u32>, SourceError> {
    let refused = run(producer.publish(parcel(sizes), Trouble::default()))?;
    Ok(refused.into_iter().map(|r| r.place).collect())
}

#[test]
fn everything_arrives_in_its_order() {
    let mut producer = producer(Fake::new());
    assert_eq!(publish(&mut producer, &[1; 10]), Ok(vec![]));
    assert_eq!(publish(&mut producer, &[1; 2]), Ok(vec![]));
    let order: Vec<u32> = (0..10).chain(0..2).collect();
    // The client is the same.
    assert_eq!(producer.cluster.arrived, [order]);
    assert_eq!(publish(&mut producer, &[]), Ok(vec![]));
}

#[test]
fn an_outage_is_waited_out_and_told() {
    for (is_silent, told) in [(false, "nobody there"), (true, "do not answer")] {
        let mut fake = Fake::new();
        fake.away = 5;
        fake.is_silent = is_silent;
        let mut producer = producer(fake);
        let trouble = Trouble::default();
        let seen = trouble.clone();
        run(async {
            let publishing = producer.publish(parcel(&[1; 4]), trouble.clone());
            let watching = async {
                while seen.get().is_none() {
                    tokio::task::yield_now().await;
                }
                seen.get()
            };
            let (published, troubled) = futures::future::join(publishing, watching).await;
            assert_eq!(published, Ok(vec![]));
            assert!(troubled.is_some_and(|e| e.contains(told)));
        });
        assert_eq!(trouble.get(), None);
        assert_eq!(producer.cluster.arrived, [vec![0, 1, 2, 3]]);
    }
}

#[test]
fn after_a_failure_a_new_client_begins_anew() {
    let mut fake = Fake::new();
    fake.fails_at = Some(4);
    let mut producer = producer(fake);
    assert!(publish(&mut producer, &[1; 6]).is_err_and(|e| e.is_retryable()));
    assert_eq!(publish(&mut producer, &[1; 6]), Ok(vec![]));
    let arrived = &producer.cluster.arrived;
    assert_eq!(arrived[0], [0, 1, 2, 3]);
    assert_eq!(arrived[1], [0, 1, 2, 3, 4, 5]);
    assert_eq!(producer.cluster.begun, [false, false]);
}

#[test]
fn only_what_is_too_large_alone_is_refused() {
    let mut producer = producer(Fake::new());
    // Together too large, each fine.
    assert_eq!(publish(&mut producer, &[60, 60, 60]), Ok(vec![]));
    assert_eq!(producer.cluster.begun, [false, true]);
    // The next batch travels together again.
    assert_eq!(publish(&mut producer, &[1; 3]), Ok(vec![]));
    assert_eq!(producer.cluster.begun, [false, true, false]);
    producer.cluster.arrived = vec![Vec::new()];
    let refused = publish(&mut producer, &[1, 150, 1, 2000, 1, 101, 1]);
    assert_eq!(refused, Ok(vec![1, 3, 5]));
    // Each of the others once, and in their order.
    assert_eq!(producer.cluster.arrived.concat(), [0, 2, 4, 6]);
}

#[test]
fn what_arrived_is_not_sent_again_because_of_what_is_refused() {
    let mut producer = producer(Fake::new());
    // Some are too large together, some alone.
    let refused = publish(&mut producer, &[1, 1, 1, 60, 60, 1, 150, 150, 1, 1]);
    assert_eq!(refused, Ok(vec![6, 7]));
    let arrived = producer.cluster.arrived.concat();
    assert_eq!(arrived, [0, 1, 2, 3, 4, 5, 8, 9]);
}

#[test]
fn a_client_that_gives_up_behind_a_refusal_has_not_failed() {
    let mut fake = Fake::new();
    fake.gives_up = true;
    let mut producer = producer(fake);
    let refused = publish(&mut producer, &[1, 150, 1, 1, 1]);
    assert_eq!(refused, Ok(vec![1]));
    assert_eq!(producer.cluster.arrived.concat(), [0, 2, 3, 4]);
}

#[test]
fn a_topic_that_is_missing_is_an_error() {
    let mut producer = producer(Fake::new());
    assert_eq!(run(producer.partitions(&[Arc::from("t")])), Ok(vec![4]));
    assert!(run(producer.partitions(&[Arc::from("t"), Arc::from("gone")])).is_err());
}
