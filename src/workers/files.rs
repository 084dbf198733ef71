//! The SQL functions about files that work in a task worker.

use pgrx::default;
use pgrx::prelude::*;
use rakam_event::error::EventError;
use rakam_event::names::CollectionName;
use rakam_files::format::{Format, Options};

use super::task::{self, Task};
use crate::catalog::audit;
use crate::catalog::projects::Right;
use crate::files::load::Request;
use crate::files::place::{self, Access};
use crate::ingest::collect::writable_project;
use crate::pg::jsonb::JsonbText;
use crate::pg::{ErrorReport, PgError, not_null, security};

/// Loads files into a collection, and returns the number of events stored. The same call after a cancel or a crash goes on
/// where it was.
/// SQL: `rakam.copy_from(project text, collection text, url text, format text, options jsonb)`.
/// Errors: 42501 no right to write or to the files, 22023 unknown format, option or path, 58P01 no such file, 22P04 a file
/// is not of its format, 0A000 a kind of storage that has no files, 58030 a bucket that is away or a file that was changed
/// meanwhile, 53000 no worker slot.
#[pg_extern(sql = "
CREATE FUNCTION rakam.copy_from(project text, collection text, url text, format text DEFAULT NULL, options jsonb DEFAULT '{}')
RETURNS bigint LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', '@FUNCTION_NAME@';")]
fn copy_from(
    project: Option<&str>,
    collection: Option<&str>,
    url: Option<&str>,
    format: default!(Option<&str>, "NULL"),
    options: default!(Option<JsonbText>, "'{}'"),
) -> std::result::Result<i64, ErrorReport> {
    let events = audit::at_once("copy_from", project, collection, |note| {
        let project = writable_project(not_null(project, "project")?)?;
        project.ensure_committed()?;
        let collection = CollectionName::parse(not_null(collection, "collection")?)?.into_string();
        if project.attached.contains(&collection) {
            return Err(EventError::AttachedTable(collection).into());
        }
        let url = not_null(url, "url")?;
        let format = format.map(Format::parse).transpose()?;
        let options = options.map_or_else(|| "{}".to_owned(), |options| options.0);
        let parsed = Options::parse(&options)?;
        if let Some(format) = format {
            parsed.ensure_for(format)?;
        }
        let place = place::resolve(&project, url, Access::Read)?;
        let task = Task::CopyFrom(Request {
            project_id: project.id,
            collection,
            url: url.to_owned(),
            place,
            format: format.map(|format| format.name().to_owned()),
            options,
            admin: project.allows(security::current_user(), Right::Admin),
            fixed: project.is_fixed,
        });
        task::run_noted(task, note)
    })?;
    let events = events
        .as_i64()
        .ok_or_else(|| PgError::internal("malformed reply of a load"))?;
    Ok(events)
}
