//! Parquet: columns as they are.
//!
//! The file is anybody's: see [`rakam_lake::untrusted`].

use std::fs::File;
use std::path::Path;

use arrow::array::RecordBatch;
use arrow::datatypes::DataType;
use parquet::arrow::arrow_reader::{
    ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use parquet::errors::ParquetError;
use rakam_event::types::FieldType;
use rakam_lake::untrusted::{self, Checked};

use crate::cell;
use crate::error::FilesError;
use crate::input::Meter;
use crate::source::{PIECE_ROWS, Piece, Position, Rows, Source};

/// A piece of long rows has fewer of them: so many bytes, as the file counts its columns before compression.
const PIECE_BYTES_MAX: u64 = 16 << 20;

/// Of a reader of such a file.
pub type Builder = ParquetRecordBatchReaderBuilder<Checked<File>>;

pub struct ParquetSource {
    reader: ParquetRecordBatchReader,
    name: String,
    declared: Vec<(String, FieldType)>,
    row: u64,
    rows: u64,
    bytes: u64,
    meter: Meter,
}

impl ParquetSource {
    pub fn open(
        path: &Path,
        name: &str,
        from: Position,
        meter: &Meter,
    ) -> Result<Self, FilesError> {
        let file = File::open(path).map_err(|e| FilesError::io("open", name, &e))?;
        let bytes = file
            .metadata()
            .map_err(|e| FilesError::io("open", name, &e))?
            .len();
        let builder = self::open(file, name)?;
        let declared = builder
            .schema()
            .fields()
            .iter()
            .filter(|field| *field.data_type() != DataType::Null)
            .map(|field| (field.name().clone(), cell::field_type(field)))
            .collect();
        let rows = builder.metadata().file_metadata().num_rows().max(0) as u64;
        let skip = usize::try_from(from.row).unwrap_or(usize::MAX);
        let plain: i64 = builder
            .metadata()
            .row_groups()
            .iter()
            .map(|g| g.total_byte_size())
            .fold(0, i64::saturating_add);
        let row_bytes = (plain.max(0) as u64 / rows.max(1)).max(1);
        let builder = builder
            .with_batch_size(((PIECE_BYTES_MAX / row_bytes) as usize).clamp(64, PIECE_ROWS))
            .with_offset(skip);
        let reader = build(builder, name)?;
        Ok(Self {
            reader,
            name: name.to_owned(),
            declared,
            row: from.row,
            rows,
            bytes,
            meter: meter.clone(),
        })
    }
}

/// A file that is anybody's, its metadata read.
pub fn open(file: File, name: &str) -> Result<Builder, FilesError> {
    contained(name, || {
        let file = Checked::new(file)?;
        Builder::try_new_with_options(file, ArrowReaderOptions::new())
    })?
    .map_err(|e| failed(name, e))
}

pub fn build(builder: Builder, name: &str) -> Result<ParquetRecordBatchReader, FilesError> {
    contained(name, || builder.build())?.map_err(|e| failed(name, e))
}

/// The next rows.
pub fn next(
    reader: &mut ParquetRecordBatchReader,
    name: &str,
) -> Result<Option<RecordBatch>, FilesError> {
    contained(name, || reader.next())?
        .transpose()
        .map_err(|e| FilesError::malformed(name, "parquet", e))
}

/// Runs code of the library; its panic says that the file is none.
fn contained<T>(name: &str, decode: impl FnOnce() -> T) -> Result<T, FilesError> {
    untrusted::contained(decode).map_err(|e| FilesError::malformed(name, "parquet", e))
}

/// Why Parquet inside of another compression is not read.
pub fn compressed(name: &str) -> FilesError {
    FilesError::Unsupported {
        message: format!("file \"{name}\" is Parquet inside of another compression"),
        hint: "Parquet compresses its columns itself: decompress the file first.".to_owned(),
    }
}

pub fn failed(name: &str, error: ParquetError) -> FilesError {
    match error {
        ParquetError::NYI(message) => FilesError::Unsupported {
            message: format!("could not read file \"{name}\": {message}"),
            hint: "Write the file with zstd, snappy, lz4 or no compression.".to_owned(),
        },
        other => FilesError::malformed(name, "parquet", other),
    }
}

impl Source for ParquetSource {
    fn next(&mut self) -> Result<Option<Piece>, FilesError> {
        let Some(batch) = next(&mut self.reader, &self.name)? else {
            return Ok(None);
        };
        let first = self.row + 1;
        self.row += batch.num_rows() as u64;
        let part = self.row as f64 / self.rows.max(1) as f64;
        self.meter.set((self.bytes as f64 * part.min(1.0)) as u64);
        Ok(Some(Piece {
            rows: Rows::Columns {
                lines: (first..=self.row).collect(),
                batch,
                untyped: false,
            },
            bad: Vec::new(),
            after: Position {
                row: self.row,
                ..Position::default()
            },
        }))
    }

    fn declared(&self) -> &[(String, FieldType)] {
        &self.declared
    }
}
