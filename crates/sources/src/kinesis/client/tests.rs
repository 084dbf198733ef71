//! Against canned answers on a loopback port: what the SDK sends, and what its answers mean.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Instant;

use super::super::config::Credentials as Keys;
use super::*;
use crate::batch::Limits;
use crate::conformance::{World, conforms};

/// One answer for each request: its status and body.
type Answers = Vec<(u16, &'static str)>;

/// Answers requests in turn; each is sent on as its call and body.
fn service(answers: Answers) -> (AwsStream, Receiver<(String, String)>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("it has an address");
    let (sender, receiver) = channel();
    thread::spawn(move || serve(&listener, answers, &sender));
    let config = KinesisConfig {
        region: "us-east-1".to_owned(),
        endpoint: Some(format!("http://{address}")),
        credentials: Some(Keys {
            access_key_id: "AKIA".to_owned(),
            secret_access_key: "secret".to_owned(),
            session_token: None,
        }),
    };
    let stream = AwsStream::new(&config, "events").unwrap_or_else(|e| panic!("{e}"));
    (stream, receiver)
}

fn serve(listener: &TcpListener, answers: Answers, sender: &Sender<(String, String)>) {
    let mut answers = answers.into_iter();
    for connection in listener.incoming() {
        let mut connection = connection.expect("a connection");
        let (status, body) = match answers.next() {
            Some(answer) => answer,
            None => return,
        };
        let request = request(&connection);
        let answer = format!(
            "HTTP/1.1 {status} X\r\ncontent-type: application/x-amz-json-1.1\r\nconnection: close\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        connection
            .write_all(answer.as_bytes())
            .expect("the client reads");
        if sender.send(request).is_err() {
            return;
        }
    }
}

/// The call that a request names, and its body.
fn request(connection: &TcpStream) -> (String, String) {
    let mut reader = BufReader::new(connection);
    let (mut call, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a head");
        let lower = line.to_ascii_lowercase();
        if let Some(target) = lower.strip_prefix("x-amz-target: kinesis_20131202.") {
            call = target.trim().to_owned();
        } else if let Some(n) = lower.strip_prefix("content-length: ") {
            length = n.trim().parse().expect("a number");
        } else if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("a body");
    (call, String::from_utf8(body).expect("text"))
}

fn sent(receiver: &Receiver<(String, String)>) -> (String, serde_json::Value) {
    let (call, body) = receiver.recv().expect("a request came");
    (call, serde_json::from_str(&body).expect("JSON"))
}

#[tokio::test]
async fn shards_come_page_by_page() {
    let (stream, requests) = service(vec![
        (
            200,
            r#"{"NextToken":"more","Shards":[{"ShardId":"s-2","ParentShardId":"s-0","AdjacentParentShardId":"s-1",
                "HashKeyRange":{"StartingHashKey":"0","EndingHashKey":"340282366920938463463374607431768211455"},
                "SequenceNumberRange":{"StartingSequenceNumber":"1"}}]}"#,
        ),
        (
            200,
            r#"{"Shards":[{"ShardId":"s-0","HashKeyRange":{"StartingHashKey":"5","EndingHashKey":"7"},
                "SequenceNumberRange":{"StartingSequenceNumber":"1","EndingSequenceNumber":"9"}}]}"#,
        ),
    ]);
    let shards = stream.shards().await.unwrap_or_else(|e| panic!("{e:?}"));
    let shown: Vec<_> = shards
        .iter()
        .map(|s| {
            (
                s.split.id.as_str(),
                s.split.closed,
                s.split.parents.join(" "),
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            ("s-0", true, String::new()),
            ("s-2", false, "s-0 s-1".to_owned())
        ]
    );
    assert_eq!(
        [shards[0].hashes.clone(), shards[1].hashes.clone()],
        [5..=7, 0..=u128::MAX]
    );
    assert_eq!(
        sent(&requests),
        (
            "listshards".to_owned(),
            serde_json::json!({"StreamName": "events"})
        )
    );
    assert_eq!(
        sent(&requests),
        (
            "listshards".to_owned(),
            serde_json::json!({"NextToken": "more"})
        )
    );
}

#[tokio::test]
async fn each_position_has_its_iterator() {
    let positions = [
        (
            Position::Beginning,
            serde_json::json!({"ShardIteratorType": "TRIM_HORIZON"}),
        ),
        (
            Position::At("49".to_owned()),
            serde_json::json!({"ShardIteratorType": "AT_SEQUENCE_NUMBER", "StartingSequenceNumber": "49"}),
        ),
        (
            Position::After("49".to_owned()),
            serde_json::json!({"ShardIteratorType": "AFTER_SEQUENCE_NUMBER", "StartingSequenceNumber": "49"}),
        ),
        (
            Position::Time(1_500),
            serde_json::json!({"ShardIteratorType": "AT_TIMESTAMP", "Timestamp": 1.5}),
        ),
    ];
    let (stream, requests) = service(vec![(200, r#"{"ShardIterator":"it"}"#); positions.len()]);
    for (position, mut expected) in positions {
        let iterator = stream.iterator("s-0", &position).await;
        assert_eq!(iterator, Ok("it".to_owned()));
        expected["StreamName"] = "events".into();
        expected["ShardId"] = "s-0".into();
        assert_eq!(sent(&requests), ("getsharditerator".to_owned(), expected));
    }
}

#[tokio::test]
async fn records_are_decoded() {
    let (stream, requests) = service(vec![
        (
            200,
            r#"{"Records":[{"SequenceNumber":"49","ApproximateArrivalTimestamp":1700000000.123,"Data":"e30=","PartitionKey":"k"}],
                "NextShardIterator":"next","MillisBehindLatest":7}"#,
        ),
        (
            200,
            r#"{"Records":[],"MillisBehindLatest":0,"ChildShards":[{"ShardId":"s-1","ParentShards":["s-0"],
                "HashKeyRange":{"StartingHashKey":"0","EndingHashKey":"1"}}]}"#,
        ),
    ]);
    let answer = stream
        .records("it", 9)
        .await
        .unwrap_or_else(|e| panic!("{e:?}"));
    let raw = Raw {
        sequence: "49".to_owned(),
        arrived_ms: Some(1_700_000_000_123),
        data: b"{}".to_vec(),
    };
    let expected = Answer {
        records: vec![raw],
        next: Some("next".to_owned()),
        has_children: false,
        behind_ms: Some(7),
    };
    assert_eq!(answer, expected);
    let asked = serde_json::json!({"ShardIterator": "it", "Limit": 9});
    assert_eq!(sent(&requests), ("getrecords".to_owned(), asked));
    let end = stream
        .records("it", 9)
        .await
        .unwrap_or_else(|e| panic!("{e:?}"));
    assert!(end.has_children && end.next.is_none());
}

#[tokio::test]
async fn errors_mean_what_their_codes_say() {
    use Failure as F;
    let code = |code: &str| code.to_owned();
    let expected = [
        (400, r#"{"__type":"ExpiredIteratorException"}"#, F::Expired),
        (
            400,
            r#"{"__type":"ProvisionedThroughputExceededException","message":"account 123"}"#,
            F::Throttled(code("ProvisionedThroughputExceededException")),
        ),
        (
            400,
            r#"{"__type":"ResourceNotFoundException"}"#,
            F::Missing(code("ResourceNotFoundException")),
        ),
        (
            400,
            r#"{"__type":"InvalidArgumentException"}"#,
            F::Invalid(code("InvalidArgumentException")),
        ),
        (
            400,
            r#"{"__type":"AccessDeniedException"}"#,
            F::Refused(code("AccessDeniedException")),
        ),
        (
            500,
            r#"{"__type":"InternalFailure"}"#,
            F::Transient(code("InternalFailure")),
        ),
        (503, "", F::Transient(code("it answered with status 503"))),
    ];
    let answers = expected
        .iter()
        .map(|(status, body, _)| (*status, *body))
        .collect();
    let (stream, _requests) = service(answers);
    // Each is asked once: the SDK repeats nothing by itself.
    for (_, body, failure) in expected {
        assert_eq!(stream.records("it", 9).await, Err(failure), "{body}");
    }
    let nobody = stream.records("it", 9).await;
    assert!(matches!(nobody, Err(Failure::Transient(_))), "{nobody:?}");
}

/// A stream of a real service.
struct Real(KinesisConfig, String);

impl Real {
    fn sdk(&self) -> AwsStream {
        AwsStream::new(&self.0, &self.1).unwrap_or_else(|e| panic!("{e}"))
    }

    async fn make_stream(&self, shards: i32) {
        let sdk = self.sdk().sdk;
        let made = sdk.create_stream().stream_name(&self.1).shard_count(shards);
        made.send().await.unwrap_or_else(|e| panic!("{e:?}"));
        self.open(shards as usize).await;
    }

    /// Waits until so many shards take records; in the order of their hash keys.
    async fn open(&self, count: usize) -> Vec<Shard> {
        let give_up = Instant::now() + Duration::from_secs(30);
        loop {
            let mut shards = self.sdk().shards().await.unwrap_or_default();
            shards.retain(|shard| !shard.split.closed);
            if shards.len() == count {
                shards.sort_by_key(|shard| *shard.hashes.start());
                return shards;
            }
            assert!(Instant::now() < give_up, "{shards:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn put(&self, shard: &Shard, records: &[String]) {
        let sdk = self.sdk().sdk;
        for record in records {
            // The stream may still be changing.
            let give_up = Instant::now() + Duration::from_secs(30);
            loop {
                let put = sdk
                    .put_record()
                    .stream_name(&self.1)
                    .partition_key("k")
                    .explicit_hash_key(shard.hashes.start().to_string())
                    .data(Blob::new(record.as_bytes()));
                match put.send().await {
                    Ok(done) => {
                        assert_eq!(done.shard_id(), shard.split.id);
                        break;
                    }
                    Err(error) => assert!(Instant::now() < give_up, "{error:?}"),
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

#[async_trait]
impl World for Real {
    async fn make(&mut self, name: &str, records: &[String]) -> String {
        let shards = self.open(3).await;
        let shard = &shards[usize::from(name.as_bytes()[0] - b'a')];
        self.put(shard, records).await;
        shard.split.id.clone()
    }

    async fn splits(&mut self) -> Box<dyn Splits> {
        Box::new(Shards(self.sdk()))
    }

    async fn fetch(&mut self) -> Box<dyn Fetch> {
        fetch(&self.0, &self.1).unwrap_or_else(|e| panic!("{e}"))
    }
}

/// Against the service that `RAKAM_TEST_KINESIS` names by its address, such as those of pg_test/services/kinesis.sh.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_named_service_conforms() {
    let Ok(endpoint) = std::env::var("RAKAM_TEST_KINESIS") else {
        return;
    };
    let config = KinesisConfig {
        region: "us-east-1".to_owned(),
        endpoint: Some(endpoint),
        credentials: Some(Keys {
            access_key_id: "test".to_owned(),
            secret_access_key: "test".to_owned(),
            session_token: None,
        }),
    };
    let unique = uuid::Uuid::now_v7();
    let mut real = Real(config.clone(), format!("conformance-{unique}"));
    real.make_stream(3).await;
    conforms(&mut real).await;

    // A shard that was split ends behind its records, and the two that follow it name it.
    let mut real = Real(config, format!("split-{unique}"));
    real.make_stream(1).await;
    let first = real.open(1).await.remove(0);
    real.put(&first, &["one".to_owned()]).await;
    let split = real.sdk().sdk.split_shard().stream_name(&real.1);
    let split = split
        .shard_to_split(&first.split.id)
        .new_starting_hash_key((u128::MAX / 2).to_string());
    split.send().await.unwrap_or_else(|e| panic!("{e:?}"));
    for child in real.open(2).await {
        assert_eq!(child.split.parents.join(" "), first.split.id);
        real.put(&child, &["two".to_owned()]).await;
    }
    let mut fetch = real.fetch().await;
    let opened = fetch.open(&first.split.id, Position::Beginning).await;
    opened.unwrap_or_else(|e| panic!("{e}"));
    let (mut count, give_up) = (0, Instant::now() + Duration::from_secs(30));
    loop {
        let batch = fetch.poll(&Limits::default()).await;
        let batch = batch.unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((&batch.stops, &batch.trouble), (&Vec::new(), &None));
        count += batch.records().len();
        fetch.ack(&batch);
        if batch.moves.iter().any(|moved| moved.ended) {
            break;
        }
        assert!(Instant::now() < give_up, "the shard does not end");
    }
    assert_eq!(count, 1);
}
