//! What collect checks, in the caller's transaction: that an event is one the digest can take. Types, names and
//! coercions come later; nothing here needs a schema.
//!
//! What is in order is accepted in one pass, by [`crate::scan`]. The rest is read again the careful way, which says
//! what is wrong.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;

use crate::coerce;
use crate::error::EventError;
use crate::infer::{Inferred, infer};
use crate::json::{self, Cutter, Kind, MAX_DEPTH};
use crate::jsonb::events::Events;
use crate::names::{self, CollectionName, CollectionNames};
use crate::scan::{Scanned, Scanner, Unsure};
use crate::schema;

mod record;

pub use record::{Envelope, Record, check_record, envelope};

/// An `_id` longer than this is refused.
pub const MAX_ID_BYTES: usize = 256;

/// The settings `rakam.max_event_bytes`, `rakam.max_string_bytes`, `rakam.max_fields`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub max_event_bytes: usize,
    pub max_string_bytes: usize,
    /// User fields of a collection; system fields do not count.
    pub max_fields: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_event_bytes: 1 << 20,
            max_string_bytes: 64 << 10,
            max_fields: 500,
        }
    }
}

/// Items of a batch that are rejected one by one; of more the whole batch is refused.
pub const REJECTED_MAX: usize = 100_000;

/// What a batch holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch<'a> {
    /// Each once, in the order in which they first came.
    pub collections: Vec<CollectionName>,
    /// In the order of the array; an error is of this item alone.
    pub items: Vec<Result<BatchItem<'a>, EventError>>,
}

/// One event of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchItem<'a> {
    /// An index into [`Batch::collections`].
    pub collection: usize,
    /// A JSON object on one line.
    pub properties: Cow<'a, str>,
}

/// Checks one event; answers its text on one line.
pub fn check_event<'a>(properties: &'a str, limits: &Limits) -> Result<Cow<'a, str>, EventError> {
    check_size(properties, limits)?;
    let mut scanner = Scanner::new(properties);
    match scan_event(&mut scanner) {
        Ok(()) if scanner.line_break => Ok(one_line(properties)),
        Ok(()) => Ok(Cow::Borrowed(json::trim(properties))),
        Err(Unsure) => explain_event(properties),
    }
}

/// Checks a row that Postgres has typed, as an event: it may have an `_extra` object, which no client may send.
pub fn check_row<'a>(row: &'a str, limits: &Limits) -> Result<Cow<'a, str>, EventError> {
    check_size(row, limits)?;
    json::check(row, MAX_DEPTH)?;
    let mut id = None;
    json::object_entries(row, |key, raw| {
        if key == schema::ID {
            id = Some(raw);
        }
    })?;
    id.map_or(Ok(()), check_id)?;
    Ok(one_line(row))
}

/// Reads an array of events. What is wrong with one item is that item's error alone, as long as no more than [`REJECTED_MAX`]
/// are wrong.
pub fn split_batch<'a>(text: &'a str, limits: &Limits) -> Result<Batch<'a>, EventError> {
    match scan_batch(text, limits) {
        Ok(batch) => Ok(batch),
        Err(Unsure) => explain_batch(text, limits),
    }
}

/// As [`split_batch`] of the text, of which more is known.
pub fn split_events<'a>(events: &'a Events, limits: &Limits) -> Result<Batch<'a>, EventError> {
    let mut batch = Builder::default();
    batch.items.reserve(events.items.len());
    let text = |range: &Range<usize>| events.text.get(range.clone()).unwrap_or_default();
    for item in &events.items {
        let taken = item.parts.as_ref().ok_or(Unsure).and_then(|parts| {
            let id = parts.id.as_ref().map(text);
            id.map_or(Ok(()), check_id).map_err(|_| Unsure)?;
            let properties = Cow::Borrowed(text(&parts.properties));
            batch.add(text(&parts.collection), properties, limits)
        });
        if taken.is_err() {
            batch.explain(text(&item.all), limits);
        }
    }
    batch.done()
}

/// What an event would add to its collection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewNames {
    /// Every name that is no field, normalised, in the order of the event.
    pub unknown: Vec<String>,
    /// Those of them that would become fields by the values they have.
    pub fields: Vec<String>,
}

/// The names of a checked event that are neither system fields nor `known`.
pub fn new_names(properties: &str, known: impl Fn(&str) -> bool) -> Result<NewNames, EventError> {
    let mut new = NewNames::default();
    let mut seen = HashSet::new();
    json::object_entries(properties, |key, raw| {
        let name = names::field_name(key);
        let is_system = schema::SYSTEM_FIELDS.iter().any(|(_, n, _)| *n == name);
        if is_system || known(&name) {
            return;
        }
        let name = name.into_owned();
        if names::can_be_column(&name)
            && matches!(infer(raw), Inferred::Type(_))
            && seen.insert(name.clone())
        {
            new.fields.push(name.clone());
        }
        new.unknown.push(name);
    })?;
    Ok(new)
}

// -- the usual road: one pass -------------------------------------------------------------------------------------

pub(crate) fn scan_event(scanner: &mut Scanner<'_>) -> Scanned<()> {
    scan_properties(scanner)?;
    scanner.end()
}

/// Takes an object that [`check_fields`] accepts.
#[inline]
fn scan_properties(scanner: &mut Scanner<'_>) -> Scanned<()> {
    let mut id = None;
    scanner.object(MAX_DEPTH, |key, value| {
        let key = key.text()?;
        if names::may_be_special(&key) {
            if names::server_field(&key).is_some() {
                return Err(Unsure);
            }
            if names::field_name(&key) == schema::ID {
                id = Some(value);
            }
        }
        Ok(())
    })?;
    match id {
        Some(id) => check_id(scanner.slice(id)).map_err(|_| Unsure),
        None => Ok(()),
    }
}

pub(crate) fn scan_batch<'a>(text: &'a str, limits: &Limits) -> Scanned<Batch<'a>> {
    let mut batch = Builder::default();
    let mut scanner = Scanner::new(text);
    let mut more = scanner.open(b'[', b']')?;
    while more {
        scanner.peek()?;
        let start = scanner.position();
        if scan_item(&mut scanner, limits, &mut batch).is_err() {
            // Something is wrong with this item alone, if it is JSON at all.
            scanner.rewind(start);
            let item = scanner.value(MAX_DEPTH)?;
            batch.explain(scanner.slice(item), limits);
        }
        more = scanner.more(b']')?;
    }
    scanner.end()?;
    batch.done().map_err(|_| Unsure)
}

/// Takes an item and adds its event; on an error nothing was added.
fn scan_item<'a>(
    scanner: &mut Scanner<'a>,
    limits: &Limits,
    batch: &mut Builder<'a>,
) -> Scanned<()> {
    let (mut collection, mut properties) = (None, None);
    let mut more = scanner.open(b'{', b'}')?;
    while more {
        match scanner.key()?.text()?.as_ref() {
            // The last of equal keys would count: left to the careful way.
            "collection" if collection.is_none() => {
                let value = scanner.value(0)?;
                collection = Some(scanner.slice(value));
            }
            "properties" if properties.is_none() => {
                scanner.peek()?;
                let start = scanner.position();
                scanner.line_break = false;
                scan_properties(scanner)?;
                let text = scanner.slice(start..scanner.position());
                properties = Some(match scanner.line_break {
                    true => one_line(text),
                    false => Cow::Borrowed(text),
                });
            }
            _ => return Err(Unsure),
        }
        more = scanner.more(b'}')?;
    }
    let (Some(collection), Some(properties)) = (collection, properties) else {
        return Err(Unsure);
    };
    batch.add(collection, properties, limits)
}

/// A batch in the making.
#[derive(Default)]
struct Builder<'a> {
    items: Vec<Result<BatchItem<'a>, EventError>>,
    collections: CollectionNames,
    /// By the raw string that names it, of the item before: most often the next is equal.
    last: Option<(&'a str, usize)>,
    rejected: usize,
}

impl<'a> Builder<'a> {
    /// The index of the collection that a raw JSON value names.
    fn collection(&mut self, raw: &'a str) -> Scanned<usize> {
        if let Some((last, index)) = self.last
            && last == raw
        {
            return Ok(index);
        }
        let name = json::string(raw).ok_or(Unsure)?;
        let index = self
            .collections
            .index_of(CollectionName::parse(&name).map_err(|_| Unsure)?);
        self.last = Some((raw, index));
        Ok(index)
    }

    /// Adds an event of which all is in order but, perhaps, its size and the name of its collection.
    fn add(
        &mut self,
        collection: &'a str,
        properties: Cow<'a, str>,
        limits: &Limits,
    ) -> Scanned<()> {
        check_size(&properties, limits).map_err(|_| Unsure)?;
        let collection = self.collection(collection)?;
        self.items.push(Ok(BatchItem {
            collection,
            properties,
        }));
        Ok(())
    }

    /// Adds an item the careful way. A reason takes much more than an item may: of too many none is kept.
    fn explain(&mut self, item: &'a str, limits: &Limits) {
        if self.rejected > REJECTED_MAX {
            return;
        }
        let item = explain_item(item, limits).map(|(name, properties)| BatchItem {
            collection: self.collections.index_of(name),
            properties,
        });
        self.rejected += usize::from(item.is_err());
        self.items.push(item);
    }

    fn done(self) -> Result<Batch<'a>, EventError> {
        if self.rejected > REJECTED_MAX {
            return Err(EventError::TooManyRejected);
        }
        Ok(Batch {
            collections: self.collections.into_names(),
            items: self.items,
        })
    }
}

// -- the careful way: what exactly is wrong, if anything ----------------------------------------------------------

pub(crate) fn explain_event(properties: &str) -> Result<Cow<'_, str>, EventError> {
    json::check(properties, MAX_DEPTH)?;
    check_fields(properties)?;
    Ok(one_line(properties))
}

pub(crate) fn explain_batch<'a>(text: &'a str, limits: &Limits) -> Result<Batch<'a>, EventError> {
    let mut batch = Builder::default();
    // The parser skips values without recursion, so the depth of an item is its own matter.
    json::array_elements(text, |item| batch.explain(item, limits))?;
    batch.done()
}

fn explain_item<'a>(
    item: &'a str,
    limits: &Limits,
) -> Result<(CollectionName, Cow<'a, str>), EventError> {
    let malformed = |reason: String| Err(EventError::MalformedItem(reason));
    if json::kind(item) != Kind::Object {
        return malformed(format!("it is {}, not an object", json::kind(item)));
    }
    // The item's own object is one level above its properties.
    json::check(item, MAX_DEPTH + 1)?;
    let (mut collection, mut properties, mut unknown) = (None, None, None);
    json::object_entries(item, |key, raw| match key {
        "collection" => collection = Some(raw),
        "properties" => properties = Some(raw),
        _ => unknown = Some(key.to_owned()),
    })?;
    if let Some(key) = unknown {
        return malformed(format!("unknown key \"{key}\""));
    }
    let Some(collection) = collection else {
        return malformed("\"collection\" is missing".to_owned());
    };
    let Some(properties) = properties else {
        return malformed("\"properties\" is missing".to_owned());
    };
    let Some(name) = json::string(collection) else {
        return malformed(format!(
            "\"collection\" is {}, not a string",
            json::kind(collection)
        ));
    };
    let name = CollectionName::parse(&name)?;
    check_size(properties, limits)?;
    check_fields(properties)?;
    Ok((name, one_line(properties)))
}

fn check_size(properties: &str, limits: &Limits) -> Result<(), EventError> {
    if properties.len() > limits.max_event_bytes {
        return Err(EventError::TooLarge {
            bytes: properties.len(),
            limit: limits.max_event_bytes,
        });
    }
    Ok(())
}

/// That it is an object, sets no field of the server, and has no over-long `_id`.
fn check_fields(properties: &str) -> Result<(), EventError> {
    let (mut reserved, mut id) = (None, None);
    json::object_entries(properties, |key, raw| {
        if names::may_be_special(key) {
            reserved = reserved.or_else(|| names::server_field(key));
            if names::field_name(key) == schema::ID {
                id = Some(raw);
            }
        }
    })?;
    if let Some(field) = reserved {
        return Err(EventError::ReservedField(field.to_owned()));
    }
    id.map_or(Ok(()), check_id)
}

/// Whether a checked event has an `_id` that is not null.
pub fn has_id(properties: &str) -> bool {
    let mut has_id = false;
    let walked = json::object_entries(properties, |key, raw| {
        if names::may_be_special(key) && names::field_name(key) == schema::ID {
            has_id = raw != "null";
        }
    });
    walked.is_ok() && has_id
}

/// Checks the length of an `_id` as text.
pub(crate) fn check_id(raw: &str) -> Result<(), EventError> {
    // No value of so few bytes becomes a text over the limit; a string's text is never longer than the string.
    if raw.len() <= 32
        || json::kind(raw) == Kind::Null
        || json::kind(raw) == Kind::String && raw.len() <= MAX_ID_BYTES + 2
    {
        return Ok(());
    }
    let bytes = coerce::text(raw, &mut Cutter::off()).map_or(0, |text| text.len());
    if bytes > MAX_ID_BYTES {
        return Err(EventError::IdTooLong {
            bytes,
            limit: MAX_ID_BYTES,
        });
    }
    Ok(())
}

/// The text on one line: line breaks in valid JSON are between tokens only.
pub fn one_line(json: &str) -> Cow<'_, str> {
    let json = json::trim(json);
    if json.bytes().any(|b| matches!(b, b'\n' | b'\r')) {
        Cow::Owned(json.replace(['\n', '\r'], " "))
    } else {
        Cow::Borrowed(json)
    }
}

#[cfg(test)]
mod tests;
