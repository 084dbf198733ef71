//! How many rows of a Parquet file are read, and handed on, at a time.

use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef};
use arrow::error::ArrowError;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReader;
use parquet::basic::{Encoding, Type as PhysicalType};
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData};
use parquet::schema::types::ColumnDescriptor;

use crate::parquet_pages::Account;

/// A view of a text.
const VIEW_BYTES: u64 = 16;
/// What the reader keeps of each value of a list beside it: its levels.
const LEVELS_BYTES: u64 = 4;
/// Rows that are decoded at a time where texts are written out, in all such columns together; and of one at least.
const WRITTEN_ROWS: usize = 64;
const WRITTEN_ROWS_MIN: usize = 4;
/// What the reader takes for the texts of such a column each time, however short they are.
const WRITTEN_BYTES: u64 = 4096;

/// Texts of a row are no longer, written out.
const ROW_BYTES_MAX: u64 = 256 << 20;

/// Rows that are handed on at a time, and their bytes as plain columns. One row may have more.
#[derive(Debug, Clone, Copy)]
pub struct Bound {
    pub rows: usize,
    pub bytes: u64,
}

impl Bound {
    /// How many rows of this size it allows, at least one.
    pub fn rows_of(self, row_bytes: u64) -> usize {
        usize::try_from(self.bytes / row_bytes.max(1))
            .unwrap_or(self.rows)
            .clamp(1, self.rows)
    }
}

/// The schema of a file with its texts as views.
pub fn with_views(schema: &SchemaRef) -> SchemaRef {
    let fields: Vec<FieldRef> = schema.fields().iter().map(viewed).collect();
    Arc::new(Schema::new_with_metadata(fields, schema.metadata().clone()))
}

fn viewed(field: &FieldRef) -> FieldRef {
    let ty = match field.data_type() {
        DataType::List(item) => DataType::List(viewed(item)),
        DataType::LargeList(item) => DataType::LargeList(viewed(item)),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(viewed).collect()),
        DataType::Map(entries, sorted) => DataType::Map(viewed(entries), *sorted),
        ty => match view(ty) {
            Some(view) => view,
            None => return Arc::clone(field),
        },
    };
    Arc::new(Field::clone(field).with_data_type(ty))
}

fn view(ty: &DataType) -> Option<DataType> {
    match ty {
        DataType::Utf8 | DataType::LargeUtf8 => Some(DataType::Utf8View),
        DataType::Binary | DataType::LargeBinary => Some(DataType::BinaryView),
        DataType::Dictionary(_, value) => view(value),
        _ => None,
    }
}

/// About the bytes of memory that reading a row takes, on an average of the row group with the longest: what the footer
/// says of the columns before compression, or what their values take when they are not encoded.
pub fn row_bytes(metadata: &ParquetMetaData, groups: &[usize], mask: &ProjectionMask) -> u64 {
    let group_rows = |group: usize| {
        let group = metadata.row_group(group);
        let columns = group.columns().iter().enumerate();
        let bytes = columns
            .filter(|(leaf, _)| mask.leaf_included(*leaf))
            .map(|(_, column)| {
                let values = column.num_values().max(0).unsigned_abs();
                let plain = values.saturating_mul(value_bytes(column.column_descr()));
                plain.max(column.uncompressed_size().max(0).unsigned_abs())
            })
            .fold(0, u64::saturating_add);
        bytes / group.num_rows().max(1).unsigned_abs()
    };
    groups
        .iter()
        .map(|&group| group_rows(group))
        .max()
        .unwrap_or(0)
}

/// Whether texts of a column may be written out whatever is done: those that are made one of the other (DELTA_BYTE_ARRAY) lie
/// nowhere in the file for a view to show, so that each may be as long as all that the page has.
pub fn is_written_out(column: &ColumnChunkMetaData) -> bool {
    column.column_type() == PhysicalType::BYTE_ARRAY
        && column.encodings_mask().is_set(Encoding::DELTA_BYTE_ARRAY)
}

/// How rows are decoded.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Of a batch,
    pub rows: usize,
    /// and of its parts.
    pub at_once: usize,
    /// What a part takes beside its values.
    pub part_bytes: u64,
}

impl Pace {
    pub fn new(
        metadata: &ParquetMetaData,
        groups: &[usize],
        mask: &ProjectionMask,
        rows: usize,
    ) -> Self {
        let written_out = |group: usize| {
            let columns = metadata.row_group(group).columns().iter().enumerate();
            columns
                .filter(|(leaf, column)| mask.leaf_included(*leaf) && is_written_out(column))
                .count()
        };
        let columns = groups.iter().map(|&group| written_out(group)).max();
        let columns = columns.unwrap_or(0);
        Self {
            rows,
            at_once: match columns {
                0 => rows,
                columns => rows.min((WRITTEN_ROWS / columns).max(WRITTEN_ROWS_MIN)),
            },
            part_bytes: columns as u64 * WRITTEN_BYTES,
        }
    }
}

/// The bytes of a value in memory, but for the text that a view shows.
pub fn value_bytes(column: &ColumnDescriptor) -> u64 {
    let own = match column.physical_type() {
        PhysicalType::BOOLEAN => 1,
        PhysicalType::INT32 | PhysicalType::FLOAT => 4,
        PhysicalType::INT64 | PhysicalType::DOUBLE | PhysicalType::INT96 => 8,
        PhysicalType::BYTE_ARRAY => VIEW_BYTES,
        PhysicalType::FIXED_LEN_BYTE_ARRAY => column.type_length().max(0).unsigned_abs().into(),
    };
    match column.max_rep_level() {
        0 => own,
        _ => own + LEVELS_BYTES,
    }
}

/// The rows of a file, as many at a time as its bound allows.
pub struct Batches {
    reader: ParquetRecordBatchReader,
    bound: Bound,
    row_bytes: u64,
    pace: Pace,
    account: Account,
    /// Rows that are handed on at a time.
    most: usize,
    /// What has been read and not been handed on.
    rest: Option<Rest>,
}

struct Rest {
    batch: RecordBatch,
    /// The bytes of each row's texts.
    lengths: Vec<u64>,
    at: usize,
}

impl Batches {
    /// `reader` decodes as many rows at a time as `pace` says, and `account` is that of its pages.
    pub fn new(
        reader: ParquetRecordBatchReader,
        bound: Bound,
        row_bytes: u64,
        pace: Pace,
        account: &Account,
    ) -> Self {
        Self {
            reader,
            bound,
            row_bytes,
            pace,
            account: account.clone(),
            most: bound.rows,
            rest: None,
        }
    }

    /// As [`row_bytes`] says.
    pub fn row_bytes(&self) -> u64 {
        self.row_bytes
    }

    /// Hands so many rows on at a time from now on, and no more than the bound allows.
    pub fn hand_on(&mut self, rows: usize) {
        self.most = rows.clamp(1, self.bound.rows);
    }

    /// About what rows of the file take, written out.
    pub fn bytes_of(&self, batch: &RecordBatch) -> u64 {
        let fixed = self.row_bytes.saturating_mul(batch.num_rows() as u64);
        fixed.saturating_add(lengths_of(batch).iter().sum())
    }

    /// About the memory that the next call of [`Self::next`] needs, as the footer has it.
    pub fn next_bytes(&self) -> u64 {
        self.row_bytes
            .saturating_mul(self.bound.rows_of(self.row_bytes) as u64)
    }

    pub fn next(&mut self) -> Option<Result<RecordBatch, ArrowError>> {
        let mut rest = match self.rest.take() {
            Some(rest) => rest,
            None => match self.read() {
                Ok(rest) => rest?,
                Err(error) => return Some(Err(error)),
            },
        };
        let next = rest.next(self.bound.bytes, self.most);
        self.rest = (rest.at < rest.batch.num_rows()).then_some(rest);
        Some(next)
    }

    /// Decodes the next rows, part by part, until there are as many as a batch may have, or their texts are.
    fn read(&mut self) -> Result<Option<Rest>, ArrowError> {
        let Pace {
            rows,
            at_once,
            part_bytes,
        } = self.pace;
        self.account.next_batch();
        let (mut parts, mut lengths) = (Vec::new(), Vec::new());
        let mut bytes: u64 = 0;
        while parts.is_empty() || lengths.len() + at_once <= rows && bytes < self.bound.bytes {
            let Some(part) = self.reader.next().transpose()? else {
                break;
            };
            let of_part = lengths_of(&part);
            bytes = bytes.saturating_add(part_bytes);
            bytes = bytes.saturating_add(of_part.iter().sum());
            lengths.extend(of_part);
            parts.push(part);
        }
        let batch = match &parts[..] {
            [] => return Ok(None),
            [part] => part.clone(),
            [first, ..] => concat_batches(&first.schema(), &parts)?,
        };
        Ok(Some(Rest {
            batch,
            lengths,
            at: 0,
        }))
    }
}

/// The bytes of each row's texts.
fn lengths_of(batch: &RecordBatch) -> Vec<u64> {
    let mut lengths = vec![0; batch.num_rows()];
    for column in batch.columns() {
        add_lengths(column, &mut lengths);
    }
    lengths
}

impl Rest {
    /// The rows from the first on whose texts are of so many bytes, at least one and at most `rows`. An error if that one is too long
    /// to be written out: a list may show a text that the file has once any number of times.
    fn next(&mut self, bytes: u64, rows: usize) -> Result<RecordBatch, ArrowError> {
        if self.lengths[self.at] > ROW_BYTES_MAX {
            return Err(ArrowError::ParseError(format!(
                "the texts of a row are longer than {ROW_BYTES_MAX} bytes"
            )));
        }
        let mut sum: u64 = 0;
        let fitting = self.lengths[self.at..]
            .iter()
            .take(rows)
            .take_while(|&&length| {
                sum = sum.saturating_add(length);
                sum <= bytes
            })
            .count();
        let rows = fitting.max(1).min(self.batch.num_rows() - self.at);
        let next = self.batch.slice(self.at, rows);
        self.at += rows;
        Ok(next)
    }
}

/// Adds for each row the bytes of the texts that its views show.
fn add_lengths(array: &dyn Array, lengths: &mut [u64]) {
    match array.data_type() {
        DataType::Utf8View => {
            let texts = array.as_string_view();
            for (row, length) in lengths.iter_mut().enumerate() {
                *length += u64::from(view_length(texts.views()[row]));
            }
        }
        DataType::BinaryView => {
            let texts = array.as_binary_view();
            for (row, length) in lengths.iter_mut().enumerate() {
                *length += u64::from(view_length(texts.views()[row]));
            }
        }
        DataType::Struct(_) => {
            for column in array.as_struct().columns() {
                add_lengths(column, lengths);
            }
        }
        DataType::List(item) if has_views(item.data_type()) => {
            let list = array.as_list::<i32>();
            add_items(list.values(), list.value_offsets(), lengths);
        }
        DataType::LargeList(item) if has_views(item.data_type()) => {
            let list = array.as_list::<i64>();
            add_items(list.values(), list.value_offsets(), lengths);
        }
        DataType::Map(entries, _) if has_views(entries.data_type()) => {
            let map = array.as_map();
            add_items(map.entries(), map.value_offsets(), lengths);
        }
        _ => {}
    }
}

/// A view begins with the length of its text; that of a NULL is zero.
fn view_length(view: u128) -> u32 {
    view as u32
}

fn add_items<O: Copy + TryInto<usize>>(items: &dyn Array, offsets: &[O], lengths: &mut [u64]) {
    let mut of_items = vec![0; items.len()];
    add_lengths(items, &mut of_items);
    let offset = |row: usize| offsets[row].try_into().unwrap_or(0);
    for (row, length) in lengths.iter_mut().enumerate() {
        *length += of_items[offset(row)..offset(row + 1)].iter().sum::<u64>();
    }
}

fn has_views(ty: &DataType) -> bool {
    match ty {
        DataType::Utf8View | DataType::BinaryView => true,
        DataType::List(item) | DataType::LargeList(item) => has_views(item.data_type()),
        DataType::Map(entries, _) => has_views(entries.data_type()),
        DataType::Struct(fields) => fields.iter().any(|field| has_views(field.data_type())),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
