//! Records in our own Avro framing as rows of their collection, whatever version of its schema they were written with.
//!
//! Rows come out of the decoder typed. What only collect would look at (a time outside of the bounds, a string that is too
//! long) is rare: such a row is written as text and goes the way of text, so that the rules are in one place.

use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use arrow::array::types::TimestampMicrosecondType;
use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Int64Array, OffsetSizeTrait, RecordBatch,
    TimestampMicrosecondArray,
};
use arrow::compute::filter_record_batch;
use arrow::datatypes::DataType;
use arrow::error::ArrowError;
use rakam_event::avro::{self, AvroError, AvroField};
use rakam_event::batch::{BatchBuilder, EventStamp, Layout};
use rakam_event::entry::{self, MAX_ID_BYTES};
use rakam_event::error::EventError;
use rakam_event::print;
use rakam_event::schema::{EXTRA, ID, RECEIVED_AT, Schema, TIME, XID};

use crate::batch::Batch;
use crate::columns::{Columns, Part, Rules};
use crate::decode::{DeadLetter, DecodeError, Framed};

/// Fields of versions of a collection's schema, as [`avro::parse_schema`] gives them.
pub type Versions = HashMap<u32, Vec<AvroField>>;

/// Rows as they were sent.
#[derive(Debug)]
pub struct Rows {
    /// The columns of the schema's fields, in their order.
    rows: RecordBatch,
    /// Of each row: an index into [`Batch::records`].
    pub records: Vec<usize>,
    pub dead: Vec<DeadLetter>,
}

/// Rows as text.
#[derive(Debug)]
pub struct Lines {
    /// Each with its record.
    pub lines: Vec<(usize, String)>,
    pub dead: Vec<DeadLetter>,
}

/// Decodes records of one collection.
pub fn decode(
    framed: &[Framed],
    batch: &Batch,
    collection: &str,
    schema: &Schema,
    versions: &Versions,
) -> Result<Rows, AvroError> {
    let attempt = |framed: &[Framed], spoilers: &HashSet<usize>| {
        try_decode(framed, batch, collection, schema, versions, spoilers)
    };
    let mut spoilers = HashSet::new();
    loop {
        match attempt(framed, &spoilers)? {
            Ok(rows) => return Ok(rows),
            // The decoder cannot be trusted any more, and there may be more such records.
            Err(spoiler) => {
                spoilers.insert(spoiler);
                for one in framed {
                    if attempt(std::slice::from_ref(one), &spoilers)?.is_err() {
                        spoilers.insert(one.record);
                    }
                }
            }
        }
    }
}

/// `Err` within is the record that the decoder choked on.
fn try_decode(
    framed: &[Framed],
    batch: &Batch,
    collection: &str,
    schema: &Schema,
    versions: &Versions,
    spoilers: &HashSet<usize>,
) -> Result<Result<Rows, usize>, AvroError> {
    let mut decoder = avro::Decoder::new(schema);
    for (&version, fields) in versions {
        decoder.add_version(version, fields.clone())?;
    }
    let (mut records, mut dead) = (Vec::with_capacity(framed.len()), Vec::new());
    for &Framed {
        record, version, ..
    } in framed
    {
        let value = batch
            .records()
            .get(record)
            .and_then(|record| batch.value(record))
            .unwrap_or_default();
        let error = match spoilers.contains(&record) {
            true => DecodeError::Crashed,
            false => match catch_unwind(AssertUnwindSafe(|| decoder.push(value))) {
                Ok(Ok(())) => {
                    records.push(record);
                    continue;
                }
                Ok(Err(AvroError::UnknownVersion(_))) => DecodeError::UnknownVersion {
                    collection: collection.to_owned(),
                    version,
                },
                Ok(Err(AvroError::NotFramed)) => DecodeError::NotFramed,
                Ok(Err(AvroError::Malformed(reason))) => DecodeError::Avro(reason.to_owned()),
                Ok(Err(_)) | Err(_) => return Ok(Err(record)),
            },
        };
        dead.push(DeadLetter { record, error });
    }
    Ok(Ok(Rows {
        rows: decoder.finish()?,
        records,
        dead,
    }))
}

impl Rows {
    /// A row as the JSON of an event, with the time of its record if it has no `_time`.
    fn write(
        &self,
        row: usize,
        schema: &Schema,
        batch: &Batch,
        out: &mut String,
    ) -> Result<(), EventError> {
        let start = out.len();
        print::write_row(&self.rows, schema, row, out)?;
        let has_time = time_column(&self.rows).is_some_and(|times| times.is_valid(row));
        let written = (batch.records().get(self.records[row])).and_then(|r| r.timestamp_ms);
        if let (Some(written), false) = (written, has_time) {
            out.pop();
            if out.len() > start + 1 {
                out.push(',');
            }
            out.push_str("\"_time\":");
            print::write_int(written, out);
            out.push('}');
        }
        Ok(())
    }

    /// The rows as lines of text: for the inbox, whose digest looks at their values.
    pub fn lines(mut self, rules: &Rules<'_>, batch: &Batch) -> Result<Lines, EventError> {
        let mut lines = Vec::with_capacity(self.records.len());
        for (row, &record) in self.records.iter().enumerate() {
            let mut line = String::new();
            self.write(row, rules.schema, batch, &mut line)?;
            match entry::check_row(&line, &rules.limits) {
                Ok(line) => lines.push((record, line.into_owned())),
                Err(error) => {
                    let error = error.into();
                    self.dead.push(DeadLetter { record, error });
                }
            }
        }
        Ok(Lines {
            lines,
            dead: self.dead,
        })
    }

    /// The rows in the stored layout.
    pub fn columns(self, rules: &Rules<'_>, batch: &Batch) -> Result<Columns, EventError> {
        let failed = |error: ArrowError| EventError::Arrow(error.to_string());
        let times = self.times(&rules.stamp, batch);
        let careful = self.careful(rules, &times);
        let mut done = Columns::default();
        let mut builder = BatchBuilder::new(rules.schema, Layout::Stored, &rules.limits)?;
        let mut records = Vec::new();
        for row in (0..self.records.len()).filter(|&row| careful[row]) {
            let record = self.records[row];
            let mut text = String::new();
            self.write(row, rules.schema, batch, &mut text)?;
            let pushed = entry::check_row(&text, &rules.limits)
                .and_then(|text| builder.push(&text, &rules.stamp));
            match pushed {
                Ok(()) => records.push(record),
                Err(error) => {
                    let error = error.into();
                    done.dead.push(DeadLetter { record, error });
                }
            }
        }
        let plain: Vec<usize> = (self.records.iter().zip(&careful))
            .filter_map(|(&record, careful)| (!careful).then_some(record))
            .collect();
        if !plain.is_empty() {
            let rows = self.stored(rules, times).map_err(failed)?;
            let mask: BooleanArray = careful.iter().map(|careful| Some(!careful)).collect();
            let rows = match plain.len() == self.records.len() {
                true => rows,
                false => filter_record_batch(&rows, &mask).map_err(failed)?,
            };
            done.parts.push(Part {
                rows,
                records: plain,
            });
        }
        if !records.is_empty() {
            let built = builder.finish()?;
            done.invalid.extend(built.invalid, built.invalid_counts);
            done.parts.push(Part {
                rows: built.batch,
                records,
            });
        }
        done.dead.extend(self.dead);
        Ok(done)
    }

    /// When each event happened.
    fn times(&self, stamp: &EventStamp, batch: &Batch) -> Vec<i64> {
        let times = time_column(&self.rows);
        let time = |(row, &record): (usize, &usize)| {
            let own = times.filter(|t| t.is_valid(row)).map(|t| t.value(row));
            let written = || batch.records().get(record)?.timestamp_ms;
            own.or_else(|| Some(written()?.saturating_mul(1_000)))
                .unwrap_or(stamp.received_at_us)
        };
        self.records.iter().enumerate().map(time).collect()
    }

    /// Which rows collect would have something to say about.
    fn careful(&self, rules: &Rules<'_>, times: &[i64]) -> Vec<bool> {
        let mut careful: Vec<bool> = times.iter().map(|&t| !rules.stamp.takes(t)).collect();
        for (field, column) in rules.schema.fields.iter().zip(self.rows.columns()) {
            let most = match field.name.as_str() {
                ID => MAX_ID_BYTES.min(rules.limits.max_string_bytes),
                _ => rules.limits.max_string_bytes,
            };
            mark_long(column, most, &mut careful);
            if let (EXTRA, Some(extra)) = (field.name.as_str(), column.as_string_opt::<i32>()) {
                for (row, careful) in careful.iter_mut().enumerate() {
                    *careful |= extra.is_valid(row) && !extra.value(row).starts_with('{');
                }
            }
        }
        careful
    }

    /// The columns of the stored layout: what the server sets is set.
    fn stored(&self, rules: &Rules<'_>, times: Vec<i64>) -> Result<RecordBatch, ArrowError> {
        let rows = self.records.len();
        let stamp = &rules.stamp;
        let layout = rules.schema.arrow();
        let columns = layout
            .fields()
            .iter()
            .enumerate()
            .map(|(position, field)| -> Result<ArrayRef, ArrowError> {
                let at = |times: TimestampMicrosecondArray| -> ArrayRef {
                    Arc::new(times.with_data_type(field.data_type().clone()))
                };
                Ok(match field.name().as_str() {
                    TIME => at(TimestampMicrosecondArray::from(times.clone())),
                    RECEIVED_AT => at(TimestampMicrosecondArray::from_value(
                        stamp.received_at_us,
                        rows,
                    )),
                    XID => Arc::new(Int64Array::from_value(stamp.xid, rows)),
                    _ => arrow::compute::cast(self.rows.column(position), field.data_type())?,
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        RecordBatch::try_new(layout, columns)
    }
}

fn time_column(rows: &RecordBatch) -> Option<&TimestampMicrosecondArray> {
    rows.column_by_name(TIME)?
        .as_primitive_opt::<TimestampMicrosecondType>()
}

/// Marks the rows that have a string of more bytes, in themselves or as an element.
fn mark_long(column: &ArrayRef, most: usize, marks: &mut [bool]) {
    fn long<O: OffsetSizeTrait>(offsets: &[O], most: usize) -> impl Iterator<Item = usize> {
        (0..offsets.len().saturating_sub(1))
            .filter(move |&at| (offsets[at + 1] - offsets[at]).as_usize() > most)
    }
    match column.data_type() {
        DataType::Utf8 => {
            let offsets = column.as_string::<i32>().value_offsets();
            long(offsets, most).for_each(|row| marks[row] = true);
        }
        DataType::List(_) => {
            let lists = column.as_list::<i32>();
            let Some(items) = lists.values().as_string_opt::<i32>() else {
                return;
            };
            for item in long(items.value_offsets(), most) {
                let row = lists
                    .value_offsets()
                    .partition_point(|&start| (start as usize) <= item);
                if let Some(mark) = row.checked_sub(1).and_then(|row| marks.get_mut(row)) {
                    *mark = true;
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests;
