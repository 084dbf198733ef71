//! Canonical JSON of stored values, as Postgres' `to_jsonb` under UTC would have it.

use std::fmt::Write;

use arrow::array::types::{
    Date32Type, Decimal128Type, Float32Type, Float64Type, Int32Type, Int64Type,
    TimestampMicrosecondType,
};
use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::ArrowPrimitiveType;

use crate::error::EventError;
use crate::json;
use crate::net;
use crate::schema::{RECEIVED_AT, Schema};
use crate::time;
use crate::types::FieldType;

/// Floats of these sizes are printed without an exponent. jsonb knows no exponents anyway; the text only should
/// not grow to 300 digits.
const PLAIN_FLOATS: std::ops::Range<f64> = 1e-7..1e21;

/// Appends the JSON of one value, `null` for NULL. The array has the Arrow type of the field's type; text may
/// also be a view, as DataFusion's readers have it.
pub fn to_json_text(
    array: &ArrayRef,
    ty: FieldType,
    row: usize,
    out: &mut String,
) -> Result<(), EventError> {
    if row >= array.len() || array.is_null(row) {
        out.push_str("null");
        return Ok(());
    }
    write_value(array, ty, row, out).ok_or_else(|| {
        let found = array.data_type();
        EventError::Arrow(format!("a field of type {ty} is stored as {found}"))
    })
}

/// Appends a row as the JSON of an event, from which the same row is made. The columns are those of the schema's fields, in
/// their order; the time of receipt is left out: it is beside an event, never in it.
pub fn write_row(
    rows: &RecordBatch,
    schema: &Schema,
    row: usize,
    out: &mut String,
) -> Result<(), EventError> {
    let mut first = true;
    out.push('{');
    for (field, column) in schema.fields.iter().zip(rows.columns()) {
        if column.is_null(row) || field.name == RECEIVED_AT {
            continue;
        }
        if !std::mem::take(&mut first) {
            out.push(',');
        }
        json::write_string(&field.name, out);
        out.push(':');
        to_json_text(column, field.ty, row, out)?;
    }
    out.push('}');
    Ok(())
}

/// None if the array is not of the type.
fn write_value(array: &ArrayRef, ty: FieldType, row: usize, out: &mut String) -> Option<()> {
    match ty {
        FieldType::Bool => write_bool(array.as_boolean_opt()?.value(row), out),
        FieldType::Int4 => write_int(i64::from(primitive::<Int32Type>(array, row)?), out),
        FieldType::Int8 => write_int(primitive::<Int64Type>(array, row)?, out),
        FieldType::Float4 => write_float4(primitive::<Float32Type>(array, row)?, out),
        FieldType::Float8 => write_float8(primitive::<Float64Type>(array, row)?, out),
        FieldType::Numeric { scale, .. } => {
            write_numeric(primitive::<Decimal128Type>(array, row)?, scale, out);
        }
        FieldType::Text | FieldType::Inet => json::write_string(text(array, row)?, out),
        FieldType::Jsonb => out.push_str(text(array, row)?),
        FieldType::Date => write_date(primitive::<Date32Type>(array, row)?, out),
        FieldType::Timestamptz => {
            write_timestamp(primitive::<TimestampMicrosecondType>(array, row)?, out);
        }
        FieldType::Uuid => {
            let uuid = array.as_fixed_size_binary_opt()?;
            write_uuid(uuid.value(row), out);
        }
        FieldType::BoolArray => {
            let items = array.as_list_opt::<i32>()?.value(row);
            write_array(items.as_boolean_opt()?.iter(), out, write_bool);
        }
        FieldType::Float8Array => {
            let items = array.as_list_opt::<i32>()?.value(row);
            write_array(
                items.as_primitive_opt::<Float64Type>()?.iter(),
                out,
                write_float8,
            );
        }
        FieldType::TextArray => {
            let items = array.as_list_opt::<i32>()?.value(row);
            match items.as_string_opt::<i32>() {
                Some(items) => write_array(items.iter(), out, json::write_string),
                None => write_array(items.as_string_view_opt()?.iter(), out, json::write_string),
            }
        }
    }
    Some(())
}

fn primitive<T: ArrowPrimitiveType>(array: &ArrayRef, row: usize) -> Option<T::Native> {
    Some(array.as_primitive_opt::<T>()?.value(row))
}

/// The text of a row that is not NULL.
pub(crate) fn text(array: &dyn Array, row: usize) -> Option<&str> {
    match array.as_string_opt::<i32>() {
        Some(texts) => Some(texts.value(row)),
        None => Some(array.as_string_view_opt()?.value(row)),
    }
}

pub fn write_bool(value: bool, out: &mut String) {
    out.push_str(if value { "true" } else { "false" });
}

pub fn write_int(value: i64, out: &mut String) {
    // Writing into a String cannot fail, here and below.
    let _ = write!(out, "{value}");
}

pub fn write_float8(value: f64, out: &mut String) {
    if value == 0.0 {
        out.push('0');
    } else if !value.is_finite() {
        write_not_finite(value, out);
    } else if PLAIN_FLOATS.contains(&value.abs()) {
        let _ = write!(out, "{value}");
    } else {
        let _ = write!(out, "{value:e}");
    }
}

pub fn write_float4(value: f32, out: &mut String) {
    if value == 0.0 {
        out.push('0');
    } else if !value.is_finite() {
        write_not_finite(f64::from(value), out);
    } else if PLAIN_FLOATS.contains(&f64::from(value.abs())) {
        let _ = write!(out, "{value}");
    } else {
        let _ = write!(out, "{value:e}");
    }
}

/// Only INSERT can store these; jsonb has them as strings.
fn write_not_finite(value: f64, out: &mut String) {
    out.push_str(if value.is_nan() {
        "\"NaN\""
    } else if value > 0.0 {
        "\"Infinity\""
    } else {
        "\"-Infinity\""
    });
}

/// An unscaled value with all digits of its scale.
pub fn write_numeric(value: i128, scale: u8, out: &mut String) {
    if value < 0 {
        out.push('-');
    }
    let scale = usize::from(scale);
    let digits = format!("{:0width$}", value.unsigned_abs(), width = scale + 1);
    let (whole, fraction) = digits.split_at(digits.len() - scale);
    out.push_str(whole);
    if !fraction.is_empty() {
        out.push('.');
        out.push_str(fraction);
    }
}

pub(crate) fn write_date(days: i32, out: &mut String) {
    quoted(out, |out| time::write_date(i64::from(days), out));
}

pub(crate) fn write_timestamp(micros: i64, out: &mut String) {
    quoted(out, |out| time::write_timestamp(micros, out));
}

pub fn write_uuid(uuid: &[u8], out: &mut String) {
    quoted(out, |out| net::write_uuid(uuid, out));
}

fn quoted(out: &mut String, write: impl FnOnce(&mut String)) {
    out.push('"');
    write(out);
    out.push('"');
}

pub(crate) fn write_array<T>(
    items: impl Iterator<Item = Option<T>>,
    out: &mut String,
    write: impl Fn(T, &mut String),
) {
    out.push('[');
    for (i, item) in items.enumerate() {
        if i > 0 {
            out.push(',');
        }
        match item {
            Some(item) => write(item, out),
            None => out.push_str("null"),
        }
    }
    out.push(']');
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Int32Array, StringViewArray};

    use super::*;

    #[test]
    fn floats_and_numerics() {
        let float = |value| {
            let mut out = String::new();
            write_float8(value, &mut out);
            out
        };
        for (value, expected) in [
            (0.0, "0"),
            (-0.0, "0"),
            (1.0, "1"),
            (0.1, "0.1"),
            (-1.5e-7, "-0.00000015"),
            (1e20, "100000000000000000000"),
            (1e300, "1e300"),
            (5e-324, "5e-324"),
            (f64::NAN, "\"NaN\""),
            (f64::NEG_INFINITY, "\"-Infinity\""),
        ] {
            assert_eq!(float(value), expected);
        }
        let mut out = String::new();
        write_float4(0.1, &mut out);
        assert_eq!(out, "0.1");
        for (value, scale, expected) in [
            (0, 2, "0.00"),
            (-5, 2, "-0.05"),
            (12_345, 2, "123.45"),
            (12, 0, "12"),
            (i128::MIN, 0, "-170141183460469231731687303715884105728"),
        ] {
            let mut out = String::new();
            write_numeric(value, scale, &mut out);
            assert_eq!(out, expected);
        }
    }

    #[test]
    fn stored_values() {
        let text: ArrayRef = Arc::new(StringViewArray::from(vec![Some("a\"b"), None]));
        let int: ArrayRef = Arc::new(Int32Array::from(vec![1]));
        let shown = |array, ty, row| {
            let mut out = String::new();
            to_json_text(array, ty, row, &mut out).map(|()| out)
        };
        assert_eq!(
            shown(&text, FieldType::Text, 0).as_deref(),
            Ok("\"a\\\"b\"")
        );
        assert_eq!(shown(&text, FieldType::Text, 1).as_deref(), Ok("null"));
        assert_eq!(shown(&int, FieldType::Int4, 0).as_deref(), Ok("1"));
        assert!(shown(&int, FieldType::Text, 0).is_err());
    }
}
