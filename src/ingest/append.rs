//! The one door into the hot tier: events become a chunk, in the caller's transaction.

use std::sync::Arc;

use arrow::array::{Array, Int64Array, RecordBatch};
use rakam_event::schema::XID;
use rakam_lake::chunk::{ChunkFormat, ChunkInfo, Writer};
use rakam_lake::error::LakeError;
use rakam_lake::row_chunk::Rows;

use crate::catalog::manifest::{self, NewChunk};
use crate::catalog::restore;
use crate::pg::{PgError, Result, failpoint};

/// A chunk of many rows is written at so many of them, or bytes of values, which take about a third of that in the table: a
/// query has the whole of a chunk in memory.
pub const CHUNK_ROWS: usize = 1 << 16;
pub const CHUNK_BYTES: usize = 16 << 20;

/// Where a batch belongs.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    pub project_id: i32,
    pub collection_id: i32,
    pub schema_version: i32,
    /// How often its rows have been merged.
    pub level: i16,
    /// When the oldest of its rows came into the hot tier; None: now.
    pub since_us: Option<i64>,
}

/// A chunk that is not stored yet. Made without the server, on any thread.
pub struct Encoded {
    info: ChunkInfo,
    data: Vec<u8>,
}

impl Encoded {
    /// Of a batch. Columns without values are left out. None: it has no events.
    pub fn new(
        batch: &RecordBatch,
        schema_version: i32,
    ) -> std::result::Result<Option<Self>, LakeError> {
        let mut writer = Writer::new(Vec::new(), schema_version);
        writer.add(batch)?;
        Self::of(writer)
    }

    /// Of what was written. None: no events.
    pub fn of(writer: Writer) -> std::result::Result<Option<Self>, LakeError> {
        let made = writer.finish()?;
        Ok(made.map(|(info, data)| Self { info, data }))
    }
}

/// A batch of a stored layout with the id of the transaction that stores it.
pub fn stamped(batch: &RecordBatch, xid: i64) -> Result<RecordBatch> {
    let failed = |e| PgError::internal(format!("could not stamp a batch of events: {e}"));
    let mut columns = batch.columns().to_vec();
    let position = batch.schema().index_of(XID).map_err(failed)?;
    columns[position] = Arc::new(Int64Array::from_value(xid, batch.num_rows()));
    RecordBatch::try_new(batch.schema(), columns).map_err(failed)
}

/// Stores a batch of the collection's stored layout (`Schema::arrow`).
pub fn append(target: Target, batch: &RecordBatch) -> Result<()> {
    match Encoded::new(batch, target.schema_version)? {
        Some(chunk) => append_encoded(target, chunk),
        None => Ok(()),
    }
}

/// Stores a chunk of the target's schema version.
pub fn append_encoded(target: Target, chunk: Encoded) -> Result<()> {
    insert(target, ChunkFormat::Arrow, &chunk.info, chunk.data)
}

/// Stores a few events as text. `info` is that of the batch they make, every one of them.
pub fn append_rows(target: Target, info: &ChunkInfo, rows: &Rows) -> Result<()> {
    let data = rows.encode(target.schema_version)?;
    insert(target, ChunkFormat::Rows, info, data)
}

fn insert(target: Target, format: ChunkFormat, info: &ChunkInfo, data: Vec<u8>) -> Result<()> {
    restore::ensure_over()?;
    failpoint::hit("append.before_insert");
    manifest::add_chunk(&NewChunk {
        project_id: target.project_id,
        collection_id: target.collection_id,
        schema_version: target.schema_version,
        level: target.level,
        format,
        info,
        created_at_us: target.since_us,
        data: &data.into(),
    });
    Ok(())
}

/// Rows that may be of many more bytes than others, in parts of twice a chunk's at most; one row may have more.
pub fn of_chunk_size(rows: RecordBatch) -> Vec<RecordBatch> {
    let (mut parts, mut whole) = (Vec::new(), vec![rows]);
    while let Some(rows) = whole.pop() {
        let n = rows.num_rows();
        if n < 2 || sliced_bytes(&rows) <= 2 * CHUNK_BYTES {
            parts.push(rows);
        } else {
            whole.push(rows.slice(n / 2, n - n / 2));
            whole.push(rows.slice(0, n / 2));
        }
    }
    parts
}

/// About the bytes of the values of these rows, which may be some of an array's.
fn sliced_bytes(rows: &RecordBatch) -> usize {
    let columns = rows.columns().iter();
    columns
        .filter(|column| column.null_count() < column.len())
        // What has no size of its own in a slice is not long.
        .map(|column| column.to_data().get_slice_memory_size().unwrap_or(0))
        .sum()
}
