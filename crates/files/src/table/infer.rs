//! Which columns the files of a prefix have together.
//!
//! Typed files (Parquet, Avro) say so, all of them are asked. Of others a sample is read, by the rules by which the values of
//! events show a type: some files of all, and the beginning of each.

use std::collections::HashMap;

use arrow::array::AsArray;
use parquet::basic::LogicalType;
use rakam_event::infer::{Inferred as Shown, infer as infer_value};
use rakam_event::json::{self, MAX_DEPTH};
use rakam_event::types::FieldType;

use super::folder;
use super::types::{Annotation, SqlType};
use crate::cast;
use crate::error::FilesError;
use crate::format::{Compression, Format};
use crate::input::Meter;
use crate::locate::Found;
use crate::parquet_file;
use crate::source::{self, Position, Rows, Spec};

/// Files without types that are looked into.
const SAMPLE_FILES: usize = 16;

/// What files have together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Columns {
    /// In the order in which they are met, those of folders last.
    pub columns: Vec<(String, SqlType)>,
    /// About how many rows there are.
    pub rows: u64,
}

/// Columns in the making.
#[derive(Default)]
struct Union {
    columns: Vec<Known>,
    by_name: HashMap<String, usize>,
}

struct Known {
    name: String,
    ty: Option<SqlType>,
    /// The file that said so first.
    file: String,
    /// Its type was told by a file, not shown by values.
    is_typed: bool,
}

impl Union {
    fn add(
        &mut self,
        name: &str,
        ty: Option<SqlType>,
        file: &str,
        is_typed: bool,
    ) -> Result<(), FilesError> {
        let Some(&index) = self.by_name.get(name) else {
            self.by_name.insert(name.to_owned(), self.columns.len());
            self.columns.push(Known {
                name: name.to_owned(),
                ty,
                file: file.to_owned(),
                is_typed,
            });
            return Ok(());
        };
        let known = &mut self.columns[index];
        known.ty = match (known.ty, ty) {
            (known, None) => known,
            (None, ty) => {
                known.file = file.to_owned();
                ty
            }
            (Some(first), Some(ty)) if known.is_typed && is_typed => {
                Some(first.union(ty).ok_or_else(|| FilesError::OtherType {
                    column: name.to_owned(),
                    first: first.to_string(),
                    first_name: known.file.clone(),
                    ty: ty.to_string(),
                    name: file.to_owned(),
                })?)
            }
            (Some(first), Some(ty)) => Some(first.union_untyped(ty)),
        };
        known.is_typed |= is_typed;
        Ok(())
    }
}

/// The columns of all files. `go_on` is asked before each.
pub fn infer(
    files: &[Found],
    spec: &Spec,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Columns, FilesError> {
    let mut union = Union::default();
    let mut rows = 0;
    let mut untyped = Vec::new();
    for file in files {
        if !go_on() {
            return Err(FilesError::Cancelled);
        }
        match format(file, spec)? {
            Format::Parquet => rows += parquet(file, &mut union)?,
            Format::Avro => {
                avro(file, spec, &mut union)?;
                untyped.push(file);
            }
            Format::Csv | Format::Ndjson | Format::Json => untyped.push(file),
        }
    }
    let mut seen = Sample::default();
    for file in sample(&untyped) {
        if !go_on() {
            return Err(FilesError::Cancelled);
        }
        look_into(file, spec, &mut union, &mut seen)?;
    }
    let bytes: u64 = untyped.iter().map(|file| file.bytes).sum();
    if seen.bytes > 0 {
        rows += (bytes as f64 * seen.rows as f64 / seen.bytes as f64) as u64;
    }
    let folders = folder::columns(files);
    let in_folders = |name: &str| folders.iter().any(|(key, _)| key == name);
    let mut columns: Vec<(String, SqlType)> = union
        .columns
        .into_iter()
        .filter(|column| !in_folders(&column.name))
        .map(|column| (column.name, column.ty.unwrap_or(SqlType::TEXT)))
        .collect();
    columns.extend(folders);
    if columns.is_empty() {
        return Err(FilesError::NoColumns);
    }
    Ok(Columns { columns, rows })
}

fn format(file: &Found, spec: &Spec) -> Result<Format, FilesError> {
    spec.format.map_or_else(|| Format::of_name(&file.name), Ok)
}

/// Adds the columns of a Parquet file; its rows.
fn parquet(file: &Found, union: &mut Union) -> Result<u64, FilesError> {
    let name = &file.name;
    if Compression::of_name(name) != Compression::None {
        return Err(parquet_file::compressed(name));
    }
    let open = std::fs::File::open(&file.path).map_err(|e| FilesError::io("open", name, &e))?;
    let builder = parquet_file::open(open, name)?;
    let roots = builder.parquet_schema().root_schema().get_fields();
    let mut seen = std::collections::HashSet::new();
    for (field, root) in builder.schema().fields().iter().zip(roots) {
        if !seen.insert(field.name()) {
            return Err(FilesError::SameColumn {
                name: name.clone(),
                column: field.name().clone(),
            });
        }
        let annotation = match root.get_basic_info().logical_type_ref() {
            Some(LogicalType::Uuid) => Annotation::Uuid,
            Some(LogicalType::Json) => Annotation::Json,
            _ => Annotation::None,
        };
        let ty = SqlType::of_column(field.data_type(), annotation);
        union.add(field.name(), ty, name, true)?;
    }
    Ok(builder.metadata().file_metadata().num_rows().max(0) as u64)
}

/// Adds the columns that an Avro file's schema has a type for.
fn avro(file: &Found, spec: &Spec, union: &mut Union) -> Result<(), FilesError> {
    let meter = Meter::default();
    let source = source::open(&file.path, &file.name, spec, Position::default(), &meter)?;
    for (name, ty) in source.declared() {
        union.add(name, Some((*ty).into()), &file.name, true)?;
    }
    Ok(())
}

/// Some of the files, from the first to the last.
fn sample<'a>(files: &[&'a Found]) -> Vec<&'a Found> {
    if files.len() <= SAMPLE_FILES {
        return files.to_vec();
    }
    (0..SAMPLE_FILES)
        .map(|n| files[n * (files.len() - 1) / (SAMPLE_FILES - 1)])
        .collect()
}

/// How much of the files a sample is.
#[derive(Default)]
struct Sample {
    rows: u64,
    bytes: u64,
}

/// Adds the columns that the beginning of a file shows.
fn look_into(
    file: &Found,
    spec: &Spec,
    union: &mut Union,
    seen: &mut Sample,
) -> Result<(), FilesError> {
    let name = &file.name;
    let meter = Meter::default();
    let mut source = source::open(&file.path, name, spec, Position::default(), &meter)?;
    let declared: Vec<String> = source.declared().iter().map(|d| d.0.clone()).collect();
    let Some(piece) = source.next()? else {
        return Ok(());
    };
    if let Some(bad) = piece.bad.first() {
        return Err(FilesError::BadRow {
            name: name.clone(),
            line: bad.line,
            reason: bad.error.clone(),
        });
    }
    seen.rows += piece.rows.len() as u64;
    seen.bytes += meter.bytes().min(file.bytes);
    match piece.rows {
        Rows::Columns { batch, .. } => {
            let mut names = std::collections::HashSet::new();
            for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
                if !names.insert(field.name()) {
                    return Err(FilesError::SameColumn {
                        name: name.clone(),
                        column: field.name().clone(),
                    });
                }
                let ty = column.as_string_opt::<i32>().and_then(cast::infer);
                union.add(field.name(), ty.map(SqlType::from), name, false)?;
            }
        }
        Rows::Events(events) => {
            let mut shown = Union::default();
            for event in &events {
                let bad = |reason: String| FilesError::BadRow {
                    name: name.clone(),
                    line: event.line,
                    reason,
                };
                let mut added = Ok(());
                json::check(&event.json, MAX_DEPTH)
                    .and_then(|()| {
                        json::object_entries(&event.json, |key, value| {
                            if declared.iter().any(|d| d == key) {
                                return;
                            }
                            let ty = match infer_value(value) {
                                Shown::Absent => None,
                                // No event has a field of it yet; here the column can hold it all the same.
                                Shown::Untyped => untyped(value),
                                Shown::Type(ty) => Some(SqlType::from(ty)),
                            };
                            let outcome = shown.add(key, ty, name, false);
                            if added.is_ok() {
                                added = outcome;
                            }
                        })
                    })
                    .map_err(|e| bad(e.to_string()))?;
                added?;
            }
            for column in shown.columns {
                union.add(&column.name, column.ty, name, false)?;
            }
        }
    }
    Ok(())
}

/// Empty arrays and objects tell nothing; a number beyond 64 bits is one of any size.
fn untyped(value: &str) -> Option<SqlType> {
    match json::kind(value) {
        json::Kind::Number => Some(SqlType::of(super::types::Base::Numeric(None))),
        json::Kind::Object => Some(SqlType::from(FieldType::Jsonb)),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
