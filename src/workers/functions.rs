//! The SQL functions that work in a task worker, and what the worker does for them.

use std::time::{Duration, Instant};

use pgrx::datum::Interval;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use rakam_event::names::CollectionName;
use serde_json::json;

use super::declare::{self, collection_name, sync_until};
use super::task::{self, Scope, Task};
use super::{attach, consumer, definitions, delete, rebuild, relay, storages};
use crate::catalog::projects::{self, Right};
use crate::catalog::registry::Collection;
use crate::catalog::restore::{self, Waits};
use crate::catalog::retention::{self, Keep};
use crate::catalog::{audit, dropping, inbox, registry};
use crate::files::load;
use crate::ingest::digest;
use crate::pg::locks::{LockOn, SessionLock};
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};
use crate::pg::{PgError, Result, failpoint, not_null, security, shared, wait};
use crate::sources::seek;
use crate::tiers::gc::{self, Asked};
use crate::tiers::hot::{Hot, Work};
use crate::tiers::{
    compact, ddl, describe, erase, flush, ids, merge, reach, rewrite, rotate, upkeep,
};

/// How long a called tick publishes at most.
const RELAY_TIME: Duration = Duration::from_secs(10);

/// One round of all background work, covering everything committed before the call. What fails of projects that are not the
/// caller's is told to the server's log only.
/// SQL: `rakam.tick()`. Errors: 42501 no member of any project, 53000 no worker slot, 58030 a storage cannot be reached.
#[pg_extern(volatile, parallel_unsafe)]
fn tick() -> std::result::Result<(), ErrorReport> {
    let projects = match security::is_server_admin(security::current_user()) {
        true => None,
        false => Some(projects::scope()?.member.clone()),
    };
    if projects.as_ref().is_some_and(Vec::is_empty) {
        return Err(PgError::new("42501", "permission denied for function tick")
            .hint("The current role needs membership in a role of some project.")
            .into());
    }
    task::run(Task::Tick { projects })?;
    Ok(())
}

/// Digests, then writes everything committed before the call to data files, however small, and writes files with
/// deleted events anew without them (which the counts of the answer leave out).
/// SQL: `rakam.flush(project text, collection text)`; NULL = all that the caller may.
/// Errors: 42501 no right, 42704 no such collection, 58030 storage unreachable.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::type_complexity, reason = "the shape of a SQL table")]
fn flush(
    project: default!(Option<&str>, "NULL"),
    collection: default!(Option<&str>, "NULL"),
) -> std::result::Result<
    TableIterator<
        'static,
        (
            name!(collection, String),
            name!(events, i64),
            name!(files, i64),
            name!(bytes, i64),
        ),
    >,
    ErrorReport,
> {
    let rows = by_collection("flush", project, collection, |scope| Task::Flush { scope })?;
    Ok(TableIterator::new(rows))
}

/// Merges the small data files of collections into few large ones, removes what is kept no longer, and writes files and
/// chunks with deleted events anew; gives what it merged.
/// SQL: `rakam.compact(project text, collection text)`; NULL = all that the caller may.
/// Errors: 42501 no right, 42704 no such collection, 58030 storage unreachable, 53400 `temp_file_limit` is too low.
#[pg_extern(volatile, parallel_unsafe)]
#[allow(clippy::type_complexity, reason = "the shape of a SQL table")]
fn compact(
    project: default!(Option<&str>, "NULL"),
    collection: default!(Option<&str>, "NULL"),
) -> std::result::Result<
    TableIterator<
        'static,
        (
            name!(collection, String),
            name!(events, i64),
            name!(files, i64),
            name!(bytes, i64),
        ),
    >,
    ErrorReport,
> {
    let rows = by_collection("compact", project, collection, |scope| Task::Compact {
        scope,
    })?;
    Ok(TableIterator::new(rows))
}

/// Keeps events of a collection for so long after their `_time`; NULL: for ever. Older ones are seen by nobody from then on,
/// and removed in the background.
/// SQL: `rakam.set_retention(project text, collection text, keep interval)`.
/// Errors: 42501 no such project or not its admin, 42704 no such collection, 22023 not an interval of some time, 22008 it
/// reaches back beyond the first timestamp.
#[pg_extern(volatile, parallel_unsafe)]
fn set_retention(
    project: Option<&str>,
    collection: Option<&str>,
    keep: Option<Interval>,
) -> std::result::Result<(), ErrorReport> {
    audit::at_once("set_retention", project, collection, |note| {
        let project = projects::authorize_committed(not_null(project, "project")?, Right::Admin)?;
        let collection = collection_name(collection)?;
        let keep = keep.map(|keep| Keep {
            months: keep.months(),
            days: keep.days(),
            micros: keep.micros(),
        });
        if keep.is_some_and(|keep| !keep.is_positive()) {
            return Err(PgError::new(
                "22023",
                "events cannot be kept for a negative time or for none",
            )
            .hint("Give an interval such as '90 days'; NULL keeps all events."));
        }
        let task = Task::Keep {
            project_id: project.id,
            collection: collection.into_string(),
            keep,
        };
        task::run_noted(task, note)
    })?;
    task::tell_at_once("set_retention");
    Ok(())
}

/// Runs a task over what the caller may of what it asked for, and gives what it wrote: collection, events, files, bytes.
fn by_collection(
    call: &'static str,
    project: Option<&str>,
    collection: Option<&str>,
    task: impl FnOnce(Scope) -> Task,
) -> Result<Vec<(String, i64, i64, i64)>> {
    let rows = audit::at_once(call, project, collection, |note| {
        let scope = scope(project, collection)?;
        if scope.projects.as_ref().is_some_and(Vec::is_empty) && scope.collection.is_none() {
            // Nothing is theirs: no worker is started for that.
            return Ok(json!([]));
        }
        task::run_noted(task(scope), note)
    })?;
    serde_json::from_value(rows)
        .map_err(|e| PgError::internal(format!("malformed reply of {call}: {e}")))
}

/// What the caller may flush or compact of what it asked for.
fn scope(project: Option<&str>, collection: Option<&str>) -> Result<Scope> {
    let projects = match project {
        Some(name) => Some(vec![projects::authorize_committed(name, Right::Admin)?.id]),
        None if security::is_server_admin(security::current_user()) => None,
        None => Some(projects::administered()?),
    };
    let collection = collection
        .map(CollectionName::parse)
        .transpose()?
        .map(|name| name.as_str().to_owned());
    if let (Some(name), Some([project_id])) = (&collection, projects.as_deref())
        && projects::collection_id(*project_id, name)? == 0
    {
        // Perhaps it was collected a moment ago: the task digests first, and says so if it is not there then.
        return Ok(Scope {
            projects: Some(vec![*project_id]),
            collection,
        });
    }
    Ok(Scope {
        projects,
        collection,
    })
}

/// In the task worker: does it, and gives the value the caller waits for.
pub fn perform(task: &Task) -> std::result::Result<serde_json::Value, Failure> {
    if !xact::worker(|| restore::is_over(Waits::Yes))? {
        return Err(Failure::Error(restore::under_way()));
    }
    match task {
        Task::Tick { projects } => perform_tick(projects.as_deref()).map(|()| json!(null)),
        Task::Flush { scope } => perform_flush(scope),
        Task::Compact { scope } => perform_compact(scope),
        Task::Keep {
            project_id,
            collection,
            keep,
        } => perform_keep(*project_id, collection, *keep).map(|()| json!(null)),
        Task::CreateTables => {
            digest::catch_up(None)?;
            sync_for(Duration::from_secs(1)).map(|()| json!(null))
        }
        Task::Delete(deletion) => {
            let deleted = delete::perform(deletion)?;
            // What was deleted stays deleted, also for a catalogue made of the storage alone.
            describe::all()?;
            Ok(deleted)
        }
        Task::Rebuild { storage } => rebuild::perform(storage),
        Task::CreateCollection { project_id, name } => {
            declare::perform_create_collection(*project_id, name).map(|()| json!(null))
        }
        Task::AddField {
            project_id,
            collection,
            field,
            ty,
        } => declare::perform_add_field(*project_id, collection, field, ty).map(|()| json!(null)),
        Task::Change(change) => {
            definitions::perform(change)?;
            describe::all()?;
            Ok(json!(null))
        }
        Task::Attach(request) => attach::perform(request).map(|left_out| json!(left_out)),
        Task::Detach(request) => attach::undo(request).map(|()| json!(null)),
        Task::CheckStorage { storage_id } => storages::check(*storage_id).map(|()| json!(null)),
        Task::AdoptStorage { storage_id } => storages::adopt(*storage_id).map(|()| json!(null)),
        Task::Seek(request) => seek::perform(request).map(|()| json!(null)),
        Task::CopyFrom(request) => {
            let (project, name) = (request.project_id, &request.collection);
            let events = load::run(request, |collection_id| {
                sync_until(Duration::from_secs(5), || ddl::ensure_table(project, name))?;
                sync_until(Duration::from_secs(5), || ddl::sync(collection_id))
            })?;
            Ok(json!(events))
        }
    }
}

fn perform_tick(projects: Option<&[i32]>) -> std::result::Result<(), Failure> {
    // First out, then in: what comes back is there at the end.
    relay::drain(RELAY_TIME)?;
    if !shared::preloaded() {
        consumer::round()?;
    }
    digest::catch_up(None)?;
    sync_for(Duration::from_secs(1))?;
    {
        let _lock = SessionLock::take(LockOn::Digest);
        digest::retry_parked()?;
        rotate::run()?;
        upkeep::run()?;
    }
    upkeep::names_and_logs()?;
    upkeep::dropped_collections()?;
    reach::ask_failing()?;
    let mut hot = Hot::default();
    hot.refresh()?;
    // What fails of one collection or storage must not keep the others from their turn.
    let mut errors = Errors {
        projects,
        first: None,
    };
    for (id, work) in hot.due() {
        errors.keep(
            Some(id),
            match work {
                Work::Flush => flush::try_collection(id).map(drop),
                Work::Merge => merge::collection(id).map(drop),
            },
        )?;
    }
    errors.keep(None, ids::run())?;
    for id in rewrite::due()? {
        errors.keep(Some(id), rewrite::try_collection(id).map(drop))?;
    }
    for id in compact::due(None)?.0 {
        errors.keep(Some(id), compact::try_collection(id).map(drop))?;
    }
    gc::tables()?;
    errors.keep(None, gc::storages(Asked::ByCall).map(drop))?;
    erase::all()?;
    errors
        .first
        .map_or(Ok(()), |error| Err(Failure::Error(error)))
}

/// What failed while the rest went on: the first error that the caller may know of.
struct Errors<'a> {
    /// The caller's projects; None: whoever runs the server.
    projects: Option<&'a [i32]>,
    first: Option<PgError>,
}

impl Errors<'_> {
    /// Keeps the error of a collection's work, or (None) of a storage's, for later.
    fn keep(
        &mut self,
        collection: Option<i32>,
        outcome: std::result::Result<(), Failure>,
    ) -> std::result::Result<(), Failure> {
        let error = match outcome {
            // Whoever cancels means all of it.
            Err(Failure::Error(error)) if error.sqlstate != "57014" => error,
            outcome => return outcome,
        };
        let is_theirs = match (self.projects, collection) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(projects), Some(id)) => {
                xact::worker(|| registry::collection_by_id(View::Current, id))?
                    .is_some_and(|found| projects.contains(&found.project_id))
            }
        };
        if is_theirs {
            self.first.get_or_insert(error);
        } else {
            error.log();
        }
        Ok(())
    }
}

fn perform_flush(scope: &Scope) -> std::result::Result<serde_json::Value, Failure> {
    digest::catch_up(scope.projects.as_deref())?;
    sync_for(Duration::from_millis(500))?;
    of_each(scope, |id| {
        let flushed = flush::collection(id)?;
        Ok([flushed.events, flushed.files, flushed.bytes])
    })
}

/// Work on each collection of a scope, then on those of its files that hold deleted events. What fails of one keeps no other
/// from its turn, but for those of a storage that is away; the first error comes at the end.
fn of_each(
    scope: &Scope,
    work: impl Fn(i32) -> std::result::Result<[u64; 3], Failure>,
) -> std::result::Result<serde_json::Value, Failure> {
    let mut errors = Errors {
        projects: scope.projects.as_deref(),
        first: None,
    };
    let mut rows = Vec::new();
    for collection in targets(scope)? {
        let id = collection.id;
        let done = || {
            if errors.first.is_some() && !reach::is_open(id)? {
                return Ok(());
            }
            let [events, files, bytes] = work(id)?;
            rewrite::collection(id)?;
            rows.push((collection.name, events as i64, files as i64, bytes as i64));
            Ok(())
        };
        let outcome = done();
        errors.keep(Some(id), outcome)?;
    }
    rotate_inbox()?;
    describe::all()?;
    errors
        .first
        .map_or_else(|| Ok(json!(rows)), |error| Err(Failure::Error(error)))
}

/// The collections of a scope; of all projects but those that some transaction is dropping.
fn targets(scope: &Scope) -> std::result::Result<Vec<Collection>, Failure> {
    let mut targets = xact::worker(|| {
        registry::in_scope(scope.projects.as_deref(), scope.collection.as_deref())
    })?;
    if scope.projects.is_none() {
        targets.retain(|collection| !dropping::is_going(collection.project_id));
    }
    match &scope.collection {
        Some(name) if targets.is_empty() => Err(Failure::Error(
            PgError::new("42704", format!("collection \"{name}\" does not exist"))
                .hint("The view rakam.collections lists a project's collections."),
        )),
        _ => Ok(targets),
    }
}

fn perform_compact(scope: &Scope) -> std::result::Result<serde_json::Value, Failure> {
    digest::catch_up(scope.projects.as_deref())?;
    of_each(scope, |id| {
        let compacted = compact::collection(id)?;
        Ok([compacted.events, compacted.files, compacted.bytes])
    })
}

/// What is hidden now must not be seen again later, whenever the background would have removed it: so a longer time is
/// set only once all of it is gone.
fn perform_keep(
    project_id: i32,
    collection: &str,
    keep: Option<Keep>,
) -> std::result::Result<(), Failure> {
    digest::catch_up(Some(&[project_id]))?;
    let id = xact::worker(|| {
        let found = registry::collection_named(View::Current, project_id, collection)?.ok_or_else(
            || {
                PgError::new(
                    "42704",
                    format!("collection \"{collection}\" does not exist"),
                )
                .hint("The view rakam.collections lists a project's collections.")
            },
        )?;
        Ok(found.id)
    })?;
    // Who removes events by the time of before does so before this, or finds the new one.
    let locks = match xact::worker(|| retention::lengthens(View::Current, id, keep))? {
        true => Some((
            SessionLock::take(LockOn::Compaction(id)),
            SessionLock::take(LockOn::CollectionJob(id)),
        )),
        false => None,
    };
    if locks.is_some()
        && let Some(before_us) = xact::worker(|| retention::hidden_before(View::Current, id))?
    {
        flush::collection_since(id, Some(before_us))?;
        compact::remove_before(id, before_us)?;
        failpoint::hit("keep.before_set");
    }
    xact::worker(|| {
        retention::set(id, keep)?;
        audit::store_expected()
    })?;
    drop(locks);
    describe::all()
}

/// Empties what can be emptied of the inbox, where deleted events still are.
fn rotate_inbox() -> std::result::Result<(), Failure> {
    if xact::worker(|| inbox::rotation::state(View::Current))?.to_empty == [false; 3] {
        return Ok(());
    }
    let _lock = SessionLock::take(LockOn::Digest);
    rotate::run().map(drop)
}

/// Makes pending tables and columns; waits a while for those that are in use.
fn sync_for(patience: Duration) -> std::result::Result<(), Failure> {
    let deadline = Instant::now() + patience;
    loop {
        let synced = ddl::run()?;
        if synced.busy == 0 || synced.done == 0 && Instant::now() >= deadline {
            return Ok(());
        }
        if synced.done == 0 {
            wait::wait(None, Duration::from_millis(100));
        }
    }
}
