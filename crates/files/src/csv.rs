//! CSV as RFC 4180 and COPY have it: records of cells, a quoted cell may contain anything.
//!
//! Cells become text columns; what they mean is decided by [`crate::convert`]. Own parser, since COPY tells an empty cell
//! (no value) from a quoted empty one, and a bad record must be known by its line.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions, StringArray};
use arrow::buffer::{BooleanBuffer, NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use memchr::memchr_iter;

use crate::error::FilesError;
use crate::format::{Compression, CsvOptions};
use crate::input::{self, Meter, Window};
use crate::source::{BadRow, PIECE_BYTES, PIECE_ROWS, Piece, Position, Rows, Source, Spec};

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

pub struct CsvSource {
    window: Window,
    name: String,
    options: CsvOptions,
    /// None until the first record has told how many there are.
    schema: Option<SchemaRef>,
    position: Position,
    max_record_bytes: usize,
}

/// Where a cell of the current record lies in [`Record::text`].
#[derive(Debug, Clone, Copy)]
struct Cell {
    end: usize,
    quoted: bool,
}

/// The cells of one record, unescaped, one behind the other.
#[derive(Debug, Default)]
struct Record {
    text: Vec<u8>,
    cells: Vec<Cell>,
}

impl Record {
    fn clear(&mut self) {
        self.text.clear();
        self.cells.clear();
    }

    fn end_cell(&mut self, quoted: bool) {
        self.cells.push(Cell {
            end: self.text.len(),
            quoted,
        });
    }

    /// The cells: their text, and whether they were quoted.
    fn iter(&self) -> impl Iterator<Item = (&[u8], bool)> {
        let starts = std::iter::once(0).chain(self.cells.iter().map(|c| c.end));
        starts
            .zip(&self.cells)
            .map(|(start, cell)| (&self.text[start..cell.end], cell.quoted))
    }
}

/// Reads one record at the front of `bytes`: how many bytes it takes, its line end included. None: it does not end there
/// (and more bytes may come).
fn read_record(
    bytes: &[u8],
    ended: bool,
    options: &CsvOptions,
    record: &mut Record,
) -> Option<usize> {
    record.clear();
    let (delimiter, quote, escape) = (options.delimiter, options.quote, options.escape);
    let mut at = 0;
    loop {
        // At the beginning of a cell.
        let mut quoted = false;
        loop {
            // Up to the next byte that means something.
            let rest = &bytes[at..];
            let plain = rest
                .iter()
                .position(|&b| b == delimiter || b == b'\n' || b == b'\r' || b == quote)
                .unwrap_or(rest.len());
            record.text.extend_from_slice(&rest[..plain]);
            at += plain;
            let Some(&byte) = bytes.get(at) else {
                if !ended {
                    return None;
                }
                record.end_cell(quoted);
                return Some(at);
            };
            at += 1;
            if byte == delimiter {
                record.end_cell(quoted);
                break;
            }
            if byte == b'\n' {
                record.end_cell(quoted);
                return Some(at);
            }
            if byte == b'\r' {
                match bytes.get(at) {
                    None if !ended => return None,
                    Some(b'\n') => at += 1,
                    // An old line end of its own.
                    _ => {}
                }
                record.end_cell(quoted);
                return Some(at);
            }
            // A quote: up to the closing one, as COPY reads it also in the middle of a cell.
            quoted = true;
            at = read_quoted(bytes, at, quote, escape, &mut record.text)
                .or_else(|| ended.then_some(usize::MAX))?;
            if at == usize::MAX {
                // The file ends inside of quotes.
                record.cells.clear();
                return Some(bytes.len());
            }
        }
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
        path: &Path,
        name: &str,
        spec: &Spec,
        from: Position,
        meter: &Meter,
    ) -> Result<Self, FilesError> {
        let options = spec.options.csv(name)?;
        let compression = Compression::of_name(name);
        let open = |byte| input::open(path, name, compression, byte, meter);
        let mut source = Self {
            window: Window::new(open(0)?, name),
            name: name.to_owned(),
            options,
            schema: None,
            position: Position::default(),
            max_record_bytes: spec.max_record_bytes,
        };
        source.read_head(path)?;
        if from.byte > source.position.byte {
            source.window = Window::new(open(from.byte)?, name);
            source.position = from;
        }
        Ok(source)
    }

    /// Reads the names of the columns, and leaves the window at the first record of data.
    fn read_head(&mut self, path: &Path) -> Result<(), FilesError> {
        self.window.fill()?;
        if self.window.bytes().starts_with(BYTE_ORDER_MARK) {
            self.advance(BYTE_ORDER_MARK.len());
        }
        let mut record = Record::default();
        let names: Vec<String> = loop {
            if self.window.ended() && self.window.bytes().is_empty() {
                return Ok(());
            }
            let length = self.read(&mut record)?;
            // Blank lines before the header say nothing.
            let blank = record.cells.len() == 1 && record.text.is_empty();
            if !self.options.header {
                break (1..=record.cells.len())
                    .map(|n| format!("column_{n}"))
                    .collect();
            }
            let names = record
                .iter()
                .map(|(cell, _)| std::str::from_utf8(cell).map(str::to_owned))
                .collect::<Result<_, _>>()
                .map_err(|_| {
                    let name = path
                        .file_name()
                        .map_or_else(Default::default, |n| n.to_string_lossy());
                    FilesError::malformed(&name, "csv", "the header is not UTF-8 text")
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
        let fields: Vec<Field> = names
            .into_iter()
            .map(|name| Field::new(name, DataType::Utf8, true))
            .collect();
        self.schema = Some(Arc::new(Schema::new(fields)));
        Ok(())
    }

    /// Reads the next record, which is not taken off yet; its length.
    fn read(&mut self, record: &mut Record) -> Result<usize, FilesError> {
        loop {
            let ended = self.window.ended();
            if let Some(length) = read_record(self.window.bytes(), ended, &self.options, record) {
                return Ok(length);
            }
            if self.window.bytes().len() > self.max_record_bytes {
                return Err(FilesError::RecordTooLarge {
                    name: self.name.clone(),
                    line: self.position.line + 1,
                    limit: self.max_record_bytes,
                });
            }
            self.window.fill()?;
        }
    }

    fn advance(&mut self, length: usize) {
        let bytes = &self.window.bytes()[..length];
        self.position.line += memchr_iter(b'\n', bytes).count() as u64;
        self.position.byte += length as u64;
        self.window.take(length);
    }
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
        while lines.len() < PIECE_ROWS && bad.len() < PIECE_ROWS && bytes < PIECE_BYTES {
            if self.window.bytes().is_empty() {
                if self.window.ended() {
                    break;
                }
                self.window.fill()?;
                continue;
            }
            let length = self.read(&mut record)?;
            let line = self.position.line + 1;
            let raw = &self.window.bytes()[..length];
            let found = record.cells.len();
            // A blank line is a record of one column, or nothing.
            let blank = found == 1 && record.text.is_empty() && !record.cells[0].quoted;
            if found == width && !(blank && width > 1) {
                if length > self.max_record_bytes {
                    let limit = self.max_record_bytes;
                    let error =
                        format!("record of {length} bytes is over the limit of {limit} bytes");
                    bad.push(BadRow::new(line, raw, error));
                } else if std::str::from_utf8(&record.text).is_err() {
                    bad.push(BadRow::new(line, raw, "invalid UTF-8 text"));
                } else {
                    let null = self.options.null.as_bytes();
                    for (column, (cell, quoted)) in columns.iter_mut().zip(record.iter()) {
                        column.push((quoted || cell != null).then_some(cell));
                    }
                    lines.push(line);
                }
            } else if found == 0 {
                bad.push(BadRow::new(line, raw, "a quote is not closed"));
            } else if !blank {
                let error = format!("expected {width} columns, found {found}");
                bad.push(BadRow::new(line, raw, error));
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
            after: self.position,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Options;
    use arrow::array::{Array, AsArray};

    fn spec(options: &str) -> Spec {
        Spec {
            format: None,
            options: Options::parse(options).unwrap(),
            max_record_bytes: 1 << 20,
        }
    }

    fn read(path: &Path, options: &str, from: Position) -> Vec<Piece> {
        let mut source =
            CsvSource::open(path, "x.csv", &spec(options), from, &Meter::default()).unwrap();
        let mut pieces = Vec::new();
        while let Some(piece) = source.next().unwrap() {
            pieces.push(piece);
        }
        pieces
    }

    /// Rows as `a|NULL|c`, bad ones as `line: error`, of a file with this content.
    fn shown(content: &[u8], options: &str) -> (Vec<String>, Vec<String>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.csv");
        std::fs::write(&path, content).unwrap();
        let (mut rows, mut bad) = (Vec::new(), Vec::new());
        for piece in read(&path, options, Position::default()) {
            let Rows::Columns { batch, lines, .. } = &piece.rows else {
                panic!("CSV gives columns");
            };
            for (row, line) in lines.iter().enumerate().take(batch.num_rows()) {
                let cells: Vec<&str> = batch
                    .columns()
                    .iter()
                    .map(|c| {
                        if c.is_null(row) {
                            "NULL"
                        } else {
                            c.as_string::<i32>().value(row)
                        }
                    })
                    .collect();
                rows.push(format!("{line}: {}", cells.join("|")));
            }
            bad.extend(piece.bad.iter().map(|b| format!("{}: {}", b.line, b.error)));
        }
        (rows, bad)
    }

    fn check(content: &str, options: &str, expect: &[&str], expect_bad: &[&str]) {
        let (rows, bad) = shown(content.as_bytes(), options);
        assert_eq!(rows, expect, "{content:?}");
        assert_eq!(bad, expect_bad, "{content:?}");
    }

    #[test]
    fn records_and_cells() {
        check("a,b\n1,2\n3,4\n", "{}", &["2: 1|2", "3: 3|4"], &[]);
        check("a,b\r\n1,2\r\n3,4", "{}", &["2: 1|2", "3: 3|4"], &[]);
        check("\u{feff}a,b\n1,\n", "{}", &["2: 1|NULL"], &[]);
        check("a,b\n\"\",x\n", "{}", &["2: |x"], &[]);
        check(
            "a,b\n\"x,\"\"y\"\"\",\"two\nlines\"\n5,6\n",
            "{}",
            &["2: x,\"y\"|two\nlines", "4: 5|6"],
            &[],
        );
        check("a\n\n1\n", "{}", &["2: NULL", "3: 1"], &[]);
        check("a,b\n\n1,2\n\n", "{}", &["3: 1|2"], &[]);
        check(
            "a;b\nNA;'x''y'\n;2\n",
            r#"{"delimiter": ";", "quote": "'", "null": "NA"}"#,
            &["2: NULL|x'y", "3: |2"],
            &[],
        );
        check(
            "a,b\n\"x\\\"y\",\"\\\\\"\n",
            r#"{"escape": "\\"}"#,
            &["2: x\"y|\\"],
            &[],
        );
        check(
            "1,2\n3,4\n",
            r#"{"header": false}"#,
            &["1: 1|2", "2: 3|4"],
            &[],
        );
        check("", "{}", &[], &[]);
        check("a,b\n", "{}", &[], &[]);
        check("a,b\nx\"y\"z,1", "{}", &["2: xyz|1"], &[]);
    }

    #[test]
    fn bad_records_are_known_by_their_line() {
        check(
            "a,b\n1\n\"x\ny\",2\n1,2,3\n4,5\n",
            "{}",
            &["3: x\ny|2", "6: 4|5"],
            &[
                "2: expected 2 columns, found 1",
                "5: expected 2 columns, found 3",
            ],
        );
        check(
            "a,b\n1,2\n3,\"open\n4,5\n",
            "{}",
            &["2: 1|2"],
            &["3: a quote is not closed"],
        );
        let (rows, bad) = shown(b"a,b\n1,\xff\n3,4\n", "{}");
        assert_eq!(rows, ["3: 3|4"]);
        assert_eq!(bad, ["2: invalid UTF-8 text"]);
    }

    #[test]
    fn reading_continues_where_a_piece_ended() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.csv");
        let mut text = String::from("a,b\n");
        for i in 0..100_000 {
            text += &format!("{i},\"line\n{i}\"\n");
        }
        std::fs::write(&path, &text).unwrap();
        let pieces = read(&path, "{}", Position::default());
        assert!(pieces.len() > 3);
        let rows: usize = pieces.iter().map(|p| p.rows.len()).sum();
        assert_eq!(rows, 100_000);
        let rest = read(&path, "{}", pieces[0].after);
        assert_eq!(rest.len(), pieces.len() - 1);
        assert_eq!(rest.last().map(|p| p.after), pieces.last().map(|p| p.after));
        let (
            Rows::Columns {
                batch: a, lines: x, ..
            },
            Rows::Columns {
                batch: b, lines: y, ..
            },
        ) = (&rest[0].rows, &pieces[1].rows)
        else {
            panic!("CSV gives columns");
        };
        assert_eq!((a, x), (b, y));
    }

    #[test]
    fn an_endless_record_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.csv");
        std::fs::write(&path, format!("a,b\n1,\"{}", "x\n".repeat(1 << 20))).unwrap();
        let mut source = CsvSource::open(
            &path,
            "x.csv",
            &spec("{}"),
            Position::default(),
            &Meter::default(),
        )
        .unwrap();
        assert_eq!(
            source.next().map(drop).map_err(|e| e.sqlstate()),
            Err("54000")
        );
    }
}
