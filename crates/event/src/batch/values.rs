//! Rows that are typed already, as INSERT and COPY have them: their values go into columns without JSON in between.

use crate::coerce::Value;
use crate::column::Plain;
use crate::error::EventError;
use crate::time;

use super::{BatchBuilder, EventStamp, MAX_BATCH_BYTES};

/// A row whose values are of their fields' types, and need nothing logged: no string is over the limit.
#[derive(Debug, Default)]
pub struct TypedRow<'a> {
    /// A field's position in [`crate::schema::Schema::fields`], and its value. Not `_time`, `_received_at` and `_extra`.
    pub values: Vec<(usize, Value<'a>)>,
    /// A JSON object whose members go into `_extra`.
    pub extra: Option<&'a str>,
    /// A time that [`EventStamp::takes`]; None: the time of receipt.
    pub time_us: Option<i64>,
}

impl EventStamp {
    /// Whether a `_time`, in microseconds since 1970, is within the project's bounds.
    #[inline]
    pub fn takes(&self, micros: i64) -> bool {
        let bounds =
            self.time_min_us.max(time::MIN_TIME_US)..=self.time_max_us.min(time::MAX_TIME_US);
        bounds.contains(&micros)
    }
}

/// A row value by value, for [`super::Layout::Stored`]: after [`BatchBuilder::has_room`] any number of `put`s, at most one
/// for a column, then [`BatchBuilder::end_row`]. A builder that was left within a row is of no more use.
impl BatchBuilder {
    /// Whether a row whose values take so many bytes, at most, fits into this batch.
    #[inline]
    pub fn has_room(&self, bytes: usize) -> bool {
        self.bytes.saturating_add(bytes) <= MAX_BATCH_BYTES
    }

    /// The value of a field, by its position in [`crate::schema::Schema::fields`]. Not for `_time`, `_received_at` and
    /// `_extra`.
    #[inline(always)]
    pub fn put(&mut self, position: usize, value: Plain) {
        self.bytes += self.columns[position].put(self.rows, value);
    }

    /// As [`Self::put`].
    #[inline]
    pub fn put_text(&mut self, position: usize, text: &str) {
        self.bytes += self.columns[position].put_text(self.rows, text);
    }

    /// As [`Self::put`].
    pub fn put_value(&mut self, position: usize, value: Value<'_>) {
        self.append(Some(position), value);
    }

    /// Ends the row: with the members of a JSON object for its `_extra`, and a time that [`EventStamp::takes`].
    pub fn end_row(&mut self, extra: Option<&str>, time_us: i64, stamp: &EventStamp) {
        self.extra_text.clear();
        if let Some(extra) = extra {
            self.members(extra, stamp);
        }
        self.finish_row(time_us, stamp);
    }

    /// Appends a row to a batch of [`super::Layout::Stored`]: the same columns as [`Self::push`] makes of the row's
    /// JSON. On an error nothing was appended; [`EventError::BatchFull`] says that it fits into another batch.
    pub fn push_values(&mut self, row: TypedRow<'_>, stamp: &EventStamp) -> Result<(), EventError> {
        let values: usize = row.values.iter().map(|(_, value)| bytes(value)).sum();
        let most = values + row.extra.map_or(0, str::len) + 64;
        if !self.has_room(most) {
            return Err(EventError::BatchFull);
        }
        if let Some((position, _)) = row.values.iter().find(|(at, _)| *at >= self.columns.len()) {
            return Err(EventError::Arrow(format!("there is no column {position}")));
        }
        // From here on nothing fails.
        for (position, value) in row.values {
            self.put_value(position, value);
        }
        let time_us = row.time_us.unwrap_or(stamp.received_at_us);
        self.end_row(row.extra, time_us, stamp);
        Ok(())
    }
}

/// About how many bytes a value takes, at most.
fn bytes(value: &Value<'_>) -> usize {
    match value {
        Value::Text(text) | Value::Json(text) => text.len() + 4,
        Value::BoolArray(items) => items.len() + 4,
        Value::Float8Array(items) => items.len() * 8 + 4,
        Value::TextArray(items) => {
            items.iter().flatten().map(|text| text.len()).sum::<usize>() + items.len() * 4 + 4
        }
        _ => 16,
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::super::Layout;
    use super::*;
    use crate::entry::Limits;
    use crate::schema::{Field, Schema};
    use crate::types::FieldType;

    const STAMP: EventStamp = EventStamp {
        received_at_us: 1_000_000,
        shift_us: 0,
        time_min_us: 0,
        time_max_us: 2_000_000,
        xid: 7,
    };

    fn schema() -> Schema {
        let types = crate::testing::every_type(&[(10, 2)]);
        let field = |(i, ty): (usize, FieldType)| Field {
            id: 16 + i as i32,
            name: format!("f{i}"),
            ty,
            added_version: 1,
            column_ready: true,
        };
        Schema::new(1, types.into_iter().enumerate().map(field).collect())
    }

    fn values() -> Vec<Value<'static>> {
        let text = |text: &'static str| Cow::Borrowed(text);
        vec![
            Value::Bool(true),
            Value::Int4(-5),
            Value::Int8(i64::MIN),
            Value::Float4(0.1),
            Value::Float8(1e300),
            Value::Numeric(-12_345),
            Value::Text(text("a\"\\\n\u{1}é")),
            Value::Date(-1),
            Value::Timestamptz(1_577_934_245_123_456),
            Value::Uuid([0xa0; 16]),
            Value::Text(text("10.0.0.0/8")),
            Value::Json(text(r#"{"a":[1.50,null]}"#)),
            Value::BoolArray(vec![Some(true), None]),
            Value::Float8Array(vec![]),
            Value::TextArray(vec![Some(text("x,\"")), None, Some(text(""))]),
        ]
    }

    #[test]
    fn a_typed_row_is_stored_as_its_json_would_be() {
        let schema = schema();
        let mut by_json = BatchBuilder::new(&schema, Layout::Stored, &Limits::default()).unwrap();
        let mut by_value = BatchBuilder::new(&schema, Layout::Stored, &Limits::default()).unwrap();
        for given in 0..1 << 4 {
            // Rows with every fourth value missing, in all combinations; with and without a time and an `_extra`.
            let mut row = TypedRow::default();
            let mut json = String::from("{\"_user\":\"ada\"");
            row.values.push((1, Value::Text("ada".into())));
            for (i, value) in values().into_iter().enumerate() {
                if given & (1 << (i % 4)) != 0 {
                    json.push_str(&format!(",\"f{i}\":"));
                    value.write_json(schema.fields[10 + i].ty, &mut json);
                    row.values.push((10 + i, value));
                }
            }
            if given % 3 == 0 {
                json.push_str(",\"_time\":\"1970-01-01T00:00:01.5Z\"");
                row.time_us = Some(1_500_000);
            }
            if given % 2 == 0 {
                json.push_str(r#","_extra":{"new": 1.0, "f0": "kept"}"#);
                row.extra = Some(r#"{"new": 1.0, "f0": "kept"}"#);
            }
            json.push('}');
            by_json.push(&json, &STAMP).unwrap();
            by_value.push_values(row, &STAMP).unwrap();
        }
        let (by_json, by_value) = (by_json.finish().unwrap(), by_value.finish().unwrap());
        assert_eq!(by_json.invalid, []);
        assert_eq!(by_json.batch, by_value.batch);
    }

    #[test]
    fn what_fits_no_column_changes_nothing() {
        let schema = schema();
        let mut builder = BatchBuilder::new(&schema, Layout::Stored, &Limits::default()).unwrap();
        let row = TypedRow {
            values: vec![(1, Value::Text("ada".into())), (1_000, Value::Bool(true))],
            ..TypedRow::default()
        };
        assert!(matches!(
            builder.push_values(row, &STAMP),
            Err(EventError::Arrow(_))
        ));
        assert_eq!((builder.rows(), builder.bytes()), (0, 0));
    }

    #[test]
    fn bounds_of_time_are_inclusive() {
        assert!(STAMP.takes(0) && STAMP.takes(2_000_000));
        assert!(!STAMP.takes(-1) && !STAMP.takes(2_000_001));
        let wide = EventStamp {
            time_min_us: i64::MIN,
            time_max_us: i64::MAX,
            ..STAMP
        };
        assert!(wide.takes(time::MIN_TIME_US) && !wide.takes(time::MIN_TIME_US - 1));
        assert!(wide.takes(time::MAX_TIME_US) && !wide.takes(time::MAX_TIME_US + 1));
    }
}
