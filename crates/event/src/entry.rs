//! What collect checks, in the caller's transaction: that an event is one the digest can take. Types, names and
//! coercions come later; nothing here needs a schema.

use std::borrow::Cow;

use crate::coerce;
use crate::error::EventError;
use crate::infer::{Inferred, infer};
use crate::json::{self, Cutter, Kind, MAX_DEPTH};
use crate::names::{self, CollectionName};
use crate::schema;

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

/// One event of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchItem {
    pub collection: CollectionName,
    /// A JSON object on one line.
    pub properties: String,
}

/// Checks one event; answers its text on one line.
pub fn check_event<'a>(properties: &'a str, limits: &Limits) -> Result<Cow<'a, str>, EventError> {
    check_size(properties, limits)?;
    json::check(properties, MAX_DEPTH)?;
    check_fields(properties)?;
    Ok(one_line(properties))
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

/// Reads an array of events. What is wrong with one item is that item's error alone.
pub fn split_batch(
    text: &str,
    limits: &Limits,
) -> Result<Vec<Result<BatchItem, EventError>>, EventError> {
    let mut items = Vec::new();
    // The parser skips values without recursion, so the depth of an item is its own matter.
    json::array_elements(text, |item| items.push(batch_item(item, limits)))?;
    Ok(items)
}

fn batch_item(item: &str, limits: &Limits) -> Result<BatchItem, EventError> {
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
    let collection = CollectionName::parse(&name)?;
    check_size(properties, limits)?;
    check_fields(properties)?;
    Ok(BatchItem {
        collection,
        properties: one_line(properties).into_owned(),
    })
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
    json::object_entries(properties, |key, raw| {
        let name = names::field_name(key);
        let is_system = schema::SYSTEM_FIELDS.iter().any(|(_, n, _)| *n == name);
        if is_system || known(&name) {
            return;
        }
        if names::can_be_column(&name)
            && matches!(infer(raw), Inferred::Type(_))
            && !new.fields.iter().any(|field| *field == name)
        {
            new.fields.push(name.clone().into_owned());
        }
        new.unknown.push(name.into_owned());
    })?;
    Ok(new)
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

/// Checks the length of an `_id` as text.
pub(crate) fn check_id(raw: &str) -> Result<(), EventError> {
    // No value of so few bytes becomes a text over the limit.
    if raw.len() <= 32 || json::kind(raw) == Kind::Null {
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

/// Line breaks in valid JSON are between tokens only.
fn one_line(json: &str) -> Cow<'_, str> {
    let json = json::trim(json);
    if json.bytes().any(|b| matches!(b, b'\n' | b'\r')) {
        Cow::Owned(json.replace(['\n', '\r'], " "))
    } else {
        Cow::Borrowed(json)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits {
            max_event_bytes: 1000,
            ..Limits::default()
        }
    }

    fn state(properties: &str) -> Result<String, &'static str> {
        check_event(properties, &limits())
            .map(Cow::into_owned)
            .map_err(|e| e.sqlstate())
    }

    #[test]
    fn events_are_checked() {
        let long_id = |n| format!(r#"{{"_id":"{}"}}"#, "x".repeat(n));
        let deep = |n: usize| format!("{{\"a\":{}{}}}", "[".repeat(n - 1), "]".repeat(n - 1));
        for (text, expected) in [
            ("{}", Ok("{}")),
            (" {\"a\":\r\n1} \n", Ok("{\"a\":  1}")),
            (
                r#"{"_time":"soon","_user":1,"_new":2}"#,
                Ok(r#"{"_time":"soon","_user":1,"_new":2}"#),
            ),
            ("", Err("22P02")),
            ("{\"a\":}", Err("22P02")),
            ("{\"a\":1} {}", Err("22P02")),
            ("{\"a\":\"\\ud800\"}", Err("22P02")),
            ("[]", Err("22023")),
            ("null", Err("22023")),
            ("\"{}\"", Err("22023")),
            (r#"{"a":["\u0000"]}"#, Err("22P05")),
            (r#"{"_received_at":null}"#, Err("42939")),
            (r#"{"_extra":{}}"#, Err("42939")),
            (r#"{"_Extra":{}}"#, Err("42939")),
            (r#"{"_project":"p"}"#, Err("42939")),
            (r#"{"\u005fcollection":"c"}"#, Err("42939")),
            (r#"{"$serverTime":1}"#, Err("42939")),
            (r#"{"_id":1e400}"#, Ok(r#"{"_id":1e400}"#)),
            (r#"{"a":1e200000}"#, Err("22003")),
            (&deep(64), Ok(&deep(64))),
            (&deep(65), Err("54000")),
            (&long_id(256), Ok(&long_id(256))),
            (&long_id(257), Err("54000")),
            (&format!("{{\"a\":\"{}\"}}", "x".repeat(1000)), Err("54000")),
        ] {
            assert_eq!(state(text).as_deref(), expected.as_ref().copied(), "{text}");
        }
        // The last `_id` counts, by its text.
        let two = format!(r#"{{"_id":"{}","_ID":"short"}}"#, "x".repeat(300));
        assert!(state(&two).is_ok());
        let escaped = format!(r#"{{"_id":"{}"}}"#, "\\u0041".repeat(100));
        assert!(state(&escaped).is_ok());
    }

    #[test]
    fn a_bad_item_is_rejected_alone() {
        let deep = |n: usize| {
            let arrays = ["[".repeat(n - 1), "]".repeat(n - 1)].concat();
            format!("{{\"collection\":\"c\",\"properties\":{{\"a\":{arrays}}}}}")
        };
        let items = [
            (
                "{\"properties\":{\"a\":\n1},\"collection\":\"PageView\"}",
                Ok("pageview {\"a\": 1}"),
            ),
            ("1", Err("22023")),
            ("null", Err("22023")),
            ("{}", Err("22023")),
            (r#"{"collection":"c"}"#, Err("22023")),
            (r#"{"collection":1,"properties":{}}"#, Err("22023")),
            (r#"{"collection":"c","properties":[]}"#, Err("22023")),
            (r#"{"collection":"c","properties":null}"#, Err("22023")),
            (
                r#"{"collection":"c","properties":{},"api":1}"#,
                Err("22023"),
            ),
            (r#"{"collection":"","properties":{}}"#, Err("42602")),
            (r#"{"collection":"users","properties":{}}"#, Err("42939")),
            (
                r#"{"collection":"c","properties":{"_extra":1}}"#,
                Err("42939"),
            ),
            (
                r#"{"collection":"c","properties":{"a":"\u0000"}}"#,
                Err("22P05"),
            ),
            (r#"{"collection":"c\u0000","properties":{}}"#, Err("22P05")),
            (&deep(64), Ok("c ")),
            (&deep(65), Err("54000")),
            (&deep(100_000), Err("54000")),
        ];
        let text = format!("[{}]", items.map(|(text, _)| text).join(" ,\n"));
        let results = split_batch(&text, &limits()).unwrap_or_default();
        assert_eq!(results.len(), items.len());
        for ((text, expected), result) in items.into_iter().zip(results) {
            match (expected, result) {
                (Ok(start), Ok(item)) => {
                    let shown = format!("{} {}", item.collection, item.properties);
                    assert!(shown.starts_with(start), "{shown}");
                    assert!(!shown.contains('\n'));
                }
                (expected, result) => assert_eq!(
                    result.map_err(|e| e.sqlstate()).err(),
                    expected.err(),
                    "{:.80}",
                    text
                ),
            }
        }
    }

    #[test]
    fn new_names_are_those_that_nobody_knows() {
        let event =
            r#"{"_user":"u","Known":1,"newField":2,"new_field":3,"none":null,"xmin":1,"list":[]}"#;
        let new = new_names(event, |name| name == "known").unwrap_or_default();
        assert_eq!(
            new.unknown,
            ["new_field", "new_field", "none", "xmin", "list"]
        );
        assert_eq!(new.fields, ["new_field"]);
        assert_eq!(new_names("{}", |_| false), Ok(NewNames::default()));
    }

    #[test]
    fn a_batch_is_an_array() {
        let state = |text| split_batch(text, &limits()).map_err(|e| e.sqlstate());
        assert_eq!(state(" [ ] "), Ok(Vec::new()));
        for text in ["{}", "1", "null"] {
            assert_eq!(state(text), Err("22023"), "{text}");
        }
        for text in ["", "[", "[1,]", "[{\"a\"}]", "[] x"] {
            assert_eq!(state(text), Err("22P02"), "{text}");
        }
    }
}
