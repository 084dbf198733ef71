//! Numbers and times of a chunk in as few bytes a value as they need: their distance from the least of them, in one, two
//! or four bytes.
//!
//! Most are small or close to each other. LZ4 finds that in eight bytes a value, too, but takes several times as long for
//! it, and leaves twice as much.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::types::{
    ArrowPrimitiveType, Date32Type, Float64Type, Int32Type, Int64Type, TimestampMicrosecondType,
    UInt8Type, UInt16Type, UInt32Type,
};
use arrow::array::{Array, ArrayRef, AsArray, PrimitiveArray, RecordBatch, RecordBatchOptions};
use arrow::buffer::{NullBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, Field, Schema};
use arrow::error::ArrowError;
use rakam_event::types::FieldType;

use crate::error::LakeError;

const WHAT: &str = "chunk";
/// Metadata of a narrow column: what it was, the value of 0, and the distance of 1.
const TYPE: &str = "rakam.type";
const BASE: &str = "rakam.base";
const UNIT: &str = "rakam.unit";
/// Times are often of whole minutes, seconds or milliseconds.
const TIME_UNITS: [i64; 4] = [60_000_000, 1_000_000, 1_000, 1];

/// What can be narrow, with its name in the metadata.
const KINDS: [(&str, FieldType); 5] = [
    ("int4", FieldType::Int4),
    ("int8", FieldType::Int8),
    ("float8", FieldType::Float8),
    ("date", FieldType::Date),
    ("timestamptz", FieldType::Timestamptz),
];

/// The batch with narrow columns where that is possible, for [`widen`].
pub(crate) fn narrow(batch: &RecordBatch) -> Result<RecordBatch, ArrowError> {
    let schema = batch.schema();
    let mut fields = schema.fields().to_vec();
    let mut columns = batch.columns().to_vec();
    for (field, column) in fields.iter_mut().zip(&mut columns) {
        let kind = KINDS
            .iter()
            .find(|(_, ty)| ty.arrow() == *column.data_type());
        if let Some(&(name, ty)) = kind
            && let Some(narrow) = narrow_column(column, ty)
        {
            let mut metadata = field.metadata().clone();
            metadata.insert(TYPE.to_owned(), name.to_owned());
            metadata.insert(BASE.to_owned(), narrow.base.to_string());
            metadata.insert(UNIT.to_owned(), narrow.unit.to_string());
            let ty = narrow.column.data_type().clone();
            *field = Arc::new(
                field
                    .as_ref()
                    .clone()
                    .with_data_type(ty)
                    .with_metadata(metadata),
            );
            *column = narrow.column;
        }
    }
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), columns, &options)
}

struct Narrow {
    column: ArrayRef,
    base: i64,
    unit: i64,
}

fn narrow_column(column: &ArrayRef, ty: FieldType) -> Option<Narrow> {
    let nulls = column.nulls();
    if column.null_count() == column.len() {
        return None;
    }
    match ty {
        FieldType::Int4 => narrow_values(&wide(column.as_primitive::<Int32Type>()), nulls, 2, &[1]),
        FieldType::Date => {
            narrow_values(&wide(column.as_primitive::<Date32Type>()), nulls, 2, &[1])
        }
        FieldType::Int8 => {
            narrow_values(column.as_primitive::<Int64Type>().values(), nulls, 4, &[1])
        }
        FieldType::Timestamptz => {
            let times = column.as_primitive::<TimestampMicrosecondType>();
            narrow_values(times.values(), nulls, 4, &TIME_UNITS)
        }
        FieldType::Float8 => narrow_values(&whole(column.as_primitive())?, nulls, 4, &[1]),
        _ => None,
    }
}

fn wide<T: ArrowPrimitiveType<Native = i32>>(column: &PrimitiveArray<T>) -> Vec<i64> {
    column.values().iter().map(|&v| i64::from(v)).collect()
}

/// The values of a column in which all are whole numbers; a zero with a sign is none.
fn whole(column: &PrimitiveArray<Float64Type>) -> Option<Vec<i64>> {
    let exact = |v: f64| {
        let whole = v as i64;
        ((whole as f64).to_bits() == v.to_bits()).then_some(whole)
    };
    let values = column.values();
    match column.nulls() {
        None => values.iter().map(|&v| exact(v)).collect(),
        Some(nulls) => (values.iter().zip(nulls))
            .map(|(&v, valid)| if valid { exact(v) } else { Some(0) })
            .collect(),
    }
}

/// Some value is not NULL.
fn narrow_values(
    values: &[i64],
    nulls: Option<&NullBuffer>,
    most_bytes: usize,
    units: &[i64],
) -> Option<Narrow> {
    let slices: Vec<&[i64]> = match nulls {
        Some(nulls) => (nulls.valid_slices().map(|(from, to)| &values[from..to])).collect(),
        None => vec![values],
    };
    let (mut low, mut high) = (i64::MAX, i64::MIN);
    for slice in &slices {
        for &value in *slice {
            (low, high) = (low.min(value), high.max(value));
        }
    }
    let range = high.wrapping_sub(low) as u64;
    let distance = |v: i64| v.wrapping_sub(low) as u64;
    let divides = |unit: u64| {
        let mut slices = slices.iter();
        slices.all(|slice| slice.iter().all(|&v| distance(v).is_multiple_of(unit)))
    };
    let unit = *units
        .iter()
        .find(|&&unit| unit == 1 || divides(unit as u64))?;
    let steps = range / unit as u64;
    let to = |v: i64| match unit {
        1 => distance(v),
        unit => distance(v) / unit as u64,
    };
    let nulls = nulls.cloned();
    // Beneath a NULL is anything.
    let column: ArrayRef = if steps <= u64::from(u8::MAX) {
        made::<UInt8Type>(values, nulls, |v| to(v) as u8)
    } else if steps <= u64::from(u16::MAX) && most_bytes >= 2 {
        made::<UInt16Type>(values, nulls, |v| to(v) as u16)
    } else if steps <= u64::from(u32::MAX) && most_bytes >= 4 {
        made::<UInt32Type>(values, nulls, |v| to(v) as u32)
    } else {
        return None;
    };
    Some(Narrow {
        column,
        base: low,
        unit,
    })
}

fn made<T: ArrowPrimitiveType>(
    values: &[i64],
    nulls: Option<NullBuffer>,
    to: impl Fn(i64) -> T::Native,
) -> ArrayRef {
    let values: Vec<T::Native> = values.iter().map(|&v| to(v)).collect();
    Arc::new(PrimitiveArray::<T>::new(ScalarBuffer::from(values), nulls))
}

/// The batch as it was before [`narrow`].
pub(crate) fn widen(batch: RecordBatch) -> Result<RecordBatch, LakeError> {
    let schema = batch.schema();
    let is_narrow = |field: &Arc<Field>| field.metadata().contains_key(TYPE);
    if !schema.fields().iter().any(is_narrow) {
        return Ok(batch);
    }
    let mut fields = schema.fields().to_vec();
    let mut columns = batch.columns().to_vec();
    for (field, column) in fields.iter_mut().zip(&mut columns) {
        if !is_narrow(field) {
            continue;
        }
        let mut metadata = field.metadata().clone();
        let bad = || LakeError::corrupt(WHAT, format!("column \"{}\"", field.name()));
        let ty = (metadata.remove(TYPE))
            .and_then(|name| KINDS.iter().find(|(known, _)| *known == name))
            .map(|(_, ty)| *ty)
            .ok_or_else(bad)?;
        let (base, unit) = (take(&mut metadata, BASE), take(&mut metadata, UNIT));
        let (base, unit) = base.zip(unit).ok_or_else(bad)?;
        *column = widen_column(column, ty, base, unit).ok_or_else(bad)?;
        let wide = field.as_ref().clone().with_data_type(ty.arrow());
        *field = Arc::new(wide.with_metadata(metadata));
    }
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), columns, &options)
        .map_err(|e| LakeError::corrupt(WHAT, e))
}

fn take(metadata: &mut HashMap<String, String>, key: &str) -> Option<i64> {
    metadata.remove(key)?.parse().ok()
}

fn widen_column(column: &ArrayRef, ty: FieldType, base: i64, unit: i64) -> Option<ArrayRef> {
    // Whatever the metadata says, some value comes out.
    let value = |steps: i64| base.wrapping_add(steps.wrapping_mul(unit));
    Some(match ty {
        FieldType::Int4 => widened::<Int32Type>(column, |steps| value(steps) as i32)?,
        FieldType::Date => widened::<Date32Type>(column, |steps| value(steps) as i32)?,
        FieldType::Int8 => widened::<Int64Type>(column, value)?,
        FieldType::Float8 => widened::<Float64Type>(column, |steps| value(steps) as f64)?,
        FieldType::Timestamptz => {
            let times = widened::<TimestampMicrosecondType>(column, value)?;
            let times = times.as_primitive::<TimestampMicrosecondType>().clone();
            Arc::new(times.with_data_type(ty.arrow()))
        }
        _ => return None,
    })
}

fn widened<T: ArrowPrimitiveType>(
    column: &ArrayRef,
    to: impl Fn(i64) -> T::Native,
) -> Option<ArrayRef> {
    let values: Vec<T::Native> = match column.data_type() {
        DataType::UInt8 => all::<UInt8Type, T>(column, to),
        DataType::UInt16 => all::<UInt16Type, T>(column, to),
        DataType::UInt32 => all::<UInt32Type, T>(column, to),
        _ => return None,
    };
    let values = ScalarBuffer::from(values);
    Some(Arc::new(PrimitiveArray::<T>::new(
        values,
        column.nulls().cloned(),
    )))
}

fn all<N: ArrowPrimitiveType, T: ArrowPrimitiveType>(
    column: &ArrayRef,
    to: impl Fn(i64) -> T::Native,
) -> Vec<T::Native>
where
    i64: From<N::Native>,
{
    let values = column.as_primitive::<N>().values();
    values.iter().map(|&v| to(i64::from(v))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{
        Date32Array, Float64Array, Int32Array, Int64Array, TimestampMicrosecondArray,
    };

    /// The type that a column is stored as, having seen that it comes back as it was.
    fn stored(column: impl Array + 'static) -> DataType {
        let metadata = HashMap::from([("id".to_owned(), "7".to_owned())]);
        let field = Field::new("f", column.data_type().clone(), true).with_metadata(metadata);
        let schema = Arc::new(Schema::new(vec![field]));
        let batch = RecordBatch::try_new(schema, vec![Arc::new(column)]).unwrap();
        for batch in [batch.clone(), batch.slice(1, batch.num_rows() - 1)] {
            let back = widen(narrow(&batch).unwrap()).unwrap();
            assert_eq!(back.schema(), batch.schema());
            assert_eq!(back, batch);
            // Equal floats need not be the same.
            assert_eq!(format!("{back:?}"), format!("{batch:?}"));
        }
        narrow(&batch).unwrap().column(0).data_type().clone()
    }

    fn int8(values: &[i64]) -> DataType {
        stored(Int64Array::from(values.to_vec()))
    }

    fn times(values: &[i64]) -> DataType {
        let times = TimestampMicrosecondArray::from(values.to_vec());
        stored(times.with_data_type(FieldType::Timestamptz.arrow()))
    }

    #[test]
    fn values_come_back_from_as_few_bytes_as_they_need() {
        assert_eq!(int8(&[5, 5, 5]), DataType::UInt8);
        assert_eq!(int8(&[-100, 155, 0]), DataType::UInt8);
        assert_eq!(int8(&[-100, 156, 0]), DataType::UInt16);
        assert_eq!(int8(&[1 << 60, (1 << 60) + 65_535]), DataType::UInt16);
        assert_eq!(int8(&[0, 65_536]), DataType::UInt32);
        assert_eq!(int8(&[0, (1 << 32) - 1]), DataType::UInt32);
        assert_eq!(int8(&[0, 1 << 32]), DataType::Int64);
        assert_eq!(int8(&[i64::MIN, i64::MAX, 0]), DataType::Int64);
        assert_eq!(int8(&[i64::MAX, i64::MAX - 1]), DataType::UInt8);
        let int4 = |values: &[i32]| stored(Int32Array::from(values.to_vec()));
        assert_eq!(int4(&[i32::MIN, i32::MIN + 65_535]), DataType::UInt16);
        assert_eq!(int4(&[i32::MIN, i32::MAX]), DataType::Int32);
        assert_eq!(
            stored(Date32Array::from(vec![19_000, 19_001])),
            DataType::UInt8
        );
    }

    #[test]
    fn times_are_counted_in_what_they_are_whole_in() {
        let minute = 60_000_000;
        assert_eq!(
            times(&[7, 7 + minute, 7 + 50_000 * minute]),
            DataType::UInt16
        );
        assert_eq!(times(&[0, minute + 1_000_000]), DataType::UInt8);
        assert_eq!(times(&[0, 86_400_000_000 - 1_000]), DataType::UInt32);
        assert_eq!(
            times(&[0, 86_400_000_000 - 1]),
            DataType::Timestamp(arrow::datatypes::TimeUnit::Microsecond, Some("UTC".into()))
        );
        assert_eq!(times(&[0, 200]), DataType::UInt8);
        assert_eq!(
            times(&[i64::MIN, i64::MAX, 3]),
            FieldType::Timestamptz.arrow()
        );
    }

    #[test]
    fn whole_floats_are_numbers_like_others() {
        let float8 = |values: &[f64]| stored(Float64Array::from(values.to_vec()));
        assert_eq!(float8(&[0.0, 1.0, 255.0]), DataType::UInt8);
        assert_eq!(float8(&[-1e9, 1e9]), DataType::UInt32);
        for odd in [-0.0, 0.5, f64::NAN, f64::INFINITY, 1e300, f64::MIN_POSITIVE] {
            assert_eq!(float8(&[0.0, 1.0, odd]), DataType::Float64, "{odd}");
        }
    }

    #[test]
    fn nulls_do_not_count() {
        let nulls = |rows: &[bool]| Some(NullBuffer::from(rows.to_vec()));
        let beneath = Int64Array::new(
            vec![i64::MAX, 3, i64::MIN, 4].into(),
            nulls(&[false, true, false, true]),
        );
        assert_eq!(stored(beneath), DataType::UInt8);
        let beneath = Float64Array::new(
            vec![0.5, 3.0, f64::NAN].into(),
            nulls(&[false, true, false]),
        );
        assert_eq!(stored(beneath), DataType::UInt8);
        assert_eq!(stored(Int64Array::from(vec![None, None])), DataType::Int64);
    }

    #[test]
    fn crafted_metadata_is_an_error_or_a_value() {
        let column = Arc::new(arrow::array::UInt8Array::from(vec![255, 0])) as ArrayRef;
        let with = |column: &ArrayRef, ty: &str, base: &str, unit: &str| {
            let metadata = [(TYPE, ty), (BASE, base), (UNIT, unit)];
            let metadata = metadata.map(|(k, v)| (k.to_owned(), v.to_owned()));
            let field = Field::new("f", column.data_type().clone(), true);
            let schema = Schema::new(vec![field.with_metadata(HashMap::from(metadata))]);
            widen(RecordBatch::try_new(Arc::new(schema), vec![column.clone()]).unwrap())
        };
        let largest = i64::MAX.to_string();
        for (ty, _) in KINDS {
            assert!(with(&column, ty, &largest, &largest).is_ok());
        }
        assert!(with(&column, "text", "0", "1").is_err());
        assert!(with(&column, "int8", "zero", "1").is_err());
        assert!(with(&column, "int8", "0", "").is_err());
        let other = Arc::new(Int64Array::from(vec![1])) as ArrayRef;
        assert!(with(&other, "int8", "0", "1").is_err());
    }
}
