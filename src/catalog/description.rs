//! What is not in a storage's description yet, what goes into it (crates/lake `describe.rs`).

use rakam_lake::describe::{File, Record};

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

/// Storages with something that is not described.
pub fn due(view: View) -> Result<Vec<i32>> {
    spi::query(
        view,
        "SELECT s.storage_id FROM rakam_internal.storage s
         WHERE EXISTS (SELECT FROM rakam_internal.description_due c WHERE c.storage_id = s.storage_id)
         ORDER BY 1",
        &[],
        |row| row.must(1),
    )
}

/// How far this writer has described the storage; what another one has done here before, as the original of a copy, does not
/// count.
pub fn progress(view: View, storage_id: i32, writer: &str) -> Result<Progress> {
    Ok(spi::first(
        view,
        "SELECT number, state, state_bytes, log_bytes FROM rakam_internal.description
         WHERE storage_id = $1 AND writer = $2",
        &[arg(storage_id), arg(writer)],
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

/// Whether something has changed that is not described.
pub fn is_due(storage_id: i32) -> Result<bool> {
    Ok(spi::run(
        View::Current,
        "SELECT FROM rakam_internal.description_due WHERE storage_id = $1 LIMIT 1",
        &[arg(storage_id)],
        |_| Ok(()),
    )? > 0)
}

/// The next description of the storage says everything.
pub fn begin_anew(storage_id: i32) -> Result<()> {
    spi::execute(
        "DELETE FROM rakam_internal.description WHERE storage_id = $1",
        &[arg(storage_id)],
    )?;
    Ok(())
}

/// Notes how far this writer has described the storage now.
pub fn set_progress(storage_id: i32, writer: &str, progress: &Progress) -> Result<()> {
    spi::execute(
        "INSERT INTO rakam_internal.description (storage_id, writer, number, state, state_bytes, log_bytes, described_at)
         VALUES ($1, $2, $3, $4, $5, $6, pg_catalog.clock_timestamp())
         ON CONFLICT (storage_id) DO UPDATE SET writer = $2, number = $3, state = $4, state_bytes = $5, log_bytes = $6,
           described_at = pg_catalog.clock_timestamp()",
        &[
            arg(storage_id),
            arg(writer),
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

/// Objects that an interrupted job of a collection has announced, and perhaps written, are to be described as what does not
/// count; the storages where they are. Under the collection's job lock.
pub fn note_left_behind(collection_id: i32) -> Result<Vec<i32>> {
    let storages: Vec<i32> = spi::query(
        View::Current,
        "INSERT INTO rakam_internal.description_due (storage_id, project_id, collection_id, path)
         SELECT i.storage_id, c.project_id, i.collection_id, i.path
         FROM rakam_internal.file_intent i JOIN rakam_internal.collection c USING (collection_id)
         WHERE i.collection_id = $1 RETURNING storage_id",
        &[arg(collection_id)],
        |row| row.must(1),
    )?;
    let distinct: std::collections::BTreeSet<i32> = storages.into_iter().collect();
    Ok(distinct.into_iter().collect())
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

const FILE: &str = "SELECT f.path, f.collection_id, f.n, f.bytes, f.level,
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
            level: row.must(5)?,
            hidden: row.get(6),
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
        (Some(path), collection_id) => {
            (!known.contains(&(None, None, Some(path.as_str())))).then(|| Record::File {
                path: path.clone(),
                collection_id: collection_id.unwrap_or_default(),
                file: None,
            })
        }
        (None, Some(id)) => {
            (!known.contains(&(None, Some(id), None))).then(|| Record::Collection {
                collection_id: id,
                project_id: change.project_id,
                row: None,
                fields: Vec::new(),
                dropped_fields: Vec::new(),
            })
        }
        (None, None) => {
            (!known.contains(&(Some(change.project_id), None, None))).then_some(Record::Project {
                project_id: change.project_id,
                row: None,
            })
        }
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
