//! The service of a source, as its server and the user mapping of the server's owner define it at this moment.

use std::path::PathBuf;
use std::sync::Arc;

use rakam_files::locate::Root;
use rakam_files::object::{self, Fetching, Stop};
use rakam_files::source::Spec;
use rakam_lake::storage::{Storage, StorageUrl};
use rakam_sources::SourceError;
use rakam_sources::files::{FileFetch, Objects};
use rakam_sources::kafka::client as kafka;
use rakam_sources::kafka::config::KafkaConfig;
use rakam_sources::kafka::producer::client as kafka_producer;
use rakam_sources::kinesis::client as kinesis;
use rakam_sources::kinesis::config::KinesisConfig;
use rakam_sources::options::{Kind, SourceOptions, What};
use rakam_sources::publish::{Publish, StoreOptions};
use rakam_sources::source::{Fetch, Splits};

use crate::catalog::store;
use crate::pg::server::{self, Options, Server};
use crate::pg::{PgError, Result, cache, guc};

/// The wrapper whose servers are services.
pub const WRAPPER: &str = "rakam_source";

/// How much larger than an event its text in a file may be.
const RECORD_SLACK: usize = 64 << 10;

/// Where a source is read, and how. Two that are equal need no new connection.
#[derive(Clone, PartialEq)]
pub struct Service(Connection);

#[derive(Clone, PartialEq)]
enum Connection {
    Kafka(KafkaConfig),
    Kinesis(KinesisConfig),
    Files(Place),
}

/// A storage that files are read of.
#[derive(Clone)]
struct Place {
    server: String,
    address: String,
    at: At,
}

#[derive(Clone)]
enum At {
    Directory(PathBuf),
    Bucket(Storage),
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        (&self.server, &self.address) == (&other.server, &other.address)
    }
}

/// What kind of service a server is; 42704 if there is no such server.
pub fn kind(name: &str) -> Result<Kind> {
    kind_of(name, &named(name)?)
}

fn named(name: &str) -> Result<Server> {
    server::named(name, WRAPPER).ok_or_else(|| {
        PgError::new("42704", format!("server \"{name}\" of a source does not exist")).hint(
            "Create it with CREATE SERVER ... TYPE 'kafka' FOREIGN DATA WRAPPER rakam_source OPTIONS (brokers 'host:9092').",
        )
    })
}

fn kind_of(name: &str, server: &Server) -> Result<Kind> {
    match &server.kind {
        Some(kind) => Ok(Kind::parse(kind)?),
        None => Err(
            PgError::new("22023", format!("server \"{name}\" has no type"))
                .hint("Types are kafka, kinesis and files: CREATE SERVER … TYPE 'kafka' …."),
        ),
    }
}

/// The service of a server. Touches no network. Errors: 42704 there is no such server, 22023 its options cannot be used, 42501
/// its owner may not use the storage that it names.
pub fn of(name: &str) -> Result<(Kind, Service)> {
    let server = named(name)?;
    let kind = kind_of(name, &server)?;
    let (options, mapping) = (pairs(&server.options), pairs(&server.mapping));
    let connection = match kind {
        Kind::Kafka => Connection::Kafka(KafkaConfig::parse(options, mapping)?),
        Kind::Kinesis => Connection::Kinesis(KinesisConfig::parse(options, mapping)?),
        Kind::Files => {
            let storage = storage_of(&options)?;
            if !server::exists(storage) {
                return Err(no_storage(storage, "42704"));
            }
            if !server::is_usable(storage, server.owner) {
                return Err(PgError::new(
                    "42501",
                    format!("permission denied for foreign server \"{storage}\""),
                )
                .hint(format!("The owner of server \"{name}\" needs USAGE on it.")));
            }
            let (address, opened) = store::server(storage)?;
            let at = match StorageUrl::parse(&address)? {
                StorageUrl::File(path) => At::Directory(path),
                StorageUrl::Bucket(_) => At::Bucket(opened),
            };
            Connection::Files(Place {
                server: storage.to_owned(),
                address,
                at,
            })
        }
    };
    Ok((kind, Service(connection)))
}

impl Service {
    /// What writes to the service as an event store. Asks nobody yet. Error: 22023 for options of the server by which events could
    /// be lost or change their order.
    pub fn publisher(
        &self,
        options: &StoreOptions,
    ) -> std::result::Result<Box<dyn Publish>, SourceError> {
        match (&self.0, options) {
            (Connection::Kafka(config), StoreOptions::Kafka { .. }) => {
                kafka_producer::publisher(config)
            }
            (Connection::Kinesis(config), StoreOptions::Kinesis { stream, .. }) => {
                kinesis::publisher(config, stream)
            }
            _ => Err(changed()),
        }
    }
}

/// The storage that a server of files names.
pub fn storage_of<'a>(options: &[(&'a str, &'a str)]) -> Result<&'a str> {
    options
        .iter()
        .find(|(option, _)| *option == "storage")
        .map(|(_, storage)| *storage)
        .ok_or_else(|| {
            PgError::new("22023", "option \"storage\" is missing")
                .hint("Name the storage that files are read of: OPTIONS (storage 'lake').")
        })
}

pub(super) fn no_storage(name: &str, state: &str) -> PgError {
    PgError::new(state, format!("storage \"{name}\" does not exist")).hint(
        "Files are read of a directory or bucket: CREATE SERVER ... FOREIGN DATA WRAPPER rakam OPTIONS (url 's3://bucket/prefix').",
    )
}

pub(super) fn pairs(options: &Options) -> Vec<(&str, &str)> {
    options
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect()
}

/// What of a service a source reads. Made on the backend's own thread, used on the engine's.
#[derive(Clone)]
pub struct Reach {
    service: Service,
    what: What,
    max_record_bytes: usize,
    /// Of objects of a bucket. They are read once: nothing of them is kept.
    fetching: Option<Fetching>,
}

impl Reach {
    pub fn new(service: &Service, options: &SourceOptions) -> Result<Self> {
        Ok(Self {
            service: service.clone(),
            what: options.what.clone(),
            max_record_bytes: guc::max_event_bytes() + RECORD_SLACK,
            fetching: match &service.0 {
                Connection::Files(place) => Some(Fetching {
                    key: cache::server_key(&place.server, &place.address),
                    fetcher: cache::fetcher()?,
                    directory: None,
                    counters: Arc::default(),
                }),
                Connection::Kafka(_) | Connection::Kinesis(_) => None,
            },
        })
    }

    /// Lists the source's splits. Asks nobody yet.
    pub async fn splits(&self) -> std::result::Result<Box<dyn Splits>, SourceError> {
        Ok(match (&self.service.0, &self.what) {
            (Connection::Kafka(config), What::Topics(topics)) => {
                Box::new(kafka::Partitions::new(config.clone(), topics.clone()).await?)
            }
            (Connection::Kinesis(config), What::Stream(stream)) => {
                Box::new(kinesis::Shards::new(config, stream)?)
            }
            (Connection::Files(place), What::Objects { .. }) => Box::new(self.objects(place)?),
            _ => return Err(changed()),
        })
    }

    /// Reads the source's splits. Asks nobody yet.
    pub async fn fetch(&self) -> std::result::Result<Box<dyn Fetch>, SourceError> {
        Ok(match (&self.service.0, &self.what) {
            (Connection::Kafka(config), What::Topics(_)) => kafka::fetch(config.clone()).await?,
            (Connection::Kinesis(config), What::Stream(stream)) => kinesis::fetch(config, stream)?,
            (Connection::Files(place), What::Objects { .. }) => {
                Box::new(FileFetch::new(self.objects(place)?))
            }
            _ => return Err(changed()),
        })
    }

    fn objects(&self, place: &Place) -> std::result::Result<Objects, SourceError> {
        let What::Objects {
            prefix,
            format,
            options,
        } = &self.what
        else {
            return Err(changed());
        };
        let stop = Stop::new();
        let root = match (&place.at, &self.fetching) {
            (At::Directory(path), _) => Root::Directory {
                path: path.clone(),
                confined: true,
            },
            (At::Bucket(storage), Some(fetching)) => Root::Bucket(
                object::Objects::new(storage.clone(), "", fetching.clone(), &stop)
                    .map_err(|error| SourceError::Misuse(error.to_string()))?,
            ),
            (At::Bucket(_), None) => return Err(changed()),
        };
        Ok(Objects {
            root,
            stop,
            prefix: prefix.clone(),
            spec: Spec {
                format: *format,
                options: options.clone(),
                max_record_bytes: self.max_record_bytes,
            },
        })
    }
}

/// A server of another kind than the source was created on: it was dropped, and another one has its name.
fn changed() -> SourceError {
    SourceError::Misuse("the type of the server is not that of the source".to_owned())
}
