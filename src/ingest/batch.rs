//! collect_batch: an array of events, of which bad ones are rejected alone. Events of one collection share inbox
//! rows, one JSON object a line, in the order in which they came.

use pgrx::{default, pg_extern};
use rakam_event::entry::{self, Batch, BatchItem};
use rakam_event::error::EventError;
use rakam_event::names::CollectionName;
use rakam_event::{json, time};

use super::admission::Admission;
use super::collect::{limits, project_of_key, writable_project};
use super::mapper::{self, Shape};
use super::quota;
use crate::catalog::inbox::{Entry, Payload};
use crate::catalog::projects::{self, Project};
use crate::pg::bytea::Bytea;
use crate::pg::jsonb::{JsonbEvents, JsonbText};
use crate::pg::record::Record;
use crate::pg::snapshot::Snapshot;
use crate::pg::spi::{self, View, arg};
use crate::pg::{ErrorReport, PgError, Result, not_null, wait, xact};

/// Bytes of events after which a collection gets another inbox row.
const ROW_BYTES: usize = 1 << 20;
/// A cancel is seen after so many events.
const CANCEL_ITEMS: usize = 256;

/// Stores an array of events given as text.
/// SQL: `rakam.collect_batch(project text, events text, api jsonb DEFAULT NULL)`.
/// Errors: 22P02 the text is no JSON, 22023 it is no array, or an option of `api` is wrong, and those of
/// `collect` that concern the whole call; what is wrong with one event is in the result.
#[pg_extern(sql = "
CREATE FUNCTION rakam.collect_batch(
  project text, events text, api jsonb DEFAULT NULL,
  OUT stored bigint, OUT rejected bigint, OUT rejected_indexes int[], OUT errors jsonb)
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', '@FUNCTION_NAME@';")]
fn collect_batch(
    project: Option<&str>,
    events: Option<&str>,
    api: default!(Option<JsonbText>, "NULL"),
) -> std::result::Result<Record, ErrorReport> {
    let project = writable_project(not_null(project, "project")?)?;
    Ok(store(
        &project,
        Events::Text(not_null(events, "events")?),
        api,
    )?)
}

/// Stores an array of events given as jsonb.
/// SQL: `rakam.collect_batch(project text, events jsonb, api jsonb DEFAULT NULL)`.
#[pg_extern(sql = "
CREATE FUNCTION rakam.collect_batch(
  project text, events jsonb, api jsonb DEFAULT NULL,
  OUT stored bigint, OUT rejected bigint, OUT rejected_indexes int[], OUT errors jsonb)
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', '@FUNCTION_NAME@';")]
fn collect_batch_jsonb(
    project: Option<&str>,
    events: Option<JsonbEvents>,
    api: default!(Option<JsonbText>, "NULL"),
) -> std::result::Result<Record, ErrorReport> {
    let project = writable_project(not_null(project, "project")?)?;
    let events = not_null(events, "events")?;
    Ok(store(&project, Events::Jsonb(&events), api)?)
}

/// Stores an array of events in the project of a key.
/// SQL: `rakam.collect_batch_with_key(key text, events text, api jsonb DEFAULT NULL)`.
#[pg_extern(sql = "
CREATE FUNCTION rakam.collect_batch_with_key(
  key text, events text, api jsonb DEFAULT NULL,
  OUT stored bigint, OUT rejected bigint, OUT rejected_indexes int[], OUT errors jsonb)
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', '@FUNCTION_NAME@';")]
fn collect_batch_with_key(
    key: Option<&str>,
    events: Option<&str>,
    api: default!(Option<JsonbText>, "NULL"),
) -> std::result::Result<Record, ErrorReport> {
    let project = project_of_key(not_null(key, "key")?)?;
    Ok(store(
        &project,
        Events::Text(not_null(events, "events")?),
        api,
    )?)
}

/// The array, and the form in which it came: only a text has a checksum.
#[derive(Clone, Copy)]
enum Events<'a> {
    Text(&'a str),
    Jsonb(&'a JsonbEvents),
}

fn store(project: &Project, events: Events<'_>, api: Option<JsonbText>) -> Result<Record> {
    let received_at_us = xact::now_us();
    let api = Api::parse(api.as_ref().map(|api| api.0.as_str()))?;
    let (text, batch) = match events {
        Events::Text(text) => {
            api.ensure_checksum(text)?;
            (text, entry::split_batch(text, &limits())?)
        }
        Events::Jsonb(_) if api.checksum.is_some() => {
            return Err(
                PgError::new("22023", "events of type jsonb have no checksum")
                    .hint("Pass the events as text: the checksum is the MD5 of exactly that text."),
            );
        }
        Events::Jsonb(JsonbEvents::Array(events)) => (
            events.text.as_str(),
            entry::split_events(events, &limits())?,
        ),
        Events::Jsonb(JsonbEvents::Other(text)) => {
            (text.as_str(), entry::split_batch(text, &limits())?)
        }
    };
    let Batch { collections, items } = batch;
    let shift_us = api
        .upload_time_us
        .map_or(0, |uploaded| received_at_us.saturating_sub(uploaded));
    charge(project, &items)?;
    let mut admission = Admission::new(project);
    // Each item is an event's text and its collection, or why it is refused: whatever else changes or refuses
    // events belongs here, before they are put together into rows.
    let mut rows = Rows::new(project, received_at_us, shift_us, collections, text.len());
    let mut rejected = Rejected::default();
    let mut stored = 0i64;
    for (index, item) in items.into_iter().enumerate() {
        if index % CANCEL_ITEMS == 0 {
            wait::check_interrupts();
        }
        match item {
            Ok(item) => {
                let name = rows.collection(item.collection).as_str();
                match admission.refusal(name, &item.properties)? {
                    Some(refusal) => rejected.add(index, &refusal)?,
                    None => stored += rows.add(&item)?,
                }
            }
            Err(error) => rejected.add(index, &error)?,
        }
    }
    stored += rows.finish()?;
    Ok(Record::new()
        .with(stored)
        .with(rejected.indexes.len() as i64)
        .with(rejected.indexes)
        .with(JsonbText(format!("[{}]", rejected.errors))))
}

/// Takes the well-formed events of a batch in, all or none.
fn charge(
    project: &Project,
    items: &[std::result::Result<BatchItem<'_>, EventError>],
) -> Result<()> {
    let (mut events, mut bytes) = (0, 0);
    for item in items.iter().flatten() {
        events += 1;
        bytes += item.properties.len() as i64;
    }
    quota::charge_collected(project, events, bytes)
}

/// What a checksum is.
const CHECKSUM: &str = "It is the MD5 of the text of the events, in hexadecimal digits.";

/// Options of a batch.
#[derive(Debug, Default, PartialEq, Eq)]
struct Api {
    upload_time_us: Option<i64>,
    checksum: Option<String>,
}

impl Api {
    /// Reads `{"upload_time": …, "checksum": …}`; an option that is null counts as not given.
    fn parse(text: Option<&str>) -> Result<Self> {
        let Some(text) = text else {
            return Ok(Self::default());
        };
        let options = "Valid options are upload_time and checksum.";
        let invalid = |message: String, hint: &str| Err(PgError::new("22023", message).hint(hint));
        if json::kind(text) != json::Kind::Object {
            let message = format!("api must be a JSON object, not {}", json::kind(text));
            return invalid(message, options);
        }
        let mut entries = Vec::new();
        json::object_entries(text, |key, raw| entries.push((key.to_owned(), raw)))?;
        let mut api = Self::default();
        for (key, raw) in entries {
            match key.as_str() {
                "upload_time" | "checksum" if json::kind(raw) == json::Kind::Null => {}
                "upload_time" => match time::event_time(raw) {
                    Some(us) => api.upload_time_us = Some(us),
                    None => {
                        return invalid(
                            format!("invalid upload_time: {raw:.100}"),
                            "It is a time as in _time: ISO 8601, or milliseconds since 1970.",
                        );
                    }
                },
                "checksum" => match json::string(raw) {
                    Some(sum) => api.checksum = Some(sum.into_owned()),
                    None => return invalid("checksum must be a string".to_owned(), CHECKSUM),
                },
                _ => return invalid(format!("unknown option \"{key}\" in api"), options),
            }
        }
        Ok(api)
    }

    fn ensure_checksum(&self, events: &str) -> Result<()> {
        let Some(expected) = &self.checksum else {
            return Ok(());
        };
        let actual: Option<String> = spi::first(
            View::Under(Snapshot::active()),
            "SELECT pg_catalog.md5($1)",
            &[arg(events)],
            |row| row.must(1),
        )?;
        if actual.is_some_and(|actual| actual.eq_ignore_ascii_case(expected)) {
            return Ok(());
        }
        Err(PgError::new("22023", "checksum does not match the events").hint(CHECKSUM))
    }
}

/// Events of one collection that go into one inbox row.
struct Row {
    n: i32,
    payload: Bytea,
}

/// The rows being filled, one for each collection of a batch.
struct Rows {
    project_id: i32,
    store_id: Option<i32>,
    received_at_us: i64,
    shift_us: i64,
    rows: Vec<(CollectionName, Option<Row>)>,
    /// What a row will most likely take.
    capacity: usize,
}

impl Rows {
    /// `bytes` is about what all events take together.
    fn new(
        project: &Project,
        received_at_us: i64,
        shift_us: i64,
        collections: Vec<CollectionName>,
        bytes: usize,
    ) -> Self {
        Self {
            project_id: project.id,
            store_id: project.event_store_id,
            received_at_us,
            shift_us,
            capacity: (bytes / collections.len().max(1)).min(ROW_BYTES),
            rows: collections.into_iter().map(|name| (name, None)).collect(),
        }
    }

    fn collection(&self, index: usize) -> &CollectionName {
        &self.rows[index].0
    }

    /// Adds an event; a row that it does not fit into any more is stored. How many events were stored.
    fn add(&mut self, item: &BatchItem<'_>) -> Result<i64> {
        let event = item.properties.as_bytes();
        let full = |row: &Row| row.payload.as_bytes().len() + 1 + event.len() > ROW_BYTES;
        let stored = match self.rows[item.collection].1.as_ref().is_some_and(full) {
            true => self.store(item.collection)?,
            false => 0,
        };
        match &mut self.rows[item.collection].1 {
            Some(row) => {
                row.payload.push(b"\n");
                row.payload.push(event);
                row.n += 1;
            }
            empty => {
                let mut payload = Bytea::with_capacity(self.capacity);
                payload.push(event);
                *empty = Some(Row { n: 1, payload });
            }
        }
        Ok(stored)
    }

    /// Stores what is left; how many events that were.
    fn finish(mut self) -> Result<i64> {
        (0..self.rows.len()).map(|index| self.store(index)).sum()
    }

    /// How many events were stored: mappers may drop some.
    fn store(&mut self, index: usize) -> Result<i64> {
        let (name, row) = &mut self.rows[index];
        let Some(row) = row.take() else {
            return Ok(0);
        };
        let entry = Entry {
            project_id: self.project_id,
            collection_id: projects::collection_id(self.project_id, name.as_str())?,
            collection: name.as_str(),
            n: row.n,
            received_at_us: self.received_at_us,
            shift_us: self.shift_us,
            store_id: self.store_id,
            payload: Payload::InPlace(&row.payload),
        };
        mapper::enter(&entry, Shape::Event)
    }
}

/// What was refused: 0-based indexes, and the elements of a JSON array that says why.
#[derive(Default)]
struct Rejected {
    indexes: Vec<i32>,
    errors: String,
}

impl Rejected {
    fn add(&mut self, index: usize, error: &EventError) -> Result<()> {
        if self.indexes.len() >= entry::REJECTED_MAX {
            return Err(EventError::TooManyRejected.into());
        }
        if !self.errors.is_empty() {
            self.errors.push(',');
        }
        self.errors.push_str(&format!(
            "{{\"index\":{index},\"sqlstate\":\"{}\",\"message\":",
            error.sqlstate()
        ));
        json::write_string(&error.to_string(), &mut self.errors);
        self.errors.push('}');
        // An array of more elements than an int can count does not fit a text of Postgres.
        self.indexes.push(i32::try_from(index).unwrap_or(i32::MAX));
        Ok(())
    }
}
