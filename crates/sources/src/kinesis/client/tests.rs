//! Against canned answers on a loopback port: what the SDK sends, and what its answers mean.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use super::super::config::Credentials as Keys;
use super::*;

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
