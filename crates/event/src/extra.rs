//! `_extra` of stored rows: what became a field or a column since they were written.
//!
//! A value of a field that did not exist when its row was stored is in the row's `_extra`; the reader gets it as
//! a column by [`promote`] and takes it out of `_extra` by [`merge_extra`]. A field that exists but is not a
//! column yet goes the other way: stored as a column, shown in `_extra`.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::builder::StringBuilder;
use arrow::array::{
    Array, ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};

use crate::coerce::coerce;
use crate::column::Column;
use crate::error::EventError;
use crate::json::{self, Cutter, Kind, ObjectWriter};
use crate::print::{self, to_json_text};
use crate::schema::{self, DroppedField, Field};

/// The values of fields that the rows' `_extra` holds under their names, as columns of the fields' Arrow types;
/// NULL where there is none or it does not fit.
pub fn promote(extra: &StringArray, fields: &[&Field]) -> Result<Vec<ArrayRef>, EventError> {
    let mut columns = fields
        .iter()
        .map(|field| Column::new(field.arrow().data_type()))
        .collect::<Result<Vec<_>, _>>()?;
    let positions: HashMap<&str, usize> = fields
        .iter()
        .enumerate()
        .map(|(at, field)| (field.name.as_str(), at))
        .collect();
    let keys = quoted_names(fields);
    let mut values: Vec<Option<&str>> = vec![None; fields.len()];
    for row in 0..extra.len() {
        let Some(text) = text_of(extra, row) else {
            continue;
        };
        if json::kind(text) != Kind::Object || !mentions(text, &keys) {
            continue;
        }
        values.fill(None);
        json::object_entries(text, |key, raw| {
            if let Some(&at) = positions.get(key) {
                values[at] = Some(raw);
            }
        })?;
        for (at, raw) in values.iter().enumerate() {
            let Some(raw) = raw.filter(|raw| *raw != "null") else {
                continue;
            };
            if let Ok(value) = coerce(raw, fields[at].ty, &mut Cutter::off()) {
                columns[at].append(row, value);
            }
        }
    }
    Ok(columns
        .into_iter()
        .map(|column| column.finish(extra.len()))
        .collect())
}

/// `_extra` as the foreign table shows it: without the values of `drop_if_fits`, fields that are columns now,
/// where they fit; with the values of `add`, fields that are not columns yet. NULL where nothing is left.
pub fn merge_extra(
    extra: &StringArray,
    drop_if_fits: &[&Field],
    add: &[(&Field, ArrayRef)],
) -> Result<StringArray, EventError> {
    let dropped: HashMap<&str, &Field> = drop_if_fits
        .iter()
        .map(|field| (field.name.as_str(), *field))
        .collect();
    let keys = quoted_names(drop_if_fits);
    let drops = |key: &str, raw: &str| {
        dropped
            .get(key)
            .is_some_and(|field| raw == "null" || coerce(raw, field.ty, &mut Cutter::off()).is_ok())
    };
    let mut out = StringBuilder::with_capacity(extra.len(), extra.value_data().len());
    let mut object = ObjectWriter::default();
    for row in 0..extra.len() {
        let text = text_of(extra, row);
        let adds = add.iter().any(|(_, array)| has(array, row));
        if !adds && !text.is_some_and(|text| mentions(text, &keys)) {
            out.append_option(text);
            continue;
        }
        merge_row(text, row, add, drops, &mut object)?;
        out.append_option(object.finish());
    }
    Ok(out.finish())
}

/// `_extra` without what it has under the names of fields that were dropped after the row's event.
pub fn strip(
    extra: &StringArray,
    xid: &Int64Array,
    received_at: &TimestampMicrosecondArray,
    dropped: &[DroppedField],
) -> Result<StringArray, EventError> {
    let keys: Vec<String> = dropped.iter().map(|field| quoted(&field.name)).collect();
    let mut out = StringBuilder::with_capacity(extra.len(), extra.value_data().len());
    let mut object = ObjectWriter::default();
    for row in 0..extra.len() {
        let text = text_of(extra, row);
        if !text.is_some_and(|text| mentions(text, &keys)) {
            out.append_option(text);
            continue;
        }
        let (xid, at) = (xid.value(row), received_at.value(row));
        let hidden = |key: &str, _raw: &str| {
            dropped
                .iter()
                .any(|field| field.name == key && field.hides(xid, at))
        };
        merge_row(text, row, &[], hidden, &mut object)?;
        out.append_option(object.finish());
    }
    Ok(out.finish())
}

/// `properties` of `_all`: every user column of the batch that is not NULL, under its name, merged with
/// `_extra`; `{}` where there is none. Fields that the batch has no column of are passed over.
pub fn properties(batch: &RecordBatch, fields: &[Field]) -> Result<StringArray, EventError> {
    const APART: [&str; 5] = [
        schema::TIME,
        schema::USER,
        schema::ID,
        schema::RECEIVED_AT,
        schema::EXTRA,
    ];
    let add: Vec<(&Field, ArrayRef)> = fields
        .iter()
        .filter(|field| !APART.contains(&field.name.as_str()))
        .filter_map(|field| {
            let column = batch.column_by_name(&field.name)?;
            Some((field, Arc::clone(column)))
        })
        .collect();
    let extra = batch.column_by_name(schema::EXTRA);
    let mut out = StringBuilder::new();
    let mut object = ObjectWriter::default();
    for row in 0..batch.num_rows() {
        let text = match extra {
            Some(extra) if !extra.is_null(row) => Some(json_of(extra, row)?),
            _ => None,
        };
        merge_row(text, row, &add, |_, _| false, &mut object)?;
        out.append_value(object.finish().unwrap_or("{}"));
    }
    Ok(out.finish())
}

/// Writes one row's `_extra` without what `drops`, and the values of `add`, which win over equal names.
fn merge_row(
    text: Option<&str>,
    row: usize,
    add: &[(&Field, ArrayRef)],
    drops: impl Fn(&str, &str) -> bool,
    object: &mut ObjectWriter,
) -> Result<(), EventError> {
    object.clear();
    match text {
        None => {}
        Some(text) if json::kind(text) == Kind::Object => {
            json::object_entries(text, |key, raw| {
                let added = || {
                    add.iter()
                        .any(|(field, array)| field.name == key && has(array, row))
                };
                if !drops(key, raw) && !added() {
                    object.key(key).push_str(raw);
                }
            })?;
        }
        // Only INSERT can store something else than an object; it keeps a name of its own.
        Some(text) => object.key(schema::EXTRA).push_str(text),
    }
    for (field, array) in add {
        if has(array, row) {
            to_json_text(array, field.ty, row, object.key(&field.name))?;
        }
    }
    Ok(())
}

fn has(array: &ArrayRef, row: usize) -> bool {
    row < array.len() && !array.is_null(row)
}

/// What is in a row's `_extra`, if anything.
fn text_of(extra: &StringArray, row: usize) -> Option<&str> {
    (!extra.is_null(row))
        .then(|| json::trim(extra.value(row)))
        .filter(|text| *text != "{}")
}

fn json_of(extra: &ArrayRef, row: usize) -> Result<&str, EventError> {
    print::text(extra, row).map(json::trim).ok_or_else(|| {
        let found = extra.data_type();
        EventError::Arrow(format!("_extra is stored as {found}"))
    })
}

/// The names as `_extra` spells its keys.
fn quoted_names(fields: &[&Field]) -> Vec<String> {
    fields.iter().map(|field| quoted(&field.name)).collect()
}

fn quoted(name: &str) -> String {
    let mut key = String::new();
    json::write_string(name, &mut key);
    key
}

/// Whether parsing is worth it: most rows mention none of the names.
fn mentions(text: &str, keys: &[String]) -> bool {
    keys.iter().any(|key| text.contains(key.as_str()))
}

#[cfg(test)]
mod tests;
