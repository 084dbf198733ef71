//! Rows of files, which are converted as a load converts them. A row that is no event is a dead letter, with its line.

use std::collections::HashSet;
use std::rc::Rc;

use arrow::array::{Array, AsArray, BooleanArray, RecordBatch};
use arrow::compute::filter_record_batch;
use rakam_event::error::EventError;
use rakam_event::schema::{EXTRA, ID, Schema};
use rakam_event::{json, print};
use rakam_files::FilesError;
use rakam_files::convert::Converter;
use rakam_files::source::{BadRow, Rows};
use rakam_lake::row_chunk;
use rakam_sources::batch::FilePiece;
use rakam_sources::decode::{DecodeError, Route};

use super::super::reason;
use super::{Done, LINES_BYTES, Letter, Origin, Part, Preparing, Whose};
use crate::catalog::mapper::Stage;
use crate::ingest::collect::limits;
use crate::ingest::mapper::Shape;
use crate::pg::wait;
use crate::pg::xact::Failure;

impl Preparing<'_> {
    pub(super) fn files(&mut self) -> Done<()> {
        let batch = self.batch;
        if batch.pieces.is_empty() {
            return Ok(());
        }
        let Route::To(name) = self.stream.route.clone() else {
            return Ok(());
        };
        let collection = self.decoded.collections.index_of(name);
        self.look(std::iter::once(collection))?;
        self.ensure_collection(collection)?;
        for file in &batch.pieces {
            wait::check_interrupts();
            self.file(collection, file)?;
        }
        Ok(())
    }

    /// The collection of a source's files is there. If it cannot be, the files wait.
    fn ensure_collection(&mut self, collection: usize) -> Done<()> {
        let name = self.name(collection).to_owned();
        if self.project.attached.contains(&name) {
            return Err(Failure::Error(EventError::AttachedTable(name).into()));
        }
        if self.registered(collection).is_some() {
            return Ok(());
        }
        if self.project.is_fixed {
            return Err(Failure::Error(EventError::UnknownCollection(name).into()));
        }
        if !self.register(collection, Vec::new())? {
            let most = self.row.collections_max.unwrap_or_default();
            return Err(Failure::Error(EventError::TooManyCollections(most).into()));
        }
        Ok(())
    }

    fn file(&mut self, collection: usize, file: &FilePiece) -> Done<()> {
        let name = (self.batch.moves.get(file.split)).map_or("", |moved| moved.split.as_str());
        let failed = |error: FilesError| Failure::Error(error.into());
        let Some((_, schema)) = self.registered(collection) else {
            return Ok(());
        };
        let mut converter = Converter::new(&schema, limits(), false);
        let rows = &file.piece.rows;
        let fields = converter.new_fields(rows, &file.declared);
        let mut refused = HashSet::new();
        if self.project.is_fixed {
            refused.extend(fields.into_iter().map(|(name, _)| name));
        } else {
            self.register(collection, fields)?;
        }
        let Some((found, schema)) = self.registered(collection) else {
            return Ok(());
        };
        converter.set_schema(&schema);
        let (rows, bad) = match converter.convert(rows.clone(), name, &self.stamp) {
            Err(
                error @ (FilesError::ReceivedAt
                | FilesError::ReservedColumn(_)
                | FilesError::NulInColumn),
            ) => {
                let bad = Converter::refuse_all(rows, &error).map_err(failed)?;
                (RecordBatch::new_empty(schema.arrow()), bad)
            }
            converted => converted.map_err(failed)?,
        };
        let columns = columns_of(&file.piece.rows);
        let raw = file.piece.bad.iter().map(|bad| (bad, columns.clone()));
        // Those that a conversion refuses are JSON.
        for (bad, columns) in raw.chain(bad.iter().map(|bad| (bad, None))) {
            let letter = of_row(file.split, bad, columns);
            self.done.letters.push(letter);
        }
        let rows = self.unknown_refused(collection, file.split, &schema, rows, &refused)?;
        let (samples, counts) = converter.take_log();
        let text = self.lines_of(collection, file, &schema, &rows)?;
        let table = self.table(found, schema);
        table.invalid.extend(samples, counts);
        if !text && rows.num_rows() > 0 {
            table.bytes += rows.get_array_memory_size();
            table.parts.push(Part {
                rows,
                is_own: false,
                origins: vec![Origin::Split(file.split, None)],
            });
        }
        Ok(())
    }

    /// Writes the rows as lines, if that is their road.
    fn lines_of(
        &mut self,
        collection: usize,
        file: &FilePiece,
        schema: &Schema,
        rows: &RecordBatch,
    ) -> Done<bool> {
        let is_mapped = self
            .places
            .get(&collection)
            .is_some_and(|place| place.is_mapped);
        if !is_mapped && rows.num_rows() >= row_chunk::MAX_ROWS {
            return Ok(false);
        }
        let ids = rows.column_by_name(ID).cloned();
        let mut lines = self.lines(collection, Shape::Row, Whose::Others);
        for row in 0..rows.num_rows() {
            print::write_row(rows, schema, row, lines.begin())
                .map_err(|error| Failure::Error(error.into()))?;
            let has_id = ids.as_ref().is_some_and(|ids| ids.is_valid(row));
            lines.end(Origin::Split(file.split, None), has_id);
            if lines.payload.len() >= LINES_BYTES {
                let next = self.lines(collection, Shape::Row, Whose::Others);
                self.add_lines(std::mem::replace(&mut lines, next));
            }
        }
        self.add_lines(lines);
        Ok(true)
    }

    /// Where the schema is fixed: the rows without those that have values of unknown fields, which are dead letters.
    fn unknown_refused(
        &mut self,
        collection: usize,
        split: usize,
        schema: &Schema,
        rows: RecordBatch,
        unknown: &HashSet<String>,
    ) -> Done<RecordBatch> {
        let extra = rows
            .column_by_name(EXTRA)
            .and_then(|c| c.as_string_opt::<i32>());
        let Some(extra) = extra.filter(|_| !unknown.is_empty()) else {
            return Ok(rows);
        };
        let mut mask = vec![true; rows.num_rows()];
        for (row, fits) in mask.iter_mut().enumerate() {
            let mut found = None;
            if extra.is_valid(row) {
                // What is stored there is an object.
                let _walked = json::object_entries(extra.value(row), |key, _| {
                    found = found.take().or_else(|| unknown.get(key).cloned());
                });
            }
            let Some(field) = found else {
                continue;
            };
            *fits = false;
            let collection = self.name(collection).to_owned();
            let error = EventError::UnknownField {
                collection: collection.clone(),
                field,
            };
            let mut line = String::new();
            print::write_row(&rows, schema, row, &mut line)
                .map_err(|error| Failure::Error(error.into()))?;
            self.done.letters.push(Letter {
                origin: Origin::Split(split, None),
                payload: Some(line.into_bytes()),
                error: reason(&error.into()),
                collection: Some(collection),
                stage: Stage::Project,
                is_row: true,
                columns: None,
                is_charged: false,
            });
        }
        filter_record_batch(&rows, &BooleanArray::from(mask))
            .map_err(|error| Failure::Error(FilesError::Arrow(error.to_string()).into()))
    }
}

/// The names of the columns of CSV, as a JSON array: what it takes to read a row once more.
fn columns_of(rows: &Rows) -> Option<Rc<str>> {
    let Rows::Columns {
        batch,
        untyped: true,
        ..
    } = rows
    else {
        return None;
    };
    let schema = batch.schema();
    // jsonb has no NUL characters.
    let names: Vec<String> = (schema.fields().iter())
        .map(|field| field.name().replace('\0', "\u{fffd}"))
        .collect();
    serde_json::to_string(&names).ok().map(Rc::from)
}

fn of_row(split: usize, bad: &BadRow, columns: Option<Rc<str>>) -> Letter {
    Letter {
        origin: Origin::Split(split, Some(bad.line)),
        payload: Some(bad.bytes.clone()),
        error: reason(&DecodeError::File(bad.error.clone())),
        collection: None,
        stage: Stage::Project,
        is_row: false,
        columns,
        is_charged: false,
    }
}
