//! What the views of schema `rakam` show, for a list of projects. The caller has decided which ones.

use pgrx::Uuid;
use pgrx::datum::{Date, TimestampWithTimeZone};

use crate::pg::Result;
use crate::pg::security::ActAs;
use crate::pg::snapshot::Snapshot;
use crate::pg::spi::{self, View, arg};

/// Project, key id, created, revoked.
pub type KeySetRow = (
    String,
    Uuid,
    Option<TimestampWithTimeZone>,
    Option<TimestampWithTimeZone>,
);

/// Storage id, name, URL.
pub type StorageRow = (i32, String, Option<String>);

/// As the view rakam.stat_lake.
pub type LakeRow = (
    String,
    Option<String>,
    Option<bool>,
    Option<String>,
    i64,
    i64,
    i64,
    Option<String>,
);

/// As the view rakam.data_files.
pub type DataFileRow = (
    String,
    String,
    String,
    String,
    Option<Date>,
    Option<Date>,
    String,
    i64,
    i64,
    Option<TimestampWithTimeZone>,
    Option<TimestampWithTimeZone>,
    i32,
    Option<TimestampWithTimeZone>,
);

/// Project, collection, inbox events, hot events and bytes, cold events and bytes, files, duplicates, invalid
/// values, the newest event.
pub type SizeRow = (
    String,
    String,
    i64,
    i64,
    i64,
    i64,
    i64,
    i64,
    i64,
    i64,
    Option<TimestampWithTimeZone>,
);

/// Runs a statement as the owner under the statement's snapshot: the views show one state.
fn select<T>(
    sql: &'static str,
    project_ids: &[i32],
    map: impl FnMut(&spi::Row) -> Result<T>,
) -> Result<Vec<T>> {
    let _owner = ActAs::owner();
    spi::query(
        View::Under(Snapshot::active()),
        sql,
        &[arg(project_ids.to_vec())],
        map,
    )
}

pub fn key_sets(project_ids: &[i32]) -> Result<Vec<KeySetRow>> {
    select(
        "SELECT p.name, k.key_id, min(k.created_at), max(k.revoked_at)
         FROM rakam_internal.api_key k JOIN rakam_internal.project p USING (project_id)
         WHERE p.project_id = ANY ($1) GROUP BY p.name, k.key_id ORDER BY 1, 3, 2",
        project_ids,
        |row| Ok((row.must(1)?, row.must(2)?, row.get(3), row.get(4))),
    )
}

pub fn storages(project_ids: &[i32]) -> Result<Vec<StorageRow>> {
    select(
        "SELECT s.storage_id, s.name, o.option_value
         FROM rakam_internal.storage s
         LEFT JOIN pg_catalog.pg_foreign_server f ON f.srvname = s.name AND s.kind <> 'local'
         LEFT JOIN LATERAL pg_catalog.pg_options_to_table(f.srvoptions) o ON o.option_name = 'url'
         WHERE s.storage_id IN (SELECT storage_id FROM rakam_internal.project WHERE project_id = ANY ($1))
         ORDER BY 1",
        project_ids,
        |row| Ok((row.must(1)?, row.must(2)?, row.get(3))),
    )
}

/// What is known of the storages of these projects, with what concerns these projects in them; with `every`, of all
/// storages, and of everything in them. Nothing is asked of a storage: it is what the workers noted.
pub fn lake(project_ids: &[i32], every: bool) -> Result<Vec<LakeRow>> {
    let _owner = ActAs::owner();
    spi::query(
        View::Under(Snapshot::active()),
        // A flush that is under way holds the job lock of its collection (pg::locks): what it announced is no orphan.
        "WITH busy AS MATERIALIZED (
           SELECT classid::int8 AS collection_id FROM pg_catalog.pg_locks
           WHERE locktype = 'advisory' AND objsubid = 102 AND granted
             AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()))
         SELECT s.name, o.option_value,
                CASE WHEN s.kind = 'local' THEN true WHEN t.failures > 0 THEN false
                     WHEN t.reached_at IS NOT NULL THEN true END,
                t.last_error,
                (SELECT coalesce(sum(h.bytes), 0) FROM rakam_internal.hot_chunk h
                 JOIN rakam_internal.project p USING (project_id)
                 WHERE p.storage_id = s.storage_id AND ($2 OR p.project_id = ANY ($1)))::int8,
                (SELECT count(*) FROM rakam_internal.file_deferred d
                 WHERE d.storage_id = s.storage_id AND d.reason = 'orphan' AND ($2 OR d.project_id = ANY ($1)))
                + (SELECT count(*) FROM rakam_internal.file_intent i
                   WHERE i.storage_id = s.storage_id AND i.collection_id NOT IN (SELECT collection_id FROM busy)
                     AND ($2 OR i.collection_id IN (SELECT c.collection_id FROM rakam_internal.collection c
                                                    WHERE c.project_id = ANY ($1)))),
                (SELECT count(*) FROM rakam_internal.file_deferred d
                 WHERE d.storage_id = s.storage_id AND d.reason <> 'orphan' AND ($2 OR d.project_id = ANY ($1))),
                CASE WHEN s.kind = 'local' OR t.standing = 'ours' THEN 'this database'
                     WHEN t.standing IN ('foreign', 'unfenced') AND $2 THEN t.owner
                     WHEN t.standing IN ('foreign', 'unfenced') THEN 'not this database' END
         FROM rakam_internal.storage s
         LEFT JOIN rakam_internal.storage_state t USING (storage_id)
         LEFT JOIN pg_catalog.pg_foreign_server f ON f.srvname = s.name AND s.kind <> 'local'
         LEFT JOIN LATERAL pg_catalog.pg_options_to_table(f.srvoptions) o ON o.option_name = 'url'
         WHERE $2 OR s.storage_id IN (SELECT storage_id FROM rakam_internal.project WHERE project_id = ANY ($1))
         ORDER BY s.storage_id",
        &[arg(project_ids.to_vec()), arg(every)],
        |row| {
            Ok((
                row.must(1)?,
                row.get(2),
                row.get(3),
                row.get(4),
                row.must(5)?,
                row.must(6)?,
                row.must(7)?,
                row.get(8),
            ))
        },
    )
}

pub fn data_files(project_ids: &[i32]) -> Result<Vec<DataFileRow>> {
    select(
        "SELECT p.name, c.name, s.name, f.period, f.first_day,
                (f.first_day + CASE f.period WHEN 'day' THEN interval '1 day' WHEN 'month' THEN interval '1 month'
                                             ELSE interval '1 year' END - interval '1 day')::date,
                coalesce(rtrim(o.option_value, '/') || '/', '') || f.path, f.n, f.bytes, f.min_time, f.max_time,
                f.level::int4, f.created_at
         FROM rakam_internal.data_file f
         JOIN rakam_internal.project p USING (project_id)
         JOIN rakam_internal.collection c USING (collection_id)
         JOIN rakam_internal.storage s ON s.storage_id = f.storage_id
         LEFT JOIN pg_catalog.pg_foreign_server v ON v.srvname = s.name AND s.kind <> 'local'
         LEFT JOIN LATERAL pg_catalog.pg_options_to_table(v.srvoptions) o ON o.option_name = 'url'
         WHERE f.project_id = ANY ($1)
         ORDER BY 1, 2, f.first_day, f.file_id",
        project_ids,
        |row| {
            Ok((
                row.must(1)?,
                row.must(2)?,
                row.must(3)?,
                row.must(4)?,
                row.get(5),
                row.get(6),
                row.must(7)?,
                row.must(8)?,
                row.must(9)?,
                row.get(10),
                row.get(11),
                row.must(12)?,
                row.get(13),
            ))
        },
    )
}

pub fn collection_sizes(project_ids: &[i32]) -> Result<Vec<SizeRow>> {
    select(
        "WITH tick AS MATERIALIZED (
           SELECT pg_snapshot_xmax(snapshot) AS xmax, ARRAY(SELECT pg_snapshot_xip(snapshot)) AS xip
           FROM rakam_internal.inbox_tick WHERE shard = 0 ORDER BY tick_id DESC LIMIT 1),
         lag AS MATERIALIZED (
           SELECT project_id, pg_snapshot_xmax(snapshot) AS xmax, ARRAY(SELECT pg_snapshot_xip(snapshot)) AS xip
           FROM rakam_internal.inbox_lag),
         waiting AS (
           SELECT project_id, collection, n, received_at FROM rakam_internal.inbox_0
           WHERE (txid >= (SELECT xmax FROM tick) OR txid = ANY ((SELECT xip FROM tick)::xid8[]))
             AND project_id NOT IN (SELECT project_id FROM lag)
           UNION ALL SELECT project_id, collection, n, received_at FROM rakam_internal.inbox_1
           WHERE (txid >= (SELECT xmax FROM tick) OR txid = ANY ((SELECT xip FROM tick)::xid8[]))
             AND project_id NOT IN (SELECT project_id FROM lag)
           UNION ALL SELECT project_id, collection, n, received_at FROM rakam_internal.inbox_2
           WHERE (txid >= (SELECT xmax FROM tick) OR txid = ANY ((SELECT xip FROM tick)::xid8[]))
             AND project_id NOT IN (SELECT project_id FROM lag)
           UNION ALL SELECT project_id, collection, n, received_at FROM rakam_internal.inbox_0 JOIN lag USING (project_id)
           WHERE txid >= lag.xmax OR txid = ANY (lag.xip)
           UNION ALL SELECT project_id, collection, n, received_at FROM rakam_internal.inbox_1 JOIN lag USING (project_id)
           WHERE txid >= lag.xmax OR txid = ANY (lag.xip)
           UNION ALL SELECT project_id, collection, n, received_at FROM rakam_internal.inbox_2 JOIN lag USING (project_id)
           WHERE txid >= lag.xmax OR txid = ANY (lag.xip)
           UNION ALL SELECT project_id, collection, n, received_at FROM rakam_internal.inbox_parked),
         inbox AS (
           SELECT project_id, collection, sum(n)::int8 AS n, max(received_at) AS newest
           FROM waiting WHERE project_id = ANY ($1) GROUP BY 1, 2),
         hot AS (
           SELECT collection_id, sum(n)::int8 AS n, sum(bytes)::int8 AS bytes, max(max_time) AS newest
           FROM rakam_internal.hot_chunk WHERE project_id = ANY ($1) GROUP BY 1),
         deleted AS (
           SELECT collection_id, sum(n)::int8 AS n
           FROM rakam_internal.deletion WHERE project_id = ANY ($1) AND kind = 'chunk' GROUP BY 1),
         invalid AS (
           SELECT collection_id, sum(n)::int8 AS n
           FROM rakam_internal.invalid_count WHERE project_id = ANY ($1) GROUP BY 1)
         SELECT p.name, c.name, coalesce(i.n, 0), coalesce(h.n, 0) - coalesce(d.n, 0),
                coalesce(h.bytes, 0), coalesce(s.cold_events, 0),
                coalesce(s.cold_bytes, 0), coalesce(s.files, 0), coalesce(s.duplicates, 0), coalesce(v.n, 0),
                greatest(i.newest, h.newest,
                         (SELECT max(f.max_time) FROM rakam_internal.data_file f WHERE f.collection_id = c.collection_id))
         FROM rakam_internal.collection c
         JOIN rakam_internal.project p USING (project_id)
         LEFT JOIN inbox i ON i.project_id = c.project_id AND i.collection = c.name
         LEFT JOIN hot h USING (collection_id)
         LEFT JOIN deleted d USING (collection_id)
         LEFT JOIN rakam_internal.collection_stat s USING (collection_id)
         LEFT JOIN invalid v USING (collection_id)
         WHERE c.project_id = ANY ($1) ORDER BY 1, 2",
        project_ids,
        |row| {
            Ok((
                row.must(1)?,
                row.must(2)?,
                row.must(3)?,
                row.must(4)?,
                row.must(5)?,
                row.must(6)?,
                row.must(7)?,
                row.must(8)?,
                row.must(9)?,
                row.must(10)?,
                row.get(11),
            ))
        },
    )
}
