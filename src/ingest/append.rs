//! The one door into the hot tier: a batch becomes a chunk, in the caller's transaction.

use arrow::array::RecordBatch;
use rakam_lake::chunk;

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
}

/// Stores a batch of the collection's stored layout (`Schema::arrow`).
pub fn append(target: Target, batch: &RecordBatch) -> Result<()> {
    if batch.num_rows() == 0 {
        return Ok(());
    }
    let info = chunk::info(batch)?;
    let data = chunk::encode(batch, target.schema_version)?;
    failpoint::hit("append.before_insert");
    manifest::add_chunk(&NewChunk {
        project_id: target.project_id,
        collection_id: target.collection_id,
        schema_version: target.schema_version,
        level: target.level,
        info: &info,
        data: &data,
    })
}
