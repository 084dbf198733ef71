//! Deletion of events: rows are hidden by a set of row numbers beside their chunk or file (crates/lake `rows.rs`), and
//! left out when it is merged, flushed or rewritten ([`super::rewrite`]). What remains of them in pages is wiped out by
//! [`super::erase`].

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::RecordBatch;
use bytes::Bytes;
use rakam_lake::rows::RowSet;

use crate::catalog::deletion::{self, Object};
use crate::catalog::dropping;
use crate::catalog::inbox;
use crate::catalog::manifest;
use crate::catalog::registry::Collection;
use crate::pg::spi::View;
use crate::pg::{PgError, Result, failpoint, wait};

/// Which of a chunk's `n` rows are deleted; None: none. For a job that has the collection.
pub fn deleted(collection_id: i32, chunk_id: i64, n: usize) -> Result<Option<Arc<RowSet>>> {
    let object = Object::Chunk(chunk_id);
    let objects = HashMap::from([(object, n as u64)]);
    let mut deleted = deletion::deleted(View::Current, collection_id, &objects)?;
    Ok(deleted.remove(&object))
}

/// The rows of a chunk that are not deleted.
pub fn without_deleted(
    collection_id: i32,
    chunk_id: i64,
    batch: RecordBatch,
) -> Result<RecordBatch> {
    match deleted(collection_id, chunk_id, batch.num_rows())? {
        Some(rows) => Ok(rows.remove_from(&batch, 0)?),
        None => Ok(batch),
    }
}

/// Rows of a chunk or file to be deleted.
#[derive(Debug)]
pub struct Hit {
    pub object: Object,
    /// Rows of the object, deleted ones included.
    pub n: u64,
    /// An encoded [`RowSet`].
    pub rows: Vec<u8>,
}

/// Hides rows of chunks and files, in one transaction. The caller holds the collection's job lock since it looked for
/// them, so that the objects are those it saw. Returns how many rows it hid that were not hidden before.
pub fn hide(collection: &Collection, hits: &[Hit]) -> Result<u64> {
    dropping::lock_manifest(collection.id)?;
    let objects = hits.iter().map(|hit| (hit.object, hit.n)).collect();
    let known = deletion::deleted(View::Current, collection.id, &objects)?;
    let (mut hidden, mut cold, mut bytes, mut files) = (0, 0, 0, 0);
    let mut gone = Vec::new();
    for hit in hits {
        wait::check_interrupts();
        let found = RowSet::decode(Bytes::copy_from_slice(&hit.rows), hit.n)?;
        let before = known.get(&hit.object).map_or(0, |rows| rows.len());
        let rows = match known.get(&hit.object) {
            Some(known) => known.union(&found),
            None => found,
        };
        let more = rows.len() - before;
        if more == 0 {
            continue;
        }
        hidden += more;
        let whole = rows.len() == hit.n;
        match hit.object {
            Object::Chunk(id) if whole => gone.push(id),
            Object::File(id) if whole => {
                bytes -= manifest::file_bytes(id)?.ok_or_else(vanished)?;
                if !manifest::remove_file(id, "every event deleted")? {
                    return Err(vanished());
                }
                files -= 1;
                cold += more as i64;
            }
            Object::Chunk(_) => {
                deletion::set(collection.project_id, collection.id, hit.object, &rows)?
            }
            Object::File(_) => {
                deletion::set(collection.project_id, collection.id, hit.object, &rows)?;
                cold += more as i64;
            }
        }
    }
    if manifest::delete_chunks(&gone)? != gone.len() as u64 {
        return Err(vanished());
    }
    if cold > 0 {
        manifest::add_to_stat(collection.id, collection.project_id, -cold, bytes, files)?;
    }
    if hidden > 0 {
        leave_no_traces(collection)?;
    }
    failpoint::hit("delete.before_commit");
    Ok(hidden)
}

fn vanished() -> PgError {
    PgError::internal("a chunk or file vanished under the collection's job lock")
}

/// Deletes parked events. The caller holds the digest lock, which keeps them from being tried again meanwhile.
pub fn delete_parked(collection: &Collection, ids: &[i64]) -> Result<u64> {
    let deleted = deletion::delete_parked(ids)?;
    if deleted > 0 {
        leave_no_traces(collection)?;
    }
    Ok(deleted)
}

/// What else may hold values of the deleted events: samples go now, the inbox and the pages of tables when they can.
fn leave_no_traces(collection: &Collection) -> Result<()> {
    deletion::drop_samples(collection.id)?;
    deletion::require_erasure()?;
    inbox::rotation::empty_soon()
}
