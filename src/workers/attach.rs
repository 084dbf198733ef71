//! Foreign files as tables: `attach` and `detach`, in a task worker.
//!
//! Outside of any transaction the files are asked for their columns; then one transaction notes the table and makes it. The
//! rights to the files are those of the caller, and asked once: the project's readers read the files for them. Reading is
//! `fdw::attached`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pgrx::default;
use pgrx::prelude::*;
use rakam_event::names::{self, CollectionName};
use rakam_files::format::{Format, Options};
use rakam_files::source::Spec;
use rakam_files::{FilesError, table};
use serde::{Deserialize, Serialize};

use super::task::{self, Task};
use crate::catalog::attached::{self, New};
use crate::catalog::projects::{self, Right};
use crate::catalog::registry::{self, ProjectRow};
use crate::catalog::{audit, dropping, manifest, orphans, places, progress};
use crate::files::place::{self, Access, Keep, Place, Root};
use crate::files::reading::Readers;
use crate::ingest::digest;
use crate::pg::locks::{self, LockOn, SessionLock};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{
    ErrorReport, INVALID_OID, PgError, Result, failpoint, guc, not_null, relation, runtime, wait,
};
use crate::tiers::ddl;

/// Between two attempts to lock a table.
const PAUSE: Duration = Duration::from_millis(100);
/// How often it is shown how far the files have been looked into.
const SHOWN: Duration = Duration::from_millis(500);

/// Files to be attached; the rights to them are checked.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    project_id: i32,
    name: String,
    url: String,
    place: Place,
    storage: Option<String>,
    format: Option<String>,
}

/// A table to be taken away.
#[derive(Debug, Serialize, Deserialize)]
pub struct Detach {
    project_id: i32,
    name: String,
    /// The caller's `lock_timeout`.
    patience: Option<Duration>,
}

/// Makes a read-only table of foreign files: of one, of those that a pattern matches, or of all below a folder. Its columns
/// are those that the files have now; which files there are is looked up by each query.
/// SQL: `rakam.attach(project text, name text, url text, format text)`.
/// Errors: 42501 no such project, not its admin, or no right to the files; 42602 / 42939 the name is not usable, 42710 it
/// is taken; 22023 unknown format or path, 58P01 no such file, 22P04 a file is not of its format, 42804 files whose columns
/// have no type in common, 0A000 a kind of storage that has no files, 53000 no worker slot.
#[pg_extern(sql = "
CREATE FUNCTION rakam.attach(project text, name text, url text, format text DEFAULT NULL) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', '@FUNCTION_NAME@';")]
fn attach(
    project: Option<&str>,
    name: Option<&str>,
    url: Option<&str>,
    format: default!(Option<&str>, "NULL"),
) -> std::result::Result<(), ErrorReport> {
    let left_out = audit::at_once("attach", project, name, |note| {
        let project = projects::authorize_committed(not_null(project, "project")?, Right::Admin)?;
        let name = CollectionName::parse(not_null(name, "name")?)?.into_string();
        let url = not_null(url, "url")?;
        let format = format.map(Format::parse).transpose()?;
        let (place, storage) = place::permitted(&project, url, Access::Read)?;
        let url = match (&place.root, &storage) {
            // In the storage's own words: what lies there must be known for a table's, not taken for an orphan.
            (Root::Bucket(bucket), Some(_)) => bucket.url(&place.pattern),
            _ => url.to_owned(),
        };
        let task = Task::Attach(Request {
            project_id: project.id,
            name,
            url,
            place,
            storage,
            format: format.map(|format| format.name().to_owned()),
        });
        task::run_noted(task, note)
    })?;
    let left_out: Vec<String> = serde_json::from_value(left_out)
        .map_err(|e| PgError::internal(format!("malformed reply of a task: {e}")))?;
    for column in left_out {
        PgError::new(
            "01000",
            format!("column \"{column}\" of the files is left out: a table cannot have it"),
        )
        .hint("Names of system columns, empty ones and those over 63 bytes cannot be columns.")
        .notice();
    }
    Ok(())
}

/// Takes an attached table away; its files stay. SQL: `rakam.detach(project text, name text)`.
/// Errors: 42501 no such project or not its admin, 42704 no such table, 2BP01 views depend on it, 55P03 the caller uses
/// it, or `lock_timeout` is over.
#[pg_extern(volatile, parallel_unsafe)]
fn detach(project: Option<&str>, name: Option<&str>) -> std::result::Result<(), ErrorReport> {
    Ok(audit::at_once("detach", project, name, |note| {
        let project = projects::authorize_committed(not_null(project, "project")?, Right::Admin)?;
        let name = CollectionName::parse(not_null(name, "name")?)?.into_string();
        let task = Task::Detach(Detach {
            project_id: project.id,
            name,
            patience: locks::timeout(),
        });
        task::run_noted(task, note)?;
        Ok(())
    })?)
}

/// In the task worker; the columns of the files that are none of the table.
pub fn perform(request: &Request) -> std::result::Result<Vec<String>, Failure> {
    // What was collected under the name before the call has a collection then.
    digest::catch_up(Some(&[request.project_id]))?;
    let storages = xact::worker(|| {
        ensure_free(request)?;
        storages_of(request)
    })?;
    // What is queued there as orphans may be these files: nothing of it is deleted until they are known.
    let _still: Vec<SessionLock> = (storages.iter())
        .map(|storage_id| SessionLock::take(LockOn::Orphans(*storage_id)))
        .collect();
    let error = |e: FilesError| Failure::Error(e.into());
    let format = match &request.format {
        Some(name) => Some(Format::parse(name).map_err(error)?),
        None => None,
    };
    let place = &request.place;
    let (readers, counters) = (Readers::default(), Arc::default());
    let root = xact::worker(|| place.open(Keep::Blocks, &counters, readers.stop()))?;
    let (pattern, stop) = (place.pattern.clone(), readers.stop().clone());
    let files = runtime::wait_for(async move { root.below(&pattern, format, &stop).await })
        .map_err(Failure::Error)?
        .map_err(error)?;
    if files.is_empty() {
        return Err(error(FilesError::NoFile(place.called())));
    }
    let spec = Spec {
        format,
        options: Options::default(),
        max_record_bytes: guc::max_event_bytes(),
    };
    let total = files.len() as u64;
    let found = progress::show(request.project_id, "attach", "files", total, |shown| {
        let (told, mut port) = runtime::port(1).map_err(Failure::Error)?;
        let done = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&done);
        let look = async move {
            let through = |n| counted.store(n, Ordering::Relaxed);
            let found = table::infer(&files, &spec, through).await;
            told.send(found).await;
        };
        let _task = runtime::Task::spawn(look).map_err(Failure::Error)?;
        loop {
            match port.receive_within(SHOWN) {
                Some(Some(found)) => return found.map_err(error),
                Some(None) => {
                    let early = PgError::internal("the look into files ended early");
                    return Err(Failure::Error(early));
                }
                None => shown.set(done.load(Ordering::Relaxed).min(total))?,
            }
        }
    })?;
    let (columns, left_out): (Vec<_>, Vec<_>) = found
        .columns
        .into_iter()
        .map(|(name, ty)| (name, ty.to_string()))
        .partition(|(name, _)| names::can_be_column(name));
    if columns.is_empty() {
        return Err(error(FilesError::NoColumns));
    }
    failpoint::hit("attach.before_commit");
    xact::worker(|| {
        locks::transaction(LockOn::Digest);
        dropping::ensure_stays(request.project_id)?;
        locks::transaction(LockOn::Ddl);
        let project = ensure_free(request)?;
        attached::insert(&New {
            project_id: request.project_id,
            name: &request.name,
            url: &request.url,
            storage: request.storage.as_deref(),
            format: request.format.as_deref(),
            n: found.rows as i64,
        })?;
        ddl::create_attached(&project, &request.name, &columns)?;
        audit::store_expected()
    })?;
    // However many they are, nobody else waits; and each is looked at once more before it is deleted.
    for storage_id in &storages {
        xact::worker(|| orphans::unqueue_known(*storage_id))?;
    }
    Ok(left_out.into_iter().map(|(name, _)| name).collect())
}

/// The storages in which the files may lie, by their ids.
fn storages_of(request: &Request) -> Result<Vec<i32>> {
    let gone = || PgError::new("42704", "the project was dropped");
    let view = View::Current;
    let project = registry::project_by_id(view, request.project_id)?.ok_or_else(gone)?;
    let own = manifest::storage(view, project.storage_id)?.ok_or_else(gone)?;
    let files = places::AttachedUrl {
        url: &request.url,
        server: request.storage.as_deref(),
        project: &project.name,
        own: &own.name,
    };
    let Some(files) = files.place() else {
        return Ok(Vec::new());
    };
    let storages = places::storages(view)?;
    Ok((storages.into_iter())
        .filter(|storage| files.position(&storage.place).is_some())
        .map(|storage| storage.storage_id)
        .collect())
}

/// The project, in which nothing has the name yet.
fn ensure_free(request: &Request) -> Result<ProjectRow> {
    let (id, name) = (request.project_id, &request.name);
    let project = registry::project_by_id(View::Current, id)?
        .ok_or_else(|| PgError::new("42704", "the project was dropped"))?;
    let taken = |what: &str| {
        Err(
            PgError::new("42710", format!("{what} \"{name}\" already exists"))
                .hint("Choose another name."),
        )
    };
    if registry::collection_named(View::Current, id, name)?.is_some() {
        return taken("collection");
    }
    if attached::exists(id, name)? {
        if !attached::tables(&project.name, name)?.is_empty() {
            return taken("attached table");
        }
        // Somebody has dropped the table itself.
        attached::delete(id, name)?;
    }
    if relation::oid(&project.name, name) != INVALID_OID {
        return taken("relation");
    }
    Ok(project)
}

/// In the task worker.
pub fn undo(request: &Detach) -> std::result::Result<(), Failure> {
    let end = request.patience.map(|patience| Instant::now() + patience);
    loop {
        let outcome = xact::worker(|| {
            locks::transaction(LockOn::Ddl);
            take_away(request)?;
            audit::store_expected()
        });
        match outcome {
            Err(Failure::Error(error)) if error.sqlstate == "55P03" => {
                if end.is_some_and(|end| Instant::now() >= end) {
                    return Err(Failure::Error(
                        PgError::new(
                            "55P03",
                            format!("could not lock table \"{}\" within lock_timeout", request.name),
                        )
                        .hint("A query or an open transaction uses it: try again later, or raise lock_timeout."),
                    ));
                }
                wait::wait(None, PAUSE);
            }
            outcome => return outcome,
        }
    }
}

fn take_away(request: &Detach) -> Result<()> {
    let (id, name) = (request.project_id, &request.name);
    let project = registry::project_by_id(View::Current, id)?
        .ok_or_else(|| PgError::new("42704", "the project was dropped"))?;
    let tables = attached::tables(&project.name, name)?;
    if !attached::delete(id, name)? {
        let error = PgError::new("42704", format!("attached table \"{name}\" does not exist"));
        return Err(match registry::collection_named(View::Current, id, name)? {
            Some(_) => error.hint("It is a collection: rakam.drop_collection drops it."),
            None => error.hint("The view rakam.attached lists a project's attached tables."),
        });
    }
    for table in tables {
        ddl::drop_foreign_table(Some(table))?;
    }
    Ok(())
}
