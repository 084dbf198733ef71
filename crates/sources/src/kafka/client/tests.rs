//! Against librdkafka's own imitation of a cluster, which speaks the protocol on a loopback port of this process. It knows no
//! transactions, and keeps 5 MiB of a partition: more than that is trimmed.

use std::time::Instant;

use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};

use super::*;
use crate::batch::{Batch, Limits};
use crate::conformance::{World, conforms};
use crate::error::StopReason;
use crate::source::{Lag, lag_now};

const WAIT: Duration = Duration::from_secs(30);
const LIMITS: Limits = Limits {
    bytes: 64 << 20,
    records: 100,
    wait: Duration::from_millis(100),
};

/// The brokers of a cluster.
struct Brokers(String);

impl Brokers {
    fn config(&self) -> KafkaConfig {
        KafkaConfig::parse([("brokers", self.0.as_str())], []).unwrap_or_else(|e| panic!("{e}"))
    }

    fn write<'a>(&self, split: &str, values: impl IntoIterator<Item = Option<&'a [u8]>>) {
        let partition = Partition::parse(split).unwrap_or_else(|e| panic!("{e}"));
        let producer: BaseProducer = ClientConfig::new()
            .set("bootstrap.servers", &self.0)
            .set("message.max.bytes", "4000000")
            .create()
            .unwrap_or_else(|e| panic!("{e}"));
        for value in values {
            let headers = OwnedHeaders::new().insert(Header {
                key: COLLECTION_HEADER,
                value: Some("named"),
            });
            let mut record = BaseRecord::<(), [u8]>::to(&partition.topic)
                .partition(partition.number)
                .timestamp(1_700_000_000_000)
                .headers(headers);
            if let Some(value) = value {
                record = record.payload(value);
            }
            producer.send(record).unwrap_or_else(|(e, _)| panic!("{e}"));
        }
        producer.flush(WAIT).unwrap_or_else(|e| panic!("{e}"));
    }

    async fn partitions(&self, topics: &[&str]) -> Partitions {
        let topics = Topics::parse(topics.iter().copied()).unwrap_or_else(|e| panic!("{e}"));
        let partitions = Partitions::new(self.config(), topics).await;
        partitions.unwrap_or_else(|e| panic!("{e}"))
    }

    async fn reading(&self, split: &str, from: Position) -> Box<dyn Fetch> {
        let mut fetch = fetch(self.config()).await.unwrap_or_else(|e| panic!("{e}"));
        fetch
            .open(split, from)
            .await
            .unwrap_or_else(|e| panic!("{e}"));
        fetch
    }
}

#[async_trait]
impl World for Brokers {
    async fn make(&mut self, name: &str, records: &[String]) -> String {
        let split = format!("topic/{}", name.as_bytes()[0] - b'a');
        self.write(&split, records.iter().map(|r| Some(r.as_bytes())));
        split
    }

    async fn splits(&mut self) -> Box<dyn Splits> {
        Box::new(self.partitions(&["^topic$"]).await)
    }

    async fn fetch(&mut self) -> Box<dyn Fetch> {
        fetch(self.config()).await.unwrap_or_else(|e| panic!("{e}"))
    }
}

fn cluster(topics: &[(&str, i32)]) -> (impl Sized, Brokers) {
    let cluster = MockCluster::new(1).unwrap_or_else(|e| panic!("{e}"));
    for (topic, partitions) in topics {
        let made = cluster.create_topic(topic, *partitions, 1);
        made.unwrap_or_else(|e| panic!("{e}"));
    }
    let brokers = Brokers(cluster.bootstrap_servers());
    (cluster, brokers)
}

/// Reads so many records, and answers their values and the last batch.
async fn read(fetch: &mut dyn Fetch, count: usize) -> (Vec<Option<Vec<u8>>>, Batch) {
    let mut values = Vec::new();
    loop {
        let batch = next(fetch).await;
        let of = |r| batch.value(r).map(<[u8]>::to_vec);
        values.extend(batch.records().iter().map(of));
        if values.len() >= count {
            return (values, batch);
        }
    }
}

/// Polls until something comes.
async fn next(fetch: &mut dyn Fetch) -> Batch {
    let give_up = Instant::now() + WAIT;
    while Instant::now() < give_up {
        let batch = fetch.poll(&LIMITS).await.unwrap_or_else(|e| panic!("{e}"));
        if !batch.is_empty() {
            fetch.ack(&batch);
            return batch;
        }
    }
    panic!("nothing comes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn librdkafka_conforms() {
    let (_cluster, mut brokers) = cluster(&[("topic", 3)]);
    conforms(&mut brokers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_topics_and_ends() {
    let (_cluster, brokers) = cluster(&[("a", 2), ("b", 1), ("other", 1)]);
    brokers.write("a/1", [Some(&b"one"[..]), None, Some(b"")]);
    let mut partitions = brokers.partitions(&["a", "^b", "not_yet"]).await;
    let listed = partitions.list().await.unwrap_or_else(|e| panic!("{e}"));
    let ids: Vec<&str> = listed.iter().map(|s| s.id.as_str()).collect();
    assert_eq!(ids, ["a/0", "a/1", "b/0"]);
    let at = |next| {
        vec![
            Position::offset(0),
            Position::offset(next),
            Position::offset(0),
        ]
    };
    let latest = partitions.locate(&listed, &Start::Latest).await;
    assert_eq!(latest, Ok(at(3)));
    let named = Start::Splits(vec![("a/1".to_owned(), Position::offset(2))]);
    let located = partitions.locate(&listed, &named).await;
    let expected = [
        Position::Beginning,
        Position::offset(2),
        Position::Beginning,
    ];
    assert_eq!(located, Ok(expected.to_vec()));

    let mut fetch = brokers.reading("a/1", Position::Beginning).await;
    let (values, batch) = read(&mut *fetch, 3).await;
    assert_eq!(values, [Some(b"one".to_vec()), None, Some(Vec::new())]);
    let last = &batch.records()[batch.records().len() - 1];
    assert_eq!(batch.collection(last), Some(&b"named"[..]));
    assert_eq!(last.timestamp_ms, Some(1_700_000_000_000));
    assert_eq!(lag_now(&mut *fetch, "a/1").await, Ok(Some(Lag::Records(0))));
    brokers.write("a/1", [Some(&b"four"[..])]);
    assert_eq!(lag_now(&mut *fetch, "a/1").await, Ok(Some(Lag::Records(1))));
    // Another process goes on behind the mark.
    let mut fetch = brokers.reading("a/1", batch.moves[0].to.clone()).await;
    let (values, _) = read(&mut *fetch, 1).await;
    assert_eq!(values, [Some(b"four".to_vec())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn positions_outside_of_a_partition_stop() {
    let (_cluster, brokers) = cluster(&[("t", 2)]);
    brokers.write("t/0", [Some(&b"one"[..])]);
    let mut fetch = brokers.reading("t/0", Position::offset(7)).await;
    let stops = next(&mut *fetch).await.stops;
    assert_eq!(stops[0].reason, StopReason::Shorter { next: 7, end: 1 });

    // A record read, and more written than the partition keeps.
    let mut fetch = brokers.reading("t/0", Position::Beginning).await;
    let read = next(&mut *fetch).await.moves[0].to.clone();
    drop(fetch);
    let large = vec![b'x'; 1 << 20];
    brokers.write("t/0", (0..8).map(|_| Some(large.as_slice())));
    let mut fetch = brokers.reading("t/0", read).await;
    fetch
        .open("t/1", Position::Beginning)
        .await
        .unwrap_or_else(|e| panic!("{e}"));
    let stops = next(&mut *fetch).await.stops;
    assert!(
        matches!(stops[0].reason, StopReason::Truncated { next: 1, oldest } if oldest > 1),
        "{stops:?}"
    );
    // The other partition goes on.
    brokers.write("t/1", [Some(&b"one"[..])]);
    assert_eq!(next(&mut *fetch).await.records().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreachable_broker_is_trouble() {
    let nowhere = Brokers("127.0.0.1:1".to_owned());
    let mut fetch = nowhere.reading("t/0", Position::offset(1)).await;
    let batch = fetch.poll(&LIMITS).await.unwrap_or_else(|e| panic!("{e}"));
    assert!(batch.is_empty() && batch.trouble.is_some());
    let error = nowhere.partitions(&["t"]).await.list().await;
    assert!(error.is_err_and(|e| e.is_retryable() && e.sqlstate() == "58030"));
}

#[test]
fn who_asks_for_ends_hears_why_nobody_answers() {
    let nowhere = Brokers("127.0.0.1:1".to_owned());
    let client = Client::new(&nowhere.config()).unwrap_or_else(|e| panic!("{e}"));
    let partition = Partition::parse("t/0").unwrap_or_else(|e| panic!("{e}"));
    let refused = Failure::Refused("wrong password".to_owned());
    *client.0.context().refusal() = Some(refused.clone());
    let ends = client.asker().ends(&[partition]);
    assert_eq!(ends, Err(refused));
    // Once a call has succeeded, what fails has another reason.
    let listener = client.0.context();
    assert_eq!(listener.explained(Ok(())), Ok(()));
    let lost = Failure::Transient("lost".to_owned());
    assert_eq!(listener.explained::<()>(Err(lost.clone())), Err(lost));
}

#[test]
fn librdkafka_knows_its_options() {
    let check = |name: &str, value: &str| {
        let config = KafkaConfig::parse([("brokers", "a"), (name, value)], []);
        check(&config.unwrap_or_else(|e| panic!("{e}"))).map_err(|e| e.to_string())
    };
    assert_eq!(check("fetch.min.bytes", "7"), Ok(()));
    assert_eq!(check("security.protocol", "ssl"), Ok(()));
    // Credentials come later.
    assert_eq!(check("security.protocol", "sasl_ssl"), Ok(()));
    for (name, value) in [("no.such.option", "1"), ("fetch.min.bytes", "many")] {
        let error = check(name, value).err().unwrap_or_default();
        assert!(error.contains(name), "{error}");
    }
    // Secrets are not in messages.
    let server = [("brokers", "a"), ("security.protocol", "sasl_ssl")];
    let mapping = [("username", "u"), ("ssl.key.pem", "s3cret")];
    let config = KafkaConfig::parse(server, mapping).unwrap_or_else(|e| panic!("{e}"));
    let error = Client::new(&config).err().map(|e| e.to_string());
    assert!(error.is_some_and(|e| !e.contains("s3cret")));
}

/// Against the broker that `RAKAM_TEST_KAFKA` names, such as that of pg_test/services/kafka.sh: what no imitation has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_named_broker_conforms() {
    let Ok(brokers) = std::env::var("RAKAM_TEST_KAFKA") else {
        return;
    };
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", &brokers)
        .create()
        .unwrap_or_else(|e| panic!("{e}"));
    let names = ["topic", "tx"];
    let options = AdminOptions::new().operation_timeout(Some(WAIT));
    let _ = admin.delete_topics(&names, &options).await;
    let topics = [
        // The records are of another year.
        NewTopic::new("topic", 3, TopicReplication::Fixed(1)).set("retention.ms", "-1"),
        NewTopic::new("tx", 1, TopicReplication::Fixed(1)).set("retention.ms", "-1"),
    ];
    let give_up = Instant::now() + WAIT;
    // A topic that was deleted is still there for a while.
    loop {
        let made = admin.create_topics(&topics, &options).await;
        let made = made.unwrap_or_else(|e| panic!("{e}"));
        let there = |r: &Result<String, (String, RDKafkaErrorCode)>| {
            matches!(r, Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)))
        };
        if made.iter().all(there) {
            break;
        }
        assert!(Instant::now() < give_up, "{made:?}");
    }
    let mut brokers = Brokers(brokers);
    conforms(&mut brokers).await;

    // Two transactions, of which the second one is aborted: two records, a marker, a record, a marker.
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", &brokers.0)
        .set("transactional.id", "conformance")
        .create()
        .unwrap_or_else(|e| panic!("{e}"));
    let done = |result: Result<(), KafkaError>| result.unwrap_or_else(|e| panic!("{e}"));
    done(producer.init_transactions(WAIT));
    for (values, commit) in [(&["one", "two"][..], true), (&["three"], false)] {
        done(producer.begin_transaction());
        for value in values {
            let record = BaseRecord::<(), str>::to("tx").partition(0).payload(value);
            producer.send(record).unwrap_or_else(|(e, _)| panic!("{e}"));
        }
        done(producer.flush(WAIT));
        done(match commit {
            true => producer.commit_transaction(WAIT),
            false => producer.abort_transaction(WAIT),
        });
    }
    let mut fetch = brokers.reading("tx/0", Position::Beginning).await;
    let (count, end) = read_to(&mut *fetch, "tx/0", 5).await;
    assert_eq!(count, 2);
    assert!(matches!(end, Position::Offset { mark: Some(mark), .. } if mark.offset == 1));
    // What was not stored comes again, and the end is reached again.
    let mut fetch = brokers.reading("tx/0", Position::Beginning).await;
    for _ in 0..3 {
        let batch = fetch.poll(&LIMITS).await.unwrap_or_else(|e| panic!("{e}"));
        drop(batch);
        fetch.rewind().await.unwrap_or_else(|e| panic!("{e}"));
    }
    assert_eq!(read_to(&mut *fetch, "tx/0", 5).await, (2, end.clone()));
    // Deleted, none of it was lost; what is written then is read.
    let mut before = TopicPartitionList::new();
    let added = before.add_partition_offset("tx", 0, Offset::Offset(5));
    added.unwrap_or_else(|e| panic!("{e}"));
    let deleted = admin.delete_records(&before, &options).await;
    deleted.unwrap_or_else(|e| panic!("{e}"));
    let mut fetch = brokers.reading("tx/0", end).await;
    brokers.write("tx/0", [Some(&b"four"[..])]);
    assert_eq!(read(&mut *fetch, 1).await.0, [Some(b"four".to_vec())]);
    // A partition that came to be while others were read: librdkafka remembers that there was none.
    let two = [NewPartitions::new("tx", 2)];
    let added = admin.create_partitions(&two, &options).await;
    added.unwrap_or_else(|e| panic!("{e}"));
    brokers.write("tx/1", [Some(&b"five"[..])]);
    let opened = fetch.open("tx/1", Position::Beginning).await;
    opened.unwrap_or_else(|e| panic!("{e}"));
    let (values, batch) = read(&mut *fetch, 1).await;
    assert_eq!(
        (values, batch.stops),
        (vec![Some(b"five".to_vec())], vec![])
    );
}

/// Reads a split until its position is at this offset, and nothing is behind it: how many records came, and the position.
async fn read_to(fetch: &mut dyn Fetch, split: &str, offset: i64) -> (u64, Position) {
    let (mut count, mut at, give_up) = (0, Position::Beginning, Instant::now() + WAIT);
    loop {
        let batch = fetch.poll(&LIMITS).await.unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(batch.stops, []);
        fetch.ack(&batch);
        if let Some(moved) = batch.moves.first() {
            count += moved.records;
            at = moved.to.clone();
        }
        let lag = lag_now(fetch, split).await;
        if at.next_offset() == Some(offset.to_string()) && lag == Ok(Some(Lag::Records(0))) {
            return (count, at);
        }
        assert!(Instant::now() < give_up, "{at:?}, {lag:?}");
    }
}

#[test]
fn a_server_is_checked_without_the_credentials_of_its_owner() {
    for mechanism in ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] {
        let server = [
            ("brokers", "127.0.0.1:1"),
            ("security.protocol", "SASL_PLAINTEXT"),
            ("sasl.mechanism", mechanism),
        ];
        let config = KafkaConfig::parse(server, []).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(check(&config), Ok(()), "{mechanism}");
        // Who reads needs them.
        assert!(Client::new(&config).is_err(), "{mechanism}");
    }
}
