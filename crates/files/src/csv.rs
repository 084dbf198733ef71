//! CSV as RFC 4180 and COPY have it: records of cells, a quoted cell may contain anything.
//!
//! Cells become text columns; what they mean is decided by [`crate::convert`]. Own parser, since COPY tells an empty cell
//! (no value) from a quoted empty one, and a bad record must be known by its line.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions, StringArray};
use arrow::buffer::{BooleanBuffer, NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use memchr::memchr_iter;

use crate::error::FilesError;
use crate::format::CsvOptions;
use crate::input::{self, Meter, Window};
use crate::locate::Found;
use crate::source::{BadRow, PIECE_BYTES, PIECE_ROWS, Piece, Position, Rows, Source, Spec};

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

pub struct CsvSource {
    window: Window,
    name: String,
    options: CsvOptions,
    marks: Marks,
    /// None until the first record has told how many there are.
    schema: Option<SchemaRef>,
    position: Position,
    /// Up to where the bytes are known to be UTF-8, counted as `position.byte`.
    utf8_to: u64,
    max_record_bytes: usize,
    /// Rows of a piece.
    most: usize,
}

/// Where a cell of the current record lies: among the record's own bytes, or, if it has quotes, in [`Record::text`].
#[derive(Debug, Clone, Copy)]
struct Cell {
    start: usize,
    end: usize,
    quoted: bool,
}

/// The cells of one record.
#[derive(Debug, Default)]
struct Record {
    /// Of cells with quotes, without them.
    text: Vec<u8>,
    cells: Vec<Cell>,
}

impl Record {
    fn clear(&mut self) {
        self.text.clear();
        self.cells.clear();
    }

    fn end_cell(&mut self, start: usize, end: usize, quoted: bool) {
        self.cells.push(Cell { start, end, quoted });
    }

    /// The cells: their text, and whether they were quoted. `bytes` are those that the record was read from.
    fn iter<'a>(&'a self, bytes: &'a [u8]) -> impl Iterator<Item = (&'a [u8], bool)> {
        self.cells.iter().map(move |cell| {
            let text = if cell.quoted { &self.text } else { bytes };
            (&text[cell.start..cell.end], cell.quoted)
        })
    }

    /// It has one cell, without text.
    fn is_empty_cell(&self) -> bool {
        matches!(&self.cells[..], [cell] if cell.start == cell.end)
    }
}

/// The bytes that mean something outside of quotes, each eight times.
#[derive(Debug, Clone, Copy)]
struct Marks([u64; 4]);

const ONES: u64 = u64::from_ne_bytes([1; 8]);
const HIGH: u64 = u64::from_ne_bytes([0x80; 8]);

impl Marks {
    fn new(options: &CsvOptions) -> Self {
        Self([options.delimiter, b'\n', b'\r', options.quote].map(|b| ONES * u64::from(b)))
    }

    /// How many bytes mean nothing but themselves: few, as cells go.
    #[inline]
    fn plain(&self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while let Some(word) = bytes[at..].first_chunk() {
            let word = u64::from_le_bytes(*word);
            // The lowest bit that this leaves is in the first byte that is a mark.
            let found = (self.0.iter())
                .map(|mark| word ^ mark)
                .fold(0, |found, x| found | x.wrapping_sub(ONES) & !x)
                & HIGH;
            if found != 0 {
                return at + found.trailing_zeros() as usize / 8;
            }
            at += 8;
        }
        let is_mark = |b: &u8| self.0.contains(&(ONES * u64::from(*b)));
        let rest = &bytes[at..];
        at + rest.iter().position(is_mark).unwrap_or(rest.len())
    }
}

/// Reads one record at the front of `bytes`: how many bytes it takes, its line end included. None: it does not end there
/// (and more bytes may come).
fn read_record(
    bytes: &[u8],
    ended: bool,
    options: &CsvOptions,
    marks: Marks,
    record: &mut Record,
) -> Option<usize> {
    record.clear();
    let (delimiter, quote, escape) = (options.delimiter, options.quote, options.escape);
    let plain = |at: usize| marks.plain(&bytes[at..]);
    let mut at = 0;
    loop {
        // At the beginning of a cell.
        let mut start = at;
        let mut quoted = false;
        at += plain(at);
        // A quote: up to the closing one, as COPY reads it also in the middle of a cell.
        while bytes.get(at).is_some_and(|&b| b == quote) {
            if !quoted {
                quoted = true;
                record.text.extend_from_slice(&bytes[start..at]);
                start = record.text.len() - (at - start);
            }
            let closed = read_quoted(bytes, at + 1, quote, escape, &mut record.text);
            let Some(after) = closed else {
                if !ended {
                    return None;
                }
                // The file ends inside of quotes.
                record.cells.clear();
                return Some(bytes.len());
            };
            let length = plain(after);
            at = after + length;
            record.text.extend_from_slice(&bytes[after..at]);
        }
        let end = if quoted { record.text.len() } else { at };
        let Some(&byte) = bytes.get(at) else {
            if !ended {
                return None;
            }
            record.end_cell(start, end, quoted);
            return Some(at);
        };
        at += 1;
        if byte == delimiter {
            record.end_cell(start, end, quoted);
            continue;
        }
        if byte == b'\r' {
            match bytes.get(at) {
                None if !ended => return None,
                Some(b'\n') => at += 1,
                // An old line end of its own.
                _ => {}
            }
        }
        record.end_cell(start, end, quoted);
        return Some(at);
    }
}

/// Reads what is quoted from `at` on; the position behind the closing quote.
fn read_quoted(
    bytes: &[u8],
    mut at: usize,
    quote: u8,
    escape: u8,
    text: &mut Vec<u8>,
) -> Option<usize> {
    loop {
        let rest = bytes.get(at..)?;
        let plain = memchr::memchr2(quote, escape, rest)?;
        text.extend_from_slice(&rest[..plain]);
        at += plain;
        let byte = bytes[at];
        // Whether a quote is doubled shows in the byte after it.
        let next = bytes.get(at + 1).copied();
        if byte == escape && next.is_some_and(|next| next == quote || next == escape) {
            text.extend(next);
            at += 2;
        } else if byte == quote {
            return Some(at + 1);
        } else {
            text.push(byte);
            at += 1;
        }
    }
}

/// How many bytes at the front of `bytes` belong to a record whose beginning is gone, and whether it ends behind them. What the
/// byte after it may give another meaning is left for later, unless there will be none.
fn pass_over(
    bytes: &[u8],
    ended: bool,
    options: &CsvOptions,
    marks: Marks,
    quoted: &mut bool,
) -> (usize, bool) {
    let (quote, escape) = (options.quote, options.escape);
    let mut at = 0;
    loop {
        let rest = &bytes[at..];
        at += match *quoted {
            true => memchr::memchr2(quote, escape, rest).unwrap_or(rest.len()),
            false => marks.plain(rest),
        };
        let Some(&byte) = bytes.get(at) else {
            return (at, ended);
        };
        let next = bytes.get(at + 1).copied();
        if next.is_none() && !ended && (*quoted || byte == b'\r') {
            return (at, false);
        }
        at += 1;
        if *quoted {
            let is_escaped = next.is_some_and(|next| next == quote || next == escape);
            if byte == escape && is_escaped {
                at += 1;
            } else {
                *quoted = byte != quote;
            }
        } else if byte == quote {
            *quoted = true;
        } else if byte == b'\n' {
            return (at, true);
        } else if byte == b'\r' {
            // The end of a line, of one byte or two.
            return (at + usize::from(next == Some(b'\n')), true);
        }
    }
}

/// A text column in the making.
#[derive(Default)]
struct TextColumn {
    values: Vec<u8>,
    ends: Vec<i32>,
    valid: Vec<bool>,
}

impl TextColumn {
    fn push(&mut self, cell: Option<&[u8]>) {
        self.values.extend_from_slice(cell.unwrap_or_default());
        // A piece is far smaller than 2 GiB.
        self.ends.push(self.values.len() as i32);
        self.valid.push(cell.is_some());
    }

    fn finish(self) -> Result<ArrayRef, FilesError> {
        let offsets: Vec<i32> = std::iter::once(0).chain(self.ends).collect();
        let nulls = self
            .valid
            .contains(&false)
            .then(|| NullBuffer::new(BooleanBuffer::from(self.valid)));
        let array = StringArray::try_new(
            OffsetBuffer::new(ScalarBuffer::from(offsets)),
            self.values.into(),
            nulls,
        );
        Ok(Arc::new(
            array.map_err(|e| FilesError::Arrow(e.to_string()))?,
        ))
    }
}

impl CsvSource {
    pub fn open(
        file: &Found,
        spec: &Spec,
        from: Position,
        meter: &Meter,
    ) -> Result<Self, FilesError> {
        let name = &file.name;
        let options = spec.options.csv(name)?;
        let open = |byte| input::open(file, byte, meter);
        let mut source = Self {
            window: Window::new(open(0)?, name),
            name: name.to_owned(),
            marks: Marks::new(&options),
            options,
            schema: None,
            position: Position::default(),
            utf8_to: 0,
            max_record_bytes: spec.max_record_bytes,
            most: PIECE_ROWS,
        };
        source.read_head()?;
        if from.byte > source.position.byte {
            source.window = Window::new(open(from.byte)?, name);
            source.position = from;
        }
        Ok(source)
    }

    /// Reads the names of the columns, and leaves the window at the first record of data.
    fn read_head(&mut self) -> Result<(), FilesError> {
        self.window.fill()?;
        if self.window.bytes().starts_with(BYTE_ORDER_MARK) {
            self.advance(BYTE_ORDER_MARK.len());
        }
        let mut record = Record::default();
        let names: Vec<String> = loop {
            if self.window.ended() && self.window.bytes().is_empty() {
                return Ok(());
            }
            let Some(length) = self.read(&mut record)? else {
                return Err(FilesError::RecordTooLarge {
                    name: self.name.clone(),
                    line: self.position.line + 1,
                    limit: self.max_record_bytes,
                });
            };
            // Blank lines before the header say nothing.
            let blank = record.is_empty_cell();
            if !self.options.header {
                break (1..=record.cells.len())
                    .map(|n| format!("column_{n}"))
                    .collect();
            }
            let names = record
                .iter(self.window.bytes())
                .map(|(cell, _)| std::str::from_utf8(cell).map(str::to_owned))
                .collect::<Result<_, _>>()
                .map_err(|_| {
                    FilesError::malformed(&self.name, "csv", "the header is not UTF-8 text")
                })?;
            self.advance(length);
            if !blank {
                break names;
            }
        };
        if names.is_empty() {
            return Err(FilesError::malformed(
                &self.name,
                "csv",
                "the header has no end",
            ));
        }
        self.schema = Some(schema_of(&names));
        Ok(())
    }

    /// Reads the next record, which is not taken off yet; its length. None: it is too long.
    fn read(&mut self, record: &mut Record) -> Result<Option<usize>, FilesError> {
        loop {
            let ended = self.window.ended();
            let bytes = self.window.bytes();
            if let Some(length) = read_record(bytes, ended, &self.options, self.marks, record) {
                return Ok(Some(length));
            }
            if self.window.bytes().len() > self.max_record_bytes {
                return Ok(None);
            }
            self.window.fill()?;
        }
    }

    /// Takes a record off that is too long, of which no more is kept than there is now.
    fn skip_long_record(&mut self) -> Result<BadRow, FilesError> {
        let limit = self.max_record_bytes;
        let error = format!("record is over the limit of {limit} bytes");
        let mut bad = BadRow::new(self.position.line + 1, self.window.bytes(), error);
        let mut quoted = false;
        loop {
            let (length, is_end) = pass_over(
                self.window.bytes(),
                self.window.ended(),
                &self.options,
                self.marks,
                &mut quoted,
            );
            self.advance(length);
            if is_end {
                break;
            }
            self.window.fill()?;
        }
        if quoted {
            // It has taken all that came after it.
            bad.error = NOT_CLOSED.to_owned();
        }
        Ok(bad)
    }

    /// Whether the first `length` bytes of the window are UTF-8. Looks at all of them at once.
    fn is_utf8(&mut self, length: usize) -> bool {
        let end = self.position.byte + length as u64;
        if self.utf8_to < end {
            let bytes = self.window.bytes();
            let valid = std::str::from_utf8(bytes).map_or_else(|e| e.valid_up_to(), str::len);
            self.utf8_to = self.position.byte + valid as u64;
        }
        self.utf8_to >= end
    }

    fn advance(&mut self, length: usize) {
        let bytes = &self.window.bytes()[..length];
        self.position.line += memchr_iter(b'\n', bytes).count() as u64;
        self.position.byte += length as u64;
        self.window.take(length);
    }
}

/// One record on its own, as a file with these columns has it, however large; `Err`: what is wrong with it.
pub fn record_again(bytes: &[u8], names: &[String], options: &CsvOptions) -> Result<Rows, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| NOT_UTF8.to_owned())?;
    let mut record = Record::default();
    let length = read_record(bytes, true, options, Marks::new(options), &mut record);
    let found = record.cells.len();
    if found == 0 {
        return Err(NOT_CLOSED.to_owned());
    }
    if found != names.len() {
        return Err(wrong_width(names.len(), found));
    }
    if length != Some(text.len()) {
        return Err("it is more than one record".to_owned());
    }
    let null = options.null.as_bytes();
    let columns = record.iter(bytes).map(|(cell, quoted)| {
        let mut column = TextColumn::default();
        column.push((quoted || cell != null).then_some(cell));
        column.finish()
    });
    let columns = columns
        .collect::<Result<_, _>>()
        .map_err(|error| error.to_string())?;
    let batch =
        RecordBatch::try_new(schema_of(names), columns).map_err(|error| error.to_string())?;
    Ok(Rows::Columns {
        batch,
        lines: vec![1],
        untyped: true,
    })
}

const NOT_UTF8: &str = "invalid UTF-8 text";
const NOT_CLOSED: &str = "a quote is not closed";

fn wrong_width(width: usize, found: usize) -> String {
    format!("expected {width} columns, found {found}")
}

fn schema_of(names: &[String]) -> SchemaRef {
    let text = |name: &String| Field::new(name, DataType::Utf8, true);
    Arc::new(Schema::new(names.iter().map(text).collect::<Vec<_>>()))
}

impl Source for CsvSource {
    fn next(&mut self) -> Result<Option<Piece>, FilesError> {
        let Some(schema) = self.schema.clone() else {
            return Ok(None);
        };
        let width = schema.fields().len();
        let mut columns: Vec<TextColumn> = (0..width).map(|_| TextColumn::default()).collect();
        let mut lines = Vec::new();
        let mut bad = Vec::new();
        let mut record = Record::default();
        let mut bytes = 0;
        while lines.len() < self.most && bad.len() < self.most && bytes < PIECE_BYTES {
            if self.window.bytes().is_empty() {
                if self.window.ended() {
                    break;
                }
                self.window.fill()?;
                continue;
            }
            let Some(length) = self.read(&mut record)? else {
                bad.push(self.skip_long_record()?);
                bytes += self.max_record_bytes;
                self.position.row += 1;
                continue;
            };
            let is_utf8 = self.is_utf8(length);
            let line = self.position.line + 1;
            let raw = &self.window.bytes()[..length];
            let found = record.cells.len();
            // A blank line is a record of one column, or nothing.
            let blank = record.is_empty_cell() && !record.cells[0].quoted;
            if found == width && !(blank && width > 1) {
                if length > self.max_record_bytes {
                    let limit = self.max_record_bytes;
                    let error =
                        format!("record of {length} bytes is over the limit of {limit} bytes");
                    bad.push(BadRow::new(line, raw, error));
                } else if !is_utf8 {
                    bad.push(BadRow::new(line, raw, NOT_UTF8));
                } else {
                    let null = self.options.null.as_bytes();
                    for (column, (cell, quoted)) in columns.iter_mut().zip(record.iter(raw)) {
                        column.push((quoted || cell != null).then_some(cell));
                    }
                    lines.push(line);
                }
            } else if found == 0 {
                bad.push(BadRow::new(line, raw, NOT_CLOSED));
            } else if !blank {
                bad.push(BadRow::new(line, raw, wrong_width(width, found)));
            }
            bytes += length;
            self.position.row += u64::from(!blank || width == 1);
            self.advance(length);
        }
        if lines.is_empty() && bad.is_empty() && bytes == 0 {
            return Ok(None);
        }
        let columns = columns
            .into_iter()
            .map(TextColumn::finish)
            .collect::<Result<_, _>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(lines.len()));
        let batch = RecordBatch::try_new_with_options(schema, columns, &options)
            .map_err(|e| FilesError::Arrow(e.to_string()))?;
        Ok(Some(Piece {
            rows: Rows::Columns {
                batch,
                lines,
                untyped: true,
            },
            bad,
            bytes: bytes as u64,
            after: self.position,
        }))
    }

    fn bound(&mut self, rows: usize) {
        self.most = rows.clamp(1, PIECE_ROWS);
    }
}

#[cfg(test)]
mod tests;
