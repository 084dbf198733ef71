//! Deleted rows of chunks and data files, and what has to be erased after them.

use std::collections::HashMap;
use std::sync::Arc;

use rakam_lake::rows::RowSet;

use crate::pg::spi::{self, View, arg, xid8};
use crate::pg::{PgError, Result};

/// What rows are deleted of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Object {
    Chunk(i64),
    File(i64),
}

impl Object {
    fn key(self) -> (&'static str, i64) {
        match self {
            Self::Chunk(id) => ("chunk", id),
            Self::File(id) => ("file", id),
        }
    }
}

/// The rows deleted of these objects, each with its number of rows, as far as the view's user sees them.
pub fn deleted(
    view: View,
    collection_id: i32,
    objects: &HashMap<Object, u64>,
) -> Result<HashMap<Object, Arc<RowSet>>> {
    let mut sets = HashMap::new();
    if objects.is_empty() {
        return Ok(sets);
    }
    let (mut chunks, mut files) = (Vec::new(), Vec::new());
    for object in objects.keys() {
        match object {
            Object::Chunk(id) => chunks.push(*id),
            Object::File(id) => files.push(*id),
        }
    }
    spi::run(
        view,
        "SELECT kind = 'chunk', object_id, positions FROM rakam_internal.deletion
         WHERE collection_id = $1 AND object_id = ANY (CASE kind WHEN 'chunk' THEN $2 ELSE $3 END)",
        &[arg(collection_id), arg(chunks), arg(files)],
        |row| {
            let id = row.must(2)?;
            let object = match row.must(1)? {
                true => Object::Chunk(id),
                false => Object::File(id),
            };
            if let Some(&n) = objects.get(&object) {
                let bytes = row.bytes(3).unwrap_or_default();
                sets.insert(object, Arc::new(RowSet::decode(bytes.into(), n)?));
            }
            Ok(())
        },
    )?;
    Ok(sets)
}

/// Stores which rows of an object are deleted, all of them. Under the collection's manifest lock.
pub fn set(project_id: i32, collection_id: i32, object: Object, rows: &RowSet) -> Result<()> {
    let (kind, id) = object.key();
    spi::execute(
        "INSERT INTO rakam_internal.deletion (kind, object_id, project_id, collection_id, n, positions)
         VALUES ($1, $2, $3, $4, $5, $6)
         ON CONFLICT (kind, object_id) DO UPDATE SET n = $5, positions = $6",
        &[
            arg(kind),
            arg(id),
            arg(project_id),
            arg(collection_id),
            arg(rows.len() as i64),
            arg(rows.encode()),
        ],
    )?;
    Ok(())
}

/// Forgets what was deleted of objects that are going now. Their bytes have to be erased if there was anything.
pub fn forget(kind_chunk: bool, ids: &[i64]) -> Result<()> {
    let kind = if kind_chunk { "chunk" } else { "file" };
    let forgotten = spi::execute(
        "DELETE FROM rakam_internal.deletion WHERE kind = $1 AND object_id = ANY ($2)",
        &[arg(kind), arg(ids.to_vec())],
    )?;
    if forgotten > 0 {
        require_erasure()?;
    }
    Ok(())
}

/// A data file of which rows are deleted.
#[derive(Debug, Clone)]
pub struct Reduced {
    pub file_id: i64,
    pub storage_id: i32,
    pub path: String,
    pub schema_version: i32,
    pub period: String,
    /// Days since 1970-01-01.
    pub first_day: i32,
    pub n: i64,
    pub bytes: i64,
    pub deleted: i64,
    pub positions: Vec<u8>,
    pub level: i16,
}

/// A file of the collection that has deleted rows, the first behind `after` by id: of those that lost at least
/// `share` of their rows or have waited for `age_s` seconds.
pub fn next_reduced(
    view: View,
    collection_id: i32,
    after: i64,
    share: f64,
    age_s: f64,
) -> Result<Option<Reduced>> {
    spi::first(
        view,
        "SELECT f.file_id, f.storage_id, f.path, f.schema_version, f.period, f.first_day - date '1970-01-01',
                f.n, f.bytes, d.n, d.positions, f.level
         FROM rakam_internal.deletion d JOIN rakam_internal.data_file f ON f.file_id = d.object_id
         WHERE d.kind = 'file' AND d.collection_id = $1 AND f.file_id > $2
           AND (d.n >= f.n * $3 OR d.since <= pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $4))
         ORDER BY f.file_id LIMIT 1",
        &[arg(collection_id), arg(after), arg(share), arg(age_s)],
        |row| {
            Ok(Reduced {
                file_id: row.must(1)?,
                storage_id: row.must(2)?,
                path: row.must(3)?,
                schema_version: row.must(4)?,
                period: row.must(5)?,
                first_day: row.must(6)?,
                n: row.must(7)?,
                bytes: row.must(8)?,
                deleted: row.must(9)?,
                positions: row.bytes(10).unwrap_or_default(),
                level: row.must(11)?,
            })
        },
    )
}

/// A chunk of the collection that has deleted rows, by the same measure.
pub fn next_reduced_chunk(
    view: View,
    collection_id: i32,
    share: f64,
    age_s: f64,
) -> Result<Option<i64>> {
    spi::first(
        view,
        "SELECT c.chunk_id
         FROM rakam_internal.deletion d JOIN rakam_internal.hot_chunk c ON c.chunk_id = d.object_id
         WHERE d.kind = 'chunk' AND d.collection_id = $1
           AND (d.n >= c.n * $2 OR d.since <= pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $3))
         ORDER BY 1 LIMIT 1",
        &[arg(collection_id), arg(share), arg(age_s)],
        |row| row.must(1),
    )
}

/// The collections with files or chunks of which that is so.
pub fn collections_with_reduced(view: View, share: f64, age_s: f64) -> Result<Vec<i32>> {
    spi::query(
        view,
        "SELECT DISTINCT d.collection_id
         FROM rakam_internal.deletion d
         LEFT JOIN rakam_internal.data_file f ON d.kind = 'file' AND f.file_id = d.object_id
         LEFT JOIN rakam_internal.hot_chunk c ON d.kind = 'chunk' AND c.chunk_id = d.object_id
         WHERE d.n >= coalesce(f.n, c.n) * $1
            OR d.since <= pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $2)
         ORDER BY 1",
        &[arg(share), arg(age_s)],
        |row| row.must(1),
    )
}

/// Parked events of a collection: they are columns only where a reader makes them so, and are deleted one by one.
pub fn parked(view: View, collection_id: i32) -> Result<Vec<i64>> {
    spi::query(
        view,
        "SELECT id FROM rakam_internal.inbox_parked WHERE collection_id = $1 ORDER BY id",
        &[arg(collection_id)],
        |row| row.must(1),
    )
}

pub fn delete_parked(ids: &[i64]) -> Result<u64> {
    spi::execute(
        "DELETE FROM rakam_internal.inbox_parked WHERE id = ANY ($1)",
        &[arg(ids.to_vec())],
    )
}

/// Drops the samples of values that did not fit: whose they were is not known of each. The counters stay.
pub fn drop_samples(collection_id: i32) -> Result<u64> {
    spi::execute(
        "DELETE FROM rakam_internal.invalid_value WHERE collection_id = $1",
        &[arg(collection_id)],
    )
}

/// Says that what this transaction and earlier ones removed of the tables that hold events is to be erased from their
/// pages too, and that the inbox is to be emptied soon.
pub fn require_erasure() -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.erasure AS e (relation, after_xid)
         SELECT t, pg_catalog.pg_current_xact_id() FROM pg_catalog.unnest('{hot_chunk,local_object,data_file_stat,
           data_file_footer,inbox_parked,invalid_value,dead_letter}'::text[]) t ORDER BY t
         ON CONFLICT (relation) DO UPDATE SET after_xid = greatest(e.after_xid, excluded.after_xid)",
        &[],
    )?;
    Ok(())
}

/// A table whose pages are to be erased.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Erasure {
    pub relation: String,
    /// What was removed by transactions up to this one.
    pub after_xid: u64,
}

pub fn erasures(view: View) -> Result<Vec<Erasure>> {
    spi::query(
        view,
        "SELECT relation, after_xid FROM rakam_internal.erasure ORDER BY relation",
        &[],
        |row| {
            Ok(Erasure {
                relation: row.must(1)?,
                after_xid: row
                    .xid8(2)
                    .ok_or_else(|| PgError::internal("an erasure has no transaction id"))?,
            })
        },
    )
}

/// The table is erased up to that transaction. More may have been asked for meanwhile.
pub fn erased(done: &Erasure) -> Result<()> {
    spi::execute(
        "DELETE FROM rakam_internal.erasure WHERE relation = $1 AND after_xid = $2",
        &[arg(done.relation.as_str()), xid8(done.after_xid)],
    )?;
    Ok(())
}

/// Deleted events that files still hold, their files, and the age of the oldest deletion in seconds; then the tables
/// that are still to be erased.
pub fn pending(view: View) -> Result<(i64, i64, f64, i64)> {
    Ok(spi::first(
        view,
        "SELECT coalesce(sum(n), 0)::int8, count(*),
                coalesce(extract(epoch FROM pg_catalog.clock_timestamp() - min(since)), 0)::float8,
                (SELECT count(*) FROM rakam_internal.erasure)
         FROM rakam_internal.deletion",
        &[],
        |row| Ok((row.must(1)?, row.must(2)?, row.must(3)?, row.must(4)?)),
    )?
    .unwrap_or_default())
}
