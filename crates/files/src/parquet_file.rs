//! Parquet: columns as they are.
//!
//! The file is anybody's: see [`rakam_lake::untrusted`].

use std::fs::File;
use std::io::{self, BufReader, Read};

use arrow::array::RecordBatch;
use arrow::datatypes::DataType;
use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, Length};
use rakam_event::types::FieldType;
use rakam_lake::untrusted::{self, Checked};

use crate::cell;
use crate::error::FilesError;
use crate::input::Meter;
use crate::locate::{Found, Location};
use crate::parquet_object::{ParquetObject, ParquetRead};
use crate::source::{PIECE_ROWS, Piece, Position, Rows, Source};

/// A piece of long rows has fewer of them: so many bytes, as the file counts its columns before compression.
const PIECE_BYTES_MAX: u64 = 16 << 20;

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

pub type Builder = ParquetRecordBatchReaderBuilder<Checked<Bytewise>>;

/// A file that is anybody's.
pub struct ParquetFile {
    name: String,
    bytes: Bytewise,
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
        };
        let builder = own.contained(|| {
            let bytes = Checked::new(own.bytes.clone())?;
            Builder::try_new_with_options(bytes, ArrowReaderOptions::new())
        })?;
        let builder = builder.map_err(|e| own.failed(e))?;
        Ok((own, builder))
    }

    /// A reader of these row groups, of which only these columns are wanted.
    pub fn build(
        &self,
        builder: Builder,
        groups: Vec<usize>,
        mask: ProjectionMask,
    ) -> Result<ParquetRecordBatchReader, FilesError> {
        if let Bytewise::Object(object) = &self.bytes {
            object.expect(builder.metadata(), &groups, &mask);
        }
        let builder = builder.with_projection(mask).with_row_groups(groups);
        self.contained(|| builder.build())?
            .map_err(|e| self.failed(e))
    }

    /// The next rows.
    pub fn next(
        &self,
        reader: &mut ParquetRecordBatchReader,
    ) -> Result<Option<RecordBatch>, FilesError> {
        self.contained(|| reader.next())?
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

pub struct ParquetSource {
    file: ParquetFile,
    reader: ParquetRecordBatchReader,
    declared: Vec<(String, FieldType)>,
    row: u64,
    rows: u64,
    bytes: u64,
    meter: Meter,
}

impl ParquetSource {
    pub fn open(found: &Found, from: Position, meter: &Meter) -> Result<Self, FilesError> {
        let (file, builder) = ParquetFile::open(found)?;
        let declared = builder
            .schema()
            .fields()
            .iter()
            .filter(|field| *field.data_type() != DataType::Null)
            .map(|field| (field.name().clone(), cell::field_type(field)))
            .collect();
        let groups = builder.metadata().row_groups();
        let rows = builder.metadata().file_metadata().num_rows().max(0) as u64;
        let plain: i64 = groups
            .iter()
            .map(|g| g.total_byte_size())
            .fold(0, i64::saturating_add);
        let row_bytes = (plain.max(0) as u64 / rows.max(1)).max(1);
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
        let builder = builder
            .with_batch_size(((PIECE_BYTES_MAX / row_bytes) as usize).clamp(64, PIECE_ROWS))
            .with_offset(usize::try_from(skip).unwrap_or(usize::MAX));
        let reader = file.build(builder, kept, ProjectionMask::all())?;
        Ok(Self {
            file,
            reader,
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
        let Some(batch) = self.file.next(&mut self.reader)? else {
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
