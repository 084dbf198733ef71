//! The one door into the hot tier: events become a chunk, in the caller's transaction.

use arrow::array::RecordBatch;
use rakam_lake::chunk::{self, ChunkFormat, ChunkInfo};
use rakam_lake::error::LakeError;
use rakam_lake::row_chunk::Rows;

use crate::catalog::manifest::{self, NewChunk};
use crate::pg::{Result, failpoint};

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

/// A batch as a chunk that is not stored yet. Made without the server, on any thread.
pub struct Encoded {
    info: ChunkInfo,
    data: Vec<u8>,
}

impl Encoded {
    /// Of a batch with events. Columns without values are left out.
    pub fn new(batch: &RecordBatch, schema_version: i32) -> std::result::Result<Self, LakeError> {
        let info = chunk::info(batch)?;
        let lean = chunk::without_empty_columns(std::slice::from_ref(batch))?;
        let data = chunk::encode(lean.first().unwrap_or(batch), schema_version)?;
        Ok(Self { info, data })
    }
}

/// Stores a batch of the collection's stored layout (`Schema::arrow`).
pub fn append(target: Target, batch: &RecordBatch) -> Result<()> {
    if batch.num_rows() == 0 {
        return Ok(());
    }
    append_encoded(target, &Encoded::new(batch, target.schema_version)?)
}

/// Stores a chunk of the target's schema version.
pub fn append_encoded(target: Target, chunk: &Encoded) -> Result<()> {
    insert(target, ChunkFormat::Arrow, &chunk.info, &chunk.data)
}

/// Stores a few events as text. `info` is that of the batch they make, every one of them.
pub fn append_rows(target: Target, info: &ChunkInfo, rows: &Rows) -> Result<()> {
    let data = rows.encode(target.schema_version)?;
    insert(target, ChunkFormat::Rows, info, &data)
}

fn insert(target: Target, format: ChunkFormat, info: &ChunkInfo, data: &[u8]) -> Result<()> {
    failpoint::hit("append.before_insert");
    manifest::add_chunk(&NewChunk {
        project_id: target.project_id,
        collection_id: target.collection_id,
        schema_version: target.schema_version,
        level: target.level,
        format,
        info,
        created_at_us: target.since_us,
        data,
    })
}
