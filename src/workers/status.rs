//! What the workers do, and whether all is well: `rakam.stat_worker`, `rakam.health`.

use std::sync::atomic::Ordering;

use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use super::health::{self, Finding};
use super::{consumer, resident};
use crate::catalog::{event_store, job};
use crate::pg::shared::{self, Consumer, STATES, Slot};
use crate::pg::{Oid, PgError, bgworker, relation, security, types};

/// Called once, by CREATE EXTENSION.
#[pg_extern(schema = "rakam_internal", volatile, parallel_unsafe)]
fn installed() {
    if shared::preloaded() {
        resident::start_with_extension();
    } else {
        PgError::new(
            "00000",
            "rakam works without background workers in this server",
        )
        .hint(
            "Call rakam.tick() now and then, or set shared_preload_libraries = 'rakam' and restart the server: then \
             digests, flushes and new columns happen by themselves, and memory is bounded for the whole server.",
        )
        .notice_of_script();
    }
}

type WorkerRow = (
    Option<i32>,
    Option<String>,
    String,
    Option<String>,
    String,
    Option<TimestampWithTimeZone>,
    i32,
    Option<String>,
);

/// The rows of `rakam.stat_worker`: launcher and residents from shared memory, tasks from the server's own view.
/// Errors are shown to superusers and rakam_admin only: they may name other projects' objects.
#[pg_extern(schema = "rakam_internal", volatile, parallel_restricted)]
#[allow(clippy::type_complexity, reason = "the shape of a SQL table")]
fn workers() -> std::result::Result<
    TableIterator<
        'static,
        (
            name!(pid, Option<i32>),
            name!(database, Option<String>),
            name!(kind, String),
            name!(target, Option<String>),
            name!(state, String),
            name!(since, Option<TimestampWithTimeZone>),
            name!(restarts, i32),
            name!(last_error, Option<String>),
        ),
    >,
    ErrorReport,
> {
    let admin = security::is_server_admin(security::current_user());
    let mut rows: Vec<WorkerRow> = Vec::new();
    if let Some(shared) = shared::get() {
        let launcher = shared.launcher.load(Ordering::Acquire);
        if launcher != 0 {
            rows.push((
                Some(launcher),
                None,
                "launcher".to_owned(),
                None,
                "idle".to_owned(),
                None,
                0,
                None,
            ));
        }
        let here = bgworker::my_database();
        for (database, slot) in shared.taken() {
            let pid = slot.pid.load(Ordering::Acquire);
            let starved = slot.starved.load(Ordering::Acquire);
            if (pid == 0 && !starved) || (database != here && !admin) {
                continue;
            }
            if pid == 0 {
                rows.push((
                    None,
                    relation::database_name(database),
                    "resident".to_owned(),
                    None,
                    "waiting".to_owned(),
                    None,
                    slot.restarts.load(Ordering::Acquire) as i32,
                    Some("no free slot for a background worker".to_owned()),
                ));
                continue;
            }
            let state = slot.state.load(Ordering::Relaxed) as usize;
            let relay = slot.relay.load(Ordering::Acquire);
            if relay != 0 {
                let last_error = match database == here {
                    true => event_store::last_error()?,
                    false => None,
                };
                rows.push((
                    Some(relay),
                    relation::database_name(database),
                    "relay".to_owned(),
                    None,
                    "running".to_owned(),
                    None,
                    0,
                    last_error,
                ));
            }
            let last_error = if admin && database == here {
                job::last_error()?
            } else {
                None
            };
            rows.push((
                Some(pid),
                relation::database_name(database),
                "resident".to_owned(),
                None,
                STATES.get(state).copied().unwrap_or("idle").to_owned(),
                types::timestamptz(slot.since_us.load(Ordering::Acquire)),
                slot.restarts.load(Ordering::Acquire) as i32,
                last_error,
            ));
            rows.extend(consumers(database, slot));
        }
    }
    rows.extend(job::tasks()?.into_iter().map(|(pid, database, since)| {
        (
            Some(pid),
            database,
            "task".to_owned(),
            None,
            "running".to_owned(),
            since,
            0,
            None,
        )
    }));
    Ok(TableIterator::new(rows))
}

/// The consumers of a database; what a source struggles with is in `rakam.stat_source`.
fn consumers(database: Oid, slot: &Slot) -> Vec<WorkerRow> {
    let live = consumer::live(slot);
    let restarts = slot.consumer_restarts.load(Ordering::Acquire) as i32;
    let of = |pid: i32, consumer: &Consumer| {
        let splits = consumer.splits.load(Ordering::Relaxed);
        (
            Some(pid),
            relation::database_name(database),
            "consumer".to_owned(),
            Some(format!("{splits} splits")),
            match live.contains(&pid) {
                true => "running".to_owned(),
                false => "stalled".to_owned(),
            },
            types::timestamptz(consumer.since_us.load(Ordering::Acquire)),
            restarts,
            None,
        )
    };
    (slot.consumers.iter())
        .map(|consumer| (consumer.pid.load(Ordering::Acquire), consumer))
        .filter(|(pid, _)| *pid != 0)
        .map(|(pid, consumer)| of(pid, consumer))
        .collect()
}

/// One look at everything. Counts are those of the caller's own projects; superusers and rakam_admin see all.
/// SQL: `rakam.health() → TABLE("check" text, status text, detail text, hint text)`.
#[pg_extern(sql = r#"
CREATE FUNCTION rakam.health() RETURNS TABLE("check" text, status text, detail text, hint text)
LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'health_wrapper';
"#)]
#[allow(clippy::type_complexity, reason = "the shape of a SQL table")]
fn health() -> std::result::Result<
    TableIterator<
        'static,
        (
            name!(check, String),
            name!(status, String),
            name!(detail, String),
            name!(hint, Option<String>),
        ),
    >,
    ErrorReport,
> {
    let mut findings = vec![worker_finding()];
    findings.extend(health::of_projects()?);
    if security::is_server_admin(security::current_user()) {
        findings.extend(health::of_server()?);
    }
    let rows: Vec<_> = findings
        .into_iter()
        .map(|f| {
            (
                f.check.to_owned(),
                f.status.as_str().to_owned(),
                f.detail,
                f.hint,
            )
        })
        .collect();
    Ok(TableIterator::new(rows))
}

fn worker_finding() -> Finding {
    let Some(shared) = shared::get() else {
        return Finding::info("workers", "the library is not in shared_preload_libraries").hint(
            "Set shared_preload_libraries = 'rakam' and restart the server, or call rakam.tick() now and then.",
        );
    };
    match shared
        .find(bgworker::my_database())
        .map(|slot| slot.pid.load(Ordering::Acquire))
    {
        Some(pid) if pid != 0 => Finding::ok("workers", format!("resident worker {pid} runs")),
        _ => Finding::error("workers", "no resident worker runs in this database").hint(
            "It starts by itself within seconds; if not, max_worker_processes may be exhausted: see the server log.",
        ),
    }
}
