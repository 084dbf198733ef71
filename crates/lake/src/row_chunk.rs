//! A row chunk: a few events as the JSON text they came as, with what the server knew about each when they were digested.
//!
//! An Arrow chunk costs kilobytes whatever it holds, which ten thousand tenants with an event a minute each would pay
//! for every event. A row chunk costs little more than its text; its readers build columns of it with the table's present
//! schema, as they do of the inbox. An event in it has been through [`BatchBuilder::push`] once, so it is known to be good.
//!
//! Layout: magic `RKR1`, checksum, schema version (i32 LE), size of the body if it is compressed (LEB128, 0 if not), body.
//! Body: rules, runs and the lengths of the events as varints, then the texts one after the other.

use arrow::array::RecordBatch;
use arrow::compute::concat_batches;
use bytes::Bytes;
use lz4_flex::block;
use rakam_event::batch::{BatchBuilder, EventStamp, Layout};
use rakam_event::entry::Limits;
use rakam_event::schema::Schema;

use crate::error::LakeError;
use crate::rows::RowSet;
use crate::seal;
use crate::varint::{get_number, get_signed, put_number, put_signed};

const MAGIC: [u8; 4] = *b"RKR1";
const WHAT: &str = "row chunk";
/// From this many events on, columns are worth their overhead.
pub const MAX_ROWS: usize = 500;
/// Or from this many bytes of text on.
pub const MAX_TEXT_BYTES: usize = 256 << 10;
/// No body is larger, whatever its prefix claims.
const MAX_BODY_BYTES: usize = 16 << 20;
/// Smaller bodies are not compressed: it would save nothing.
const COMPRESS_FROM: usize = 256;

/// The settings under which events were digested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// Bounds of `_time` relative to the time of receipt, in microseconds.
    pub time_past_us: i64,
    pub time_future_us: i64,
    pub max_string_bytes: usize,
}

/// Where events of one call came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// Microseconds since 1970.
    pub received_at_us: i64,
    /// Added to explicit `_time`s.
    pub shift_us: i64,
    pub xid: i64,
    pub rules: Rules,
}

impl Origin {
    /// The same for a [`BatchBuilder`].
    pub fn stamp(&self) -> EventStamp {
        let Rules {
            time_past_us,
            time_future_us,
            ..
        } = self.rules;
        EventStamp {
            received_at_us: self.received_at_us,
            shift_us: self.shift_us,
            time_min_us: self.received_at_us.saturating_sub(time_past_us),
            time_max_us: self.received_at_us.saturating_add(time_future_us),
            xid: self.xid,
        }
    }
}

/// Events in their order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rows {
    /// Each origin with the number of its events.
    runs: Vec<(Origin, usize)>,
    lengths: Vec<usize>,
    text: String,
}

impl Rows {
    pub fn push(&mut self, event: &str, origin: Origin) {
        match self.runs.last_mut() {
            Some((last, n)) if *last == origin => *n += 1,
            _ => self.runs.push((origin, 1)),
        }
        self.lengths.push(event.len());
        self.text.push_str(event);
    }

    /// Adds the events of another one behind its own.
    pub fn extend(&mut self, other: &Self) {
        for (event, origin) in other.iter() {
            self.push(event, origin);
        }
    }

    /// The events but those that are deleted, by their places.
    pub fn without(&self, deleted: &RowSet) -> Self {
        let mut kept = Self::default();
        let mut runs = deleted.runs().iter().peekable();
        for (place, (event, origin)) in self.iter().enumerate() {
            while runs.next_if(|run| run.end as usize <= place).is_some() {}
            if runs.peek().is_none_or(|run| place < run.start as usize) {
                kept.push(event, origin);
            }
        }
        kept
    }

    pub fn len(&self) -> usize {
        self.lengths.len()
    }

    pub fn is_empty(&self) -> bool {
        self.lengths.is_empty()
    }

    /// Bytes of text.
    pub fn bytes(&self) -> usize {
        self.text.len()
    }

    /// Whether they are so few that a row chunk is the better form.
    pub fn is_few(&self) -> bool {
        self.len() < MAX_ROWS && self.bytes() < MAX_TEXT_BYTES
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, Origin)> {
        let mut rest = self.text.as_str();
        self.runs
            .iter()
            .flat_map(|&(origin, n)| std::iter::repeat_n(origin, n))
            .zip(&self.lengths)
            .map(move |(origin, &length)| {
                let (event, after) = rest.split_at_checked(length).unwrap_or_default();
                rest = after;
                (event, origin)
            })
    }

    /// As columns: of the schema as it is now, whichever it was at the digest. What is no field stays in `_extra` as it
    /// came, as in an Arrow chunk of that time.
    pub fn batch(&self, schema: &Schema, layout: &Layout) -> Result<RecordBatch, LakeError> {
        let malformed = |e| LakeError::corrupt(WHAT, e);
        let mut batches = Vec::new();
        let mut making: Option<(usize, BatchBuilder)> = None;
        for (event, origin) in self.iter() {
            let max_string_bytes = origin.rules.max_string_bytes;
            let builder = match making.take() {
                Some((limit, builder)) if limit == max_string_bytes => builder,
                before => {
                    if let Some((_, builder)) = before {
                        batches.push(builder.finish().map_err(malformed)?.batch);
                    }
                    let limits = Limits {
                        max_event_bytes: usize::MAX,
                        max_string_bytes,
                        // The digest decided which names are fields.
                        max_fields: 0,
                    };
                    BatchBuilder::of_stored(schema, layout.clone(), &limits).map_err(malformed)?
                }
            };
            let (_, builder) = making.insert((max_string_bytes, builder));
            builder.push(event, &origin.stamp()).map_err(malformed)?;
        }
        let (_, builder) = making.ok_or_else(|| LakeError::corrupt(WHAT, "it has no events"))?;
        let last = builder.finish().map_err(malformed)?.batch;
        if batches.is_empty() {
            return Ok(last);
        }
        batches.push(last);
        concat_batches(&batches[0].schema(), &batches).map_err(|e| LakeError::encode(WHAT, e))
    }

    pub fn encode(&self, schema_version: i32) -> Result<Vec<u8>, LakeError> {
        let body = self.body();
        if body.len() > MAX_BODY_BYTES {
            return Err(LakeError::TooLarge {
                what: WHAT,
                bytes: body.len(),
                limit: MAX_BODY_BYTES,
            });
        }
        let mut out = seal::start(8 + body.len());
        out.extend_from_slice(&schema_version.to_le_bytes());
        let packed = (body.len() >= COMPRESS_FROM).then(|| block::compress(&body));
        match packed.filter(|packed| packed.len() < body.len()) {
            Some(packed) => {
                put_number(&mut out, body.len() as u64);
                out.extend_from_slice(&packed);
            }
            None => {
                put_number(&mut out, 0);
                out.extend_from_slice(&body);
            }
        }
        Ok(seal::seal(out, MAGIC))
    }

    fn body(&self) -> Vec<u8> {
        let mut rules: Vec<Rules> = Vec::new();
        let mut runs = Vec::with_capacity(8 * self.runs.len());
        let mut before = (0, 0);
        for (origin, n) in &self.runs {
            let index = match rules.iter().position(|r| *r == origin.rules) {
                Some(index) => index,
                None => {
                    rules.push(origin.rules);
                    rules.len() - 1
                }
            };
            put_number(&mut runs, index as u64);
            put_number(&mut runs, *n as u64);
            put_signed(&mut runs, origin.received_at_us.wrapping_sub(before.0));
            put_signed(&mut runs, origin.shift_us);
            put_signed(&mut runs, origin.xid.wrapping_sub(before.1));
            before = (origin.received_at_us, origin.xid);
        }
        let mut body = Vec::with_capacity(32 + runs.len() + 2 * self.len() + self.bytes());
        put_number(&mut body, rules.len() as u64);
        for rule in &rules {
            put_signed(&mut body, rule.time_past_us);
            put_signed(&mut body, rule.time_future_us);
            put_number(&mut body, rule.max_string_bytes as u64);
        }
        put_number(&mut body, self.runs.len() as u64);
        body.extend_from_slice(&runs);
        for length in &self.lengths {
            put_number(&mut body, *length as u64);
        }
        body.extend_from_slice(self.text.as_bytes());
        body
    }

    /// Reads what [`Rows::encode`] wrote.
    pub fn decode(chunk: Bytes) -> Result<Self, LakeError> {
        let malformed = || LakeError::corrupt(WHAT, "malformed");
        let payload = seal::open(chunk, MAGIC, WHAT)?;
        // The version is of no use to a reader: the text says everything.
        let mut rest = payload.get(4..).ok_or_else(malformed)?;
        let size = get_number(&mut rest).ok_or_else(malformed)?;
        if size == 0 {
            return read_body(rest).ok_or_else(malformed);
        }
        let size = usize::try_from(size)
            .ok()
            .filter(|&size| size <= MAX_BODY_BYTES)
            .ok_or_else(malformed)?;
        let body = seal::guarded(WHAT, || {
            block::decompress(rest, size).map_err(|e| LakeError::corrupt(WHAT, e))
        })?;
        if body.len() != size {
            return Err(malformed());
        }
        read_body(&body).ok_or_else(malformed)
    }
}

fn read_body(mut rest: &[u8]) -> Option<Rows> {
    let rest = &mut rest;
    let count = |rest: &mut &[u8]| -> Option<usize> {
        // Whatever is counted takes a byte at least: no count makes us allocate more than the input warrants.
        let n = usize::try_from(get_number(rest)?).ok()?;
        (n <= rest.len()).then_some(n)
    };
    let mut rules = Vec::new();
    for _ in 0..count(rest)? {
        rules.push(Rules {
            time_past_us: get_signed(rest)?,
            time_future_us: get_signed(rest)?,
            max_string_bytes: usize::try_from(get_number(rest)?).ok()?,
        });
    }
    let mut runs = Vec::new();
    let mut before = (0i64, 0i64);
    let mut events = 0usize;
    for _ in 0..count(rest)? {
        let rules = *rules.get(usize::try_from(get_number(rest)?).ok()?)?;
        let n = count(rest)?;
        before.0 = before.0.wrapping_add(get_signed(rest)?);
        let shift_us = get_signed(rest)?;
        before.1 = before.1.wrapping_add(get_signed(rest)?);
        let origin = Origin {
            received_at_us: before.0,
            shift_us,
            xid: before.1,
            rules,
        };
        events = events.checked_add(n)?;
        runs.push((origin, n));
    }
    if events > rest.len() {
        return None;
    }
    let mut lengths = Vec::with_capacity(events);
    let mut total = 0usize;
    for _ in 0..events {
        let length = usize::try_from(get_number(rest)?).ok()?;
        total = total.checked_add(length)?;
        lengths.push(length);
    }
    let text = std::str::from_utf8(rest).ok()?;
    if total != text.len() {
        return None;
    }
    // Each event on its own is text, too.
    let mut end = 0;
    for length in &lengths {
        end += length;
        if !text.is_char_boundary(end) {
            return None;
        }
    }
    Some(Rows {
        runs,
        lengths,
        text: text.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use arrow::array::{Array, AsArray};
    use arrow::datatypes::{Float64Type, TimestampMicrosecondType};
    use rakam_event::schema::Field;
    use rakam_event::types::FieldType;

    use super::*;
    use crate::rows::RowBits;
    use crate::testing::Rng;

    fn origin(n: i64) -> Origin {
        Origin {
            received_at_us: 1_700_000_000_000_000 + n,
            shift_us: n % 3,
            xid: 1_000 - n,
            rules: Rules {
                time_past_us: 10,
                time_future_us: 5 + n % 2,
                max_string_bytes: 1_000,
            },
        }
    }

    fn field(id: i32, name: &str, ty: FieldType, added_version: i32) -> Field {
        Field {
            id,
            name: name.to_owned(),
            ty,
            added_version,
            column_ready: true,
        }
    }

    fn sample(events: usize, seed: u64) -> Rows {
        let mut rng = Rng::new(seed);
        let mut rows = Rows::default();
        for n in 0..events {
            let text = "é".repeat(rng.below(9) as usize);
            let event = format!(r#"{{"n":{n},"text":"{text}"}}"#);
            rows.push(&event, origin(rng.between(0, 3)));
        }
        rows
    }

    #[test]
    fn what_goes_in_comes_out() {
        for events in [1, 2, 7, 499, 3_000] {
            let rows = sample(events, events as u64);
            let sealed = rows.encode(7).unwrap();
            let back = Rows::decode(sealed.clone().into()).unwrap();
            assert_eq!(back, rows);
            assert_eq!(back.len(), events);
            assert!(back.iter().eq(rows.iter()));
            assert!(
                sealed.len() < rows.bytes() + 8 * events + 64,
                "{events}: {}",
                sealed.len()
            );
        }
        let mut extreme = Rows::default();
        for value in [i64::MIN, i64::MAX, 0] {
            let rules = Rules {
                time_past_us: value,
                time_future_us: value,
                max_string_bytes: usize::MAX,
            };
            let origin = Origin {
                received_at_us: value,
                shift_us: value,
                xid: value,
                rules,
            };
            extreme.push("{}", origin);
        }
        assert_eq!(
            Rows::decode(extreme.encode(1).unwrap().into()).unwrap(),
            extreme
        );
    }

    #[test]
    fn deleted_events_are_left_out() {
        let mut rng = Rng::new(3);
        for events in [1, 5, 64, 300] {
            let rows = sample(events, events as u64);
            let mut deleted = RowBits::new(events as u32);
            let mut kept = Rows::default();
            for (place, (event, origin)) in rows.iter().enumerate() {
                match rng.below(3) {
                    0 => kept.push(event, origin),
                    _ => assert!(deleted.insert(place as u32)),
                }
            }
            assert_eq!(rows.without(&deleted.finish()), kept);
            assert_eq!(rows.without(&RowSet::default()), rows);
        }
    }

    #[test]
    fn one_event_costs_little_more_than_its_text() {
        let mut rows = Rows::default();
        rows.push(r#"{"n":1}"#, origin(1));
        assert!(rows.encode(1).unwrap().len() < 64);
    }

    #[test]
    fn every_changed_byte_is_seen_and_no_payload_crashes() {
        let sealed = sample(20, 3).encode(1).unwrap();
        for at in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[at] ^= 1;
            assert!(Rows::decode(bad.into()).is_err());
            assert!(Rows::decode(sealed[..at].to_vec().into()).is_err());
        }
        let mut rng = Rng::new(5);
        for _ in 0..20_000 {
            // Sealed properly, but with another payload.
            let mut payload = sealed.clone();
            for _ in 0..1 + rng.below(4) {
                let at = 12 + rng.below(payload.len() as u64 - 12) as usize;
                payload[at] = rng.next() as u8;
            }
            let resealed = seal::seal(payload, MAGIC);
            if let Ok(rows) = Rows::decode(resealed.into()) {
                assert_eq!(rows.iter().count(), rows.len());
            }
        }
    }

    #[test]
    fn columns_are_those_of_the_present_schema() {
        let mut rows = Rows::default();
        rows.push(r#"{"late":"7","odd":"x","n":1.0}"#, origin(0));
        rows.push(r#"{"late":"no","n":2,"_time":1}"#, origin(2));
        let number = FieldType::Float8;
        let before = Schema::new(1, vec![field(16, "odd", FieldType::Text, 1)]);
        let after = Schema::new(
            2,
            vec![
                field(16, "odd", FieldType::Text, 1),
                field(17, "late", number, 2),
            ],
        );
        let table = Layout::Table { projection: None };
        for layout in [&table, &Layout::Stored] {
            let old = rows.batch(&before, layout).unwrap();
            let extra = old.column_by_name("_extra").unwrap().as_string::<i32>();
            // As it came: the digest had no room for these.
            assert_eq!(extra.value(0), r#"{"late":"7","n":1.0}"#);
            let new = rows.batch(&after, layout).unwrap();
            let late = new
                .column_by_name("late")
                .unwrap()
                .as_primitive::<Float64Type>();
            assert!(late.value(0) == 7.0 && late.is_null(1));
            let extra = new.column_by_name("_extra").unwrap().as_string::<i32>();
            assert_eq!(extra.value(0), r#"{"n":1.0}"#);
            assert_eq!(extra.value(1), r#"{"late":"no","n":2}"#);
            let time = new
                .column_by_name("_time")
                .unwrap()
                .as_primitive::<TimestampMicrosecondType>();
            // A time out of bounds is not one.
            assert_eq!(time.value(1), origin(2).received_at_us);
        }
    }
}
