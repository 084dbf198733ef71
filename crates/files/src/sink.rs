//! Writing rows to a file: Parquet, CSV as COPY writes it, or one JSON object a line.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arrow::array::builder::{Int64Builder, ListBuilder};
use arrow::array::{ArrayRef, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use bytes::{Bytes, BytesMut};
use flate2::write::GzEncoder;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::arrow::{ArrowSchemaConverter, ArrowWriter};
use parquet::basic::{
    Compression as ParquetCompression, LogicalType, Repetition, Type as PhysicalType, ZstdLevel,
};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::schema::types::{SchemaDescriptor, Type};
use rakam_event::coerce::Value;
use rakam_event::column::Column;
use rakam_event::json;
use rakam_event::types::FieldType;

use crate::error::FilesError;
use crate::format::{Compression, Format};

/// Rows of a batch of columns, and of a row group; and about the bytes of a batch's values, which no column can have more
/// than 2 GB of.
const BATCH_ROWS: usize = 8192;
const BATCH_BYTES: usize = 16 << 20;
const BUFFER_BYTES: usize = 256 << 10;
const ROW_GROUP_ROWS: usize = 131_072;
const ROW_GROUP_BYTES: usize = 64 << 20;
const ZSTD_LEVEL: i32 = 3;

/// How the rows of a result reach the sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowForm {
    /// Typed values, by [`Sink::values`].
    Values,
    /// Cells as text, by [`Sink::cells`].
    Cells,
    /// One JSON text, by [`Sink::line`].
    Line,
}

/// The form in which a format is written; an error for one that cannot be.
pub fn row_form(format: Format) -> Result<RowForm, FilesError> {
    match format {
        Format::Parquet => Ok(RowForm::Values),
        Format::Csv => Ok(RowForm::Cells),
        Format::Ndjson => Ok(RowForm::Line),
        Format::Json | Format::Avro => Err(FilesError::Unsupported {
            message: format!("format {format} cannot be written"),
            hint: "Formats of copy_to are parquet, csv and ndjson.".to_owned(),
        }),
    }
}

/// The type under which a column is written to a typed file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ColumnType {
    Field(FieldType),
    /// Lists of whole numbers.
    Int4Array,
    Int8Array,
}

impl ColumnType {
    fn arrow(self) -> DataType {
        let list = |item| DataType::List(Arc::new(Field::new("element", item, true)));
        match self {
            Self::Field(ty) => ty.arrow(),
            Self::Int4Array => list(DataType::Int32),
            Self::Int8Array => list(DataType::Int64),
        }
    }
}

/// A value of a column; of lists of whole numbers the list.
#[derive(Debug, Clone, PartialEq)]
pub enum Cell<'a> {
    Value(Value<'a>),
    Integers(Vec<Option<i64>>),
}

impl Cell<'_> {
    /// About the bytes of a value that may be long.
    fn bytes(&self) -> usize {
        match self {
            Self::Value(Value::Text(text) | Value::Json(text)) => text.len(),
            Self::Value(Value::TextArray(items)) => items
                .iter()
                .map(|item| size_of::<u64>() + item.as_ref().map_or(0, |text| text.len()))
                .sum(),
            Self::Value(Value::Float8Array(items)) => size_of_val(items.as_slice()),
            Self::Value(Value::BoolArray(items)) => items.len(),
            Self::Value(_) => 0,
            Self::Integers(items) => size_of_val(items.as_slice()),
        }
    }
}

/// A column in the making.
enum Making {
    Field(Column),
    Integers(ListBuilder<Int64Builder>, DataType),
}

impl Making {
    fn new(ty: ColumnType) -> Result<Self, FilesError> {
        let arrow = ty.arrow();
        Ok(match ty {
            ColumnType::Field(_) => {
                Self::Field(Column::new(&arrow).map_err(|e| FilesError::Arrow(e.to_string()))?)
            }
            _ => Self::Integers(ListBuilder::new(Int64Builder::new()), arrow),
        })
    }

    fn append(&mut self, row: usize, cell: Option<Cell<'_>>) {
        match (self, cell) {
            (Self::Field(column), Some(Cell::Value(value))) => {
                column.append(row, value);
            }
            (Self::Field(_), _) => {}
            (Self::Integers(lists, _), Some(Cell::Integers(items))) => lists.append_value(items),
            (Self::Integers(lists, _), _) => lists.append_null(),
        }
    }

    fn finish(self, rows: usize) -> Result<ArrayRef, FilesError> {
        match self {
            Self::Field(column) => Ok(column.finish(rows)),
            Self::Integers(mut lists, ty) => {
                cast(&lists.finish(), &ty).map_err(|e| FilesError::Arrow(e.to_string()))
            }
        }
    }
}

/// The Parquet schema that Arrow's conversion gives, with uuids and JSON marked as such.
fn parquet_schema(
    arrow: &Schema,
    columns: &[(String, ColumnType)],
) -> Result<SchemaDescriptor, ParquetError> {
    let converted = ArrowSchemaConverter::new().convert(arrow)?;
    let root = converted.root_schema();
    let fields = root
        .get_fields()
        .iter()
        .zip(columns)
        .map(|(field, (name, ty))| {
            let marked = match ty {
                ColumnType::Field(FieldType::Uuid) => {
                    Type::primitive_type_builder(name, PhysicalType::FIXED_LEN_BYTE_ARRAY)
                        .with_length(16)
                        .with_logical_type(Some(LogicalType::Uuid))
                }
                ColumnType::Field(FieldType::Jsonb) => {
                    Type::primitive_type_builder(name, PhysicalType::BYTE_ARRAY)
                        .with_logical_type(Some(LogicalType::Json))
                }
                _ => return Ok(Arc::clone(field)),
            };
            let marked = marked.with_repetition(Repetition::OPTIONAL);
            marked.build().map(Arc::new)
        })
        .collect::<Result<Vec<_>, ParquetError>>()?;
    let root = Type::group_type_builder(root.name())
        .with_fields(fields)
        .build()?;
    Ok(SchemaDescriptor::new(Arc::new(root)))
}

/// Where the bytes of a file go.
pub enum Destination {
    /// To be made durable at the end.
    File(File),
    /// Somebody takes them off.
    Gathered(Gathered),
}

impl Write for Destination {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.write(bytes),
            Self::Gathered(gathered) => {
                gathered.bytes().extend_from_slice(bytes);
                Ok(bytes.len())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::File(file) => file.flush(),
            Self::Gathered(_) => Ok(()),
        }
    }
}

impl Destination {
    fn end(&self) -> io::Result<()> {
        match self {
            Self::File(file) => file.sync_all(),
            Self::Gathered(_) => Ok(()),
        }
    }
}

/// Bytes written that are taken off part by part. Clones share them.
#[derive(Clone, Default)]
pub struct Gathered(Arc<Mutex<BytesMut>>);

impl Gathered {
    fn bytes(&self) -> MutexGuard<'_, BytesMut> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// So many bytes, if there are more.
    pub fn take(&self, bytes: usize) -> Option<Bytes> {
        let mut all = self.bytes();
        (all.len() > bytes).then(|| all.split_to(bytes).freeze())
    }

    pub fn take_rest(&self) -> Bytes {
        self.bytes().split().freeze()
    }
}

type Buffered = BufWriter<Destination>;

/// The file, compressed on the way.
enum Output {
    Plain(Buffered),
    Gzip(GzEncoder<Buffered>),
    Zstd(zstd::stream::write::Encoder<'static, Buffered>),
}

impl Output {
    fn new(file: Destination, compression: Compression) -> io::Result<Self> {
        let file = BufWriter::with_capacity(BUFFER_BYTES, file);
        Ok(match compression {
            Compression::None => Self::Plain(file),
            Compression::Gzip => Self::Gzip(GzEncoder::new(file, flate2::Compression::default())),
            Compression::Zstd => Self::Zstd(zstd::stream::write::Encoder::new(file, ZSTD_LEVEL)?),
        })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(out) => out.write_all(bytes),
            Self::Gzip(out) => out.write_all(bytes),
            Self::Zstd(out) => out.write_all(bytes),
        }
    }

    fn finish(self) -> io::Result<()> {
        let mut file = match self {
            Self::Plain(out) => out,
            Self::Gzip(out) => out.finish()?,
            Self::Zstd(out) => out.finish()?,
        };
        file.flush()?;
        file.get_ref().end()
    }
}

/// Columns in the making.
struct Rows {
    schema: SchemaRef,
    types: Vec<ColumnType>,
    columns: Vec<Making>,
    rows: usize,
    /// Of the long values among them.
    bytes: usize,
}

impl Rows {
    fn columns(types: &[ColumnType]) -> Result<Vec<Making>, FilesError> {
        types.iter().map(|&ty| Making::new(ty)).collect()
    }

    fn take(&mut self) -> Result<RecordBatch, FilesError> {
        let done = std::mem::replace(&mut self.columns, Self::columns(&self.types)?);
        let rows = std::mem::take(&mut self.rows);
        self.bytes = 0;
        let arrays = done
            .into_iter()
            .map(|c| c.finish(rows))
            .collect::<Result<Vec<ArrayRef>, _>>()?;
        RecordBatch::try_new(self.schema.clone(), arrays)
            .map_err(|e| FilesError::Arrow(e.to_string()))
    }
}

enum Kind {
    Parquet {
        writer: Box<ArrowWriter<Buffered>>,
        rows: Rows,
    },
    Text(Output),
}

/// A file being written. It is complete and durable after [`Sink::finish`] only.
pub struct Sink {
    name: String,
    kind: Kind,
    line: Vec<u8>,
    /// There is one column only.
    is_single: bool,
    bytes: u64,
}

impl Sink {
    /// Writes to `file`, which is called `name`; its suffix says how text is compressed.
    ///
    /// Error: 42701 two columns of one name, of which readers see one; where lines have the names, the first of them.
    pub fn new(
        file: Destination,
        name: &str,
        format: Format,
        columns: &[(String, ColumnType)],
    ) -> Result<Self, FilesError> {
        let form = row_form(format)?;
        ensure_different(columns.iter().map(|(name, _)| name.as_str()))?;
        let failed = |e| FilesError::io("write", name, &e);
        let compression = Compression::of_name(name);
        let kind = if form == RowForm::Values {
            if compression != Compression::None {
                return Err(FilesError::Unsupported {
                    message: "Parquet inside of another compression cannot be written".to_owned(),
                    hint: "Parquet compresses its columns itself: leave the suffix away."
                        .to_owned(),
                });
            }
            if columns.is_empty() {
                return Err(FilesError::Unsupported {
                    message: "rows without columns cannot be written as Parquet".to_owned(),
                    hint: "Select at least one column.".to_owned(),
                });
            }
            let fields: Vec<Field> = columns
                .iter()
                .map(|(name, ty)| Field::new(name, ty.arrow(), true))
                .collect();
            let schema = Arc::new(Schema::new(fields));
            let level =
                ZstdLevel::try_new(ZSTD_LEVEL).map_err(|e| FilesError::Arrow(e.to_string()))?;
            let properties = WriterProperties::builder()
                .set_compression(ParquetCompression::ZSTD(level))
                .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
                .set_max_row_group_bytes(Some(ROW_GROUP_BYTES))
                .build();
            let options = parquet_schema(&schema, columns).map(|parquet| {
                ArrowWriterOptions::new()
                    .with_properties(properties)
                    .with_parquet_schema(parquet)
            });
            let file = BufWriter::with_capacity(BUFFER_BYTES, file);
            let writer = options
                .and_then(|options| {
                    ArrowWriter::try_new_with_options(file, schema.clone(), options)
                })
                .map_err(|e| parquet_failed(name, e))?;
            let types: Vec<ColumnType> = columns.iter().map(|(_, ty)| *ty).collect();
            Kind::Parquet {
                writer: Box::new(writer),
                rows: Rows {
                    columns: Rows::columns(&types)?,
                    types,
                    schema,
                    rows: 0,
                    bytes: 0,
                },
            }
        } else {
            Kind::Text(Output::new(file, compression).map_err(failed)?)
        };
        let mut sink = Self {
            name: name.to_owned(),
            kind,
            line: Vec::new(),
            is_single: columns.len() == 1,
            bytes: 0,
        };
        if form == RowForm::Cells {
            let names = columns.iter().map(|(name, _)| Some(name.as_str()));
            sink.cells(names)?;
        }
        Ok(sink)
    }

    /// Appends a row of typed values.
    pub fn values<'a>(
        &mut self,
        values: impl Iterator<Item = Option<Cell<'a>>>,
    ) -> Result<(), FilesError> {
        let Kind::Parquet { writer, rows } = &mut self.kind else {
            return Err(FilesError::Arrow("rows of another form".to_owned()));
        };
        for (column, value) in rows.columns.iter_mut().zip(values) {
            let bytes = value.as_ref().map_or(0, Cell::bytes);
            rows.bytes += bytes;
            self.bytes += bytes as u64;
            column.append(rows.rows, value);
        }
        rows.rows += 1;
        if rows.rows == BATCH_ROWS || rows.bytes >= BATCH_BYTES {
            let batch = rows.take()?;
            writer
                .write(&batch)
                .map_err(|e| parquet_failed(&self.name, e))?;
        }
        Ok(())
    }

    /// Appends a row of cells.
    pub fn cells<'a>(
        &mut self,
        cells: impl Iterator<Item = Option<&'a str>>,
    ) -> Result<(), FilesError> {
        self.line.clear();
        for (i, cell) in cells.enumerate() {
            if i > 0 {
                self.line.push(b',');
            }
            let Some(text) = cell else {
                continue;
            };
            // An empty cell without quotes is no value; a line of `\.` ends the data for COPY.
            let quoted = text.is_empty()
                || (self.is_single && text == "\\.")
                || text
                    .bytes()
                    .any(|b| matches!(b, b',' | b'"' | b'\r' | b'\n'));
            if quoted {
                self.line.push(b'"');
                for byte in text.bytes() {
                    if byte == b'"' {
                        self.line.push(b'"');
                    }
                    self.line.push(byte);
                }
                self.line.push(b'"');
            } else {
                self.line.extend_from_slice(text.as_bytes());
            }
        }
        self.end_line()
    }

    /// Appends a JSON text as a line.
    pub fn line(&mut self, json: &str) -> Result<(), FilesError> {
        if self.bytes == 0 {
            let mut names = Vec::new();
            // Not ours to judge if it is no object.
            let _walked = json::object_entries(json, |name, _| names.push(name.to_owned()));
            ensure_different(names.iter().map(String::as_str))?;
        }
        self.line.clear();
        self.line.extend_from_slice(json.as_bytes());
        self.end_line()
    }

    /// About the bytes of all rows so far, before compression; of typed values those of the long ones.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn end_line(&mut self) -> Result<(), FilesError> {
        self.line.push(b'\n');
        self.bytes += self.line.len() as u64;
        let Kind::Text(output) = &mut self.kind else {
            return Err(FilesError::Arrow("rows of another form".to_owned()));
        };
        output
            .write(&self.line)
            .map_err(|e| FilesError::io("write", &self.name, &e))
    }

    /// Ends the file and makes it durable.
    pub fn finish(self) -> Result<(), FilesError> {
        let failed = |e: io::Error| FilesError::io("write", &self.name, &e);
        match self.kind {
            Kind::Text(output) => output.finish().map_err(failed),
            Kind::Parquet {
                mut writer,
                mut rows,
            } => {
                if rows.rows > 0 {
                    let batch = rows.take()?;
                    writer
                        .write(&batch)
                        .map_err(|e| parquet_failed(&self.name, e))?;
                }
                let mut file = writer
                    .into_inner()
                    .map_err(|e| parquet_failed(&self.name, e))?;
                file.flush().map_err(failed)?;
                file.get_ref().end().map_err(failed)
            }
        }
    }
}

fn ensure_different<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), FilesError> {
    let mut seen = HashSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(FilesError::SameName(name.to_owned()));
        }
    }
    Ok(())
}

fn parquet_failed(name: &str, error: ParquetError) -> FilesError {
    match error {
        ParquetError::External(source) => match source.downcast::<io::Error>() {
            Ok(io) => FilesError::io("write", name, &io),
            Err(other) => FilesError::Arrow(other.to_string()),
        },
        other => FilesError::Arrow(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Options;
    use crate::locate::Found;
    use crate::source::{self, Meter, Position, Rows as Piece, Spec};
    use arrow::array::{Array, AsArray};
    use std::borrow::Cow;

    #[test]
    fn what_is_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let columns = [
            ("a".to_owned(), ColumnType::Field(FieldType::Text)),
            ("b,c".to_owned(), ColumnType::Field(FieldType::Int8)),
        ];
        let spec = Spec {
            format: None,
            options: Options::default(),
            max_record_bytes: 1 << 20,
        };
        for name in ["x.csv", "x.csv.gz", "x.csv.zst", "x.parquet"] {
            let path = folder.path().join(name);
            let format = Format::of_name(name).unwrap();
            let file = File::create(&path).unwrap();
            let mut sink = Sink::new(Destination::File(file), name, format, &columns).unwrap();
            for n in 0..20_000i64 {
                let text = match n % 4 {
                    0 => None,
                    1 => Some(String::new()),
                    2 => Some(format!("say \"{n}\",\nmore")),
                    _ => Some(n.to_string()),
                };
                if row_form(format).unwrap() == RowForm::Values {
                    let text = text.map(|t| Cell::Value(Value::Text(Cow::Owned(t))));
                    sink.values([text, Some(Cell::Value(Value::Int8(n)))].into_iter())
                        .unwrap();
                } else {
                    let number = n.to_string();
                    sink.cells([text.as_deref(), Some(&number)].into_iter())
                        .unwrap();
                }
            }
            sink.finish().unwrap();
            let meter = Meter::default();
            let found = Found::file(&path, name);
            let mut source = source::open(&found, &spec, Position::default(), &meter).unwrap();
            let (mut rows, mut nulls, mut empty, mut lines) = (0, 0, 0, 0);
            while let Some(piece) = source.next().unwrap() {
                assert!(piece.bad.is_empty());
                let Piece::Columns { batch, .. } = piece.rows else {
                    panic!("{name} gives columns");
                };
                let text = crate::cell::plain(batch.column_by_name("a").unwrap()).unwrap();
                let text = text.as_string::<i32>();
                rows += text.len();
                nulls += text.null_count();
                empty += text.iter().flatten().filter(|t| t.is_empty()).count();
                lines += text
                    .iter()
                    .flatten()
                    .filter(|t| t.contains("\",\nmore"))
                    .count();
                assert!(batch.column_by_name("b,c").is_some());
            }
            assert_eq!(
                (rows, nulls, empty, lines),
                (20_000, 5_000, 5_000, 5_000),
                "{name}"
            );
        }
        for (name, columns) in [("y.avro", &columns[..]), ("y.parquet", &[])] {
            let file = Destination::File(File::create(folder.path().join("y")).unwrap());
            let refused = Sink::new(file, name, Format::of_name(name).unwrap(), columns);
            assert_eq!(refused.map(drop).map_err(|e| e.sqlstate()), Err("0A000"));
        }
    }

    fn gathered(
        name: &str,
        columns: &[(String, ColumnType)],
        write: impl FnOnce(&mut Sink),
    ) -> Bytes {
        let to = Gathered::default();
        let format = Format::of_name(name).unwrap();
        let mut sink = Sink::new(Destination::Gathered(to.clone()), name, format, columns).unwrap();
        write(&mut sink);
        sink.finish().unwrap();
        to.take_rest()
    }

    #[test]
    fn a_line_that_copy_takes_for_the_end_is_quoted() {
        let column = |name: &str| (name.to_owned(), ColumnType::Field(FieldType::Text));
        let end = Some("\\.");
        let one = gathered("x.csv", &[column("a")], |sink| {
            sink.cells([end].into_iter()).unwrap();
            sink.cells([Some("\\.x")].into_iter()).unwrap();
        });
        assert_eq!(one, "a\n\"\\.\"\n\\.x\n");
        let two = gathered("x.csv", &[column("a"), column("b")], |sink| {
            sink.cells([end, end].into_iter()).unwrap();
        });
        assert_eq!(two, "a,b\n\\.,\\.\n");
    }

    #[test]
    fn columns_have_names_of_their_own() {
        let column = |name: &str| (name.to_owned(), ColumnType::Field(FieldType::Text));
        let sink = |name: &str, columns: &[(String, ColumnType)]| {
            let to = Destination::Gathered(Gathered::default());
            Sink::new(to, name, Format::of_name(name).unwrap(), columns)
        };
        for name in ["x.csv", "x.parquet"] {
            assert!(sink(name, &[column("a"), column("A")]).is_ok());
            let refused = sink(name, &[column("a"), column("b"), column("a")]);
            assert_eq!(
                refused.map(drop),
                Err(FilesError::SameName("a".to_owned())),
                "{name}"
            );
        }
        let mut lines = sink("x.ndjson", &[column("line")]).unwrap();
        let refused = lines.line(r#"{"a":1,"b":{"a":2},"\u0061":3}"#);
        assert_eq!(refused, Err(FilesError::SameName("a".to_owned())));
        lines.line(r#"{"a":1,"b":{"a":2}}"#).unwrap();
    }

    #[test]
    fn long_values_do_not_wait_for_others() {
        let text = "x".repeat(BATCH_BYTES / 4);
        let columns = [("a".to_owned(), ColumnType::Field(FieldType::Text))];
        gathered("x.parquet", &columns, |sink| {
            for n in 0..10 {
                let value = Value::Text(Cow::Borrowed(&text));
                sink.values([Some(Cell::Value(value))].into_iter()).unwrap();
                let Kind::Parquet { rows, .. } = &sink.kind else {
                    panic!("a file of columns");
                };
                assert_eq!(rows.rows, (n + 1) % 4);
            }
        });
    }
}
