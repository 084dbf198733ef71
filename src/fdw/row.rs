//! A row's datums as values of its fields, with what is wrong with one said as Postgres would.
//!
//! A row is read and then written as JSON for the inbox, or goes from its datums into a chunk's columns: the same values
//! either way.

use std::borrow::Cow;
use std::ffi::CStr;

use pgrx::{FromDatum, pg_sys, varlena};
use rakam_event::batch::TypedRow;
use rakam_event::coerce::Value;
use rakam_event::column::Plain;
use rakam_event::entry::{self, Limits};
use rakam_event::json::{self, Cutter, Kind, MAX_DEPTH, ObjectWriter};
use rakam_event::net;
use rakam_event::number::Number;
use rakam_event::schema::{EXTRA, ID, RECEIVED_AT, TIME};
use rakam_event::time::{self, MAX_TIME_US, MIN_TIME_US};
use rakam_event::types::FieldType;

use super::columns::Column;
use super::values::PG_EPOCH_DAYS;
use crate::pg::{PG_EPOCH_US, PgError, Result};

mod fill;

pub use fill::Filler;

/// A value other than text takes at most so many bytes of JSON.
const PLAIN_JSON_BYTES: usize = 48;

/// A column of the table that is written.
pub struct Target {
    pub attribute: usize,
    pub name: String,
    pub ty: Option<FieldType>,
    role: Role,
    /// Of types that are read by their text.
    output: Option<pg_sys::FmgrInfo>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Field,
    Id,
    Time,
    ReceivedAt,
    Extra,
}

/// A row that was read. It borrows from the datums, and from the memory context in which it was read.
#[derive(Debug, Default)]
pub struct Row<'a> {
    /// Position among the targets, and the value. Not `_time`, `_received_at` and `_extra`.
    values: Vec<(usize, Value<'a>)>,
    /// An explicit `_extra`, an object.
    extra: Option<&'a str>,
    /// An explicit `_time`, in microseconds since 1970.
    pub time_us: Option<i64>,
    /// It has an `_id`, by which the digest finds its copies; or a value that the digest will cut and log.
    pub is_for_digest: bool,
    /// At least the bytes of its JSON.
    json_bytes_max: usize,
}

impl Target {
    /// What it looks up lives in `memory`.
    pub fn of(column: &Column, memory: pg_sys::MemoryContext) -> Self {
        let ty = column.field_type();
        let by_text = matches!(
            ty,
            Some(FieldType::Numeric { .. } | FieldType::Inet | FieldType::Jsonb)
        );
        Self {
            attribute: column.attnum as usize - 1,
            name: column.name.clone(),
            ty,
            role: match column.name.as_str() {
                ID => Role::Id,
                TIME => Role::Time,
                RECEIVED_AT => Role::ReceivedAt,
                EXTRA => Role::Extra,
                _ => Role::Field,
            },
            output: by_text.then(|| output_function(column.type_oid, memory)),
        }
    }

    pub fn is_time(&self) -> bool {
        self.role == Role::Time
    }

    pub fn is_received_at(&self) -> bool {
        self.role == Role::ReceivedAt
    }

    /// At most the bytes of its key, quotes, colon, comma, and of a value that is no text.
    fn json_bytes_max(&self) -> usize {
        6 * self.name.len() + 4 + PLAIN_JSON_BYTES
    }

    fn mismatch(&self) -> PgError {
        PgError::new(
            "42804",
            format!("type mismatch for field \"{}\"", self.name),
        )
    }
}

fn output_function(type_oid: pg_sys::Oid, memory: pg_sys::MemoryContext) -> pg_sys::FmgrInfo {
    let (mut oid, mut is_varlena) = (pg_sys::InvalidOid, false);
    let mut function = pg_sys::FmgrInfo::default();
    // SAFETY: catalog look-ups of a type that a column has.
    unsafe {
        pg_sys::getTypeOutputInfo(type_oid, &mut oid, &mut is_varlena);
        pg_sys::fmgr_info_cxt(oid, &mut function, memory);
    }
    function
}

/// The datums of a row.
#[derive(Clone, Copy)]
pub struct Datums {
    values: *const pg_sys::Datum,
    nulls: *const bool,
}

impl Datums {
    /// # Safety
    /// Both have an entry for every attribute of the table that the targets are of, each of its type. They, and what is
    /// allocated in the current memory context, outlive this and what is read from it.
    pub unsafe fn new(values: *const pg_sys::Datum, nulls: *const bool) -> Self {
        Self { values, nulls }
    }

    /// The datum of a target; None: NULL.
    fn get(&self, target: &Target) -> Option<pg_sys::Datum> {
        self.at(target.attribute)
    }

    /// The datum of a target's attribute; None: NULL.
    #[inline(always)]
    fn at(&self, attribute: usize) -> Option<pg_sys::Datum> {
        // SAFETY: as promised to `new`.
        unsafe {
            match *self.nulls.add(attribute) {
                true => None,
                false => Some(*self.values.add(attribute)),
            }
        }
    }
}

/// An explicit `_received_at`.
pub fn received_at(target: &Target, datums: &Datums) -> Result<Option<i64>> {
    datums
        .get(target)
        .map(|datum| timestamp(target, datum))
        .transpose()
}

/// Reads a row. Strings over `max_string_bytes` stay whole: the digest cuts them.
pub fn read<'a>(
    targets: &mut [Target],
    datums: &'a Datums,
    max_string_bytes: usize,
) -> Result<Row<'a>> {
    let mut row = Row {
        values: Vec::with_capacity(targets.len()),
        json_bytes_max: 2,
        ..Row::default()
    };
    for (position, target) in targets.iter_mut().enumerate() {
        let Some(datum) = datums.get(target) else {
            continue;
        };
        row.json_bytes_max += target.json_bytes_max();
        match target.role {
            Role::Time => row.time_us = Some(timestamp(target, datum)?),
            // Whoever gives the rows has asked for it.
            Role::ReceivedAt => {}
            Role::Extra => {
                // SAFETY: the datum is of the target's type.
                let text = unsafe { extra(target, datum)? };
                row.json_bytes_max += text.len();
                row.extra = Some(text);
            }
            Role::Field | Role::Id => {
                // SAFETY: the datum is of the target's type.
                let Some(value) = (unsafe { value(target, datum)? }) else {
                    continue;
                };
                row.is_for_digest |=
                    target.role == Role::Id || !is_plain(&value, target.ty, max_string_bytes);
                row.json_bytes_max += text_bytes_max(&value);
                row.values.push((position, value));
            }
        }
    }
    Ok(row)
}

impl<'a> Row<'a> {
    /// The row as an event's JSON.
    pub fn json(&self, targets: &[Target]) -> String {
        let mut object = ObjectWriter::default();
        for (position, value) in &self.values {
            let target = &targets[*position];
            value.write_json(
                target.ty.unwrap_or(FieldType::Text),
                object.key(&target.name),
            );
        }
        if let Some(micros) = self.time_us {
            Value::Timestamptz(micros).write_json(FieldType::Timestamptz, object.key(TIME));
        }
        if let Some(extra) = self.extra {
            object.key(EXTRA).push_str(extra);
        }
        object.finish().unwrap_or("{}").to_owned()
    }

    /// That its JSON would be accepted: an event has one limit, whichever way it takes.
    pub fn check_size(&self, targets: &[Target], limits: &Limits) -> Result<()> {
        if self.json_bytes_max > limits.max_event_bytes {
            entry::check_row(&self.json(targets), limits)?;
        }
        Ok(())
    }

    /// The row for a chunk's columns; `positions` are those of the targets' fields in the chunk's schema.
    pub fn typed(self, positions: &[usize]) -> TypedRow<'a> {
        let mut values = self.values;
        for (position, _) in &mut values {
            *position = positions[*position];
        }
        TypedRow {
            values,
            extra: self.extra,
            time_us: self.time_us,
        }
    }
}

/// Whether a column keeps the value as it is.
fn is_plain(value: &Value<'_>, ty: Option<FieldType>, max_string_bytes: usize) -> bool {
    match value {
        Value::Text(text) if ty == Some(FieldType::Inet) => {
            net::canonical_inet(text).is_some_and(|canonical| canonical == *text)
        }
        Value::Text(text) => text.len() <= max_string_bytes,
        Value::TextArray(items) => items
            .iter()
            .flatten()
            .all(|text| text.len() <= max_string_bytes),
        Value::Json(text) => {
            let mut cutter = Cutter::new(max_string_bytes);
            json::compact(text, &mut cutter);
            cutter.cut_from.is_none()
        }
        _ => true,
    }
}

/// What text adds to the bytes of a value's JSON, at most: a character may need six for one.
fn text_bytes_max(value: &Value<'_>) -> usize {
    match value {
        Value::Text(text) => 6 * text.len(),
        Value::Json(text) => text.len(),
        Value::BoolArray(items) => items.len() * PLAIN_JSON_BYTES,
        Value::Float8Array(items) => items.len() * PLAIN_JSON_BYTES,
        Value::TextArray(items) => items
            .iter()
            .map(|item| PLAIN_JSON_BYTES + item.as_ref().map_or(0, |text| 6 * text.len()))
            .sum(),
        _ => 0,
    }
}

/// The value of a datum; None for the `null` of JSON, which is no value.
unsafe fn value<'a>(target: &mut Target, datum: pg_sys::Datum) -> Result<Option<Value<'a>>> {
    let Some(ty) = target.ty else {
        return Err(target.mismatch());
    };
    // SAFETY: the datum is of the target's type.
    let value = unsafe {
        match ty {
            _ if is_by_value(ty) => by_value(target, ty, datum)?.into(),
            FieldType::Text => Value::Text(Cow::Borrowed(text(datum))),
            FieldType::Numeric { scale, .. } => {
                let text = text_form(target, datum)?;
                finite(target, text.ends_with(|c: char| c.is_ascii_digit()))?;
                let unscaled = Number::parse(text).and_then(|number| number.scaled(scale));
                Value::Numeric(unscaled.ok_or_else(|| target.mismatch())?)
            }
            FieldType::Inet => Value::Text(Cow::Borrowed(text_form(target, datum)?)),
            FieldType::Jsonb => {
                let text = text_form(target, datum)?;
                if text == "null" {
                    return Ok(None);
                }
                json::check(text, MAX_DEPTH - 1)?;
                Value::Json(json::compact(text, &mut Cutter::off()))
            }
            _ => array(target, ty, datum)?,
        }
    };
    Ok(Some(value))
}

/// Whether [`by_value`] reads the type.
fn is_by_value(ty: FieldType) -> bool {
    use FieldType as F;
    matches!(
        ty,
        F::Bool | F::Int4 | F::Int8 | F::Float4 | F::Float8 | F::Date | F::Timestamptz | F::Uuid
    )
}

/// A value that owns no memory. Inlined, as [`BatchBuilder::put`] is, for the sake of rows of many columns.
#[inline(always)]
unsafe fn by_value(target: &Target, ty: FieldType, datum: pg_sys::Datum) -> Result<Plain> {
    Ok(match ty {
        FieldType::Bool => Plain::Bool(datum.value() != 0),
        FieldType::Int4 => Plain::Int4(datum.value() as i32),
        FieldType::Int8 => Plain::Int8(datum.value() as i64),
        FieldType::Float4 => {
            let value = f32::from_bits(datum.value() as u32);
            finite(target, value.is_finite())?;
            // Adding 0 makes -0 to 0, here and below.
            Plain::Float4(value + 0.0)
        }
        FieldType::Float8 => {
            let value = f64::from_bits(datum.value() as u64);
            finite(target, value.is_finite())?;
            Plain::Float8(value + 0.0)
        }
        FieldType::Date => {
            let days = i64::from(datum.value() as i32) + i64::from(PG_EPOCH_DAYS);
            let micros = days.saturating_mul(time::MICROS_PER_DAY);
            in_range(target, (MIN_TIME_US..=MAX_TIME_US).contains(&micros))?;
            Plain::Date(days as i32)
        }
        FieldType::Timestamptz => Plain::Timestamptz(timestamp(target, datum)?),
        // SAFETY: a uuid datum that is not NULL points to its 16 bytes.
        FieldType::Uuid => Plain::Uuid(unsafe { *datum.cast_mut_ptr::<[u8; 16]>() }),
        _ => return Err(target.mismatch()),
    })
}

/// An explicit `_extra`: the text of an object, in the current memory context.
unsafe fn extra<'a>(target: &mut Target, datum: pg_sys::Datum) -> Result<&'a str> {
    // SAFETY: as promised by the callers.
    let extra = unsafe { text_form(target, datum)? };
    if json::kind(extra) != Kind::Object {
        return Err(PgError::new("22023", "\"_extra\" must be an object"));
    }
    json::check(extra, MAX_DEPTH - 1)?;
    Ok(extra)
}

/// The types that arrays are made of.
unsafe fn element<'a>(target: &Target, ty: FieldType, datum: pg_sys::Datum) -> Result<Value<'a>> {
    // SAFETY: the datum is of this type, and not NULL.
    unsafe {
        Ok(match ty {
            FieldType::Text => Value::Text(Cow::Borrowed(text(datum))),
            _ => by_value(target, ty, datum)?.into(),
        })
    }
}

/// The text of a datum; a copy of one that is compressed or stored apart is in the current memory context.
unsafe fn text<'a>(datum: pg_sys::Datum) -> &'a str {
    // SAFETY: a text datum that is not NULL.
    unsafe {
        text_in_place(datum).unwrap_or_else(|| <&str>::from_datum(datum, false).unwrap_or_default())
    }
}

/// The text of a datum, unless it is compressed or stored apart. A call into the server costs more than most texts.
#[inline(always)]
unsafe fn text_in_place<'a>(datum: pg_sys::Datum) -> Option<&'a str> {
    let value = datum.cast_mut_ptr::<pg_sys::varlena>();
    // SAFETY: a text datum that is not NULL, of a database whose encoding is UTF-8, as CREATE EXTENSION makes sure.
    unsafe {
        let is_plain = varlena::varatt_is_4b_u(value)
            || varlena::varatt_is_1b(value) && !varlena::varatt_is_1b_e(value);
        is_plain.then(|| varlena::text_to_rust_str_unchecked(value))
    }
}

unsafe fn array<'a>(target: &Target, ty: FieldType, datum: pg_sys::Datum) -> Result<Value<'a>> {
    let (type_oid, element_type, len, is_by_value, align) = match ty {
        FieldType::BoolArray => (pg_sys::BOOLOID, FieldType::Bool, 1, true, b'c'),
        FieldType::Float8Array => (pg_sys::FLOAT8OID, FieldType::Float8, 8, true, b'd'),
        _ => (pg_sys::TEXTOID, FieldType::Text, -1, false, b'i'),
    };
    let (mut datums, mut nulls, mut count) = (std::ptr::null_mut(), std::ptr::null_mut(), 0);
    // SAFETY: a valid array of this element type; its lower bounds follow its dimensions.
    unsafe {
        let array = pg_sys::pg_detoast_datum(datum.cast_mut_ptr()).cast::<pg_sys::ArrayType>();
        let dimensions = (*array).ndim;
        let lower = || *array.add(1).cast::<i32>().add(dimensions as usize);
        if dimensions > 1 || dimensions == 1 && lower() != 1 {
            return Err(PgError::new(
                "0A000",
                format!(
                    "column \"{}\" takes arrays of one dimension that start at 1 only",
                    target.name
                ),
            ));
        }
        pg_sys::deconstruct_array(
            array,
            type_oid,
            len,
            is_by_value,
            align as std::ffi::c_char,
            &mut datums,
            &mut nulls,
            &mut count,
        );
    }
    let items = (0..count as usize).map(|i| {
        // SAFETY: both arrays have `count` elements.
        unsafe {
            match *nulls.add(i) {
                true => Ok(None),
                false => element(target, element_type, *datums.add(i)).map(Some),
            }
        }
    });
    Ok(match ty {
        FieldType::BoolArray => Value::BoolArray(collect(items, |value| match value {
            Value::Bool(value) => Some(value),
            _ => None,
        })?),
        FieldType::Float8Array => Value::Float8Array(collect(items, |value| match value {
            Value::Float8(value) => Some(value),
            _ => None,
        })?),
        _ => Value::TextArray(collect(items, |value| match value {
            Value::Text(value) => Some(value),
            _ => None,
        })?),
    })
}

fn collect<'a, T>(
    items: impl Iterator<Item = Result<Option<Value<'a>>>>,
    inner: impl Fn(Value<'a>) -> Option<T>,
) -> Result<Vec<Option<T>>> {
    items.map(|item| Ok(item?.and_then(&inner))).collect()
}

/// The text form of a datum, in the current memory context.
///
/// # Safety
/// The datum is of the target's type; the text lives as long as the context.
unsafe fn text_form<'a>(target: &mut Target, datum: pg_sys::Datum) -> Result<&'a str> {
    let Some(output) = &mut target.output else {
        return Err(target.mismatch());
    };
    // SAFETY: the output function of the datum's own type gives NUL-terminated text.
    let text = unsafe { CStr::from_ptr(pg_sys::OutputFunctionCall(output, datum)) };
    text.to_str()
        .map_err(|_| PgError::new("22021", "value is not valid UTF-8 text"))
}

/// A timestamptz in microseconds since 1970, within the years 0001 to 9999.
#[inline]
fn timestamp(target: &Target, datum: pg_sys::Datum) -> Result<i64> {
    if target.ty != Some(FieldType::Timestamptz) {
        return Err(target.mismatch());
    }
    let micros = (datum.value() as i64).saturating_add(PG_EPOCH_US);
    in_range(target, (MIN_TIME_US..=MAX_TIME_US).contains(&micros))?;
    Ok(micros)
}

#[inline]
fn finite(target: &Target, is_finite: bool) -> Result<()> {
    if is_finite {
        return Ok(());
    }
    Err(PgError::new(
        "22023",
        format!("column \"{}\" takes neither NaN nor infinity", target.name),
    ))
}

#[inline]
fn in_range(target: &Target, is_in_range: bool) -> Result<()> {
    if is_in_range {
        return Ok(());
    }
    Err(PgError::new(
        "22008",
        format!("date or time out of range for column \"{}\"", target.name),
    )
    .hint("Events have dates of the years 0001 to 9999."))
}
