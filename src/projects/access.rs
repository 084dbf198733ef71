//! What row-level security and the views of schema `rakam` ask: which projects are the effective user's.
//!
//! The policies name [`readable_projects`] and [`member_projects`]; they answer for the caller only, so calling
//! them directly tells nothing. What every member may see in a view although the rows behind it are for readers
//! only, or are in no tenant's reach at all, comes from the set-returning functions here.

use pgrx::datum::{Date, TimestampWithTimeZone};
use pgrx::heap_tuple::PgHeapTuple;
use pgrx::iter::TableIterator;
use pgrx::trigger_support::PgTrigger;
use pgrx::{AllocatedByPostgres, name, pg_extern, pg_trigger};

use crate::catalog::{monitor, projects};
use crate::pg::{ErrorReport, bgworker, invalidation, security};

/// The projects whose data the effective user may read (roles read and admin).
#[pg_extern(schema = "rakam_internal", stable, parallel_restricted)]
fn readable_projects() -> std::result::Result<Vec<i32>, ErrorReport> {
    Ok(projects::scope()?.readable.clone())
}

/// The projects of which the effective user is a member (roles read, write and admin).
#[pg_extern(schema = "rakam_internal", stable, parallel_restricted)]
fn member_projects() -> std::result::Result<Vec<i32>, ErrorReport> {
    Ok(projects::scope()?.member.clone())
}

/// Tells every session's cache that a table of ours has changed.
#[pg_trigger(sql = "
CREATE FUNCTION rakam_internal.announce_change() RETURNS trigger LANGUAGE c
AS 'MODULE_PATHNAME', '@FUNCTION_NAME@';")]
fn announce_change<'a>(
    trigger: &'a PgTrigger<'a>,
) -> std::result::Result<Option<PgHeapTuple<'a, AllocatedByPostgres>>, ErrorReport> {
    if let Ok(relation) = trigger.relation() {
        invalidation::announce(relation.oid());
    }
    Ok(None)
}

/// Key sets of the caller's projects, without what would help to guess them.
#[pg_extern(schema = "rakam_internal", stable, parallel_restricted)]
#[allow(clippy::type_complexity, reason = "the shape of a SQL table")]
fn key_sets() -> std::result::Result<
    TableIterator<
        'static,
        (
            name!(project, String),
            name!(key_id, pgrx::Uuid),
            name!(created_at, Option<TimestampWithTimeZone>),
            name!(revoked_at, Option<TimestampWithTimeZone>),
        ),
    >,
    ErrorReport,
> {
    let rows = monitor::key_sets(&projects::scope()?.member)?;
    Ok(TableIterator::new(rows))
}

/// The storages of the caller's projects: name, and URL where it is not inside Postgres.
#[pg_extern(schema = "rakam_internal", stable, parallel_restricted)]
#[allow(clippy::type_complexity, reason = "the shape of a SQL table")]
fn storages() -> std::result::Result<
    TableIterator<
        'static,
        (
            name!(storage_id, i32),
            name!(storage, String),
            name!(url, Option<String>),
        ),
    >,
    ErrorReport,
> {
    let rows = monitor::storages(&projects::scope()?.member)?;
    Ok(TableIterator::new(rows))
}

/// What is known of the storages of the caller's projects; superusers and rakam_admin see all storages.
#[pg_extern(schema = "rakam_internal", volatile, parallel_restricted)]
#[allow(clippy::type_complexity, reason = "the shape of a SQL table")]
fn lake() -> std::result::Result<
    TableIterator<
        'static,
        (
            name!(storage, String),
            name!(url, Option<String>),
            name!(reachable, Option<bool>),
            name!(last_error, Option<String>),
            name!(pending_bytes, i64),
            name!(orphans, i64),
            name!(deferred, i64),
            name!(owner, Option<String>),
        ),
    >,
    ErrorReport,
> {
    let every = security::is_server_admin(security::current_user());
    let rows = monitor::lake(&projects::scope()?.member, every)?;
    Ok(TableIterator::new(rows))
}

/// Data files of the caller's projects.
#[pg_extern(schema = "rakam_internal", stable, parallel_restricted)]
#[allow(clippy::type_complexity, reason = "the shape of a SQL table")]
fn data_files() -> std::result::Result<
    TableIterator<
        'static,
        (
            name!(project, String),
            name!(collection, String),
            name!(storage, String),
            name!(period, String),
            name!(first_day, Option<Date>),
            name!(last_day, Option<Date>),
            name!(path, String),
            name!(n, i64),
            name!(bytes, i64),
            name!(min_time, Option<TimestampWithTimeZone>),
            name!(max_time, Option<TimestampWithTimeZone>),
            name!(level, i32),
            name!(created_at, Option<TimestampWithTimeZone>),
        ),
    >,
    ErrorReport,
> {
    let rows = monitor::data_files(&projects::scope()?.member)?;
    Ok(TableIterator::new(rows))
}

/// Sizes of the collections of the caller's projects, tier by tier.
#[pg_extern(schema = "rakam_internal", stable, parallel_restricted)]
#[allow(clippy::type_complexity, reason = "the shape of a SQL table")]
fn collection_sizes() -> std::result::Result<
    TableIterator<
        'static,
        (
            name!(project, String),
            name!(collection, String),
            name!(inbox_events, i64),
            name!(hot_events, i64),
            name!(hot_bytes, i64),
            name!(cold_events, i64),
            name!(cold_bytes, i64),
            name!(files, i64),
            name!(duplicates, i64),
            name!(invalid_values, i64),
            name!(last_event_at, Option<TimestampWithTimeZone>),
        ),
    >,
    ErrorReport,
> {
    let rows = monitor::collection_sizes(&projects::scope()?.member)?;
    Ok(TableIterator::new(rows))
}

/// Whether a process of this server has this id: what a process says of itself counts while it lives.
#[pg_extern(schema = "rakam_internal", volatile, parallel_safe, strict)]
fn is_running(pid: i32) -> bool {
    bgworker::is_running(pid)
}
