//! A catalogue made anew of what a storage says: how far that is, the rows it gives, and whose roles there are.

use rakam_lake::describe::Collection;
use rakam_lake::file_info::FileInfo;
use rakam_lake::stats;
use serde_json::{Map, Value};

use super::manifest::{self, NewFile};
use crate::pg::spi::{self, View, arg};
use crate::pg::{PgError, Result};

/// Whether the catalogue of this storage is being made anew: until it is whole, the storage tells more than it does.
pub fn is_rebuilding(storage_id: i32) -> Result<bool> {
    Ok(spi::run(
        View::Current,
        "SELECT FROM rakam_internal.rebuild WHERE storage_id = $1 AND finished_at IS NULL",
        &[arg(storage_id)],
        |_| Ok(()),
    )? > 0)
}

/// While the catalogue of a storage is being made anew, or that was interrupted, nothing of it may go out of use: the next call
/// would take it for a file that is to be restored. Errors: 55000.
pub fn ensure_over(storage_id: i32) -> Result<()> {
    let storage: Option<String> = spi::first(
        View::Current,
        "SELECT s.name FROM rakam_internal.rebuild r JOIN rakam_internal.storage s USING (storage_id)
         WHERE r.storage_id = $1 AND r.finished_at IS NULL",
        &[arg(storage_id)],
        |row| row.must(1),
    )?;
    storage.map_or(Ok(()), |name| Err(unfinished(&name)))
}

/// As [`ensure_over`], of the storage of a collection's project.
pub fn ensure_over_of(collection_id: i32) -> Result<()> {
    match manifest::home_of(collection_id)? {
        Some(storage_id) => ensure_over(storage_id),
        None => Ok(()),
    }
}

/// Whether [`ensure_over_of`] would fail: the background leaves such collections alone.
pub fn is_rebuilding_of(collection_id: i32) -> Result<bool> {
    match manifest::home_of(collection_id)? {
        Some(storage_id) => is_rebuilding(storage_id),
        None => Ok(false),
    }
}

fn unfinished(storage: &str) -> PgError {
    PgError::new(
        "55000",
        format!("the catalog of storage \"{storage}\" is being rebuilt"),
    )
    .hint(format!(
        "Wait for it; if it was interrupted, call it again: SELECT rakam.rebuild_catalog({}).",
        spi::quote_literal(storage)
    ))
}

/// The storages of which the catalogue is not whole yet.
pub fn unfinished_storages(view: View) -> Result<Vec<String>> {
    spi::query(
        view,
        "SELECT s.name FROM rakam_internal.rebuild r JOIN rakam_internal.storage s USING (storage_id)
         WHERE r.finished_at IS NULL ORDER BY 1",
        &[],
        |row| row.must(1),
    )
}

/// Begins or goes on making the catalogue of a storage anew. Errors: 55000 there are projects that did not come so, or it
/// is done.
pub fn begin_rebuild(storage_id: i32, storage: &str) -> Result<()> {
    let (others, finished): (i64, bool) = spi::first(
        View::Current,
        "SELECT (SELECT count(*) FROM rakam_internal.project p
                 WHERE p.storage_id NOT IN (SELECT r.storage_id FROM rakam_internal.rebuild r)),
                EXISTS (SELECT FROM rakam_internal.rebuild r WHERE r.storage_id = $1 AND r.finished_at IS NOT NULL)",
        &[arg(storage_id)],
        |row| Ok((row.must(1)?, row.must(2)?)),
    )?
    .unwrap_or_default();
    if finished {
        return Err(PgError::new(
            "55000",
            format!("the catalog of storage \"{storage}\" has been rebuilt in this database"),
        )
        .hint("A second time would bring back what was deleted since; use another database."));
    }
    if others > 0 {
        return Err(
            PgError::new("55000", "the database has projects already").hint(
                "A catalog is rebuilt in an empty database: CREATE DATABASE, CREATE EXTENSION rakam, CREATE SERVER with \
                 the url of the storage, and then rakam.rebuild_catalog.",
            ),
        );
    }
    spi::execute(
        "INSERT INTO rakam_internal.rebuild (storage_id) VALUES ($1) ON CONFLICT DO NOTHING",
        &[arg(storage_id)],
    )?;
    Ok(())
}

/// The catalogue is whole.
pub fn finish_rebuild(storage_id: i32) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.rebuild SET finished_at = pg_catalog.clock_timestamp() WHERE storage_id = $1",
        &[arg(storage_id)],
    )?;
    // What comes from now on is received here.
    spi::execute(
        "UPDATE rakam_internal.installation SET own_since = pg_catalog.clock_timestamp()",
        &[],
    )?;
    Ok(())
}

fn text(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value)
        .map_err(|e| PgError::internal(format!("could not write JSON: {e}")))
}

/// Registers a project under its old id, without roles, and gives its name; None: it is there. Keys and quotas are not
/// restored.
pub fn restore_project(
    project_id: i32,
    storage_id: i32,
    row: &Map<String, Value>,
) -> Result<Option<String>> {
    spi::first(
        View::Current,
        "INSERT INTO rakam_internal.project
           (project_id, name, storage_id, event_store, schema_mode, time_past, time_future, created_at)
         SELECT $1, r.name, $2, r.event_store, coalesce(r.schema_mode, 'open'), coalesce(r.time_past, '20 years'),
                coalesce(r.time_future, '1 day'), coalesce(r.created_at, pg_catalog.clock_timestamp())
         FROM pg_catalog.jsonb_populate_record(NULL::rakam_internal.project, ($3::jsonb) - '{read_role,write_role,admin_role}'::text[]) r
         ON CONFLICT (project_id) DO NOTHING RETURNING name",
        &[arg(project_id), arg(storage_id), arg(text(row)?)],
        |row| row.must(1),
    )
}

/// Registers a collection under its old id, with its fields; nothing happens if it is there.
pub fn restore_collection(collection_id: i32, collection: &Collection) -> Result<()> {
    let id = arg(collection_id);
    let project = arg(collection.project_id);
    let added = spi::execute(
        "INSERT INTO rakam_internal.collection (collection_id, project_id, name, schema_version, retention, created_at)
         SELECT $1, $2, r.name, r.schema_version, r.retention, coalesce(r.created_at, pg_catalog.clock_timestamp())
         FROM pg_catalog.jsonb_populate_record(NULL::rakam_internal.collection, $3::jsonb) r
         ON CONFLICT (collection_id) DO NOTHING",
        &[id, project, arg(text(&collection.row)?)],
    )?;
    if added == 0 {
        return Ok(());
    }
    spi::execute(
        "INSERT INTO rakam_internal.field (collection_id, field_id, project_id, name, type, declared, added_version, added_at)
         SELECT $1, f.field_id, $2, f.name, f.type, coalesce(f.declared, false), f.added_version,
                coalesce(f.added_at, pg_catalog.clock_timestamp())
         FROM pg_catalog.jsonb_populate_recordset(NULL::rakam_internal.field, $3::jsonb) f",
        &[id, project, arg(text(&collection.fields)?)],
    )?;
    spi::execute(
        "INSERT INTO rakam_internal.dropped_field
           (collection_id, field_id, project_id, name, type, added_version, added_at, dropped_version, dropped_xid, dropped_at)
         SELECT $1, f.field_id, $2, f.name, f.type, f.added_version, coalesce(f.added_at, pg_catalog.clock_timestamp()),
                f.dropped_version, f.dropped_xid, coalesce(f.dropped_at, pg_catalog.clock_timestamp())
         FROM pg_catalog.jsonb_populate_recordset(NULL::rakam_internal.dropped_field, $3::jsonb) f",
        &[id, project, arg(text(&collection.dropped_fields)?)],
    )?;
    Ok(())
}

/// New projects and collections get ids that the old catalogue has not given.
pub fn advance_ids(next_ids: (i32, i32)) -> Result<()> {
    spi::first(
        View::Current,
        "SELECT pg_catalog.setval('rakam_internal.project_project_id', greatest($1::int8,
                  (SELECT max(project_id) + 1 FROM rakam_internal.project),
                  (SELECT last_value + is_called::int FROM rakam_internal.project_project_id)), false),
                pg_catalog.setval('rakam_internal.collection_collection_id', greatest($2::int8,
                  (SELECT max(collection_id) + 1 FROM rakam_internal.collection),
                  (SELECT last_value + is_called::int FROM rakam_internal.collection_collection_id)), false)",
        &[arg(next_ids.0), arg(next_ids.1)],
        |_| Ok(()),
    )?;
    Ok(())
}

/// The files of a storage that are in the manifest already, or have left it, of those given.
pub fn known_files(storage_id: i32, paths: &[String]) -> Result<Vec<String>> {
    spi::query(
        View::Current,
        "SELECT path FROM rakam_internal.data_file WHERE path = ANY ($2) AND storage_id = $1
         UNION ALL SELECT path FROM rakam_internal.file_deferred WHERE path = ANY ($2) AND storage_id = $1",
        &[arg(storage_id), arg(paths.to_vec())],
        |row| row.must(1),
    )
}

/// Enters a file in the manifest by what it says of itself; its id.
pub fn restore_file(
    (storage_id, project_id, collection_id): (i32, i32, i32),
    path: &str,
    level: i16,
    info: &FileInfo,
) -> Result<i64> {
    manifest::add_file(&NewFile {
        project_id,
        collection_id,
        storage_id,
        path,
        level,
        schema_version: info.schema_version,
        period: info.period.as_str(),
        first_day: info.first_day,
        n: info.n as i64,
        bytes: info.bytes as i64,
        min_time_us: info.min_time_us,
        max_time_us: info.max_time_us,
        min_xid: info.min_xid,
        max_xid: info.max_xid,
        has_extra: info.has_extra,
        flush_id: info.flush_id,
        footer_bytes: info.footer_bytes as i32,
        footer: &info.footer,
        stats: &stats::encode(&info.stats),
    })
}

/// Files that lie in the storage and do not count: they go some time after the storage is this database's.
pub fn put_out_of_use(storage_id: i32, paths: &[String]) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.file_deferred (storage_id, path, project_id, reason)
         SELECT $1, path, 0, 'out of use before the catalog was rebuilt' FROM pg_catalog.unnest($2::text[]) path
         ON CONFLICT DO NOTHING",
        &[arg(storage_id), arg(paths.to_vec())],
    )?;
    Ok(())
}

/// What was restored of a storage: project, collection, files, events.
pub fn restored(storage_id: i32) -> Result<Vec<(String, String, i64, i64)>> {
    spi::query(
        View::Current,
        "SELECT p.name, c.name, coalesce(s.files, 0), coalesce(s.cold_events, 0)
         FROM rakam_internal.project p JOIN rakam_internal.collection c USING (project_id)
         LEFT JOIN rakam_internal.collection_stat s USING (collection_id)
         WHERE p.storage_id = $1 ORDER BY 1, 2",
        &[arg(storage_id)],
        |row| Ok((row.must(1)?, row.must(2)?, row.must(3)?, row.must(4)?)),
    )
}

/// What the comment on a role of ours begins with; the installation that made it follows.
const MAKER: &str = "role of a project of rakam, installation ";

/// The comment on roles that this database makes.
pub fn maker_mark() -> Result<String> {
    let installation: Option<String> = spi::first(
        View::Current,
        "SELECT installation::text FROM rakam_internal.installation",
        &[],
        |row| row.must(1),
    )?;
    Ok(format!("{MAKER}{}", installation.unwrap_or_default()))
}

/// The installation that made a role for a project, by its comment.
pub fn role_maker(role: &str) -> Result<Option<String>> {
    let comment: Option<String> = spi::first(
        View::Current,
        "SELECT pg_catalog.shobj_description(oid, 'pg_authid') FROM pg_catalog.pg_roles WHERE rolname = $1",
        &[arg(role)],
        |row| Ok(row.get(1)),
    )?
    .flatten();
    Ok(comment.and_then(|text| text.strip_prefix(MAKER).map(str::to_owned)))
}

/// A database that has objects or privileges of a role, of this server.
pub fn role_user(role: &str) -> Result<Option<String>> {
    spi::first(
        View::Current,
        "SELECT d.datname::text FROM pg_catalog.pg_shdepend s
         JOIN pg_catalog.pg_roles r ON s.refclassid = 'pg_catalog.pg_authid'::regclass AND s.refobjid = r.oid
         JOIN pg_catalog.pg_database d ON d.oid = s.dbid
         WHERE r.rolname = $1 ORDER BY 1 LIMIT 1",
        &[arg(role)],
        |row| row.must(1),
    )
}
