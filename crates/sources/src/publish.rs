//! Events out into topics and streams: what an event store may be told, where each event goes, and the trait of what brings it
//! there ([`crate::kafka::producer`], [`crate::kinesis::producer`]).
//!
//! The relay's turn is: a transaction that gives a batch its number → [`Publish::publish`] outside of any → a transaction that
//! removes the batch. If it dies in between, the same records go out under the same marks once more ([`crate::published`]).
//!
//! *Order of a key.* A key's events are in one partition (shard) in their order, also when they come twice: the first copy of each
//! event is behind the first copies of the key's events before it. Of a topic, the partitions that it had when the event store first
//! wrote it are used, not those that it gets later: with them, a key would go on in another partition, which a reader may be
//! ahead in.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rakam_event::names;
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::error::SourceError;
use crate::options::{self, Kind};
use crate::published::Mark;

/// Kafka's names of topics have so many characters at most.
const TOPIC_CHARACTERS: usize = 249;
const DEFAULT_TOPIC: &str = "{project}.{collection}";

/// A record on its way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    /// Its place in the batch.
    pub place: u32,
    /// A topic of Kafka; of Kinesis the stream, which the publisher knows.
    pub topic: Arc<str>,
    /// Of the topic.
    pub partition: i32,
    pub collection: Arc<str>,
    /// What keeps its events in order. None: nothing does.
    pub key: Option<String>,
    /// In our framing.
    pub value: Vec<u8>,
    pub timestamp_ms: i64,
}

/// A batch of records on its way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parcel {
    pub origin: Uuid,
    pub publish_seq: i64,
    pub records: Vec<Outgoing>,
}

impl Parcel {
    pub fn mark(&self, record: &Outgoing) -> Mark {
        Mark {
            origin: self.origin,
            publish_seq: self.publish_seq,
            place: record.place,
        }
    }
}

/// A record that the service will never take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Its place in the batch.
    pub place: u32,
    pub reason: String,
}

/// What a publisher struggles with while it goes on trying; shared with whoever waits for it.
#[derive(Debug, Clone, Default)]
pub struct Trouble(Arc<Mutex<Option<(String, Instant)>>>);

impl Trouble {
    pub fn of(error: String) -> Self {
        Self(Arc::new(Mutex::new(Some((error, Instant::now())))))
    }

    fn present(&self) -> MutexGuard<'_, Option<(String, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// In words.
    pub fn get(&self) -> Option<String> {
        self.lasting(Duration::ZERO)
    }

    /// In words, if there was no moment without any for so long.
    pub fn lasting(&self, time: Duration) -> Option<String> {
        let present = self.present();
        let (error, since) = present.as_ref()?;
        (since.elapsed() >= time).then(|| error.clone())
    }

    pub(crate) fn set(&self, error: Option<SourceError>) {
        let mut present = self.present();
        let since = present
            .as_ref()
            .map_or_else(Instant::now, |(_, since)| *since);
        *present = error.map(|e| (e.to_string(), since));
    }
}

/// Brings records out.
#[async_trait]
pub trait Publish: Send {
    /// Among how many partitions each of these topics spreads its keys. A topic that is not there is made.
    async fn partitions(&mut self, topics: &[Arc<str>]) -> Result<Vec<i32>, SourceError>;

    /// Publishes a batch: comes back when the service has all records safe but those that it will never take.
    ///
    /// It goes on trying through outages, and tells `trouble`. On an error some of the records may have arrived, or arrive yet;
    /// the batch is to be published again, by a new publisher.
    async fn publish(
        &mut self,
        parcel: Arc<Parcel>,
        trouble: Trouble,
    ) -> Result<Vec<Refused>, SourceError>;
}

/// By which of an event's values Kinesis keeps events in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PartitionKey {
    Collection,
    /// A field, by its name in the registry.
    Field(String),
}

/// The options of an event store, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreOptions {
    Kafka { topic: String },
    Kinesis { stream: String, key: PartitionKey },
}

impl StoreOptions {
    /// Reads the options of `rakam.set_event_store`. Error: 22023 for what is unknown, missing or malformed, or a server that
    /// nothing can be written to.
    pub fn parse(kind: Kind, text: &str) -> Result<Self, SourceError> {
        let valid: &[&str] = match kind {
            Kind::Kafka => &["topic"],
            Kind::Kinesis => &["stream", "partition_key"],
            Kind::Files => {
                return Err(SourceError::Unsupported {
                    message: "a server of type 'files' cannot be an event store".to_owned(),
                    hint: "Events are sent to servers of TYPE 'kafka' or 'kinesis'.",
                });
            }
        };
        let given = object(text, valid)?;
        match kind {
            Kind::Kafka => {
                let topic = string(&given, "topic")?.unwrap_or(DEFAULT_TOPIC);
                check_template(topic)?;
                Ok(Self::Kafka {
                    topic: topic.to_owned(),
                })
            }
            _ => {
                let stream = string(&given, "stream")?.ok_or_else(|| {
                    SourceError::option(
                        "option \"stream\" is missing",
                        "Give the name of the stream: {\"stream\": \"events\"}.",
                    )
                })?;
                options::check_stream(stream)?;
                let key = match string(&given, "partition_key")?.unwrap_or("_user") {
                    "_collection" => PartitionKey::Collection,
                    field => PartitionKey::Field(field_name(field)?),
                };
                Ok(Self::Kinesis {
                    stream: stream.to_owned(),
                    key,
                })
            }
        }
    }

    /// The field whose value is the key; None: it is the collection.
    pub fn key_field(&self) -> Option<&str> {
        match self {
            Self::Kafka { .. } => Some("_user"),
            Self::Kinesis { key, .. } => match key {
                PartitionKey::Collection => None,
                PartitionKey::Field(field) => Some(field),
            },
        }
    }

    /// Where the events of a collection go; an error says why they cannot go anywhere.
    pub fn topic(&self, project: &str, collection: &str) -> Result<Arc<str>, String> {
        match self {
            Self::Kinesis { stream, .. } => Ok(Arc::from(stream.as_str())),
            Self::Kafka { topic } => {
                let name = topic
                    .replace("{project}", &topic_characters(project))
                    .replace("{collection}", &topic_characters(collection));
                match name.len() {
                    1..=TOPIC_CHARACTERS if name != "." && name != ".." => Ok(Arc::from(name)),
                    _ => Err(format!("\"{name}\" cannot be the name of a topic")),
                }
            }
        }
    }
}

fn object(text: &str, valid: &[&str]) -> Result<Map<String, Value>, SourceError> {
    let hint = format!("Options are {}.", valid.join(", "));
    let mut given = match serde_json::from_str(text) {
        Ok(Value::Object(given)) => given,
        Ok(_) => {
            return Err(SourceError::option("options must be a JSON object", hint));
        }
        Err(error) => {
            return Err(SourceError::option(
                format!("options are not valid JSON: {error}"),
                hint,
            ));
        }
    };
    if let Some(unknown) = given.keys().find(|key| !valid.contains(&key.as_str())) {
        return Err(SourceError::option(
            format!("unknown option \"{unknown}\""),
            hint,
        ));
    }
    given.retain(|_, value| !value.is_null());
    Ok(given)
}

fn string<'a>(given: &'a Map<String, Value>, name: &str) -> Result<Option<&'a str>, SourceError> {
    match given.get(name) {
        None => Ok(None),
        Some(Value::String(text)) if !text.is_empty() => Ok(Some(text)),
        Some(_) => Err(SourceError::option(
            format!("option \"{name}\" must be a text that is not empty"),
            "For instance {\"topic\": \"events.{collection}\"}, or {\"stream\": \"events\"}.",
        )),
    }
}

fn field_name(field: &str) -> Result<String, SourceError> {
    let name = names::field_name(field);
    if names::can_be_column(&name) && names::server_field(&name).is_none() {
        return Ok(name.into_owned());
    }
    Err(SourceError::option(
        format!("\"{field}\" cannot be a partition key"),
        "It is _user, _collection, or a field.",
    ))
}

/// Whether a template can give names of topics.
fn check_template(template: &str) -> Result<(), SourceError> {
    let fixed = template
        .replace("{project}", "p")
        .replace("{collection}", "c");
    let is_legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if fixed.len() <= TOPIC_CHARACTERS
        && fixed.chars().all(is_legal)
        && fixed != "."
        && fixed != ".."
    {
        return Ok(());
    }
    Err(SourceError::option(
        format!("\"{template}\" cannot be the name of a topic"),
        "A topic has up to 249 ASCII letters, digits, dots, underscores and hyphens; {project} and {collection} stand for the \
         names of both.",
    ))
}

/// A name in the characters of topics: others as `_u` and their code point.
fn topic_characters(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for c in name.chars() {
        match c {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '.' | '_' | '-' => out.push(c),
            other => out.push_str(&format!("_u{:x}_", u32::from(other))),
        }
    }
    out
}

/// The partition of a key, as Kafka's own producers choose it.
pub fn partition_of(key: &str, partitions: i32) -> i32 {
    (murmur2(key.as_bytes()) & 0x7FFF_FFFF) as i32 % partitions.max(1)
}

/// The hash of Kafka's own producers (`org.apache.kafka.common.utils.Utils.murmur2`): Austin Appleby's MurmurHash2 with
/// their seed.
fn murmur2(data: &[u8]) -> u32 {
    const M: u32 = 0x5BD1_E995;
    let mut h = 0x9747_B28C_u32 ^ data.len() as u32;
    let mut words = data.chunks_exact(4);
    for word in &mut words {
        let mut k = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        k = k.wrapping_mul(M);
        k ^= k >> 24;
        k = k.wrapping_mul(M);
        h = h.wrapping_mul(M) ^ k;
    }
    let rest = words.remainder();
    if !rest.is_empty() {
        for (at, byte) in rest.iter().enumerate() {
            h ^= u32::from(*byte) << (8 * at);
        }
        h = h.wrapping_mul(M);
    }
    h ^= h >> 13;
    h = h.wrapping_mul(M);
    h ^ (h >> 15)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_checked() {
        let kafka = |text: &str| StoreOptions::parse(Kind::Kafka, text);
        let topic = |text: &str| kafka(text).map(|o| o.topic("acme", "größe"));
        assert_eq!(topic("{}"), Ok(Ok(Arc::from("acme.gr_uf6__udf_e"))));
        assert_eq!(topic(r#"{"topic": "all"}"#), Ok(Ok(Arc::from("all"))));
        assert_eq!(topic(r#"{"topic": null}"#), topic("{}"));
        let both = topic(r#"{"topic": "x-{collection}-{project}"}"#);
        assert_eq!(both, Ok(Ok(Arc::from("x-gr_uf6__udf_e-acme"))));
        let long = kafka("{}").map(|o| o.topic("acme", &"ß".repeat(31)));
        assert_eq!(
            long,
            Ok(Ok(Arc::from(format!("acme.{}", "_udf_".repeat(31)))))
        );
        let longer = kafka("{}").map(|o| o.topic("acme", &"ⅷ".repeat(63)));
        assert!(longer.is_ok_and(|topic| topic.is_err()));
        for wrong in [
            "[]",
            "{",
            r#"{"topic": 1}"#,
            r#"{"topic": ""}"#,
            r#"{"topic": "a b"}"#,
            r#"{"topic": "{user}"}"#,
            r#"{"stream": "x"}"#,
            r#"{"partition_key": "_user"}"#,
        ] {
            assert!(
                kafka(wrong).is_err_and(|e| e.sqlstate() == "22023"),
                "{wrong}"
            );
        }
        let kinesis = |text: &str| StoreOptions::parse(Kind::Kinesis, text);
        let parsed = kinesis(r#"{"stream": "events"}"#);
        assert_eq!(
            parsed.as_ref().map(|o| o.key_field()),
            Ok(Some("_user")),
            "{parsed:?}"
        );
        let parsed = kinesis(r#"{"stream": "events", "partition_key": "accountId"}"#);
        assert_eq!(
            parsed.as_ref().map(|o| o.key_field()),
            Ok(Some("account_id"))
        );
        let parsed = kinesis(r#"{"stream": "events", "partition_key": "_collection"}"#);
        assert_eq!(parsed.as_ref().map(|o| o.key_field()), Ok(None));
        for wrong in [
            "{}",
            r#"{"stream": "a b"}"#,
            r#"{"topic": "x", "stream": "y"}"#,
        ] {
            assert!(
                kinesis(wrong).is_err_and(|e| e.sqlstate() == "22023"),
                "{wrong}"
            );
        }
        assert!(StoreOptions::parse(Kind::Files, "{}").is_err());
    }

    #[test]
    fn keys_are_where_other_producers_have_them() {
        // From Kafka's own UtilsTest.testMurmur2.
        for (key, hash) in [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            (
                "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8",
                -58_897_971,
            ),
            ("abc", 479_470_107),
        ] {
            assert_eq!(murmur2(key.as_bytes()) as i32, hash, "{key}");
        }
        assert!((0..1000).all(|n| (0..7).contains(&partition_of(&n.to_string(), 7))));
        assert_eq!(partition_of("x", 0), 0);
    }
}
