//! What failed last in the background, for `rakam.stat_worker` and `rakam.health`.

use pgrx::datum::TimestampWithTimeZone;

use crate::pg::Result;
use crate::pg::security::ActAs;
use crate::pg::spi::{self, View, arg};

fn key(step: &str, collection_id: i32) -> String {
    if collection_id == 0 {
        step.to_owned()
    } else {
        format!("{step}/{collection_id}")
    }
}

pub fn failed(step: &str, collection_id: i32, error: &str) -> Result<()> {
    // A collection that was dropped meanwhile has no jobs.
    spi::execute(
        "INSERT INTO rakam_internal.job AS j (job_key, failures, last_error, error_at)
         SELECT $1, 1, $2, pg_catalog.clock_timestamp()
         WHERE $3 = 0 OR EXISTS (SELECT FROM rakam_internal.collection WHERE collection_id = $3)
         ON CONFLICT (job_key) DO UPDATE SET failures = j.failures + 1, last_error = $2,
           error_at = pg_catalog.clock_timestamp()",
        &[
            arg(key(step, collection_id)),
            arg(error),
            arg(collection_id),
        ],
    )?;
    Ok(())
}

pub fn succeeded(step: &str, collection_id: i32) -> Result<()> {
    spi::execute(
        "UPDATE rakam_internal.job SET failures = 0, last_ok = pg_catalog.clock_timestamp() WHERE job_key = $1",
        &[arg(key(step, collection_id))],
    )?;
    Ok(())
}

/// The newest error of a step that still fails.
pub fn last_error() -> Result<Option<String>> {
    let _owner = ActAs::owner();
    spi::first(
        View::Current,
        "SELECT job_key || ': ' || last_error FROM rakam_internal.job WHERE failures > 0 ORDER BY error_at DESC LIMIT 1",
        &[],
        |row| row.must(1),
    )
}

/// A task worker that runs now: process id, database, start.
pub type Task = (i32, Option<String>, Option<TimestampWithTimeZone>);

pub fn tasks() -> Result<Vec<Task>> {
    let _owner = ActAs::owner();
    spi::query(
        View::Current,
        "SELECT pid, datname::text, backend_start FROM pg_catalog.pg_stat_activity
         WHERE backend_type IN ('rakam task', 'rakam flush', 'rakam gc', 'rakam compact') AND datname = pg_catalog.current_database() ORDER BY pid",
        &[],
        |row| Ok((row.must(1)?, row.get(2), row.get(3))),
    )
}
