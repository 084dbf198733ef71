//! Column statistics of a data file: what lets a query skip it.
//!
//! Bounds are in Iceberg's single-value form, so that the published tables carry the same bytes: integers, dates,
//! timestamps and floats little-endian, booleans one byte, text UTF-8, decimals big-endian two's complement in as few
//! bytes as hold them, uuids 16 bytes.

use arrow::array::{Array, ArrayRef, ArrowPrimitiveType, AsArray, RecordBatch};
use arrow::compute::{max, max_boolean, max_string, min, min_boolean, min_string};
use arrow::datatypes::{
    Date32Type, Decimal128Type, Float32Type, Float64Type, Int32Type, Int64Type,
    TimestampMicrosecondType,
};
use bytes::Bytes;
use parquet::basic::Type as PhysicalType;
use parquet::file::metadata::ParquetMetaData;
use rakam_event::schema::{Schema, XID_FIELD_ID};
use rakam_event::types::FieldType;

use crate::error::LakeError;
use crate::scalar::{from_minimal_be, to_minimal_be};
use crate::seal;
use crate::varint::{get_number, put_number};

const MAGIC: [u8; 4] = *b"RKS1";
const WHAT: &str = "file statistics";
/// Text bounds keep this many bytes.
const MAX_TEXT: usize = 64;

/// Statistics of one column of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColumnStat {
    pub field_id: i32,
    pub null_count: i64,
    /// NaNs are in neither bound.
    pub nan_count: i64,
    /// No value is smaller. `None`: not known, or there is no value.
    pub min: Option<Vec<u8>>,
    /// No value is greater. `None`: not known, or there is no value.
    pub max: Option<Vec<u8>>,
    /// Both bounds are values of the column (they are answers to `min` and `max`, not only limits).
    pub exact: bool,
}

impl ColumnStat {
    /// A column that has only NULLs: what a file says of a field that it does not have, if its `_extra` is empty too.
    pub fn all_null(field_id: i32, n: i64) -> Self {
        Self {
            field_id,
            null_count: n,
            nan_count: 0,
            min: None,
            max: None,
            exact: true,
        }
    }
}

/// Smallest and greatest value seen so far.
#[derive(Debug, Clone)]
enum Range {
    /// No bounds for this type.
    Unbounded,
    Bool(Option<(bool, bool)>),
    Int4(Option<(i32, i32)>),
    Int8(Option<(i64, i64)>),
    Float4(Option<(f32, f32)>),
    Float8(Option<(f64, f64)>),
    Numeric(Option<(i128, i128)>),
    Text(Option<(String, String)>),
    Uuid(Option<([u8; 16], [u8; 16])>),
}

fn widen<T: PartialOrd + Clone>(range: &mut Option<(T, T)>, low: T, high: T) {
    match range {
        None => *range = Some((low, high)),
        Some((min, max)) => {
            if low < *min {
                *min = low;
            }
            if high > *max {
                *max = high;
            }
        }
    }
}

fn widen_by<P>(range: &mut Option<(P::Native, P::Native)>, column: &ArrayRef) -> Option<()>
where
    P: ArrowPrimitiveType<Native: arrow::datatypes::ArrowNativeType + PartialOrd>,
{
    let column = column.as_primitive_opt::<P>()?;
    if let (Some(low), Some(high)) = (min(column), max(column)) {
        widen(range, low, high);
    }
    Some(())
}

impl Range {
    fn new(ty: FieldType) -> Self {
        match ty {
            FieldType::Bool => Self::Bool(None),
            FieldType::Int4 | FieldType::Date => Self::Int4(None),
            FieldType::Int8 | FieldType::Timestamptz => Self::Int8(None),
            FieldType::Float4 => Self::Float4(None),
            FieldType::Float8 => Self::Float8(None),
            FieldType::Numeric { .. } => Self::Numeric(None),
            FieldType::Text => Self::Text(None),
            FieldType::Uuid => Self::Uuid(None),
            // Their text order is not the order of their values.
            FieldType::Inet
            | FieldType::Jsonb
            | FieldType::BoolArray
            | FieldType::Float8Array
            | FieldType::TextArray => Self::Unbounded,
        }
    }

    /// Takes in a column; returns its NaNs, or `None` if it is of another type.
    fn update(&mut self, column: &ArrayRef) -> Option<i64> {
        let mut nans = 0;
        match self {
            Self::Unbounded => {}
            Self::Bool(range) => {
                let column = column.as_boolean_opt()?;
                if let (Some(low), Some(high)) = (min_boolean(column), max_boolean(column)) {
                    widen(range, low, high);
                }
            }
            Self::Int4(range) => {
                widen_by::<Int32Type>(range, column)
                    .or_else(|| widen_by::<Date32Type>(range, column))?;
            }
            Self::Int8(range) => {
                widen_by::<Int64Type>(range, column)
                    .or_else(|| widen_by::<TimestampMicrosecondType>(range, column))?;
            }
            // Arrow's min and max order NaNs among the values, and −0 below 0.
            Self::Float4(range) => {
                for value in column.as_primitive_opt::<Float32Type>()?.iter().flatten() {
                    if value.is_nan() {
                        nans += 1;
                    } else {
                        widen(range, value, value);
                    }
                }
            }
            Self::Float8(range) => {
                for value in column.as_primitive_opt::<Float64Type>()?.iter().flatten() {
                    if value.is_nan() {
                        nans += 1;
                    } else {
                        widen(range, value, value);
                    }
                }
            }
            Self::Numeric(range) => widen_by::<Decimal128Type>(range, column)?,
            Self::Text(range) => {
                let column = column.as_string_opt::<i32>()?;
                if let (Some(low), Some(high)) = (min_string(column), max_string(column)) {
                    match range {
                        None => *range = Some((low.to_owned(), high.to_owned())),
                        Some((min, max)) => {
                            if low < min.as_str() {
                                low.clone_into(min);
                            }
                            if high > max.as_str() {
                                high.clone_into(max);
                            }
                        }
                    }
                }
            }
            Self::Uuid(range) => {
                for value in column.as_fixed_size_binary_opt()?.iter().flatten() {
                    let value: [u8; 16] = value.try_into().ok()?;
                    widen(range, value, value);
                }
            }
        }
        Some(nans)
    }

    /// Takes in the bounds of a row group as Parquet keeps them. None: they are none of this type.
    fn widen_by_bytes(&mut self, min: &[u8], max: &[u8], stored: PhysicalType) -> Option<()> {
        fn array<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
            bytes.try_into().ok()
        }
        let number = |bytes: &[u8]| match stored {
            PhysicalType::INT32 => array(bytes).map(|b| i128::from(i32::from_le_bytes(b))),
            PhysicalType::INT64 => array(bytes).map(|b| i128::from(i64::from_le_bytes(b))),
            _ => from_minimal_be(bytes),
        };
        match self {
            Self::Unbounded => {}
            Self::Bool(range) => widen(range, array::<1>(min)? != [0], array::<1>(max)? != [0]),
            Self::Int4(range) => {
                widen(
                    range,
                    i32::from_le_bytes(array(min)?),
                    i32::from_le_bytes(array(max)?),
                );
            }
            Self::Int8(range) => {
                widen(
                    range,
                    i64::from_le_bytes(array(min)?),
                    i64::from_le_bytes(array(max)?),
                );
            }
            Self::Float4(range) => {
                widen(
                    range,
                    f32::from_le_bytes(array(min)?),
                    f32::from_le_bytes(array(max)?),
                );
            }
            Self::Float8(range) => {
                widen(
                    range,
                    f64::from_le_bytes(array(min)?),
                    f64::from_le_bytes(array(max)?),
                );
            }
            Self::Numeric(range) => widen(range, number(min)?, number(max)?),
            Self::Uuid(range) => widen(range, array(min)?, array(max)?),
            Self::Text(range) => {
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
                widen(range, text(min)?, text(max)?);
            }
        }
        Some(())
    }

    fn has_float_zero(&self) -> bool {
        match self {
            Self::Float4(Some((min, max))) => *min == 0.0 || *max == 0.0,
            Self::Float8(Some((min, max))) => *min == 0.0 || *max == 0.0,
            _ => false,
        }
    }

    /// The bounds' bytes and whether both are values of the column.
    fn bounds(self) -> (Option<Vec<u8>>, Option<Vec<u8>>, bool) {
        fn of<T>(
            range: Option<(T, T)>,
            bytes: impl Fn(T) -> Vec<u8>,
        ) -> (Option<Vec<u8>>, Option<Vec<u8>>, bool) {
            match range {
                Some((min, max)) => (Some(bytes(min)), Some(bytes(max)), true),
                None => (None, None, true),
            }
        }
        match self {
            Self::Unbounded => (None, None, false),
            Self::Bool(range) => of(range, |v| vec![u8::from(v)]),
            Self::Int4(range) => of(range, |v| v.to_le_bytes().to_vec()),
            Self::Int8(range) => of(range, |v| v.to_le_bytes().to_vec()),
            Self::Float4(range) => of(range, |v| v.to_le_bytes().to_vec()),
            Self::Float8(range) => of(range, |v| v.to_le_bytes().to_vec()),
            Self::Numeric(range) => of(range, to_minimal_be),
            Self::Uuid(range) => of(range, |v| v.to_vec()),
            Self::Text(None) => (None, None, true),
            Self::Text(Some((min, max))) => {
                let exact = min.len() <= MAX_TEXT && max.len() <= MAX_TEXT;
                (
                    Some(prefix(&min).as_bytes().to_vec()),
                    upper_bound(&max).map(String::into_bytes),
                    exact,
                )
            }
        }
    }
}

/// At most [`MAX_TEXT`] bytes, cut between characters.
fn prefix(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_TEXT)]
}

/// A short text that is not below this one: the prefix with its last character raised. `None` if none can be.
fn upper_bound(text: &str) -> Option<String> {
    if text.len() <= MAX_TEXT {
        return Some(text.to_owned());
    }
    let mut bound = prefix(text).to_owned();
    while let Some(last) = bound.pop() {
        // UTF-8 orders as code points do; the surrogates between these two are no characters.
        let next = match last {
            '\u{d7ff}' => Some('\u{e000}'),
            other => char::from_u32(u32::from(other) + 1),
        };
        if let Some(next) = next {
            bound.push(next);
            return Some(bound);
        }
    }
    None
}

/// Gathers the statistics of a file while its batches are written.
#[derive(Debug)]
pub struct StatsBuilder {
    columns: Vec<(ColumnStat, Range)>,
}

impl StatsBuilder {
    /// For batches that follow `schema.arrow()`.
    pub fn new(schema: &Schema) -> Self {
        let columns: Vec<(i32, FieldType)> = schema
            .fields
            .iter()
            .map(|field| (field.id, field.ty))
            .chain([(XID_FIELD_ID, FieldType::Int8)])
            .collect();
        Self::of(&columns)
    }

    /// For columns of these ids and types.
    pub fn of(columns: &[(i32, FieldType)]) -> Self {
        let columns = columns
            .iter()
            .map(|&(id, ty)| (ColumnStat::all_null(id, 0), Range::new(ty)))
            .collect();
        Self { columns }
    }

    pub fn update(&mut self, batch: &RecordBatch) -> Result<(), LakeError> {
        self.update_columns(batch.columns())
    }

    /// As [`Self::update`], with the columns of a batch.
    pub fn update_columns(&mut self, columns: &[ArrayRef]) -> Result<(), LakeError> {
        if columns.len() != self.columns.len() {
            return Err(LakeError::encode(WHAT, "the batch has another schema"));
        }
        for ((stat, range), column) in self.columns.iter_mut().zip(columns) {
            stat.null_count += column.null_count() as i64;
            if column.null_count() < column.len() {
                stat.nan_count += range.update(column).ok_or_else(|| {
                    let reason = format!("field {} is {}", stat.field_id, column.data_type());
                    LakeError::encode(WHAT, reason)
                })?;
            }
        }
        Ok(())
    }

    pub fn finish(self) -> Vec<ColumnStat> {
        self.columns
            .into_iter()
            .map(|(stat, range)| {
                let (min, max, exact) = range.bounds();
                ColumnStat {
                    min,
                    max,
                    exact,
                    ..stat
                }
            })
            .collect()
    }
}

/// A column of a finished file: its field, and what Parquet's statistics leave out.
#[derive(Debug, Clone, Copy)]
pub struct FileColumn {
    pub field_id: i32,
    pub ty: FieldType,
    /// Where it has one: arrays have none of their own.
    pub null_count: Option<i64>,
    pub nan_count: i64,
}

/// The statistics of a file from its own metadata, as [`StatsBuilder`] gave them when it was written (but that the bounds
/// of long texts may differ, and a float's bound of zero is a limit only). `columns` are those of the file, in its order.
pub fn of_file(
    metadata: &ParquetMetaData,
    columns: &[FileColumn],
) -> Result<Vec<ColumnStat>, LakeError> {
    let malformed = |reason: String| LakeError::corrupt(WHAT, reason);
    let descriptor = metadata.file_metadata().schema_descr();
    let mut found: Vec<(ColumnStat, Range, bool)> = columns
        .iter()
        .map(|column| {
            let mut stat = ColumnStat::all_null(column.field_id, 0);
            stat.null_count = column.null_count.unwrap_or(0);
            stat.nan_count = column.nan_count;
            (stat, Range::new(column.ty), true)
        })
        .collect();
    for group in metadata.row_groups() {
        for (leaf, chunk) in group.columns().iter().enumerate() {
            let root = descriptor.get_column_root_idx(leaf);
            let (Some(column), Some((stat, range, exact))) =
                (columns.get(root), found.get_mut(root))
            else {
                return Err(malformed(format!("column {root} is no field")));
            };
            let Some(known) = chunk.statistics() else {
                return Err(malformed(format!("field {} has none", stat.field_id)));
            };
            if column.null_count.is_none() {
                stat.null_count += known.null_count_opt().unwrap_or(0) as i64;
            }
            if let (Some(min), Some(max)) = (known.min_bytes_opt(), known.max_bytes_opt()) {
                range
                    .widen_by_bytes(min, max, known.physical_type())
                    .ok_or_else(|| malformed(format!("bounds of field {}", stat.field_id)))?;
                *exact &= known.min_is_exact() && known.max_is_exact();
            }
        }
    }
    Ok(found
        .into_iter()
        .map(|(stat, range, are_values)| {
            // A zero's sign is not kept.
            let has_zero = range.has_float_zero();
            let (min, max, exact) = range.bounds();
            ColumnStat {
                min,
                max,
                exact: exact && are_values && !has_zero,
                ..stat
            }
        })
        .collect())
}

const HAS_MIN: u8 = 1;
const HAS_MAX: u8 = 2;
const EXACT: u8 = 4;

/// The statistics of a file as the manifest keeps them.
pub fn encode(stats: &[ColumnStat]) -> Vec<u8> {
    let mut out = seal::start(24 * stats.len());
    put_number(&mut out, stats.len() as u64);
    for stat in stats {
        put_number(&mut out, u64::from(stat.field_id as u32));
        put_number(&mut out, stat.null_count as u64);
        put_number(&mut out, stat.nan_count as u64);
        let flag = |set: bool, flag: u8| if set { flag } else { 0 };
        out.push(
            flag(stat.min.is_some(), HAS_MIN)
                | flag(stat.max.is_some(), HAS_MAX)
                | flag(stat.exact, EXACT),
        );
        for bound in stat.min.iter().chain(&stat.max) {
            put_number(&mut out, bound.len() as u64);
            out.extend_from_slice(bound);
        }
    }
    seal::seal(out, MAGIC)
}

/// Reads what [`encode`] wrote.
pub fn decode(bytes: &[u8]) -> Result<Vec<ColumnStat>, LakeError> {
    let payload = seal::open(Bytes::copy_from_slice(bytes), MAGIC, WHAT)?;
    let mut rest = &payload[..];
    read_all(&mut rest)
        .filter(|_| rest.is_empty())
        .ok_or_else(|| LakeError::corrupt(WHAT, "malformed"))
}

fn read_all(rest: &mut &[u8]) -> Option<Vec<ColumnStat>> {
    let n = usize::try_from(get_number(rest)?).ok()?;
    // An entry takes four bytes at least: no count makes us allocate more than the input warrants.
    let mut stats = Vec::with_capacity(n.min(rest.len() / 4));
    for _ in 0..n {
        let field_id = u32::try_from(get_number(rest)?).ok()? as i32;
        let null_count = i64::try_from(get_number(rest)?).ok()?;
        let nan_count = i64::try_from(get_number(rest)?).ok()?;
        let flags = *rest.split_off_first()?;
        let mut bound = |flag: u8| -> Option<Option<Vec<u8>>> {
            if flags & flag == 0 {
                return Some(None);
            }
            let length = usize::try_from(get_number(rest)?).ok()?;
            Some(Some(rest.split_off(..length)?.to_vec()))
        };
        stats.push(ColumnStat {
            field_id,
            null_count,
            nan_count,
            min: bound(HAS_MIN)?,
            max: bound(HAS_MAX)?,
            exact: flags & EXACT != 0,
        });
    }
    Some(stats)
}

#[cfg(test)]
mod tests;
