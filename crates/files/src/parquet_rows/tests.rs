use super::*;

use std::fs::File;
use std::path::Path;

use arrow::array::{
    ArrayRef, Float64Builder, ListBuilder, StringArray, StringBuilder, StructArray,
};
use arrow::compute::cast;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use crate::cell;
use crate::locate::Found;
use crate::parquet_file::ParquetFile;

const BOUND: Bound = Bound {
    rows: 8192,
    bytes: 2 << 20,
};

fn write(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let level = ZstdLevel::try_new(3).unwrap();
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(level))
        .build();
    let file = File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

fn open(path: &Path) -> (ParquetFile, Batches) {
    let (file, builder) = ParquetFile::open(&Found::file(path, "a.parquet")).unwrap();
    let groups = (0..builder.metadata().num_row_groups()).collect();
    let batches = file
        .build(builder, groups, ProjectionMask::all(), BOUND)
        .unwrap();
    (file, batches)
}

#[test]
fn a_value_that_the_file_has_once_is_not_written_out_for_every_row() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let long = "x".repeat(200_000);
    let rows = 3000;
    let mut texts = StringBuilder::new();
    let mut lists = ListBuilder::new(StringBuilder::new());
    for row in 0..rows {
        texts.append_option((row % 3 > 0).then_some(&long));
        lists.append_value([Some(&long), None, Some(&long)]);
    }
    let texts: ArrayRef = Arc::new(texts.finish());
    let lists: ArrayRef = Arc::new(lists.finish());
    let keyed = DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8));
    let keyed = cast(&texts, &keyed).unwrap();
    let field = Arc::new(Field::new("s", DataType::Utf8, true));
    let structs: ArrayRef = Arc::new(StructArray::from(vec![(field, Arc::clone(&texts))]));
    for (column, per_row) in [(texts, 1), (lists, 2), (keyed, 1), (structs, 1)] {
        write(&path, vec![("c", column)]);
        assert!(path.metadata().unwrap().len() < 4 << 10);
        let (file, mut batches) = open(&path);
        let mut found = 0;
        while let Some(batch) = file.next(&mut batches).unwrap() {
            let most = (BOUND.bytes / (per_row * 200_000)) as usize;
            assert!((1..=most * 3 / 2 + 1).contains(&batch.num_rows()));
            found += batch.num_rows();
            let plain = cell::plain(batch.column(0)).unwrap();
            if let Some(texts) = plain.as_string_opt::<i32>() {
                assert!(texts.value_data().len() <= BOUND.bytes as usize);
                assert!(texts.iter().flatten().all(|text| text == long));
            }
        }
        assert_eq!(found, rows);
    }
}

#[test]
fn a_row_is_as_large_as_its_values() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    // Of few bytes as the file has it, whatever its footer says of their size before compression.
    let mut list = ListBuilder::new(Float64Builder::new());
    list.append_value(std::iter::repeat_n(None, 1_000_000));
    write(&path, vec![("c", Arc::new(list.finish()))]);
    assert!(path.metadata().unwrap().len() < 4 << 10);
    let (_, batches) = open(&path);
    assert!(
        batches.next_bytes() >= 12_000_000,
        "{}",
        batches.next_bytes()
    );
    // Short rows are read many at a time.
    let texts = StringArray::from_iter_values((0..20_000).map(|n| n.to_string()));
    write(&path, vec![("c", Arc::new(texts))]);
    let (file, mut batches) = open(&path);
    let mut sizes = Vec::new();
    while let Some(batch) = file.next(&mut batches).unwrap() {
        sizes.push(batch.num_rows());
    }
    assert_eq!(sizes, [8192, 8192, 3616]);
}
