//! Timestamps of the type INT96, as Spark, Hive and Impala wrote them for long: days, and nanoseconds of a day. The library
//! makes nanoseconds since 1970 of them unless it is asked for another unit, which beyond the years 1677 to 2262 are other times.

use std::slice;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef, TimeUnit};
use parquet::basic::Type as PhysicalType;
use parquet::schema::types::{ColumnDescPtr, SchemaDescriptor};

/// The schema of a file with its INT96 timestamps in microseconds, wherever they are nested.
pub fn in_micros(schema: &SchemaRef, parquet: &SchemaDescriptor) -> SchemaRef {
    // The columns of the file are the leaves of its schema, in their order.
    let mut leaves = parquet.columns().iter();
    let fields: Vec<FieldRef> = (schema.fields().iter())
        .map(|field| timed(field, &mut leaves))
        .collect();
    Arc::new(Schema::new_with_metadata(fields, schema.metadata().clone()))
}

fn timed(field: &FieldRef, leaves: &mut slice::Iter<'_, ColumnDescPtr>) -> FieldRef {
    let ty = match field.data_type() {
        DataType::List(item) => DataType::List(timed(item, leaves)),
        DataType::LargeList(item) => DataType::LargeList(timed(item, leaves)),
        DataType::ListView(item) => DataType::ListView(timed(item, leaves)),
        DataType::LargeListView(item) => DataType::LargeListView(timed(item, leaves)),
        DataType::FixedSizeList(item, length) => {
            DataType::FixedSizeList(timed(item, leaves), *length)
        }
        DataType::Struct(fields) => {
            DataType::Struct(fields.iter().map(|field| timed(field, leaves)).collect())
        }
        DataType::Map(entries, sorted) => DataType::Map(timed(entries, leaves), *sorted),
        ty => {
            // Of other columns the library would take the numbers as they are for microseconds.
            let is_int96 =
                (leaves.next()).is_some_and(|leaf| leaf.physical_type() == PhysicalType::INT96);
            match micros(ty).filter(|_| is_int96) {
                Some(micros) => micros,
                None => return Arc::clone(field),
            }
        }
    };
    Arc::new(Field::clone(field).with_data_type(ty))
}

fn micros(ty: &DataType) -> Option<DataType> {
    match ty {
        DataType::Timestamp(_, zone) => {
            Some(DataType::Timestamp(TimeUnit::Microsecond, zone.clone()))
        }
        DataType::Dictionary(_, value) => micros(value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fs::File;

    use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
    use parquet::data_type::{Int64Type, Int96, Int96Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use rakam_event::time::{MICROS_PER_DAY, days_from_civil};
    use rakam_event::types::FieldType;

    use crate::input::Meter;
    use crate::locate::Found;
    use crate::parquet_file::ParquetSource;
    use crate::source::{Position, Rows, Source};
    use crate::table::Form;
    use crate::table::value::convert;
    use crate::{cast, cell};

    /// A column whose nanoseconds are to stay what they are lies between the others.
    const SCHEMA: &str = "message root {
        optional int96 at;
        optional int64 exact (TIMESTAMP(NANOS,false));
        optional group list (LIST) { repeated group list { optional int96 element; } }
    }";

    /// A time as microseconds since 1970, and as the file has it.
    fn time(days: i64, micros: i64) -> (i64, Int96) {
        let nanos = micros * 1000 + 999;
        let mut value = Int96::new();
        value.set_data(
            nanos as u32,
            (nanos >> 32) as u32,
            (days + 2_440_588) as u32,
        );
        (days * MICROS_PER_DAY + micros, value)
    }

    /// Rows of one time each, also as a list.
    fn read(times: &[Int96]) -> RecordBatch {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        let schema = Arc::new(parse_message_type(SCHEMA).unwrap());
        let properties = Arc::new(WriterProperties::default());
        let file = File::create(&path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, properties).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let flat = vec![1; times.len()];
        let mut column = group.next_column().unwrap().unwrap();
        let at = column.typed::<Int96Type>();
        at.write_batch(times, Some(&flat), None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let exact = column.typed::<Int64Type>();
        let nanos: Vec<i64> = (1..).take(times.len()).collect();
        exact.write_batch(&nanos, Some(&flat), None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let (nested, first) = (vec![3; times.len()], vec![0; times.len()]);
        let items = column.typed::<Int96Type>();
        items
            .write_batch(times, Some(&nested), Some(&first))
            .unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
        let found = Found::file(&path, "a.parquet");
        let mut source =
            ParquetSource::open(&found, Position::default(), &Meter::default()).unwrap();
        match source.next().unwrap().unwrap().rows {
            Rows::Columns { batch, .. } => batch,
            Rows::Events(_) => panic!("Parquet gives columns"),
        }
    }

    fn shown(array: &ArrayRef) -> Vec<Option<i64>> {
        (0..array.len())
            .map(|row| cell::micros(array, row))
            .collect()
    }

    #[test]
    fn times_of_any_year_are_read() {
        let (expect, times): (Vec<i64>, Vec<Int96>) = [
            time(days_from_civil(1, 1, 1), 0),
            time(days_from_civil(1500, 6, 1), 3_600_000_001),
            time(0, 0),
            time(days_from_civil(2300, 1, 1), 1),
            time(days_from_civil(9999, 12, 31), MICROS_PER_DAY - 1),
        ]
        .into_iter()
        .unzip();
        let expect: Vec<Option<i64>> = expect.into_iter().map(Some).collect();
        let batch = read(&times);
        let schema = batch.schema();
        assert_eq!(
            *schema.field(0).data_type(),
            DataType::Timestamp(TimeUnit::Microsecond, None)
        );
        assert_eq!(shown(batch.column(0)), expect);
        assert_eq!(
            *schema.field(1).data_type(),
            DataType::Timestamp(TimeUnit::Nanosecond, None)
        );
        let exact = batch
            .column(1)
            .as_primitive::<arrow::datatypes::TimestampNanosecondType>();
        assert_eq!(exact.values(), &[1, 2, 3, 4, 5]);
        let lists = batch.column(2).as_list::<i32>();
        assert_eq!(shown(lists.values()), expect);
    }

    #[test]
    fn times_before_those_of_postgres_do_not_fit() {
        let batch = read(&[time(-2_440_588, 0).1, time(-2_440_589, 0).1]);
        let at = batch.column(0);
        assert!(convert(&at.slice(0, 1), Form::Timestamp, false).is_ok());
        let unfit = convert(at, Form::Timestamp, false).unwrap_err();
        assert_eq!(
            (unfit.row, unfit.reason.as_str()),
            (1, "timestamp is out of range")
        );
        // An event's are of the years 1 to 9999.
        let cast = cast::cast(at, FieldType::Timestamptz, false, 100).unwrap();
        assert_eq!(cast.array.null_count(), 2);
        let misfits: Vec<usize> = (cast.notes.iter().filter(|note| note.misfit))
            .map(|note| note.row)
            .collect();
        assert_eq!(misfits, [0, 1]);
    }
}
