//! What holds the digested events: hot chunks and data files, and the default storage's objects.

use std::collections::HashMap;

use rakam_lake::chunk::{ChunkFormat, ChunkInfo};
use rakam_lake::period::{Period, day_of};

use super::{deletion, inbox, restore};
use crate::pg::bytea::Bytea;
use crate::pg::locks::{self, Mode};
use crate::pg::spi::{self, View, arg, xid8};
use crate::pg::{Datum, PG_EPOCH_US, PgError, Result, heap, relation, xact};

/// A hot chunk without its bytes.
#[derive(Debug, Clone)]
pub struct ChunkRow {
    pub chunk_id: i64,
    pub collection_id: i32,
    pub format: ChunkFormat,
    pub schema_version: i32,
    pub n: i32,
    pub bytes: i32,
    pub has_extra: bool,
    pub min_time_us: i64,
    pub max_time_us: i64,
    pub level: i16,
    pub min_xid: u64,
    pub max_xid: u64,
    /// When its oldest events were digested.
    pub created_at_us: i64,
}

/// A chunk to be stored.
pub struct NewChunk<'a> {
    pub project_id: i32,
    pub collection_id: i32,
    pub schema_version: i32,
    pub level: i16,
    pub format: ChunkFormat,
    pub info: &'a ChunkInfo,
    /// None: now.
    pub created_at_us: Option<i64>,
    pub data: &'a Bytea,
}

/// A data file of the manifest.
#[derive(Debug, Clone)]
pub struct FileRow {
    pub file_id: i64,
    pub storage_id: i32,
    pub path: String,
    pub schema_version: i32,
    pub n: i64,
    pub bytes: i64,
    pub footer_bytes: i32,
    pub has_extra: bool,
    pub min_time_us: i64,
    pub max_time_us: i64,
}

fn chunk_row(row: &spi::Row) -> Result<ChunkRow> {
    let format: String = row.must(10)?;
    Ok(ChunkRow {
        chunk_id: row.must(1)?,
        collection_id: row.must(9)?,
        format: ChunkFormat::parse(&format)
            .ok_or_else(|| PgError::internal(format!("unknown chunk format \"{format}\"")))?,
        schema_version: row.must(2)?,
        n: row.must(3)?,
        bytes: row.must(4)?,
        has_extra: row.must(5)?,
        min_time_us: row.timestamptz(6).unwrap_or(i64::MIN),
        max_time_us: row.timestamptz(7).unwrap_or(i64::MAX),
        level: row.must(8)?,
        min_xid: row.xid8(11).unwrap_or(0),
        max_xid: row.xid8(12).unwrap_or(u64::MAX),
        created_at_us: row.timestamptz(13).unwrap_or(0),
    })
}

/// The chunks of a collection whose times touch the range (both ends inclusive).
pub fn chunks(
    view: View,
    collection_id: i32,
    time_range: Option<(i64, i64)>,
) -> Result<Vec<ChunkRow>> {
    match time_range {
        None => spi::query(
            view,
            "SELECT chunk_id, schema_version, n, bytes, has_extra, min_time, max_time, level, collection_id, format,
                    min_xid, max_xid, created_at
             FROM rakam_internal.hot_chunk WHERE collection_id = $1 ORDER BY chunk_id",
            &[arg(collection_id)],
            chunk_row,
        ),
        Some((from, to)) => spi::query(
            view,
            "SELECT chunk_id, schema_version, n, bytes, has_extra, min_time, max_time, level, collection_id, format,
                    min_xid, max_xid, created_at
             FROM rakam_internal.hot_chunk WHERE collection_id = $1 AND max_time >= $2 AND min_time <= $3
             ORDER BY chunk_id",
            &[
                arg(collection_id),
                spi::timestamptz_saturating(from),
                spi::timestamptz_saturating(to),
            ],
            chunk_row,
        ),
    }
}

/// The bytes of a chunk, if the view's user sees it.
pub fn chunk_data(view: View, chunk_id: i64) -> Result<Option<Vec<u8>>> {
    spi::first(
        view,
        "SELECT data FROM rakam_internal.hot_chunk WHERE chunk_id = $1",
        &[arg(chunk_id)],
        |row| Ok(row.bytes(1).unwrap_or_default()),
    )
}

/// Stores a chunk, below the executor: a plan would copy its bytes for each of its own steps.
pub fn add_chunk(chunk: &NewChunk<'_>) {
    let oid = |name| relation::oid("rakam_internal", name);
    let table = oid("hot_chunk");
    locks::relation(table, Mode::RowExclusive);
    let id = heap::nextval(oid("hot_chunk_chunk_id"));
    let time = |unix_us: i64| Datum::from(unix_us - PG_EPOCH_US);
    let ChunkInfo {
        n,
        min_time_us,
        max_time_us,
        min_xid,
        max_xid,
        has_extra,
    } = *chunk.info;
    heap::insert(
        table,
        &[
            Datum::from(id),
            Datum::from(chunk.project_id),
            Datum::from(chunk.collection_id),
            Datum::from(chunk.schema_version),
            Datum::from(n as i32),
            Datum::from(chunk.data.as_bytes().len() as i32),
            time(min_time_us),
            time(max_time_us),
            Datum::from(chunk.level),
            Datum::from(has_extra),
            Datum::from(min_xid),
            Datum::from(max_xid),
            Datum::from(xact::top_xid()),
            time(chunk.created_at_us.unwrap_or_else(xact::now_us)),
            inbox::datum(chunk.format.as_str()),
            chunk.data.datum(),
        ],
    );
}

/// Deletes chunks by id, with what is known of their deleted rows; the caller compares the number.
pub fn delete_chunks(ids: &[i64]) -> Result<u64> {
    deletion::forget(true, ids)?;
    spi::execute(
        "DELETE FROM rakam_internal.hot_chunk WHERE chunk_id = ANY ($1)",
        &[arg(ids.to_vec())],
    )
}

/// All chunks there are. For a look at the whole hot tier: once, and then rarely.
pub fn all_chunks(view: View) -> Result<Vec<ChunkRow>> {
    spi::query(
        view,
        "SELECT chunk_id, schema_version, n, bytes, has_extra, min_time, max_time, level, collection_id, format,
                min_xid, max_xid, created_at
         FROM rakam_internal.hot_chunk ORDER BY chunk_id",
        &[],
        chunk_row,
    )
}

/// The chunks with higher ids.
pub fn chunks_after(view: View, chunk_id: i64) -> Result<Vec<ChunkRow>> {
    spi::query(
        view,
        "SELECT chunk_id, schema_version, n, bytes, has_extra, min_time, max_time, level, collection_id, format,
                min_xid, max_xid, created_at
         FROM rakam_internal.hot_chunk WHERE chunk_id > $1 ORDER BY chunk_id",
        &[arg(chunk_id)],
        chunk_row,
    )
}

fn file_row(row: &spi::Row) -> Result<FileRow> {
    Ok(FileRow {
        file_id: row.must(1)?,
        storage_id: row.must(2)?,
        path: row.must(3)?,
        schema_version: row.must(4)?,
        n: row.must(5)?,
        bytes: row.must(6)?,
        footer_bytes: row.must(7)?,
        has_extra: row.must(8)?,
        min_time_us: row.timestamptz(9).unwrap_or(i64::MIN),
        max_time_us: row.timestamptz(10).unwrap_or(i64::MAX),
    })
}

/// The data files of a collection whose times touch the range (both ends inclusive).
pub fn files(
    view: View,
    collection_id: i32,
    time_range: Option<(i64, i64)>,
) -> Result<Vec<FileRow>> {
    match time_range {
        None => spi::query(
            view,
            "SELECT file_id, storage_id, path, schema_version, n, bytes, footer_bytes, has_extra, min_time, max_time
             FROM rakam_internal.data_file WHERE collection_id = $1 ORDER BY min_time, file_id",
            &[arg(collection_id)],
            file_row,
        ),
        Some((from, to)) => {
            let (first, last) = (day_within_dates(from), day_within_dates(to));
            spi::query(
                view,
                // A file's events are all of its period, so three places in the index hold all files of a range,
                // wherever it lies: by the times alone half of all entries would be looked at.
                "SELECT file_id, storage_id, path, schema_version, n, bytes, footer_bytes, has_extra, min_time, max_time
                 FROM rakam_internal.data_file
                 WHERE collection_id = $1 AND period = 'day'
                   AND first_day BETWEEN date '1970-01-01' + $4 AND date '1970-01-01' + $7
                   AND max_time >= $2 AND min_time <= $3
                 UNION ALL
                 SELECT file_id, storage_id, path, schema_version, n, bytes, footer_bytes, has_extra, min_time, max_time
                 FROM rakam_internal.data_file
                 WHERE collection_id = $1 AND period = 'month'
                   AND first_day BETWEEN date '1970-01-01' + $5 AND date '1970-01-01' + $7
                   AND max_time >= $2 AND min_time <= $3
                 UNION ALL
                 SELECT file_id, storage_id, path, schema_version, n, bytes, footer_bytes, has_extra, min_time, max_time
                 FROM rakam_internal.data_file
                 WHERE collection_id = $1 AND period = 'year'
                   AND first_day BETWEEN date '1970-01-01' + $6 AND date '1970-01-01' + $7
                   AND max_time >= $2 AND min_time <= $3
                 ORDER BY min_time, file_id",
                &[
                    arg(collection_id),
                    spi::timestamptz_saturating(from),
                    spi::timestamptz_saturating(to),
                    arg(first),
                    arg(Period::Month.around(first).0.max(FIRST_DATE)),
                    arg(Period::Year.around(first).0.max(FIRST_DATE)),
                    arg(last),
                ],
                file_row,
            )
        }
    }
}

/// The days since 1970-01-01 of the first date there is, 4714-11-24 BC, and of one after the last timestamp.
const FIRST_DATE: i32 = -2_440_588;
const LAST_DATE: i32 = 106_751_992;

/// The UTC day of a time, as days since 1970-01-01 that a date can have.
fn day_within_dates(time_us: i64) -> i32 {
    day_of(time_us).clamp(FIRST_DATE, LAST_DATE)
}

/// The number of all files of a collection, for EXPLAIN's "skipped".
pub fn file_count(view: View, collection_id: i32) -> Result<i64> {
    Ok(spi::first(
        view,
        "SELECT files FROM rakam_internal.collection_stat WHERE collection_id = $1",
        &[arg(collection_id)],
        |row| row.must(1),
    )?
    .unwrap_or(0))
}

/// The statistics of files (crates/lake `stats.rs`), by file. Those of very many are asked for in parts, to be held in memory.
pub fn stats(view: View, file_ids: &[i64]) -> Result<HashMap<i64, Vec<u8>>> {
    let rows = spi::query(
        view,
        "SELECT file_id, stats FROM rakam_internal.data_file_stat WHERE file_id = ANY ($1)",
        &[arg(file_ids.to_vec())],
        |row| Ok((row.must(1)?, row.bytes(2).unwrap_or_default())),
    )?;
    Ok(rows.into_iter().collect())
}

/// The Parquet footers of files, by file.
pub fn footers(view: View, file_ids: &[i64]) -> Result<HashMap<i64, Vec<u8>>> {
    let rows = spi::query(
        view,
        "SELECT file_id, footer FROM rakam_internal.data_file_footer WHERE file_id = ANY ($1)",
        &[arg(file_ids.to_vec())],
        |row| Ok((row.must(1)?, row.bytes(2).unwrap_or_default())),
    )?;
    Ok(rows.into_iter().collect())
}

/// What planning knows of a collection: cold events, hot events.
pub fn estimate(view: View, collection_id: i32) -> Result<(i64, i64)> {
    Ok(spi::first(
        view,
        "SELECT coalesce((SELECT cold_events FROM rakam_internal.collection_stat WHERE collection_id = $1), 0),
                (coalesce((SELECT sum(n) FROM rakam_internal.hot_chunk WHERE collection_id = $1), 0)
                 - coalesce((SELECT sum(n) FROM rakam_internal.deletion
                             WHERE collection_id = $1 AND kind = 'chunk'), 0))::int8",
        &[arg(collection_id)],
        |row| Ok((row.must(1)?, row.must(2)?)),
    )?
    .unwrap_or((0, 0)))
}

/// Size of a part of an object in the default storage: small enough that a range read detoasts little.
pub const PART_BYTES: usize = 1 << 20;

/// The size of an object in the default storage.
pub fn object_size(view: View, path: &str) -> Result<Option<u64>> {
    spi::first(
        view,
        "SELECT sum(octet_length(data))::int8 FROM rakam_internal.local_object WHERE path = $1",
        &[arg(path)],
        |row| Ok(row.get::<i64>(1).map(|n| n as u64)),
    )
    .map(Option::flatten)
}

/// A range of an object in the default storage; shorter where the object ends.
pub fn object_range(view: View, path: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
    let part = PART_BYTES as u64;
    let (first, last) = (offset / part, (offset + len.max(1) - 1) / part);
    let mut bytes = Vec::with_capacity(len as usize);
    spi::run(
        view,
        "SELECT substr(data, CASE WHEN part = $2 THEN $4 ELSE 1 END,
                       CASE WHEN part = $3 THEN $5 ELSE 1048576 END - CASE WHEN part = $2 THEN $4 - 1 ELSE 0 END)
         FROM rakam_internal.local_object WHERE path = $1 AND part BETWEEN $2 AND $3 ORDER BY part",
        &[
            arg(path),
            arg(first as i32),
            arg(last as i32),
            arg((offset - first * part) as i32 + 1),
            arg((offset + len - last * part) as i32),
        ],
        |row| {
            bytes.extend_from_slice(row.get::<&[u8]>(1).unwrap_or_default());
            Ok(())
        },
    )?;
    Ok(bytes)
}

/// Stores an object in the default storage.
pub fn put_object(project_id: i32, path: &str, data: &[u8]) -> Result<()> {
    for (part, bytes) in data.chunks(PART_BYTES).enumerate() {
        spi::execute(
            "INSERT INTO rakam_internal.local_object (path, part, project_id, data) VALUES ($1, $2, $3, $4)",
            &[arg(path), arg(part as i32), arg(project_id), arg(bytes)],
        )?;
    }
    Ok(())
}

/// A data file to be added to the manifest.
pub struct NewFile<'a> {
    pub project_id: i32,
    pub collection_id: i32,
    pub storage_id: i32,
    pub path: &'a str,
    pub schema_version: i32,
    pub period: &'static str,
    /// Days since 1970-01-01.
    pub first_day: i32,
    /// How many merges its events have been through, at most.
    pub level: i16,
    pub n: i64,
    pub bytes: i64,
    pub min_time_us: i64,
    pub max_time_us: i64,
    pub min_xid: i64,
    pub max_xid: i64,
    pub has_extra: bool,
    pub flush_id: uuid::Uuid,
    /// Bytes at the end of the object that hold the Parquet metadata.
    pub footer_bytes: i32,
    /// What is kept of them here (crates/lake `footer.rs`).
    pub footer: &'a [u8],
    pub stats: &'a [u8],
}

/// Adds a file with its statistics and footer, and the log entry. Under the collection's manifest lock.
pub fn add_file(file: &NewFile<'_>) -> Result<i64> {
    restore::ensure_over()?;
    let file_id: i64 = spi::first(
        View::Current,
        "INSERT INTO rakam_internal.data_file
           (project_id, collection_id, storage_id, path, schema_version, period, first_day, n, bytes, footer_bytes,
            min_time, max_time, has_extra, min_xid, max_xid, flush_id, level)
         VALUES ($1, $2, $3, $4, $5, $6, date '1970-01-01' + $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)
         RETURNING file_id",
        &[
            arg(file.project_id),
            arg(file.collection_id),
            arg(file.storage_id),
            arg(file.path),
            arg(file.schema_version),
            arg(file.period),
            arg(file.first_day),
            arg(file.n),
            arg(file.bytes),
            arg(file.footer_bytes),
            spi::timestamptz(file.min_time_us),
            spi::timestamptz(file.max_time_us),
            arg(file.has_extra),
            xid8(file.min_xid as u64),
            xid8(file.max_xid as u64),
            arg(pgrx::Uuid::from_bytes(*file.flush_id.as_bytes())),
            arg(file.level),
        ],
        |row| row.must(1),
    )?
    .ok_or_else(|| crate::pg::PgError::internal("INSERT … RETURNING gives a row"))?;
    spi::execute(
        "INSERT INTO rakam_internal.data_file_stat (file_id, project_id, stats) VALUES ($1, $2, $3)",
        &[arg(file_id), arg(file.project_id), arg(file.stats)],
    )?;
    spi::execute(
        "INSERT INTO rakam_internal.data_file_footer (file_id, project_id, footer) VALUES ($1, $2, $3)",
        &[arg(file_id), arg(file.project_id), arg(file.footer)],
    )?;
    spi::execute(
        "INSERT INTO rakam_internal.manifest_log (collection_id, project_id, op, file_id, path)
         VALUES ($1, $2, 'add', $3, $4)",
        &[
            arg(file.collection_id),
            arg(file.project_id),
            arg(file_id),
            arg(file.path),
        ],
    )?;
    Ok(file_id)
}

/// So many entries the log keeps: far more than are written between two looks at it. Who has looked longer ago reads
/// the manifest itself.
const LOG_ENTRIES: i64 = 100_000;

/// Forgets the oldest entries of the log.
pub fn forget_log() -> Result<()> {
    spi::execute(
        // Those of a project that some transaction is dropping are left alone.
        "DELETE FROM rakam_internal.manifest_log WHERE seq = ANY (ARRAY(
           SELECT seq FROM rakam_internal.manifest_log
           WHERE seq < (SELECT max(seq) FROM rakam_internal.manifest_log) - $1 LIMIT 100000 FOR UPDATE SKIP LOCKED))",
        &[arg(LOG_ENTRIES)],
    )?;
    Ok(())
}

/// The stored size of a file.
pub fn file_bytes(file_id: i64) -> Result<Option<i64>> {
    spi::first(
        View::Current,
        "SELECT bytes FROM rakam_internal.data_file WHERE file_id = $1",
        &[arg(file_id)],
        |row| row.must(1),
    )
}

/// Takes a file out of the manifest, with its statistics, footer and deleted rows; false: it is not there any more.
/// Its object goes at once from the default storage, where older snapshots see it nevertheless, and is handed to the
/// collector elsewhere. Under the collection's manifest lock.
pub fn remove_file(file_id: i64, reason: &str) -> Result<bool> {
    let removed = spi::execute(
        "WITH gone AS (
           DELETE FROM rakam_internal.data_file WHERE file_id = $1
           RETURNING file_id, project_id, collection_id, storage_id, path),
         logged AS (
           INSERT INTO rakam_internal.manifest_log (collection_id, project_id, op, file_id, path)
           SELECT collection_id, project_id, 'remove', file_id, path FROM gone),
         deleted AS (
           DELETE FROM rakam_internal.local_object o USING gone g, rakam_internal.storage s
           WHERE o.path = g.path AND s.storage_id = g.storage_id AND s.kind = 'local'),
         deferred AS (
           INSERT INTO rakam_internal.file_deferred (storage_id, path, project_id, reason)
           SELECT g.storage_id, g.path, g.project_id, $2 FROM gone g JOIN rakam_internal.storage s USING (storage_id)
           WHERE s.kind <> 'local' ON CONFLICT DO NOTHING)
         SELECT FROM gone",
        &[arg(file_id), arg(reason)],
    )?;
    deletion::forget(false, &[file_id])?;
    Ok(removed > 0)
}

/// Moves a collection's totals. Under the collection's manifest lock.
pub fn add_to_stat(
    collection_id: i32,
    project_id: i32,
    events: i64,
    bytes: i64,
    files: i64,
) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.collection_stat AS s (collection_id, project_id, cold_events, cold_bytes, files)
         VALUES ($1, $2, $3, $4, $5)
         ON CONFLICT (collection_id) DO UPDATE SET cold_events = s.cold_events + $3,
           cold_bytes = s.cold_bytes + $4, files = s.files + $5",
        &[
            arg(collection_id),
            arg(project_id),
            arg(events),
            arg(bytes),
            arg(files),
        ],
    )?;
    Ok(())
}

/// Announces objects about to be written, so that a crash leaves a trace for the collector of orphans.
pub fn add_intent(
    storage_id: i32,
    path: &str,
    op: uuid::Uuid,
    collection_id: i32,
    purpose: &str,
) -> Result<()> {
    // The object must not outlive its announcement.
    xact::durable();
    spi::execute(
        "INSERT INTO rakam_internal.file_intent (storage_id, path, op_id, collection_id, purpose)
         VALUES ($1, $2, $3, $4, $5)",
        &[
            arg(storage_id),
            arg(path),
            arg(pgrx::Uuid::from_bytes(*op.as_bytes())),
            arg(collection_id),
            arg(purpose),
        ],
    )?;
    Ok(())
}

/// The announcement is fulfilled (the manifest has the object) or void (it was deleted).
pub fn delete_intent(storage_id: i32, path: &str) -> Result<u64> {
    spi::execute(
        "DELETE FROM rakam_internal.file_intent WHERE storage_id = $1 AND path = $2",
        &[arg(storage_id), arg(path)],
    )
}

/// Announced objects of a storage (path, the collection whose job announced them), oldest first.
pub fn intents(view: View, storage_id: i32) -> Result<Vec<(String, i32)>> {
    spi::query(
        view,
        "SELECT path, collection_id FROM rakam_internal.file_intent WHERE storage_id = $1 ORDER BY created_at",
        &[arg(storage_id)],
        |row| Ok((row.must(1)?, row.must(2)?)),
    )
}

/// Whether an object is still announced.
pub fn has_intent(storage_id: i32, path: &str) -> Result<bool> {
    Ok(spi::run(
        View::Current,
        "SELECT FROM rakam_internal.file_intent WHERE storage_id = $1 AND path = $2",
        &[arg(storage_id), arg(path)],
        |_| Ok(()),
    )? > 0)
}

/// Objects of a storage that may be deleted, the oldest first: out of use since before the horizon and for longer than the
/// retention, needed by nobody else. `orphans`: those that a comparison found, or the others.
pub fn deferred_due(
    view: View,
    storage_id: i32,
    orphans: bool,
    (horizon, retention_s): (u64, f64),
    limit: i64,
) -> Result<Vec<String>> {
    spi::query(
        view,
        "SELECT d.path FROM rakam_internal.file_deferred d
         WHERE d.storage_id = $1 AND d.removed_xid < $2 AND (d.reason = 'orphan') = $5
           AND d.removed_at <= pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $3)
           AND NOT EXISTS (SELECT FROM rakam_internal.file_pin p WHERE p.storage_id = d.storage_id AND p.path = d.path
                           AND p.until > pg_catalog.clock_timestamp())
           AND NOT EXISTS (SELECT FROM rakam_internal.data_file f
                           WHERE f.path = d.path AND f.storage_id = d.storage_id)
           AND NOT EXISTS (SELECT FROM rakam_internal.file_intent i
                           WHERE i.path = d.path AND i.storage_id = d.storage_id)
           AND NOT EXISTS (SELECT FROM rakam_internal.description_due c
                           WHERE c.path = d.path AND c.storage_id = d.storage_id)
         ORDER BY d.removed_at LIMIT $4",
        &[
            arg(storage_id),
            xid8(horizon),
            arg(retention_s),
            arg(limit),
            arg(orphans),
        ],
        |row| row.must(1),
    )
}

pub fn delete_deferred(storage_id: i32, paths: &[String]) -> Result<u64> {
    spi::execute(
        "DELETE FROM rakam_internal.file_deferred WHERE storage_id = $1 AND path = ANY ($2)",
        &[arg(storage_id), arg(paths.to_vec())],
    )
}

/// Deletes an object of the default storage. True: it was there.
pub fn delete_object(path: &str) -> Result<bool> {
    Ok(spi::execute(
        "DELETE FROM rakam_internal.local_object WHERE path = $1",
        &[arg(path)],
    )? > 0)
}

/// A storage: its foreign server's name, and its kind (`local`, or its address' scheme when it was taken into use).
/// [`super::store`] says where it is, and opens it.
#[derive(Debug, Clone)]
pub struct StorageRow {
    pub id: i32,
    pub name: String,
    pub kind: String,
}

/// The storage of a collection's project.
pub fn home_of(collection_id: i32) -> Result<Option<i32>> {
    spi::first(
        View::Current,
        "SELECT p.storage_id FROM rakam_internal.collection c JOIN rakam_internal.project p USING (project_id)
         WHERE c.collection_id = $1",
        &[arg(collection_id)],
        |row| row.must(1),
    )
}

/// The storage of this id. Read as the extension's owner: tenants do not see it.
pub fn storage(view: View, storage_id: i32) -> Result<Option<StorageRow>> {
    spi::first(
        view,
        "SELECT name, kind FROM rakam_internal.storage WHERE storage_id = $1",
        &[arg(storage_id)],
        |row| {
            Ok(StorageRow {
                id: storage_id,
                name: row.must(1)?,
                kind: row.must(2)?,
            })
        },
    )
}
