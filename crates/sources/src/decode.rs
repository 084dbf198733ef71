//! Records become events: JSON text in one buffer, checked as collect checks it, each with its collection.
//!
//! The text goes through [`rakam_event::batch`] into columns, so no event is ever a tree of values. Avro in our own framing is
//! not even text: [`Framed`] says which record is of which version, and [`rakam_event::avro::Decoder`] reads it into columns.
//! What is no event is a [`DeadLetter`], and nothing else is touched by it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use rakam_event::entry::{self, Limits};
use rakam_event::error::EventError;
use rakam_event::names::CollectionName;
use rakam_event::{avro, print};
use rakam_files::avro_records::{self, RecordSchema};

use crate::batch::{Batch, Record};
use crate::options::{Format, Framing, Shape};

/// The header of a Kafka record that names its collection.
pub const COLLECTION_HEADER: &str = "rakam-collection";

/// The events of a container file in one record have so much text at most.
const CONTAINER_BYTES: usize = 64 << 20;

/// How the records of a source become events.
pub struct Decoder {
    format: Format,
    limits: Limits,
    route: Route,
    schemas: HashMap<u32, Arc<RecordSchema>>,
}

/// Where events go that do not say it themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    To(CollectionName),
    /// To the collection of the topic's name.
    Topic,
}

/// What is wrong with a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error(transparent)]
    Event(#[from] EventError),
    #[error("record is not valid UTF-8")]
    NotText,
    #[error("record is no envelope of \"collection\" and \"properties\"")]
    NoEnvelope,
    #[error("malformed Avro record: {0}")]
    Avro(String),
    #[error("record has no Avro framing")]
    NotFramed,
    #[error("unknown Avro schema {0}")]
    UnknownSchema(u32),
}

impl DecodeError {
    pub fn sqlstate(&self) -> &'static str {
        match self {
            Self::Event(error) => error.sqlstate(),
            Self::NotText => "22021",
            Self::NoEnvelope => "22023",
            Self::Avro(_) | Self::NotFramed => "22P03",
            Self::UnknownSchema(_) => "42704",
        }
    }
}

/// An event as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// An index into [`Decoded::collections`].
    pub collection: usize,
    /// An index into [`Batch::records`].
    pub record: usize,
    text: Range<usize>,
}

/// A record in our own Avro framing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Framed {
    /// An index into [`Decoded::collections`].
    pub collection: usize,
    /// Of the collection's schema.
    pub version: u32,
    /// An index into [`Batch::records`].
    pub record: usize,
}

/// A record that is no event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// An index into [`Batch::records`].
    pub record: usize,
    pub error: DecodeError,
}

/// What a batch holds.
#[derive(Debug, Default)]
pub struct Decoded {
    text: String,
    /// Each once, in the order in which they first came.
    pub collections: Vec<CollectionName>,
    pub events: Vec<Event>,
    pub framed: Vec<Framed>,
    pub dead: Vec<DeadLetter>,
    /// Records without a value.
    pub tombstones: u64,
}

impl Decoded {
    /// A JSON object on one line, with a `_time` if anything knows one.
    pub fn text(&self, event: &Event) -> &str {
        self.text.get(event.text.clone()).unwrap_or_default()
    }
}

impl Decoder {
    pub fn new(format: Format, route: Route, limits: Limits) -> Self {
        Self {
            format,
            limits,
            route,
            schemas: HashMap::new(),
        }
    }

    /// Lets records be read that were written with this schema, by its id in Confluent's framing.
    pub fn register(&mut self, id: u32, schema: RecordSchema) {
        self.schemas.insert(id, Arc::new(schema));
    }

    /// The ids of schemas that the records of a batch name and nobody has registered.
    pub fn missing_schemas(&self, batch: &Batch) -> Vec<u32> {
        if self.format != Format::Avro(Framing::Confluent) {
            return Vec::new();
        }
        let mut missing: Vec<u32> = batch
            .records()
            .iter()
            .filter_map(|record| confluent(batch.value(record)?))
            .map(|(id, _)| id)
            .filter(|id| !self.schemas.contains_key(id))
            .collect();
        missing.sort_unstable();
        missing.dedup();
        missing
    }

    /// Decodes all records of a batch.
    pub fn decode(&self, batch: &Batch) -> Decoded {
        let bytes = batch.bytes() + batch.records().len() * 24;
        let mut making = Making {
            decoder: self,
            batch,
            done: Decoded {
                text: String::with_capacity(bytes),
                events: Vec::with_capacity(batch.records().len()),
                ..Decoded::default()
            },
            index: HashMap::new(),
            by_split: vec![None; batch.moves.len()],
            json: String::new(),
        };
        for (at, record) in batch.records().iter().enumerate() {
            let Some(value) = batch.value(record) else {
                making.done.tombstones += 1;
                continue;
            };
            if let Err(error) = making.record(at, record, value) {
                making.done.dead.push(DeadLetter { record: at, error });
            }
        }
        making.done
    }
}

/// A batch being decoded.
struct Making<'a> {
    decoder: &'a Decoder,
    batch: &'a Batch,
    done: Decoded,
    index: HashMap<CollectionName, usize>,
    /// The collection of a split's name, once it was asked for.
    by_split: Vec<Option<Result<usize, EventError>>>,
    json: String,
}

impl Making<'_> {
    fn record(&mut self, at: usize, record: &Record, value: &[u8]) -> Result<(), DecodeError> {
        match self.decoder.format {
            Format::Json(shape) => {
                check_size(value, &self.decoder.limits)?;
                let text = std::str::from_utf8(value).map_err(|_| DecodeError::NotText)?;
                self.json(at, record, text, shape)
            }
            Format::Avro(Framing::Rakam) => {
                check_size(value, &self.decoder.limits)?;
                let (version, _) = avro::unframe(value).map_err(|_| DecodeError::NotFramed)?;
                let collection = self.default_collection(record)?;
                self.done.framed.push(Framed {
                    collection,
                    version,
                    record: at,
                });
                Ok(())
            }
            Format::Avro(Framing::Confluent) => {
                check_size(value, &self.decoder.limits)?;
                let (id, body) = confluent(value).ok_or(DecodeError::NotFramed)?;
                let schema = self.decoder.schemas.get(&id);
                let schema = Arc::clone(schema.ok_or(DecodeError::UnknownSchema(id))?);
                let mut json = std::mem::take(&mut self.json);
                json.clear();
                let result = schema
                    .write_json(body, self.decoder.limits.max_event_bytes, &mut json)
                    .map_err(DecodeError::Avro)
                    .and_then(|()| self.json(at, record, &json, Shape::Flat));
                self.json = json;
                result
            }
            Format::Avro(Framing::Container) => self.container(at, record, value),
        }
    }

    /// All events of a container, or none of them: a dead letter is a whole record.
    fn container(&mut self, at: usize, record: &Record, value: &[u8]) -> Result<(), DecodeError> {
        let (events, text) = (self.done.events.len(), self.done.text.len());
        let mut refused = None;
        let result = avro_records::container(value, CONTAINER_BYTES, |json| {
            if self.done.text.len() - text > CONTAINER_BYTES {
                return Err(format!("it holds more than {CONTAINER_BYTES} bytes"));
            }
            check_size(json.as_bytes(), &self.decoder.limits)
                .map_err(DecodeError::from)
                .and_then(|()| self.json(at, record, json, Shape::Flat))
                .map_err(|error| {
                    let reason = error.to_string();
                    refused = Some(error);
                    reason
                })
        });
        let Err(reason) = result else {
            return Ok(());
        };
        self.done.events.truncate(events);
        self.done.text.truncate(text);
        Err(refused.unwrap_or(DecodeError::Avro(reason)))
    }

    fn json(
        &mut self,
        at: usize,
        record: &Record,
        text: &str,
        shape: Shape,
    ) -> Result<(), DecodeError> {
        let envelope = match shape {
            Shape::Flat => None,
            Shape::Envelope => {
                // What is no JSON at all is told as such.
                let envelope = entry::envelope(text);
                if envelope.is_none() {
                    rakam_event::json::check(text, rakam_event::json::MAX_DEPTH + 1)?;
                    rakam_event::json::object_entries(text, |_, _| {})?;
                    return Err(DecodeError::NoEnvelope);
                }
                envelope
            }
            // Nearly all that is no envelope lacks the word.
            Shape::Auto if text.contains("properties") || text.contains('\\') => {
                entry::envelope(text)
            }
            Shape::Auto => None,
        };
        let (properties, named) = match &envelope {
            Some(envelope) => (envelope.properties, Some(&envelope.collection)),
            None => (text, None),
        };
        let event = entry::check_record(properties, &self.decoder.limits)?;
        let collection = match (event.collection, named) {
            (Some(name), _) => self.index_of(name),
            (None, Some(name)) => self.index_of(CollectionName::parse(name)?),
            (None, None) => self.default_collection(record)?,
        };
        let time = record.timestamp_ms.filter(|_| !event.has_time);
        self.push(at, collection, &event.properties, time);
        Ok(())
    }

    /// Adds an event; one without a time of its own has its record's.
    fn push(&mut self, record: usize, collection: usize, properties: &str, time_ms: Option<i64>) {
        let out = &mut self.done.text;
        let start = out.len();
        match (time_ms, properties.strip_suffix('}')) {
            (Some(time), Some(open)) => {
                out.push_str(open);
                // The last of equal names counts, so a `_time` of null is no hindrance.
                out.push_str(if open.trim_end().ends_with('{') {
                    "\"_time\":"
                } else {
                    ",\"_time\":"
                });
                print::write_int(time, out);
                out.push('}');
            }
            _ => out.push_str(properties),
        }
        let text = start..out.len();
        self.done.events.push(Event {
            collection,
            record,
            text,
        });
    }

    /// The collection of a record that does not name one in its value.
    fn default_collection(&mut self, record: &Record) -> Result<usize, EventError> {
        if let Some(name) = self.batch.collection(record) {
            let name = String::from_utf8_lossy(name);
            return CollectionName::parse(&name).map(|name| self.index_of(name));
        }
        let Some(Some(known)) = self.by_split.get(record.split) else {
            let name = match &self.decoder.route {
                Route::To(name) => Ok(name.clone()),
                Route::Topic => {
                    let moved = self.batch.moves.get(record.split);
                    let split = moved.map_or("", |moved| moved.split.as_str());
                    CollectionName::parse(split.rsplit_once('/').map_or(split, |(topic, _)| topic))
                }
            };
            let index = name.map(|name| self.index_of(name));
            if let Some(known) = self.by_split.get_mut(record.split) {
                *known = Some(index.clone());
            }
            return index;
        };
        known.clone()
    }

    fn index_of(&mut self, name: CollectionName) -> usize {
        if let Some(&index) = self.index.get(&name) {
            return index;
        }
        let index = self.done.collections.len();
        self.done.collections.push(name.clone());
        self.index.insert(name, index);
        index
    }
}

/// So that nothing is spent on what is refused anyway.
fn check_size(value: &[u8], limits: &Limits) -> Result<(), EventError> {
    if value.len() > limits.max_event_bytes {
        return Err(EventError::TooLarge {
            bytes: value.len(),
            limit: limits.max_event_bytes,
        });
    }
    Ok(())
}

/// The schema's id and the body of a record in Confluent's framing.
fn confluent(value: &[u8]) -> Option<(u32, &[u8])> {
    match value {
        [0, a, b, c, d, body @ ..] => Some((u32::from_be_bytes([*a, *b, *c, *d]), body)),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
