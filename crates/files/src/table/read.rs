//! The rows of one file as columns that are known, a bounded piece at a time.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::types::{Float32Type, Float64Type};
use arrow::array::{
    Array, ArrayRef, AsArray, Int64Array, RecordBatch, RecordBatchOptions, StringArray,
    new_null_array,
};
use arrow::compute::take;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::statistics::StatisticsConverter;
use parquet::file::metadata::RowGroupMetaData;
use rakam_event::column::Column;
use rakam_event::json::{self, MAX_DEPTH};

use super::folder;
use super::value::{Form, Unfit, Wanted, convert, of_json};
use crate::error::FilesError;
use crate::format::{Compression, Format};
use crate::input::Meter;
use crate::locate::Found;
use crate::parquet_file::{self, ParquetFile};
use crate::parquet_rows::{Batches, Bound};
use crate::source::{self, Position, Rows, Source, Spec, TextEvent};

/// Rows of a batch of a Parquet file, at most; of text see [`source::PIECE_ROWS`].
const BATCH_ROWS: usize = 8192;
/// Fewer of long rows.
const BATCH_BYTES: u64 = 2 << 20;
/// What is worth a part of its own when a Parquet file is shared among readers.
const PART_BYTES: u64 = 16 << 20;

/// What is known of a column in some rows without reading them. Bounds are arrays of one value, or null.
#[derive(Debug)]
pub struct Known {
    pub rows: u64,
    pub nulls: Option<u64>,
    pub min: Option<ArrayRef>,
    pub max: Option<ArrayRef>,
}

/// Tells which rows nobody wants.
pub trait Pruner: Send + Sync {
    /// The wanted columns, by number, about which it has something to say.
    fn columns(&self) -> &[usize];

    /// False if none of these rows is wanted.
    fn may_match(&self, column: usize, known: &Known) -> bool;
}

/// What was read of a file, and what was not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Read {
    pub row_groups: u64,
    pub row_groups_skipped: u64,
    /// The file was not opened: its folders say that nothing of it is wanted.
    pub skipped: bool,
}

/// A file, or a part of a Parquet file.
#[derive(Debug, Clone)]
pub struct Part {
    pub file: Found,
    pub format: Format,
    pub part: u64,
    pub parts: u64,
}

/// The parts of a file that as many readers may share.
pub fn parts(file: &Found, spec: &Spec, readers: usize) -> Result<Vec<Part>, FilesError> {
    let format = match spec.format {
        Some(format) => format,
        None => Format::of_name(&file.name)?,
    };
    let parts = match format {
        Format::Parquet => (file.bytes / PART_BYTES).clamp(1, readers.max(1) as u64),
        _ => 1,
    };
    let part = |part| Part {
        file: file.clone(),
        format,
        part,
        parts,
    };
    Ok((0..parts).map(part).collect())
}

enum Input {
    Nothing,
    Parquet {
        file: Box<ParquetFile>,
        batches: Box<Batches>,
        /// For each wanted column its place in a batch.
        places: Vec<Option<usize>>,
        /// The numbers of the rows to come, from 1.
        rows: Box<dyn Iterator<Item = u64> + Send>,
    },
    Rows {
        source: Box<dyn Source>,
        meter: Meter,
    },
}

/// A file being read.
pub struct Reader {
    name: String,
    wanted: Arc<[Wanted]>,
    /// What the folders say, by the number of the wanted column.
    folders: HashMap<usize, Option<String>>,
    schema: SchemaRef,
    input: Input,
    pub read: Read,
}

impl Reader {
    /// It ends when the meter's stop says so, with an error.
    pub fn open(
        part: &Part,
        spec: &Spec,
        wanted: &Arc<[Wanted]>,
        pruner: &dyn Pruner,
        meter: &Meter,
    ) -> Result<Self, FilesError> {
        let file = &part.file;
        let mut folders = HashMap::new();
        for (key, value) in folder::values(&file.name) {
            if let Some(column) = wanted.iter().position(|w| w.name == key) {
                folders.insert(column, value);
            }
        }
        let fields: Vec<Field> = wanted
            .iter()
            .map(|w| Field::new(&w.name, w.form.carrier().arrow(), true))
            .collect();
        let mut reader = Self {
            name: file.name.clone(),
            wanted: Arc::clone(wanted),
            folders,
            schema: Arc::new(Schema::new(fields)),
            input: Input::Nothing,
            read: Read::default(),
        };
        if !reader.folders_match(pruner)? {
            reader.read.skipped = true;
            return Ok(reader);
        }
        reader.input = match part.format {
            Format::Parquet => reader.parquet(part, pruner, meter)?,
            format => {
                let spec = Spec {
                    format: Some(format),
                    ..spec.clone()
                };
                Input::Rows {
                    source: source::open(file, &spec, Position::default(), meter)?,
                    meter: meter.clone(),
                }
            }
        };
        Ok(reader)
    }

    /// Bytes of the file read so far, where it is read from its front.
    pub fn bytes(&self) -> u64 {
        match &self.input {
            Input::Rows { meter, .. } => meter.bytes(),
            Input::Nothing | Input::Parquet { .. } => 0,
        }
    }

    /// About the memory that the next call of [`Self::next_batch`] needs; 0 where only the rows will tell.
    pub fn next_bytes(&self) -> usize {
        match &self.input {
            Input::Parquet { batches, .. } => {
                usize::try_from(batches.next_bytes()).unwrap_or(usize::MAX)
            }
            Input::Nothing | Input::Rows { .. } => 0,
        }
    }

    fn folders_match(&self, pruner: &dyn Pruner) -> Result<bool, FilesError> {
        for &column in pruner.columns() {
            let Some(value) = self.folders.get(&column) else {
                continue;
            };
            let bound = self.folder_column(column, value.as_deref(), 1)?;
            let known = Known {
                rows: 1,
                nulls: Some(u64::from(value.is_none())),
                min: Some(Arc::clone(&bound)),
                max: Some(bound),
            };
            if !pruner.may_match(column, &known) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn folder_column(
        &self,
        column: usize,
        value: Option<&str>,
        rows: usize,
    ) -> Result<ArrayRef, FilesError> {
        let form = self.wanted[column].form;
        let Some(value) = value else {
            return Ok(new_null_array(&form.carrier().arrow(), rows));
        };
        let text: ArrayRef = Arc::new(StringArray::from(vec![value]));
        let one = convert(&text, form, true).map_err(|unfit| FilesError::BadFolder {
            name: self.name.clone(),
            column: self.wanted[column].name.clone(),
            reason: unfit.reason,
        })?;
        let same = Int64Array::from_value(0, rows);
        take(&one, &same, None).map_err(|e| FilesError::Arrow(e.to_string()))
    }

    fn unfit(&self, column: usize, lines: &[u64], unfit: Unfit) -> FilesError {
        FilesError::BadValue {
            name: self.name.clone(),
            line: lines.get(unfit.row).copied().unwrap_or(0),
            column: self.wanted[column].name.clone(),
            reason: unfit.reason,
        }
    }

    fn parquet(
        &mut self,
        part: &Part,
        pruner: &dyn Pruner,
        meter: &Meter,
    ) -> Result<Input, FilesError> {
        let name = &self.name;
        if Compression::of_name(name) != Compression::None {
            return Err(parquet_file::compressed(name));
        }
        let (file, builder) = ParquetFile::open(&part.file)?;
        let arrow = Arc::clone(builder.schema());
        let mut roots = HashMap::new();
        for (root, field) in arrow.fields().iter().enumerate() {
            if roots.insert(field.name().as_str(), root).is_some() {
                return Err(FilesError::SameColumn {
                    name: name.clone(),
                    column: field.name().clone(),
                });
            }
        }
        let mut read: Vec<usize> = Vec::new();
        for (column, wanted) in self.wanted.iter().enumerate() {
            if !self.folders.contains_key(&column) {
                read.extend(roots.get(wanted.name.as_str()));
            }
        }
        read.sort_unstable();
        let places = self
            .wanted
            .iter()
            .map(|w| read.binary_search(roots.get(w.name.as_str())?).ok())
            .collect();
        let groups = builder.metadata().row_groups();
        let (mut kept, mut numbers) = (Vec::new(), Vec::new());
        let mut next = 1;
        for (index, group) in groups.iter().enumerate() {
            let first = next;
            next = group.num_rows().max(0).unsigned_abs().saturating_add(next);
            if index as u64 % part.parts != part.part {
                continue;
            }
            if self.group_matches(group, &arrow, builder.parquet_schema(), pruner)? {
                kept.push(index);
                numbers.push(first..next);
            } else {
                self.read.row_groups_skipped += 1;
            }
        }
        self.read.row_groups = kept.len() as u64;
        let mask = ProjectionMask::roots(builder.parquet_schema(), read);
        let bound = Bound {
            rows: BATCH_ROWS,
            bytes: BATCH_BYTES,
        };
        let batches = file.build(builder, kept, mask, bound, meter)?;
        Ok(Input::Parquet {
            file: Box::new(file),
            batches: Box::new(batches),
            places,
            rows: Box::new(numbers.into_iter().flatten()),
        })
    }

    /// Whether a row group may have a wanted row, by its statistics.
    fn group_matches(
        &self,
        group: &RowGroupMetaData,
        arrow: &Schema,
        parquet: &parquet::schema::types::SchemaDescriptor,
        pruner: &dyn Pruner,
    ) -> Result<bool, FilesError> {
        let rows = group.num_rows().max(0) as u64;
        for &column in pruner.columns() {
            if self.folders.contains_key(&column) {
                continue;
            }
            let wanted = &self.wanted[column];
            let known = match arrow.field_with_name(&wanted.name) {
                Ok(field) => match known(group, field, arrow, parquet, wanted.form) {
                    Some(known) => known,
                    None => continue,
                },
                Err(_) => Known {
                    rows,
                    nulls: Some(rows),
                    min: None,
                    max: None,
                },
            };
            if !pruner.may_match(column, &known) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The next rows, perhaps none, as columns in the order of the wanted ones; None at the end.
    pub fn next_batch(&mut self) -> Result<Option<RecordBatch>, FilesError> {
        match &mut self.input {
            Input::Nothing => Ok(None),
            Input::Parquet {
                file,
                batches,
                places,
                rows: numbers,
            } => {
                let Some(batch) = file.next(batches)? else {
                    return Ok(None);
                };
                let rows = batch.num_rows();
                let lines: Vec<u64> = numbers.take(rows).collect();
                let found = places
                    .iter()
                    .map(|place| place.map(|place| Arc::clone(batch.column(place))))
                    .collect();
                self.columns(found, rows, &lines, false).map(Some)
            }
            Input::Rows { source, .. } => {
                let Some(piece) = source.next()? else {
                    return Ok(None);
                };
                if let Some(bad) = piece.bad.first() {
                    return Err(FilesError::BadRow {
                        name: self.name.clone(),
                        line: bad.line,
                        reason: bad.error.clone(),
                    });
                }
                match piece.rows {
                    Rows::Events(events) => self.events(&events).map(Some),
                    Rows::Columns {
                        batch,
                        lines,
                        untyped,
                    } => {
                        let schema = batch.schema();
                        for (i, field) in schema.fields().iter().enumerate() {
                            if schema.fields()[..i]
                                .iter()
                                .any(|f| f.name() == field.name())
                            {
                                return Err(FilesError::SameColumn {
                                    name: self.name.clone(),
                                    column: field.name().clone(),
                                });
                            }
                        }
                        let found = self
                            .wanted
                            .iter()
                            .map(|w| batch.column_by_name(&w.name).cloned())
                            .collect();
                        self.columns(found, batch.num_rows(), &lines, untyped)
                            .map(Some)
                    }
                }
            }
        }
    }

    /// Columns of the file, where it has them, as the wanted ones.
    fn columns(
        &self,
        found: Vec<Option<ArrayRef>>,
        rows: usize,
        lines: &[u64],
        untyped: bool,
    ) -> Result<RecordBatch, FilesError> {
        let columns = found
            .into_iter()
            .enumerate()
            .map(|(column, array)| {
                let form = self.wanted[column].form;
                match (self.folders.get(&column), array) {
                    (Some(value), _) => self.folder_column(column, value.as_deref(), rows),
                    (None, Some(array)) => convert(&array, form, untyped)
                        .map_err(|unfit| self.unfit(column, lines, unfit)),
                    (None, None) => Ok(new_null_array(&form.carrier().arrow(), rows)),
                }
            })
            .collect::<Result<Vec<_>, _>>()?;
        self.batch(columns, rows)
    }

    fn batch(&self, columns: Vec<ArrayRef>, rows: usize) -> Result<RecordBatch, FilesError> {
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        RecordBatch::try_new_with_options(Arc::clone(&self.schema), columns, &options)
            .map_err(|e| FilesError::Arrow(e.to_string()))
    }

    /// JSON texts as the wanted columns; of members with the same name the last wins, as in jsonb.
    fn events(&self, events: &[TextEvent]) -> Result<RecordBatch, FilesError> {
        let places: HashMap<&str, usize> = self
            .wanted
            .iter()
            .enumerate()
            .map(|(column, w)| (w.name.as_str(), column))
            .collect();
        let mut columns = self
            .wanted
            .iter()
            .map(|w| Column::new(&w.form.carrier().arrow()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| FilesError::Arrow(e.to_string()))?;
        let mut raw: Vec<Option<&str>> = vec![None; self.wanted.len()];
        for (row, event) in events.iter().enumerate() {
            raw.fill(None);
            let bad = |reason: String| FilesError::BadRow {
                name: self.name.clone(),
                line: event.line,
                reason,
            };
            json::check(&event.json, MAX_DEPTH)
                .and_then(|()| {
                    json::object_entries(&event.json, |key, value| {
                        if let Some(&column) = places.get(key) {
                            raw[column] = Some(value);
                        }
                    })
                })
                .map_err(|e| bad(e.to_string()))?;
            for (column, raw) in raw.iter().enumerate() {
                let Some(raw) = raw.filter(|_| !self.folders.contains_key(&column)) else {
                    continue;
                };
                let form = self.wanted[column].form;
                let value = of_json(raw, form).map_err(|reason| FilesError::BadValue {
                    name: self.name.clone(),
                    line: event.line,
                    column: self.wanted[column].name.clone(),
                    reason,
                })?;
                if let Some(value) = value {
                    columns[column].append(row, value);
                }
            }
        }
        let rows = events.len();
        let columns = columns
            .into_iter()
            .enumerate()
            .map(|(column, made)| match self.folders.get(&column) {
                Some(value) => self.folder_column(column, value.as_deref(), rows),
                None => Ok(made.finish(rows)),
            })
            .collect::<Result<Vec<_>, _>>()?;
        self.batch(columns, rows)
    }
}

/// What the statistics of a row group say of a column, in the column's own form. Bounds are left out where their order is not
/// that of the values in Postgres: of old writers' statistics, and where the file's type is another one.
fn known(
    group: &RowGroupMetaData,
    field: &Field,
    arrow: &Schema,
    parquet: &parquet::schema::types::SchemaDescriptor,
    form: Form,
) -> Option<Known> {
    let converter = StatisticsConverter::try_new(field.name(), arrow, parquet)
        .ok()?
        .with_missing_null_counts_as_zero(false);
    let statistics = group
        .column(converter.parquet_column_index()?)
        .statistics()?;
    let nulls = converter.row_group_null_counts([group]).ok()?;
    let nulls = nulls.is_valid(0).then(|| nulls.value(0));
    let (mut min, mut max) = (None, None);
    if ordered_alike(field.data_type(), form) && !statistics.is_min_max_deprecated() {
        let bound = |array: Result<ArrayRef, _>| -> Option<ArrayRef> {
            let array = array.ok().filter(|a: &ArrayRef| a.is_valid(0))?;
            convert(&array, form, false).ok()
        };
        min = bound(converter.row_group_mins([group]));
        max = bound(converter.row_group_maxes([group]));
        if field.data_type().is_floating() {
            // Writers leave NaN out, which Postgres takes for the greatest.
            max = None;
            // Others have it as the least.
            min = min.filter(|min| !is_nan(min));
        }
    }
    Some(Known {
        rows: group.num_rows().max(0) as u64,
        nulls,
        min,
        max,
    })
}

fn is_nan(one: &ArrayRef) -> bool {
    let double = one.as_primitive_opt::<Float64Type>();
    let single = one.as_primitive_opt::<Float32Type>();
    double.is_some_and(|v| v.value(0).is_nan()) || single.is_some_and(|v| v.value(0).is_nan())
}

fn ordered_alike(ty: &DataType, form: Form) -> bool {
    use rakam_event::types::FieldType as F;
    let Form::Field(field) = form else {
        return false;
    };
    match field {
        F::Bool => *ty == DataType::Boolean,
        F::Int4 | F::Int8 => ty.is_integer(),
        F::Float4 | F::Float8 => ty.is_floating(),
        F::Text => matches!(
            ty,
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View
        ),
        F::Date => matches!(ty, DataType::Date32),
        F::Timestamptz => matches!(ty, DataType::Timestamp(..)),
        F::Numeric { .. } => matches!(ty, DataType::Decimal128(..)),
        _ => false,
    }
}
