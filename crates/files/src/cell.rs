//! Values of a file's columns as JSON text, as an event would have them, and the field types that columns suggest.

use std::fmt::Write;

use arrow::array::types::{
    Date32Type, Decimal128Type, Float32Type, Float64Type, Int64Type, TimestampMicrosecondType,
    UInt64Type,
};
use arrow::array::{Array, ArrayRef, AsArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, TimeUnit};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use rakam_event::types::FieldType;
use rakam_event::{json, print, time};

/// As Arrow marks a column whose text is JSON.
const EXTENSION: &str = "ARROW:extension:name";
const JSON: &str = "arrow.json";

/// The type of a field that a column of a typed file declares.
pub fn field_type(field: &Field) -> FieldType {
    match of_type(field.data_type()) {
        FieldType::Text if is_json(field) => FieldType::Jsonb,
        ty => ty,
    }
}

/// Whether the column is text that is JSON.
pub fn is_json(field: &Field) -> bool {
    field
        .metadata()
        .get(EXTENSION)
        .is_some_and(|name| name == JSON)
}

/// The column as one whose text is JSON.
pub fn as_json(field: &Field) -> Field {
    let mut metadata = field.metadata().clone();
    metadata.insert(EXTENSION.to_owned(), JSON.to_owned());
    Field::clone(field).with_metadata(metadata)
}

fn of_type(ty: &DataType) -> FieldType {
    match ty {
        DataType::Boolean => FieldType::Bool,
        DataType::Int8 | DataType::Int16 | DataType::Int32 | DataType::UInt8 | DataType::UInt16 => {
            FieldType::Int4
        }
        DataType::Int64 | DataType::UInt32 => FieldType::Int8,
        DataType::UInt64 => FieldType::Numeric {
            precision: 20,
            scale: 0,
        },
        DataType::Float16 | DataType::Float32 => FieldType::Float4,
        DataType::Float64 => FieldType::Float8,
        DataType::Decimal32(p, s) | DataType::Decimal64(p, s) | DataType::Decimal128(p, s)
            if (0..=i16::from(*p)).contains(&i16::from(*s)) =>
        {
            FieldType::Numeric {
                precision: *p,
                scale: *s as u8,
            }
        }
        DataType::Date32 | DataType::Date64 => FieldType::Date,
        DataType::Timestamp(..) => FieldType::Timestamptz,
        DataType::FixedSizeBinary(16) => FieldType::Uuid,
        DataType::Dictionary(_, value) => of_type(value),
        DataType::RunEndEncoded(_, value) => of_type(value.data_type()),
        DataType::List(item)
        | DataType::LargeList(item)
        | DataType::ListView(item)
        | DataType::LargeListView(item)
        | DataType::FixedSizeList(item, _) => match of_type(item.data_type()) {
            FieldType::Bool => FieldType::BoolArray,
            FieldType::Float8 | FieldType::Float4 | FieldType::Int4 => FieldType::Float8Array,
            FieldType::Text => FieldType::TextArray,
            _ => FieldType::Jsonb,
        },
        DataType::Struct(_) | DataType::Map(..) | DataType::Union(..) => FieldType::Jsonb,
        _ => FieldType::Text,
    }
}

/// The column without encodings: plain text, lists, and whole numbers as 64 bits, so that few types are left.
pub fn plain(array: &ArrayRef) -> Result<ArrayRef, arrow::error::ArrowError> {
    let target = match array.data_type() {
        DataType::Dictionary(_, value) => value.as_ref().clone(),
        DataType::RunEndEncoded(_, value) => value.data_type().clone(),
        DataType::LargeUtf8 | DataType::Utf8View => DataType::Utf8,
        DataType::LargeBinary | DataType::BinaryView => DataType::Binary,
        DataType::Int8
        | DataType::Int16
        | DataType::Int32
        | DataType::UInt8
        | DataType::UInt16
        | DataType::UInt32 => DataType::Int64,
        DataType::Float16 => DataType::Float32,
        DataType::Date64 => DataType::Date32,
        DataType::Decimal32(p, s) | DataType::Decimal64(p, s) => DataType::Decimal128(*p, *s),
        _ => return Ok(array.clone()),
    };
    let array = cast(array, &target)?;
    // A dictionary's values may be encoded themselves.
    plain(&array)
}

/// Appends the JSON of a value of a [`plain`] column.
pub fn write_json(array: &ArrayRef, row: usize, out: &mut String) {
    if row >= array.len() || array.is_null(row) {
        out.push_str("null");
        return;
    }
    match array.data_type() {
        DataType::Boolean => print::write_bool(array.as_boolean().value(row), out),
        DataType::Int64 => print::write_int(array.as_primitive::<Int64Type>().value(row), out),
        DataType::UInt64 => {
            // Writing into a String cannot fail.
            let _ = write!(out, "{}", array.as_primitive::<UInt64Type>().value(row));
        }
        DataType::Float32 => {
            let value = array.as_primitive::<Float32Type>().value(row);
            write_float(f64::from(value), out, |_, out| {
                print::write_float4(value, out);
            });
        }
        DataType::Float64 => {
            let value = array.as_primitive::<Float64Type>().value(row);
            write_float(value, out, print::write_float8);
        }
        DataType::Decimal128(_, scale) if (0..=38).contains(scale) => {
            let value = array.as_primitive::<Decimal128Type>().value(row);
            print::write_numeric(value, *scale as u8, out);
        }
        DataType::Utf8 => json::write_string(array.as_string::<i32>().value(row), out),
        DataType::Binary => write_bytes(array.as_binary::<i32>().value(row), out),
        DataType::FixedSizeBinary(16) => {
            print::write_uuid(array.as_fixed_size_binary().value(row), out);
        }
        DataType::FixedSizeBinary(_) => {
            write_bytes(array.as_fixed_size_binary().value(row), out);
        }
        DataType::Date32 => {
            let days = array.as_primitive::<Date32Type>().value(row);
            write_timestamp_text(i64::from(days) * time::MICROS_PER_DAY, true, out);
        }
        DataType::Timestamp(..) => match micros(array, row) {
            Some(micros) => write_timestamp_text(micros, false, out),
            None => write_shown(array, row, out),
        },
        DataType::List(_) => write_list(&array.as_list::<i32>().value(row), out),
        DataType::LargeList(_) => write_list(&array.as_list::<i64>().value(row), out),
        DataType::FixedSizeList(..) => write_list(&array.as_fixed_size_list().value(row), out),
        DataType::Struct(fields) => {
            let columns = array.as_struct().columns();
            out.push('{');
            for (i, (field, column)) in fields.iter().zip(columns).enumerate() {
                if i > 0 {
                    out.push(',');
                }
                json::write_string(field.name(), out);
                out.push(':');
                write_any(column, row, out);
            }
            out.push('}');
        }
        DataType::Map(..) => {
            let entries = array.as_map().value(row);
            let (keys, values) = (entries.column(0), entries.column(1));
            out.push('{');
            for entry in 0..entries.len() {
                if entry > 0 {
                    out.push(',');
                }
                let mut key = String::new();
                write_any(keys, entry, &mut key);
                let text = json::string(&key);
                json::write_string(text.as_deref().unwrap_or(&key), out);
                out.push(':');
                write_any(values, entry, out);
            }
            out.push('}');
        }
        _ => write_shown(array, row, out),
    }
}

/// The JSON of a value of any column.
fn write_any(array: &ArrayRef, row: usize, out: &mut String) {
    match plain(&array.slice(row, 1)) {
        Ok(array) => write_json(&array, 0, out),
        Err(_) => write_shown(array, row, out),
    }
}

fn write_list(items: &ArrayRef, out: &mut String) {
    out.push('[');
    let plain = plain(items).unwrap_or_else(|_| items.clone());
    for row in 0..plain.len() {
        if row > 0 {
            out.push(',');
        }
        write_json(&plain, row, out);
    }
    out.push(']');
}

/// Whatever Arrow prints, as text: times of day, intervals, other decimals.
fn write_shown(array: &ArrayRef, row: usize, out: &mut String) {
    let options = FormatOptions::new();
    let shown = ArrayFormatter::try_new(array.as_ref(), &options)
        .ok()
        .and_then(|formatter| formatter.value(row).try_to_string().ok());
    match shown {
        Some(text) => json::write_string(&text, out),
        None => out.push_str("null"),
    }
}

/// A timestamp in microseconds since 1970; None if they are out of range.
pub fn micros(array: &ArrayRef, row: usize) -> Option<i64> {
    use arrow::array::types::{
        TimestampMillisecondType, TimestampNanosecondType, TimestampSecondType,
    };
    let DataType::Timestamp(unit, _) = array.data_type() else {
        return None;
    };
    match unit {
        TimeUnit::Second => array
            .as_primitive::<TimestampSecondType>()
            .value(row)
            .checked_mul(1_000_000),
        TimeUnit::Millisecond => array
            .as_primitive::<TimestampMillisecondType>()
            .value(row)
            .checked_mul(1000),
        TimeUnit::Microsecond => Some(array.as_primitive::<TimestampMicrosecondType>().value(row)),
        TimeUnit::Nanosecond => Some(
            array
                .as_primitive::<TimestampNanosecondType>()
                .value(row)
                .div_euclid(1000),
        ),
    }
}

/// A float as JSON; what JSON has no number for as text.
pub fn write_float(value: f64, out: &mut String, finite: impl FnOnce(f64, &mut String)) {
    if value.is_finite() {
        finite(value, out);
    } else if value.is_nan() {
        out.push_str("\"NaN\"");
    } else {
        out.push_str(if value > 0.0 {
            "\"Infinity\""
        } else {
            "\"-Infinity\""
        });
    }
}

/// Bytes that are text as text, others in the hexadecimal form of a bytea.
pub fn write_bytes(bytes: &[u8], out: &mut String) {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => json::write_string(text, out),
        _ => {
            out.push_str("\"\\\\x");
            for byte in bytes {
                // Writing into a String cannot fail.
                let _ = write!(out, "{byte:02x}");
            }
            out.push('"');
        }
    }
}

/// A time as JSON text, with `date` only its day; beyond the years 0001 to 9999 as the number it is.
pub fn write_timestamp_text(micros: i64, date: bool, out: &mut String) {
    out.push('"');
    if !(time::MIN_TIME_US..=time::MAX_TIME_US).contains(&micros) {
        // Writing into a String cannot fail.
        let _ = write!(out, "{micros} microseconds");
    } else if date {
        time::write_date(micros.div_euclid(time::MICROS_PER_DAY), out);
    } else {
        time::write_timestamp(micros, out);
    }
    out.push('"');
}

/// A time of day as JSON text.
pub fn write_time(micros: i64, out: &mut String) {
    let seconds = micros.div_euclid(1_000_000);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    // Writing into a String cannot fail.
    let _ = write!(out, "\"{hour:02}:{minute:02}:{second:02}");
    let fraction = micros.rem_euclid(1_000_000);
    if fraction > 0 {
        let _ = write!(out, ".{fraction:06}");
    }
    out.push('"');
}
