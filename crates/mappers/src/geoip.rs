//! Country, region and city of an address, from a file in MaxMind's format.

use std::borrow::Cow;
use std::net::IpAddr;

use maxminddb::{MaxMindDbError, PathElement, Reader};
use rakam_event::error::EventError;
use rakam_event::json;

use crate::{fields, fill};

/// A database of places by address, over the bytes of its file.
pub struct Places<S: AsRef<[u8]>>(Reader<S>);

impl<S: AsRef<[u8]>> Places<S> {
    /// Errors: the bytes are no such database.
    pub fn new(bytes: S) -> Result<Self, MaxMindDbError> {
        Reader::from_source(bytes).map(Self)
    }

    /// Adds `country` (ISO 3166 code), `region` and `city` (English names) by `_ip`, as far as they are known.
    pub fn map<'a>(&self, event: &'a str) -> Result<Cow<'a, str>, EventError> {
        let [ip, country, region, city] = fields(event, ["_ip", "country", "region", "city"])?;
        let address = ip
            .and_then(json::string)
            .and_then(|text| text.trim().parse::<IpAddr>().ok())
            // An IPv4 client of a server that listens on IPv6.
            .map(|address| address.to_canonical());
        let Some(place) = address.and_then(|address| self.place(address)) else {
            return Ok(Cow::Borrowed(event));
        };
        Ok(fill(
            event,
            &[
                ("country", country, place.country.as_deref()),
                ("region", region, place.region.as_deref()),
                ("city", city, place.city.as_deref()),
            ],
        ))
    }

    /// None: nothing is known of the address, or its record is damaged.
    fn place(&self, address: IpAddr) -> Option<Place> {
        use PathElement::{Index, Key};
        let found = self.0.lookup(address).ok()?;
        if !found.has_data() {
            return None;
        }
        let text = |path: &[PathElement<'_>]| found.decode_path::<String>(path).ok().flatten();
        Some(Place {
            country: text(&[Key("country"), Key("iso_code")])
                .or_else(|| text(&[Key("country"), Key("names"), Key("en")])),
            region: text(&[Key("subdivisions"), Index(0), Key("names"), Key("en")])
                .or_else(|| text(&[Key("subdivisions"), Index(0), Key("iso_code")])),
            city: text(&[Key("city"), Key("names"), Key("en")]),
        })
    }
}

struct Place {
    country: Option<String>,
    region: Option<String>,
    city: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A database of one node that knows every address below 128.0.0.0, by MaxMind's description of the format.
    fn database() -> Vec<u8> {
        let text = |value: &str| {
            let mut out = vec![0x40 | value.len() as u8];
            out.extend(value.as_bytes());
            out
        };
        let map = |entries: &[(&str, Vec<u8>)]| {
            let mut out = vec![0xe0 | entries.len() as u8];
            for (key, value) in entries {
                out.extend(text(key));
                out.extend(value);
            }
            out
        };
        let names = |name: &str| map(&[("en", text(name))]);
        let mut subdivisions = vec![0x01, 0x04];
        subdivisions.extend(map(&[("names", names("Skåne"))]));
        let record = map(&[
            (
                "country",
                map(&[("iso_code", text("SE")), ("names", names("Sweden"))]),
            ),
            ("subdivisions", subdivisions),
            ("city", map(&[("names", names("Lund"))])),
        ]);
        let small = |value: u8| vec![0xa1, value];
        let metadata = map(&[
            ("binary_format_major_version", small(2)),
            ("binary_format_minor_version", small(0)),
            ("build_epoch", vec![0x01, 0x02, 1]),
            ("database_type", text("Test")),
            ("description", map(&[])),
            ("ip_version", small(4)),
            ("languages", vec![0x00, 0x04]),
            ("node_count", vec![0xc1, 1]),
            ("record_size", small(24)),
        ]);
        // One node: to the data for 0…, to nothing for 1….
        let mut bytes = vec![0, 0, 17, 0, 0, 1];
        bytes.extend([0; 16]);
        bytes.extend(record);
        bytes.extend(b"\xab\xcd\xefMaxMind.com");
        bytes.extend(metadata);
        bytes
    }

    #[test]
    fn places_are_found_by_address() {
        let places = Places::new(database()).expect("a database");
        for (event, expected) in [
            (
                r#"{"_ip":"10.0.0.1"}"#,
                r#"{"_ip":"10.0.0.1","country":"SE","region":"Skåne","city":"Lund"}"#,
            ),
            (
                r#"{"_ip":"::ffff:10.0.0.1","City":"kept"}"#,
                r#"{"_ip":"::ffff:10.0.0.1","City":"kept","country":"SE","region":"Skåne"}"#,
            ),
            (r#"{"_ip":"200.0.0.1"}"#, r#"{"_ip":"200.0.0.1"}"#),
            (r#"{"_ip":"2001:db8::1"}"#, r#"{"_ip":"2001:db8::1"}"#),
            (r#"{"_ip":"here"}"#, r#"{"_ip":"here"}"#),
            (r#"{"_ip":7}"#, r#"{"_ip":7}"#),
            ("{}", "{}"),
        ] {
            assert_eq!(places.map(event).expect("an object"), expected);
        }
        assert!(places.map("[]").is_err());
    }

    #[test]
    fn damaged_files_are_errors_or_unknown_places() {
        assert!(Places::new(b"not a database".as_slice()).is_err());
        assert!(Places::new(b"".as_slice()).is_err());
        let whole = database();
        for at in 0..whole.len() {
            for value in [0, 0xff, whole[at] ^ 0x55] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                if let Ok(places) = Places::new(bytes) {
                    assert!(places.map(r#"{"_ip":"10.0.0.1"}"#).is_ok());
                }
            }
        }
    }
}
