//! What is not in a storage's description yet, what goes into it, and a catalogue made of one (crates/lake `describe.rs`).

use rakam_lake::describe::{Collection, File, Record};
use rakam_lake::file_info::FileInfo;
use rakam_lake::stats;
use serde_json::{Map, Value};

use super::manifest::{self, NewFile};
use crate::pg::spi::{self, View, arg};
use crate::pg::{PgError, Result};

/// How far a storage has been described by this database.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// The last log; 0: there was none.
    pub number: i64,
    /// The log up to which the last whole state goes; None: there is none yet.
    pub state: Option<i64>,
    pub state_bytes: i64,
    /// Of all logs since.
    pub log_bytes: i64,
}

/// Storages with something that is not described, for which it is time.
pub fn due(view: View, after_s: f64) -> Result<Vec<i32>> {
    spi::query(
        view,
        "SELECT s.storage_id FROM rakam_internal.storage s
         LEFT JOIN rakam_internal.description d USING (storage_id)
         WHERE s.kind <> 'local'
           AND (d.described_at IS NULL OR d.described_at <= pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $1))
           AND EXISTS (SELECT FROM rakam_internal.description_due c WHERE c.storage_id = s.storage_id)
         ORDER BY 1",
        &[arg(after_s)],
        |row| row.must(1),
    )
}

pub fn progress(view: View, storage_id: i32) -> Result<Progress> {
    Ok(spi::first(
        view,
        "SELECT number, state, state_bytes, log_bytes FROM rakam_internal.description WHERE storage_id = $1",
        &[arg(storage_id)],
        |row| {
            Ok(Progress {
                number: row.must(1)?,
                state: row.get(2),
                state_bytes: row.must(3)?,
                log_bytes: row.must(4)?,
            })
        },
    )?
    .unwrap_or_default())
}

/// Notes how far the storage is described now.
pub fn set_progress(storage_id: i32, progress: &Progress) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.description (storage_id, number, state, state_bytes, log_bytes, described_at)
         VALUES ($1, $2, $3, $4, $5, pg_catalog.clock_timestamp())
         ON CONFLICT (storage_id) DO UPDATE SET number = $2, state = $3, state_bytes = $4, log_bytes = $5,
           described_at = pg_catalog.clock_timestamp()",
        &[
            arg(storage_id),
            arg(progress.number),
            arg(progress.state),
            arg(progress.state_bytes),
            arg(progress.log_bytes),
        ],
    )?;
    Ok(())
}

/// What an object of a description says of the database: installation, next ids of projects and collections.
pub fn identity(view: View) -> Result<(String, (i32, i32))> {
    spi::first(
        view,
        "SELECT installation::text,
                (SELECT last_value + is_called::int FROM rakam_internal.project_project_id)::int,
                (SELECT last_value + is_called::int FROM rakam_internal.collection_collection_id)::int
         FROM rakam_internal.installation",
        &[],
        |row| Ok((row.must(1)?, (row.must(2)?, row.must(3)?))),
    )?
    .ok_or_else(|| PgError::internal("the table of the installation is empty"))
}

/// Something that has changed since it was described: a file; a collection's definition, without a path; a project's,
/// without a collection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub project_id: i32,
    pub collection_id: Option<i32>,
    pub path: Option<String>,
}

/// Changes of a storage, the oldest first, at most so many; and the numbers of their rows.
pub fn changes(view: View, storage_id: i32, most: i64) -> Result<(Vec<Change>, Vec<i64>)> {
    let mut ids = Vec::new();
    let mut changes: Vec<Change> = spi::query(
        view,
        "SELECT id, project_id, collection_id, path FROM rakam_internal.description_due
         WHERE storage_id = $1 ORDER BY id LIMIT $2",
        &[arg(storage_id), arg(most)],
        |row| {
            ids.push(row.must(1)?);
            Ok(Change {
                project_id: row.must(2)?,
                collection_id: row.get(3),
                path: row.get(4),
            })
        },
    )?;
    let key = |c: &Change| (c.project_id, c.collection_id, c.path.clone());
    changes.sort_by_key(key);
    changes.dedup();
    Ok((changes, ids))
}

/// These changes are described.
pub fn described(ids: &[i64]) -> Result<()> {
    spi::execute(
        "DELETE FROM rakam_internal.description_due WHERE id = ANY ($1)",
        &[arg(ids.to_vec())],
    )?;
    Ok(())
}

const PROJECT: &str = "SELECT (to_jsonb(p) || jsonb_build_object(
      'read_role', pg_catalog.pg_get_userbyid(p.read_role), 'write_role', pg_catalog.pg_get_userbyid(p.write_role),
      'admin_role', pg_catalog.pg_get_userbyid(p.admin_role)))::text, p.project_id
    FROM rakam_internal.project p";

const COLLECTION: &str = "SELECT (to_jsonb(c) - 'ft')::text, c.collection_id, c.project_id,
      (SELECT coalesce(jsonb_agg(to_jsonb(f) - '{collection_id,project_id,column_ready}'::text[] ORDER BY f.field_id), '[]')
       FROM rakam_internal.field f WHERE f.collection_id = c.collection_id)::text,
      (SELECT coalesce(jsonb_agg(to_jsonb(f) - '{collection_id,project_id}'::text[] ORDER BY f.field_id), '[]')
       FROM rakam_internal.dropped_field f WHERE f.collection_id = c.collection_id)::text
    FROM rakam_internal.collection c";

const FILE: &str = "SELECT f.path, f.collection_id, f.n, f.bytes,
      (SELECT encode(d.positions, 'hex') FROM rakam_internal.deletion d WHERE d.kind = 'file' AND d.object_id = f.file_id)
    FROM rakam_internal.data_file f";

fn json<T: serde::de::DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| PgError::internal(format!("a row as JSON: {e}")))
}

fn project_record(row: &spi::Row) -> Result<Record> {
    Ok(Record::Project {
        project_id: row.must(2)?,
        row: Some(json(&row.must::<String>(1)?)?),
    })
}

fn collection_record(row: &spi::Row) -> Result<Record> {
    Ok(Record::Collection {
        collection_id: row.must(2)?,
        project_id: row.must(3)?,
        row: Some(json(&row.must::<String>(1)?)?),
        fields: json(&row.must::<String>(4)?)?,
        dropped_fields: json(&row.must::<String>(5)?)?,
    })
}

fn file_record(row: &spi::Row) -> Result<Record> {
    Ok(Record::File {
        path: row.must(1)?,
        collection_id: row.must(2)?,
        file: Some(File {
            n: row.must::<i64>(3)? as u64,
            bytes: row.must::<i64>(4)? as u64,
            hidden: row.get(5),
        }),
    })
}

/// What there is to say now of what has changed.
pub fn records(view: View, storage_id: i32, changes: &[Change]) -> Result<Vec<Record>> {
    let (mut projects, mut collections, mut paths) = (Vec::new(), Vec::new(), Vec::new());
    for change in changes {
        match (&change.path, change.collection_id) {
            (Some(path), _) => paths.push(path.clone()),
            (None, Some(id)) => collections.push(id),
            (None, None) => projects.push(change.project_id),
        }
    }
    let mut records = spi::query_text(
        view,
        &format!("{PROJECT} WHERE p.project_id = ANY ($1)"),
        &[arg(projects)],
        project_record,
    )?;
    records.extend(spi::query_text(
        view,
        &format!("{COLLECTION} WHERE c.collection_id = ANY ($1)"),
        &[arg(collections)],
        collection_record,
    )?);
    records.extend(spi::query_text(
        view,
        &format!("{FILE} WHERE f.path = ANY ($1) AND f.storage_id = $2"),
        &[arg(paths), arg(storage_id)],
        file_record,
    )?);
    let missing = gone(changes, &records);
    // Last of all: what is dropped takes its parts along.
    records.extend(missing);
    Ok(records)
}

/// What has changed and is not there any more.
fn gone(changes: &[Change], there: &[Record]) -> Vec<Record> {
    let mut known = std::collections::HashSet::new();
    for record in there {
        known.insert(match record {
            Record::Project { project_id, .. } => (Some(*project_id), None, None),
            Record::Collection { collection_id, .. } => (None, Some(*collection_id), None),
            Record::File { path, .. } => (None, None, Some(path.as_str())),
        });
    }
    let gone = |change: &Change| match (&change.path, change.collection_id) {
        (Some(path), collection_id) => (!known.contains(&(None, None, Some(path.as_str())))).then(|| {
            Record::File {
                path: path.clone(),
                collection_id: collection_id.unwrap_or_default(),
                file: None,
            }
        }),
        (None, Some(id)) => (!known.contains(&(None, Some(id), None))).then(|| Record::Collection {
            collection_id: id,
            project_id: change.project_id,
            row: None,
            fields: Vec::new(),
            dropped_fields: Vec::new(),
        }),
        (None, None) => (!known.contains(&(Some(change.project_id), None, None))).then(|| Record::Project {
            project_id: change.project_id,
            row: None,
        }),
    };
    changes.iter().filter_map(gone).collect()
}

/// The projects on a storage, or with files on it.
pub fn projects(view: View, storage_id: i32) -> Result<Vec<Record>> {
    spi::query_text(
        view,
        &format!(
            "{PROJECT} WHERE p.storage_id = $1
               OR EXISTS (SELECT FROM rakam_internal.data_file f WHERE f.project_id = p.project_id AND f.storage_id = $1)
             ORDER BY 2"
        ),
        &[arg(storage_id)],
        project_record,
    )
}

/// The collections of a project, by id.
pub fn collection_ids(view: View, project_id: i32) -> Result<Vec<i32>> {
    spi::query(
        view,
        "SELECT collection_id FROM rakam_internal.collection WHERE project_id = $1 ORDER BY 1",
        &[arg(project_id)],
        |row| row.must(1),
    )
}

/// A collection with its files on a storage.
pub fn collection(view: View, storage_id: i32, collection_id: i32) -> Result<Vec<Record>> {
    let mut records = spi::query_text(
        view,
        &format!("{COLLECTION} WHERE c.collection_id = $1"),
        &[arg(collection_id)],
        collection_record,
    )?;
    records.extend(spi::query_text(
        view,
        &format!("{FILE} WHERE f.collection_id = $1 AND f.storage_id = $2 ORDER BY f.file_id"),
        &[arg(collection_id), arg(storage_id)],
        file_record,
    )?);
    Ok(records)
}

/// Objects of a storage that are still there and do not count: files out of use.
pub fn out_of_use(view: View, storage_id: i32) -> Result<Vec<Record>> {
    spi::query(
        view,
        "SELECT path FROM rakam_internal.file_deferred WHERE storage_id = $1 ORDER BY path",
        &[arg(storage_id)],
        |row| {
            Ok(Record::File {
                path: row.must(1)?,
                collection_id: 0,
                file: None,
            })
        },
    )
}

/// Whether the catalogue of this storage is being made anew: until it is whole, the storage tells more than it does.
pub fn is_rebuilding(storage_id: i32) -> Result<bool> {
    Ok(spi::run(
        View::Current,
        "SELECT FROM rakam_internal.rebuild WHERE storage_id = $1 AND finished_at IS NULL",
        &[arg(storage_id)],
        |_| Ok(()),
    )? > 0)
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
    Ok(())
}

fn text(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| PgError::internal(format!("could not write JSON: {e}")))
}

/// Registers a project under its old id, without roles; false: it is there. Keys and quotas are not restored.
pub fn restore_project(project_id: i32, storage_id: i32, row: &Map<String, Value>) -> Result<bool> {
    let added = spi::execute(
        "INSERT INTO rakam_internal.project
           (project_id, name, storage_id, event_store, schema_mode, time_past, time_future, created_at)
         SELECT $1, r.name, $2, r.event_store, coalesce(r.schema_mode, 'open'), coalesce(r.time_past, '20 years'),
                coalesce(r.time_future, '1 day'), coalesce(r.created_at, pg_catalog.clock_timestamp())
         FROM pg_catalog.jsonb_populate_record(NULL::rakam_internal.project, ($3::jsonb) - '{read_role,write_role,admin_role}'::text[]) r
         ON CONFLICT (project_id) DO NOTHING",
        &[arg(project_id), arg(storage_id), arg(text(row)?)],
    )?;
    Ok(added > 0)
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

/// The files of a storage that are in the manifest already, of those given.
pub fn known_files(paths: &[String]) -> Result<Vec<String>> {
    spi::query(
        View::Current,
        "SELECT path FROM rakam_internal.data_file WHERE path = ANY ($1)",
        &[arg(paths.to_vec())],
        |row| row.must(1),
    )
}

/// Enters a file in the manifest by what it says of itself; its id.
pub fn restore_file(
    storage_id: i32,
    project_id: i32,
    collection_id: i32,
    path: &str,
    info: &FileInfo,
) -> Result<i64> {
    manifest::add_file(&NewFile {
        project_id,
        collection_id,
        storage_id,
        path,
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
