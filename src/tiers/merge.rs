//! Small chunks of a collection become larger ones, so that a scan opens few.
//!
//! Chunks merge with others of their level only, eight at a time: each row is rewritten at most a few times.

use rakam_lake::chunk;

use crate::catalog::manifest::{self, ChunkRow};
use crate::catalog::registry;
use crate::ingest::append::{Target, append};
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, failpoint, wait};

/// A chunk with at least so many rows is not merged any more.
pub const SMALL_ROWS: i32 = 20_000;
/// So many small chunks of a level make a merge worth while.
pub const FAN_IN: usize = 8;
/// A merge takes at most so much.
const MERGE_BYTES: i64 = 16 << 20;

/// Merges what is worth it in one collection. Returns the number of merges.
pub fn collection(collection_id: i32) -> std::result::Result<u64, Failure> {
    // A flush of the same collection has it: the chunks are about to go anyway.
    let Some(_job) = SessionLock::try_take(LockOn::CollectionJob(collection_id)) else {
        return Ok(0);
    };
    let mut merges = 0;
    while xact::worker(|| one(collection_id))? {
        merges += 1;
    }
    Ok(merges)
}

fn one(collection_id: i32) -> Result<bool> {
    let Some(collection) = registry::collection_by_id(View::Current, collection_id)? else {
        return Ok(false);
    };
    let chunks = manifest::chunks(View::Current, collection_id, None)?;
    let Some((level, inputs)) = choose(&chunks) else {
        return Ok(false);
    };
    let schema = registry::schema(View::Current, &collection)?;
    let mut batches = Vec::with_capacity(inputs.len());
    for input in &inputs {
        wait::check_interrupts();
        let data = manifest::chunk_data(View::Current, input.chunk_id)?
            .ok_or_else(|| PgError::internal("a chunk vanished under the collection's job lock"))?;
        batches.push(chunk::decode(data.into())?);
    }
    let merged = chunk::merge(&batches, schema.arrow())?;
    append(
        Target {
            project_id: collection.project_id,
            collection_id,
            schema_version: schema.version,
            level: level + 1,
        },
        &merged,
    )?;
    let ids: Vec<i64> = inputs.iter().map(|c| c.chunk_id).collect();
    if manifest::delete_chunks(&ids)? != ids.len() as u64 {
        return Err(PgError::internal(
            "a chunk vanished under the collection's job lock",
        ));
    }
    failpoint::hit("merge.before_commit");
    Ok(true)
}

/// The chunks of one level to merge: the lowest level with enough small ones.
fn choose(chunks: &[ChunkRow]) -> Option<(i16, Vec<&ChunkRow>)> {
    let levels = chunks.iter().map(|c| c.level).max()?;
    (0..=levels).find_map(|level| {
        let small: Vec<&ChunkRow> = chunks
            .iter()
            .filter(|c| c.level == level && c.n < SMALL_ROWS)
            .collect();
        if small.len() < FAN_IN {
            return None;
        }
        let mut bytes = 0;
        let mut rows = 0;
        let taken: Vec<&ChunkRow> = small
            .into_iter()
            .take(FAN_IN * 8)
            .take_while(|c| {
                bytes += i64::from(c.bytes);
                rows += c.n;
                bytes <= MERGE_BYTES && rows <= 5 * SMALL_ROWS
            })
            .collect();
        (taken.len() > 1).then_some((level, taken))
    })
}
