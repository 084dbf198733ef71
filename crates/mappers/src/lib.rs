//! What the mappers that come with rakam make of an event: from its user agent, referrer and address, and sessions of
//! its user. Events are texts of JSON objects, as everywhere; nothing here knows of PostgreSQL.
//!
//! A field that is there, under any spelling of its name, is kept; one that is null counts as missing.

#![forbid(unsafe_code)]

pub mod geoip;
pub mod referrer;
pub mod session;
pub mod user_agent;

use std::borrow::Cow;

use rakam_event::error::EventError;
use rakam_event::json::{self, Kind};
use rakam_event::names;

/// The raw values of some fields of an event, by their names in the table. Errors: it is no JSON object.
pub fn fields<'a, const N: usize>(
    event: &'a str,
    wanted: [&str; N],
) -> Result<[Option<&'a str>; N], EventError> {
    let mut found = [None; N];
    json::object_entries(event, |key, raw| {
        let name = names::field_name(key);
        if let Some(at) = wanted.iter().position(|wanted| *wanted == name) {
            // Of the same name twice the last counts.
            found[at] = (json::kind(raw) != Kind::Null).then_some(raw);
        }
    })?;
    Ok(found)
}

/// The event with these texts as further fields.
pub fn with<'a>(event: &'a str, added: &[(&str, &str)]) -> Cow<'a, str> {
    let Some(inner) = json::trim(event).strip_suffix('}') else {
        return Cow::Borrowed(event);
    };
    if added.is_empty() {
        return Cow::Borrowed(event);
    }
    let mut out = inner.trim_end().to_owned();
    for (name, value) in added {
        if !out.ends_with('{') {
            out.push(',');
        }
        json::write_string(name, &mut out);
        out.push(':');
        json::write_string(value, &mut out);
    }
    out.push('}');
    Cow::Owned(out)
}

/// Adds those of the values that are known and whose field is not there.
fn fill<'a>(event: &'a str, values: &[(&str, Option<&str>, Option<&str>)]) -> Cow<'a, str> {
    let added: Vec<(&str, &str)> = values
        .iter()
        .filter(|(_, there, _)| there.is_none())
        .filter_map(|(name, _, value)| value.map(|value| (*name, value)))
        .collect();
    with(event, &added)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_the_name_they_will_have() {
        let event = r#"{"_userAgent":"x", "Browser":null, "os":"a", "os":"b"}"#;
        assert_eq!(
            fields(event, ["_user_agent", "browser", "os", "none"]),
            Ok([Some(r#""x""#), None, Some(r#""b""#), None])
        );
        assert!(fields("[1]", ["a"]).is_err());
    }

    #[test]
    fn added_fields_make_an_object_again() {
        for (event, expected) in [
            ("{}", r#"{"a":"1","b":"\"\n"}"#),
            (" { } ", r#"{"a":"1","b":"\"\n"}"#),
            (r#"{"x":{}}"#, r#"{"x":{},"a":"1","b":"\"\n"}"#),
        ] {
            assert_eq!(with(event, &[("a", "1"), ("b", "\"\n")]), expected);
        }
        assert_eq!(with("{}", &[]), "{}");
    }
}
