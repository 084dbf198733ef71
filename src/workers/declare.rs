//! Making definitions ahead of events: `create_collection`, `add_field`, in a task worker.
//!
//! What is registered and the table or column that belongs to it are made in one transaction: a call that fails has made
//! nothing. Only a column that other queries keep waiting is left to the background, as those that events bring.

use std::time::{Duration, Instant};

use pgrx::pg_extern;
use pgrx::pg_sys::panic::ErrorReport;
use rakam_event::error::EventError;
use rakam_event::names::{self, CollectionName};
use rakam_event::types::FieldType;

use super::task::{self, Task};
use crate::catalog::audit::{self, Note};
use crate::catalog::projects::{self, Right};
use crate::catalog::registry::{self, Collection};
use crate::ingest::digest;
use crate::pg::security::ActAs;
use crate::pg::snapshot::Registered;
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, guc, locks, not_null, types, wait};
use crate::tiers::ddl;

/// How long a call waits for a table that others use.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(100);

/// Creates a collection ahead of its first event; nothing happens if it exists.
/// SQL: `rakam.create_collection(project text, collection text)`.
/// Errors: 42501 no such project or no right, 42602 / 42939 the name is not usable, 42710 an attached table, or anything else that
/// is no collection, has it, 55000 the project is not committed yet.
#[pg_extern(volatile, parallel_unsafe)]
fn create_collection(
    project: Option<&str>,
    collection: Option<&str>,
) -> std::result::Result<(), ErrorReport> {
    Ok(audit::at_once(
        "create_collection",
        project,
        collection,
        |note| {
            let project =
                projects::authorize_committed(not_null(project, "project")?, Right::Admin)?;
            let name = collection_name(collection)?;
            if project.attached.contains(name.as_str()) {
                return Err(EventError::AttachedTable(name.into_string()).into());
            }
            let task = Task::CreateCollection {
                project_id: project.id,
                name: name.as_str().to_owned(),
            };
            task::run_noted(task, note)?;
            Ok(())
        },
    )?)
}

/// Declares a field ahead of use; nothing happens if it exists with this type.
/// SQL: `rakam.add_field(project text, collection text, field text, type text)`.
/// Errors: 42501, 42704 no such collection, 42710 it exists with another type, 42602 / 42939 the name cannot be a column / is reserved,
/// 22023 no such type for a field, 53400 beyond rakam.max_fields or the project's quota, 55P03 the caller uses the table, 55000
/// the project is not committed yet.
#[pg_extern(sql = "
CREATE FUNCTION rakam.add_field(project text, collection text, field text, type text) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', '@FUNCTION_NAME@';")]
fn add_field(
    project: Option<&str>,
    collection: Option<&str>,
    field: Option<&str>,
    type_name: Option<&str>,
) -> std::result::Result<(), ErrorReport> {
    let object = collection.zip(field).map(|(c, f)| format!("{c}.{f}"));
    Ok(audit::at_once(
        "add_field",
        project,
        object.as_deref(),
        |note| declare_field(project, collection, (field, type_name), note),
    )?)
}

fn declare_field(
    project: Option<&str>,
    collection: Option<&str>,
    (field, type_name): (Option<&str>, Option<&str>),
    note: Note,
) -> Result<()> {
    let project = not_null(project, "project")?;
    projects::authorize(project, Right::Admin)?;
    let name = collection_name(collection)?;
    let field = names::field_name(not_null(field, "field")?).into_owned();
    if names::server_field(&field).is_some() {
        return Err(
            PgError::new("42939", format!("field name \"{field}\" is reserved"))
                .hint("Choose another name: only the server sets it."),
        );
    }
    if !names::can_be_column(&field) {
        return Err(PgError::new(
            "42602",
            format!("field name \"{field}\" cannot be a column"),
        )
        .hint("Names of system columns, \"_xid\" and names over 63 bytes stay in \"_extra\"."));
    }
    let ty = field_type(not_null(type_name, "type")?)?;
    let project = projects::authorize_committed(project, Right::Admin)?;
    ensure_not_held(project.id, name.as_str(), &field)?;
    let task = Task::AddField {
        project_id: project.id,
        collection: name.as_str().to_owned(),
        field,
        ty: ty.to_string(),
    };
    task::run_noted(task, note)?;
    Ok(())
}

/// The argument `collection`, as a name.
pub fn collection_name(collection: Option<&str>) -> Result<CollectionName> {
    Ok(CollectionName::parse(not_null(collection, "collection")?)?)
}

/// A type as in CREATE TABLE that a field may have.
fn field_type(text: &str) -> Result<FieldType> {
    let name = types::canonical_name(text)?;
    FieldType::parse(&name).ok_or_else(|| {
        PgError::new("22023", format!("type \"{text}\" cannot be the type of a field")).hint(
            "Types are boolean, integer, bigint, real, double precision, numeric(p,s) with p up to 38, text, date, \
             timestamptz, uuid, inet, jsonb, boolean[], double precision[] and text[].",
        )
    })
}

/// Errors (55P03) if the caller itself uses the table, which then could not get the column while the caller waits.
fn ensure_not_held(project_id: i32, collection: &str, field: &str) -> Result<()> {
    let _owner = ActAs::owner();
    let latest = Registered::latest();
    let view = View::Under(latest.get());
    let Some(found) = registry::collection_named(view, project_id, collection)? else {
        return Ok(());
    };
    let Some(table) = found.ft else {
        return Ok(());
    };
    if is_column(view, &found, field)? || !locks::held_here(table)? {
        return Ok(());
    }
    Err(task::in_the_way())
}

/// Whether there is nothing to be done for a field but to compare its type.
fn is_column(view: View, collection: &Collection, field: &str) -> Result<bool> {
    let schema = registry::schema(view, collection)?;
    Ok(schema.field(field).is_some_and(|field| field.column_ready))
}

/// In the task worker.
pub fn perform_create_collection(project_id: i32, name: &str) -> std::result::Result<(), Failure> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let outcome = xact::worker(|| {
            ddl::ensure_table(project_id, name)?;
            audit::store_expected()
        });
        match outcome {
            Err(Failure::Error(error))
                if error.sqlstate == "55P03" && Instant::now() < deadline =>
            {
                wait::wait(None, PAUSE);
            }
            outcome => return outcome,
        }
    }
}

/// In the task worker.
pub fn perform_add_field(
    project_id: i32,
    collection: &str,
    field: &str,
    ty: &str,
) -> std::result::Result<(), Failure> {
    let ty = FieldType::parse(ty)
        .ok_or_else(|| Failure::Error(PgError::internal("a task has an unknown type")))?;
    // It may have come with an event that was sent just before the call.
    if xact::worker(|| registry::collection_named(View::Current, project_id, collection))?.is_none()
    {
        digest::catch_up(Some(&[project_id]))?;
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        let with_column = Instant::now() < deadline;
        let outcome = xact::worker(|| {
            ddl::lock()?;
            let found = find(project_id, collection)?;
            let with_column = with_column && !is_column(View::Current, &found, field)?;
            if with_column {
                // Before the field is registered: the digest may have to register others meanwhile.
                ddl::lock_table(&found);
            }
            register(&found, field, ty)?;
            if with_column {
                ddl::sync(found.id)?;
            }
            audit::store_expected()
        });
        match outcome {
            Err(Failure::Error(error)) if error.sqlstate == "55P03" && with_column => {
                wait::wait(None, PAUSE);
            }
            outcome => return outcome,
        }
    }
}

fn find(project_id: i32, collection: &str) -> Result<Collection> {
    registry::collection_named(View::Current, project_id, collection)?.ok_or_else(|| {
        PgError::new(
            "42704",
            format!("collection \"{collection}\" does not exist"),
        )
        .hint("rakam.create_collection makes it ahead of its first event.")
    })
}

/// Registers a field; nothing happens if it is there with this type.
fn register(collection: &Collection, field: &str, ty: FieldType) -> Result<()> {
    let name = &collection.name;
    let known = registry::schema(View::Current, collection)?;
    let fields = known.fields.iter().filter(|field| field.is_user()).count();
    if known.field(field).is_none() && fields >= guc::max_fields() {
        return Err(PgError::new(
            "53400",
            format!("collection \"{name}\" has as many fields as rakam.max_fields allows"),
        )
        .detail(format!("It has {fields} fields."))
        .hint("Raise rakam.max_fields, or drop a field with rakam.drop_field."));
    }
    // System fields are everywhere, and in no row.
    if known.field(field).is_none_or(|known| known.is_user()) {
        registry::add_fields(collection.id, &[(field.to_owned(), ty)], true)?;
    }
    match registry::schema(View::Current, collection)?.field(field) {
        Some(existing) if existing.ty == ty => Ok(()),
        Some(existing) => Err(PgError::new(
            "42710",
            format!(
                "field \"{field}\" of collection \"{name}\" exists with type {}",
                existing.ty
            ),
        )
        .hint("A field never changes its type: values that do not fit are kept in \"_extra\".")),
        None => {
            let project = registry::project_by_id(View::Current, collection.project_id)?;
            let most = project.and_then(|p| p.fields_max).unwrap_or(0);
            Err(EventError::TooManyFields(most).into())
        }
    }
}

/// Tries one step again while its lock is not to be had. What is still pending then is made in the background.
pub fn sync_until(
    patience: Duration,
    step: impl Fn() -> Result<()>,
) -> std::result::Result<(), Failure> {
    let deadline = Instant::now() + patience;
    loop {
        match xact::worker(&step) {
            Err(Failure::Error(error)) if error.sqlstate == "55P03" => {
                if Instant::now() >= deadline {
                    return Ok(());
                }
                wait::wait(None, PAUSE);
            }
            outcome => return outcome,
        }
    }
}
