//! Which columns the files of a prefix have together.
//!
//! Typed files (Parquet, Avro) say so, all of them are asked. Of others a sample is read, by the rules by which the values of
//! events show a type: some files of all, and the beginning of each.

use std::collections::{HashMap, HashSet};

use arrow::array::AsArray;
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
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
use crate::object::blocking;
use crate::parquet_file::{self, ParquetFile};
use crate::source::{self, Position, Rows, Spec};

/// Files without types that are looked into.
const SAMPLE_FILES: usize = 16;
/// Files whose heads are read at a time, and of which a piece is.
const AT_A_TIME: usize = 8;
const SAMPLES_AT_A_TIME: usize = 2;

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

/// What one file says.
struct Said {
    file: String,
    columns: Vec<(String, Option<SqlType>)>,
    is_typed: bool,
    rows: u64,
    /// Of a sample: how much of the file the rows are.
    bytes: u64,
}

impl Union {
    fn take(&mut self, said: Said) -> Result<(), FilesError> {
        for (name, ty) in said.columns {
            self.add(&name, ty, &said.file, said.is_typed)?;
        }
        Ok(())
    }
}

/// The columns of all files, several of which are read at a time. `told` is told how many are through.
pub async fn infer(
    files: &[Found],
    spec: &Spec,
    mut told: impl FnMut(u64),
) -> Result<Columns, FilesError> {
    let mut union = Union::default();
    let mut rows = 0;
    let (mut typed, mut untyped) = (Vec::new(), Vec::new());
    for file in files {
        match format(file, spec)? {
            Format::Parquet => typed.push(file),
            Format::Avro => {
                typed.push(file);
                untyped.push(file);
            }
            Format::Csv | Format::Ndjson | Format::Json => untyped.push(file),
        }
    }
    let mut done = (files.len() - typed.len()) as u64;
    let mut heads = ask(typed, spec, head, AT_A_TIME);
    while let Some(said) = heads.try_next().await? {
        rows += said.rows;
        union.take(said)?;
        done += 1;
        told(done);
    }
    let (mut seen_rows, mut seen_bytes) = (0, 0);
    let mut samples = ask(sample(&untyped), spec, look_into, SAMPLES_AT_A_TIME);
    while let Some(said) = samples.try_next().await? {
        seen_rows += said.rows;
        seen_bytes += said.bytes;
        union.take(said)?;
    }
    let bytes: u64 = untyped.iter().map(|file| file.bytes).sum();
    if seen_bytes > 0 {
        rows += (bytes as f64 * seen_rows as f64 / seen_bytes as f64) as u64;
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

/// What files say, in their order.
fn ask<'a>(
    files: Vec<&'a Found>,
    spec: &'a Spec,
    what: fn(&Found, &Spec) -> Result<Said, FilesError>,
    at_a_time: usize,
) -> BoxStream<'a, Result<Said, FilesError>> {
    stream::iter(files)
        .map(move |file| {
            let (file, spec) = (file.clone(), spec.clone());
            async move { blocking(move || what(&file, &spec)).await? }
        })
        .buffered(at_a_time)
        .boxed()
}

fn format(file: &Found, spec: &Spec) -> Result<Format, FilesError> {
    spec.format.map_or_else(|| Format::of_name(&file.name), Ok)
}

/// What the head of a typed file says.
fn head(file: &Found, spec: &Spec) -> Result<Said, FilesError> {
    match format(file, spec)? {
        Format::Parquet => parquet(file),
        _ => avro(file, spec),
    }
}

fn parquet(file: &Found) -> Result<Said, FilesError> {
    let name = &file.name;
    if Compression::of_name(name) != Compression::None {
        return Err(parquet_file::compressed(name));
    }
    let (_, builder) = ParquetFile::open(file)?;
    let roots = builder.parquet_schema().root_schema().get_fields();
    let mut seen = HashSet::new();
    let mut columns = Vec::new();
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
        columns.push((field.name().clone(), ty));
    }
    Ok(Said {
        file: name.clone(),
        columns,
        is_typed: true,
        rows: builder.metadata().file_metadata().num_rows().max(0) as u64,
        bytes: 0,
    })
}

/// The columns that an Avro file's schema has a type for.
fn avro(file: &Found, spec: &Spec) -> Result<Said, FilesError> {
    let source = source::open(file, spec, Position::default(), &Meter::default())?;
    let declared = source.declared().iter();
    Ok(Said {
        file: file.name.clone(),
        columns: declared
            .map(|(name, ty)| (name.clone(), Some((*ty).into())))
            .collect(),
        is_typed: true,
        rows: 0,
        bytes: 0,
    })
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

/// The columns that the beginning of a file shows.
fn look_into(file: &Found, spec: &Spec) -> Result<Said, FilesError> {
    let name = &file.name;
    let meter = Meter::default();
    let mut source = source::open(file, spec, Position::default(), &meter)?;
    let declared: Vec<String> = source.declared().iter().map(|d| d.0.clone()).collect();
    let mut said = Said {
        file: name.clone(),
        columns: Vec::new(),
        is_typed: false,
        rows: 0,
        bytes: 0,
    };
    let Some(piece) = source.next()? else {
        return Ok(said);
    };
    if let Some(bad) = piece.bad.first() {
        return Err(FilesError::BadRow {
            name: name.clone(),
            line: bad.line,
            reason: bad.error.clone(),
        });
    }
    said.rows = piece.rows.len() as u64;
    said.bytes = meter.bytes().min(file.bytes);
    match piece.rows {
        Rows::Columns { batch, .. } => {
            let mut names = HashSet::new();
            for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
                if !names.insert(field.name()) {
                    return Err(FilesError::SameColumn {
                        name: name.clone(),
                        column: field.name().clone(),
                    });
                }
                let ty = column.as_string_opt::<i32>().and_then(cast::infer);
                said.columns
                    .push((field.name().clone(), ty.map(SqlType::from)));
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
            let columns = shown.columns.into_iter();
            said.columns = columns.map(|column| (column.name, column.ty)).collect();
        }
    }
    Ok(said)
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
