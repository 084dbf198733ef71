//! Taking definitions back: `drop_collection`, `rename_collection`, `drop_field`, in a task worker.
//!
//! Each is one short transaction that excludes the collection's flush and merge, the digest, other DDL of ours, and at last
//! whoever reads the table. Readers are waited for as DDL of the background waits: 100 ms at a time, with nothing held in between, so that
//! neither new readers nor the digest stand behind a query that takes hours. They take effect whatever becomes of the caller's
//! transaction, and say so inside a transaction block.

use std::time::{Duration, Instant};

use pgrx::pg_extern;
use pgrx::pg_sys::panic::ErrorReport;
use rakam_event::error::EventError;
use rakam_event::names::{self, CollectionName};
use rakam_event::schema::SYSTEM_FIELDS;
use serde::{Deserialize, Serialize};

use super::task::{self, Task};
use crate::catalog::audit::Note;
use crate::catalog::projects::{self, Right};
use crate::catalog::registry::{self, Collection};
use crate::catalog::{attached, audit, collections, dropping, rebuild};
use crate::ingest::digest;
use crate::pg::locks::{self, LockOn, SessionLock};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, failpoint, not_null, wait};
use crate::tiers::ddl;

/// Between two attempts to lock a table.
const PAUSE: Duration = Duration::from_millis(100);

/// What is to be done with a collection.
#[derive(Debug, Serialize, Deserialize)]
pub struct Change {
    project_id: i32,
    collection: String,
    what: What,
    /// The caller's `lock_timeout`.
    patience: Option<Duration>,
}

#[derive(Debug, Serialize, Deserialize)]
enum What {
    Drop,
    Rename(String),
    DropField(String),
}

/// Drops a collection with all its events, in every tier. SQL: `rakam.drop_collection(project text, collection text)`.
/// Errors: 42501 no such project or not its admin, 42704 no such collection, 2BP01 views depend on it, 55P03 the
/// caller uses it, or `lock_timeout` is over.
#[pg_extern(volatile, parallel_unsafe)]
fn drop_collection(
    project: Option<&str>,
    collection: Option<&str>,
) -> std::result::Result<(), ErrorReport> {
    audit::at_once("drop_collection", project, collection, |note| {
        change(project, collection, note, || Ok(What::Drop))
    })?;
    task::tell_at_once("drop_collection");
    Ok(())
}

/// Gives a collection another name; its events, also those under way, follow.
/// SQL: `rakam.rename_collection(project text, collection text, new_name text)`.
/// Errors: as [`drop_collection`] without 2BP01; 42602 / 42939 the new name is not usable, 42710 it is taken.
#[pg_extern(volatile, parallel_unsafe)]
fn rename_collection(
    project: Option<&str>,
    collection: Option<&str>,
    new_name: Option<&str>,
) -> std::result::Result<(), ErrorReport> {
    Ok(audit::at_once(
        "rename_collection",
        project,
        collection,
        |note| {
            change(project, collection, note, || {
                let name = CollectionName::parse(not_null(new_name, "new_name")?)?;
                Ok(What::Rename(name.into_string()))
            })
        },
    )?)
}

/// Drops a field: its values are read by nobody any more. Another field may take the name later.
/// SQL: `rakam.drop_field(project text, collection text, field text)`.
/// Errors: as [`drop_collection`]; 42703 no such field, 42939 a system field.
#[pg_extern(volatile, parallel_unsafe)]
fn drop_field(
    project: Option<&str>,
    collection: Option<&str>,
    field: Option<&str>,
) -> std::result::Result<(), ErrorReport> {
    let object = collection.zip(field).map(|(c, f)| format!("{c}.{f}"));
    audit::at_once("drop_field", project, object.as_deref(), |note| {
        change(project, collection, note, || {
            let field = names::field_name(not_null(field, "field")?).into_owned();
            if SYSTEM_FIELDS.iter().any(|(_, name, _)| *name == field) {
                return Err(
                    PgError::new("42939", format!("cannot drop system field \"{field}\"")).hint(
                        "Every collection has the fields that begin with _time, _user and so on.",
                    ),
                );
            }
            Ok(What::DropField(field))
        })
    })?;
    task::tell_at_once("drop_field");
    Ok(())
}

fn change(
    project: Option<&str>,
    collection: Option<&str>,
    note: Note,
    what: impl FnOnce() -> Result<What>,
) -> Result<()> {
    let project = projects::authorize_committed(not_null(project, "project")?, Right::Admin)?;
    let collection = CollectionName::parse(not_null(collection, "collection")?)?;
    let task = Task::Change(Change {
        project_id: project.id,
        collection: collection.into_string(),
        what: what()?,
        patience: locks::timeout(),
    });
    task::run_noted(task, note)?;
    Ok(())
}

/// In the task worker.
pub fn perform(change: &Change) -> std::result::Result<(), Failure> {
    // What was sent before the call is registered first, under the names of then.
    digest::catch_up(Some(&[change.project_id]))?;
    let found = xact::worker(|| find(change))?;
    let _job = SessionLock::take(LockOn::CollectionJob(found.id));
    let end = change.patience.map(|patience| Instant::now() + patience);
    loop {
        let outcome = xact::worker(|| {
            locks::transaction(LockOn::Digest);
            // Else this would wait for the end of another transaction, and every project's digest with it.
            dropping::ensure_stays(change.project_id)?;
            locks::transaction(LockOn::Manifest(found.id));
            // From here on no lock is waited for long: not that of a row that somebody's open transaction has changed, either.
            ddl::lock()?;
            apply(change, found.id)?;
            audit::store_expected()
        });
        match outcome {
            Err(Failure::Error(error)) if error.sqlstate == "55P03" => {
                if end.is_some_and(|end| Instant::now() >= end) {
                    return Err(Failure::Error(in_use(change)));
                }
                wait::wait(None, PAUSE);
            }
            outcome => {
                outcome?;
                break;
            }
        }
    }
    if matches!(change.what, What::Drop) {
        failpoint::hit("drop.before_clear");
        // It is gone, whatever becomes of this: what is left is garbage, and collected as such.
        if let Err(Failure::Error(error)) = clear(change.project_id, found.id) {
            error.log();
        }
    }
    Ok(())
}

/// Removes what a dropped collection has left, while nobody but its own jobs is locked out. Who drops the project now takes the same
/// rows: what is in somebody's way, or in whose way somebody is, is left to the background.
fn clear(project_id: i32, collection_id: i32) -> std::result::Result<(), Failure> {
    while !dropping::is_going(project_id)
        && xact::in_passing(|| collections::clear(collection_id))? == Some(true)
    {
        wait::check_interrupts();
    }
    while !dropping::is_going(project_id)
        && xact::in_passing(|| collections::delete_objects(project_id))?.is_some_and(|n| n > 0)
    {
        wait::check_interrupts();
    }
    Ok(())
}

fn find(change: &Change) -> Result<Collection> {
    let (project_id, name) = (change.project_id, &change.collection);
    if let Some(found) = registry::collection_named(View::Current, project_id, name)? {
        return Ok(found);
    }
    if attached::exists(project_id, name)? {
        return Err(PgError::new(
            "42809",
            format!("\"{name}\" is an attached table, not a collection"),
        )
        .hint("rakam.detach(project, name) takes it away; its files stay as they are."));
    }
    Err(
        PgError::new("42704", format!("collection \"{name}\" does not exist"))
            .hint("The view rakam.collections lists a project's collections."),
    )
}

fn in_use(change: &Change) -> PgError {
    PgError::new(
        "55P03",
        format!(
            "could not lock collection \"{}\" within lock_timeout",
            change.collection
        ),
    )
    .hint("A query or an open transaction uses it: try again later, or raise lock_timeout.")
}

fn apply(change: &Change, locked_id: i32) -> Result<()> {
    // Again, under the locks. They are those of the collection that had the name before.
    let collection = find(change)?;
    if collection.id != locked_id {
        return Err(PgError::new(
            "40001",
            format!(
                "another collection was named \"{}\" at the same moment",
                change.collection
            ),
        )
        .hint("Look at the view rakam.collections, and call it again if it is still to be done."));
    }
    match &change.what {
        What::Drop => {
            rebuild::ensure_over_of(collection.id)?;
            ddl::drop_table(&collection)?;
            collections::delete(&collection)
        }
        What::Rename(name) => {
            if registry::collection_named(View::Current, change.project_id, name)?.is_some() {
                return Err(
                    PgError::new("42710", format!("collection \"{name}\" already exists"))
                        .hint("Choose another name."),
                );
            }
            if attached::exists(change.project_id, name)? {
                return Err(EventError::AttachedTable(name.clone()).into());
            }
            ddl::rename_table(&collection, name)?;
            collections::rename(&collection, name)
        }
        What::DropField(name) => {
            let schema = registry::schema(View::Current, &collection)?;
            let field = schema.field(name).filter(|field| field.is_user());
            let field = field.ok_or_else(|| {
                PgError::new(
                    "42703",
                    format!(
                        "field \"{name}\" of collection \"{}\" does not exist",
                        collection.name
                    ),
                )
                .hint("The view rakam.fields lists a collection's fields.")
            })?;
            if field.column_ready {
                ddl::drop_column(&collection, name)?;
            }
            collections::delete_field(&collection, field.id)
        }
    }
}
