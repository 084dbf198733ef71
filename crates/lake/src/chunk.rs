//! A chunk: events in columns, sealed with a checksum.
//!
//! Layout: magic `RKC2`, checksum, schema version (i32 LE), the columns of the parts one after the other, the directory, its
//! length (u32 LE). A part is a batch of events as they were added: of each column that has values in it the number of its
//! field, a length (u32 LE), and the bytes of [`column`]. The directory has the number of fields, each field as its number,
//! its id (folded LEB128), its name and its type as the registry spells it (both behind their lengths); the number of
//! parts, and of each its numbers of rows and of columns. All other numbers are LEB128. A projection looks at no other
//! columns.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, RecordBatchOptions, new_null_array};
use arrow::compute::{concat, concat_batches, max, min};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef, TimestampMicrosecondType};
use bytes::Bytes;
use rakam_event::batch::Layout;
use rakam_event::extra;
use rakam_event::schema::{
    EXTRA, FIELD_ID_KEY, Field as EventField, RECEIVED_AT, SYSTEM_FIELDS, Schema as EventSchema,
    TIME, XID, arrow_field,
};
use rakam_event::types::FieldType;

use crate::error::LakeError;
use crate::file_info::type_of;
use crate::row_chunk::Rows;
use crate::seal;
use crate::varint::{get_number, get_signed, put_number, put_signed};

mod column;

const MAGIC: [u8; 4] = *b"RKC2";
const WHAT: &str = "chunk";
/// A chunk is a `bytea`, which Postgres bounds by 1 GiB; this leaves room for the row around it.
const MAX_BYTES: usize = 1_000_000_000;
const LENGTH_BYTES: usize = 4;
/// More NULLs than these are not made of columns that parts do not have: of an honest chunk, there is a value for most of them.
const MAX_ABSENT: usize = 1 << 28;

/// How the bytes of a chunk are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkFormat {
    /// As this module writes it.
    Arrow,
    /// As [`crate::row_chunk`] writes it.
    Rows,
}

impl ChunkFormat {
    /// As the manifest spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Arrow => "arrow",
            Self::Rows => "rows",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        [Self::Arrow, Self::Rows]
            .into_iter()
            .find(|format| format.as_str() == text)
    }
}

/// The events of a chunk of either format, in the stored layout of the present schema.
pub fn read(
    format: ChunkFormat,
    chunk: Bytes,
    schema: &EventSchema,
) -> Result<RecordBatch, LakeError> {
    match format {
        ChunkFormat::Arrow => upgrade(&decode(chunk)?, schema),
        ChunkFormat::Rows => of_rows(&Rows::decode(chunk)?, schema),
    }
}

/// The events of a row chunk in the stored layout of the present schema.
pub fn of_rows(rows: &Rows, schema: &EventSchema) -> Result<RecordBatch, LakeError> {
    rows.batch(schema, &Layout::Stored)
}

/// A batch of an older schema version in the present one: values of fields that came since move from `_extra`, where
/// they lie, to their columns. Whoever only widened it ([`conform`]) would hide them from every reader, who looks into
/// `_extra` for fields that the chunk or file does not have.
pub(crate) fn upgrade(batch: &RecordBatch, schema: &EventSchema) -> Result<RecordBatch, LakeError> {
    let known = positions(&batch.schema())?;
    let newer: Vec<&EventField> = schema
        .fields
        .iter()
        .filter(|field| field.is_user() && !known.contains_key(&field.id))
        .collect();
    let malformed = |e| LakeError::corrupt(WHAT, e);
    let stored = batch
        .schema()
        .index_of(EXTRA)
        .ok()
        .and_then(|at| Some((at, batch.column(at).as_string_opt::<i32>()?)))
        .filter(|(_, extra)| extra.null_count() < extra.len());
    let Some((at, stored)) = stored.filter(|_| !newer.is_empty()) else {
        return conform(batch, &schema.arrow());
    };
    // What was sent under the name of a field that has been dropped since is not a value of its successor.
    let extra = if schema.dropped.is_empty() {
        stored.clone()
    } else {
        let missing = |name| LakeError::corrupt(WHAT, format!("column {name} is missing"));
        let xid = batch
            .column_by_name(XID)
            .and_then(|column| column.as_primitive_opt::<Int64Type>())
            .ok_or_else(|| missing(XID))?;
        let received_at = batch
            .column_by_name(RECEIVED_AT)
            .and_then(|column| column.as_primitive_opt::<TimestampMicrosecondType>())
            .ok_or_else(|| missing(RECEIVED_AT))?;
        extra::strip(stored, xid, received_at, &schema.dropped).map_err(malformed)?
    };
    let mut fields = batch.schema().fields().to_vec();
    let mut columns = batch.columns().to_vec();
    columns[at] = Arc::new(extra::merge_extra(&extra, &newer, &[]).map_err(malformed)?);
    for (field, column) in newer
        .iter()
        .zip(extra::promote(&extra, &newer).map_err(malformed)?)
    {
        fields.push(Arc::new(field.arrow()));
        columns.push(column);
    }
    let wider = RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)
        .map_err(|e| LakeError::corrupt(WHAT, e))?;
    conform(&wider, &schema.arrow())
}

/// What the row of a chunk says about its events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkInfo {
    pub n: usize,
    pub min_time_us: i64,
    pub max_time_us: i64,
    pub min_xid: i64,
    pub max_xid: i64,
    /// Some event has an `_extra`.
    pub has_extra: bool,
}

impl ChunkInfo {
    /// Of the events of both.
    pub fn and(self, other: Self) -> Self {
        Self {
            n: self.n + other.n,
            min_time_us: self.min_time_us.min(other.min_time_us),
            max_time_us: self.max_time_us.max(other.max_time_us),
            min_xid: self.min_xid.min(other.min_xid),
            max_xid: self.max_xid.max(other.max_xid),
            has_extra: self.has_extra || other.has_extra,
        }
    }
}

/// Encodes a batch that follows `rakam_event::schema::Schema::arrow`, with all its columns.
pub fn encode(batch: &RecordBatch, schema_version: i32) -> Result<Vec<u8>, LakeError> {
    let mut parts = Parts::new(Vec::new(), schema_version);
    parts.add(batch)?;
    parts.seal(|_, _| true)
}

/// Makes a chunk of batches of one schema, which may go once they are added. Columns that no event has are left out: a reader
/// takes a missing column for NULLs, but looks for a missing field in `_extra`.
pub struct Writer {
    parts: Parts,
    info: Option<ChunkInfo>,
}

impl Writer {
    /// The chunk comes to lie in `buffer`, whatever it holds now.
    pub fn new(buffer: Vec<u8>, schema_version: i32) -> Self {
        Self {
            parts: Parts::new(buffer, schema_version),
            info: None,
        }
    }

    /// Adds the events of a batch that follows `rakam_event::schema::Schema::arrow`, behind those before.
    pub fn add(&mut self, batch: &RecordBatch) -> Result<(), LakeError> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        let part = info(batch)?;
        self.parts.add(batch)?;
        self.info = Some(self.info.map_or(part, |before| before.and(part)));
        Ok(())
    }

    /// How many events it has.
    pub fn rows(&self) -> usize {
        self.info.map_or(0, |info| info.n)
    }

    /// How many bytes it takes so far.
    pub fn bytes(&self) -> usize {
        self.parts.out.len()
    }

    /// The chunk, and what its row says. None: it has no events.
    pub fn finish(self) -> Result<Option<(ChunkInfo, Vec<u8>)>, LakeError> {
        let Some(info) = self.info else {
            return Ok(None);
        };
        let data = self
            .parts
            .seal(|name, is_used| is_kept(name, is_used, info.has_extra))?;
        Ok(Some((info, data)))
    }
}

/// A chunk in the making.
struct Parts {
    out: Vec<u8>,
    /// Of all parts, once there is one; and which of its fields have values.
    schema: Option<SchemaRef>,
    used: Vec<bool>,
    /// Rows and columns of each.
    sizes: Vec<(usize, usize)>,
}

impl Parts {
    fn new(buffer: Vec<u8>, schema_version: i32) -> Self {
        let mut out = seal::within(buffer);
        out.extend_from_slice(&schema_version.to_le_bytes());
        Self {
            out,
            schema: None,
            used: Vec::new(),
            sizes: Vec::new(),
        }
    }

    fn add(&mut self, batch: &RecordBatch) -> Result<(), LakeError> {
        let schema = self.schema.get_or_insert_with(|| batch.schema());
        if *schema != batch.schema() {
            return Err(LakeError::encode(WHAT, "its batches have two schemas"));
        }
        self.used.resize(batch.num_columns(), false);
        let mut columns = 0;
        for (number, (array, used)) in batch.columns().iter().zip(&mut self.used).enumerate() {
            if array.null_count() == array.len() {
                continue;
            }
            (*used, columns) = (true, columns + 1);
            put_number(&mut self.out, number as u64);
            let start = self.out.len() + LENGTH_BYTES;
            self.out.extend_from_slice(&[0; LENGTH_BYTES]);
            column::put(&mut self.out, array.as_ref())
                .ok_or_else(|| unknown(batch.schema_ref().field(number)))?;
            let bytes = self.out.len();
            let length = u32::try_from(bytes - start).map_err(|_| too_large(bytes))?;
            if let Some(place) = self.out.get_mut(start - LENGTH_BYTES..start) {
                place.copy_from_slice(&length.to_le_bytes());
            }
        }
        self.sizes.push((batch.num_rows(), columns));
        Ok(())
    }

    /// The whole, with the fields for which `keep` says so, by their names and whether they have values.
    fn seal(mut self, keep: impl Fn(&str, bool) -> bool) -> Result<Vec<u8>, LakeError> {
        let start = self.out.len();
        let fields = self.schema.iter().flat_map(|schema| schema.fields());
        let kept: Vec<(usize, &Arc<Field>)> = fields
            .enumerate()
            .filter(|(number, field)| {
                keep(
                    field.name(),
                    self.used.get(*number).copied().unwrap_or_default(),
                )
            })
            .collect();
        let absent =
            |(rows, columns): &(usize, usize)| rows * (kept.len() - columns.min(&kept.len()));
        if self.sizes.iter().map(absent).sum::<usize>() > MAX_ABSENT {
            return Err(LakeError::encode(
                WHAT,
                "it has too many columns for its events",
            ));
        }
        put_number(&mut self.out, kept.len() as u64);
        for (number, field) in kept {
            // One of those with the same values.
            let ty = type_of(field.data_type()).ok_or_else(|| unknown(field))?;
            let id = field_id(field).ok_or_else(|| unknown(field))?;
            put_number(&mut self.out, number as u64);
            put_signed(&mut self.out, id.into());
            put_bytes(&mut self.out, field.name().as_bytes());
            put_bytes(&mut self.out, ty.to_string().as_bytes());
        }
        put_number(&mut self.out, self.sizes.len() as u64);
        for (rows, columns) in &self.sizes {
            put_number(&mut self.out, *rows as u64);
            put_number(&mut self.out, *columns as u64);
        }
        let bytes = self.out.len();
        let length = u32::try_from(bytes - start).map_err(|_| too_large(bytes))?;
        self.out.extend_from_slice(&length.to_le_bytes());
        if self.out.len() > MAX_BYTES {
            return Err(too_large(self.out.len()));
        }
        Ok(seal::seal(self.out, MAGIC))
    }
}

fn too_large(bytes: usize) -> LakeError {
    LakeError::TooLarge {
        what: WHAT,
        bytes,
        limit: MAX_BYTES,
    }
}

fn unknown(field: &Field) -> LakeError {
    LakeError::encode(
        WHAT,
        format!("column \"{}\" is none of a field", field.name()),
    )
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_number(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// The whole batch of a chunk.
pub fn decode(chunk: Bytes) -> Result<RecordBatch, LakeError> {
    decode_with(chunk, None)
}

/// The columns with these field ids, in this order; ids the chunk does not have are left out.
pub fn decode_projected(chunk: Bytes, field_ids: &[i32]) -> Result<RecordBatch, LakeError> {
    decode_with(chunk, Some(field_ids))
}

/// The schema version a chunk was written under.
pub fn schema_version(chunk: Bytes) -> Result<i32, LakeError> {
    split_version(seal::open(chunk, MAGIC, WHAT)?).map(|(version, _)| version)
}

fn split_version(payload: Bytes) -> Result<(i32, Bytes), LakeError> {
    match payload.first_chunk::<4>() {
        Some(version) => Ok((i32::from_le_bytes(*version), payload.slice(4..))),
        None => Err(LakeError::corrupt(WHAT, "too short")),
    }
}

fn decode_with(chunk: Bytes, field_ids: Option<&[i32]>) -> Result<RecordBatch, LakeError> {
    let (_, payload) = split_version(seal::open(chunk, MAGIC, WHAT)?)?;
    seal::guarded(WHAT, || {
        let directory =
            Directory::take(payload).ok_or_else(|| LakeError::corrupt(WHAT, "malformed"))?;
        let wanted: Vec<&Stored> = match field_ids {
            // A column that is asked for twice is given once.
            Some(ids) => {
                let mut by_id: HashMap<i32, &Stored> =
                    directory.fields.iter().map(|f| (f.id, f)).collect();
                ids.iter().filter_map(|id| by_id.remove(id)).collect()
            }
            None => directory.fields.iter().collect(),
        };
        let mut fields = Vec::with_capacity(wanted.len());
        let mut arrays = Vec::with_capacity(wanted.len());
        for stored in wanted {
            let field = arrow_field(stored.id, &stored.name, stored.ty);
            let array = directory.array(stored, field.data_type()).ok_or_else(|| {
                LakeError::corrupt(WHAT, format!("column \"{}\" is malformed", stored.name))
            })?;
            fields.push(field);
            arrays.push(array);
        }
        let options = RecordBatchOptions::new().with_row_count(Some(directory.rows));
        RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), arrays, &options)
            .map_err(|e| LakeError::corrupt(WHAT, e))
    })
}

/// What a chunk has, its columns not looked into.
struct Directory {
    rows: usize,
    fields: Vec<Stored>,
    parts: Vec<Part>,
}

struct Stored {
    number: u64,
    id: i32,
    name: String,
    ty: FieldType,
}

struct Part {
    rows: usize,
    /// By the number of the field.
    columns: HashMap<u64, Bytes>,
}

impl Directory {
    fn take(mut payload: Bytes) -> Option<Self> {
        let most = column::rows_max(payload.len());
        let length = *payload.last_chunk::<LENGTH_BYTES>()?;
        let end = payload.len() - LENGTH_BYTES;
        let start = end.checked_sub(u32::from_le_bytes(length) as usize)?;
        let mut rest = payload.slice(start..end);
        payload.truncate(start);

        // Whatever is counted takes a byte at least: no count makes us allocate more than the bytes warrant.
        let count = |rest: &mut Bytes| {
            let count = column::with_slice(rest, get_number)?;
            (count <= rest.len() as u64).then_some(count)
        };
        let fields = (0..count(&mut rest)?)
            .map(|_| Stored::take(&mut rest))
            .collect::<Option<Vec<_>>>()?;
        let mut rows = 0_usize;
        let mut parts = Vec::new();
        for _ in 0..count(&mut rest)? {
            let of_part = usize::try_from(column::with_slice(&mut rest, get_number)?).ok()?;
            rows = rows.checked_add(of_part).filter(|rows| *rows <= most)?;
            let mut columns = HashMap::new();
            for _ in 0..column::with_slice(&mut rest, get_number)? {
                let number = column::with_slice(&mut payload, get_number)?;
                let length = u32::from_le_bytes(
                    column::take_bytes(&mut payload, LENGTH_BYTES)?[..]
                        .try_into()
                        .ok()?,
                );
                columns.insert(number, column::take_bytes(&mut payload, length as usize)?);
            }
            parts.push(Part {
                rows: of_part,
                columns,
            });
        }
        let absent = |part: &Part| {
            let is_absent = |field: &&Stored| !part.columns.contains_key(&field.number);
            part.rows * fields.iter().filter(is_absent).count()
        };
        let absent: usize = parts.iter().map(absent).sum();
        (rest.is_empty() && payload.is_empty() && absent <= MAX_ABSENT).then_some(Self {
            rows,
            fields,
            parts,
        })
    }

    fn array(&self, stored: &Stored, data_type: &DataType) -> Option<ArrayRef> {
        let arrays = self
            .parts
            .iter()
            .map(|part| match part.columns.get(&stored.number) {
                Some(bytes) => {
                    let mut rest = bytes.clone();
                    column::take(&mut rest, data_type, part.rows).filter(|_| rest.is_empty())
                }
                None => Some(new_null_array(data_type, part.rows)),
            })
            .collect::<Option<Vec<_>>>()?;
        match arrays.as_slice() {
            [] => Some(new_null_array(data_type, 0)),
            [one] => Some(Arc::clone(one)),
            many => {
                let many: Vec<&dyn Array> = many.iter().map(AsRef::as_ref).collect();
                concat(&many).ok()
            }
        }
    }
}

impl Stored {
    fn take(rest: &mut Bytes) -> Option<Self> {
        let number = column::with_slice(rest, get_number)?;
        let id = column::with_slice(rest, get_signed)?;
        let name = take_sized(rest)?;
        let ty = take_sized(rest)?;
        Some(Self {
            number,
            id: i32::try_from(id).ok()?,
            name: std::str::from_utf8(&name).ok()?.to_owned(),
            ty: FieldType::parse(std::str::from_utf8(&ty).ok()?)?,
        })
    }
}

fn take_sized(rest: &mut Bytes) -> Option<Bytes> {
    let length = column::with_slice(rest, get_number)?;
    column::take_bytes(rest, usize::try_from(length).ok()?)
}

/// The id in a field's metadata.
pub fn field_id(field: &Field) -> Option<i32> {
    field.metadata().get(FIELD_ID_KEY)?.parse().ok()
}

fn positions(schema: &Schema) -> Result<HashMap<i32, usize>, LakeError> {
    let mut positions = HashMap::with_capacity(schema.fields().len());
    for (position, field) in schema.fields().iter().enumerate() {
        let id = field_id(field).ok_or_else(|| {
            LakeError::corrupt(WHAT, format!("field \"{}\" has no id", field.name()))
        })?;
        positions.insert(id, position);
    }
    Ok(positions)
}

/// What the chunk's row says. A batch without events is refused: there are no empty chunks.
pub fn info(batch: &RecordBatch) -> Result<ChunkInfo, LakeError> {
    let column = |name: &str| {
        batch
            .column_by_name(name)
            .ok_or_else(|| LakeError::encode(WHAT, format!("column {name} is missing")))
    };
    let bad = |name: &str| LakeError::encode(WHAT, format!("column {name} has no value"));
    let time = column(TIME)?
        .as_primitive_opt::<TimestampMicrosecondType>()
        .ok_or_else(|| bad(TIME))?;
    let xid = column(XID)?
        .as_primitive_opt::<Int64Type>()
        .ok_or_else(|| bad(XID))?;
    if time.null_count() > 0 || xid.null_count() > 0 {
        return Err(LakeError::encode(WHAT, "an event has no _time or no _xid"));
    }
    Ok(ChunkInfo {
        n: batch.num_rows(),
        min_time_us: min(time).ok_or_else(|| bad(TIME))?,
        max_time_us: max(time).ok_or_else(|| bad(TIME))?,
        min_xid: min(xid).ok_or_else(|| bad(XID))?,
        max_xid: max(xid).ok_or_else(|| bad(XID))?,
        has_extra: column(EXTRA)?.null_count() < batch.num_rows(),
    })
}

/// The batches, of one schema, without the columns that no row of them has: a reader takes a missing column for NULLs,
/// but looks for a missing field in `_extra`.
pub fn without_empty_columns(batches: &[RecordBatch]) -> Result<Vec<RecordBatch>, LakeError> {
    let failed = |e| LakeError::encode(WHAT, e);
    let Some(first) = batches.first() else {
        return Ok(Vec::new());
    };
    let used = |position: usize| {
        batches.iter().any(|batch| {
            let column = batch.column(position);
            column.null_count() < column.len()
        })
    };
    let schema = first.schema();
    let has_extra = used(schema.index_of(EXTRA).map_err(failed)?);
    let kept: Vec<usize> = (0..schema.fields().len())
        .filter(|&position| {
            let name = schema.field(position).name();
            is_kept(name, used(position), has_extra)
        })
        .collect();
    batches
        .iter()
        .map(|batch| batch.project(&kept).map_err(failed))
        .collect()
}

/// Batches of [`without_empty_columns`] with the same columns: all that any of them has. `schema` is that which they had.
pub fn of_same_columns(
    batches: Vec<RecordBatch>,
    schema: &EventSchema,
) -> Result<Vec<RecordBatch>, LakeError> {
    let Some((first, others)) = batches.split_first() else {
        return Ok(batches);
    };
    if others.iter().all(|batch| batch.schema() == first.schema()) {
        return Ok(batches);
    }
    let full = schema.arrow();
    let has = |name: &str| batches.iter().any(|b| b.schema().index_of(name).is_ok());
    let (kept, _): (Vec<_>, Vec<_>) = full.fields().iter().cloned().partition(|f| has(f.name()));
    let common = Arc::new(Schema::new(kept));
    batches.iter().map(|b| conform(b, &common)).collect()
}

/// Whether a chunk has the column of a field, in which there are values or not.
fn is_kept(name: &str, is_used: bool, has_extra: bool) -> bool {
    let is_system = SYSTEM_FIELDS.iter().any(|(_, system, _)| *system == name);
    is_used || matches!(name, TIME | RECEIVED_AT | EXTRA | XID) || has_extra && !is_system
}

/// A batch with the columns of the target schema: by field id, missing ones NULL.
pub fn conform(batch: &RecordBatch, target: &SchemaRef) -> Result<RecordBatch, LakeError> {
    let schema = batch.schema();
    if Arc::ptr_eq(&schema, target) {
        return Ok(batch.clone());
    }
    let positions = positions(&schema)?;
    let columns = target
        .fields()
        .iter()
        .map(|field| {
            let position = field_id(field).and_then(|id| positions.get(&id));
            let Some(&position) = position else {
                return Ok(new_null_array(field.data_type(), batch.num_rows()));
            };
            let column: &ArrayRef = batch.column(position);
            if column.data_type() != field.data_type() {
                return Err(LakeError::corrupt(
                    WHAT,
                    format!(
                        "field \"{}\" is {}, not {}",
                        field.name(),
                        column.data_type(),
                        field.data_type()
                    ),
                ));
            }
            Ok(Arc::clone(column))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    RecordBatch::try_new_with_options(Arc::clone(target), columns, &options)
        .map_err(|e| LakeError::corrupt(WHAT, e))
}

/// Batches of several schema versions as one batch of the target schema, in their order.
pub fn merge(batches: &[RecordBatch], target: SchemaRef) -> Result<RecordBatch, LakeError> {
    let conformed = batches
        .iter()
        .map(|batch| conform(batch, &target))
        .collect::<Result<Vec<_>, _>>()?;
    concat_batches(&target, &conformed).map_err(|e| LakeError::encode(WHAT, e))
}

#[cfg(test)]
mod tests;
