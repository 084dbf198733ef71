//! collect: one event of a call into the inbox, in the caller's transaction. No DDL, no registry, no waiting:
//! a collection that is not registered is stored by its name. Batches are in [`super::batch`].

use std::rc::Rc;

use pgrx::pg_extern;
use rakam_event::entry::{self, Limits};
use rakam_event::names::CollectionName;

use super::admission::Admission;
use super::mapper::{self, Shape};
use super::quota;
use crate::catalog::inbox::Entry;
use crate::catalog::projects::{self, KeyKind, Project, Right};
use crate::pg::jsonb::JsonbText;
use crate::pg::{ErrorReport, PgError, Result, activity, guc, not_null, security, xact};

/// Stores one event. SQL: `rakam.collect(project text, collection text, properties jsonb)`.
/// Errors: 42501 no such project or no right to write, 22004 NULL argument, 42602 / 42939 a name that is not
/// usable / reserved, 22023 properties are not an object, 54000 too large or too deep, 25006 read-only, 42703 a new
/// field or collection where they are fixed, 53400 beyond the project's quota.
#[pg_extern(volatile, parallel_unsafe)]
fn collect(
    project: Option<&str>,
    collection: Option<&str>,
    properties: Option<JsonbText>,
) -> std::result::Result<(), ErrorReport> {
    let project = writable_project(not_null(project, "project")?)?;
    Ok(store_one(&project, collection, properties)?)
}

/// Stores one event in the project of a key. SQL: `rakam.collect_with_key(key text, collection text, properties
/// jsonb)`. Errors: 28000 unknown or revoked key, 42501 a key for reading, else as [`collect`].
#[pg_extern(volatile, parallel_unsafe)]
fn collect_with_key(
    key: Option<&str>,
    collection: Option<&str>,
    properties: Option<JsonbText>,
) -> std::result::Result<(), ErrorReport> {
    let project = project_of_key(not_null(key, "key")?)?;
    Ok(store_one(&project, collection, properties)?)
}

fn store_one(
    project: &Project,
    collection: Option<&str>,
    properties: Option<JsonbText>,
) -> Result<()> {
    let collection = CollectionName::parse(not_null(collection, "collection")?)?;
    let properties = not_null(properties, "properties")?.0;
    let event = entry::check_event(&properties, &limits())?;
    if let Some(refusal) = Admission::new(project).refusal(collection.as_str(), &event)? {
        return Err(refusal.into());
    }
    quota::charge_collected(project, 1, event.len() as i64)?;
    let entry = Entry {
        project_id: project.id,
        collection_id: projects::collection_id(project.id, collection.as_str())?,
        collection: collection.as_str(),
        n: 1,
        received_at_us: xact::now_us(),
        shift_us: 0,
        store_id: project.event_store_id,
        payload: event.as_bytes().into(),
    };
    mapper::enter(&entry, Shape::Event)?;
    Ok(())
}

/// The project of this name, if the effective user may collect into it now.
pub fn writable_project(name: &str) -> Result<Rc<Project>> {
    xact::ensure_writable("collect events")?;
    let project = projects::authorize(name, Right::Write)?;
    if project.is_fixed && project.allows(security::current_user(), Right::Admin) {
        return Ok(project.for_admin());
    }
    Ok(project)
}

/// The project of a key, if the key is for writing.
pub fn project_of_key(text: &str) -> Result<Rc<Project>> {
    activity::hide(text);
    xact::ensure_writable("collect events")?;
    let key = projects::key(text)?;
    match key.kind {
        KeyKind::Write => Ok(key.project),
        KeyKind::Master => Ok(key.project.for_admin()),
        KeyKind::Read => Err(
            PgError::new("42501", "the key does not allow to collect events")
                .hint("Use the project's write key."),
        ),
    }
}

/// The limits of an event, as set now.
pub fn limits() -> Limits {
    Limits {
        max_event_bytes: guc::max_event_bytes(),
        max_string_bytes: guc::max_string_bytes(),
        max_fields: guc::max_fields(),
    }
}
