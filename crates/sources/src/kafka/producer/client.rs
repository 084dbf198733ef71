//! Writing by librdkafka.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use rdkafka::ClientContext;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext};
use tokio::task::spawn_blocking;

use super::super::client::{explain, failure, native, unusable};
use super::super::config::KafkaConfig;
use super::{Cluster, Failure, Lost, Producer};
use crate::decode::COLLECTION_HEADER;
use crate::error::SourceError;
use crate::publish::{Outgoing, Publish};
use crate::published::{Mark, ORIGIN_HEADER, SEQUENCE_HEADER};

/// How long a question about a topic may take, and how long a new topic may be unknown to brokers.
const ASK: Duration = Duration::from_secs(5);
const APPEARS: Duration = Duration::from_millis(100);
const APPEARS_TRIES: u32 = 50;
/// Brokers that make topics by themselves have made it by this try.
const MADE_BY_BROKERS: u32 = 5;
/// What librdkafka has had to say meanwhile is no more than this.
const EVENTS: u32 = 64;
/// How long no broker has answered anything when that is told. librdkafka itself gives a connection up after a minute.
const SILENCE: Duration = Duration::from_secs(10);

/// What librdkafka has told since it was asked last.
#[derive(Default)]
struct Reports {
    delivered: Vec<(usize, Result<(), Lost>)>,
    complaint: Option<Failure>,
}

#[derive(Clone, Default)]
struct Listener(Arc<Mutex<Reports>>);

impl Listener {
    fn with<T>(&self, use_it: impl FnOnce(&mut Reports) -> T) -> T {
        use_it(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl ClientContext for Listener {
    fn log(&self, _level: RDKafkaLogLevel, _facility: &str, _message: &str) {}

    fn error(&self, error: KafkaError, _reason: &str) {
        self.with(|reports| {
            let complaint = failure(&error);
            // That nobody is there is what follows when nobody is let in.
            if !matches!(
                (&reports.complaint, &complaint),
                (Some(Failure::Refused(_)), Failure::Transient(_))
            ) {
                reports.complaint = Some(complaint);
            }
        });
    }
}

impl ProducerContext for Listener {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, number: usize) {
        self.with(|reports| {
            let outcome = match result {
                Ok(_) => {
                    reports.complaint = None;
                    Ok(())
                }
                Err((error, message)) => Err(lost(error, message.payload_len())),
            };
            reports.delivered.push((number, outcome));
        });
    }
}

fn lost(error: &KafkaError, bytes: usize) -> Lost {
    use RDKafkaErrorCode as Code;
    match error.rdkafka_error_code() {
        Some(Code::MessageSizeTooLarge | Code::InvalidMessageSize) => {
            Lost::Refused(format!("the broker does not take records of {bytes} bytes"))
        }
        // A compacted topic takes none without a key, others none of some time ago.
        Some(
            code @ (Code::InvalidRecord | Code::InvalidDifferentRecord | Code::InvalidTimestamp),
        ) => Lost::Refused(format!("the broker does not take the record: {code}")),
        Some(code) => Lost::Failed(explain(code)),
        None => Lost::Failed(Failure::Transient(error.to_string())),
    }
}

/// A client of a cluster.
struct Client {
    config: ClientConfig,
    listener: Listener,
    producer: Option<Arc<BaseProducer<Listener>>>,
}

impl Client {
    /// A new producer. Clients have threads, which are made and waited for off the runtime's own.
    async fn renew(&mut self, alone: bool) -> Result<(), Failure> {
        let old = self.producer.take();
        self.listener = Listener::default();
        let (mut config, listener) = (self.config.clone(), self.listener.clone());
        if alone {
            config.set("batch.num.messages", "1");
        }
        let made = blocking(move || {
            drop(old);
            let made: Result<BaseProducer<Listener>, _> = config.create_with_context(listener);
            made.map_err(|error| failure(&error))
        })
        .await?;
        self.producer = Some(Arc::new(made));
        Ok(())
    }

    /// How many partitions a topic has. None: there is none, though it was asked for, which makes it where brokers do so.
    async fn known(&mut self, topic: &Arc<str>) -> Result<Option<i32>, Failure> {
        if self.producer.is_none() {
            self.renew(false).await?;
        }
        let (producer, topic) = (self.producer.clone(), Arc::clone(topic));
        let listener = self.listener.clone();
        blocking(move || {
            let Some(producer) = producer else {
                return Ok(None);
            };
            let metadata = producer.client().fetch_metadata(Some(&topic), ASK);
            let metadata = metadata.map_err(|error| {
                // One event each.
                for _ in 0..EVENTS {
                    producer.poll(Duration::ZERO);
                }
                match listener.with(|reports| reports.complaint.clone()) {
                    Some(refused @ Failure::Refused(_)) => refused,
                    _ => failure(&error),
                }
            })?;
            listener.with(|reports| reports.complaint = None);
            let Some(found) = metadata.topics().iter().find(|t| t.name() == &*topic) else {
                return Ok(None);
            };
            match found.error().map(RDKafkaErrorCode::from) {
                None => Ok(i32::try_from(found.partitions().len())
                    .ok()
                    .filter(|n| *n > 0)),
                Some(RDKafkaErrorCode::LeaderNotAvailable) => Ok(None),
                Some(code) => match explain(code) {
                    Failure::Unknown(_) => Ok(None),
                    failure => Err(failure),
                },
            }
        })
        .await
    }

    /// Makes a topic as the brokers make them by default.
    async fn make(&self, topic: &str) -> Result<(), Failure> {
        let config = self.config.clone();
        let admin = blocking(move || {
            let admin: Result<AdminClient<Listener>, _> =
                config.create_with_context(Listener::default());
            admin.map_err(|error| failure(&error))
        })
        .await?;
        let new = [NewTopic::new(topic, -1, TopicReplication::Fixed(-1))];
        let options = AdminOptions::new()
            .request_timeout(Some(ASK))
            .operation_timeout(Some(ASK));
        let made = admin.create_topics(&new, &options).await;
        // It waits for its threads.
        let _dropped = spawn_blocking(move || drop(admin)).await;
        match made.map_err(|error| failure(&error))?.pop() {
            Some(Err((_, code))) if code != RDKafkaErrorCode::TopicAlreadyExists => {
                Err(explain(code))
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // It waits for its threads; the runtime's own must not.
        if let Some(producer) = self.producer.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn_blocking(move || drop(producer));
        }
    }
}

async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    spawn_blocking(call)
        .await
        .map_err(|error| Failure::Transient(error.to_string()))?
}

#[async_trait]
impl Cluster for Client {
    async fn partitions(&mut self, topic: &Arc<str>) -> Result<i32, Failure> {
        for attempt in 0..APPEARS_TRIES {
            if let Some(count) = self.known(topic).await? {
                return Ok(count);
            }
            if attempt == MADE_BY_BROKERS {
                self.make(topic).await?;
            }
            tokio::time::sleep(APPEARS).await;
        }
        Err(Failure::Unknown(format!(
            "topic \"{topic}\" does not exist"
        )))
    }

    async fn begin(&mut self, alone: bool) -> Result<(), Failure> {
        self.renew(alone).await
    }

    fn send(&mut self, number: usize, record: &Outgoing, mark: &Mark) -> Result<bool, Lost> {
        let Some(producer) = &self.producer else {
            return Err(Lost::Failed(Failure::Transient(
                "the client has ended".to_owned(),
            )));
        };
        let header = |key, value| Header {
            key,
            value: Some(value),
        };
        let headers = OwnedHeaders::new_with_capacity(3)
            .insert(header(COLLECTION_HEADER, record.collection.as_ref()))
            .insert(header(ORIGIN_HEADER, mark.origin.to_string().as_str()))
            .insert(header(SEQUENCE_HEADER, mark.sequence().as_str()));
        let mut message: BaseRecord<'_, str, [u8], usize> =
            BaseRecord::with_opaque_to(&record.topic, number)
                .partition(record.partition)
                .payload(&record.value[..])
                .timestamp(record.timestamp_ms)
                .headers(headers);
        if let Some(key) = &record.key {
            message = message.key(key);
        }
        match producer.send(message) {
            Ok(()) => Ok(true),
            Err((error, _)) => match error.rdkafka_error_code() {
                Some(RDKafkaErrorCode::QueueFull) => Ok(false),
                _ => Err(lost(&error, record.value.len())),
            },
        }
    }

    fn told(&mut self) -> Vec<(usize, Result<(), Lost>)> {
        if let Some(producer) = &self.producer {
            producer.poll(Duration::ZERO);
        }
        self.listener
            .with(|reports| std::mem::take(&mut reports.delivered))
    }

    fn complaint(&mut self) -> Option<Failure> {
        self.listener.with(|reports| reports.complaint.clone())
    }
}

/// Checks that librdkafka takes the options for writing. Asks no broker. Error: 22023.
pub fn check(config: &KafkaConfig) -> Result<(), SourceError> {
    let made: Result<BaseProducer<Listener>, _> =
        properties(config)?.create_with_context(Listener::default());
    made.map(drop).map_err(unusable)
}

/// What writes to the topics of a cluster. Asks no broker yet.
pub fn publisher(config: &KafkaConfig) -> Result<Box<dyn Publish>, SourceError> {
    let client = Client {
        config: properties(config)?,
        listener: Listener::default(),
        producer: None,
    };
    Ok(Box::new(Producer::new(client, SILENCE)))
}

fn properties(config: &KafkaConfig) -> Result<ClientConfig, SourceError> {
    let properties = config.for_producer()?;
    Ok(native(
        properties
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str())),
    ))
}
