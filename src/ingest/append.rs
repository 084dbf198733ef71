//! The one door into the hot tier: events become a chunk, in the caller's transaction.

use std::sync::Arc;

use arrow::array::{Int64Array, RecordBatch};
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
