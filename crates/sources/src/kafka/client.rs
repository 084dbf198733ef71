//! Kafka by librdkafka.
//!
//! Clients have threads of their own, which inherit the signal mask of the thread that makes them: make them in a task of a
//! runtime whose threads block all signals. Dropping one waits for its threads.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use rdkafka::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Headers, Message as _};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList, TopicPartitionListElem};
use tokio::task::spawn_blocking;

use super::config::KafkaConfig;
use super::fetch::Fetcher;
use super::reader::Reader;
use super::topics::Topics;
use super::{Ask, Broker, Failure, Message, Partition};
use crate::decode::COLLECTION_HEADER;
use crate::error::SourceError;
use crate::position::Position;
use crate::published::{Mark, ORIGIN_HEADER, SEQUENCE_HEADER};
use crate::source::{Fetch, Split, Splits, Start};

/// How long a question about topics and offsets may take.
const ASK: Duration = Duration::from_secs(5);
/// A partition that no broker knows for so long is gone.
const GONE_AFTER: Duration = Duration::from_secs(10);

/// Logs nothing: what a user has to know comes as an error of a call, and a log would repeat it for every reconnection.
///
/// A call of somebody who is not let in fails as if nobody were there: the reason comes beside it, and is kept here until a call
/// succeeds.
#[derive(Default)]
struct Listener(Mutex<Option<Failure>>);

impl Listener {
    fn refusal(&self) -> std::sync::MutexGuard<'_, Option<Failure>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The outcome of a call; of one that reached nobody with the reason, as far as it is known.
    fn explained<T>(&self, outcome: Result<T, Failure>) -> Result<T, Failure> {
        let mut refusal = self.refusal();
        match outcome {
            Ok(value) => {
                *refusal = None;
                Ok(value)
            }
            Err(Failure::Transient(reason)) => {
                Err(refusal.clone().unwrap_or(Failure::Transient(reason)))
            }
            failed => failed,
        }
    }
}

impl ClientContext for Listener {
    fn log(&self, _level: RDKafkaLogLevel, _facility: &str, _message: &str) {}

    fn error(&self, error: KafkaError, _reason: &str) {
        if let refused @ Failure::Refused(_) = failure(&error) {
            *self.refusal() = Some(refused);
        }
    }
}

impl ConsumerContext for Listener {}

/// A client of a cluster.
pub(crate) struct Client(Arc<BaseConsumer<Listener>>);

impl Client {
    fn new(config: &KafkaConfig) -> Result<Self, SourceError> {
        native(config.properties())
            .create_with_context(Listener::default())
            .map(|consumer| Self(Arc::new(consumer)))
            .map_err(unusable)
    }

    fn explained<T>(&self, outcome: Result<T, Failure>) -> Result<T, Failure> {
        self.0.context().explained(outcome)
    }

    /// Takes in what librdkafka has to say, for a client that reads nothing.
    fn listen(&self) {
        while self.0.poll(Duration::ZERO).is_some() {}
    }

    /// The topics of the cluster that are asked for, each with its partitions.
    fn topics(&self, topics: &Topics) -> Result<Vec<(String, Vec<i32>)>, Failure> {
        if topics.has_patterns() {
            return self.metadata(None);
        }
        let mut all = Vec::new();
        for name in topics.names() {
            all.extend(self.metadata(Some(name))?);
        }
        Ok(all)
    }

    fn metadata(&self, topic: Option<&str>) -> Result<Vec<(String, Vec<i32>)>, Failure> {
        let metadata = self.0.fetch_metadata(topic, ASK);
        let metadata = self.explained(metadata.map_err(|e| failure(&e)))?;
        let mut found = Vec::new();
        for topic in metadata.topics() {
            match topic.error().map(|e| explain(e.into())) {
                None => {
                    let numbers = topic.partitions().iter().map(|p| p.id()).collect();
                    found.push((topic.name().to_owned(), numbers));
                }
                Some(Failure::Unknown(_)) => {}
                Some(failure) => return Err(failure),
            }
        }
        Ok(found)
    }

    fn located(&self, partition: &Partition, start: &Start) -> Result<Position, Failure> {
        Ok(match start {
            Start::Earliest => Position::Beginning,
            Start::Latest => Position::offset(self.ends(partition)?.1),
            Start::Time(time_ms) => {
                let mut times = TopicPartitionList::new();
                times
                    .add_partition_offset(
                        &partition.topic,
                        partition.number,
                        Offset::Offset((*time_ms).max(0)),
                    )
                    .map_err(|e| failure(&e))?;
                let found = self.0.offsets_for_times(times, ASK);
                let found = self.explained(found.map_err(|e| failure(&e)))?;
                let element = found.elements().into_iter().next();
                if let Some(Err(error)) = element.as_ref().map(|e| e.error()) {
                    return Err(failure(&error));
                }
                match element.map(|e| e.offset()) {
                    Some(Offset::Offset(next)) => Position::offset(next),
                    // Nothing is so young.
                    _ => Position::offset(self.ends(partition)?.1),
                }
            }
            Start::Splits(splits) => {
                let split = partition.split();
                let named = splits.iter().find(|(id, _)| *id == split);
                named.map_or(Position::Beginning, |(_, position)| position.clone())
            }
        })
    }

    fn ends(&self, partition: &Partition) -> Result<(i64, i64), Failure> {
        let ask = || {
            let ends = (self.0).fetch_watermarks(&partition.topic, partition.number, ASK);
            self.explained(ends.map_err(|e| failure(&e)))
        };
        match ask() {
            // As far as librdkafka remembers: partitions that were added since it only learns of when it is asked for them.
            Err(Failure::Unknown(reason)) => {
                let known = self.metadata(Some(&partition.topic))?;
                let mut all = known.iter().flat_map(|(_, numbers)| numbers);
                match all.any(|number| *number == partition.number) {
                    true => ask().map_err(|failure| Failure::Transient(reason_of(failure))),
                    false => Err(Failure::Unknown(reason)),
                }
            }
            ends => ends,
        }
    }
}

/// A configuration of librdkafka.
pub(super) fn native<'a>(properties: impl Iterator<Item = (&'a str, &'a str)>) -> ClientConfig {
    let mut native = ClientConfig::new();
    for (name, value) in properties {
        native.set(name, value);
    }
    // Else librdkafka would write to the server's standard error while it reads its configuration.
    native.set_log_level(RDKafkaLogLevel::Emerg);
    native
}

/// What is wrong with a configuration. The value may be a secret, so only the property is named.
pub(super) fn unusable(error: KafkaError) -> SourceError {
    let message = match error {
        KafkaError::ClientConfig(_, reason, name, _) => {
            let reason = reason.trim().trim_end_matches('.');
            format!("option \"{name}\" is not usable: {reason}")
        }
        error => format!("options are not usable: {error}"),
    };
    SourceError::option(
        message,
        "Options are the properties of librdkafka's CONFIGURATION.md.",
    )
}

fn list(partition: &Partition) -> TopicPartitionList {
    let mut list = TopicPartitionList::with_capacity(1);
    list.add_partition(&partition.topic, partition.number);
    list
}

pub(super) fn failure(error: &KafkaError) -> Failure {
    match error.rdkafka_error_code() {
        Some(code) => explain(code),
        None => Failure::Transient(error.to_string()),
    }
}

/// The words of a failure.
fn reason_of(failure: Failure) -> String {
    match failure {
        Failure::Partitions(reason)
        | Failure::Unknown(reason)
        | Failure::Refused(reason)
        | Failure::Transient(reason) => reason,
    }
}

pub(super) fn explain(code: RDKafkaErrorCode) -> Failure {
    use RDKafkaErrorCode as Code;
    let reason = code.to_string();
    match code {
        Code::AutoOffsetReset | Code::OffsetOutOfRange | Code::LogTruncation => {
            Failure::Partitions(reason)
        }
        // librdkafka tells of a batch that it cannot read, and goes on behind it: reading anew from the position is the only
        // way not to lose it.
        Code::BadMessage | Code::BadCompression | Code::NotImplemented => {
            Failure::Partitions(format!("records cannot be read: {reason}"))
        }
        Code::UnknownTopicOrPartition | Code::UnknownTopic | Code::UnknownPartition => {
            Failure::Unknown(reason)
        }
        Code::TopicAuthorizationFailed
        | Code::GroupAuthorizationFailed
        | Code::ClusterAuthorizationFailed
        | Code::SSL => Failure::Refused(reason),
        Code::SaslAuthenticationFailed | Code::Authentication | Code::UnsupportedSASLMechanism => {
            Failure::Refused(
                "the broker does not accept the credentials, or not by this SASL mechanism"
                    .to_owned(),
            )
        }
        _ => Failure::Transient(reason),
    }
}

impl Broker for Client {
    fn assign(&mut self, partitions: &[(Partition, Option<i64>)]) -> Result<(), Failure> {
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for (partition, from) in partitions {
            let offset = from.map_or(Offset::Beginning, Offset::Offset);
            list.add_partition_offset(&partition.topic, partition.number, offset)
                .map_err(|error| failure(&error))?;
        }
        self.0
            .incremental_assign(&list)
            .map_err(|error| failure(&error))
    }

    fn unassign(&mut self, partition: &Partition) -> Result<(), Failure> {
        self.0
            .incremental_unassign(&list(partition))
            .map_err(|error| failure(&error))
    }

    fn unassign_all(&mut self) -> Result<(), Failure> {
        self.0.unassign().map_err(|error| failure(&error))
    }

    fn positions(&mut self) -> Result<Vec<(Partition, Option<i64>)>, Failure> {
        let positions = self.0.position().map_err(|error| failure(&error))?;
        let of = |element: TopicPartitionListElem<'_>| {
            let partition = Partition {
                topic: element.topic().to_owned(),
                number: element.partition(),
            };
            let position = match element.offset() {
                Offset::Offset(position) => Some(position),
                _ => None,
            };
            (partition, position)
        };
        Ok(positions.elements().into_iter().map(of).collect())
    }

    fn pause(&mut self, partition: &Partition, paused: bool) -> Result<(), Failure> {
        let list = list(partition);
        let result = match paused {
            true => self.0.pause(&list),
            false => self.0.resume(&list),
        };
        result.map_err(|error| failure(&error))
    }

    fn ends(&mut self, partition: &Partition) -> Result<(i64, i64), Failure> {
        Client::ends(self, partition)
    }

    fn asker(&self) -> Arc<dyn Ask> {
        Arc::new(Asker(Arc::clone(&self.0)))
    }

    fn poll(&mut self, wait: Duration, take: &mut dyn FnMut(Message<'_>)) -> Result<bool, Failure> {
        match self.0.poll(wait) {
            None => Ok(false),
            Some(Err(error)) => self.explained(Err(failure(&error))),
            Some(Ok(message)) => {
                let named = Named::of(&message);
                take(Message {
                    topic: message.topic(),
                    partition: message.partition(),
                    offset: message.offset(),
                    timestamp_ms: message.timestamp().to_millis(),
                    value: message.payload(),
                    collection: named.collection,
                    mark: named.mark,
                });
                Ok(true)
            }
        }
    }
}

struct Asker(Arc<BaseConsumer<Listener>>);

impl Asker {
    /// The offsets at one of the ends of these partitions: one request for each broker.
    fn offsets(&self, partitions: &[Partition], end: Offset) -> Result<Vec<i64>, Failure> {
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for partition in partitions {
            list.add_partition_offset(&partition.topic, partition.number, end)
                .map_err(|error| failure(&error))?;
        }
        let found = self.0.offsets_for_times(list, ASK);
        let found = found.map_err(|error| failure(&error))?;
        let offset_of = |partition: &Partition| {
            let element = found.find_partition(&partition.topic, partition.number);
            let Some(element) = element else {
                return Err(Failure::Transient("no answer".to_owned()));
            };
            element.error().map_err(|error| failure(&error))?;
            match element.offset() {
                Offset::Offset(offset) => Ok(offset),
                _ => Err(Failure::Transient("no answer".to_owned())),
            }
        };
        partitions.iter().map(offset_of).collect()
    }
}

impl Ask for Asker {
    fn ends(&self, partitions: &[Partition]) -> Result<Vec<(i64, i64)>, Failure> {
        let ask = |end| self.0.context().explained(self.offsets(partitions, end));
        let oldest = ask(Offset::Beginning)?;
        let next = ask(Offset::End)?;
        Ok(oldest.into_iter().zip(next).collect())
    }
}

/// What a record says of itself in its headers.
#[derive(Default)]
struct Named<'a> {
    collection: Option<&'a [u8]>,
    mark: Option<Mark>,
}

impl<'a> Named<'a> {
    fn of(message: &'a BorrowedMessage<'_>) -> Self {
        let Some(headers) = message.headers() else {
            return Self::default();
        };
        let (mut collection, mut origin, mut sequence) = (None, None, None);
        for header in headers.iter() {
            match header.key {
                COLLECTION_HEADER => collection = header.value,
                ORIGIN_HEADER => origin = header.value,
                SEQUENCE_HEADER => sequence = header.value,
                _ => {}
            }
        }
        Self {
            collection,
            mark: origin
                .zip(sequence)
                .and_then(|(origin, sequence)| Mark::parse(origin, sequence)),
        }
    }
}

/// Checks that librdkafka knows the options and takes their values, of a server without its user mapping as well. Asks no broker.
/// Error: 22023.
pub fn check(config: &KafkaConfig) -> Result<(), SourceError> {
    Client::new(&config.with_any_credentials()).map(drop)
}

/// Opens the partitions of a source for reading. Asks no broker yet.
pub async fn fetch(config: KafkaConfig) -> Result<Box<dyn Fetch>, SourceError> {
    let client = blocking(move || Client::new(&config)).await?;
    Ok(Box::new(Fetcher::new(Reader::new(client, GONE_AFTER))))
}

/// The partitions of a source.
pub struct Partitions {
    client: Arc<Client>,
    topics: Topics,
}

impl Partitions {
    /// Asks no broker yet.
    pub async fn new(config: KafkaConfig, topics: Topics) -> Result<Self, SourceError> {
        let client = blocking(move || Client::new(&config)).await?;
        Ok(Self {
            client: Arc::new(client),
            topics,
        })
    }
}

#[async_trait]
impl Splits for Partitions {
    async fn list(&mut self) -> Result<Vec<Split>, SourceError> {
        let (client, topics) = (self.client.clone(), self.topics.clone());
        blocking(move || {
            let found = client.topics(&topics);
            client.listen();
            let found = client.explained(found);
            let found = found.map_err(|failure| failure.into_error("list the topics of Kafka"))?;
            Ok(topics.splits(&found))
        })
        .await
    }

    async fn locate(
        &mut self,
        splits: &[Split],
        start: &Start,
    ) -> Result<Vec<Position>, SourceError> {
        let partitions: Vec<Partition> = splits
            .iter()
            .map(|split| Partition::parse(&split.id))
            .collect::<Result<_, _>>()?;
        let (client, start) = (self.client.clone(), start.clone());
        blocking(move || {
            partitions
                .iter()
                .map(|partition| client.located(partition, &start))
                .collect::<Result<_, _>>()
                .map_err(|failure: Failure| failure.into_error("find an offset in Kafka"))
        })
        .await
    }
}

async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, SourceError> + Send + 'static,
) -> Result<T, SourceError> {
    spawn_blocking(call)
        .await
        .map_err(|error| SourceError::Misuse(error.to_string()))?
}

#[cfg(test)]
mod tests;
