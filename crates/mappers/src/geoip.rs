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
