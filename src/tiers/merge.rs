//! Small chunks of a collection become larger ones, so that a scan opens few.
//!
//! Chunks merge with others of their level only, so that each row is rewritten a few times at most. Row chunks become
//! larger row chunks, and columns as soon as they have enough events together.

use std::collections::BTreeMap;

use rakam_lake::chunk::{self, ChunkFormat, ChunkInfo};
use rakam_lake::period::{Period, day_of};
use rakam_lake::row_chunk::{MAX_ROWS, Rows};

use crate::catalog::manifest::{self, ChunkRow};
use crate::catalog::{dropping, registry};
use crate::ingest::append::{CHUNK_BYTES, Target, append, append_rows};
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::spi::{self, View};
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, failpoint, wait};
use crate::tiers::delete;

/// A chunk with at least so many rows, or bytes, is not merged any more.
const SMALL_ROWS: i32 = 20_000;
const SMALL_BYTES: i32 = 256 << 10;
/// So many small chunks of a level make a merge worth while.
const FAN_IN: usize = 8;
/// The same for row chunks, which are opened faster and are merged into columns soon.
const ROWS_FAN_IN: usize = 32;
/// A merge takes at most so much as it is stored, and about so much as values, of which few bytes can be many: a query has
/// all of a chunk in memory.
const MERGE_BYTES: i64 = 16 << 20;
const MERGE_VALUES: usize = 3 * CHUNK_BYTES;

/// Merges what is worth it in one collection. Returns the number of merges.
pub fn collection(collection_id: i32) -> std::result::Result<u64, Failure> {
    // A flush of the same collection has it: the chunks are about to go anyway.
    let Some(_job) = SessionLock::try_take(LockOn::CollectionJob(collection_id)) else {
        return Ok(0);
    };
    if xact::worker(|| dropping::concerns(collection_id))? {
        return Ok(0);
    }
    let mut merges = 0;
    // In the resident worker: nobody's transaction may hold it up.
    while xact::in_passing(|| one(collection_id))? == Some(true) {
        merges += 1;
    }
    Ok(merges)
}

/// Whether [`collection`] would merge any of these chunks of a collection.
pub fn is_worth_it(chunks: &[ChunkRow]) -> bool {
    choose(chunks).is_some()
}

/// Chunks to merge, all of one format.
struct Choice<'a> {
    inputs: Vec<&'a ChunkRow>,
    format: ChunkFormat,
    /// Of the result.
    level: i16,
}

fn one(collection_id: i32) -> Result<bool> {
    dropping::lock_manifest(collection_id)?;
    let Some(collection) = registry::collection_by_id(View::Current, collection_id)? else {
        return Ok(false);
    };
    let chunks = manifest::chunks(View::Current, collection_id, None)?;
    let Some(mut choice) = choose(&chunks) else {
        return Ok(false);
    };
    // A merge that a crash takes back leaves what it merged: nothing waits for it to be on disk.
    spi::execute_text("SET LOCAL synchronous_commit = off")?;
    let schema = registry::schema(View::Current, &collection)?;
    let target = Target {
        project_id: collection.project_id,
        collection_id,
        schema_version: schema.version,
        level: choice.level,
        since_us: choice.inputs.iter().map(|c| c.created_at_us).min(),
    };
    if choice.format == ChunkFormat::Rows {
        let mut rows = Rows::default();
        for input in &choice.inputs {
            let stored = Rows::decode(data(input)?.into())?;
            match delete::deleted(collection_id, input.chunk_id, stored.len())? {
                Some(deleted) => rows.extend(&stored.without(&deleted)),
                None => rows.extend(&stored),
            }
        }
        if rows.is_empty() {
            // All of them are deleted.
        } else if rows.is_few() {
            // Text is read by what was a field when it was digested, columns by what is one now.
            let oldest = choice.inputs.iter().map(|c| c.schema_version).min();
            let target = Target {
                schema_version: oldest.unwrap_or(target.schema_version),
                ..target
            };
            let bounds = ChunkInfo {
                n: rows.len(),
                ..info(&choice.inputs)?
            };
            append_rows(target, &bounds, &rows)?;
        } else {
            let columns = chunk::of_rows(&rows, &schema)?;
            append(Target { level: 0, ..target }, &columns)?;
        }
    } else {
        let mut batches = Vec::with_capacity(choice.inputs.len());
        let mut bytes = 0;
        for input in &choice.inputs {
            let batch = chunk::read(input.format, data(input)?.into(), &schema)?;
            bytes += batch.get_array_memory_size();
            // One alone goes to the next level, where it is not in the way of the others.
            if bytes > MERGE_VALUES && !batches.is_empty() {
                break;
            }
            batches.push(delete::without_deleted(
                collection_id,
                input.chunk_id,
                batch,
            )?);
        }
        choice.inputs.truncate(batches.len());
        append(target, &chunk::merge(&batches, schema.arrow())?)?;
    }
    let ids: Vec<i64> = choice.inputs.iter().map(|c| c.chunk_id).collect();
    if manifest::delete_chunks(&ids)? != ids.len() as u64 {
        return Err(vanished());
    }
    failpoint::hit("merge.before_commit");
    Ok(true)
}

fn data(chunk: &ChunkRow) -> Result<Vec<u8>> {
    wait::check_interrupts();
    manifest::chunk_data(View::Current, chunk.chunk_id)?.ok_or_else(vanished)
}

fn vanished() -> PgError {
    PgError::internal("a chunk vanished under the collection's job lock")
}

/// What the rows of all these chunks say together.
fn info(chunks: &[&ChunkRow]) -> Result<ChunkInfo> {
    let bounds = |chunk: &ChunkRow| ChunkInfo {
        n: chunk.n as usize,
        min_time_us: chunk.min_time_us,
        max_time_us: chunk.max_time_us,
        min_xid: chunk.min_xid as i64,
        max_xid: chunk.max_xid as i64,
        has_extra: chunk.has_extra,
    };
    chunks
        .iter()
        .map(|chunk| bounds(chunk))
        .reduce(ChunkInfo::and)
        .ok_or_else(|| PgError::internal("a merge of no chunks"))
}

/// The chunks to merge: row chunks that make columns together, else the lowest level with enough small ones.
fn choose(chunks: &[ChunkRow]) -> Option<Choice<'_>> {
    let rows = chunks.iter().filter(|c| c.format == ChunkFormat::Rows);
    if rows.clone().map(|c| i64::from(c.n)).sum::<i64>() >= MAX_ROWS as i64 {
        let inputs = bounded(rows.collect());
        return (inputs.len() > 1).then_some(Choice {
            inputs,
            format: ChunkFormat::Rows,
            level: 0,
        });
    }
    let levels = chunks.iter().map(|c| c.level).max()?;
    let formats = [
        (ChunkFormat::Rows, ROWS_FAN_IN),
        (ChunkFormat::Arrow, FAN_IN),
    ];
    (0..=levels)
        .flat_map(|level| formats.map(|(format, fan_in)| (level, format, fan_in)))
        .find_map(|(level, format, fan_in)| {
            let mut months = BTreeMap::<Option<i32>, Vec<&ChunkRow>>::new();
            for chunk in chunks
                .iter()
                .filter(|c| c.format == format && c.level == level)
                .filter(|c| c.n < SMALL_ROWS && c.bytes < SMALL_BYTES)
            {
                months.entry(month(chunk)).or_default().push(chunk);
            }
            let small = months.into_values().find(|small| small.len() >= fan_in)?;
            let inputs = bounded(small);
            (inputs.len() > 1).then_some(Choice {
                inputs,
                format,
                level: level + 1,
            })
        })
}

/// The month of all events of a chunk of columns, as a load of history makes them: such chunks merge within their month
/// only, since a flush would have to part them again.
fn month(chunk: &ChunkRow) -> Option<i32> {
    let month = |us| Period::Month.around(day_of(us)).0;
    let first = month(chunk.min_time_us);
    (chunk.format == ChunkFormat::Arrow && first == month(chunk.max_time_us)).then_some(first)
}

/// As many as one merge takes.
fn bounded(chunks: Vec<&ChunkRow>) -> Vec<&ChunkRow> {
    let mut bytes = 0;
    let mut rows = 0;
    chunks
        .into_iter()
        .take(FAN_IN * 8)
        .take_while(|c| {
            bytes += i64::from(c.bytes);
            rows += c.n;
            bytes <= MERGE_BYTES && rows <= 5 * SMALL_ROWS
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use rakam_lake::period::MICROS_PER_DAY;

    use super::*;

    fn chunk(format: ChunkFormat, n: i32, level: i16) -> ChunkRow {
        ChunkRow {
            chunk_id: 1,
            collection_id: 1,
            format,
            schema_version: 1,
            n,
            bytes: 100 * n,
            has_extra: false,
            min_time_us: 0,
            max_time_us: 0,
            level,
            min_xid: 0,
            max_xid: 0,
            created_at_us: 0,
        }
    }

    fn chosen(chunks: &[ChunkRow]) -> Option<(ChunkFormat, i16, usize)> {
        choose(chunks).map(|c| (c.format, c.level, c.inputs.len()))
    }

    #[test]
    fn chunks_merge_with_their_like() {
        use ChunkFormat::{Arrow, Rows};
        let mut chunks = vec![chunk(Rows, 1, 0); ROWS_FAN_IN - 1];
        chunks.extend(vec![chunk(Arrow, 600, 0); FAN_IN - 1]);
        assert_eq!(chosen(&chunks), None);
        chunks.push(chunk(Arrow, 600, 0));
        assert_eq!(chosen(&chunks), Some((Arrow, 1, FAN_IN)));
        chunks.push(chunk(Rows, 1, 0));
        assert_eq!(chosen(&chunks), Some((Rows, 1, ROWS_FAN_IN)));
        // Enough for columns, of whatever level.
        chunks.push(chunk(Rows, 499, 1));
        assert_eq!(chosen(&chunks), Some((Rows, 0, ROWS_FAN_IN + 1)));
        assert_eq!(chosen(&vec![chunk(Arrow, SMALL_ROWS, 0); 20]), None);
        let mut wide = chunk(Arrow, 600, 0);
        wide.bytes = SMALL_BYTES;
        assert_eq!(chosen(&vec![wide; 20]), None);
        // Chunks of one month keep to themselves.
        let mut history = vec![chunk(Arrow, 600, 0); FAN_IN];
        history[0].min_time_us = i64::from(31) * MICROS_PER_DAY;
        history[0].max_time_us = history[0].min_time_us;
        assert_eq!(chosen(&history), None);
        history.push(chunk(Arrow, 600, 0));
        assert_eq!(chosen(&history), Some((Arrow, 1, FAN_IN)));
    }
}
