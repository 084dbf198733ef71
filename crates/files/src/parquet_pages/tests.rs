use super::*;

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use arrow::array::{ArrayRef, Float64Builder, ListBuilder, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::properties::WriterProperties;

use crate::error::FilesError;
use crate::input::Meter;
use crate::locate::Found;
use crate::parquet_file::ParquetFile;
use crate::parquet_rows::Bound;

/// Memory of so many bytes.
#[derive(Debug)]
struct Limited {
    free: AtomicUsize,
    least: AtomicUsize,
}

impl Memory for Limited {
    fn try_take(&self, bytes: usize) -> bool {
        let free = self.free.load(Ordering::Relaxed);
        let Some(rest) = free.checked_sub(bytes) else {
            return false;
        };
        self.free.store(rest, Ordering::Relaxed);
        self.least.fetch_min(rest, Ordering::Relaxed);
        true
    }

    fn give_back(&self, bytes: usize) {
        self.free.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Reads a file with so much memory: how much of it was taken at most.
fn taken(path: &Path, bytes: usize) -> std::result::Result<usize, FilesError> {
    let memory = Arc::new(Limited {
        free: AtomicUsize::new(bytes),
        least: AtomicUsize::new(bytes),
    });
    let meter = Meter::default().with_memory(Arc::clone(&memory) as _);
    let read = || -> std::result::Result<(), FilesError> {
        let (file, builder) = ParquetFile::open(&Found::file(path, "a.parquet"))?;
        let groups = (0..builder.metadata().num_row_groups()).collect();
        let bound = Bound {
            rows: 8192,
            bytes: 2 << 20,
        };
        let mut batches = file.build(builder, groups, ProjectionMask::all(), bound, &meter)?;
        while file.next(&mut batches)?.is_some() {}
        Ok(())
    };
    let outcome = read();
    // All is given back.
    assert_eq!(memory.free.load(Ordering::Relaxed), bytes);
    outcome.map(|()| bytes - memory.least.load(Ordering::Relaxed))
}

fn write(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(1).unwrap()))
        .set_dictionary_enabled(false)
        .set_data_page_size_limit(1 << 30)
        .build();
    let file = File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

const PLENTY: usize = 1 << 40;
const MIB: usize = 1 << 20;

#[test]
fn large_pages_are_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let long = "x".repeat(MIB);
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values((0..30).map(|_| &long)));
    let columns = |names: &[&'static str]| {
        let column = |name: &&'static str| (*name, Arc::clone(&texts));
        names.iter().map(column).collect::<Vec<_>>()
    };
    write(&path, columns(&["a", "b"]));
    assert_eq!(taken(&path, 0), Ok(0));
    write(&path, columns(&["a", "b", "c"]));
    assert!(path.metadata().unwrap().len() < 1 << 20);
    let most = taken(&path, PLENTY).unwrap();
    assert!((26 * MIB..27 * MIB).contains(&most), "{most}");
    let refused = taken(&path, 25 * MIB);
    assert_eq!(
        refused,
        Err(FilesError::OutOfMemory("a.parquet".to_owned()))
    );
}

#[test]
fn a_list_is_as_large_as_its_page_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let mut lists = ListBuilder::new(Float64Builder::new());
    for row in 0..20_000 {
        let values = if row == 10_000 { 8_000_000 } else { 1 };
        lists.append_value(std::iter::repeat_n(None, values));
    }
    write(&path, vec![("c", Arc::new(lists.finish()))]);
    assert!(path.metadata().unwrap().len() < 64 << 10);
    // A double and its levels.
    let least = 12 * 8_000_000 - FREE_BYTES as usize;
    assert!(taken(&path, PLENTY).unwrap() >= least);
    let refused = taken(&path, least - 1).map_err(|e| e.sqlstate());
    assert_eq!(refused, Err("53200"));
}

#[test]
fn lengths_that_are_apart_are_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    let rows = 10_000_000;
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values(std::iter::repeat_n("", rows)));
    let batch = RecordBatch::try_from_iter([("c", texts)]).unwrap();
    let properties = WriterProperties::builder()
        .set_encoding(Encoding::DELTA_LENGTH_BYTE_ARRAY)
        .set_dictionary_enabled(false)
        .set_data_page_row_count_limit(usize::MAX)
        .set_max_row_group_row_count(None)
        .build();
    let file = File::create(&path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    let least = 8 * rows - FREE_BYTES as usize;
    assert!(taken(&path, PLENTY).unwrap() >= least);
    let refused = taken(&path, least - 1).map_err(|e| e.sqlstate());
    assert_eq!(refused, Err("53200"));
}

#[test]
fn a_dictionary_has_no_more_values_than_bytes() {
    let account = Account::default();
    let dictionary = |values| {
        let mut head = PageHead::default();
        (head.is_dictionary, head.bytes, head.values) = (true, 100, values);
        head
    };
    assert!(account.announce(4, dictionary(25)).is_ok());
    assert!(account.announce(4, dictionary(1 << 31)).is_err());
}
