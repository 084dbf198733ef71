//! A row as an event's JSON: typed values in a form that the digest turns back into exactly the same values.

use std::fmt::Write;

use pgrx::{FromDatum, pg_sys};
use rakam_event::json;
use rakam_event::schema::{EXTRA, RECEIVED_AT, TIME};
use rakam_event::time::{self, MAX_TIME_US, MIN_TIME_US};
use rakam_event::types::FieldType;

use super::columns::Column;
use super::node;
use super::values::PG_EPOCH_DAYS;
use crate::pg::{PG_EPOCH_US, PgError, Result};

/// A column of the table that is written.
pub struct Target {
    pub attribute: usize,
    name: String,
    type_oid: pg_sys::Oid,
    ty: Option<FieldType>,
    role: Role,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Field,
    Time,
    ReceivedAt,
    Extra,
}

/// A row as an event.
#[derive(Debug, Default)]
pub struct Event {
    pub json: String,
    /// An explicit `_time`, in microseconds since 1970.
    pub time_us: Option<i64>,
    /// An explicit `_received_at`.
    pub received_at_us: Option<i64>,
}

impl Target {
    pub fn of(column: &Column) -> Self {
        Self {
            attribute: column.attnum as usize - 1,
            name: column.name.clone(),
            type_oid: column.type_oid,
            ty: column.field_type(),
            role: match column.name.as_str() {
                TIME => Role::Time,
                RECEIVED_AT => Role::ReceivedAt,
                EXTRA => Role::Extra,
                _ => Role::Field,
            },
        }
    }

    pub fn is_time(&self) -> bool {
        self.role == Role::Time
    }

    pub fn is_received_at(&self) -> bool {
        self.role == Role::ReceivedAt
    }
}

/// Writes a row as an event.
///
/// # Safety
/// `values` and `nulls` have an entry for every attribute, of the targets' types.
pub unsafe fn event(
    targets: &[Target],
    values: *const pg_sys::Datum,
    nulls: *const bool,
) -> Result<Event> {
    let mut event = Event::default();
    let mut object = Object::new();
    let mut extra = None;
    // SAFETY: as promised by the caller.
    let value = |target: &Target| unsafe {
        (!*nulls.add(target.attribute)).then(|| *values.add(target.attribute))
    };
    for target in targets {
        let Some(datum) = value(target) else { continue };
        match target.role {
            Role::Field => {
                // SAFETY: the datum is of the target's type.
                unsafe { field(target, datum, object.key(&target.name))? };
            }
            Role::Time => {
                let micros = timestamp(target, datum)?;
                event.time_us = Some(micros);
                timestamp_text(micros, object.key(&target.name));
            }
            Role::ReceivedAt => event.received_at_us = Some(timestamp(target, datum)?),
            // SAFETY: the datum is of the target's type.
            Role::Extra => extra = Some(unsafe { node::output(datum, target.type_oid) }),
        }
    }
    if let Some(extra) = extra {
        if json::kind(&extra) != json::Kind::Object {
            return Err(PgError::new("22023", "\"_extra\" must be an object"));
        }
        object.key(EXTRA).push_str(&extra);
    }
    event.json = object.finish();
    Ok(event)
}

/// A JSON object in the making.
struct Object(String);

impl Object {
    fn new() -> Self {
        Self("{".to_owned())
    }

    /// Writes a key; the value goes where it answers.
    fn key(&mut self, name: &str) -> &mut String {
        if self.0.len() > 1 {
            self.0.push(',');
        }
        json::write_string(name, &mut self.0);
        self.0.push(':');
        &mut self.0
    }

    fn finish(mut self) -> String {
        self.0.push('}');
        self.0
    }
}

unsafe fn field(target: &Target, datum: pg_sys::Datum, out: &mut String) -> Result<()> {
    let Some(ty) = target.ty else {
        return Err(PgError::new(
            "42804",
            format!("type mismatch for field \"{}\"", target.name),
        ));
    };
    match ty {
        FieldType::BoolArray | FieldType::Float8Array | FieldType::TextArray => {
            // SAFETY: the datum is an array of the target's type.
            unsafe { array(target, datum, out) }
        }
        // SAFETY: the datum is of the target's type.
        _ => unsafe { scalar(target, ty, target.type_oid, datum, out) },
    }
}

unsafe fn scalar(
    target: &Target,
    ty: FieldType,
    type_oid: pg_sys::Oid,
    datum: pg_sys::Datum,
    out: &mut String,
) -> Result<()> {
    match ty {
        FieldType::Bool => out.push_str(if datum.value() != 0 { "true" } else { "false" }),
        FieldType::Int4 => write_display(datum.value() as i32, out),
        FieldType::Int8 => write_display(datum.value() as i64, out),
        FieldType::Float4 => {
            let value = f32::from_bits(datum.value() as u32);
            finite(target, value.is_finite())?;
            // `e` notation is the shortest text that reads back as the same value, and JSON.
            write_debug(value, out);
        }
        FieldType::Float8 => {
            let value = f64::from_bits(datum.value() as u64);
            finite(target, value.is_finite())?;
            write_debug(value, out);
        }
        FieldType::Numeric { .. } => {
            // SAFETY: the datum is of this type.
            let text = unsafe { node::output(datum, type_oid) };
            finite(target, text.ends_with(|c: char| c.is_ascii_digit()))?;
            out.push_str(&text);
        }
        FieldType::Text => {
            // SAFETY: a text datum that is not NULL.
            let text = unsafe { String::from_datum(datum, false) };
            json::write_string(&text.unwrap_or_default(), out);
        }
        FieldType::Date => {
            let days = i64::from(datum.value() as i32);
            let days = days + i64::from(PG_EPOCH_DAYS);
            let micros = days.saturating_mul(time::MICROS_PER_DAY);
            in_range(target, (MIN_TIME_US..=MAX_TIME_US).contains(&micros))?;
            out.push('"');
            time::write_date(days, out);
            out.push('"');
        }
        FieldType::Timestamptz => timestamp_text(timestamp(target, datum)?, out),
        FieldType::Uuid | FieldType::Inet => {
            // SAFETY: the datum is of this type.
            json::write_string(&unsafe { node::output(datum, type_oid) }, out);
        }
        FieldType::Jsonb => {
            // SAFETY: the datum is of this type.
            out.push_str(&unsafe { node::output(datum, type_oid) });
        }
        FieldType::BoolArray | FieldType::Float8Array | FieldType::TextArray => {
            return Err(PgError::internal("an array within an array"));
        }
    }
    Ok(())
}

unsafe fn array(target: &Target, datum: pg_sys::Datum, out: &mut String) -> Result<()> {
    let (element, ty, len, by_value, align) = match target.ty {
        Some(FieldType::BoolArray) => (pg_sys::BOOLOID, FieldType::Bool, 1, true, b'c'),
        Some(FieldType::Float8Array) => (pg_sys::FLOAT8OID, FieldType::Float8, 8, true, b'd'),
        _ => (pg_sys::TEXTOID, FieldType::Text, -1, false, b'i'),
    };
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
        let (mut datums, mut nulls, mut count) = (std::ptr::null_mut(), std::ptr::null_mut(), 0);
        pg_sys::deconstruct_array(
            array,
            element,
            len,
            by_value,
            align as std::ffi::c_char,
            &mut datums,
            &mut nulls,
            &mut count,
        );
        out.push('[');
        for i in 0..count as usize {
            if i > 0 {
                out.push(',');
            }
            if *nulls.add(i) {
                out.push_str("null");
            } else {
                scalar(target, ty, element, *datums.add(i), out)?;
            }
        }
        out.push(']');
    }
    Ok(())
}

/// A timestamptz in microseconds since 1970, within the years 0001 to 9999.
fn timestamp(target: &Target, datum: pg_sys::Datum) -> Result<i64> {
    if target.ty != Some(FieldType::Timestamptz) {
        return Err(PgError::new(
            "42804",
            format!("type mismatch for field \"{}\"", target.name),
        ));
    }
    let micros = (datum.value() as i64).saturating_add(PG_EPOCH_US);
    in_range(target, (MIN_TIME_US..=MAX_TIME_US).contains(&micros))?;
    Ok(micros)
}

fn timestamp_text(micros: i64, out: &mut String) {
    out.push('"');
    time::write_timestamp(micros, out);
    out.push('"');
}

fn finite(target: &Target, is_finite: bool) -> Result<()> {
    if is_finite {
        return Ok(());
    }
    Err(PgError::new(
        "22023",
        format!("column \"{}\" takes neither NaN nor infinity", target.name),
    ))
}

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

fn write_display(value: impl std::fmt::Display, out: &mut String) {
    let _infallible = write!(out, "{value}");
}

fn write_debug(value: impl std::fmt::LowerExp, out: &mut String) {
    let _infallible = write!(out, "{value:e}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_so_that_they_read_back() {
        for value in [0.1, -0.0, 1e300, 5e-324, 123456789.125, f64::MAX] {
            let mut text = String::new();
            write_debug(value, &mut text);
            assert_eq!(
                text.parse::<f64>().map(f64::to_bits),
                Ok(value.to_bits()),
                "{text}"
            );
            assert!(serde_json::from_str::<f64>(&text).is_ok(), "{text}");
        }
    }
}
