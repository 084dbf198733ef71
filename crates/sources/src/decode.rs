//! Records become events: JSON text, each with its collection.
//!
//! The text goes through [`crate::columns`] into Arrow columns, so no event is ever a tree of values, and JSON of a record is
//! not even copied: nearly all of it is read once, by the walk that makes columns of it, which refuses what collect refuses.
//! What does not become columns, or names its collection in itself, is checked here ([`Decoded::check`]). Avro in our own
//! framing is not even text: [`Framed`] says which record is of which version. What is no event is a [`DeadLetter`], and
//! nothing else is touched by it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use rakam_event::entry::{self, Limits};
use rakam_event::error::EventError;
use rakam_event::names::{CollectionName, CollectionNames};
use rakam_event::types::FieldType;
use rakam_event::{avro, json, print};
use rakam_files::avro_records::{self, RecordSchema};

use crate::batch::{Batch, Record};
use crate::options::{Format, Framing, Shape};

/// The header of a Kafka record that names its collection.
pub const COLLECTION_HEADER: &str = "rakam-collection";

/// The events of a container file in one record have so much text at most,
const CONTAINER_BYTES: usize = 64 << 20;
/// and those of a batch, beside what is text already: a few bytes of Avro can say a lot.
const TEXT_BYTES: usize = 256 << 20;

/// The collection of an event of which none is known yet.
const NOWHERE: usize = usize::MAX;

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
    #[error("collection \"{collection}\" has no schema version {version}")]
    UnknownVersion { collection: String, version: u32 },
    #[error("records around it say more than {0} bytes of text")]
    TooMuch(usize),
    #[error("{0}")]
    File(String),
    #[error("the record crashed its parser")]
    Crashed,
}

impl DecodeError {
    pub fn sqlstate(&self) -> &'static str {
        match self {
            Self::Event(error) => error.sqlstate(),
            Self::NotText => "22021",
            Self::NoEnvelope => "22023",
            Self::Avro(_) | Self::NotFramed => "22P03",
            Self::File(_) => "22P04",
            Self::UnknownSchema(_) | Self::UnknownVersion { .. } => "42704",
            Self::TooMuch(_) => "54000",
            Self::Crashed => "XX000",
        }
    }
}

/// The text of an event.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Text<'a> {
    Batch(&'a str),
    Own(Range<usize>),
}

/// An event as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event<'a> {
    /// By [`Decoded::collections`].
    pub collection: usize,
    /// An index into [`Batch::records`].
    pub record: usize,
    /// When it happened if it has no `_time`, in milliseconds since 1970: its record's time.
    pub written_ms: Option<i64>,
    /// By [`Decoded::declared`], if the schema that it was written with declares types.
    pub declared: Option<usize>,
    /// What is known by [`Decoded::check`]: that it has an `_id`. None: it was not checked.
    pub has_id: Option<bool>,
    text: Text<'a>,
}

/// A record in our own Avro framing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Framed {
    /// By [`Decoded::collections`].
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
pub struct Decoded<'a> {
    own: String,
    limits: Limits,
    pub collections: CollectionNames,
    pub events: Vec<Event<'a>>,
    pub framed: Vec<Framed>,
    pub dead: Vec<DeadLetter>,
    /// Fields whose type is declared by a schema that events were written with.
    pub declared: Vec<Vec<(String, FieldType)>>,
}

impl<'a> Decoded<'a> {
    /// A JSON object; one line of it once it is checked.
    pub fn text(&self, event: &Event<'a>) -> &str {
        match &event.text {
            Text::Batch(text) => text,
            Text::Own(range) => self.own.get(range.clone()).unwrap_or_default(),
        }
    }

    /// Appends a checked event as one line, with a `_time` if anything knows one.
    pub fn write_line(&self, event: &Event<'a>, out: &mut String) {
        let properties = self.text(event);
        match (event.written_ms, properties.strip_suffix('}')) {
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
    }

    /// Checks an event as collect does, once, and takes `_collection` out of it, which says where it belongs from then on.
    pub fn check(&mut self, at: usize) -> Result<(), DecodeError> {
        let Some(event) = self.events.get_mut(at).filter(|e| e.has_id.is_none()) else {
            return Ok(());
        };
        let own = std::mem::take(&mut self.own);
        let checked = Checked::of(&event.text, &own, &self.limits);
        self.own = own;
        let checked = checked?;
        event.text = match checked.text {
            Ok(text) => text,
            Err(text) => {
                let start = self.own.len();
                self.own.push_str(&text);
                Text::Own(start..self.own.len())
            }
        };
        event.has_id = Some(checked.has_id);
        if checked.has_time {
            event.written_ms = None;
        }
        if let Some(name) = checked.collection {
            event.collection = self.collections.index_of(name);
        }
        Ok(())
    }
}

/// What a check finds.
struct Checked<'a> {
    /// Or else what it is now, which is nowhere yet.
    text: Result<Text<'a>, String>,
    collection: Option<CollectionName>,
    has_time: bool,
    has_id: bool,
}

impl<'a> Checked<'a> {
    fn of(text: &Text<'a>, own: &str, limits: &Limits) -> Result<Self, EventError> {
        let (record, text) = match text {
            Text::Batch(text) => {
                let record = entry::check_record(text, limits)?;
                let text = match record.properties {
                    Cow::Borrowed(properties) => Ok(Text::Batch(properties)),
                    Cow::Owned(ref properties) => Err(properties.clone()),
                };
                (record, text)
            }
            Text::Own(range) => {
                let record =
                    entry::check_record(own.get(range.clone()).unwrap_or_default(), limits)?;
                let text = match record.properties {
                    Cow::Borrowed(properties) => {
                        let start = properties.as_ptr() as usize - own.as_ptr() as usize;
                        Ok(Text::Own(start..start + properties.len()))
                    }
                    Cow::Owned(ref properties) => Err(properties.clone()),
                };
                (record, text)
            }
        };
        Ok(Self {
            text,
            has_time: record.has_time,
            has_id: record.has_id,
            collection: record.collection,
        })
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

    /// The limits of events from now on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Decodes all records of a batch.
    pub fn decode<'a>(&self, batch: &'a Batch) -> Decoded<'a> {
        let mut making = Making {
            decoder: self,
            batch,
            done: Decoded {
                limits: self.limits,
                events: Vec::with_capacity(batch.records().len()),
                ..Decoded::default()
            },
            by_split: vec![None; batch.moves.len()],
            by_schema: HashMap::new(),
        };
        for (at, record) in batch.records().iter().enumerate() {
            let Some(value) = batch.value(record) else {
                // A tombstone: it is counted by its split.
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
struct Making<'d, 'a> {
    decoder: &'d Decoder,
    batch: &'a Batch,
    done: Decoded<'a>,
    /// The collection of a split's name, once it was asked for.
    by_split: Vec<Option<Result<usize, EventError>>>,
    /// What the schemas of Confluent's framing declare: by [`Decoded::declared`].
    by_schema: HashMap<u32, usize>,
}

impl<'a> Making<'_, 'a> {
    fn record(&mut self, at: usize, record: &Record, value: &'a [u8]) -> Result<(), DecodeError> {
        if self.decoder.format != Format::Avro(Framing::Container) {
            check_size(value, &self.decoder.limits)?;
        }
        match self.decoder.format {
            Format::Json(shape) => {
                let text = std::str::from_utf8(value).map_err(|_| DecodeError::NotText)?;
                self.json(at, record, text, shape)
            }
            Format::Avro(Framing::Rakam) => {
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
                let (id, body) = confluent(value).ok_or(DecodeError::NotFramed)?;
                let schema = self.decoder.schemas.get(&id);
                let schema = schema.ok_or(DecodeError::UnknownSchema(id))?;
                let start = self.done.own.len();
                let result = schema
                    .write_json(
                        body,
                        self.decoder.limits.max_event_bytes,
                        &mut self.done.own,
                    )
                    .map_err(DecodeError::Avro)
                    .and_then(|()| self.written(at, record, start));
                if let (Ok(()), Some(event)) = (&result, self.done.events.last_mut()) {
                    let all = &mut self.done.declared;
                    event.declared = Some(*self.by_schema.entry(id).or_insert_with(|| {
                        all.push(schema.declared().to_vec());
                        all.len() - 1
                    }));
                }
                if result.is_err() {
                    self.done.own.truncate(start);
                }
                result
            }
            Format::Avro(Framing::Container) => self.container(at, record, value),
        }
    }

    /// An event whose text is what was written from `start` on.
    fn written(&mut self, at: usize, record: &Record, start: usize) -> Result<(), DecodeError> {
        if self.done.own.len() > TEXT_BYTES {
            return Err(DecodeError::TooMuch(TEXT_BYTES));
        }
        let text = Text::Own(start..self.done.own.len());
        self.add(at, record, text, None)
    }

    /// All events of a container, or none of them: a dead letter is a whole record.
    fn container(&mut self, at: usize, record: &Record, value: &[u8]) -> Result<(), DecodeError> {
        let (events, start) = (self.done.events.len(), self.done.own.len());
        let mut refused = None;
        let result = avro_records::container(value, CONTAINER_BYTES, |json, declared| {
            let mut event = || {
                if self.done.own.len() - start > CONTAINER_BYTES {
                    let reason = format!("it holds more than {CONTAINER_BYTES} bytes");
                    return Err(DecodeError::Avro(reason));
                }
                check_size(json.as_bytes(), &self.decoder.limits)?;
                let from = self.done.own.len();
                self.done.own.push_str(json);
                self.written(at, record, from)?;
                // Nearly always it is that of the container before.
                if self
                    .done
                    .declared
                    .last()
                    .is_none_or(|last| last != declared)
                {
                    self.done.declared.push(declared.to_vec());
                }
                let last = self.done.events.len() - 1;
                self.done.events[last].declared = self.done.declared.len().checked_sub(1);
                self.done.check(last)
            };
            event().map_err(|error| {
                let reason = error.to_string();
                refused = Some(error);
                reason
            })
        });
        let Err(reason) = result else {
            return Ok(());
        };
        self.done.events.truncate(events);
        self.done.own.truncate(start);
        Err(refused.unwrap_or(DecodeError::Avro(reason)))
    }

    fn json(
        &mut self,
        at: usize,
        record: &Record,
        text: &'a str,
        shape: Shape,
    ) -> Result<(), DecodeError> {
        let envelope = match shape {
            Shape::Flat => None,
            Shape::Envelope => {
                // What is no JSON at all is told as such.
                let envelope = entry::envelope(text);
                if envelope.is_none() {
                    json::check(text, json::MAX_DEPTH + 1)?;
                    json::object_entries(text, |_, _| {})?;
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
        match envelope {
            Some(envelope) => {
                let text = Text::Batch(envelope.properties);
                self.add(at, record, text, Some(&envelope.collection))
            }
            None => self.add(at, record, Text::Batch(text), None),
        }
    }

    fn add(
        &mut self,
        at: usize,
        record: &Record,
        text: Text<'a>,
        named: Option<&str>,
    ) -> Result<(), DecodeError> {
        let event = Event {
            collection: 0,
            record: at,
            written_ms: record.timestamp_ms,
            declared: None,
            has_id: None,
            text,
        };
        // The usual spelling of it; another one comes to light later.
        let routes = self.done.text(&event).contains("_collection");
        let event_at = self.done.events.len();
        self.done.events.push(event);
        let result = self.route(event_at, record, named, routes);
        if result.is_err() {
            self.done.events.truncate(event_at);
        }
        result
    }

    /// Finds an event's collection.
    fn route(
        &mut self,
        at: usize,
        record: &Record,
        named: Option<&str>,
        routes: bool,
    ) -> Result<(), DecodeError> {
        let outer = match named {
            Some(name) => {
                CollectionName::parse(name).map(|name| self.done.collections.index_of(name))
            }
            None => self.default_collection(record),
        };
        if let (Ok(outer), false) = (&outer, routes) {
            self.done.events[at].collection = *outer;
            return Ok(());
        }
        // What it says itself goes before, even where nothing else is the name of a collection.
        self.done.events[at].collection = NOWHERE;
        self.done.check(at)?;
        if self.done.events[at].collection == NOWHERE {
            self.done.events[at].collection = outer?;
        }
        Ok(())
    }

    /// The collection of a record that does not name one in its value.
    fn default_collection(&mut self, record: &Record) -> Result<usize, EventError> {
        if let Some(name) = self.batch.collection(record) {
            return CollectionName::parse(&collection_text(name))
                .map(|name| self.done.collections.index_of(name));
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
            let index = name.map(|name| self.done.collections.index_of(name));
            if let Some(known) = self.by_split.get_mut(record.split) {
                *known = Some(index.clone());
            }
            return index;
        };
        known.clone()
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

/// The name that a record gives beside its value, as text of Postgres, which has no NUL: what has one names no collection.
pub fn collection_text(name: &[u8]) -> Cow<'_, str> {
    match name.contains(&0) {
        true => Cow::Borrowed(""),
        false => String::from_utf8_lossy(name),
    }
}

/// The schema's id and the body of a record in Confluent's framing.
fn confluent(value: &[u8]) -> Option<(u32, &[u8])> {
    match value {
        [0, a, b, c, d, body @ ..] => Some((u32::from_be_bytes([*a, *b, *c, *d]), body)),
        _ => None,
    }
}

#[cfg(test)]
pub(crate) mod tests;
