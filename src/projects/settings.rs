//! What is set for a project as a whole: its quota, its schema mode, the bounds of `_time`.

use pgrx::datum::Interval;
use pgrx::pg_extern;

use crate::catalog::audit;
use crate::catalog::projects::{self as catalog, Quota, Right};
use crate::pg::security::ActAs;
use crate::pg::{ErrorReport, PgError, Result, not_null, xact};

/// Limits what a project may send and have; NULL is no limit.
/// SQL: `rakam.set_quota(project text, events_per_second bigint, bytes_per_day bigint, collections int, fields int)`.
/// Bytes are those of the events' JSON, days are UTC, fields those of all collections together. Beyond it: 53400.
/// Errors: 42501 no such project or neither superuser nor rakam_admin, 22023 a negative limit.
#[pg_extern(volatile, parallel_unsafe)]
fn set_quota(
    project: Option<&str>,
    events_per_second: Option<i64>,
    bytes_per_day: Option<i64>,
    collections: Option<i32>,
    fields: Option<i32>,
) -> std::result::Result<(), ErrorReport> {
    Ok(audit::call("set_quota", project, None, || {
        let name = not_null(project, "project")?;
        super::ensure_server_admin("set the quota of a project")?;
        xact::ensure_writable("set the quota of a project")?;
        let project = catalog::by_name(name)?.ok_or_else(|| PgError::no_project(name))?;
        let limits = [
            ("events_per_second", events_per_second),
            ("bytes_per_day", bytes_per_day),
            ("collections", collections.map(i64::from)),
            ("fields", fields.map(i64::from)),
        ];
        if let Some((limit, _)) = limits.iter().find(|(_, n)| n.is_some_and(|n| n < 0)) {
            return Err(
                PgError::new("22023", format!("quota \"{limit}\" must not be negative"))
                    .hint("NULL is no limit, 0 lets nothing in."),
            );
        }
        let _owner = ActAs::owner();
        catalog::set_quota(
            project.id,
            &Quota {
                events_per_second,
                bytes_per_day,
                collections,
                fields,
            },
        )
    })?)
}

/// Says whether the write role may bring new fields and collections (`open`) or not (`fixed`).
/// SQL: `rakam.set_schema_mode(project text, mode text)`.
/// Errors: 42501 no such project or not its admin, 22023 no such mode.
#[pg_extern(volatile, parallel_unsafe)]
fn set_schema_mode(
    project: Option<&str>,
    mode: Option<&str>,
) -> std::result::Result<(), ErrorReport> {
    Ok(audit::call("set_schema_mode", project, mode, || {
        let project = admin_of(project, "set the schema mode of a project")?;
        let mode = not_null(mode, "mode")?;
        if !["open", "fixed"].contains(&mode) {
            return Err(
                PgError::new("22023", format!("invalid schema mode \"{mode}\""))
                    .hint("Valid modes are open and fixed."),
            );
        }
        let _owner = ActAs::owner();
        catalog::set_schema_mode(project, mode)
    })?)
}

/// Sets how far back and ahead of its receipt an event's `_time` may be; beyond it the time of receipt counts, and
/// `rakam.invalid_value` gets a row. For events that are digested from now on.
/// SQL: `rakam.set_time_bounds(project text, past interval, future interval)`.
/// Errors: 42501 no such project or not its admin, 22023 a bound is negative or over 10,000 years.
#[pg_extern(volatile, parallel_unsafe)]
fn set_time_bounds(
    project: Option<&str>,
    past: Option<Interval>,
    future: Option<Interval>,
) -> std::result::Result<(), ErrorReport> {
    Ok(audit::call("set_time_bounds", project, None, || {
        let project = admin_of(project, "set the time bounds of a project")?;
        let (past, future) = (not_null(past, "past")?, not_null(future, "future")?);
        let _owner = ActAs::owner();
        if !catalog::set_time_bounds(project, past, future)? {
            return Err(PgError::new("22023", "time bounds are out of range").hint(
                "Each is an interval from 0 to 10,000 years: how far back, and how far ahead.",
            ));
        }
        Ok(())
    })?)
}

/// The id of the project, if the caller administers it and can write now.
fn admin_of(project: Option<&str>, what: &str) -> Result<i32> {
    xact::ensure_writable(what)?;
    Ok(catalog::authorize(not_null(project, "project")?, Right::Admin)?.id)
}
