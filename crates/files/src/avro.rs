//! Avro's object container files: records become JSON text, typed by the file's schema.

use std::io::Read;
use std::path::Path;

use apache_avro::Reader;
use apache_avro::schema::{RecordSchema, Schema};
use apache_avro::types::Value;
use rakam_event::types::FieldType;
use rakam_event::{json, print};

use crate::cell;
use crate::error::FilesError;
use crate::format::Compression;
use crate::input::{self, Meter};
use crate::source::{
    PIECE_BYTES, PIECE_ROWS, Piece, Position, Rows, Source, TextEvent,
};

const MICROS_PER_DAY: i64 = 86_400_000_000;

pub struct AvroSource {
    reader: Reader<'static, Box<dyn Read + Send>>,
    name: String,
    declared: Vec<(String, FieldType)>,
    row: u64,
}

impl AvroSource {
    pub fn open(
        path: &Path,
        name: &str,
        from: Position,
        meter: &Meter,
    ) -> Result<Self, FilesError> {
        let input = input::open(path, name, Compression::of_name(name), 0, meter)?;
        let failed = |e: apache_avro::Error| FilesError::malformed(name, "avro", e);
        let reader = Reader::new(input).map_err(failed)?;
        let declared = match reader.writer_schema() {
            Schema::Record(record) => declared(record),
            _ => {
                return Err(FilesError::malformed(
                    name,
                    "avro",
                    "its values are no records",
                ));
            }
        };
        let mut source = Self {
            reader,
            name: name.to_owned(),
            declared,
            row: 0,
        };
        // A container has no index: records are counted off.
        while source.row < from.row {
            if source.record()?.is_none() {
                break;
            }
        }
        Ok(source)
    }

    fn record(&mut self) -> Result<Option<Value>, FilesError> {
        let Some(value) = self.reader.next() else {
            return Ok(None);
        };
        self.row += 1;
        let place = |e| {
            let row = self.row;
            FilesError::malformed(&self.name, "avro", format!("record {row}: {e}"))
        };
        value.map(Some).map_err(place)
    }
}

fn declared(record: &RecordSchema) -> Vec<(String, FieldType)> {
    record
        .fields
        .iter()
        .filter_map(|field| Some((field.name.clone(), field_type(&field.schema)?)))
        .collect()
}

/// The type that a field of this schema gets; None where the values decide.
fn field_type(schema: &Schema) -> Option<FieldType> {
    Some(match schema {
        Schema::Null => return None,
        Schema::Boolean => FieldType::Bool,
        Schema::Int => FieldType::Int4,
        Schema::Long => FieldType::Int8,
        Schema::Float => FieldType::Float4,
        Schema::Double => FieldType::Float8,
        Schema::Date => FieldType::Date,
        Schema::TimestampMillis
        | Schema::TimestampMicros
        | Schema::TimestampNanos
        | Schema::LocalTimestampMillis
        | Schema::LocalTimestampMicros
        | Schema::LocalTimestampNanos => FieldType::Timestamptz,
        Schema::Uuid => FieldType::Uuid,
        Schema::Decimal(decimal) if decimal.precision <= 38 && decimal.scale <= decimal.precision => {
            FieldType::Numeric {
                precision: decimal.precision.max(1) as u8,
                scale: decimal.scale as u8,
            }
        }
        Schema::Array(items) => match field_type(&items.items) {
            Some(FieldType::Bool) => FieldType::BoolArray,
            Some(FieldType::Float8 | FieldType::Float4 | FieldType::Int4) => FieldType::Float8Array,
            Some(FieldType::Text) => FieldType::TextArray,
            _ => FieldType::Jsonb,
        },
        Schema::Map(_) | Schema::Record(_) => FieldType::Jsonb,
        Schema::Union(union) => {
            let mut types = union.variants().iter().filter_map(field_type);
            let first = types.next()?;
            if types.any(|ty| ty != first) {
                FieldType::Jsonb
            } else {
                first
            }
        }
        _ => FieldType::Text,
    })
}

/// The JSON text of a value, as an event would have it.
fn write(value: &Value, out: &mut String) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Boolean(value) => print::write_bool(*value, out),
        Value::Int(value) => print::write_int(i64::from(*value), out),
        Value::Long(value) => print::write_int(*value, out),
        Value::Float(value) => cell::write_float(f64::from(*value), out, |_, out| {
            print::write_float4(*value, out);
        }),
        Value::Double(value) => cell::write_float(*value, out, print::write_float8),
        Value::String(text) | Value::Enum(_, text) => json::write_string(text, out),
        Value::Bytes(bytes) | Value::Fixed(_, bytes) => cell::write_bytes(bytes, out),
        Value::Union(_, value) => write(value, out),
        Value::Date(days) => {
            cell::write_timestamp_text(i64::from(*days) * MICROS_PER_DAY, true, out);
        }
        Value::TimestampMillis(ms) | Value::LocalTimestampMillis(ms) => {
            cell::write_timestamp_text(ms.saturating_mul(1000), false, out);
        }
        Value::TimestampMicros(us) | Value::LocalTimestampMicros(us) => {
            cell::write_timestamp_text(*us, false, out);
        }
        Value::TimestampNanos(ns) | Value::LocalTimestampNanos(ns) => {
            cell::write_timestamp_text(ns.div_euclid(1000), false, out);
        }
        Value::TimeMillis(ms) => cell::write_time(i64::from(*ms) * 1000, out),
        Value::TimeMicros(us) => cell::write_time(*us, out),
        Value::Uuid(uuid) => {
            out.push('"');
            out.push_str(&uuid.to_string());
            out.push('"');
        }
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                write(item, out);
            }
            out.push(']');
        }
        Value::Map(entries) => {
            // A hash map has no order of its own.
            let mut entries: Vec<_> = entries.iter().collect();
            entries.sort_by_key(|(key, _)| key.as_str());
            write_object(entries.into_iter().map(|(k, v)| (k.as_str(), v)), out);
        }
        Value::Record(fields) => write_object(fields.iter().map(|(k, v)| (k.as_str(), v)), out),
        other => match serde_json::Value::try_from(other.clone()) {
            Ok(value) => out.push_str(&value.to_string()),
            Err(_) => out.push_str("null"),
        },
    }
}

fn write_object<'a>(fields: impl Iterator<Item = (&'a str, &'a Value)>, out: &mut String) {
    out.push('{');
    for (i, (key, value)) in fields.enumerate() {
        if i > 0 {
            out.push(',');
        }
        json::write_string(key, out);
        out.push(':');
        write(value, out);
    }
    out.push('}');
}

impl Source for AvroSource {
    fn next(&mut self) -> Result<Option<Piece>, FilesError> {
        let mut events = Vec::new();
        let mut bytes = 0;
        while events.len() < PIECE_ROWS && bytes < PIECE_BYTES {
            let Some(value) = self.record()? else {
                break;
            };
            let mut json = String::new();
            write(&value, &mut json);
            bytes += json.len();
            events.push(TextEvent {
                line: self.row,
                json,
            });
        }
        if events.is_empty() {
            return Ok(None);
        }
        Ok(Some(Piece {
            rows: Rows::Events(events),
            bad: Vec::new(),
            after: Position {
                row: self.row,
                ..Position::default()
            },
        }))
    }

    fn declared(&self) -> &[(String, FieldType)] {
        &self.declared
    }
}
