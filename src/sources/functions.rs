//! The SQL functions that create sources, pause them and drop them. All of it is the caller's transaction; the consumers learn of
//! it at its commit.

use pgrx::pg_extern;
use rakam_sources::options::SourceOptions;

use super::service;
use crate::catalog::projects::{self, Project, Right};
use crate::catalog::{audit, restore, sources};
use crate::pg::jsonb::JsonbText;
use crate::pg::security::{self, ActAs};
use crate::pg::{ErrorReport, PgError, Result, not_null, server, wake, xact};

/// Begins to read a service into a project. Nothing is asked of the service here: the server may be as new as the source.
/// SQL: `rakam.create_source(project text, name text, server text, options jsonb)`.
/// Errors: 42501 no such project, not its admin, or no USAGE on the server; 42704 no such server, 42710 the source exists, 42602
/// its name is not usable, 22023 unknown or malformed option.
#[pg_extern(sql = "
CREATE FUNCTION rakam.create_source(project text, name text, server text, options jsonb) RETURNS void
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS 'MODULE_PATHNAME', '@FUNCTION_NAME@';")]
fn create_source(
    project: Option<&str>,
    name: Option<&str>,
    server: Option<&str>,
    options: Option<JsonbText>,
) -> std::result::Result<(), ErrorReport> {
    Ok(audit::call("create_source", project, name, || {
        create(
            not_null(project, "project")?,
            not_null(name, "name")?,
            not_null(server, "server")?,
            &not_null(options, "options")?.0,
        )
    })?)
}

fn create(project: &str, name: &str, server: &str, options: &str) -> Result<()> {
    xact::ensure_writable("create a source")?;
    let project = projects::authorize(project, Right::Admin)?;
    let name = sources::name_of(name)?;
    let kind = service::kind(server)?;
    if !server::is_usable(server, security::current_user()) {
        return Err(PgError::new(
            "42501",
            format!("permission denied for foreign server \"{server}\""),
        )
        .hint(format!(
            "The role needs USAGE on the foreign server {server}."
        )));
    }
    SourceOptions::parse(kind, options)?;
    service::of(server)?;
    let _owner = ActAs::owner();
    if !sources::create((project.id, &project.name), &name, kind, server, options)? {
        return Err(
            PgError::new("42710", format!("source \"{name}\" already exists"))
                .hint("Choose another name; rakam.drop_source drops a source."),
        );
    }
    wake::sources_at_commit();
    Ok(())
}

/// Lets a source wait: nothing of it is stored once the call is committed. SQL: `rakam.pause_source(project text, name text)`.
/// Errors: 42501 no such project or not its admin, 42704 no such source.
#[pg_extern(volatile, parallel_unsafe)]
fn pause_source(project: Option<&str>, name: Option<&str>) -> std::result::Result<(), ErrorReport> {
    Ok(change("pause_source", project, name, |project, name| {
        sources::pause(project.id, name, true)
    })?)
}

/// Lets a paused source go on where it was. SQL: `rakam.resume_source(project text, name text)`.
/// Errors: as [`pause_source`].
#[pg_extern(volatile, parallel_unsafe)]
fn resume_source(
    project: Option<&str>,
    name: Option<&str>,
) -> std::result::Result<(), ErrorReport> {
    Ok(change("resume_source", project, name, |project, name| {
        sources::pause(project.id, name, false)
    })?)
}

/// Reads a source no more and forgets how far it was read; its events stay. SQL: `rakam.drop_source(project text, name text)`.
/// Errors: as [`pause_source`].
#[pg_extern(volatile, parallel_unsafe)]
fn drop_source(project: Option<&str>, name: Option<&str>) -> std::result::Result<(), ErrorReport> {
    Ok(change("drop_source", project, name, |project, name| {
        Ok(sources::drop(project.id, Some(name))? > 0)
    })?)
}

/// Runs a change of one source; it answers whether there is one.
fn change(
    call: &'static str,
    project: Option<&str>,
    name: Option<&str>,
    change: impl FnOnce(&Project, &str) -> Result<bool>,
) -> Result<()> {
    audit::call(call, project, name, || {
        xact::ensure_writable("change a source")?;
        let project = projects::authorize(not_null(project, "project")?, Right::Admin)?;
        let name = sources::name_of(not_null(name, "name")?)?;
        let _owner = ActAs::owner();
        restore::ensure_over()?;
        if !change(&project, &name)? {
            return Err(unknown(&name));
        }
        wake::sources_at_commit();
        Ok(())
    })
}

/// The answer for a source that one's own project has not.
pub fn unknown(name: &str) -> PgError {
    PgError::new("42704", format!("source \"{name}\" does not exist"))
        .hint("The view rakam.sources lists a project's sources.")
}
