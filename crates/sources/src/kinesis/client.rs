//! Kinesis by Amazon's SDK.
//!
//! The SDK's own retries are off: the reader decides when a shard is asked again, and shows what it waits for. TLS is rustls
//! with ring, over the same HTTP client as the storages have.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, future};
use aws_sdk_kinesis::Client as Sdk;
use aws_sdk_kinesis::config::retry::RetryConfig;
use aws_sdk_kinesis::config::timeout::TimeoutConfig;
use aws_sdk_kinesis::config::{BehaviorVersion, Config, Credentials, Region};
use aws_sdk_kinesis::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_kinesis::primitives::{Blob, DateTime};
use aws_sdk_kinesis::types::{PutRecordsRequestEntry, PutRecordsResultEntry, ShardIteratorType};
use aws_smithy_http_client::tls;
use object_store::aws::{AmazonS3Builder, AwsCredentialProvider};

use super::config::KinesisConfig;
use super::producer::{Producer, Put, Puts};
use super::reader::{Pace, Reader};
use super::{Answer, Failure, Raw, Shard, Stream};
use crate::error::SourceError;
use crate::position::Position;
use crate::publish::Publish;
use crate::source::{Fetch, Split, Splits, Start};

const CONNECT: Duration = Duration::from_secs(5);
/// An answer has up to 10 MB.
const ANSWER: Duration = Duration::from_secs(30);
/// A stream keeps its records for a day at least; half of it is left to clocks that differ.
const KEPT: Duration = Duration::from_secs(12 * 60 * 60);

/// A stream of Amazon's.
#[derive(Clone)]
pub(crate) struct AwsStream {
    sdk: Sdk,
    name: String,
}

impl AwsStream {
    pub(super) fn new(config: &KinesisConfig, name: &str) -> Result<Self, SourceError> {
        let provider = tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring);
        let http = aws_smithy_http_client::Builder::new()
            .tls_provider(provider)
            .build_https();
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(CONNECT)
            .operation_attempt_timeout(ANSWER)
            .build();
        let mut sdk = Config::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .region(Region::new(config.region.clone()))
            .http_client(http)
            .retry_config(RetryConfig::disabled())
            .timeout_config(timeouts);
        if let Some(endpoint) = &config.endpoint {
            sdk = sdk.endpoint_url(endpoint);
        }
        let sdk = match &config.credentials {
            Some(keys) => sdk.credentials_provider(Credentials::new(
                &keys.access_key_id,
                &keys.secret_access_key,
                keys.session_token.clone(),
                None,
                "user mapping",
            )),
            None => sdk.credentials_provider(Chain::new(&config.region)?),
        };
        Ok(Self {
            sdk: Sdk::from_conf(sdk.build()),
            name: name.to_owned(),
        })
    }
}

/// What the machine itself is allowed, found as for storages: environment, web identity, container, instance.
struct Chain(AwsCredentialProvider);

impl Chain {
    fn new(region: &str) -> Result<Self, SourceError> {
        // Only its credentials are used; a bucket has to have a name.
        let store = AmazonS3Builder::from_env()
            .with_region(region)
            .with_bucket_name("none")
            .build()
            .map_err(|_| {
                SourceError::option(
                    "no credentials for Kinesis",
                    "Create a user mapping for the owner of the server, with access_key_id and secret_access_key.",
                )
            })?;
        Ok(Self(Arc::clone(store.credentials())))
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Chain")
    }
}

impl ProvideCredentials for Chain {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        let provider = Arc::clone(&self.0);
        future::ProvideCredentials::new(async move {
            let found = provider.get_credential().await;
            let found = found.map_err(|_| CredentialsError::not_loaded_no_source())?;
            Ok(Credentials::new(
                &found.key_id,
                &found.secret_key,
                found.token.clone(),
                // The provider renews them in time; nobody else is to keep them.
                Some(SystemTime::now() + Duration::from_secs(60)),
                "chain",
            ))
        })
    }
}

#[async_trait]
impl Stream for AwsStream {
    async fn shards(&self) -> Result<Vec<Shard>, Failure> {
        let mut shards = Vec::new();
        let mut token: Option<String> = None;
        loop {
            // A page after the first is asked for by its token alone.
            let request = match token {
                None => self.sdk.list_shards().stream_name(&self.name),
                Some(token) => self.sdk.list_shards().next_token(token),
            };
            let page = request.send().await.map_err(|error| failure(&error))?;
            for shard in page.shards() {
                shards.push(Shard {
                    split: Split {
                        id: shard.shard_id().to_owned(),
                        parents: [shard.parent_shard_id(), shard.adjacent_parent_shard_id()]
                            .into_iter()
                            .flatten()
                            .map(str::to_owned)
                            .collect(),
                        closed: shard
                            .sequence_number_range()
                            .is_some_and(|range| range.ending_sequence_number().is_some()),
                    },
                    hashes: shard
                        .hash_key_range()
                        .and_then(hashes)
                        .unwrap_or(0..=u128::MAX),
                });
            }
            token = page.next_token().map(str::to_owned);
            if token.is_none() {
                break;
            }
        }
        shards.sort_by(|a, b| a.split.id.cmp(&b.split.id));
        Ok(shards)
    }

    async fn iterator(&self, shard: &str, position: &Position) -> Result<String, Failure> {
        use ShardIteratorType as Type;
        let request = self
            .sdk
            .get_shard_iterator()
            .stream_name(&self.name)
            .shard_id(shard);
        let request = match position {
            Position::At(sequence) => request
                .shard_iterator_type(Type::AtSequenceNumber)
                .starting_sequence_number(sequence),
            Position::After(sequence) => request
                .shard_iterator_type(Type::AfterSequenceNumber)
                .starting_sequence_number(sequence),
            Position::Time(time_ms) => request
                .shard_iterator_type(Type::AtTimestamp)
                .timestamp(DateTime::from_millis(*time_ms)),
            _ => request.shard_iterator_type(Type::TrimHorizon),
        };
        let answer = request.send().await.map_err(|error| failure(&error))?;
        answer
            .shard_iterator
            .ok_or_else(|| Failure::Transient("it gives no iterator".to_owned()))
    }

    async fn records(&self, iterator: &str, most: usize) -> Result<Answer, Failure> {
        let answer = self
            .sdk
            .get_records()
            .shard_iterator(iterator)
            .limit(i32::try_from(most).unwrap_or(i32::MAX))
            .send()
            .await
            .map_err(|error| failure(&error))?;
        Ok(Answer {
            next: answer.next_shard_iterator,
            has_children: answer.child_shards.is_some_and(|shards| !shards.is_empty()),
            behind_ms: answer
                .millis_behind_latest
                .and_then(|millis| u64::try_from(millis).ok()),
            records: answer
                .records
                .into_iter()
                .map(|record| Raw {
                    arrived_ms: record.approximate_arrival_timestamp.map(millis),
                    sequence: record.sequence_number,
                    data: record.data.into_inner(),
                })
                .collect(),
        })
    }
}

/// It comes as seconds in a floating point number, of which milliseconds are meant.
fn millis(time: DateTime) -> i64 {
    time.secs() * 1000 + i64::from((time.subsec_nanos() + 500_000) / 1_000_000)
}

fn hashes(range: &aws_sdk_kinesis::types::HashKeyRange) -> Option<RangeInclusive<u128>> {
    let first = range.starting_hash_key().parse().ok()?;
    let last = range.ending_hash_key().parse().ok()?;
    Some(first..=last)
}

#[async_trait]
impl Puts for AwsStream {
    async fn put(&self, records: &[Put<'_>]) -> Result<Vec<Result<(), String>>, Failure> {
        let entries = records.iter().map(|record| {
            PutRecordsRequestEntry::builder()
                .partition_key(record.key)
                .data(Blob::new(record.data))
                .build()
        });
        let entries: Vec<_> = entries
            .collect::<Result<_, _>>()
            .map_err(|error| Failure::Transient(error.to_string()))?;
        let answer = self
            .sdk
            .put_records()
            .stream_name(&self.name)
            .set_records(Some(entries))
            .send()
            .await
            .map_err(|error| failure(&error))?;
        let outcome = |entry: &PutRecordsResultEntry| match entry.error_code() {
            None => Ok(()),
            // The message names the account.
            Some(code) => Err(code.to_owned()),
        };
        Ok(answer.records().iter().map(outcome).collect())
    }
}

/// What an error means, by its code; its text may name the account.
fn failure<E: ProvideErrorMetadata>(error: &SdkError<E>) -> Failure {
    let status = error
        .raw_response()
        .map(|response| response.status().as_u16());
    let code = match error.as_service_error().and_then(|e| e.code()) {
        Some(code) => code.to_owned(),
        None => {
            return Failure::Transient(match (error, status) {
                (SdkError::TimeoutError(_), _) => "it did not answer in time".to_owned(),
                (_, Some(status)) => format!("it answered with status {status}"),
                _ => "it could not be reached".to_owned(),
            });
        }
    };
    match code.as_str() {
        "ExpiredIteratorException" => Failure::Expired,
        "ProvisionedThroughputExceededException"
        | "LimitExceededException"
        | "KMSThrottlingException"
        | "ThrottlingException"
        | "Throttling" => Failure::Throttled(code),
        "ResourceNotFoundException" => Failure::Missing(code),
        "InvalidArgumentException" | "ValidationException" => Failure::Invalid(code),
        "ExpiredNextTokenException"
        | "ResourceInUseException"
        | "InternalFailure"
        | "InternalFailureException"
        | "ServiceUnavailable"
        | "ServiceUnavailableException" => Failure::Transient(code),
        _ if status.is_some_and(|status| status >= 500) => Failure::Transient(code),
        _ => Failure::Refused(code),
    }
}

/// The shards of a stream.
pub struct Shards(AwsStream);

impl Shards {
    /// Asks nobody yet. A client belongs to the tokio runtime that uses it first.
    pub fn new(config: &KinesisConfig, stream: &str) -> Result<Self, SourceError> {
        AwsStream::new(config, stream).map(Self)
    }
}

#[async_trait]
impl Splits for Shards {
    async fn list(&mut self) -> Result<Vec<Split>, SourceError> {
        match self.0.shards().await {
            Ok(shards) => Ok(shards.into_iter().map(|shard| shard.split).collect()),
            Err(Failure::Missing(_)) => Err(SourceError::Missing {
                what: "stream",
                name: self.0.name.clone(),
            }),
            Err(failure) => Err(failure.into_error("list the shards of a stream")),
        }
    }

    async fn locate(
        &mut self,
        splits: &[Split],
        start: &Start,
    ) -> Result<Vec<Position>, SourceError> {
        Ok(super::located(splits, start, SystemTime::now()))
    }
}

/// Opens the shards of a stream for reading. Asks nobody yet.
pub fn fetch(config: &KinesisConfig, stream: &str) -> Result<Box<dyn Fetch>, SourceError> {
    let stream = AwsStream::new(config, stream)?;
    Ok(Box::new(Reader::new(stream, Pace::default(), KEPT)))
}

/// What writes to a stream. Asks nobody yet.
pub fn publisher(config: &KinesisConfig, stream: &str) -> Result<Box<dyn Publish>, SourceError> {
    let stream = AwsStream::new(config, stream)?;
    Ok(Box::new(Producer::new(stream, Pace::default())))
}

#[cfg(test)]
mod tests;
