use super::*;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, ListBuilder, RecordBatch, StringArray, StringBuilder,
};
use parquet::arrow::{ArrowWriter, ProjectionMask};
use parquet::basic::{Encoding, ZstdLevel};
use parquet::file::properties::{WriterProperties, WriterVersion};

use crate::cell;
use crate::error::FilesError;
use crate::input::Meter;
use crate::locate::Found;
use crate::parquet_file::ParquetFile;
use crate::parquet_rows::Bound;

fn write(
    path: &Path,
    texts: &ArrayRef,
    encoding: Encoding,
    codec: Compression,
    version: WriterVersion,
) {
    let batch = RecordBatch::try_from_iter([("c", Arc::clone(texts))]).unwrap();
    let properties = WriterProperties::builder()
        .set_compression(codec)
        .set_encoding(encoding)
        .set_writer_version(version)
        .set_dictionary_enabled(false)
        .set_data_page_row_count_limit(700)
        .set_write_batch_size(100)
        .build();
    let file = File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

fn read(path: &Path) -> std::result::Result<Vec<RecordBatch>, FilesError> {
    let (file, builder) = ParquetFile::open(&Found::file(path, "a.parquet"))?;
    let groups = (0..builder.metadata().num_row_groups()).collect();
    let bound = Bound {
        rows: 8192,
        bytes: 2 << 20,
    };
    let meter = Meter::default();
    let mut batches = file.build(builder, groups, ProjectionMask::all(), bound, &meter)?;
    let mut read = Vec::new();
    while let Some(batch) = file.next(&mut batches)? {
        read.push(batch);
    }
    Ok(read)
}

fn texts(rows: usize) -> ArrayRef {
    let text = |row: usize| (row % 7 != 3).then(|| format!("{}{row}", "same".repeat(row % 11)));
    Arc::new(StringArray::from_iter((0..rows).map(text)))
}

const ENCODINGS: [Encoding; 2] = [
    Encoding::DELTA_LENGTH_BYTE_ARRAY,
    Encoding::DELTA_BYTE_ARRAY,
];

#[test]
fn honest_files_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let zstd = Compression::ZSTD(ZstdLevel::try_new(1).unwrap());
    for encoding in ENCODINGS {
        for codec in [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            zstd,
            Compression::LZ4_RAW,
        ] {
            for version in [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0] {
                for rows in [1, 2, 129, 5_000] {
                    let written = texts(rows);
                    write(&path, &written, encoding, codec, version);
                    let mut found = Vec::new();
                    for batch in read(&path).unwrap() {
                        let plain = cell::plain(batch.column(0)).unwrap();
                        found.extend(
                            plain
                                .as_string::<i32>()
                                .iter()
                                .map(|text| text.map(str::to_owned)),
                        );
                    }
                    let written: Vec<_> = (written.as_string::<i32>().iter())
                        .map(|text| text.map(str::to_owned))
                        .collect();
                    assert_eq!(found, written, "{encoding} {codec} {version:?}");
                }
                let nulls: ArrayRef = Arc::new(StringArray::new_null(10));
                write(&path, &nulls, encoding, codec, version);
                assert_eq!(read(&path).unwrap()[0].column(0).null_count(), 10);
            }
        }
    }
}

#[test]
fn levels_of_lists_are_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let mut lists = ListBuilder::new(StringBuilder::new());
    for row in 0..3_000_usize {
        lists.append_value((0..row % 4).map(|n| (n != 2).then(|| format!("text {n}"))));
    }
    let lists: ArrayRef = Arc::new(lists.finish());
    for encoding in ENCODINGS {
        for version in [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0] {
            write(&path, &lists, encoding, Compression::SNAPPY, version);
            let rows: usize = read(&path).unwrap().iter().map(RecordBatch::num_rows).sum();
            assert_eq!(rows, 3_000);
        }
    }
}

/// A header of packed numbers: blocks of 128 in 4 parts, so many of them, the first one 0.
fn header(count: u64) -> Vec<u8> {
    let mut bytes = vec![0x80, 0x01, 0x04];
    let mut rest = count;
    while rest >= 0x80 {
        bytes.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    bytes.extend([rest as u8, 0]);
    bytes
}

#[test]
fn a_page_has_no_more_lengths_than_values() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let rows: ArrayRef = Arc::new(StringArray::from_iter_values(
        (0..300).map(|row| format!("{row}")),
    ));
    for encoding in ENCODINGS {
        let none = Compression::UNCOMPRESSED;
        write(&path, &rows, encoding, none, WriterVersion::PARQUET_1_0);
        let honest = std::fs::read(&path).unwrap();
        let told: Vec<usize> = (honest.windows(5).enumerate())
            .filter(|(_, bytes)| *bytes == &header(300)[..5])
            .map(|(at, _)| at + 3)
            .collect();
        let headers = if encoding == Encoding::DELTA_BYTE_ARRAY {
            2
        } else {
            1
        };
        assert_eq!(told.len(), headers, "{encoding}");
        for at in told {
            let mut file = honest.clone();
            file[at + 1] = 0x7f;
            std::fs::write(&path, file).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("more lengths than values"), "{error}");
        }
    }
}

#[test]
fn packed_numbers_are_walked_to_their_end() {
    assert_eq!(packed(&header(0), 0).unwrap(), 5);
    assert_eq!(packed(&header(1), 1).unwrap(), 5);
    assert!(packed(&header(2), 1).is_err());
    assert!(packed(&header(1 << 40), 1 << 30).is_err());
    // One part of 32 numbers of 4 bits; those behind it are not there.
    let mut bytes = [&header(33)[..], &[0, 4, 0, 0, 9], &[0; 16], b"rest"].concat();
    assert_eq!(packed(&bytes, 33).unwrap(), 5 + 5 + 16);
    // A second part is needed, which is of 9 bits.
    bytes[3] = 34;
    assert!(packed(&bytes, 34).is_ok());
    bytes[7] = 9;
    bytes[3] = 100;
    assert!(packed(&bytes, 100).is_err());
    for impossible in [
        [0x80, 0x01, 0x00, 1, 0],
        [0, 0x04, 1, 0, 0],
        [0x01, 0x01, 1, 0, 0],
    ] {
        assert!(packed(&impossible, 10).is_err());
    }
    for end in 0..5 {
        assert!(packed(&header(1)[..end], 1).is_err());
    }
}
