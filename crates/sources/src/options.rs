//! The options of a source, as `rakam.create_source` takes them, and the targets of `rakam.seek_source`.

use rakam_event::json;
use rakam_event::names::CollectionName;
use rakam_event::time;
use serde_json::{Map, Value};

use crate::decode::Route;
use crate::error::SourceError;
use crate::kafka::Partition;
use crate::kafka::topics::Topics;
use crate::position::{Position, is_sequence_number};
use crate::source::Start;

/// What kind of service a server of `rakam_source` is: its TYPE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Kafka,
    Kinesis,
    Files,
}

impl Kind {
    pub fn parse(name: &str) -> Result<Self, SourceError> {
        match name {
            "kafka" => Ok(Self::Kafka),
            "kinesis" => Ok(Self::Kinesis),
            "files" => Ok(Self::Files),
            _ => Err(SourceError::Unsupported {
                message: format!("servers of type \"{name}\" are not supported"),
                hint: "Types are kafka, kinesis and files: CREATE SERVER … TYPE 'kafka' ….",
            }),
        }
    }

    fn options(self) -> &'static [&'static str] {
        match self {
            Self::Kafka => &[
                "topics",
                "collection",
                "format",
                "shape",
                "framing",
                "start",
            ],
            Self::Kinesis => &[
                "stream",
                "collection",
                "format",
                "shape",
                "framing",
                "start",
            ],
            Self::Files => &["prefix", "collection", "format", "options"],
        }
    }
}

/// The shapes of JSON events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// The object is the event's properties.
    Flat,
    /// `{"collection": …, "properties": {…}}`.
    Envelope,
    /// An envelope if it is exactly that, else flat.
    Auto,
}

/// What is around an Avro record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// Our own, with the version of a collection's schema.
    Rakam,
    /// Confluent's, with the id of a registered schema.
    Confluent,
    /// A container file, which brings its schema.
    Container,
}

/// What records are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Json(Shape),
    Avro(Framing),
}

/// What is read.
#[derive(Debug, Clone)]
pub enum What {
    Topics(Topics),
    Stream(String),
    Objects {
        prefix: String,
        /// None: by each file's suffix.
        format: Option<rakam_files::format::Format>,
        options: rakam_files::format::Options,
    },
}

/// Checked options.
#[derive(Debug, Clone)]
pub struct SourceOptions {
    pub what: What,
    pub route: Route,
    /// Of records; files have their own, and of them this is that of rows which are tried again.
    pub format: Format,
    pub start: Start,
}

impl SourceOptions {
    /// Reads a JSON object. Error: 22023 for what is unknown, missing or malformed.
    pub fn parse(kind: Kind, text: &str) -> Result<Self, SourceError> {
        let given = Given::parse(kind, text)?;
        let route = |default: Route| match given.text("collection")? {
            Some(name) => CollectionName::parse(name)
                .map(Route::To)
                .map_err(SourceError::Collection),
            None => Ok(default),
        };
        let start = match given.0.get("start") {
            Some(value) => start(kind, value)?,
            None => Start::Earliest,
        };
        match kind {
            Kind::Kafka => Ok(Self {
                what: What::Topics(Topics::parse(given.topics()?)?),
                route: route(Route::Topic)?,
                format: given.format()?,
                start,
            }),
            Kind::Kinesis => {
                let stream = given.needed("stream", "the name of the stream")?;
                check_stream(stream)?;
                let collection = match given.text("collection")? {
                    Some(name) => name,
                    None => stream,
                };
                let name = CollectionName::parse(collection).map_err(|error| {
                    SourceError::option(error.to_string(), "Name another one: {\"collection\": …}.")
                })?;
                Ok(Self {
                    what: What::Stream(stream.to_owned()),
                    route: Route::To(name),
                    format: given.format()?,
                    start,
                })
            }
            Kind::Files => {
                given.needed(
                    "collection",
                    "the collection that the files' rows belong to",
                )?;
                let format = given
                    .text("format")?
                    .map(rakam_files::format::Format::parse);
                let options = match given.0.get("options") {
                    Some(value) => rakam_files::format::Options::parse(&value.to_string()),
                    None => Ok(Default::default()),
                };
                let of_files = |error: rakam_files::FilesError| {
                    SourceError::option(error.to_string(), error.hint().unwrap_or_default())
                };
                Ok(Self {
                    what: What::Objects {
                        prefix: given
                            .text("prefix")?
                            .unwrap_or("")
                            .trim_matches('/')
                            .to_owned(),
                        format: format.transpose().map_err(of_files)?,
                        options: options.map_err(of_files)?,
                    },
                    route: route(Route::Topic)?,
                    // A row that is tried again: what a file has are events, not envelopes.
                    format: Format::Json(Shape::Flat),
                    start,
                })
            }
        }
    }
}

/// Error: the name of a stream cannot be this.
pub(crate) fn check_stream(name: &str) -> Result<(), SourceError> {
    let is_legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if name.len() <= 128 && name.bytes().all(is_legal) {
        return Ok(());
    }
    Err(SourceError::option(
        format!("\"{name}\" is not the name of a stream"),
        "A stream has up to 128 letters, digits, dots, underscores and hyphens.",
    ))
}

/// Where `rakam.seek_source` goes: `earliest`, `latest`, a timestamp, or a JSON object of splits and the `next_offset` that
/// each is to have.
pub fn seek_target(kind: Kind, target: &str) -> Result<Start, SourceError> {
    if !target.trim_start().starts_with('{') {
        return moment(&Value::String(target.to_owned()));
    }
    let Ok(Value::Object(splits)) = serde_json::from_str(target) else {
        return Err(malformed_start(target));
    };
    named(&splits, |split, digits| match kind {
        Kind::Kafka => offset(split, digits),
        Kind::Kinesis => is_sequence_number(digits).then(|| Position::After(digits.to_owned())),
        Kind::Files => (digits == "0").then_some(Position::Beginning),
    })
}

fn start(kind: Kind, value: &Value) -> Result<Start, SourceError> {
    match (kind, value) {
        // A start names the first record to read.
        (Kind::Kinesis, Value::Object(splits)) => named(splits, |_, digits| {
            is_sequence_number(digits).then(|| Position::At(digits.to_owned()))
        }),
        (Kind::Kafka, Value::Object(splits)) => named(splits, offset),
        _ => moment(value),
    }
}

fn moment(value: &Value) -> Result<Start, SourceError> {
    match value {
        Value::String(text) if text == "earliest" => return Ok(Start::Earliest),
        Value::String(text) if text == "latest" => return Ok(Start::Latest),
        _ => {}
    }
    // The same spellings as an event's `_time`.
    time::event_time(&value.to_string())
        .map(|micros| Start::Time(micros.div_euclid(1000)))
        .ok_or_else(|| malformed_start(&value.to_string()))
}

fn named(
    splits: &Map<String, Value>,
    position: impl Fn(&str, &str) -> Option<Position>,
) -> Result<Start, SourceError> {
    splits
        .iter()
        .map(|(split, value)| {
            let digits = match value {
                Value::String(digits) => digits.clone(),
                other => other.to_string(),
            };
            let position = position(split, &digits).ok_or_else(|| malformed_start(&digits))?;
            Ok((split.clone(), position))
        })
        .collect::<Result<_, _>>()
        .map(Start::Splits)
}

fn offset(split: &str, digits: &str) -> Option<Position> {
    Partition::parse(split).ok()?;
    let next = digits.parse().ok().filter(|next: &i64| *next >= 0)?;
    Some(Position::offset(next))
}

fn malformed_start(text: &str) -> SourceError {
    SourceError::option(
        format!("\"{}\" is not a place to read from", text.trim_matches('"')),
        "Give \"earliest\", \"latest\", a timestamp, or an object of splits and offsets.",
    )
}

/// Options as given.
struct Given(Map<String, Value>, Kind);

impl Given {
    fn parse(kind: Kind, text: &str) -> Result<Self, SourceError> {
        let valid = format!("Options are {}.", kind.options().join(", "));
        let mut given = match serde_json::from_str(text) {
            Ok(Value::Object(given)) => given,
            Ok(_) => {
                let what = json::kind(json::trim(text));
                return Err(SourceError::option(
                    format!("options must be a JSON object, not {what}"),
                    valid,
                ));
            }
            Err(error) => {
                return Err(SourceError::option(
                    format!("options are not valid JSON: {error}"),
                    valid,
                ));
            }
        };
        if let Some(unknown) = given
            .keys()
            .find(|key| !kind.options().contains(&key.as_str()))
        {
            return Err(SourceError::option(
                format!("unknown option \"{unknown}\""),
                valid,
            ));
        }
        given.retain(|_, value| !value.is_null());
        Ok(Self(given, kind))
    }

    fn text(&self, name: &str) -> Result<Option<&str>, SourceError> {
        match self.0.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(SourceError::option(
                format!("option \"{name}\" must be a text"),
                format!("Options are {}.", self.1.options().join(", ")),
            )),
        }
    }

    fn needed(&self, name: &str, what: &str) -> Result<&str, SourceError> {
        self.text(name)?
            .filter(|text| !text.is_empty())
            .ok_or_else(|| {
                SourceError::option(
                    format!("option \"{name}\" is missing"),
                    format!("Give {what}: {{\"{name}\": \"pageview\"}}."),
                )
            })
    }

    fn topics(&self) -> Result<Vec<&str>, SourceError> {
        let wrong = || {
            SourceError::option(
                "option \"topics\" must be an array of texts",
                "Give topics, or patterns that begin with ^: {\"topics\": [\"pageview\", \"^order_.*\"]}.",
            )
        };
        match self.0.get("topics") {
            Some(Value::Array(topics)) => topics
                .iter()
                .map(|topic| topic.as_str().ok_or_else(wrong))
                .collect(),
            _ => Err(wrong()),
        }
    }

    fn format(&self) -> Result<Format, SourceError> {
        let shape = match self.text("shape")? {
            None => None,
            Some("flat") => Some(Shape::Flat),
            Some("envelope") => Some(Shape::Envelope),
            Some("auto") => Some(Shape::Auto),
            Some(other) => return Err(unknown("shape", other, "flat, envelope and auto")),
        };
        let framing = match self.text("framing")? {
            None => None,
            Some("rakam") => Some(Framing::Rakam),
            Some("confluent") => Some(Framing::Confluent),
            Some("container") => Some(Framing::Container),
            Some(other) => {
                return Err(unknown("framing", other, "rakam, confluent and container"));
            }
        };
        match (self.text("format")?.unwrap_or("json"), shape, framing) {
            ("json", shape, None) => Ok(Format::Json(shape.unwrap_or(Shape::Auto))),
            ("avro", None, framing) => Ok(Format::Avro(framing.unwrap_or(Framing::Rakam))),
            ("json", _, Some(_)) => Err(SourceError::option(
                "format json has no option \"framing\"",
                "JSON has a shape: flat, envelope or auto.",
            )),
            ("avro", Some(_), _) => Err(SourceError::option(
                "format avro has no option \"shape\"",
                "Avro has a framing: rakam, confluent or container.",
            )),
            (other, ..) => Err(unknown("format", other, "json and avro")),
        }
    }
}

fn unknown(option: &str, value: &str, valid: &str) -> SourceError {
    SourceError::option(
        format!("unknown {option} \"{value}\""),
        format!("Values of \"{option}\" are {valid}."),
    )
}

#[cfg(test)]
mod tests;
