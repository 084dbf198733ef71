//! Rows of a file as the stored layout of a collection: names normalised, values typed by the rules of events, what does
//! not fit kept in `_extra` and told about, rows that are no events put aside.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch, RecordBatchOptions,
    StringArray, StringBuilder, TimestampMicrosecondArray, new_null_array,
};
use arrow::compute::filter_record_batch;
use arrow::datatypes::{DataType, SchemaRef};
use rakam_event::batch::{BatchBuilder, EventStamp, InvalidCount, InvalidValue, Layout};
use rakam_event::discovery::Discovery;
use rakam_event::entry::{self, Limits, MAX_ID_BYTES};
use rakam_event::error::EventError;
use rakam_event::json::{self, Cutter, ObjectWriter};
use rakam_event::names;
use rakam_event::schema::{EXTRA, ID, RECEIVED_AT, Schema, TIME, XID};
use rakam_event::time::{self, MAX_TIME_US, MIN_TIME_US};
use rakam_event::types::FieldType;

use crate::cast::{self, Note};
use crate::cell;
use crate::error::FilesError;
use crate::log::{Entry, Log};
use crate::source::{BadRow, Rows, TextEvent};

/// Where a column of the file goes.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Target {
    Time,
    ReceivedAt,
    /// An object whose members go into `_extra`.
    Members,
    /// The field at this position of the schema.
    Field(usize),
    /// Into `_extra` under this name.
    Keep(String),
    /// It has no values, or a later column has its name.
    Skip,
}

/// Converts the rows of files for one collection.
pub struct Converter {
    schema: Schema,
    arrow: SchemaRef,
    limits: Limits,
    may_set_received_at: bool,
    /// By type, as long as there has been need of it.
    nulls: HashMap<DataType, ArrayRef>,
    log: Log,
}

impl Converter {
    pub fn new(schema: &Schema, limits: Limits, may_set_received_at: bool) -> Self {
        Self {
            schema: schema.clone(),
            arrow: schema.arrow(),
            limits,
            may_set_received_at,
            nulls: HashMap::new(),
            log: Log::default(),
        }
    }

    /// The collection has other fields now.
    pub fn set_schema(&mut self, schema: &Schema) {
        self.schema = schema.clone();
        self.arrow = schema.arrow();
    }

    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Fields that the rows have and the schema has not, with the types that the file declares or the values show, as many
    /// as there is room for.
    pub fn new_fields(
        &self,
        rows: &Rows,
        declared: &[(String, FieldType)],
    ) -> Vec<(String, FieldType)> {
        let known = self.schema.fields.iter().filter(|f| f.is_user()).count();
        let mut room = self.limits.max_fields.saturating_sub(known);
        let mut fields = BTreeMap::<String, FieldType>::new();
        // The type is looked for where the name is new only.
        let mut add = |raw: &str, ty: &dyn Fn() -> Option<FieldType>| {
            let name = names::field_name(raw);
            let is_new = room > 0
                && names::server_field(raw).is_none()
                && names::can_be_column(&name)
                && self.schema.field(&name).is_none()
                && !fields.contains_key(name.as_ref());
            if is_new && let Some(ty) = ty() {
                room -= 1;
                fields.insert(name.into_owned(), ty);
            }
        };
        for (name, ty) in declared {
            add(name, &|| Some(*ty));
        }
        match rows {
            Rows::Columns {
                batch,
                untyped: true,
                ..
            } => {
                for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
                    add(field.name(), &|| {
                        column.as_string_opt::<i32>().and_then(cast::infer)
                    });
                }
            }
            Rows::Columns { .. } => {}
            Rows::Events(events) => {
                let mut discovery = Discovery::new(&self.schema, self.limits.max_fields);
                for event in events {
                    // They come after whatever was dropped.
                    discovery.observe(&event.json, i64::MAX, i64::MAX);
                }
                for (name, ty) in discovery.new_fields() {
                    add(&name, &|| Some(ty));
                }
            }
        }
        fields.into_iter().collect()
    }

    /// The rows as events of the schema, with the rows that are none. `stamp.xid` is that of every event; `file` is the
    /// name for messages.
    pub fn convert(
        &mut self,
        rows: Rows,
        file: &str,
        stamp: &EventStamp,
    ) -> Result<(RecordBatch, Vec<BadRow>), FilesError> {
        match rows {
            Rows::Events(events) => self.events(&events, stamp),
            Rows::Columns {
                batch,
                lines,
                untyped,
            } => self.columns(&batch, &lines, untyped, file, stamp),
        }
    }

    /// All rows as rows that are no events: of a file that cannot be one of the collection.
    pub fn refuse_all(rows: &Rows, error: &FilesError) -> Result<Vec<BadRow>, FilesError> {
        match rows {
            Rows::Events(events) => Ok((events.iter())
                .map(|event| BadRow::new(event.line, event.json.as_bytes(), error))
                .collect()),
            Rows::Columns { batch, lines, .. } => {
                let sources = (batch.columns().iter())
                    .map(cell::plain)
                    .collect::<Result<Vec<ArrayRef>, _>>()
                    .map_err(|e| FilesError::Arrow(e.to_string()))?;
                let bad = |(row, line): (usize, &u64)| {
                    BadRow::new(*line, shown(batch, &sources, row).as_bytes(), error)
                };
                Ok(lines.iter().enumerate().map(bad).collect())
            }
        }
    }

    /// Tells about a row that is no event.
    pub fn log_bad(&mut self, row: &BadRow, file: &str, received_at_us: i64) {
        let mut raw = String::new();
        json::write_string(&row.sample(), &mut raw);
        self.log.add(&Entry {
            field: "",
            ty: "",
            raw: &raw,
            error: &format!("file \"{file}\", line {}: {}", row.line, row.error),
            event_id: None,
            received_at_us,
        });
    }

    /// What has been told about since the last call: samples, and exact counts in their order.
    pub fn take_log(&mut self) -> (Vec<InvalidValue>, Vec<InvalidCount>) {
        self.log.take()
    }

    fn events(
        &mut self,
        events: &[TextEvent],
        stamp: &EventStamp,
    ) -> Result<(RecordBatch, Vec<BadRow>), FilesError> {
        let mut builder =
            BatchBuilder::new(&self.schema, Layout::Stored, &self.limits).map_err(failed)?;
        let mut bad = Vec::new();
        for event in events {
            let taken = (self.may_set_received_at)
                .then(|| take_received_at(&event.json))
                .flatten();
            let mut stamp = *stamp;
            let json = match &taken {
                Some((rest, raw)) => {
                    match time::event_time(raw) {
                        Some(received_at_us) => stamp.received_at_us = received_at_us,
                        None if raw == "null" => {}
                        None => self.log.add(&Entry {
                            field: RECEIVED_AT,
                            ty: &FieldType::Timestamptz.to_string(),
                            raw,
                            error: &format!("it is no time (line {})", event.line),
                            event_id: None,
                            received_at_us: stamp.received_at_us,
                        }),
                    }
                    rest
                }
                None => &event.json,
            };
            let pushed =
                entry::check_event(json, &self.limits).and_then(|json| builder.push(&json, &stamp));
            if let Err(error) = pushed {
                bad.push(BadRow::new(event.line, event.json.as_bytes(), error));
            }
        }
        let built = builder.finish().map_err(failed)?;
        self.log.extend(built.invalid, built.invalid_counts);
        Ok((built.batch, bad))
    }

    /// Where each column of the file goes.
    fn targets(&self, batch: &RecordBatch) -> Result<Vec<Target>, FilesError> {
        let positions: HashMap<&str, usize> = self
            .schema
            .fields
            .iter()
            .enumerate()
            .map(|(position, field)| (field.name.as_str(), position))
            .collect();
        let mut targets: Vec<Target> = Vec::with_capacity(batch.num_columns());
        for field in batch.schema().fields() {
            let raw = field.name();
            if raw.contains('\0') {
                return Err(FilesError::NulInColumn);
            }
            let target = match names::server_field(raw) {
                Some(RECEIVED_AT) if self.may_set_received_at => Target::ReceivedAt,
                Some(RECEIVED_AT) => return Err(FilesError::ReceivedAt),
                Some(EXTRA) => Target::Members,
                Some(reserved) => return Err(FilesError::ReservedColumn(reserved.to_owned())),
                None => {
                    let name = names::field_name(raw);
                    if !names::can_be_column(&name) {
                        Target::Keep(raw.clone())
                    } else if name == TIME {
                        Target::Time
                    } else {
                        match positions.get(name.as_ref()) {
                            Some(&position) => Target::Field(position),
                            None => Target::Keep(name.into_owned()),
                        }
                    }
                }
            };
            // Of columns with the same name the last wins.
            for earlier in &mut targets {
                if *earlier == target {
                    *earlier = Target::Skip;
                }
            }
            targets.push(if *field.data_type() == DataType::Null {
                Target::Skip
            } else {
                target
            });
        }
        Ok(targets)
    }

    fn columns(
        &mut self,
        batch: &RecordBatch,
        lines: &[u64],
        untyped: bool,
        file: &str,
        stamp: &EventStamp,
    ) -> Result<(RecordBatch, Vec<BadRow>), FilesError> {
        let targets = self.targets(batch)?;
        let arrow_failed = |e: arrow::error::ArrowError| FilesError::Arrow(e.to_string());
        let sources = batch
            .columns()
            .iter()
            .map(cell::plain)
            .collect::<Result<Vec<ArrayRef>, _>>()
            .map_err(arrow_failed)?;
        let mut making = Making {
            refused: refused(&sources, self.limits.max_event_bytes),
            notes: Vec::new(),
            extra: BTreeMap::new(),
            max_string_bytes: self.limits.max_string_bytes,
        };
        let rows = batch.num_rows();
        let mut times = vec![stamp.received_at_us; rows];
        let mut received = vec![stamp.received_at_us; rows];
        let mut fields: Vec<Option<ArrayRef>> = vec![None; self.schema.fields.len()];
        let schema = batch.schema();
        let columns = sources.iter().zip(&targets).zip(schema.fields());
        for ((source, target), column) in columns {
            // Text that the file says is JSON may be any value.
            let untyped_as = |ty| untyped || (ty == FieldType::Jsonb && cell::is_json(column));
            match target {
                Target::Skip => {}
                Target::Time => making.times(source, stamp, &mut times),
                Target::ReceivedAt => cast::times(source, |row, time| match time {
                    Some(us) if (MIN_TIME_US..=MAX_TIME_US).contains(&us) => received[row] = us,
                    _ => making.note(RECEIVED_AT, FieldType::Timestamptz, source, row),
                }),
                Target::Members => making.members(source),
                Target::Keep(name) => making.keep(name, source, untyped),
                Target::Field(position) => {
                    let field = &self.schema.fields[*position];
                    let most = self.limits.max_string_bytes;
                    let cast =
                        cast::cast(source, field.ty, untyped_as(field.ty), most).map_err(failed)?;
                    making.refused.extend(cast.refused);
                    if field.name == ID {
                        making.check_ids(&cast.array);
                    }
                    let told = cast
                        .notes
                        .into_iter()
                        .map(|n| (field.name.clone(), field.ty, n));
                    making.notes.extend(told);
                    fields[*position] = Some(cast.array);
                }
            }
        }
        let ids = self.schema.fields.iter().position(|f| f.name == ID);
        let ids = ids.and_then(|position| fields[position].clone());
        self.settle_notes(&mut making, ids.as_ref(), lines, file, stamp);
        let columns = self
            .arrow
            .fields()
            .iter()
            .enumerate()
            .map(|(position, field)| match field.name().as_str() {
                TIME => timestamps(std::mem::take(&mut times)),
                RECEIVED_AT => timestamps(std::mem::take(&mut received)),
                XID => Arc::new(Int64Array::from_value(stamp.xid, rows)),
                EXTRA if making.extra.is_empty() => nulls(&mut self.nulls, &DataType::Utf8, rows),
                EXTRA => making.extra_column(rows),
                _ => match fields.get_mut(position).and_then(Option::take) {
                    Some(array) => array,
                    None => nulls(&mut self.nulls, field.data_type(), rows),
                },
            })
            // An element's id is in the schema's type only.
            .zip(self.arrow.fields())
            .map(|(array, field)| with_type(array, field.data_type()))
            .collect();
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        let mut stored = RecordBatch::try_new_with_options(self.arrow.clone(), columns, &options)
            .map_err(arrow_failed)?;
        let mut bad = Vec::new();
        if !making.refused.is_empty() {
            let mask: BooleanArray = (0..rows)
                .map(|row| Some(!making.refused.contains_key(&row)))
                .collect();
            stored = filter_record_batch(&stored, &mask).map_err(arrow_failed)?;
            for (row, error) in &making.refused {
                let text = shown(batch, &sources, *row);
                bad.push(BadRow::new(lines[*row], text.as_bytes(), error));
            }
        }
        Ok((stored, bad))
    }

    /// Puts what did not fit into `_extra`, and tells about it.
    fn settle_notes(
        &mut self,
        making: &mut Making,
        ids: Option<&ArrayRef>,
        lines: &[u64],
        file: &str,
        stamp: &EventStamp,
    ) {
        let ids = ids.and_then(|ids| ids.as_string_opt::<i32>());
        for (field, ty, note) in std::mem::take(&mut making.notes) {
            if making.refused.contains_key(&note.row) {
                continue;
            }
            if note.misfit && !matches!(field.as_str(), TIME | RECEIVED_AT | EXTRA) {
                making.put(note.row, &field, &note.raw);
            }
            self.log.add(&Entry {
                field: &field,
                ty: &ty.to_string(),
                raw: &note.raw,
                error: &format!("{} (file \"{file}\", line {})", note.error, lines[note.row]),
                event_id: ids
                    .filter(|i| i.is_valid(note.row))
                    .map(|i| i.value(note.row)),
                received_at_us: stamp.received_at_us,
            });
        }
    }
}

/// An event without its `_received_at`, and that; None if it has none, or is no event.
fn take_received_at(event: &str) -> Option<(String, String)> {
    // Any spelling of the name has this.
    if !event.contains("eceived") && !event.contains("ECEIVED") && !event.contains('\\') {
        return None;
    }
    let mut received = None;
    let mut rest = ObjectWriter::default();
    json::object_entries(event, |key, raw| {
        if names::server_field(key) == Some(RECEIVED_AT) {
            received = Some(raw.to_owned());
        } else {
            rest.key(key).push_str(raw);
        }
    })
    .ok()?;
    let rest = rest.finish().unwrap_or("{}").to_owned();
    received.map(|received| (rest, received))
}

fn failed(error: EventError) -> FilesError {
    FilesError::Arrow(error.to_string())
}

fn timestamps(values: Vec<i64>) -> ArrayRef {
    Arc::new(TimestampMicrosecondArray::from(values).with_data_type(FieldType::Timestamptz.arrow()))
}

/// An array of NULLs; batches share those that they have in common, most of which no row will ever fill.
fn nulls(known: &mut HashMap<DataType, ArrayRef>, ty: &DataType, rows: usize) -> ArrayRef {
    match known.get(ty) {
        Some(nulls) if nulls.len() >= rows => nulls.slice(0, rows),
        _ => {
            let nulls = new_null_array(ty, rows);
            known.insert(ty.clone(), Arc::clone(&nulls));
            nulls
        }
    }
}

/// The array under a type that differs in the metadata of its element only.
fn with_type(array: ArrayRef, ty: &DataType) -> ArrayRef {
    match (ty, array.as_list_opt::<i32>()) {
        (DataType::List(element), Some(list)) => {
            let (_, offsets, values, nulls) = list.clone().into_parts();
            let typed = arrow::array::ListArray::try_new(element.clone(), offsets, values, nulls);
            typed.map_or(array, |typed| Arc::new(typed))
        }
        _ => array,
    }
}

/// Rows that no event may be: with a NUL character, or too large.
fn refused(sources: &[ArrayRef], max_event_bytes: usize) -> BTreeMap<usize, EventError> {
    let mut refused = BTreeMap::new();
    let texts: Vec<&StringArray> = sources.iter().filter_map(|s| s.as_string_opt()).collect();
    for texts in &texts {
        if memchr::memchr(0, texts.value_data()).is_some() {
            let rows = texts.iter().enumerate();
            let with_nul = rows.filter(|(_, t)| t.is_some_and(|t| t.contains('\0')));
            refused.extend(with_nul.map(|(row, _)| (row, EventError::NulCharacter)));
        }
    }
    let longest = |texts: &&StringArray| {
        let lengths = texts
            .value_offsets()
            .windows(2)
            .map(|w| (w[1] - w[0]) as usize);
        lengths.max().unwrap_or(0)
    };
    if texts.iter().map(longest).sum::<usize>() > max_event_bytes {
        for row in 0..texts.first().map_or(0, |t| t.len()) {
            let bytes: usize = texts.iter().map(|t| t.value_length(row) as usize).sum();
            if bytes > max_event_bytes {
                let limit = max_event_bytes;
                refused.insert(row, EventError::TooLarge { bytes, limit });
            }
        }
    }
    refused
}

/// A row of the file as a JSON object, for the log.
fn shown(batch: &RecordBatch, sources: &[ArrayRef], row: usize) -> String {
    let mut text = ObjectWriter::default();
    for (field, source) in batch.schema().fields().iter().zip(sources) {
        if source.is_valid(row) {
            cell::write_json(source, row, text.key(field.name()));
        }
    }
    text.finish().unwrap_or("{}").to_owned()
}

/// What is found while columns are converted.
struct Making {
    refused: BTreeMap<usize, EventError>,
    notes: Vec<(String, FieldType, Note)>,
    extra: BTreeMap<usize, ObjectWriter>,
    max_string_bytes: usize,
}

impl Making {
    fn put(&mut self, row: usize, name: &str, raw: &str) {
        let mut cutter = Cutter::new(self.max_string_bytes);
        let out = self.extra.entry(row).or_default().key(name);
        json::write_compact(raw, &mut cutter, out);
    }

    fn note(&mut self, field: &str, ty: FieldType, source: &ArrayRef, row: usize) {
        let mut raw = String::new();
        cell::write_json(source, row, &mut raw);
        let note = Note {
            row,
            raw,
            error: "value is not a time".to_owned(),
            misfit: true,
        };
        self.notes.push((field.to_owned(), ty, note));
    }

    fn times(&mut self, source: &ArrayRef, stamp: &EventStamp, times: &mut [i64]) {
        let bounds = stamp.time_min_us.max(MIN_TIME_US)..=stamp.time_max_us.min(MAX_TIME_US);
        cast::times(source, |row, time| match time {
            Some(us) if bounds.contains(&us) => times[row] = us,
            Some(_) => {
                self.note(TIME, FieldType::Timestamptz, source, row);
                if let Some((_, _, note)) = self.notes.last_mut() {
                    "time is outside the bounds of the project".clone_into(&mut note.error);
                }
            }
            None => self.note(TIME, FieldType::Timestamptz, source, row),
        });
    }

    /// The members of objects go into `_extra`; what is no object stays there under the column's own name.
    fn members(&mut self, source: &ArrayRef) {
        let mut raw = String::new();
        for row in (0..source.len()).filter(|&row| source.is_valid(row)) {
            raw.clear();
            match source.as_string_opt::<i32>() {
                Some(texts) if texts.value(row).is_empty() => continue,
                Some(texts) => raw.push_str(texts.value(row)),
                None => cell::write_json(source, row, &mut raw),
            }
            if cast::has_nul(&raw) {
                self.refused.insert(row, EventError::NulCharacter);
                continue;
            }
            let mut members = Vec::new();
            let walked = json::object_entries(&raw, |key, value| {
                members.push((key.to_owned(), value.to_owned()));
            });
            if walked.is_err() || !cast::is_json(&raw) {
                let note = Note {
                    row,
                    raw: raw.clone(),
                    error: "value is not a JSON object".to_owned(),
                    misfit: true,
                };
                self.notes.push((EXTRA.to_owned(), FieldType::Jsonb, note));
                continue;
            }
            for (key, value) in members {
                self.put(row, &key, &value);
            }
        }
    }

    fn keep(&mut self, name: &str, source: &ArrayRef, untyped: bool) {
        let mut raw = String::new();
        for row in (0..source.len()).filter(|&row| source.is_valid(row)) {
            raw.clear();
            match source.as_string_opt::<i32>() {
                Some(texts) if untyped && texts.value(row).is_empty() => continue,
                Some(texts) if untyped && cast::is_literal(texts.value(row)) => {
                    raw.push_str(texts.value(row));
                }
                _ => cell::write_json(source, row, &mut raw),
            }
            if cast::has_nul(&raw) {
                self.refused.insert(row, EventError::NulCharacter);
            } else if raw != "null" {
                self.put(row, name, &raw);
            }
        }
    }

    fn check_ids(&mut self, ids: &ArrayRef) {
        let Some(ids) = ids.as_string_opt::<i32>() else {
            return;
        };
        for row in 0..ids.len() {
            let bytes = ids.value_length(row) as usize;
            if bytes > MAX_ID_BYTES {
                let limit = MAX_ID_BYTES;
                self.refused
                    .insert(row, EventError::IdTooLong { bytes, limit });
            }
        }
    }

    fn extra_column(&mut self, rows: usize) -> ArrayRef {
        let mut builder = StringBuilder::new();
        let mut next = 0;
        for (&row, writer) in &mut self.extra {
            builder.append_nulls(row - next);
            builder.append_option(writer.finish());
            next = row + 1;
        }
        builder.append_nulls(rows - next);
        Arc::new(builder.finish())
    }
}

#[cfg(test)]
mod tests;
