//! Parquet: columns as they are.
//!
//! The file is anybody's: see [`rakam_lake::untrusted`]. Its footer does not say how long its texts are: a value that a
//! dictionary has once may be that of every row. Texts are therefore read as views of the file's pages, and only so many
//! rows are handed on as are short enough when they are written out ([`super::parquet_rows`]). What the pages take is counted
//! as they come ([`super::parquet_pages`]).

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, FieldRef, Schema, SchemaRef};
use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder,
};
use parquet::basic::LogicalType;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, Length};
use rakam_event::types::FieldType;
use rakam_lake::untrusted;

use crate::cell;
use crate::error::FilesError;
use crate::input::Meter;
use crate::locate::{Found, Location};
use crate::parquet_object::{ParquetObject, ParquetRead};
use crate::parquet_pages::{Account, Pages};
use crate::parquet_rows::{self, Batches, Bound, Pace};
use crate::parquet_times;
use crate::source::{PIECE_ROWS, Piece, Position, Rows, Source};

/// A piece of long rows has fewer of them.
const PIECE: Bound = Bound {
    rows: PIECE_ROWS,
    bytes: 16 << 20,
};
/// A row that takes more is no event, whatever its columns are.
const ROW_BYTES_MAX: u64 = 128 << 20;

/// The bytes of a file, wherever it is.
#[derive(Clone)]
pub enum Bytewise {
    File(std::sync::Arc<File>),
    Object(ParquetObject),
}

pub enum BytewiseRead {
    File(BufReader<File>),
    Object(ParquetRead),
}

impl Read for BytewiseRead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.read(buffer),
            Self::Object(object) => object.read(buffer),
        }
    }
}

impl Length for Bytewise {
    fn len(&self) -> u64 {
        match self {
            Self::File(file) => Length::len(&**file),
            Self::Object(object) => object.len(),
        }
    }
}

impl ChunkReader for Bytewise {
    type T = BytewiseRead;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        match self {
            Self::File(file) => file.get_read(start).map(BytewiseRead::File),
            Self::Object(object) => object.get_read(start).map(BytewiseRead::Object),
        }
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        match self {
            Self::File(file) => file.get_bytes(start, length),
            Self::Object(object) => object.get_bytes(start, length),
        }
    }
}

pub type Builder = ParquetRecordBatchReaderBuilder<Pages>;

/// A file that is anybody's.
pub struct ParquetFile {
    name: String,
    bytes: Bytewise,
    account: Account,
}

impl ParquetFile {
    /// Opens it and reads its metadata.
    pub fn open(file: &Found) -> Result<(Self, Builder), FilesError> {
        let bytes = match &file.at {
            Location::File(path) => {
                let open = File::open(path).map_err(|e| FilesError::io("open", &file.name, &e))?;
                Bytewise::File(open.into())
            }
            Location::Object(object) => Bytewise::Object(ParquetObject::open(object.open()?)?),
        };
        let own = Self {
            name: file.name.clone(),
            bytes,
            account: Account::default(),
        };
        let builder = own.contained(|| {
            let pages = Pages::new(own.bytes.clone(), &own.account)?;
            let told = ArrowReaderMetadata::load(&pages, ArrowReaderOptions::new())?;
            let timed = parquet_times::in_micros(told.schema(), told.parquet_schema());
            let options = ArrowReaderOptions::new().with_schema(parquet_rows::with_views(&timed));
            // As they are, if the library does not take its own types back.
            let viewed = ArrowReaderMetadata::try_new(told.metadata().clone(), options);
            Ok(Builder::new_with_metadata(pages, viewed.unwrap_or(told)))
        })?;
        let builder = builder.map_err(|e| own.failed(e))?;
        Ok((own, builder))
    }

    /// A reader of these row groups, of which only these columns are wanted, as many rows at a time as the bound allows. What
    /// their pages take is that of who waits for it, by the meter.
    pub fn build(
        &self,
        builder: Builder,
        groups: Vec<usize>,
        mask: ProjectionMask,
        bound: Bound,
        meter: &Meter,
    ) -> Result<Batches, FilesError> {
        let metadata = builder.metadata();
        if let Bytewise::Object(object) = &self.bytes {
            object.expect(metadata, &groups, &mask);
        }
        let row_bytes = parquet_rows::row_bytes(metadata, &groups, &mask);
        let pace = Pace::new(metadata, &groups, &mask, bound.rows_of(row_bytes));
        let memory = meter.memory();
        self.account
            .expect(metadata, &groups, &mask, pace.at_once, memory);
        let builder = builder
            .with_batch_size(pace.at_once)
            .with_projection(mask)
            .with_row_groups(groups);
        let reader = self
            .contained(|| builder.build())?
            .map_err(|e| self.failed(e))?;
        let account = &self.account;
        Ok(Batches::new(reader, bound, row_bytes, pace, account))
    }

    /// The next rows. Their texts are views: [`crate::cell::plain`] makes plain columns of them.
    pub fn next(&self, batches: &mut Batches) -> Result<Option<RecordBatch>, FilesError> {
        self.contained(|| batches.next())?
            .transpose()
            .map_err(|e| self.because(|name| FilesError::malformed(name, "parquet", e)))
    }

    /// Runs code of the library; its panic says that the file is none.
    fn contained<T>(&self, decode: impl FnOnce() -> T) -> Result<T, FilesError> {
        untrusted::contained(decode)
            .map_err(|e| self.because(|name| FilesError::malformed(name, "parquet", e)))
    }

    /// What was wrong with the fetching of the file, if that is why; else what is wrong with the file.
    fn because(&self, own: impl FnOnce(&str) -> FilesError) -> FilesError {
        if self.account.is_refused() {
            return FilesError::OutOfMemory(self.name.clone());
        }
        let failure = match &self.bytes {
            Bytewise::Object(object) => object.failure(),
            Bytewise::File(_) => None,
        };
        failure.unwrap_or_else(|| own(&self.name))
    }

    fn failed(&self, error: ParquetError) -> FilesError {
        self.because(|name| match error {
            ParquetError::NYI(message) => FilesError::Unsupported {
                message: format!("could not read file \"{name}\": {message}"),
                hint: "Write the file with zstd, snappy, lz4 or no compression.".to_owned(),
            },
            other => FilesError::malformed(name, "parquet", other),
        })
    }
}

/// Why Parquet inside of another compression is not read.
pub fn compressed(name: &str) -> FilesError {
    FilesError::Unsupported {
        message: format!("file \"{name}\" is Parquet inside of another compression"),
        hint: "Parquet compresses its columns itself: decompress the file first.".to_owned(),
    }
}

/// The schema of the file's batches, in which columns of JSON are marked as such.
fn annotated(builder: &Builder) -> SchemaRef {
    let roots = builder.parquet_schema().root_schema().get_fields();
    let fields = builder.schema().fields().iter().zip(roots);
    let fields: Vec<FieldRef> = fields
        .map(
            |(field, root)| match root.get_basic_info().logical_type_ref() {
                Some(LogicalType::Json) => Arc::new(cell::as_json(field)),
                _ => Arc::clone(field),
            },
        )
        .collect();
    Arc::new(Schema::new(fields))
}

pub struct ParquetSource {
    file: ParquetFile,
    batches: Batches,
    /// Of the batches, with what the file says of its columns beyond their Arrow types.
    schema: SchemaRef,
    declared: Vec<(String, FieldType)>,
    row: u64,
    rows: u64,
    bytes: u64,
    meter: Meter,
}

impl ParquetSource {
    pub fn open(found: &Found, from: Position, meter: &Meter) -> Result<Self, FilesError> {
        let (file, builder) = ParquetFile::open(found)?;
        let schema = annotated(&builder);
        let declared = schema
            .fields()
            .iter()
            .filter(|field| *field.data_type() != DataType::Null)
            .map(|field| (field.name().clone(), cell::field_type(field)))
            .collect();
        let groups = builder.metadata().row_groups();
        let rows = builder.metadata().file_metadata().num_rows().max(0) as u64;
        // What lies in whole groups before the position is not read again.
        let (mut first, mut skip) = (0, from.row);
        for group in groups {
            let rows = group.num_rows().max(0) as u64;
            if rows > skip {
                break;
            }
            skip -= rows;
            first += 1;
        }
        let kept = (first..groups.len()).collect();
        let bytes = file.bytes.len();
        let builder = builder.with_offset(usize::try_from(skip).unwrap_or(usize::MAX));
        let batches = file.build(builder, kept, ProjectionMask::all(), PIECE, meter)?;
        if batches.row_bytes() > ROW_BYTES_MAX {
            return Err(FilesError::RecordTooLarge {
                name: found.name.clone(),
                line: from.row + 1,
                limit: ROW_BYTES_MAX as usize,
            });
        }
        Ok(Self {
            file,
            batches,
            schema,
            declared,
            row: from.row,
            rows,
            bytes,
            meter: meter.clone(),
        })
    }
}

impl Source for ParquetSource {
    fn next(&mut self) -> Result<Option<Piece>, FilesError> {
        let Some(batch) = self.file.next(&mut self.batches)? else {
            return Ok(None);
        };
        let batch = batch
            .with_schema(Arc::clone(&self.schema))
            .map_err(|e| FilesError::malformed(&self.file.name, "parquet", e))?;
        let first = self.row + 1;
        self.row += batch.num_rows() as u64;
        let part = self.row as f64 / self.rows.max(1) as f64;
        self.meter.set((self.bytes as f64 * part.min(1.0)) as u64);
        Ok(Some(Piece {
            bytes: self.batches.bytes_of(&batch),
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

    fn bound(&mut self, rows: usize) {
        self.batches.hand_on(rows);
    }

    fn next_bytes(&self) -> u64 {
        self.batches.next_bytes()
    }

    fn declared(&self) -> &[(String, FieldType)] {
        &self.declared
    }
}
