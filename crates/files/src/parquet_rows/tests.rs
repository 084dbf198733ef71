use super::*;

use std::fs::File;
use std::path::Path;

use arrow::array::{
    ArrayRef, Float64Builder, ListBuilder, StringArray, StringBuilder, StructArray,
};
use arrow::compute::cast;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::{WriterProperties, WriterPropertiesBuilder};

use crate::cell;
use crate::input::Meter;
use crate::locate::Found;
use crate::parquet_file::{ParquetFile, ParquetSource};
use crate::source::{Position, Rows, Source};

const BOUND: Bound = Bound {
    rows: 8192,
    bytes: 2 << 20,
};

fn write(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    write_as(path, columns, WriterProperties::builder());
}

fn write_as(path: &Path, columns: Vec<(&str, ArrayRef)>, properties: WriterPropertiesBuilder) {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let level = ZstdLevel::try_new(3).unwrap();
    let properties = properties.set_compression(Compression::ZSTD(level)).build();
    let file = File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

fn open(path: &Path) -> (ParquetFile, Batches) {
    let (file, builder) = ParquetFile::open(&Found::file(path, "a.parquet")).unwrap();
    let groups = (0..builder.metadata().num_row_groups()).collect();
    let batches = file
        .build(
            builder,
            groups,
            ProjectionMask::all(),
            BOUND,
            &Meter::default(),
        )
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
fn a_row_that_shows_a_text_very_often_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let long = "x".repeat(1 << 20);
    let mut lists = ListBuilder::new(StringBuilder::new());
    lists.append_value([Some("a")]);
    lists.append_value((0..257).map(|_| Some(&long)));
    write(&path, vec![("c", Arc::new(lists.finish()))]);
    let (file, mut batches) = open(&path);
    assert_eq!(file.next(&mut batches).unwrap().unwrap().num_rows(), 1);
    let refused = file.next(&mut batches).unwrap_err();
    assert!(
        refused.to_string().contains("a row are longer"),
        "{refused}"
    );
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

#[test]
fn texts_made_of_the_one_before_are_written_out_a_few_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let written_out = || {
        WriterProperties::builder()
            .set_dictionary_enabled(false)
            .set_encoding(Encoding::DELTA_BYTE_ARRAY)
    };
    let (long, rows) = ("x".repeat(20_000), 1_000);
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values((0..rows).map(|_| &long)));
    for (n, at_once) in [(1, 64), (4, 16)] {
        let names = ["a", "b", "c", "d"].into_iter().take(n);
        let columns = names.map(|name| (name, Arc::clone(&texts))).collect();
        write_as(&path, columns, written_out());
        assert!(path.metadata().unwrap().len() < 64 << 10);
        let (file, mut batches) = open(&path);
        assert_eq!(batches.pace.at_once, at_once);
        let part = batches.reader.next().unwrap().unwrap();
        assert_eq!(part.num_rows(), at_once);
        let mut found = part.num_rows();
        while let Some(batch) = file.next(&mut batches).unwrap() {
            let most = BOUND.bytes as usize / (n * long.len());
            assert!((1..=most).contains(&batch.num_rows()));
            found += batch.num_rows();
            let plain = cell::plain(batch.column(n - 1)).unwrap();
            let plain = plain.as_string::<i32>();
            assert!(plain.iter().flatten().all(|text| text == long));
        }
        assert_eq!(found, rows);
    }
    // What was read at different times is put together.
    let texts = StringArray::from_iter_values((0..20_000).map(|n| format!("text number {n}")));
    write_as(&path, vec![("c", Arc::new(texts))], written_out());
    let (file, mut batches) = open(&path);
    let (mut sizes, mut found) = (Vec::new(), 0);
    while let Some(batch) = file.next(&mut batches).unwrap() {
        sizes.push(batch.num_rows());
        let plain = cell::plain(batch.column(0)).unwrap();
        for text in plain.as_string::<i32>().iter().flatten() {
            assert_eq!(text, format!("text number {found}"));
            found += 1;
        }
    }
    assert_eq!(sizes, [8192, 8192, 3616]);
}

/// The library looks at the head of a page before it reads the one in front of it.
#[test]
fn lists_of_several_pages_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let mut lists = ListBuilder::new(Float64Builder::new());
    for row in 0..50_000 {
        lists.append_value((0..row % 3).map(|n| Some(f64::from(row + n))));
    }
    let lists: ArrayRef = Arc::new(lists.finish());
    let pages = WriterProperties::builder().set_data_page_row_count_limit(1000);
    write_as(&path, vec![("c", Arc::clone(&lists))], pages);
    let (file, mut batches) = open(&path);
    let mut at = 0;
    while let Some(batch) = file.next(&mut batches).unwrap() {
        let rows = batch.num_rows();
        let same = lists.slice(at, rows);
        let (ours, theirs) = (batch.column(0).as_list::<i32>(), same.as_list::<i32>());
        assert!(ours.iter().eq(theirs.iter()));
        at += rows;
    }
    assert_eq!(at, 50_000);
}

#[test]
fn reading_goes_on_in_the_middle_of_a_page() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let texts = StringArray::from_iter_values((0..50_000).map(|n| n.to_string()));
    let pages = WriterProperties::builder().set_data_page_row_count_limit(1000);
    write_as(&path, vec![("c", Arc::new(texts))], pages);
    for row in [500, 1000, 30_500, 49_999] {
        let from = Position {
            row,
            ..Position::default()
        };
        let file = Found::file(&path, "a.parquet");
        let mut source = ParquetSource::open(&file, from, &Meter::default()).unwrap();
        let piece = source.next().unwrap().unwrap();
        let Rows::Columns { batch, lines, .. } = piece.rows else {
            panic!("Parquet gives columns");
        };
        assert_eq!(lines[0], row + 1);
        let plain = cell::plain(batch.column(0)).unwrap();
        assert_eq!(plain.as_string::<i32>().value(0), row.to_string());
    }
}
