//! A file's column as a column of a field's type: whole columns at a time where the types agree, value by value by the
//! rules of JSON events where they do not.

use std::borrow::Cow;
use std::sync::Arc;

use arrow::array::builder::NullBufferBuilder;
use arrow::array::types::{
    ArrowPrimitiveType, Date32Type, Decimal128Type, Float32Type, Float64Type, Int32Type, Int64Type,
    TimestampMicrosecondType,
};
use arrow::array::{Array, ArrayRef, AsArray, PrimitiveArray, StringArray};
use arrow::datatypes::DataType;
use rakam_event::coerce::{Misfit, Value, coerce};
use rakam_event::column::Column;
use rakam_event::error::EventError;
use rakam_event::json::{self, Cutter, Kind, MAX_DEPTH};
use rakam_event::number::{Number, short_whole};
use rakam_event::time;
use rakam_event::types::FieldType;
use serde_json::value::RawValue;

use crate::cell;

/// Whole numbers up to here are exact as double precision.
const MAX_EXACT: i64 = 1 << 53;

/// Something to tell about a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    pub row: usize,
    /// The value as JSON.
    pub raw: String,
    pub error: String,
    /// The column is NULL there, and the value belongs into `_extra`; else it was cut only.
    pub misfit: bool,
}

/// A column converted.
pub struct Cast {
    pub array: ArrayRef,
    pub notes: Vec<Note>,
    /// Rows whose value no event may have.
    pub refused: Vec<(usize, EventError)>,
}

/// Whether the JSON of a value holds a NUL character, which no text of Postgres can.
pub fn has_nul(raw: &str) -> bool {
    raw.contains("\\u0000")
}

/// Converts a [`cell::plain`] column. With `untyped` its text may spell JSON, and an empty text is no value of anything
/// but text. Strings are cut to `max_string_bytes`.
pub fn cast(
    array: &ArrayRef,
    ty: FieldType,
    untyped: bool,
    max_string_bytes: usize,
) -> Result<Cast, EventError> {
    if let Some(array) = whole(array, ty, max_string_bytes) {
        return Ok(Cast {
            array,
            notes: Vec::new(),
            refused: Vec::new(),
        });
    }
    match array.as_string_opt::<i32>() {
        Some(texts) => text_by_text(texts, ty, untyped, max_string_bytes),
        None => value_by_value(array, ty, max_string_bytes),
    }
}

/// The column at once; None where some value needs a look.
fn whole(array: &ArrayRef, ty: FieldType, max_string_bytes: usize) -> Option<ArrayRef> {
    match (array.data_type(), ty) {
        (DataType::Boolean, FieldType::Bool) => Some(array.clone()),
        (DataType::Utf8, FieldType::Text) => {
            let texts = array.as_string::<i32>();
            let short = texts
                .value_offsets()
                .windows(2)
                .all(|w| (w[1] - w[0]) as usize <= max_string_bytes);
            short.then(|| array.clone())
        }
        (DataType::Int64, FieldType::Int8) => Some(array.clone()),
        (DataType::Int64, FieldType::Int4) => {
            let values = array.as_primitive::<Int64Type>();
            all(values, |v| i32::try_from(v).is_ok())
                .then(|| Arc::new(values.unary::<_, Int32Type>(|v| v as i32)) as ArrayRef)
        }
        (DataType::Int64, FieldType::Float8) => {
            let values = array.as_primitive::<Int64Type>();
            all(values, |v| (-MAX_EXACT..=MAX_EXACT).contains(&v))
                .then(|| Arc::new(values.unary::<_, Float64Type>(|v| v as f64)) as ArrayRef)
        }
        (DataType::Float64, FieldType::Float8) => {
            let values = array.as_primitive::<Float64Type>();
            // Adding 0 makes -0 to 0.
            all(values, f64::is_finite)
                .then(|| Arc::new(values.unary::<_, Float64Type>(|v| v + 0.0)) as ArrayRef)
        }
        (DataType::Float32, FieldType::Float4) => {
            let values = array.as_primitive::<Float32Type>();
            all(values, f32::is_finite)
                .then(|| Arc::new(values.unary::<_, Float32Type>(|v| v + 0.0)) as ArrayRef)
        }
        (DataType::Decimal128(_, have), FieldType::Numeric { precision, scale })
            if *have == scale as i8 =>
        {
            let values = array.as_primitive::<Decimal128Type>();
            let bound = 10_i128.pow(u32::from(precision));
            if !all(values, |v| -bound < v && v < bound) {
                return None;
            }
            let typed = values.clone().with_data_type(ty.arrow());
            Some(Arc::new(typed))
        }
        (DataType::Date32, FieldType::Date) => {
            let days =
                time::MIN_TIME_US / time::MICROS_PER_DAY..=time::MAX_TIME_US / time::MICROS_PER_DAY;
            let values = array.as_primitive::<Date32Type>();
            all(values, |v| days.contains(&i64::from(v))).then(|| array.clone())
        }
        (DataType::Timestamp(..), FieldType::Timestamptz) => {
            let mut fits = true;
            let range = time::MIN_TIME_US..=time::MAX_TIME_US;
            let micros = (0..array.len()).map(|row| {
                if array.is_null(row) {
                    return None;
                }
                let micros = cell::micros(array, row).filter(|us| range.contains(us));
                fits &= micros.is_some();
                micros
            });
            let typed: PrimitiveArray<TimestampMicrosecondType> = micros.collect();
            fits.then(|| Arc::new(typed.with_data_type(ty.arrow())) as ArrayRef)
        }
        (DataType::FixedSizeBinary(16), FieldType::Uuid) => Some(array.clone()),
        _ => None,
    }
}

fn all<T: ArrowPrimitiveType>(array: &PrimitiveArray<T>, test: impl Fn(T::Native) -> bool) -> bool {
    if array.null_count() == 0 {
        return array.values().iter().all(|&v| test(v));
    }
    array.iter().flatten().all(test)
}

/// Any column, through the JSON of each value.
fn value_by_value(
    array: &ArrayRef,
    ty: FieldType,
    max_string_bytes: usize,
) -> Result<Cast, EventError> {
    let mut column = Column::new(&ty.arrow())?;
    let mut notes = Vec::new();
    let mut refused = Vec::new();
    let mut raw = String::new();
    for row in 0..array.len() {
        if array.is_null(row) {
            continue;
        }
        raw.clear();
        cell::write_json(array, row, &mut raw);
        if raw == "null" {
            continue;
        }
        if has_nul(&raw) {
            refused.push((row, EventError::NulCharacter));
            continue;
        }
        let mut cutter = Cutter::new(max_string_bytes);
        match coerce(&raw, ty, &mut cutter) {
            Ok(value) => {
                column.append(row, value);
                notes.extend(cutter.cut_from.map(|n| cut(row, &raw, n, max_string_bytes)));
            }
            Err(misfit) => notes.push(note(row, raw.clone(), misfit)),
        }
    }
    Ok(Cast {
        array: column.finish(array.len()),
        notes,
        refused,
    })
}

fn note(row: usize, raw: String, misfit: Misfit) -> Note {
    Note {
        row,
        raw,
        error: misfit.to_string(),
        misfit: true,
    }
}

fn cut(row: usize, raw: &str, bytes: usize, limit: usize) -> Note {
    Note {
        row,
        raw: raw[..raw.floor_char_boundary(512)].to_owned(),
        error: format!("string of {bytes} bytes was cut to {limit} bytes"),
        misfit: false,
    }
}

/// A column of text as numbers or times at once; None where some value needs a look.
fn common(texts: &StringArray, ty: FieldType, untyped: bool) -> Option<ArrayRef> {
    Some(match ty {
        FieldType::Float8 => Arc::new(parsed::<Float64Type>(texts, untyped, float)?),
        FieldType::Int8 => Arc::new(parsed::<Int64Type>(texts, untyped, integer)?),
        FieldType::Int4 => Arc::new(parsed::<Int32Type>(texts, untyped, |text| {
            integer(text)?.try_into().ok()
        })?),
        FieldType::Date => Arc::new(parsed::<Date32Type>(texts, untyped, time::exact_date)?),
        FieldType::Timestamptz => {
            let times = parsed::<TimestampMicrosecondType>(texts, untyped, time::timestamp)?;
            Arc::new(times.with_data_type(ty.arrow()))
        }
        _ => return None,
    })
}

fn parsed<T: ArrowPrimitiveType>(
    texts: &StringArray,
    untyped: bool,
    parse: impl Fn(&str) -> Option<T::Native>,
) -> Option<PrimitiveArray<T>> {
    let mut values = Vec::with_capacity(texts.len());
    let mut valid = NullBufferBuilder::new(texts.len());
    for text in texts {
        let text = text.filter(|text| !(untyped && text.is_empty()));
        valid.append(text.is_some());
        values.push(match text {
            Some(text) => parse(text)?,
            None => T::Native::default(),
        });
    }
    Some(PrimitiveArray::new(values.into(), valid.finish()))
}

/// A column of text. The common types are parsed directly; the rest goes through JSON.
fn text_by_text(
    texts: &StringArray,
    ty: FieldType,
    untyped: bool,
    max_string_bytes: usize,
) -> Result<Cast, EventError> {
    if let Some(array) = common(texts, ty, untyped) {
        return Ok(Cast {
            array,
            notes: Vec::new(),
            refused: Vec::new(),
        });
    }
    let mut column = Column::new(&ty.arrow())?;
    let mut notes = Vec::new();
    let mut raw = String::new();
    for (row, text) in texts.iter().enumerate() {
        let Some(text) = text else {
            continue;
        };
        if untyped && text.is_empty() && ty != FieldType::Text {
            continue;
        }
        if let Some(value) = parse(text, ty, untyped, max_string_bytes) {
            column.append(row, value);
            continue;
        }
        raw.clear();
        let is_json = match untyped {
            true => spells_json(text, ty),
            // Text of a file of types may say `1` or `true`; what is an object or a list is JSON.
            false => {
                ty == FieldType::Jsonb && text.trim_start().starts_with(['{', '[']) && is_json(text)
            }
        };
        if is_json {
            raw.push_str(text);
        } else if !(untyped && array_literal(text, ty, &mut raw)) {
            raw.clear();
            json::write_string(text, &mut raw);
        }
        let mut cutter = Cutter::new(max_string_bytes);
        match coerce(&raw, ty, &mut cutter) {
            Ok(value) => {
                column.append(row, value);
                notes.extend(cutter.cut_from.map(|n| cut(row, &raw, n, max_string_bytes)));
            }
            Err(misfit) => notes.push(note(row, raw.clone(), misfit)),
        }
    }
    Ok(Cast {
        array: column.finish(texts.len()),
        notes,
        refused: Vec::new(),
    })
}

/// The value of a text in the spelling that most have; None where [`coerce`] has to decide.
fn parse(text: &str, ty: FieldType, untyped: bool, max_string_bytes: usize) -> Option<Value<'_>> {
    Some(match ty {
        FieldType::Text if text.len() <= max_string_bytes => Value::Text(Cow::Borrowed(text)),
        FieldType::Float8 => Value::Float8(float(text)?),
        FieldType::Int4 => Value::Int4(integer(text)?.try_into().ok()?),
        FieldType::Int8 => Value::Int8(integer(text)?),
        FieldType::Bool => match text {
            "true" => Value::Bool(true),
            "false" => Value::Bool(false),
            // As COPY writes them.
            "t" if untyped => Value::Bool(true),
            "f" if untyped => Value::Bool(false),
            _ => return None,
        },
        FieldType::Date => Value::Date(time::exact_date(text)?),
        FieldType::Timestamptz => Value::Timestamptz(time::timestamp(text)?),
        _ => return None,
    })
}

/// Short and plain numbers need none of the checks of [`Number`].
fn float(text: &str) -> Option<f64> {
    if let Some(whole) = short_whole(text, 15) {
        return Some(whole as f64);
    }
    let plain = text.len() <= 15 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'.' | b'-'));
    let value: f64 = plain.then(|| text.parse().ok()).flatten()?;
    // Adding 0 makes -0 to 0.
    Some(value + 0.0)
}

fn integer(text: &str) -> Option<i64> {
    if let Some(short) = short_whole(text, 18) {
        return Some(short);
    }
    let plain = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'-'));
    plain.then(|| text.parse().ok()).flatten()
}

/// Whether a cell without a type of its own is JSON, for a field that can hold that.
fn spells_json(text: &str, ty: FieldType) -> bool {
    let kind = match text.trim_start().bytes().next() {
        Some(b'[') => Kind::Array,
        Some(b'{') => Kind::Object,
        Some(_) => Kind::Number,
        None => return false,
    };
    let holds = match ty {
        FieldType::Jsonb => true,
        FieldType::BoolArray | FieldType::Float8Array | FieldType::TextArray => kind == Kind::Array,
        _ => false,
    };
    holds && is_json(text)
}

/// Appends the JSON of an array as Postgres prints one of a dimension: `{a,NULL,"b c"}`. False if it is none, or the field
/// cannot hold it; what was appended then means nothing.
fn array_literal(text: &str, ty: FieldType, out: &mut String) -> bool {
    if !matches!(
        ty,
        FieldType::BoolArray | FieldType::Float8Array | FieldType::TextArray
    ) {
        return false;
    }
    let Some(mut rest) = text.trim().strip_prefix('{') else {
        return false;
    };
    out.push('[');
    if rest.trim() == "}" {
        out.push(']');
        return true;
    }
    let mut element = String::new();
    loop {
        element.clear();
        let start = rest.trim_start();
        let (quoted, after) = match start.strip_prefix('"') {
            Some(inner) => (true, unescaped(inner, true, &mut element)),
            None => (false, unescaped(start, false, &mut element)),
        };
        let Some(after) = after.map(str::trim_start) else {
            return false;
        };
        let plain = element.trim_end();
        match ty {
            _ if !quoted && plain.is_empty() => return false,
            _ if !quoted && plain.eq_ignore_ascii_case("null") => out.push_str("null"),
            FieldType::BoolArray if matches!(plain, "t" | "true") => out.push_str("true"),
            FieldType::BoolArray if matches!(plain, "f" | "false") => out.push_str("false"),
            FieldType::Float8Array if is_literal(plain) => out.push_str(plain),
            _ if quoted => json::write_string(&element, out),
            _ => json::write_string(plain, out),
        }
        if after.trim_end() == "}" {
            out.push(']');
            return true;
        }
        let Some(next) = after.strip_prefix(',') else {
            return false;
        };
        out.push(',');
        rest = next;
    }
}

/// Appends an element up to its end, without escapes; what comes behind it. None: it has no end, or is an array itself.
fn unescaped<'a>(text: &'a str, quoted: bool, element: &mut String) -> Option<&'a str> {
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => element.push(chars.next()?.1),
            '"' if quoted => return text.get(at + 1..),
            ',' | '}' if !quoted => return text.get(at..),
            '{' | '"' if !quoted => return None,
            c => element.push(c),
        }
    }
    None
}

/// Whether the text is JSON that an event may hold.
pub fn is_json(text: &str) -> bool {
    json::check(text, MAX_DEPTH).is_ok() && serde_json::from_str::<&RawValue>(text).is_ok()
}

/// The type that the cells of a column without types show, by the rules of first sight. All of them must agree; None while
/// there is no value.
pub fn infer(texts: &StringArray) -> Option<FieldType> {
    let mut found: Option<FieldType> = None;
    for text in texts.iter().flatten().filter(|t| !t.is_empty()) {
        let ty = infer_text(text);
        found = Some(match (found, ty) {
            (None, ty) => ty,
            (Some(a), b) if a == b => a,
            // A whole number beyond double precision makes the column one of whole numbers, if all others are.
            (Some(FieldType::Float8), FieldType::Int8)
            | (Some(FieldType::Int8), FieldType::Float8) => FieldType::Int8,
            (Some(FieldType::Date), FieldType::Timestamptz)
            | (Some(FieldType::Timestamptz), FieldType::Date) => FieldType::Timestamptz,
            _ => return Some(FieldType::Text),
        });
    }
    let whole = |text: &str| Number::parse(text).is_some_and(|n| n.is_whole());
    if found == Some(FieldType::Int8) && !texts.iter().flatten().all(|t| t.is_empty() || whole(t)) {
        return Some(FieldType::Float8);
    }
    // Nothing but empty cells in quotes is text, all the same.
    found.or_else(|| (texts.null_count() < texts.len()).then_some(FieldType::Text))
}

fn infer_text(text: &str) -> FieldType {
    if matches!(text, "true" | "false") {
        return FieldType::Bool;
    }
    if !text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.')) {
        return FieldType::Text;
    }
    // As in JSON: no sign but minus, no zeros in front, which are part of codes and telephone numbers.
    let digits = text.strip_prefix('-').unwrap_or(text);
    let json_number = digits.starts_with(|c: char| c.is_ascii_digit())
        && !(digits.len() > 1 && digits.starts_with('0') && digits.as_bytes()[1].is_ascii_digit());
    if json_number && let Some(number) = Number::parse(text) {
        return if !number.is_beyond_float8() {
            FieldType::Float8
        } else if number.to_i64().is_some() {
            FieldType::Int8
        } else {
            FieldType::Text
        };
    }
    if time::exact_date(text).is_some() {
        FieldType::Date
    } else if time::exact_timestamp(text).is_some() {
        FieldType::Timestamptz
    } else {
        FieldType::Text
    }
}

/// Whether a cell without a type of its own is a JSON number or boolean.
pub fn is_literal(text: &str) -> bool {
    matches!(
        infer_text(text),
        FieldType::Bool | FieldType::Float8 | FieldType::Int8
    ) && is_json(text)
}

/// The event's times that a column means: milliseconds since 1970, or a time as text or as itself. `each` gets the rows that
/// have a value, with None for one that is no time.
pub fn times(array: &ArrayRef, mut each: impl FnMut(usize, Option<i64>)) {
    let mut raw = String::new();
    let texts = array.as_string_opt::<i32>();
    for row in (0..array.len()).filter(|&row| array.is_valid(row)) {
        if let Some(micros) = cell::micros(array, row) {
            each(row, Some(micros));
            continue;
        }
        if let Some(text) = texts.map(|texts| texts.value(row)) {
            if text.is_empty() {
                continue;
            }
            if let Some(micros) = time::timestamp(text) {
                each(row, Some(micros));
                continue;
            }
        }
        raw.clear();
        cell::write_json(array, row, &mut raw);
        each(row, time::event_time(&raw));
    }
}

#[cfg(test)]
mod tests;
