//! A chunk: one batch of events as an Arrow IPC stream (LZ4), sealed with a checksum.
//!
//! Layout: magic `RKC1`, checksum, schema version (i32 LE), then the stream: one schema message with field ids, one
//! record batch, its numbers and times in as few bytes as they need ([`crate::narrow`]). Decoding reads the two messages itself, so that a projection decompresses only its own columns.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, RecordBatchOptions, new_null_array};
use arrow::buffer::Buffer;
use arrow::compute::{concat_batches, max, min};
use arrow::datatypes::{Field, Int64Type, Schema, SchemaRef, TimestampMicrosecondType};
use arrow::ipc::convert::fb_to_schema;
use arrow::ipc::reader::read_record_batch;
use arrow::ipc::writer::{IpcWriteOptions, StreamWriter};
use arrow::ipc::{self, CompressionType, Message, root_as_message};
use bytes::Bytes;
use rakam_event::batch::Layout;
use rakam_event::extra;
use rakam_event::schema::{
    EXTRA, FIELD_ID_KEY, Field as EventField, RECEIVED_AT, SYSTEM_FIELDS, Schema as EventSchema,
    TIME, XID,
};

use crate::error::LakeError;
use crate::row_chunk::Rows;
use crate::{narrow, seal};

const MAGIC: [u8; 4] = *b"RKC1";
const WHAT: &str = "chunk";
/// A chunk is a `bytea`, which Postgres bounds by 1 GiB; this leaves room for the row around it.
const MAX_BYTES: usize = 1_000_000_000;
/// LZ4 expands a byte to at most 255; frames and empty buffers add a little.
const MAX_EXPANSION: u64 = 255;
const EXPANSION_SLACK: u64 = 1024;
const CONTINUATION: [u8; 4] = [0xff; 4];

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

/// Encodes a batch that follows `rakam_event::schema::Schema::arrow`.
pub fn encode(batch: &RecordBatch, schema_version: i32) -> Result<Vec<u8>, LakeError> {
    let failed = |e| LakeError::encode(WHAT, e);
    let mut buffer = seal::start(4 + batch.get_array_memory_size() / 4);
    buffer.extend_from_slice(&schema_version.to_le_bytes());
    let options = IpcWriteOptions::default()
        .try_with_compression(Some(CompressionType::LZ4_FRAME))
        .map_err(failed)?;
    let batch = narrow::narrow(batch).map_err(failed)?;
    let mut writer =
        StreamWriter::try_new_with_options(buffer, &batch.schema(), options).map_err(failed)?;
    writer.write(&batch).map_err(failed)?;
    let buffer = writer.into_inner().map_err(failed)?;
    if buffer.len() > MAX_BYTES {
        return Err(LakeError::TooLarge {
            what: WHAT,
            bytes: buffer.len(),
            limit: MAX_BYTES,
        });
    }
    Ok(seal::seal(buffer, MAGIC))
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
    let (_, stream) = split_version(seal::open(chunk, MAGIC, WHAT)?)?;
    seal::guarded(WHAT, || decode_stream(Buffer::from(stream), field_ids))
}

fn decode_stream(stream: Buffer, field_ids: Option<&[i32]>) -> Result<RecordBatch, LakeError> {
    let mut position = 0;
    let head = next_message(&stream, &mut position)?;
    let schema = message(&head)?
        .header_as_schema()
        .ok_or_else(|| LakeError::corrupt(WHAT, "no schema"))?;
    let schema: SchemaRef = Arc::new(fb_to_schema(schema));

    let head = next_message(&stream, &mut position)?;
    let message = message(&head)?;
    let batch = message
        .header_as_record_batch()
        .ok_or_else(|| LakeError::corrupt(WHAT, "no record batch"))?;
    let body = usize::try_from(message.bodyLength())
        .ok()
        .and_then(|length| position.checked_add(length))
        .filter(|&end| end <= stream.len())
        .map(|end| stream.slice_with_length(position, end - position))
        .ok_or_else(|| LakeError::corrupt(WHAT, "truncated body"))?;
    let bytes = check_buffers(batch, &body)?;
    // Every event has a time, of a byte at least: without buffers for them there cannot be as many rows, which Arrow
    // believes of a schema without columns, and for which columns of NULLs would be made.
    let rows = u64::try_from(batch.length()).ok();
    if rows.is_none_or(|rows| rows > bytes || rows > i32::MAX as u64) {
        return Err(LakeError::corrupt(WHAT, "impossible number of rows"));
    }

    let projection = match field_ids {
        Some(ids) => Some(projection(&schema, ids)?),
        None => None,
    };
    read_record_batch(
        &body,
        batch,
        schema,
        &HashMap::new(),
        projection.as_deref(),
        &message.version(),
    )
    .map_err(|e| LakeError::corrupt(WHAT, e))
    .and_then(narrow::widen)
}

/// The metadata of the next message; `position` moves behind it, to the message's body.
fn next_message(stream: &Buffer, position: &mut usize) -> Result<Buffer, LakeError> {
    let truncated = || LakeError::corrupt(WHAT, "truncated message");
    let header = stream
        .get(*position..)
        .and_then(<[u8]>::first_chunk::<8>)
        .ok_or_else(truncated)?;
    let (mark, length) = header.split_at(4);
    if mark != CONTINUATION {
        return Err(LakeError::corrupt(WHAT, "no message"));
    }
    let length = length
        .first_chunk::<4>()
        .and_then(|bytes| usize::try_from(i32::from_le_bytes(*bytes)).ok())
        .ok_or_else(truncated)?;
    let start = *position + 8;
    let end = start
        .checked_add(length)
        .filter(|&end| end <= stream.len())
        .ok_or_else(truncated)?;
    *position = end;
    Ok(stream.slice_with_length(start, end - start))
}

fn message(metadata: &Buffer) -> Result<Message<'_>, LakeError> {
    root_as_message(metadata).map_err(|e| LakeError::corrupt(WHAT, e))
}

/// Arrow allocates what a buffer's own prefix claims: refuse claims that LZ4 cannot keep, ranges outside the body, and
/// bytes that are claimed more than once. Answers how many bytes the buffers have together, decompressed.
fn check_buffers(batch: ipc::RecordBatch<'_>, body: &Buffer) -> Result<u64, LakeError> {
    let compressed = batch.compression().is_some();
    let (mut stored, mut plain) = (0, 0);
    for buffer in batch.buffers().into_iter().flatten() {
        let range = usize::try_from(buffer.offset())
            .ok()
            .zip(usize::try_from(buffer.length()).ok())
            .and_then(|(start, length)| body.get(start..start.checked_add(length)?))
            .ok_or_else(|| LakeError::corrupt(WHAT, "buffer outside the body"))?;
        stored += range.len();
        if stored > body.len() {
            return Err(LakeError::corrupt(WHAT, "buffers above each other"));
        }
        if !compressed || range.is_empty() {
            plain += range.len() as u64;
            continue;
        }
        let claim = range
            .first_chunk::<8>()
            .map(|bytes| i64::from_le_bytes(*bytes))
            .ok_or_else(|| LakeError::corrupt(WHAT, "truncated buffer"))?;
        if claim > 0 && claim as u64 > MAX_EXPANSION * range.len() as u64 + EXPANSION_SLACK {
            return Err(LakeError::corrupt(WHAT, "impossible buffer size"));
        }
        // A negative claim says that the buffer is not compressed.
        plain += u64::try_from(claim).unwrap_or(range.len() as u64);
    }
    Ok(plain)
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

fn projection(schema: &Schema, field_ids: &[i32]) -> Result<Vec<usize>, LakeError> {
    let mut positions = positions(schema)?;
    // A column asked for twice is given once: Arrow's projection knows no repetition.
    Ok(field_ids
        .iter()
        .filter_map(|id| positions.remove(id))
        .collect())
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
            let name = schema.field(position).name().as_str();
            let is_system = SYSTEM_FIELDS.iter().any(|(_, system, _)| *system == name);
            matches!(name, TIME | RECEIVED_AT | EXTRA | XID)
                || has_extra && !is_system
                || used(position)
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
