//! Reading a file piece by piece, from any position that an earlier reading ended at.

use arrow::array::RecordBatch;
use rakam_event::types::FieldType;

use crate::error::FilesError;
use crate::format::{Compression, Format, Options};
pub use crate::input::Meter;
use crate::locate::Found;
use crate::{avro, csv, json, parquet_file};

/// Rows of a piece, at most.
pub const PIECE_ROWS: usize = 32_768;
/// Bytes of text of a piece, about.
pub(crate) const PIECE_BYTES: usize = 8 << 20;
/// The invalid log keeps so much of a bad row.
const SAMPLE_BYTES: usize = 256;

/// How far a file has been read. All zero is its beginning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Position {
    /// Records before it, bad ones included.
    pub row: u64,
    /// Decompressed bytes before it, where records can be found by bytes.
    pub byte: u64,
    /// Lines before it, in text files.
    pub line: u64,
}

/// A row that is no event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadRow {
    /// The line it begins on, or the number of the record where a format has no lines; from 1.
    pub line: u64,
    /// All of it; of a format without text, its JSON.
    pub bytes: Vec<u8>,
    pub error: String,
}

impl BadRow {
    pub(crate) fn new(line: u64, bytes: &[u8], error: impl ToString) -> Self {
        Self {
            line,
            bytes: bytes.to_vec(),
            error: error.to_string(),
        }
    }

    /// Its beginning, for the log.
    pub(crate) fn sample(&self) -> String {
        let start = &self.bytes[..self.bytes.len().min(SAMPLE_BYTES)];
        // The log is text: it has no NUL characters.
        String::from_utf8_lossy(start).replace('\0', "\u{fffd}")
    }
}

/// An event as JSON text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextEvent {
    pub line: u64,
    pub json: String,
}

/// Rows of one piece.
#[derive(Debug, Clone)]
pub enum Rows {
    /// Columns by name. `lines` has the line (or record) of each row.
    Columns {
        batch: RecordBatch,
        lines: Vec<u64>,
        /// The cells are text without a type of their own, as in CSV.
        untyped: bool,
    },
    Events(Vec<TextEvent>),
}

impl Rows {
    pub fn len(&self) -> usize {
        match self {
            Self::Columns { batch, .. } => batch.num_rows(),
            Self::Events(events) => events.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A bounded part of a file.
#[derive(Debug, Clone)]
pub struct Piece {
    pub rows: Rows,
    pub bad: Vec<BadRow>,
    /// About the bytes of all of them, written out.
    pub bytes: u64,
    /// Where the next one begins.
    pub after: Position,
}

/// A file being read.
pub trait Source: Send {
    /// The next piece; None at the end.
    fn next(&mut self) -> Result<Option<Piece>, FilesError>;

    /// Pieces have so many rows at most from now on, if that is fewer than [`PIECE_ROWS`].
    fn bound(&mut self, rows: usize);

    /// About the memory that the next call of [`Self::next`] needs; 0 where only the rows will tell.
    fn next_bytes(&self) -> u64 {
        0
    }

    /// Columns whose type the file itself declares, by their names in the file.
    fn declared(&self) -> &[(String, FieldType)] {
        &[]
    }
}

/// How to read the files of a call.
#[derive(Debug, Clone)]
pub struct Spec {
    /// None: by each file's suffix.
    pub format: Option<Format>,
    pub options: Options,
    /// A record may be so large; a larger one of a text format is a bad row.
    pub max_record_bytes: usize,
}

/// Opens a file at a position. `meter` shows the bytes read of it from then on.
///
/// One in a bucket is opened and read on a thread of [`crate::object::blocking`] only.
pub fn open(
    file: &Found,
    spec: &Spec,
    from: Position,
    meter: &Meter,
) -> Result<Box<dyn Source>, FilesError> {
    let name = &file.name;
    let format = match spec.format {
        Some(format) => format,
        None => Format::of_name(name)?,
    };
    spec.options.ensure_for(format)?;
    let compression = Compression::of_name(name);
    Ok(match format {
        Format::Parquet if compression != Compression::None => {
            return Err(parquet_file::compressed(name));
        }
        Format::Parquet => Box::new(parquet_file::ParquetSource::open(file, from, meter)?),
        Format::Csv => Box::new(csv::CsvSource::open(file, spec, from, meter)?),
        Format::Ndjson => Box::new(json::lines(file, spec, from, meter)?),
        Format::Json => Box::new(json::open(file, spec, from, meter)?),
        Format::Avro => Box::new(avro::AvroSource::open(file, from, meter)?),
    })
}
