use super::*;
use crate::sort;
use crate::testing::{self, Rng, all_types, batch, file_options};
use arrow::compute::concat_batches;
use arrow::datatypes::DataType;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::Encoding;
use parquet::file::reader::{FileReader, SerializedFileReader};

fn write(schema: &Schema, batches: &[RecordBatch]) -> WrittenFile<Vec<u8>> {
    let mut writer = FileWriter::new(schema, &file_options(), Vec::new());
    for batch in batches {
        writer.write(batch).unwrap();
    }
    writer.finish().unwrap()
}

/// A file of `n` random rows of every type.
pub(crate) fn written(n: usize, seed: u64) -> (WrittenFile<Vec<u8>>, Bytes) {
    let mut file = testing::file(n, seed);
    let data = Bytes::from(std::mem::take(&mut file.sink));
    (file, data)
}

#[test]
fn what_is_written_is_read_back() {
    let schema = all_types();
    for (seed, n) in [(1, 1), (2, 7), (3, 5000)] {
        let rows = sort::by_time(&batch(&schema, n, &mut Rng::new(seed))).unwrap();
        let middle = n / 2;
        let file = write(
            &schema,
            &[rows.slice(0, middle), rows.slice(middle, n - middle)],
        );
        let info = chunk::info(&rows).unwrap();
        assert_eq!(file.n, n as u64);
        assert_eq!(file.bytes, file.sink.len() as u64);
        assert_eq!(
            (file.min_time_us, file.max_time_us),
            (info.min_time_us, info.max_time_us)
        );
        assert_eq!((file.min_xid, file.max_xid), (info.min_xid, info.max_xid));
        assert_eq!(file.has_extra, info.has_extra);
        let mut stats = StatsBuilder::new(&schema);
        stats.update(&rows).unwrap();
        assert_eq!(file.stats, stats.finish());

        let reader = ParquetRecordBatchReaderBuilder::try_new(Bytes::from(file.sink)).unwrap();
        // Ids, types and time zones come back without an embedded Arrow schema.
        assert_eq!(reader.schema().fields(), schema.arrow().fields());
        let back: Vec<_> = reader.build().unwrap().map(Result::unwrap).collect();
        assert_eq!(concat_batches(&schema.arrow(), &back).unwrap(), rows);
    }
}

#[test]
fn the_file_describes_itself() {
    let (_, data) = written(3000, 4);
    let reader = SerializedFileReader::new(data).unwrap();
    let metadata = reader.metadata();
    let value = |key: &str| {
        let all = metadata.file_metadata().key_value_metadata().unwrap();
        all.iter()
            .find(|kv| kv.key == key)
            .and_then(|kv| kv.value.clone())
    };
    for (key, expect) in [
        ("rakam.project", "acme"),
        ("rakam.collection", "pageview"),
        ("rakam.schema_version", "1"),
        ("rakam.period", "month"),
        ("rakam.format_version", "1"),
        ("rakam.flush_id", "00000000-0000-0000-0000-000000000000"),
    ] {
        assert_eq!(value(key).as_deref(), Some(expect));
    }
    let group = metadata.row_group(0);
    assert_eq!(group.sorting_columns().unwrap()[0].column_idx, 0);
    for column in group.columns() {
        let name = column.column_descr().name();
        let bloom = column.bloom_filter_offset().is_some();
        assert_eq!(bloom, name == USER || name == ID, "{name}");
        assert!(column.offset_index_offset().is_some() && column.column_index_offset().is_some());
        assert!(matches!(column.compression(), Compression::ZSTD(_)));
    }
    let xid = group.columns().last().unwrap();
    assert!(xid.encodings().any(|e| e == Encoding::DELTA_BINARY_PACKED));
    let uuid = all_types()
        .arrow()
        .fields()
        .iter()
        .position(|f| matches!(f.data_type(), DataType::FixedSizeBinary(_)))
        .unwrap();
    let uuid = &metadata
        .file_metadata()
        .schema_descr()
        .root_schema()
        .get_fields()[uuid];
    assert_eq!(
        uuid.get_basic_info().logical_type_ref(),
        Some(&LogicalType::Uuid)
    );
}

#[test]
fn bloom_filters_are_as_large_as_their_values_need() {
    let (_, data) = written(500, 5);
    let len = data.len();
    let reader = SerializedFileReader::new(data).unwrap();
    for column in reader.metadata().row_group(0).columns() {
        if let Some(length) = column.bloom_filter_length() {
            assert!(length < 2048, "{length} of {len}");
        }
    }
}

#[test]
fn row_groups_are_bounded() {
    let schema = Schema::new(1, Vec::new());
    let rows = sort::by_time(&batch(&schema, 2500, &mut Rng::new(6))).unwrap();
    let mut writer = FileWriter::new(&schema, &file_options(), Vec::new());
    assert_eq!(writer.row_group_rows, 1_000_000);
    writer.row_group_rows = 1000;
    writer.write(&rows).unwrap();
    let metadata = crate::footer::parse_footer(writer.finish().unwrap().footer).unwrap();
    let sizes: Vec<_> = metadata.row_groups().iter().map(|g| g.num_rows()).collect();
    assert_eq!(sizes, [1000, 1000, 500]);
}

/// More rows than the sample: the rest goes straight to the writer.
#[test]
fn a_file_goes_on_behind_its_sample() {
    let schema = Schema::new(1, Vec::new());
    let rows = batch(&schema, SAMPLE_ROWS + 5000, &mut Rng::new(14));
    let rows = sort::by_time(&rows).unwrap();
    let mut writer = FileWriter::new(&schema, &file_options(), Vec::new());
    assert_eq!(writer.estimated_bytes(), 0);
    for start in (0..rows.num_rows()).step_by(8192) {
        let n = 8192.min(rows.num_rows() - start);
        writer.write(&rows.slice(start, n)).unwrap();
    }
    assert!(writer.estimated_bytes() > 0);
    let file = writer.finish().unwrap();
    let reader = ParquetRecordBatchReaderBuilder::try_new(Bytes::from(file.sink)).unwrap();
    let back: Vec<_> = reader.build().unwrap().map(Result::unwrap).collect();
    assert_eq!(concat_batches(&schema.arrow(), &back).unwrap(), rows);
}

#[test]
fn misuse_is_an_error() {
    let schema = all_types();
    let writer = || FileWriter::new(&schema, &file_options(), Vec::new());
    assert!(writer().finish().is_err());
    let rows = sort::by_time(&batch(&schema, 100, &mut Rng::new(8))).unwrap();
    let mut backwards = writer();
    backwards.write(&rows.slice(50, 50)).unwrap();
    assert!(backwards.write(&rows.slice(0, 50)).is_err());
}

#[test]
fn an_older_schema_is_widened() {
    let schema = all_types();
    let old = Schema::new(1, Vec::new());
    let rows = sort::by_time(&batch(&old, 10, &mut Rng::new(9))).unwrap();
    let file = write(&schema, std::slice::from_ref(&rows));
    let stat = file.stats.iter().find(|s| s.field_id == 20).unwrap();
    assert_eq!(stat, &ColumnStat::all_null(20, 10));
    let reader = ParquetRecordBatchReaderBuilder::try_new(Bytes::from(file.sink)).unwrap();
    let back = reader.build().unwrap().next().unwrap().unwrap();
    assert_eq!(back, chunk::conform(&rows, &schema.arrow()).unwrap());
}

#[test]
fn a_full_disk_is_told_as_such() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let schema = all_types();
    let rows = sort::by_time(&batch(&schema, 2000, &mut Rng::new(10))).unwrap();
    let mut writer = FileWriter::new(&schema, &file_options(), Full);
    let error = writer
        .write(&rows)
        .and_then(|()| writer.finish().map(|_| ()));
    assert_eq!(error.unwrap_err().sqlstate(), "53100");
}
