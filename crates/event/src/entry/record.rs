//! What the consumer of a stream checks of a record: as collect checks an event, but that `_collection` says where the
//! event belongs and is taken out, and that `_time` is looked for, because a record has a time of its own.

use std::borrow::Cow;
use std::ops::Range;

use super::{Limits, check_id, check_size, explain_event, one_line};
use crate::error::EventError;
use crate::json::{self, Kind, MAX_DEPTH, ObjectWriter};
use crate::names::{self, CollectionName};
use crate::scan::{Scanned, Scanner, Unsure};
use crate::schema;

/// The field by which a record names its collection.
const COLLECTION: &str = "_collection";

/// An event of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record<'a> {
    /// A JSON object on one line, without `_collection`.
    pub properties: Cow<'a, str>,
    /// What `_collection` says, if it is there and not null.
    pub collection: Option<CollectionName>,
    /// Whether it has a `_time` that is not null.
    pub has_time: bool,
    /// Whether it has an `_id` that is not null.
    pub has_id: bool,
}

/// Checks the event of a record. Errors: those of [`super::check_event`], and those of the name in `_collection`.
pub fn check_record<'a>(text: &'a str, limits: &Limits) -> Result<Record<'a>, EventError> {
    check_size(text, limits)?;
    match scan_record(text) {
        Ok(record) => Ok(record),
        Err(Unsure) => explain_record(text),
    }
}

/// An event in an object that says which collection it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope<'a> {
    pub collection: Cow<'a, str>,
    /// The text of an object, which may still be no event.
    pub properties: &'a str,
}

/// The envelope that a text is: an object of exactly `collection`, a string, and `properties`, an object. None for all else.
pub fn envelope(text: &str) -> Option<Envelope<'_>> {
    let mut members = Members::default();
    let mut scanner = Scanner::new(text);
    let scanned = scanner.object(MAX_DEPTH + 1, |key, value| {
        members.add(&key.text()?, text.get(value).unwrap_or_default());
        // One other key settles it.
        if members.others { Err(Unsure) } else { Ok(()) }
    });
    if members.others {
        return None;
    }
    if scanned.and_then(|()| scanner.end()).is_err() {
        members = Members::default();
        json::check(text, MAX_DEPTH + 1).ok()?;
        json::object_entries(text, |key, raw| members.add(key, raw)).ok()?;
    }
    let collection = json::string(members.collection?)?;
    let properties = members.properties?;
    let exact = members.count == 2 && json::kind(properties) == Kind::Object;
    exact.then_some(Envelope {
        collection,
        properties,
    })
}

/// What an object has of an envelope.
#[derive(Default)]
struct Members<'a> {
    count: usize,
    others: bool,
    collection: Option<&'a str>,
    properties: Option<&'a str>,
}

impl<'a> Members<'a> {
    fn add(&mut self, key: &str, raw: &'a str) {
        self.count += 1;
        match key {
            "collection" => self.collection = Some(raw),
            "properties" => self.properties = Some(raw),
            _ => self.others = true,
        }
    }
}

/// The usual road: one pass, and a copy if there is something to take out.
pub(crate) fn scan_record(text: &str) -> Scanned<Record<'_>> {
    let mut scanner = Scanner::new(text);
    let (mut id, mut time, mut collection) = (None, None, None);
    let mut before = None;
    scanner.object(MAX_DEPTH, |key, value| {
        let key = key.text()?;
        if names::may_be_special(&key) {
            match names::server_field(&key) {
                None => match names::field_name(&key).as_ref() {
                    schema::ID => id = Some(value.clone()),
                    schema::TIME => time = Some(value.clone()),
                    _ => {}
                },
                // The last of several would count: left to the careful way.
                Some(COLLECTION) if collection.is_none() => {
                    collection = Some((before, value.clone()));
                }
                Some(_) => return Err(Unsure),
            }
        }
        before = Some(value.end);
        Ok(())
    })?;
    scanner.end()?;
    let slice = |range: Range<usize>| text.get(range).ok_or(Unsure);
    if let Some(id) = &id {
        check_id(slice(id.clone())?).map_err(|_| Unsure)?;
    }
    let is_there = |value: Option<Range<usize>>| match value {
        Some(value) => slice(value).map(|raw| raw != "null"),
        None => Ok(false),
    };
    let (has_time, has_id) = (is_there(time)?, is_there(id)?);
    let Some((before, value)) = collection else {
        return Ok(Record {
            properties: if scanner.line_break {
                one_line(text)
            } else {
                Cow::Borrowed(json::trim(text))
            },
            collection: None,
            has_time,
            has_id,
        });
    };
    let name = match slice(value.clone())? {
        "null" => None,
        raw => {
            let name = json::string(raw).ok_or(Unsure)?;
            Some(CollectionName::parse(&name).map_err(|_| Unsure)?)
        }
    };
    // With the comma before it, or as the first one with the comma after it.
    let (head, tail) = match before {
        Some(end) => (slice(0..end)?, slice(value.end..text.len())?),
        None => {
            let tail = json::trim(slice(value.end..text.len())?);
            ("{", tail.strip_prefix(',').unwrap_or(tail))
        }
    };
    let rest = [json::trim(head), tail].concat();
    Ok(Record {
        properties: Cow::Owned(one_line(&rest).into_owned()),
        collection: name,
        has_time,
        has_id,
    })
}

/// The careful way: what exactly is wrong, if anything.
pub(crate) fn explain_record(text: &str) -> Result<Record<'_>, EventError> {
    json::check(text, MAX_DEPTH)?;
    let (mut collection, mut has_time, mut has_id) = (None, false, false);
    let mut rest = ObjectWriter::default();
    json::object_entries(text, |key, raw| {
        if names::server_field(key) == Some(COLLECTION) {
            collection = Some(raw);
            return;
        }
        if names::may_be_special(key) {
            match names::field_name(key).as_ref() {
                schema::TIME => has_time = raw != "null",
                schema::ID => has_id = raw != "null",
                _ => {}
            }
        }
        rest.key(key).push_str(raw);
    })?;
    let Some(collection) = collection else {
        return Ok(Record {
            properties: explain_event(text)?,
            collection: None,
            has_time,
            has_id,
        });
    };
    let name = match json::string(collection) {
        Some(name) => Some(CollectionName::parse(&name)?),
        None if collection == "null" => None,
        None => {
            let kind = json::kind(collection);
            return Err(EventError::MalformedItem(format!(
                "\"{COLLECTION}\" is {kind}, not a string"
            )));
        }
    };
    let rest = rest.finish().unwrap_or("{}");
    Ok(Record {
        properties: Cow::Owned(explain_event(rest)?.into_owned()),
        collection: name,
        has_time,
        has_id,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    fn of(text: &str) -> Result<(String, Option<String>, bool), &'static str> {
        let limits = Limits {
            max_event_bytes: 1000,
            ..Limits::default()
        };
        check_record(text, &limits)
            .map(|record| {
                let collection = record.collection.map(CollectionName::into_string);
                (record.properties.into_owned(), collection, record.has_time)
            })
            .map_err(|error| error.sqlstate())
    }

    #[test]
    fn a_record_names_its_collection_and_time() {
        let cases: &[(&str, &str, Option<&str>, bool)] = &[
            ("{}", "{}", None, false),
            (" {\"a\":\n1} ", "{\"a\": 1}", None, false),
            (r#"{"_collection":"Order"}"#, "{}", Some("order"), false),
            (
                r#"{ "_collection" : "b" , "a":1}"#,
                r#"{ "a":1}"#,
                Some("b"),
                false,
            ),
            (
                r#"{"a":1, "_Collection" :"b", "c":[2]}"#,
                r#"{"a":1, "c":[2]}"#,
                Some("b"),
                false,
            ),
            (
                r#"{"a":1 ,"_collection":"b" }"#,
                r#"{"a":1 }"#,
                Some("b"),
                false,
            ),
            (r#"{"_collection":null,"a":1}"#, r#"{"a":1}"#, None, false),
            (r#"{"_time":5}"#, r#"{"_time":5}"#, None, true),
            (r#"{"_Time":"x"}"#, r#"{"_Time":"x"}"#, None, true),
            (
                r#"{"_time":5,"_time":null}"#,
                r#"{"_time":5,"_time":null}"#,
                None,
                false,
            ),
            (
                r#"{"_collection":"a","x":"\"_collection\"","_collection":"b"}"#,
                r#"{"x":"\"_collection\""}"#,
                Some("b"),
                false,
            ),
        ];
        for (text, properties, collection, has_time) in cases {
            let expected = (
                (*properties).to_owned(),
                collection.map(str::to_owned),
                *has_time,
            );
            assert_eq!(of(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_collect_refuses_is_refused() {
        let long = format!(r#"{{"_collection":"c","_id":"{}"}}"#, "x".repeat(257));
        for (text, sqlstate) in [
            ("", "22P02"),
            ("{", "22P02"),
            ("[]", "22023"),
            (r#"{"_collection":1}"#, "22023"),
            (r#"{"_collection":""}"#, "42602"),
            (r#"{"_collection":"users"}"#, "42939"),
            (r#"{"_collection":"c","_received_at":1}"#, "42939"),
            (r#"{"_extra":{}}"#, "42939"),
            (r#"{"_collection":"c","a":"\u0000"}"#, "22P05"),
            (&long, "54000"),
            (&format!("{{\"a\":\"{}\"}}", "x".repeat(1000)), "54000"),
            (&"[".repeat(900), "54000"),
        ] {
            assert_eq!(of(text), Err(sqlstate), "{text}");
        }
    }

    #[test]
    fn an_envelope_is_exactly_one() {
        for (text, expected) in [
            (
                r#" {"collection":"a\u0062","properties":{"x":1}} "#,
                Some(("ab", r#"{"x":1}"#)),
            ),
            (
                r#"{"properties": {},"coll\u0065ction" :"a"}"#,
                Some(("a", "{}")),
            ),
            (r#"{"collection":"a","properties":{},"b":1}"#, None),
            (
                r#"{"collection":"a","properties":{},"properties":{}}"#,
                None,
            ),
            (r#"{"collection":"a"}"#, None),
            (r#"{"collection":1,"properties":{}}"#, None),
            (r#"{"collection":"a","properties":[]}"#, None),
            (r#"{"collection":"a","properties":{}"#, None),
            ("[]", None),
            ("", None),
        ] {
            let found = envelope(text);
            let found = found
                .as_ref()
                .map(|e| (e.collection.as_ref(), e.properties));
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn both_roads_agree() {
        let mut random = Random(0x5eed);
        let mut whole = 0;
        for _ in 0..20_000 {
            let mut text = random.object(3, 6);
            if random.next().is_multiple_of(2) {
                let name = random.pick(&["\"_collection\"", "\"_time\"", "\"_Id\"", "\"a\""]);
                let value = random.pick(&["\"b\"", "\"users\"", "7", "null", "{}"]);
                text = match text.strip_prefix('{') {
                    Some("}") => format!("{{{name}:{value}}}"),
                    Some(rest) => format!("{{{name}: {value},{rest}"),
                    None => text,
                };
            }
            if random.next().is_multiple_of(4) {
                text = random.mangled(&text);
            }
            let careful = explain_record(&text);
            if let Ok(scanned) = scan_record(&text) {
                whole += 1;
                let careful = careful.unwrap_or_else(|e| panic!("{text}: {e}"));
                assert_eq!(scanned.collection, careful.collection, "{text}");
                assert_eq!(scanned.has_time, careful.has_time, "{text}");
                assert_eq!(scanned.has_id, careful.has_id, "{text}");
                assert_eq!(
                    members(&scanned.properties),
                    members(&careful.properties),
                    "{text}"
                );
            }
        }
        assert!(whole > 5_000, "{whole}");
    }

    fn members(object: &str) -> Vec<(String, String)> {
        let mut members = Vec::new();
        json::object_entries(object, |key, raw| {
            members.push((key.to_owned(), raw.to_owned()))
        })
        .unwrap_or_else(|e| panic!("{object}: {e}"));
        members
    }
}
